"""Multi-head self-attention with MDT's learned relative-position bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mdt_jax.models import layers


def relative_position_index(grid_size: int) -> np.ndarray:
    """Row of the bias table for every (query, key) pair of tokens.

    Returns (N, N) int32, N = grid_size²: (r_i − r_j + G − 1)(2G − 1) + (c_i − c_j + G − 1), i the
    query, tokens row by row (BEiT's window rule, as MDT uses it).
    """
    rows, columns = np.divmod(np.arange(grid_size**2), grid_size)
    row_offset = rows[:, None] - rows[None, :] + grid_size - 1
    column_offset = columns[:, None] - columns[None, :] + grid_size - 1
    return (row_offset * (2 * grid_size - 1) + column_offset).astype(np.int32)


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
      dtype: compute dtype; the softmax is float32 whatever it is.
    """

    num_heads: int
    grid_size: int | None
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch n width"],
        bias_index: Int[Array, "*batch n n"] | None,
    ) -> Float[Array, "batch n width"]:
        width = x.shape[-1]
        head_width = width // self.num_heads
        precision = layers.matmul_precision(self.dtype)
        # (D, 3, heads, head width): a fused 3D axis cut contiguously by a tensor mesh axis would
        # cut across q, k and v. The fans are those of the fused (D, 3D) matrix.
        qkv = nn.DenseGeneral(
            (3, self.num_heads, head_width),
            dtype=self.dtype,
            precision=precision,
            kernel_init=layers.partitioned(layers.xavier, "embed", None, "heads", None),
            bias_init=layers.partitioned(layers.zeros, None, "heads", None),
            name="qkv",
        )(x)
        # (3, batch, heads, tokens, head width): batched matmuls over the two last axes, several
        # times faster on a CPU than contractions with the heads in the middle.
        q, k, v = jnp.transpose(qkv, (2, 0, 3, 1, 4))
        logits = jnp.einsum(
            "bhqe,bhke->bhqk",
            q * head_width**-0.5,
            k,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        if self.grid_size is not None:
            logits += self._relative_bias(bias_index)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        out = jnp.einsum("bhqk,bhke->bhqe", weights, v, precision=precision)
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            precision=precision,
            kernel_init=layers.partitioned(layers.xavier, "heads", None, "embed"),
            bias_init=layers.partitioned(layers.zeros, None),
            name="proj",
        )(jnp.transpose(out, (0, 2, 1, 3)))

    def _relative_bias(self, bias_index: Array) -> Array:
        # Three more rows than offsets: BEiT kept them for a class token, so checkpoints hold them.
        rows = (2 * self.grid_size - 1) ** 2 + 3
        table = self.param(
            "relative_bias",
            layers.partitioned(layers.normal, None, "heads"),
            (rows, self.num_heads),
            jnp.float32,
        )
        return jnp.moveaxis(table[bias_index], -1, -3)
