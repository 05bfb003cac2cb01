"""What a loop over blocks keeps for its gradient."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from mdt_jax.models import layers, plain_attention
from mdt_jax.models.blocks import BlockStack
from mdt_jax.models.computation import COMPUTATIONS, BlockSettings
from mdt_jax.models.passes import Packing

DEPTH, BATCH, TOKENS, WIDTH, HEADS = 3, 4, 16, 48, 2
LOGITS, HIDDEN = (BATCH, HEADS, TOKENS, TOKENS), (BATCH, TOKENS, 4 * WIDTH)
STREAM = (BATCH, TOKENS, WIDTH)


def kept_by_the_stack(skips="none", dtype=jnp.float32):
    """How often a loop over layers stacks an array of each shape for its backward pass."""
    settings = BlockSettings(HEADS, 4.0, 4, COMPUTATIONS["plain"], "none", 1, dtype)
    stack = BlockStack(settings, DEPTH)
    x, c = jnp.zeros(STREAM, dtype), jnp.zeros((BATCH, 1, WIDTH), dtype)
    packing = Packing((TOKENS,), (None,), (jnp.zeros((TOKENS, TOKENS), jnp.int32),))
    skip = {
        "none": {},
        "shared": {"skip": x},
        "per_layer": {"skips": jnp.stack([x] * DEPTH)},
    }[skips]
    params = stack.init(jax.random.key(0), x, c, packing, **skip)

    def total(params, x, c, skip):
        return stack.apply(params, x, c, packing, **skip).sum()

    jaxpr = jax.make_jaxpr(jax.grad(total))(params, x, c, skip).jaxpr
    forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    stacked = forward.outvars[forward.params["num_carry"] :]
    assert all(var.aval.shape[0] == DEPTH for var in stacked)
    return Counter(var.aval.shape[1:] for var in stacked)


@pytest.mark.parametrize("skips", ["none", "shared", "per_layer"])
def test_a_layer_keeps_little_for_its_gradient(skips):
    kept = kept_by_the_stack(skips)
    assert kept[LOGITS] == 1  # the softmax
    assert kept[HIDDEN] == 2  # GELU's argument and result
    # The stream before each norm, what the norms give, what both branches add; and the stream
    # before a shortcut joins it.
    assert kept[STREAM] == 6 + (skips != "none")
    # Neither kernels, nor parts or other shapes of them: the loop is given those.
    assert all(shape[0] == BATCH or len(shape) < 2 for shape in kept)


def test_in_bfloat16_the_softmax_is_kept_in_both_precisions():
    kept = kept_by_the_stack(dtype=jnp.bfloat16)
    assert kept[LOGITS] == 2 and kept[HIDDEN] == 2


def test_what_differentiation_would_keep_shows(monkeypatch):
    monkeypatch.setattr(plain_attention, "softmax", jax.nn.softmax)
    monkeypatch.setattr(layers, "gelu", jax.nn.gelu)
    monkeypatch.setattr(layers, "modulated_norm", layers.modulated_norm.__wrapped__)
    monkeypatch.setattr(layers, "recompute", lambda function: function)
    kept = kept_by_the_stack("shared")
    assert kept[LOGITS] > 1 and kept[HIDDEN] > 2 and kept[STREAM] > 7
    assert kept[WIDTH, WIDTH] == 2  # the halves of the shortcut's kernel
