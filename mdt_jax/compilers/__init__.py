"""Asks a TPU's compiler, without a TPU, for the memory, the work and the time of a program."""
