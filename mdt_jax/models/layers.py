"""What every transformer here is made of: embeddings, adaLN blocks, their stacks and initialisers.

Parameters carry logical axis names; `mdt_jax.sharding` maps those to mesh axes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

# The authors' initialisation (DiT's): Xavier-uniform linears, N(0, 0.02) for tables and the
# timestep MLP, zeros for gates, the last layer and biases. timm truncates the bias tables at ±2
# absolute, a hundred standard deviations: no truncation.
xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()

LAYER_NORM_EPSILON = 1e-6
REMAT_POLICIES = {
    "none": None,
    # Recompute everything of a block, or all but its matmul outputs.
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def partitioned(initializer: Callable, *axes: str | None) -> Callable:
    """The initializer, its result labelled with logical axis names."""
    return nn.with_logical_partitioning(initializer, axes)


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """float32 end to end also asks for float32 products, no default on TPUs and TF32 GPUs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


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


def layer_norm(name: str | None = None) -> nn.LayerNorm:
    """LayerNorm without affine, computed and returned in float32; to be given float32.

    It would convert its input twice, for the statistics and for the rest, and their two parts of
    the gradient would be rounded before they are added.
    """
    return nn.LayerNorm(
        epsilon=LAYER_NORM_EPSILON,
        use_bias=False,
        use_scale=False,
        use_fast_variance=False,  # E[x²] − E[x]² cancels
        dtype=jnp.float32,
        name=name,
    )


def modulate(
    x: Float[Array, "batch n width"],
    shift: Float[Array, "batch width"],
    scale: Float[Array, "batch width"],
) -> Float[Array, "batch n width"]:
    """x·(1 + scale) + shift, per sample, in x's dtype: bfloat16 would lose a scale below 1/256."""
    return x * (1 + scale.astype(x.dtype)[:, None]) + shift.astype(x.dtype)[:, None]


# Lays activations out over devices, by their batch axis; `mdt_jax.sharding` puts it in force, so
# that the models need not know of meshes.
activation_constraint: ContextVar[Callable[[Array], Array]] = ContextVar(
    "activation_constraint", default=lambda x: x
)


def constrain_activations(x: Array) -> Array:
    """Shards activations (batch, ...) by batch alone, where a mesh is in force."""
    return activation_constraint.get()(x)


class PatchEmbed(nn.Module):
    """Image (B, H, W, C) to patch tokens (B, (H/p)², width): a linear map of each p × p patch."""

    patch_size: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch n width"]:
        p = self.patch_size
        patches = rearrange(x, "b (h p) (w q) c -> b (h w) p q c", p=p, q=p)
        return nn.DenseGeneral(
            self.width,
            axis=(-3, -2, -1),
            dtype=self.dtype,
            precision=matmul_precision(self.dtype),
            kernel_init=partitioned(xavier, None, None, None, "embed"),
            bias_init=partitioned(zeros, "embed"),
            name="proj",
        )(patches)


class TimestepEmbed(nn.Module):
    """Timesteps (B,) to (B, width): sinusoid, linear, SiLU, linear, in float32."""

    width: int

    @nn.compact
    def __call__(self, t: Array) -> Float[Array, "batch width"]:
        precision = matmul_precision(jnp.float32)
        h = nn.Dense(
            self.width,
            precision=precision,
            kernel_init=partitioned(normal, None, "embed"),
            bias_init=partitioned(zeros, "embed"),
            name="fc1",
        )(constrain_activations(timestep_features(t)))
        return nn.Dense(
            self.width,
            precision=precision,
            kernel_init=partitioned(normal, "embed", None),
            bias_init=partitioned(zeros, None),
            name="fc2",
        )(nn.silu(constrain_activations(h)))


class Mlp(nn.Module):
    """Linear to ratio × width, tanh-GELU, linear back."""

    ratio: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch n width"]) -> Float[Array, "batch n width"]:
        width = x.shape[-1]
        precision = matmul_precision(self.dtype)
        h = nn.Dense(
            int(width * self.ratio),
            dtype=self.dtype,
            precision=precision,
            kernel_init=partitioned(xavier, "embed", "mlp"),
            bias_init=partitioned(zeros, "mlp"),
            name="fc1",
        )(x)
        return nn.Dense(
            width,
            dtype=self.dtype,
            precision=precision,
            kernel_init=partitioned(xavier, "mlp", "embed"),
            bias_init=partitioned(zeros, None),
            name="fc2",
        )(nn.gelu(h, approximate=True))


class Modulation(nn.Module):
    """`count` vectors of the width from linear(SiLU(c)), zero at the start (adaLN-Zero)."""

    count: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, c: Float[Array, "batch width"]) -> list[Float[Array, "batch width"]]:
        out = nn.DenseGeneral(
            (self.count, c.shape[-1]),
            dtype=self.dtype,
            precision=matmul_precision(self.dtype),
            kernel_init=partitioned(zeros, "embed", None, "modulation"),
            bias_init=partitioned(zeros, None, "modulation"),
            name="linear",
        )(nn.silu(c))
        return [out[:, i] for i in range(self.count)]


class SkipLinear(nn.Module):
    """linear(concat(x, skip)), 2D to D, as two products so that nothing is concatenated."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, skip: Array) -> Float[Array, "batch n width"]:
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
        x, skip, kernel, bias = nn.dtypes.promote_dtype(x, skip, kernel, bias, dtype=self.dtype)
        precision = matmul_precision(self.dtype)
        return (
            jnp.matmul(x, kernel[0], precision=precision)
            + jnp.matmul(skip, kernel[1], precision=precision)
            + bias
        )


class FinalLayer(nn.Module):
    """adaLN and the zero-initialised linear map to p²·channels, returned in float32."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Float[Array, "batch n {self.features}"]:
        shift, scale = Modulation(2, self.dtype, name="modulation")(c)
        x = modulate(layer_norm()(x.astype(jnp.float32)), shift, scale)
        return nn.Dense(
            self.features,
            dtype=self.dtype,
            precision=matmul_precision(self.dtype),
            kernel_init=partitioned(zeros, "embed", None),
            bias_init=partitioned(zeros, None),
            name="linear",
        )(x).astype(jnp.float32)
