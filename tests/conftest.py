"""Eight host devices for every test, jaxtyping's annotations checked, and one level of logging."""

import os

import pytest
from absl import logging
from jobs import xla_flags

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxtyping

jaxtyping.install_import_hook("mdt_jax", "beartype.beartype")

_VERBOSITY = logging.get_verbosity()


@pytest.fixture(autouse=True)
def verbosity():
    """No test sees the level of logging that a command run by another has set."""
    yield
    logging.set_verbosity(_VERBOSITY)
