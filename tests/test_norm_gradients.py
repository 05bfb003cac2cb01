"""The gradients that are written out for GPUs, against those of the plain forms."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_norm_kernels import arrays, assert_alike, plain_norm

from mdt_jax.models import computation, layers, norm_gradients, plain_attention
from mdt_jax.models.blocks import Block
from mdt_jax.models.linear import Product
from mdt_jax.models.passes import Packing
from mdt_jax.parallel import sharding


@pytest.mark.parametrize("lengths", [(16,), (32, 19)])
def test_modulated_norm(lengths):
    x, along, shift, scale, _ = arrays(sum(lengths), passes=len(lengths))

    def through(norm):
        out, pull = jax.vjp(norm, x, shift, scale)
        return out, pull((along, 2 * along))

    def ours(x, shift, scale):
        return norm_gradients.modulated_norm(x, shift, scale, lengths, layers.EPSILON)

    def plain(x, shift, scale):
        return plain_norm(x, shift, scale, lengths)

    assert_alike(jax.jit(lambda: through(ours))(), through(plain))


@pytest.mark.parametrize("lengths", [(16,), (32, 19)])
def test_gated_residual(lengths):
    x, h, gate, _, bias = arrays(sum(lengths), passes=len(lengths))
    packing = Packing(lengths, (None,) * len(lengths), (None,) * len(lengths))

    def through(name):
        def residual(x, h, bias, gate):
            branch = Product(h, bias, "linear")
            return computation.COMPUTATIONS[name].gated_residual(x, gate, branch, packing)

        out, pull = jax.vjp(residual, x, h, bias, gate)
        return out, pull(x - 30)

    assert_alike(jax.jit(lambda: through("cudnn"))(), through("plain"))


def test_gelu():
    x = jnp.linspace(-9, 9, 2001)

    def through(gelu):
        out, pull = jax.vjp(gelu, x)
        return out, pull(jnp.cos(x))

    ours, plain = jax.jit(lambda: through(norm_gradients.gelu))(), through(layers.gelu)
    np.testing.assert_allclose(ours[0], plain[0], atol=1e-6)
    np.testing.assert_allclose(ours[1][0], plain[1][0], atol=1e-5)


def test_activations_and_their_gradients_keep_their_dtype_and_sums_are_float32():
    x, h, shift, scale, bias = arrays(32)
    x, h = x.astype(jnp.bfloat16), h.astype(jnp.bfloat16)
    out, pull = jax.vjp(
        lambda *a: norm_gradients.modulated_norm(*a, (32,), layers.EPSILON), x, shift, scale
    )
    dx, d_shift, d_scale = pull((h, h))
    assert {leaf.dtype for leaf in (*out, dx)} == {jnp.dtype(jnp.bfloat16)}
    assert {d_shift.dtype, d_scale.dtype} == {jnp.dtype(jnp.float32)}
    exact = h.astype(jnp.float32).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(d_shift, exact, rtol=1e-5, atol=1e-4)
    out, pull = jax.vjp(lambda *a: norm_gradients.gated_residual(*a, (32,)), x, h, bias, scale)
    dx, dh, d_bias, d_gate = pull(out)
    assert {leaf.dtype for leaf in (out, dx, dh)} == {jnp.dtype(jnp.bfloat16)}
    assert {d_bias.dtype, d_gate.dtype} == {jnp.dtype(jnp.float32)}
    assert norm_gradients.gelu(x).dtype == jnp.bfloat16


def test_a_block_over_a_mesh():
    """With attention left to XLA, both passes packed, on four devices."""
    lengths, width = (16, 8), 32
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    x, along, c = draw(4, 24, width), draw(4, 24, width), draw(4, 2, width)
    ids = jnp.asarray(np.stack([rng.permutation(16)[:8] for _ in range(4)]).astype(np.int32))
    mesh = sharding.create_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    by_xla = partial(plain_attention.cudnn_attention, implementation="xla")

    def compiled(how):
        block = Block(computation.BlockSettings(2, 4.0, 4, how, "none", 1, jnp.float32))
        pairs = tuple(how.bias_pairs(4, i) for i in (None, ids))
        packing = Packing(lengths, (None, ids), pairs)
        abstract = jax.eval_shape(block.init, jax.random.key(0), x, c, packing)
        leaves, tree = jax.tree.flatten(nn.unbox(abstract))
        drawn = np.random.default_rng(1)
        leaves = [jnp.asarray(0.1 * drawn.normal(size=leaf.shape), jnp.float32) for leaf in leaves]

        def run(params, x, c):
            with sharding.activations(mesh):  # also of the way back, which is traced at its end
                out, pull = jax.vjp(lambda *a: block.apply(*a, packing), params, x, c)
                return out, pull(along)

        whole, batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        jitted = jax.jit(run, in_shardings=(whole, batch, batch))
        arguments = jax.tree.unflatten(tree, leaves), x, c
        program = jitted.lower(*arguments).compile()
        return program.as_text(), jitted(*arguments)

    text, actual = compiled(computation.CudnnComputation(by_xla))
    _, expected = compiled(computation.COMPUTATIONS["plain"])
    assert_alike(actual, expected, 1e-4)
    # The partitioner gathers no activations: weights alone.
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    assert gathered and not [shape for shape in gathered if shape.endswith(f"24,{width}")]
