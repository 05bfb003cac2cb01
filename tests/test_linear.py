"""Products with weights that may be sharded, and what a layer keeps for its gradient."""

import contextlib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import sharding
from mdt_jax.models import layers, linear, plain_attention
from mdt_jax.models.blocks import BlockStack

DEPTH, BATCH, TOKENS, WIDTH, HEADS = 3, 4, 16, 48, 2


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def value_and_gradients(function, x, kernel, along):
    y, pull = jax.vjp(function, x, kernel)
    return y, *pull(along)


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

    mesh = sharding.create_mesh(*mesh_shape) if mesh_shape else None
    # The backward pass is traced outside of the mesh's context: it goes by the forward's.
    with sharding.activations(mesh) if mesh else contextlib.nullcontext():
        y, pull = jax.vjp(ours, x, kernel)
    for a, e in zip((y, *pull(along)), value_and_gradients(einsum, x, kernel, along), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5, rtol=1e-5)


def kept_by_the_stack():
    """How often a loop over layers stacks an array of each shape for its backward pass."""
    stack = BlockStack(
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=4.0,
        grid_size=4,
        skips="none",
        collect=False,
        kernels="plain",
        remat="none",
        unroll=1,
        dtype=jnp.float32,
    )
    x, c = jnp.zeros((BATCH, TOKENS, WIDTH)), jnp.zeros((BATCH, WIDTH))
    positions = jnp.zeros((TOKENS, TOKENS), jnp.int32)
    params = stack.init(jax.random.key(0), x, c, positions)

    def total(params, x, c):
        return stack.apply(params, x, c, positions)[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(total))(params, x, c).jaxpr
    forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    stacked = forward.outvars[forward.params["num_carry"] :]
    assert all(var.aval.shape[0] == DEPTH for var in stacked)
    return Counter(var.aval.shape[1:] for var in stacked)


def test_a_layer_keeps_little_for_its_gradient():
    kept = kept_by_the_stack()
    assert kept[BATCH, HEADS, TOKENS, TOKENS] == 1  # the softmax
    assert kept[BATCH, TOKENS, 4 * WIDTH] == 2  # GELU's argument and result
    # The stream before each norm, what the norms give, and what both branches add.
    assert kept[BATCH, TOKENS, WIDTH] == 6
    # No copies of the kernels, which the loop is given anyway.
    assert not any(shape[0] in (WIDTH, 4 * WIDTH) for shape in kept)


def test_what_differentiation_would_keep_shows(monkeypatch):
    monkeypatch.setattr(plain_attention, "softmax", jax.nn.softmax)
    monkeypatch.setattr(layers, "gelu", jax.nn.gelu)
    kept = kept_by_the_stack()
    assert kept[BATCH, HEADS, TOKENS, TOKENS] > 1
    assert kept[BATCH, TOKENS, 4 * WIDTH] > 2
