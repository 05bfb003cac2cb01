"""What a TPU's compiler says of a program, asked without a TPU: memory, work, time."""
