"""The parts of every transformer here: embeddings, norms, MLPs, last layers, initialisers.

Arrays may hold the tokens of several passes (`passes`). Parameters carry logical axis names;
`mdt_jax.parallel.sharding` maps those to mesh axes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from mdt_jax.models import placement
from mdt_jax.models.linear import OUTPUT, Linear, Product, project
from mdt_jax.models.passes import over_tokens
from mdt_jax.models.placement import Axes

# The authors' initialisation (DiT's): Xavier-uniform linears, N(0, 0.02) for tables and the
# timestep MLP, zeros for gates, the last layer and biases. timm truncates the bias tables at ±2
# absolute, a hundred standard deviations: no truncation.
xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()

EPSILON = 1e-6  # added to the variance in every LayerNorm

# For functions that cost little: a loop over layers keeps their arguments for the backward pass,
# and computes their results again, faster than it would write and read them. Where layers are
# unrolled XLA may merge both computations, and keeps what it likes.
recompute = partial(jax.checkpoint, prevent_cse=False)


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


@partial(recompute, static_argnums=3)
def modulated_norm(
    x: Float[Array, "batch n width"],
    shift: Float32[Array, "batch passes width"],
    scale: Float32[Array, "batch passes width"],
    lengths: tuple[int, ...],
) -> Float32[Array, "batch n width"]:
    """LayerNorm(x)·(1 + scale) + shift, of each pass's tokens with its own, in float32.

    In bfloat16 a scale below 1/256 would be lost.
    """
    with jax.named_scope("modulated_norm"):
        shift, scale = over_tokens(shift, lengths), over_tokens(scale, lengths)
        return layer_norm(x) * (1 + scale) + shift


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
        patch, axes = (p, p, x.shape[-1]), (None, None, None, "embed")
        return Linear(patch, (self.width,), axes, self.dtype, xavier, name="proj")(patches)


class TimestepEmbed(nn.Module):
    """Timesteps (B,) to (B, width): sinusoid, linear, SiLU, linear, in float32."""

    width: int

    @nn.compact
    def __call__(self, t: Array) -> Float[Array, "batch width"]:
        def linear(name: str, axes: Axes, x: Array) -> Array:
            x = placement.constrain_batch(x)
            sizes = x.shape[1:], (self.width,)
            return Linear(*sizes, axes, jnp.float32, normal, name=name)(x)

        h = linear("fc1", (None, "embed"), timestep_features(t))
        return linear("fc2", ("embed", None), nn.silu(h))


class Mlp(nn.Module):
    """Linear to ratio × width, tanh-GELU, and the product of the linear map back."""

    ratio: float
    gelu: Callable[[Array], Array]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch n width"]) -> Product:
        width = (x.shape[-1],)
        hidden = (int(x.shape[-1] * self.ratio),)
        h = Linear(width, hidden, ("embed", "mlp"), self.dtype, xavier, name="fc1")(x)
        back = Linear(hidden, width, ("mlp", "embed"), self.dtype, xavier, name="fc2")
        return back.product(self.gelu(h))


class Modulation(nn.Module):
    """`count` vectors of the width from linear(SiLU(c)), zero at the start (adaLN-Zero).

    They are float32, so that the gradients of shift and scale are put together before they are
    rounded to the compute dtype.
    """

    count: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, c: Float[Array, "batch passes width"]
    ) -> list[Float32[Array, "batch passes width"]]:
        width, axes = c.shape[-1], ("embed", None, "modulation")
        linear = Linear((width,), (self.count, width), axes, self.dtype, zeros, name="linear")
        out = linear(nn.silu(c)).astype(jnp.float32)
        return [out[:, :, i] for i in range(self.count)]


class SkipLinear(nn.Module):
    """linear(concat(x, skip)), 2D to D, as two products so that nothing is concatenated."""

    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch n width"], skip: Float[Array, "batch n width"]
    ) -> Float[Array, "batch n width"]:
        width = x.shape[-1]

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

        def half(i: int, x: Array, kernel: Array) -> Array:
            return project(x.astype(self.dtype), kernel[i], ("embed", "mlp"), 1)

        # Recomputed, lest a loop keep the halves of a kernel that it is given anyway.
        x = recompute(partial(half, 0))(x, kernel)
        skip = recompute(partial(half, 1))(skip, kernel)
        return Product(x + skip, bias, OUTPUT).added()


class FinalLayer(nn.Module):
    """adaLN and the zero-initialised linear map to p²·channels, returned in float32."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch n width"], c: Float[Array, "batch 1 width"]
    ) -> Float[Array, "batch n {self.features}"]:
        shift, scale = Modulation(2, self.dtype, name="modulation")(c)
        x = modulated_norm(x, shift, scale, (x.shape[1],))
        sizes, axes = ((x.shape[-1],), (self.features,)), ("embed", None)
        y = Linear(*sizes, axes, self.dtype, zeros, name="linear")(x)
        return y.astype(jnp.float32)
