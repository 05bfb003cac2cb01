"""Eight host devices for every test, and jaxtyping's annotations checked at run time."""

import os

from jobs import xla_flags

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxtyping

jaxtyping.install_import_hook("mdt_jax", "beartype.beartype")
