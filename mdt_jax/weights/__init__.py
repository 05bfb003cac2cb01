"""Pretrained networks with their weights, from PyTorch's files or a run's workdir."""
