"""MDT, the Masked Diffusion Transformer (Gao et al., 2023, arXiv:2303.14389)."""

from __future__ import annotations

from collections.abc import Sequence

from flax import linen as nn
from jaxtyping import Array, Float

from mdt_jax.models.base import LatentTransformer, Pass, gather_kept
from mdt_jax.models.layers import each, split


class MDT(LatentTransformer):
    """MDT v1: the first depth − decoder_depth blocks encode, the last decoder_depth decode.

    Attributes beside LatentTransformer's:
      decoder_depth: blocks that see all tokens, positions added a second time (the authors' 2).
    """

    decoder_depth: int = 2

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.decoder_depth < self.depth:
            raise ValueError(
                f"decoder_depth {self.decoder_depth} leaves no encoder or no decoder of depth "
                f"{self.depth}; 1 to {self.depth - 1} would"
            )

    @nn.compact
    def run(self, passes: Sequence[Pass]) -> tuple[Float[Array, "batch h w out"], ...]:
        """As `LatentTransformer.run` has it."""
        passes = self.with_masks(passes)
        ids = tuple(one.ids_keep for one in passes)
        tokens, c = self.embed(passes)
        tokens = tokens + self.position_table("pos_embed")
        decoder_positions = self.position_table("decoder_pos_embed")

        kept, cs = each(gather_kept, split(tokens, len(passes)), ids), split(c, len(passes))
        encoder = self.stack(self.depth - self.decoder_depth, "encoder_blocks")
        kept, _ = encoder(kept, cs, each(self.positions, ids))

        tokens = self.decoder_input(kept, cs, passes, decoder_positions)
        decoder = self.stack(self.decoder_depth, "decoder_blocks")
        (tokens,), _ = decoder((tokens,), (c,), (self.positions(),))
        return split(self.unembed(tokens, c), len(passes))
