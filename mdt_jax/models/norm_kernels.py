"""Modulated norm and gated residual as Pallas TPU kernels.

Each kernel reads every activation once, where the compiler makes a pass over them for each sum: for
mean and variance and, on the way back, for shift, scale, gate and bias. Sums are float32.
`mdt_jax.models.layers` and `PlainComputation` have the plain forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from mdt_jax.models import placement
from mdt_jax.models.passes import over_tokens, segments

_ROWS = 16  # tokens that are in registers at a time
_VMEM_LIMIT = 64 * 2**20


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def modulated_norm(
    x: Float[Array, "batch n width"],
    shift: Float[Array, "batch passes width"],
    scale: Float[Array, "batch passes width"],
    lengths: tuple[int, ...],
    epsilon: float,
    interpret: bool = False,
) -> tuple[Float[Array, "batch n width"], Float[Array, "batch n width"]]:
    """LayerNorm(x)·(1 + scale) + shift in x's dtype, computed in float32; and x itself.

    A caller that goes on with that x has the gradients of both added in one kernel.

    Args:
      x: tokens, those of each pass after the other.
      shift, scale: one row for each pass.
      lengths: tokens of each pass.
      epsilon: added to the variance.
      interpret: whether to interpret the kernels, which needs no TPU.
    """
    return _norm_forward(x, shift, scale, lengths, epsilon, interpret)[0]


def _norm_forward(
    x: Array, shift: Array, scale: Array, lengths: tuple[int, ...], epsilon: float, interpret: bool
) -> Any:
    kernel = partial(_norm_kernel, lengths=lengths, epsilon=epsilon)
    (y,) = _run(kernel, (x, shift, scale), [(x.shape, x.dtype)], interpret)
    return (y, x), (x, shift, scale)


def _norm_backward(
    lengths: tuple[int, ...], epsilon: float, interpret: bool, saved: Any, gradients: Any
) -> Any:
    x, shift, scale = saved
    dy, dx = gradients
    kernel = partial(_norm_gradient_kernel, lengths=lengths, epsilon=epsilon)
    sums = (scale.shape, jnp.float32)
    outputs = [(x.shape, x.dtype), sums, sums]
    dx, d_shift, d_scale = _run(kernel, (x, scale, dy, dx), outputs, interpret)
    return dx, d_shift.astype(shift.dtype), d_scale.astype(scale.dtype)


modulated_norm.defvjp(_norm_forward, _norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def gated_residual(
    x: Float[Array, "batch n width"],
    h: Float[Array, "batch n width"],
    bias: Float[Array, " width"],
    gate: Float[Array, "batch passes width"],
    lengths: tuple[int, ...],
    interpret: bool = False,
) -> Float[Array, "batch n width"]:
    """x + gate·h, in x's dtype; the compiler fuses it into the product that gives h.

    Args:
      x: the residual stream.
      h: a linear map's result, its bias added.
      bias: that bias, whose gradient is summed here.
      gate: one row for each pass.
      lengths: tokens of each pass.
      interpret: whether to interpret the kernels, which needs no TPU.
    """
    return x + over_tokens(gate.astype(h.dtype), lengths) * h


def _residual_forward(
    x: Array, h: Array, bias: Array, gate: Array, lengths: tuple[int, ...], interpret: bool
) -> Any:
    return gated_residual(x, h, bias, gate, lengths), (h, gate)


def _residual_backward(lengths: tuple[int, ...], interpret: bool, saved: Any, dx: Array) -> Any:
    h, gate = saved
    sums = (gate.shape, jnp.float32)
    kernel = partial(_residual_gradient_kernel, lengths=lengths)
    outputs = [(h.shape, h.dtype), sums, sums]
    dh, total, along = _run(kernel, (dx, h, gate), outputs, interpret)
    d_bias = jnp.sum(gate.astype(jnp.float32) * total, axis=(0, 1))
    return dx, dh, d_bias, along.astype(gate.dtype)


gated_residual.defvjp(_residual_forward, _residual_backward)


def _run(
    kernel: partial,
    arguments: tuple[Array, ...],
    outputs: list[tuple[tuple[int, ...], Any]],
    interpret: bool,
) -> tuple[Array, ...]:
    """Runs a kernel for each sample of arrays (batch, rows, width)."""

    def local(*arrays: Array) -> tuple[Array, ...]:
        batch = arrays[0].shape[0]

        def block(shape: tuple[int, ...]) -> pl.BlockSpec:
            return pl.BlockSpec((1, *shape[1:]), lambda b: (b, 0, 0))

        return pl.pallas_call(
            kernel,
            grid=(batch,),
            in_specs=[block(x.shape) for x in arrays],
            out_specs=[block(shape) for shape, _ in outputs],
            out_shape=[
                jax.ShapeDtypeStruct((batch, *shape[1:]), dtype) for shape, dtype in outputs
            ],
            name=kernel.func.__name__.strip("_"),
            interpret=interpret,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_LIMIT
            ),
        )(*arrays)

    axes = ("batch", None, None)
    run = placement.current.get().partition(local, (axes,) * len(arguments), (axes,) * len(outputs))
    return tuple(run(*arguments))


def _chunks(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, _ROWS):
        yield slice(first, min(first + _ROWS, stop))


def _normalised(x: Array, epsilon: float) -> tuple[Array, Array]:
    """(x − mean)·r and r, the inverse deviation, of rows."""
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def _float(ref: Any, rows: slice) -> Array:
    return ref[0, rows, :].astype(jnp.float32)


class _Sum:
    """A sum over tokens, folded into one register's rows until the end."""

    def __init__(self, width: int):
        self._folded = jnp.zeros((8, width), jnp.float32)
        self._rest = jnp.zeros((1, width), jnp.float32)

    def add(self, values: Array) -> None:
        whole = len(values) // 8 * 8
        for start in range(0, whole, 8):
            self._folded += values[start : start + 8]
        if whole < len(values):
            self._rest += jnp.sum(values[whole:], axis=0, keepdims=True)

    def total(self) -> Array:
        return jnp.sum(self._folded, axis=0, keepdims=True) + self._rest


