"""Corrupted images, and accuracy by their severity."""
