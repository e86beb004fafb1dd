"""Measurements of speed and size, one file a claim; both sides in one run, medians and ratios."""
