"""MDTv2 (Gao et al., 2023, arXiv:2303.14389v2): MDT with long shortcuts and a deeper decoder."""

from __future__ import annotations

from flax import linen as nn
from jaxtyping import Array, Float, Int

from mdt_jax.models.base import LatentTransformer, gather_kept


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
    def __call__(
        self,
        x: Float[Array, "batch h w c"],
        t: Int[Array, " batch"] | Float[Array, " batch"],
        labels: Int[Array, " batch"] | None = None,
        ids_keep: Int[Array, "batch kept"] | None = None,
    ) -> Float[Array, "batch h w out"]:
        """Model output for noisy inputs x at original timesteps t.

        Args:
          x: noisy latents or images.
          t: timesteps of the 1000-step training process.
          labels: classes; num_classes is the null class.
          ids_keep: kept token ids of a masked pass, None for the full pass.
        """
        tokens, c = self.embed(x, t, labels)
        embedded = tokens = tokens + self.position_table("pos_embed")
        decoder_positions = self.position_table("decoder_pos_embed")
        masked = ids_keep is not None or self.is_initializing()
        if masked:
            ids_keep = self.ids_to_initialize(x) if ids_keep is None else ids_keep
            tokens = gather_kept(tokens, ids_keep)

        half = (self.depth - self.decoder_depth) // 2
        positions = self.positions(ids_keep)
        tokens, outputs = self.stack(half, "in_blocks", collect=True)(tokens, c, positions)
        tokens, _ = self.stack(half, "out_blocks", skips="per_layer")(
            tokens, c, positions, outputs[::-1]
        )

        if masked:
            tokens = self.interpolate_masked(tokens, c, ids_keep, decoder_positions)
        else:
            tokens = tokens + decoder_positions

        decoder = self.stack(self.decoder_depth, "decoder_blocks", skips="shared")
        tokens, _ = decoder(tokens, c, self.positions(), embedded)
        return self.unembed(tokens, c)
