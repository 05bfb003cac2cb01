"""The commands that prepare data, move weights and ask compilers, each a module to be run."""
