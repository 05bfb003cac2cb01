"""The kernels of modulated norm and gated residual, interpreted, against the plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models import layers, norm_kernels


def arrays(n, seed=0, batch=2, width=128, passes=1):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    tokens, vector = (batch, n, width), (batch, passes, width)
    # Off centre, so that a variance by E[x²] − E[x]² would show.
    return draw(*tokens) + 30, draw(*tokens), draw(*vector), draw(*vector), draw(width)


def assert_alike(actual, expected, tolerance=1e-5):
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, e in leaves:
        assert a.shape == e.shape
        assert float(jnp.abs(a - e).max() / jnp.abs(e).max()) < tolerance


def plain_norm(x, shift, scale, lengths=None):
    return layers.modulated_norm(x, shift, scale, lengths or (x.shape[1],)), x


@pytest.mark.parametrize("lengths", [(16,), (40,), (51,), (32, 19)])
def test_modulated_norm(lengths):
    x, along, shift, scale, _ = arrays(sum(lengths), passes=len(lengths))

    def through(norm):
        out, pull = jax.vjp(norm, x, shift, scale)
        return out, pull((along, 2 * along))

    def kernel(x, shift, scale):
        return norm_kernels.modulated_norm(x, shift, scale, lengths, layers.EPSILON, True)

    def plain(x, shift, scale):
        return plain_norm(x, shift, scale, lengths)

    assert_alike(jax.jit(lambda: through(kernel))(), through(plain))


def test_another_epsilon_shows():
    x, _, shift, scale, _ = arrays(16)
    y, _ = norm_kernels.modulated_norm(x, shift, scale, (16,), 1e-2, True)
    with pytest.raises(AssertionError):
        assert_alike(y, plain_norm(x, shift, scale)[0])


@pytest.mark.parametrize("lengths", [(16,), (51,), (32, 19)])
def test_gated_residual(lengths):
    x, h, gate, _, bias = arrays(sum(lengths), passes=len(lengths))

    def through(residual):
        # The linear map's own product, before its bias, is h.
        out, pull = jax.vjp(residual, x, h, bias, gate)
        return out, pull(x - 30)

    def kernel(x, h, bias, gate):
        biased = h + jax.lax.stop_gradient(bias)
        return norm_kernels.gated_residual(x, biased, bias, gate, lengths, True)

    def plain(x, h, bias, gate):
        return x + jnp.repeat(gate, jnp.array(lengths), axis=1) * (h + bias)

    assert_alike(jax.jit(lambda: through(kernel))(), through(plain))


def test_vectors_keep_their_dtype_and_sums_are_float32():
    x, along, shift, scale, _ = (a.astype(jnp.bfloat16) for a in arrays(32))
    y, pull = jax.vjp(
        lambda *a: norm_kernels.modulated_norm(*a, (32,), layers.EPSILON, True)[0], x, shift, scale
    )
    dx, d_shift, _ = pull(along)
    assert {y.dtype, dx.dtype, d_shift.dtype} == {jnp.dtype(jnp.bfloat16)}
    exact = along.astype(jnp.float32).sum(axis=1, keepdims=True)
    assert_alike(d_shift.astype(jnp.float32), exact, tolerance=2**-8)
