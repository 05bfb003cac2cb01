"""Judging samples: features of images, and distances between sets of images."""

SPLIT_SIZE = 5000  # images of a split of the Inception Score
