"""Products with weights that may be sharded."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import sharding
from mdt_jax.models import layers, linear


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("mesh_shape", [None, (2, 4, 1), (2, 2, 2)])
def test_tokens_last_is_the_product_transposed(mesh_shape):
    """With features merged into one axis (no tensor axis) and apart."""
    x, kernel = draw(4, 16, 8), draw(8, 3, 2, 6)
    axes = ("embed", None, "heads", None)
    along = draw(4, 3, 2, 6, 16, seed=1)

    def einsum(x, kernel):
        return jnp.einsum("bnd,dshw->bshwn", x, kernel)

    def ours(x, kernel):
        y = linear.project(x, kernel, axes, 1, tokens_last=True)
        return y.reshape(4, 3, 2, 6, 16)

    def through(function):
        y, pull = jax.vjp(function, x, kernel)
        return y, *pull(along)

    mesh = sharding.create_mesh(*mesh_shape) if mesh_shape else None
    with sharding.activations(mesh) if mesh else contextlib.nullcontext():
        found = jax.jit(lambda: through(ours))()
    for a, e in zip(found, through(einsum), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5, rtol=1e-5)


def test_tokens_last_needs_someone_else_to_sum_the_bias_gradient():
    layer = linear.Linear((8,), ("embed", None), jnp.float32, layers.xavier, tokens_last=True)
    with pytest.raises(ValueError, match="with bias_gradient=False"):
        layer.init(jax.random.key(0), draw(1, 4, 8))
