"""The command `python -m mdt_jax.evaluate`; its text is in `__main__.py`."""
