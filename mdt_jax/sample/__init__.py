"""The command `python -m mdt_jax.sample`; its text is in `__main__.py`.

In Python `mdt_jax.sample` is the function `mdt_jax.sampling.sample`. `mdt_jax/__init__.py` imports
this package first of all, so it must stay empty.
"""
