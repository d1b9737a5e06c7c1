"""Near duplicates of evaluated images in training data, and what they are worth."""
