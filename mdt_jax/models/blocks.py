"""The adaLN-Zero transformer block, and a stack of such blocks under one scanned parameter tree."""

from __future__ import annotations

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array

from mdt_jax.models import layers, norm_kernels, placement
from mdt_jax.models.attention import Attention
from mdt_jax.models.layers import each
from mdt_jax.models.linear import Streams


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
        xs: Streams,
        skips: Streams | None,
        cs: Streams,
        positions: tuple[Array | None, ...],
    ) -> tuple[Streams, Streams | None]:
        """The block in every pass: x (batch, n, width), skip alike, c (batch, width).

        Positions are what `Attention` takes.
        """
        if self.skip:
            xs = layers.SkipLinear(self.dtype, name="skip")(xs, skips)
        modulation = layers.Modulation(6, self.dtype, name="modulation")(cs)
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
        attention = Attention(self.num_heads, self.grid_size, self.kernels, self.dtype, name="attn")
        pallas = self.kernels == "pallas"
        mlp = layers.Mlp(self.mlp_ratio, self.dtype, bias_gradient=not pallas, name="mlp")
        norm, add = (_norm_on_tpu, _add_on_tpu) if pallas else (_norm, _add)
        if pallas:
            xs = each(lambda x: x.astype(self.dtype), xs)
        hs, xs = norm(xs, attn_shift, attn_scale, self.dtype)
        xs = add(xs, attn_gate, attention(hs, positions))
        hs, xs = norm(xs, mlp_shift, mlp_scale, self.dtype)
        xs = add(xs, mlp_gate, mlp(hs))
        xs = each(placement.constrain_batch, xs)
        return xs, xs if self.collect else None


def _norm(
    xs: Streams, shifts: Streams, scales: Streams, dtype: DTypeLike
) -> tuple[Streams, Streams]:
    """The modulated norm of every pass, and what goes on as the residual stream."""
    hs = each(layers.modulated_norm, xs, shifts, scales)
    return each(lambda h: h.astype(dtype), hs), xs


def _norm_on_tpu(
    xs: Streams, shifts: Streams, scales: Streams, dtype: DTypeLike
) -> tuple[Streams, Streams]:
    def norm(x: Array, shift: Array, scale: Array) -> tuple[Array, Array]:
        return norm_kernels.modulated_norm(x, shift, scale, layers.EPSILON)

    hs, xs = zip(*each(norm, xs, shifts, scales), strict=True)
    return hs, xs


def _add(xs: Streams, gates: Streams, hs: Streams) -> Streams:
    return each(lambda x, gate, h: x + gate[:, None].astype(h.dtype) * h, xs, gates, hs)


def _add_on_tpu(xs: Streams, gates: Streams, hs_and_bias: tuple[Streams, Array]) -> Streams:
    hs, bias = hs_and_bias
    return each(lambda x, h, g: norm_kernels.gated_residual(x, h, bias, g), xs, hs, gates)


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
        self,
        xs: Streams,
        cs: Streams,
        positions: tuple[Array | None, ...],
        skips: Streams | None = None,
    ) -> tuple[Streams, Streams | None]:
        """Returns the last block's outputs and, if collecting, every block's, stacked."""
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
        )(xs, skips, cs, positions)
