"""What stands between a block's products, as Pallas TPU kernels: modulated norm, gated residual.

Each kernel reads every activation once, where the compiler makes a pass over them for each sum: for
mean and variance and, on the way back, for shift, scale, gate and bias. Sums are float32.
`mdt_jax.models.layers` has the plain forms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from mdt_jax.models import placement

_ROWS = 16  # tokens that are in registers at a time
_VMEM_LIMIT = 64 * 2**20
_TOKENS, _VECTOR = ("batch", None, None), ("batch", None)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def modulated_norm(
    x: Float[Array, "batch n width"],
    shift: Float[Array, "batch width"],
    scale: Float[Array, "batch width"],
    epsilon: float,
    interpret: bool = False,
) -> tuple[Float[Array, "batch n width"], Float[Array, "batch n width"]]:
    """LayerNorm(x)·(1 + scale) + shift in x's dtype, computed in float32; and x itself.

    Who goes on with that x has the gradient of both added in one kernel.
    """
    return _norm_forward(x, shift, scale, epsilon, interpret)[0]


def _norm_forward(x: Array, shift: Array, scale: Array, epsilon: float, interpret: bool) -> Any:
    (y,) = _run(
        partial(_norm_kernel, epsilon=epsilon),
        (x, shift, scale),
        [_TOKENS, _VECTOR, _VECTOR],
        [(_TOKENS, x.dtype)],
        interpret,
    )
    return (y, x), (x, shift, scale)


def _norm_backward(epsilon: float, interpret: bool, saved: Any, gradients: Any) -> Any:
    x, shift, scale = saved
    dy, dx = gradients
    dx, d_shift, d_scale = _run(
        partial(_norm_gradient_kernel, epsilon=epsilon),
        (x, scale, dy, dx),
        [_TOKENS, _VECTOR, _TOKENS, _TOKENS],
        [(_TOKENS, x.dtype), (_VECTOR, jnp.float32), (_VECTOR, jnp.float32)],
        interpret,
    )
    return dx, d_shift.astype(shift.dtype), d_scale.astype(scale.dtype)


modulated_norm.defvjp(_norm_forward, _norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def gated_residual(
    x: Float[Array, "batch n width"],
    h: Float[Array, "batch n width"],
    bias: Float[Array, " width"],
    gate: Float[Array, "batch width"],
    interpret: bool = False,
) -> Float[Array, "batch n width"]:
    """x + gate·h, in x's dtype; the compiler fuses it into the product that gives h.

    Args:
      x: the residual stream.
      h: a linear map's result, its bias added.
      bias: that bias, whose gradient is summed here.
      gate: per sample.
      interpret: whether to interpret the kernels, which needs no TPU.
    """
    return x + gate[:, None].astype(h.dtype) * h


def _residual_forward(x: Array, h: Array, bias: Array, gate: Array, interpret: bool) -> Any:
    return gated_residual(x, h, bias, gate), (h, gate)


def _residual_backward(interpret: bool, saved: Any, dx: Array) -> Any:
    h, gate = saved
    dh, total, along = _run(
        _residual_gradient_kernel,
        (dx, h, gate),
        [_TOKENS, _TOKENS, _VECTOR],
        [(_TOKENS, h.dtype), (_VECTOR, jnp.float32), (_VECTOR, jnp.float32)],
        interpret,
    )
    d_bias = jnp.sum(gate.astype(jnp.float32) * total, axis=0)
    return dx, dh, d_bias, along.astype(gate.dtype)


gated_residual.defvjp(_residual_forward, _residual_backward)


def _run(
    kernel: Callable,
    arguments: tuple[Array, ...],
    inputs: list[placement.Axes],
    outputs: list[tuple[placement.Axes, Any]],
    interpret: bool,
) -> tuple[Array, ...]:
    """Runs a kernel for each sample; vectors (batch, width) come as (1, width) rows."""

    def local(*arrays: Array) -> tuple[Array, ...]:
        batch, n, width = arrays[0].shape

        def shape(axes: placement.Axes) -> tuple[int, ...]:
            return (batch, n if len(axes) == 3 else 1, width)

        def block(axes: placement.Axes) -> pl.BlockSpec:
            return pl.BlockSpec((1, *shape(axes)[1:]), lambda b: (b, 0, 0))

        out = pl.pallas_call(
            kernel,
            grid=(batch,),
            in_specs=[block(axes) for axes in inputs],
            out_specs=[block(axes) for axes, _ in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape(axes), dtype) for axes, dtype in outputs],
            name=getattr(kernel, "func", kernel).__name__.strip("_"),
            interpret=interpret,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_LIMIT
            ),
        )(*(a.reshape(shape(axes)) for a, axes in zip(arrays, inputs, strict=True)))
        return tuple(
            a if len(axes) == 3 else a.reshape(batch, width)
            for a, (axes, _) in zip(out, outputs, strict=True)
        )

    results = tuple(axes for axes, _ in outputs)
    run = placement.current.get().partition(local, tuple(inputs), results)
    return run(*arguments)


def _chunks(n: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, n)) for start in range(0, n, _ROWS)]


def _normalised(x: Array, epsilon: float) -> tuple[Array, Array]:
    """(x − mean)·r and r, the inverse deviation, of rows."""
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def _float(ref: Any, rows: slice = slice(None)) -> Array:
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


def _norm_kernel(x: Any, shift: Any, scale: Any, y: Any, *, epsilon: float) -> None:
    factor, shift = 1 + _float(scale), _float(shift)
    for rows in _chunks(x.shape[1]):
        normalised, _ = _normalised(_float(x, rows), epsilon)
        y[0, rows, :] = (normalised * factor + shift).astype(y.dtype)


def _norm_gradient_kernel(
    x: Any,
    scale: Any,
    dy: Any,
    dx_more: Any,
    dx: Any,
    d_shift: Any,
    d_scale: Any,
    *,
    epsilon: float,
) -> None:
    factor = 1 + _float(scale)
    of_shift, of_scale = _Sum(x.shape[2]), _Sum(x.shape[2])
    for rows in _chunks(x.shape[1]):
        normalised, inverse = _normalised(_float(x, rows), epsilon)
        g = _float(dy, rows)
        of_shift.add(g)
        of_scale.add(g * normalised)
        g = g * factor
        along = jnp.mean(g * normalised, axis=1, keepdims=True)
        g = inverse * (g - jnp.mean(g, axis=1, keepdims=True) - along * normalised)
        dx[0, rows, :] = (_float(dx_more, rows) + g).astype(dx.dtype)
    d_shift[0], d_scale[0] = of_shift.total(), of_scale.total()


def _residual_gradient_kernel(dx: Any, h: Any, gate: Any, dh: Any, total: Any, along: Any) -> None:
    factor = _float(gate)
    sum_dx, sum_along = _Sum(dx.shape[2]), _Sum(dx.shape[2])
    for rows in _chunks(dx.shape[1]):
        g = _float(dx, rows)
        sum_dx.add(g)
        sum_along.add(g * _float(h, rows))
        dh[0, rows, :] = (g * factor).astype(dh.dtype)
    total[0], along[0] = sum_dx.total(), sum_along.total()
