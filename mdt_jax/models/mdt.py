"""MDT, the Masked Diffusion Transformer (Gao et al., 2023, arXiv:2303.14389)."""

from __future__ import annotations

from collections.abc import Sequence

from flax import linen as nn
from jaxtyping import Array, Float

from mdt_jax.models.base import LatentTransformer, Layers
from mdt_jax.models.passes import Pass


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
    def outputs(self, passes: Sequence[Pass]) -> Float[Array, "batch passes h w out"]:
        """As `LatentTransformer.outputs` has it."""
        tokens, c = self.embed(passes)
        tokens = tokens + self.position_table("pos_embed")
        decoder_positions = self.position_table("decoder_pos_embed")

        kept, packing = self.pack(tokens, passes)
        kept = self.stack(self.depth - self.decoder_depth, "encoder_blocks")(kept, c, packing)

        tokens = self.decoder_input(kept, packing, c, decoder_positions)
        decoder = self.stack(self.decoder_depth, "decoder_blocks")
        return self.decode(decoder, tokens, c)

    def layers_of(self, num_kept: int | None) -> tuple[Layers, ...]:
        """As `LatentTransformer.layers_of` has it."""
        n = self.num_tokens
        kept, side = (n, 0) if num_kept is None else (num_kept, 1)
        encoder = Layers(self.depth - self.decoder_depth, kept)
        return encoder, Layers(side, n), Layers(self.decoder_depth, n)
