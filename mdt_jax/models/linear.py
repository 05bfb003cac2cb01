"""Linear maps with float32 weights that may be sharded: cast, then gathered, then multiplied.

Left to itself, the partitioner of a product with sharded weights may cut the contraction into one
slice a chip, which leaves much of a TPU's matrix unit empty. Here they are cast to the compute
dtype, gathered once a use and multiplied whole; their gradient is summed over tokens, passes and
devices in float32.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mdt_jax.models import placement
from mdt_jax.models.placement import Axes

# What several passes through the same layers have of one kind, batch first: the full pass' and the
# masked one's, say, which differ in their number of tokens.
Streams = tuple[Array, ...]

LANES = 128  # of a TPU's vector registers
OUTPUT = "linear"  # what rematerialisation policies call a linear map's result


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """float32 end to end also asks for float32 products, no default on TPUs and TF32 GPUs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project(
    xs: Streams,
    kernel: Float[Array, "..."],
    axes: Axes,
    num_contracted: int,
    tokens_last: bool = False,
) -> Streams:
    """Each x times a kernel in x's dtype, over the last axes of x and the first of the kernel.

    The kernel is gathered once for all of them, and their gradients are one sum before it leaves
    the device.

    Args:
      xs: activations of passes that share the kernel, batch first.
      kernel: float32, as the state holds it.
      axes: the kernel's logical axes.
      num_contracted: how many axes are summed over.
      tokens_last: whether results are (batch, *features, lanes), for xs (batch, n, ...): n tokens,
        and others that nobody is to read up to a multiple of LANES. A transpose would do, but the
        TPU's compiler makes a copy of it, and of a result that does not fill its rows of lanes.

    Returns:
      The products, their features in one axis where `Placement.merges`.
    """
    return _forward(xs, kernel, axes, num_contracted, tokens_last)[0]


def _forward(
    xs: Streams, kernel: Array, axes: Axes, num_contracted: int, tokens_last: bool
) -> tuple[Streams, Any]:
    saved = xs, kernel  # as given: a loop over layers need not stack copies of their kernels
    xs, kernel, axes, num_contracted = _matrices(xs, kernel, axes, num_contracted)
    kernel = _gathered(kernel, xs[0].dtype, axes)
    first = tuple(range(num_contracted))

    def multiply(x: Array) -> Array:
        last = tuple(range(x.ndim - num_contracted, x.ndim))
        if tokens_last:
            padding = [(0, 0)] * x.ndim
            padding[1] = (0, -x.shape[1] % LANES)
            return jnp.moveaxis(_product(kernel, jnp.pad(x, padding), (first, last)), -2, 0)
        return _product(x, kernel, (last, first))

    return tuple(map(multiply, xs)), saved


def _backward(
    axes: Axes, num_contracted: int, tokens_last: bool, saved: Any, dys: Streams
) -> tuple[Streams, Array]:
    xs, kernel, axes, num_contracted = _matrices(*saved, axes, num_contracted)
    gathered = _gathered(kernel, xs[0].dtype, axes)
    kernel_features = tuple(range(num_contracted, kernel.ndim))
    place = placement.current.get()
    dxs, dkernels = [], []
    for x, dy in zip(xs, dys, strict=True):
        if tokens_last:
            dy = dy[..., : x.shape[1]]
        # Axes that are neither features nor summed over in the product forward.
        x_rows = tuple(range(x.ndim - num_contracted))
        dy_rows = (0, dy.ndim - 1) if tokens_last else x_rows
        features = tuple(axis for axis in range(dy.ndim) if axis not in dy_rows)
        dxs.append(_product(dy, gathered, (features, kernel_features)))
        dkernels.append(_product_by_device(x, dy, (x_rows, dy_rows), place.batch_shards))
    dkernel = reduce(jnp.add, dkernels)
    add_up = place.add_up if place.batch_shards > 1 else place.shard
    dkernel = add_up(dkernel, axes)
    given_xs, given_kernel = saved
    dxs = tuple(d.reshape(x.shape) for d, x in zip(dxs, given_xs, strict=True))
    return dxs, dkernel.reshape(given_kernel.shape)


