"""MDTv2 (Gao et al., 2023, arXiv:2303.14389v2): MDT with long shortcuts and a deeper decoder."""

from __future__ import annotations

from collections.abc import Sequence

from flax import linen as nn
from jaxtyping import Array, Float

from mdt_jax.models.base import LatentTransformer, Pass, gather_kept
from mdt_jax.models.layers import each, split


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
    def run(self, passes: Sequence[Pass]) -> tuple[Float[Array, "batch h w out"], ...]:
        """As `LatentTransformer.run` has it."""
        passes = self.with_masks(passes)
        ids = tuple(one.ids_keep for one in passes)
        tokens, c = self.embed(passes)
        embedded = tokens + self.position_table("pos_embed")
        decoder_positions = self.position_table("decoder_pos_embed")

        kept, cs = each(gather_kept, split(embedded, len(passes)), ids), split(c, len(passes))
        half = (self.depth - self.decoder_depth) // 2
        positions = each(self.positions, ids)
        kept, outputs = self.stack(half, "in_blocks", collect=True)(kept, cs, positions)
        shortcuts = each(lambda x: x[::-1], outputs)
        kept, _ = self.stack(half, "out_blocks", skips="per_layer")(kept, cs, positions, shortcuts)

        tokens = self.decoder_input(kept, cs, passes, decoder_positions)
        decoder = self.stack(self.decoder_depth, "decoder_blocks", skips="shared")
        (tokens,), _ = decoder((tokens,), (c,), (self.positions(),), (embedded,))
        return split(self.unembed(tokens, c), len(passes))
