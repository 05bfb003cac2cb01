"""What every transformer here is made of: embeddings, norms, MLPs, last layers, initialisers.

What a block is made of takes the arrays of several passes at once (`linear.Streams`).

Parameters carry logical axis names; `mdt_jax.parallel.sharding` maps those to mesh axes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from mdt_jax.models import placement
from mdt_jax.models.linear import OUTPUT, Linear, Streams, add_bias, project
from mdt_jax.models.placement import Axes

# The authors' initialisation (DiT's): Xavier-uniform linears, N(0, 0.02) for tables and the
# timestep MLP, zeros for gates, the last layer and biases. timm truncates the bias tables at ±2
# absolute, a hundred standard deviations: no truncation.
xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()

EPSILON = 1e-6  # of every LayerNorm
REMAT_POLICIES = {
    "none": None,
    # Recompute everything of a block, or all but what its linear maps give. With Pallas kernels
    # attention's projection is recomputed too: keeping it would cost more.
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(OUTPUT),
}


# For a function that costs little: a loop over layers keeps its arguments for the way back, and
# what follows from them is computed again, faster than it would be written and read. Where layers
# are unrolled XLA may merge both computations, and keeps what it likes.
recompute = partial(jax.checkpoint, prevent_cse=False)


def each(function: Callable, *streams: tuple[Any, ...]) -> tuple[Any, ...]:
    """The function of every pass' arrays: each of the streams has one for every pass."""
    return tuple(map(function, *streams))


def join(streams: Streams) -> Array:
    """Arrays (B, ...) of P passes, alike in shape, as one batch (P·B, ...).

    Each device's samples are put one pass after the other, and stay on it.
    """
    if len(streams) == 1:
        return streams[0]
    parts = placement.current.get().batch_shards
    shape = streams[0].shape
    stacked = jnp.stack([x.reshape(parts, -1, *shape[1:]) for x in streams], axis=1)
    return placement.constrain_batch(stacked.reshape(-1, *shape[1:]))


def split(x: Array, num_passes: int) -> Streams:
    """What `join` joined."""
    if num_passes == 1:
        return (x,)
    parts, shape = placement.current.get().batch_shards, x.shape[1:]
    x = x.reshape(parts, num_passes, -1, *shape)
    return tuple(placement.constrain_batch(x[:, i].reshape(-1, *shape)) for i in range(num_passes))


def partitioned(initializer: Callable, *axes: str | None) -> Callable:
    """The initializer, its result labelled with logical axis names."""
    return nn.with_logical_partitioning(initializer, axes)


def timestep_features(
    t: Int[Array, " batch"] | Float[Array, " batch"], size: int = 256
) -> Float[Array, "batch {size}"]:
    """Sinusoids of t, longest period 10,000, cosines before sines, float32.

    The frequencies are rounded to float32 as PyTorch's are: at t = 999 one more digit would already
    change the features by 1e-5.
    """
    half = size // 2
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    angles = t.astype(jnp.float32)[:, None] * np.exp(exponents)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def layer_norm(x: Float[Array, "batch n width"]) -> Float32[Array, "batch n width"]:
    """LayerNorm without affine, computed and returned in float32.

    The variance is the mean of (x − mean)²: E[x²] − E[x]² cancels.
    """
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)


@recompute
def modulated_norm(
    x: Float[Array, "batch n width"],
    shift: Float32[Array, "batch width"],
    scale: Float32[Array, "batch width"],
) -> Float32[Array, "batch n width"]:
    """LayerNorm(x)·(1 + scale) + shift, per sample, in float32.

    In bfloat16 a scale below 1/256 would be lost.
    """
    with jax.named_scope("modulated_norm"):
        return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


