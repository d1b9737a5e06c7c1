"""Features of a frozen encoder and the paper's logistic regression on them."""
