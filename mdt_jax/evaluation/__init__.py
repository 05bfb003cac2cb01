"""Judging samples: features of images, and the distances between sets of them."""
