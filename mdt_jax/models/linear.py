"""Linear maps with float32 weights that may be sharded: cast, then gathered, then multiplied.

Left to itself, the partitioner of a product with sharded weights may cut the contraction into one
slice a chip, which leaves much of a TPU's matrix unit empty. Here they are cast to the compute
dtype, gathered once a use and multiplied whole; their gradient is summed over tokens and over
devices in float32.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mdt_jax.models import placement
from mdt_jax.models.placement import Axes

OUTPUT = "linear"  # what rematerialisation policies call a linear map's result


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """float32 end to end also asks for float32 products, no default on TPUs and TF32 GPUs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    axes: Axes,
    num_contracted: int,
    tokens_last: bool = False,
) -> Float[Array, "..."]:
    """x times a kernel in x's dtype, over the last axes of x and the first of the kernel.

    Args:
      x: activations, batch first.
      kernel: float32, as the state holds it.
      axes: the kernel's logical axes.
      num_contracted: how many axes are summed over.
      tokens_last: whether the result is (batch, *features, n), for an x (batch, n, ...). A
        transpose would do, but the TPU's compiler makes a copy of it.

    Returns:
      The product, its features in one axis where `Placement.merges`.
    """
    return _forward(x, kernel, axes, num_contracted, tokens_last)[0]


def _forward(
    x: Array, kernel: Array, axes: Axes, num_contracted: int, tokens_last: bool
) -> tuple[Array, Any]:
    saved = x, kernel  # as given: a loop over layers need not stack copies of their kernels
    x, kernel, axes, num_contracted = _matrices(x, kernel, axes, num_contracted)
    kernel = _gathered(kernel, x.dtype, axes)
    first, last = tuple(range(num_contracted)), tuple(range(x.ndim - num_contracted, x.ndim))
    if tokens_last:
        return jnp.moveaxis(_product(kernel, x, (first, last)), -2, 0), saved
    return _product(x, kernel, (last, first)), saved


def _backward(
    axes: Axes, num_contracted: int, tokens_last: bool, saved: Any, dy: Array
) -> tuple[Array, ...]:
    x, kernel, axes, num_contracted = _matrices(*saved, axes, num_contracted)
    rows = tuple(range(x.ndim - num_contracted))  # axes of x that are kept
    dy_rows = (0, dy.ndim - 1) if tokens_last else rows
    features = tuple(axis for axis in range(dy.ndim) if axis not in dy_rows)
    kernel_features = tuple(range(num_contracted, kernel.ndim))
    dx = _product(dy, _gathered(kernel, x.dtype, axes), (features, kernel_features))
    dkernel = _product(x, dy, (rows, dy_rows), jnp.float32)
    dkernel = placement.current.get().shard(dkernel, axes)
    return tuple(d.reshape(s.shape) for d, s in zip((dx, dkernel), saved, strict=True))


def _matrices(
    x: Array, kernel: Array, axes: Axes, num_contracted: int
) -> tuple[Array, Array, Axes, int]:
    """The same with a kernel of two axes, if they may be merged.

    Of more axes the TPU's compiler makes slower products.
    """
    if not placement.current.get().merges:
        return x, kernel, axes, num_contracted
    rows, contracted = x.shape[: x.ndim - num_contracted], kernel.shape[:num_contracted]
    size = math.prod(contracted)
    merged = _merged(axes[:num_contracted]), _merged(axes[num_contracted:])
    return x.reshape(*rows, size), kernel.reshape(size, -1), merged, 1


def _merged(axes: Axes) -> str | None:
    """What the axes are as one; of several only `embed`, the first of its group, is ever cut."""
    return axes[0] if len(axes) == 1 or axes[0] == "embed" else None


def _gathered(kernel: Array, dtype: DTypeLike, axes: Axes) -> Array:
    place = placement.current.get()
    # As sharded as before it is cast: what travels is of the smaller dtype.
    return place.gather(place.shard(kernel.astype(dtype), axes), axes)


def _product(a: Array, b: Array, contracted: Any, dtype: DTypeLike | None = None) -> Array:
    precision = matmul_precision(a.dtype)
    return jax.lax.dot_general(
        a, b, (contracted, ((), ())), precision=precision, preferred_element_type=dtype
    )


project.defvjp(_forward, _backward)


@jax.custom_vjp
def add_bias(x: Float[Array, "... *features"], bias: Float[Array, "*features"]) -> Array:
    """x plus a float32 bias in x's dtype, whose gradient is summed in float32."""
    return x + bias.astype(x.dtype)


def _bias_gradient(bias: Array, dy: Array) -> tuple[Array, Array]:
    return dy, jnp.sum(dy.astype(jnp.float32), axis=tuple(range(dy.ndim - bias.ndim)))


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _bias_gradient)


class Linear(nn.Module):
    """A linear map of the last axes, with bias.

    Attributes:
      features: sizes of the axes that come out.
      axes: logical names of the kernel's axes, those summed over first.
      dtype: compute dtype.
      kernel_init: of the kernel as one matrix, whose fans count.
      bias_init: of the bias.
      bias_gradient: whether to give the bias its gradient; else it is returned beside the result,
        and has none but from a kernel that is given it (attention's, or the gated residual's).
      tokens_last: whether the result is (batch, *features, n); without the bias' gradient only.
      kept: whether the rematerialisation policy "dots" keeps the result.
    """

    features: tuple[int, ...]
    axes: Axes
    dtype: DTypeLike
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    bias_gradient: bool = True
    tokens_last: bool = False
    kept: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Array | tuple[Array, Array]:
        if self.tokens_last and self.bias_gradient:
            raise ValueError("tokens_last=True is to be used with bias_gradient=False")
        count = len(self.axes) - len(self.features)
        contracted = x.shape[x.ndim - count :]

        def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            flat = (math.prod(contracted), math.prod(self.features))
            return self.kernel_init(key, flat, dtype).reshape(shape)

        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.axes),
            (*contracted, *self.features),
            jnp.float32,
        )
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(self.bias_init, self.axes[count:]),
            self.features,
            jnp.float32,
        )
        kernel, bias = jnp.asarray(kernel), jnp.asarray(bias)  # NumPy's may be given
        rows = x.shape[: x.ndim - count]
        y = project(x.astype(self.dtype), kernel, self.axes, count, self.tokens_last)
        # What follows is fused with the product in its shape.
        shape = y.shape[1:-1] + (1,) if self.tokens_last else y.shape[len(rows) :]
        if self.bias_gradient:
            y = add_bias(y, bias.reshape(shape))
        else:
            y = y + jax.lax.stop_gradient(bias).reshape(shape).astype(y.dtype)
        if self.kept:
            y = checkpoint_name(y, OUTPUT)
        before, after = (rows[:-1], rows[-1:]) if self.tokens_last else (rows, ())
        y = y.reshape(*before, *self.features, *after)
        return y if self.bias_gradient else (y, bias)
