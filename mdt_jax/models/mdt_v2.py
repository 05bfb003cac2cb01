"""MDTv2 (Gao et al., 2023, arXiv:2303.14389v2): MDT with long shortcuts and a deeper decoder."""

from __future__ import annotations

from collections.abc import Sequence

from flax import linen as nn
from jaxtyping import Array, Float

from mdt_jax.models.base import LatentTransformer, Layers
from mdt_jax.models.passes import Pass


class MDTv2(LatentTransformer):
    """MDTv2: in-blocks feed mirrored out-blocks; every decoder block is fed the embedded input.

    The encoder is h = (depth − decoder_depth)/2 in-blocks whose outputs, last first, are the
    shortcuts of h out-blocks. A decoder block's shortcut is patches + pos_embed, before masking and
    without decoder_pos_embed.

    Attributes beside LatentTransformer's:
      decoder_depth: blocks that see all tokens; 4 in the published XL/2, 6 in the authors' S/2
        script.
    """

    decoder_depth: int = 4

    inpainting_masked_share = 0.5

    def __post_init__(self):
        super().__post_init__()
        encoder_depth = self.depth - self.decoder_depth
        if encoder_depth < 2 or encoder_depth % 2 or self.decoder_depth < 1:
            fitting = ", ".join(
                str(k) for k in range(1, self.depth - 1) if (self.depth - k) % 2 == 0
            )
            raise ValueError(
                f"decoder_depth {self.decoder_depth} does not leave an even number of encoder "
                f"blocks of depth {self.depth}; these do: {fitting or 'none'}"
            )

    @nn.compact
    def outputs(self, passes: Sequence[Pass]) -> Float[Array, "batch passes h w out"]:
        """As `LatentTransformer.outputs` has it."""
        tokens, c = self.embed(passes)
        embedded = tokens + self.position_table("pos_embed")
        decoder_positions = self.position_table("decoder_pos_embed")

        kept, packing = self.pack(embedded, passes)
        kept, shortcuts = self.stack(self.half, "in_blocks").with_outputs(kept, c, packing)
        kept = self.stack(self.half, "out_blocks")(kept, c, packing, skips=shortcuts[::-1])

        tokens = self.decoder_input(kept, packing, c, decoder_positions)
        return self.decode(
            self.stack(self.decoder_depth, "decoder_blocks"), tokens, c, skip=embedded
        )

    @property
    def half(self) -> int:
        """h, the number of in-blocks and of out-blocks."""
        return (self.depth - self.decoder_depth) // 2

    @property
    def num_shortcuts(self) -> int:
        """As `LatentTransformer.num_shortcuts` has it."""
        return self.half

    def layers_of(self, num_kept: int | None) -> tuple[Layers, ...]:
        """As `LatentTransformer.layers_of` has it."""
        n = self.num_tokens
        kept, side = (n, 0) if num_kept is None else (num_kept, 1)
        encoder = Layers(self.half, kept), Layers(self.half, kept, skip=True)
        return *encoder, Layers(side, n), Layers(self.decoder_depth, n, skip=True)
