"""DiT (Peebles & Xie, 2022, arXiv:2212.09748), the baseline of every MDT table."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from mdt_jax.models.base import LatentTransformer, Layers
from mdt_jax.models.passes import Pass


class DiT(LatentTransformer):
    """DiT with adaLN-Zero: no relative-position bias, no masking, a fixed position table."""

    relative_bias = False
    supports_masking = False
    frozen = ("pos_embed",)

    @nn.compact
    def outputs(self, passes: Sequence[Pass]) -> Float[Array, "batch passes h w out"]:
        """As `LatentTransformer.outputs` has it."""
        if any(one.ids_keep is not None for one in passes):
            raise ValueError("DiT has no masked pass; MDT and MDTv2 have")
        tokens, c = self.embed(passes)
        tokens = tokens + jax.lax.stop_gradient(self.position_table("pos_embed"))
        return self.decode(self.stack(self.depth, "blocks"), tokens, c)

    def layers_of(self, num_kept: int | None) -> tuple[Layers, ...]:
        """As `LatentTransformer.layers_of` has it; there are full passes only."""
        return (Layers(self.depth, self.num_tokens),)
