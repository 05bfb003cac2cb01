"""The PRNG key of a seed, the same wherever there is one."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from mdt_jax.basics import ranges


def key_of(seed: Any, named: str = "key") -> Array:
    """The PRNG key of a seed of up to 63 bits; a key is returned as it is.

    `jax.random.key` drops what is above 32 bits unless JAX computes in 64, which here it does not.
    The upper half goes where JAX in 64 bits puts it, so that all seeds have different keys, and
    those below 2³² have the keys that `jax.random.key` gives them.

    Args:
      seed: an integer from 0 to 2⁶³ − 1, or a key.
      named: what a message calls it.

    Raises:
      ValueError: a number that is no such integer, or an array that is not one key.
    """
    is_array = hasattr(seed, "dtype") and hasattr(seed, "ndim")
    if is_array and (seed.ndim or jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key)):
        _check_key(seed, named)
        return seed
    ranges.check("seed", seed, named)
    high, low = divmod(int(seed), 2**32)
    key = jax.random.key(low)
    if not high:
        return key
    # Threefry's key is its upper and lower half; other generators' keys are copies of the two.
    data = jax.random.key_data(key).at[..., ::2].set(np.uint32(high))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def _check_key(key: Any, named: str) -> None:
    """Refuses, with ValueError, an array that is not one PRNG key, of the new or the old type."""
    typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    shape = key.shape if typed else key.shape[:-1]
    if shape:
        raise ValueError(
            f"{named} holds {np.prod(shape)} keys, of shape {shape}; give one of them, or a seed"
        )
    old = jax.eval_shape(jax.random.PRNGKey, 0)
    if not typed and (key.dtype, key.shape) != (old.dtype, old.shape):
        raise ValueError(
            f"{named} {np.asarray(key).tolist()} is no PRNG key; give a seed, or jax.random.key(0)"
        )
