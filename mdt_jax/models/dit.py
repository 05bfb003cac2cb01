"""DiT (Peebles & Xie, 2022, arXiv:2212.09748), the baseline of every MDT table."""

from __future__ import annotations

import jax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mdt_jax.models.base import LatentTransformer


class DiT(LatentTransformer):
    """DiT with adaLN-Zero: no relative-position bias, no masking, a fixed position table."""

    relative_bias = False
    frozen = ("pos_embed",)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch h w c"],
        t: Int[Array, " batch"] | Float[Array, " batch"],
        labels: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch h w out"]:
        """Model output for noisy inputs x at original timesteps t.

        Args:
          x: noisy latents or images.
          t: timesteps of the 1000-step training process.
          labels: classes; num_classes is the null class.
        """
        tokens, c = self.embed(x, t, labels)
        tokens = tokens + jax.lax.stop_gradient(self.position_table("pos_embed"))
        tokens, _ = self.stack(self.depth, "blocks")(tokens, c, None)
        return self.unembed(tokens, c)
