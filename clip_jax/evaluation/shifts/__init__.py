"""Accuracy under natural distribution shift."""
