"""Linear maps with float32 weights that may be sharded: cast, then gathered, then multiplied.

Left to itself, the partitioner of a product with sharded weights may cut the contraction into one
slice a chip, which leaves much of a TPU's matrix unit empty. Here the weights are cast to the
compute dtype, gathered once a use and multiplied whole. Their gradient is summed over tokens and
devices in float32.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from mdt_jax.models import placement
from mdt_jax.models.placement import Axes

LANES = 128  # a TPU's vector registers have so many
OUTPUT = "linear"  # the name of a linear map's result in rematerialisation policies


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """float32 end to end also asks for float32 products, no default on TPUs and TF32 GPUs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(
    x: Float[Array, "..."], kernel: Float[Array, "..."], axes: Axes, num_contracted: int
) -> Float[Array, "..."]:
    """x times a kernel in x's dtype, over the last axes of x and the first of the kernel.

    The kernel is gathered for the product, and its gradient is summed on each device before it is
    sent.

    Args:
      x: activations, batch first.
      kernel: float32, as the state holds it.
      axes: the kernel's logical axes.
      num_contracted: how many axes are summed over.

    Returns:
      The product, its features in one axis where `Placement.merges`.
    """
    return _forward(x, kernel, axes, num_contracted)[0]


def _forward(x: Array, kernel: Array, axes: Axes, num_contracted: int) -> tuple[Array, Any]:
    saved = x, kernel  # as given: a loop over layers need not stack copies of its kernels
    x, kernel, axes, num_contracted = _as_matrices(x, kernel, axes, num_contracted)
    contracted = _last(x, num_contracted), tuple(range(num_contracted))
    return _product(x, _gathered(kernel, x.dtype, axes), contracted), saved


def _backward(axes: Axes, num_contracted: int, saved: Any, dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    x, kernel, axes, num_contracted = _as_matrices(x, kernel, axes, num_contracted)
    rows = tuple(range(x.ndim - num_contracted))
    return _gradients(saved, x, kernel, axes, num_contracted, dy, (rows, rows))


project.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project_tokens_last(
    x: Float[Array, "batch n width"], kernel: Float[Array, "width ..."], axes: Axes
) -> Float[Array, "batch ..."]:
    """`project` over the width, transposed: (batch, *features, lanes).

    There are as many lanes as tokens, rounded up to a multiple of LANES; nobody may read those
    after the tokens. A transpose would do, but the TPU's compiler makes a copy of it, and of a
    result that does not fill its rows of lanes.
    """
    return _forward_tokens_last(x, kernel, axes)[0]


def _forward_tokens_last(x: Array, kernel: Array, axes: Axes) -> tuple[Array, Any]:
    saved = x, kernel
    x, kernel, axes, _ = _as_matrices(x, kernel, axes, 1)
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0)))
    product = _product(_gathered(kernel, x.dtype, axes), padded, ((0,), (2,)))
    return jnp.moveaxis(product, -2, 0), saved


