"""Multi-head self-attention with MDT's learned relative-position bias."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from mdt_jax.models import layers


def kept_position_index(
    index: Int[Array, "n n"], ids_keep: Int[Array, "batch kept"]
) -> Int[Array, "batch kept kept"]:
    """The bias-table rows among each sample's kept tokens, gathered on both axes.

    The rows are the same in every layer, so a masked pass computes them once.
    """
    return index[ids_keep[:, :, None], ids_keep[:, None, :]]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention_logits(
    q: Float[Array, "batch heads n width"],
    k: Float[Array, "batch heads n width"],
    precision: jax.lax.Precision | None = None,
) -> Float32[Array, "batch heads n n"]:
    """q·kᵀ of each head, summed and returned in float32, for the softmax.

    Their gradient comes in float32 too. It is rounded to q's dtype before the two matmuls that it
    goes through, which differentiation would leave with one float32 operand.
    """
    return jnp.einsum(
        "bhqe,bhke->bhqk", q, k, precision=precision, preferred_element_type=jnp.float32
    )


def _attention_logits_forward(q: Array, k: Array, precision: Any) -> tuple[Array, Any]:
    return attention_logits(q, k, precision), (q, k)


def _attention_logits_backward(precision: Any, saved: Any, gradient: Array) -> tuple[Array, Array]:
    q, k = saved
    gradient = gradient.astype(q.dtype)
    return (
        jnp.einsum("bhqk,bhke->bhqe", gradient, k, precision=precision),
        jnp.einsum("bhqk,bhqe->bhke", gradient, q, precision=precision),
    )


attention_logits.defvjp(_attention_logits_forward, _attention_logits_backward)


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
        logits = attention_logits(q * head_width**-0.5, k, precision)
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
