"""Multi-head self-attention with MDT's learned relative-position bias."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mdt_jax.models import attention_kernel, layers, plain_attention
from mdt_jax.models.linear import Linear, Streams

KERNELS = ("plain", "pallas", "cudnn")


def choose_kernels(platform: str | None, grid_size: int, head_width: int) -> str:
    """How blocks with a bias are best computed: one of KERNELS.

    On a TPU by Pallas kernels, where they take these sizes; elsewhere by what the compiler makes of
    the plain form (docs/performance.md). "cudnn" is for who asks for it until it has been timed on
    a GPU.

    Args:
      platform: of the mesh that is in force; None for no mesh, where a kernel of ours could not be
        divided.
    """
    fits = attention_kernel.supports(grid_size, head_width)
    return "pallas" if platform == "tpu" and fits else "plain"


def kept_position_index(
    index: Int[Array, "n n"], ids_keep: Int[Array, "batch kept"]
) -> Int[Array, "batch kept kept"]:
    """The bias-table rows among each sample's kept tokens, gathered on both axes.

    The rows are the same in every layer, so a masked pass computes them once.
    """
    return index[ids_keep[:, :, None], ids_keep[:, None, :]]


class Attention(nn.Module):
    """Self-attention: qkv with bias, optional relative-position bias, output projection.

    Attributes:
      num_heads: number of heads; must divide the width.
      grid_size: side G of the token grid, or None for no relative-position bias (DiT).
      kernels: one of KERNELS; "pallas" needs a bias, "cudnn" a GPU and bfloat16.
      dtype: compute dtype; the softmax is float32 whatever it is.
    """

    num_heads: int
    grid_size: int | None
    kernels: str
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, xs: Streams, positions: tuple[Array | None, ...]
    ) -> Streams | tuple[Streams, Array]:
        """Attends, in every pass.

        Args:
          xs: tokens (batch, n, width).
          positions: where they are, int32: for "pallas" the kept ids (batch, kept), None for all
            tokens; else the bias-table rows of all pairs, (N, N) or (batch, kept, kept).

        Returns:
          (batch, n, width) each; with "pallas" also the last bias, which gets a gradient only from
          `norm_kernels.gated_residual`, to be given both.
        """
        width = xs[0].shape[-1]
        pallas = self.kernels == "pallas"
        linear = partial(
            Linear, dtype=self.dtype, kernel_init=layers.xavier, bias_gradient=not pallas
        )
        # (D, 3, heads, head width): a fused 3D axis cut contiguously by a tensor mesh axis would
        # cut across q, k and v. The fans are those of the fused (D, 3D) matrix.
        features = (3, self.num_heads, width // self.num_heads)
        axes = ("embed", None, "heads", None)
        qkv = linear(features, axes, tokens_last=pallas, name="qkv")(xs)
        table = self._bias_table() if self.grid_size is not None else None
        if pallas:
            qkv, qkv_bias = qkv
            strips = attention_kernel.bias_strips(table, self.grid_size)
            attend = partial(_attend_on_tpu, qkv_bias, strips)
        else:
            attend = partial(_attend, self.kernels, table)
        out = layers.each(attend, qkv, positions)
        # With Pallas kernels it costs less to compute attention and this again than to keep it.
        return linear((width,), ("heads", None, "embed"), kept=not pallas, name="proj")(out)

    def _bias_table(self) -> Float[Array, "rows heads"]:
        # Three more rows than offsets: BEiT kept them for a class token, so checkpoints hold them.
        rows = (2 * self.grid_size - 1) ** 2 + 3
        return self.param(
            "relative_bias",
            layers.partitioned(layers.normal, None, "heads"),
            (rows, self.num_heads),
            jnp.float32,
        )


def _attend(
    kernels: str, table: Array | None, qkv: Array, positions: Array | None
) -> Float[Array, "batch n heads width"]:
    bias = None if table is None else jnp.moveaxis(table[positions], -1, -3)
    cudnn = kernels == "cudnn"
    return (plain_attention.cudnn_attention if cudnn else plain_attention.attention)(qkv, bias)


def _attend_on_tpu(
    qkv_bias: Array, strips: Array, qkv: Array, ids_keep: Array | None
) -> Float[Array, "batch n heads width"]:
    out = attention_kernel.attention(qkv, qkv_bias, strips, ids_keep)
    return jnp.transpose(out, (0, 3, 1, 2))