def _product_by_device(
    a: Array, b: Array, contracted: tuple[tuple[int, ...], tuple[int, ...]], parts: int
) -> Array:
    """A float32 product summed over the batch, for each of its parts apart: (parts, ...).

    What the partitioner makes of a product summed over a divided batch adds devices' results at
    once. These can be added to others first. One part has no axis of its own.
    """
    if parts == 1:
        return _product(a, b, contracted, jnp.float32)
    a, b = (x.reshape(parts, x.shape[0] // parts, *x.shape[1:]) for x in (a, b))
    rows = tuple(tuple(axis + 1 for axis in axes) for axes in contracted)
    return _product(a, b, rows, jnp.float32, batch=((0,), (0,)))


def _matrices(
    xs: Streams, kernel: Array, axes: Axes, num_contracted: int
) -> tuple[Streams, Array, Axes, int]:
    """The same with a kernel of two axes, if they may be merged.

    Of more axes the TPU's compiler makes slower products.
    """
    if not placement.current.get().merges:
        return xs, kernel, axes, num_contracted
    size = math.prod(kernel.shape[:num_contracted])
    merged = _merged(axes[:num_contracted]), _merged(axes[num_contracted:])
    xs = tuple(x.reshape(*x.shape[: x.ndim - num_contracted], size) for x in xs)
    return xs, kernel.reshape(size, -1), merged, 1


def _merged(axes: Axes) -> str | None:
    """What the axes are as one; of several only `embed`, the first of its group, is ever cut."""
    return axes[0] if len(axes) == 1 or axes[0] == "embed" else None


def _gathered(kernel: Array, dtype: DTypeLike, axes: Axes) -> Array:
    place = placement.current.get()
    # As sharded as before it is cast: what travels is of the smaller dtype.
    return place.gather(place.shard(kernel.astype(dtype), axes), axes)


def _product(
    a: Array,
    b: Array,
    contracted: Any,
    dtype: DTypeLike | None = None,
    batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> Array:
    precision = matmul_precision(a.dtype)
    return jax.lax.dot_general(
        a, b, (contracted, batch), precision=precision, preferred_element_type=dtype
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
    """A linear map of the last axes, with bias, of every pass' activations.

    Attributes:
      features: sizes of the axes that come out.
      axes: logical names of the kernel's axes, those summed over first.
      dtype: compute dtype.
      kernel_init: of the kernel as one matrix, whose fans count.
      bias_init: of the bias.
      bias_gradient: whether to give the bias its gradient; else it is returned beside the result,
        and has none but from a kernel that is given it (attention's, or the gated residual's).
      tokens_last: whether results are (batch, *features, lanes), as `project` has it; without the
        bias' gradient only.
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
    def __call__(self, xs: Streams) -> Streams | tuple[Streams, Array]:
        if self.tokens_last and self.bias_gradient:
            raise ValueError("tokens_last=True is to be used with bias_gradient=False")
        count = len(self.axes) - len(self.features)
        contracted = xs[0].shape[xs[0].ndim - count :]

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
        rows = [x.shape[: x.ndim - count] for x in xs]
        xs = tuple(x.astype(self.dtype) for x in xs)
        ys = project(xs, kernel, self.axes, count, self.tokens_last)
        ys = tuple(self._finish(y, bias, shape) for y, shape in zip(ys, rows, strict=True))
        return ys if self.bias_gradient else (ys, bias)

    def _finish(self, y: Array, bias: Array, rows: tuple[int, ...]) -> Array:
        """Adds the bias to a product with an x (*rows, ...), and gives features their axes back."""
        # What follows is fused with the product in its shape.
        shape = y.shape[1:-1] + (1,) if self.tokens_last else y.shape[len(rows) :]
        if self.bias_gradient:
            y = add_bias(y, bias.reshape(shape))
        else:
            y = y + jax.lax.stop_gradient(bias).reshape(shape).astype(y.dtype)
        if self.kept:
            y = checkpoint_name(y, OUTPUT)
        if self.tokens_last:
            return y.reshape(y.shape[0], *self.features, y.shape[-1])
        return y.reshape(*rows, *self.features)