def _backward_tokens_last(axes: Axes, saved: Any, dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    x, kernel, axes, _ = _as_matrices(x, kernel, axes, 1)
    dy = dy[..., : x.shape[1]]
    return _gradients(saved, x, kernel, axes, 1, dy, ((0, 1), (0, dy.ndim - 1)))


project_tokens_last.defvjp(_forward_tokens_last, _backward_tokens_last)


def _gradients(
    saved: tuple[Array, Array],
    x: Array,
    kernel: Array,
    axes: Axes,
    num_contracted: int,
    dy: Array,
    rows: tuple[tuple[int, ...], tuple[int, ...]],
) -> tuple[Array, Array]:
    """Gradients of the saved x and kernel, which `x` and `kernel` are as matrices.

    Args:
      saved: x and kernel as they were given.
      x, kernel, axes, num_contracted: from `_as_matrices`.
      dy: the gradient of the product.
      rows: the axes of x and of dy that are neither features nor summed over in the product.
    """
    features = tuple(axis for axis in range(dy.ndim) if axis not in rows[1])
    kernel_features = tuple(range(num_contracted, kernel.ndim))
    dx = _product(dy, _gathered(kernel, x.dtype, axes), (features, kernel_features))
    place = placement.current.get()
    on_one_cpu = place.platform == "cpu" and place.batch_shards == 1
    if on_one_cpu and kernel.ndim == 2 and rows[0] == rows[1]:
        dkernel = _product_over_rows(x, dy)
    else:
        dkernel = _product_by_device(x, dy, rows, place.batch_shards)
    add_up = place.add_up if place.batch_shards > 1 else place.shard
    given_x, given_kernel = saved
    return dx.reshape(given_x.shape), add_up(dkernel, axes).reshape(given_kernel.shape)


def _product_over_rows(
    x: Float[Array, "*rows inputs"], dy: Float[Array, "*rows features"]
) -> Float32[Array, "inputs features"]:
    """The float32 product summed over all rows, as a CPU computes it fastest.

    Over several axes XLA sums by a transposed copy of the left array, and computes again in it
    whatever it is made of, such as GELU, one number at a time; over one axis it makes no copy.
    The narrower array is the better left one.
    """
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    rows = (0,), (0,)
    if x.shape[1] <= dy.shape[1]:
        return _product(x, dy, rows, jnp.float32)
    # The barrier keeps XLA from exchanging them again.
    return jax.lax.optimization_barrier(_product(dy, x, rows, jnp.float32)).T


def _product_by_device(
    a: Array, b: Array, contracted: tuple[tuple[int, ...], tuple[int, ...]], parts: int
) -> Array:
    """A float32 product summed over each device's part of the batch: (parts, ...).

    The partitioner adds up a product that is summed over a divided batch wherever it likes; these
    are added up by `Placement.add_up`. One part has no axis of its own.
    """
    if parts == 1:
        return _product(a, b, contracted, jnp.float32)
    a, b = (x.reshape(parts, x.shape[0] // parts, *x.shape[1:]) for x in (a, b))
    rows = tuple(tuple(axis + 1 for axis in axes) for axes in contracted)
    return _product(a, b, rows, jnp.float32, batch=((0,), (0,)))


def _as_matrices(
    x: Array, kernel: Array, axes: Axes, num_contracted: int
) -> tuple[Array, Array, Axes, int]:
    """The same product with a kernel of two axes, where axes may be merged.

    The TPU's compiler makes slower products of kernels with more axes.
    """
    if not placement.current.get().merges:
        return x, kernel, axes, num_contracted
    size = math.prod(kernel.shape[:num_contracted])
    merged = _merged(axes[:num_contracted]), _merged(axes[num_contracted:])
    x = x.reshape(*x.shape[: x.ndim - num_contracted], size)
    return x, kernel.reshape(size, -1), merged, 1


def _merged(axes: Axes) -> str | None:
    """The name of several axes as one; only `embed`, the first of its group, is ever cut."""
    return axes[0] if len(axes) == 1 or axes[0] == "embed" else None


def _gathered(kernel: Array, dtype: DTypeLike, axes: Axes) -> Array:
    place = placement.current.get()
    # As sharded as before when it is cast, so that the smaller dtype travels.
    return place.gather(place.shard(kernel.astype(dtype), axes), axes)


def _last(x: Array, count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))


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


@jax.custom_vjp
def add_bias(x: Float[Array, "... *features"], bias: Float[Array, "*features"]) -> Array:
    """x plus a float32 bias in x's dtype, whose gradient is summed in float32."""
    return x + bias.astype(x.dtype)


def _bias_gradient(bias: Array, dy: Array) -> tuple[Array, Array]:
    return dy, jnp.sum(dy.astype(jnp.float32), axis=tuple(range(dy.ndim - bias.ndim)))


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _bias_gradient)


class Product(NamedTuple):
    """A linear map's product and its bias, yet to be added: some kernels sum the bias' gradient.

    Attributes:
      value: the product, in the compute dtype.
      bias: float32, shaped to be added to it.
      name: the result's name in rematerialisation policies.
    """

    value: Float[Array, "..."]
    bias: Float[Array, "..."]
    name: str

    def added(self) -> Array:
        """The linear map's result."""
        return checkpoint_name(add_bias(self.value, self.bias), self.name)

    def added_without_gradient(self) -> Array:
        """The same, for a caller that gives the bias its gradient."""
        bias = jax.lax.stop_gradient(self.bias).astype(self.value.dtype)
        return checkpoint_name(self.value + bias, self.name)


class Linear(nn.Module):
    """A linear map of an array's last axes, with bias.

    Attributes:
      inputs: sizes of the axes that are summed over.
      features: sizes of the axes that come out.
      axes: logical names of the kernel's axes, those summed over first.
      dtype: compute dtype.
      kernel_init: the initialiser of the kernel as one matrix, whose fans count.
      bias_init: the initialiser of the bias.
      output_name: the result's name in rematerialisation policies.
    """

    inputs: tuple[int, ...]
    features: tuple[int, ...]
    axes: Axes
    dtype: DTypeLike
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    output_name: str = OUTPUT

    def setup(self):
        def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            flat = (math.prod(self.inputs), math.prod(self.features))
            return self.kernel_init(key, flat, dtype).reshape(shape)

        self.kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.axes),
            (*self.inputs, *self.features),
            jnp.float32,
        )
        self.bias = self.param(
            "bias",
            nn.with_logical_partitioning(self.bias_init, self.axes[len(self.inputs) :]),
            self.features,
            jnp.float32,
        )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The map of x (*rows, *inputs): (*rows, *features)."""
        rows = x.shape[: x.ndim - len(self.inputs)]
        return self.product(x).added().reshape(*rows, *self.features)

    def product(self, x: Float[Array, "..."]) -> Product:
        """Product and bias apart, features in one axis where `Placement.merges`."""
        kernel, bias = jnp.asarray(self.kernel), jnp.asarray(self.bias)  # NumPy's may be given
        count = len(self.inputs)
        y = project(x.astype(self.dtype), kernel, self.axes, count)
        return Product(y, bias.reshape(y.shape[x.ndim - count :]), self.output_name)

    def product_tokens_last(self, x: Float[Array, "batch n width"]) -> Product:
        """`product` as `project_tokens_last` has it, the bias with an axis of 1 for the lanes."""
        kernel, bias = jnp.asarray(self.kernel), jnp.asarray(self.bias)
        y = project_tokens_last(x.astype(self.dtype), kernel, self.axes)
        return Product(y, bias.reshape(*y.shape[1:-1], 1), self.output_name)
