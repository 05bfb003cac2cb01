"""Modulated norm, gated residual and GELU with gradients that are written out, for GPUs.

They are plain JAX that the compiler for CUDA makes fewer passes over activations of than of the
plain forms' derivatives. The forward pass keeps mean and deviation, which derivatives compute
again; sums that need the same arrays stand side by side; a bias' gradient comes from the sums for
its gate. GELU's derivative is of another form, lest its tanh be stored for it. And activations lie
in memory as their axes stand: left alone, the compiler lays the batch innermost, as the sums for
shifts and scales would have it, and then writes transposes and float32 copies beside each product.
All sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32

from mdt_jax.models import placement
from mdt_jax.models.passes import over_tokens, segments


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def modulated_norm(
    x: Float[Array, "batch n width"],
    shift: Float32[Array, "batch passes width"],
    scale: Float32[Array, "batch passes width"],
    lengths: tuple[int, ...],
    epsilon: float,
) -> tuple[Float[Array, "batch n width"], Float[Array, "batch n width"]]:
    """LayerNorm(x)·(1 + scale) + shift in x's dtype, computed in float32; and x itself.

    A caller that goes on with that x has the gradients of both added in one kernel.

    Args:
      x: tokens, those of each pass after the other.
      shift, scale: one row for each pass.
      lengths: tokens of each pass.
      epsilon: added to the variance.
    """
    return _norm_forward(x, shift, scale, lengths, epsilon)[0]


def _norm_forward(
    x: Array, shift: Array, scale: Array, lengths: tuple[int, ...], epsilon: float
) -> Any:
    def forward(x: Array, shift: Array, scale: Array) -> tuple[Array, ...]:
        x = in_order(x)
        factor, offset = over_tokens(1 + scale, lengths), over_tokens(shift, lengths)
        y = _normalised(x.astype(jnp.float32), epsilon) * factor + offset
        return (rounded(y.astype(x.dtype)), x, *moments(x, epsilon))

    with jax.named_scope("modulated_norm"):
        y, x, *of_tokens = _on_each_device(forward, (x, shift, scale), 4)
    return (y, x), (x, scale, *of_tokens)


def _normalised(x: Float32[Array, "..."], epsilon: float) -> Float32[Array, "..."]:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)


def _norm_backward(lengths: tuple[int, ...], epsilon: float, saved: Any, gradients: Any) -> Any:
    def terms(dy: Array, x: Array, mean: Array, inverse: Array) -> tuple[Array, Array]:
        dy = dy.astype(jnp.float32)
        return dy, dy * ((x.astype(jnp.float32) - mean) * inverse)

    def backward(x: Array, scale: Array, mean: Array, inverse: Array, dy: Array, dx: Array) -> Any:
        dy, dx = in_order(dy), in_order(dx)
        d_shift, d_scale = sums_by_pass(terms, (dy, x, mean, inverse), lengths)
        normalised = (x.astype(jnp.float32) - mean) * inverse
        g = dy.astype(jnp.float32) * over_tokens(1 + scale, lengths)
        along = jnp.mean(g * normalised, axis=-1, keepdims=True)
        g = inverse * (g - jnp.mean(g, axis=-1, keepdims=True) - along * normalised)
        return rounded((dx.astype(jnp.float32) + g).astype(x.dtype)), d_shift, d_scale

    with jax.named_scope("modulated_norm"):
        return _on_each_device(backward, (*saved, *gradients), 3)


modulated_norm.defvjp(_norm_forward, _norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def gated_residual(
    x: Float[Array, "batch n width"],
    h: Float[Array, "batch n width"],
    bias: Float32[Array, " width"],
    gate: Float32[Array, "batch passes width"],
    lengths: tuple[int, ...],
) -> Float[Array, "batch n width"]:
    """x + gate·h, in x's dtype.

    Args:
      x: the residual stream.
      h: a linear map's result, its bias added.
      bias: that bias, whose gradient is summed here.
      gate: one row for each pass.
      lengths: tokens of each pass.
    """
    return _residual_forward(x, h, bias, gate, lengths)[0]


def _residual_forward(
    x: Array, h: Array, bias: Array, gate: Array, lengths: tuple[int, ...]
) -> Any:
    def forward(x: Array, h: Array, gate: Array) -> tuple[Array]:
        return (in_order(x + over_tokens(gate.astype(h.dtype), lengths) * h),)

    (x,) = _on_each_device(forward, (x, h, gate), 1)
    return x, (h, gate)


def _residual_backward(lengths: tuple[int, ...], saved: Any, dx: Array) -> Any:
    def terms(dx: Array, h: Array) -> tuple[Array, Array]:
        dx = dx.astype(jnp.float32)
        return dx, dx * h.astype(jnp.float32)

    def backward(h: Array, gate: Array, dx: Array) -> tuple[Array, ...]:
        dx = in_order(dx)
        dh = rounded(over_tokens(gate.astype(dx.dtype), lengths) * dx)
        return dx, dh, *sums_by_pass(terms, (dx, h), lengths)

    dx, dh, total, d_gate = _on_each_device(backward, (*saved, dx), 4)
    return dx, dh, jnp.sum(saved[1] * total, axis=(0, 1)), d_gate


gated_residual.defvjp(_residual_forward, _residual_backward)


def _on_each_device(
    function: Callable[..., tuple[Array, ...]],
    arrays: Sequence[Float[Array, "batch _ _"]],
    outputs: int,
) -> tuple[Float[Array, "batch _ _"], ...]:
    """Runs a function of arrays (batch, rows, columns) on each device's samples.

    The partitioner would gather a whole batch for a layout.
    """
    axes = ("batch", None, None)
    run = placement.current.get().partition(function, (axes,) * len(arrays), (axes,) * outputs)
    return tuple(run(*arrays))


def sums_by_pass(
    terms: Callable[..., tuple[Float32[Array, "batch _ width"], ...]],
    arrays: tuple[Float[Array, "batch n _"], ...],
    lengths: tuple[int, ...],
) -> list[Float32[Array, "batch passes width"]]:
    """The sums of each of `terms(*arrays)` over each pass's own tokens, a pass' in one kernel.

    Args:
      terms: what is summed, of a pass's part of the arrays.
      arrays: tokens and what else each token has.
      lengths: tokens of each pass.
    """
    by_pass = [_sums(terms(*(x[:, a:b] for x in arrays)), 1) for a, b in segments(lengths)]
    return [in_order(jnp.stack(sums, axis=1)) for sums in zip(*by_pass, strict=True)]


def _sums(
    values: tuple[Float32[Array, "..."], ...], axis: int
) -> tuple[Float32[Array, "..."], ...]:
    """The sums of several arrays over an axis, as one operation and so as one kernel."""

    def add(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return jax.lax.reduce(values, (jnp.float32(0),) * len(values), add, (axis,))


def moments(
    x: Float[Array, "batch n width"], epsilon: float
) -> tuple[Float32[Array, "batch n 1"], Float32[Array, "batch n 1"]]:
    """Each token's mean and inverse deviation, in one pass over x, for the way back.

    The variance is E[(x − p)²] − E[x − p]², where p is the token's first feature: it does not
    cancel however far from 0 a token's features are.
    """
    wide = x.astype(jnp.float32)
    first = wide[..., :1]
    # Not as `_normalised` has the mean: the compiler would then split that kernel.
    total, squares = _sums((wide - first, (wide - first) ** 2), 2)
    mean, square = (values[..., None] / x.shape[-1] for values in (total, squares))
    inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + epsilon)
    return jax.lax.optimization_barrier((mean + first, inverse))


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh form of GELU, computed in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    # (1 + tanh(u)) / 2 is the logistic function of 2u.
    slope = 2 * np.float32(np.sqrt(2 / np.pi))
    half = jax.nn.sigmoid(slope * (wide + 0.044715 * wide**3))
    inner = slope * (1 + 3 * 0.044715 * wide * wide)
    gradient = half + wide * half * (1 - half) * inner
    return ((dy.astype(jnp.float32) * gradient).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def rounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x as its dtype has it, in order: the compiler may else go on with float32, and store that."""
    return in_order(jax.lax.optimization_barrier(x))


def in_order(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, its last axis innermost in memory."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
