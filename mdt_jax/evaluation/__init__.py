"""Judging samples: features of images, and distances between sets of images."""
