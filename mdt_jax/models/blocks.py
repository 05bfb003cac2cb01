"""The adaLN-Zero transformer block, and a stack of such blocks under one scanned parameter tree."""

from __future__ import annotations

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mdt_jax.models import layers, norm_kernels, placement
from mdt_jax.models.attention import Attention


class Block(nn.Module):
    """x + gate·attention(modulated norm), then x + gate·MLP(modulated norm); adaLN-Zero (DiT §3.2).

    Attributes:
      num_heads, mlp_ratio: as usual.
      grid_size: side of the token grid for the relative-position bias, None for no bias.
      skip: whether the block first maps concat(x, skip) from 2D to D (MDTv2's long shortcuts).
      collect: whether to return the output a second time, for a scan to stack.
      kernels: one of `attention.KERNELS`.
      dtype: compute dtype.
    """

    num_heads: int
    mlp_ratio: float
    grid_size: int | None
    skip: bool
    collect: bool
    kernels: str
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch n width"],
        skip: Float[Array, "batch n width"] | None,
        c: Float[Array, "batch width"],
        positions: Int[Array, "*where"] | None,
    ) -> tuple[Float[Array, "batch n width"], Float[Array, "batch n width"] | None]:
        if self.skip:
            x = layers.SkipLinear(self.dtype, name="skip")(x, skip)
        modulation = layers.Modulation(6, self.dtype, name="modulation")(c)
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
        attention = Attention(self.num_heads, self.grid_size, self.kernels, self.dtype, name="attn")
        if self.kernels == "pallas":
            mlp = layers.Mlp(self.mlp_ratio, self.dtype, bias_gradient=False, name="mlp")
            x = x.astype(self.dtype)
            h, x = norm_kernels.modulated_norm(x, attn_shift, attn_scale, layers.EPSILON)
            x = norm_kernels.gated_residual(x, *attention(h, positions), attn_gate)
            h, x = norm_kernels.modulated_norm(x, mlp_shift, mlp_scale, layers.EPSILON)
            x = norm_kernels.gated_residual(x, *mlp(h), mlp_gate)
        else:
            mlp = layers.Mlp(self.mlp_ratio, self.dtype, name="mlp")
            h = layers.modulated_norm(x, attn_shift, attn_scale).astype(self.dtype)
            x = x + attn_gate[:, None] * attention(h, positions)
            h = layers.modulated_norm(x, mlp_shift, mlp_scale).astype(self.dtype)
            x = x + mlp_gate[:, None] * mlp(h)
        x = placement.constrain_batch(x)
        return x, x if self.collect else None


class BlockStack(nn.Module):
    """`depth` blocks in a row as one scan over stacked parameters, (depth, …) each.

    A 28-layer model compiles as fast as one block. `unroll` (how many layers a loop turn holds) and
    `remat` (a key of `layers.REMAT_POLICIES`) change no parameter name.

    Attributes:
      skips: "none", "per_layer" (the skip argument has a leading layer axis) or "shared".
      collect: whether to return every block's output too.
    """

    depth: int
    num_heads: int
    mlp_ratio: float
    grid_size: int | None
    skips: str
    collect: bool
    kernels: str
    remat: str
    unroll: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Array, c: Array, positions: Array | None, skip: Array | None = None
    ) -> tuple[Float[Array, "batch n width"], Float[Array, "depth batch n width"] | None]:
        """Returns the last block's output and, if collecting, every block's, stacked."""
        block = Block
        if self.remat != "none":
            # Under a scan the loop itself keeps XLA from merging the recomputation away.
            block = nn.remat(
                block, policy=layers.REMAT_POLICIES[self.remat], prevent_cse=self.unroll > 1
            )
        skip_axis = 0 if self.skips == "per_layer" else nn.broadcast
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(skip_axis, nn.broadcast, nn.broadcast),
            length=self.depth,
            unroll=min(self.unroll, self.depth),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(
            self.num_heads,
            self.mlp_ratio,
            self.grid_size,
            self.skips != "none",
            self.collect,
            self.kernels,
            self.dtype,
            name="layers",
        )(x, skip, c, positions)
