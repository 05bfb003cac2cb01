"""Name maps between PyTorch state dicts and Flax trees: pure functions on NumPy arrays."""
