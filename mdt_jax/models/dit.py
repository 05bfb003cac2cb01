"""DiT (Peebles & Xie, 2022, arXiv:2212.09748), the baseline of every MDT table."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from mdt_jax.models.base import LatentTransformer, Pass
from mdt_jax.models.layers import split


class DiT(LatentTransformer):
    """DiT with adaLN-Zero: no relative-position bias, no masking, a fixed position table."""

    relative_bias = False
    frozen = ("pos_embed",)

    @nn.compact
    def run(self, passes: Sequence[Pass]) -> tuple[Float[Array, "batch h w out"], ...]:
        """As `LatentTransformer.run` has it."""
        if any(one.ids_keep is not None for one in passes):
            raise ValueError("DiT has no masked pass; MDT and MDTv2 have")
        tokens, c = self.embed(passes)
        tokens = tokens + jax.lax.stop_gradient(self.position_table("pos_embed"))
        (tokens,), _ = self.stack(self.depth, "blocks")((tokens,), (c,), (None,))
        return split(self.unembed(tokens, c), len(passes))