@recompute
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh form of GELU."""
    return nn.gelu(x, approximate=True)


class PatchEmbed(nn.Module):
    """Image (B, H, W, C) to patch tokens (B, (H/p)², width): a linear map of each p × p patch."""

    patch_size: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch n width"]:
        p = self.patch_size
        patches = rearrange(x, "b (h p) (w q) c -> b (h w) p q c", p=p, q=p)
        axes = (None, None, None, "embed")
        (tokens,) = Linear((self.width,), axes, self.dtype, xavier, name="proj")((patches,))
        return tokens


class TimestepEmbed(nn.Module):
    """Timesteps (B,) to (B, width): sinusoid, linear, SiLU, linear, in float32."""

    width: int

    @nn.compact
    def __call__(self, t: Array) -> Float[Array, "batch width"]:
        def linear(name: str, axes: Axes, x: Array) -> Array:
            x = placement.constrain_batch(x)
            (y,) = Linear((self.width,), axes, jnp.float32, normal, name=name)((x,))
            return y

        h = linear("fc1", (None, "embed"), timestep_features(t))
        return linear("fc2", ("embed", None), nn.silu(h))


class Mlp(nn.Module):
    """Linear to ratio × width, tanh-GELU, linear back.

    Attributes:
      bias_gradient: of the second linear map, as `Linear` has it.
    """

    ratio: float
    dtype: DTypeLike
    bias_gradient: bool = True

    @nn.compact
    def __call__(self, xs: Streams) -> Streams | tuple[Streams, Array]:
        width = xs[0].shape[-1]
        hidden = int(width * self.ratio)
        h = Linear((hidden,), ("embed", "mlp"), self.dtype, xavier, name="fc1")(xs)
        h = each(gelu, h)
        back = Linear(
            (width,),
            ("mlp", "embed"),
            self.dtype,
            xavier,
            bias_gradient=self.bias_gradient,
            name="fc2",
        )
        return back(h)


class Modulation(nn.Module):
    """`count` vectors of the width from linear(SiLU(c)), zero at the start (adaLN-Zero).

    Each of the `count` that are returned is every pass' (B, width). They are float32, so that the
    gradients of shift and scale are put together before they are rounded to the compute dtype.
    """

    count: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, cs: Streams) -> list[Streams]:
        features, axes = (self.count, cs[0].shape[-1]), ("embed", None, "modulation")
        linear = Linear(features, axes, self.dtype, zeros, name="linear")
        # As one batch: so few rows take as long as reading the kernel does.
        (out,) = linear((nn.silu(join(cs)),))
        out = out.astype(jnp.float32)
        return [split(out[:, i], len(cs)) for i in range(self.count)]


class SkipLinear(nn.Module):
    """linear(concat(x, skip)), 2D to D, as two products so that nothing is concatenated."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, xs: Streams, skips: Streams) -> Streams:
        width = xs[0].shape[-1]

        def fused_xavier(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            return xavier(key, (2 * width, width), dtype).reshape(shape)

        kernel = self.param(
            "kernel",
            partitioned(fused_xavier, None, "embed", "mlp"),
            (2, width, width),
            jnp.float32,
        )
        bias = self.param("bias", partitioned(zeros, None), (width,), jnp.float32)
        kernel, bias = jnp.asarray(kernel), jnp.asarray(bias)

        def part(i: int, xs: Streams, kernel: Array) -> Streams:
            xs = each(lambda x: x.astype(self.dtype), xs)
            return project(xs, kernel[i], ("embed", "mlp"), 1)

        # Recomputed, lest a loop keep the halves of a kernel that it is given anyway.
        xs = recompute(partial(part, 0))(xs, kernel)
        skips = recompute(partial(part, 1))(skips, kernel)
        return each(lambda x, s: checkpoint_name(add_bias(x + s, bias), OUTPUT), xs, skips)


class FinalLayer(nn.Module):
    """adaLN and the zero-initialised linear map to p²·channels, returned in float32."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Float[Array, "batch n {self.features}"]:
        (shift,), (scale,) = Modulation(2, self.dtype, name="modulation")((c,))
        x = modulated_norm(x, shift, scale)
        linear = Linear((self.features,), ("embed", None), self.dtype, zeros, name="linear")
        (y,) = linear((x,))
        return y.astype(jnp.float32)
