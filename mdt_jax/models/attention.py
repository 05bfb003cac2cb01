"""Multi-head self-attention with MDT's learned relative-position bias."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from mdt_jax.models import layers
from mdt_jax.models.computation import PROJECTION, BlockSettings
from mdt_jax.models.linear import Linear, Product
from mdt_jax.models.passes import Packing


class Attention(nn.Module):
    """Self-attention: qkv with bias, relative-position bias (but in DiT), output projection.

    The softmax is float32 whatever the compute dtype is.
    """

    settings: BlockSettings

    @nn.compact
    def __call__(self, h: Float[Array, "batch n width"], packing: Packing) -> Product:
        """The projection's product, of each pass's attention among its own tokens."""
        s, width = self.settings, h.shape[-1]
        # (D, 3, heads, head width): a fused 3D axis cut contiguously by a tensor mesh axis would
        # cut across q, k and v. The fans are those of the fused (D, 3D) matrix.
        heads = (s.num_heads, width // s.num_heads)
        axes = ("embed", None, "heads", None)
        qkv = Linear((width,), (3, *heads), axes, s.dtype, layers.xavier, name="qkv")
        table = None if s.grid_size is None else self.bias_table()
        out = s.computation.attention(h, qkv, table, packing)
        proj = Linear(
            heads,
            (width,),
            ("heads", None, "embed"),
            s.dtype,
            layers.xavier,
            output_name=PROJECTION,
            name="proj",
        )
        return proj.product(out)

    def bias_table(self) -> Float[Array, "rows heads"]:
        """The learned bias by offset on the grid: (2G − 1)² + 3 rows.

        Three more rows than offsets: BEiT kept them for a class token, so checkpoints hold them.
        """
        rows = (2 * self.settings.grid_size - 1) ** 2 + 3
        return self.param(
            "relative_bias",
            layers.partitioned(layers.normal, None, "heads"),
            (rows, self.settings.num_heads),
            jnp.float32,
        )