def _norm_kernel(
    x: Any, shift: Any, scale: Any, y: Any, *, lengths: tuple[int, ...], epsilon: float
) -> None:
    for i, segment in enumerate(segments(lengths)):
        own = slice(i, i + 1)
        factor, offset = 1 + _float(scale, own), _float(shift, own)
        for rows in _chunks(*segment):
            normalised, _ = _normalised(_float(x, rows), epsilon)
            y[0, rows, :] = (normalised * factor + offset).astype(y.dtype)


def _norm_gradient_kernel(
    x: Any,
    scale: Any,
    dy: Any,
    dx_more: Any,
    dx: Any,
    d_shift: Any,
    d_scale: Any,
    *,
    lengths: tuple[int, ...],
    epsilon: float,
) -> None:
    for i, segment in enumerate(segments(lengths)):
        own = slice(i, i + 1)
        factor = 1 + _float(scale, own)
        of_shift, of_scale = _Sum(x.shape[2]), _Sum(x.shape[2])
        for rows in _chunks(*segment):
            normalised, inverse = _normalised(_float(x, rows), epsilon)
            g = _float(dy, rows)
            of_shift.add(g)
            of_scale.add(g * normalised)
            g = g * factor
            along = jnp.mean(g * normalised, axis=1, keepdims=True)
            g = inverse * (g - jnp.mean(g, axis=1, keepdims=True) - along * normalised)
            dx[0, rows, :] = (_float(dx_more, rows) + g).astype(dx.dtype)
        d_shift[0, own, :], d_scale[0, own, :] = of_shift.total(), of_scale.total()


def _residual_gradient_kernel(
    dx: Any, h: Any, gate: Any, dh: Any, total: Any, along: Any, *, lengths: tuple[int, ...]
) -> None:
    for i, segment in enumerate(segments(lengths)):
        own = slice(i, i + 1)
        factor = _float(gate, own)
        sum_dx, sum_along = _Sum(dx.shape[2]), _Sum(dx.shape[2])
        for rows in _chunks(*segment):
            g = _float(dx, rows)
            sum_dx.add(g)
            sum_along.add(g * _float(h, rows))
            dh[0, rows, :] = (g * factor).astype(dh.dtype)
        total[0, own, :], along[0, own, :] = sum_dx.total(), sum_along.total()
