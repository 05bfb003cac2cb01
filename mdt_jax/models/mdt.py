"""MDT, the Masked Diffusion Transformer (Gao et al., 2023, arXiv:2303.14389)."""

from __future__ import annotations

from flax import linen as nn
from jaxtyping import Array, Float, Int

from mdt_jax.models.base import LatentTransformer, gather_kept


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
        tokens = tokens + self.position_table("pos_embed")
        decoder_positions = self.position_table("decoder_pos_embed")
        encoder = self.stack(self.depth - self.decoder_depth, "encoder_blocks")

        if ids_keep is None and not self.is_initializing():
            tokens, _ = encoder(tokens, c, self.positions())
            tokens = tokens + decoder_positions
        else:
            ids_keep = self.ids_to_initialize(x) if ids_keep is None else ids_keep
            kept, _ = encoder(gather_kept(tokens, ids_keep), c, self.positions(ids_keep))
            tokens = self.interpolate_masked(kept, c, ids_keep, decoder_positions)

        tokens, _ = self.stack(self.decoder_depth, "decoder_blocks")(tokens, c, self.positions())
        return self.unembed(tokens, c)
