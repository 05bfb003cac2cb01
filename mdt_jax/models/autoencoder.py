"""Stable Diffusion's KL autoencoder: images to the posterior of latents, and latents to images.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752), in every size that its descendants have. It
is not trained here: `mdt_jax.weights.autoencoder` loads published weights into it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mdt_jax.models.linear import matmul_precision

GROUP_NORM_EPSILON = 1e-6


class AutoencoderKL(nn.Module):
    """Encoder and decoder, each a stack of residual stages at halving or doubling resolutions.

    Attributes:
      in_channels, out_channels: channels of images.
      latent_channels: channels of latents; the encoder gives twice as many.
      block_widths: channels of each stage, finest first; every stage but the last halves the sides.
      layers_per_block: residual blocks in a stage of the encoder; the decoder's have one more.
      norm_groups: groups of every GroupNorm; must divide all widths.
      down_attention, up_attention: which stages of the encoder and of the decoder, counted as they
        run, have attention after each residual block.
      mid_attention: whether there is attention between the two blocks at the coarsest resolution.
      quant_conv, post_quant_conv: whether a 1 × 1 convolution ends the encoder, starts the decoder.
      dtype: compute dtype; GroupNorm and softmax are float32 whatever it is.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    down_attention: tuple[int, ...] = ()
    up_attention: tuple[int, ...] = ()
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    dtype: DTypeLike = jnp.float32

    @property
    def downsampling(self) -> int:
        """Pixels of an image to one of its latents, along each side."""
        return 2 ** (len(self.block_widths) - 1)

    def setup(self) -> None:
        shared: dict[str, Any] = {
            "norm_groups": self.norm_groups,
            "mid_attention": self.mid_attention,
            "dtype": self.dtype,
        }
        self.encoder = Encoder(
            self.block_widths,
            self.layers_per_block,
            2 * self.latent_channels,
            attention=self.down_attention,
            **shared,
        )
        self.decoder = Decoder(
            self.block_widths[::-1],
            self.layers_per_block + 1,
            self.out_channels,
            attention=self.up_attention,
            **shared,
        )
        if self.quant_conv:
            self.quant = _conv(2 * self.latent_channels, self.dtype, kernel=1)
        if self.post_quant_conv:
            self.post_quant = _conv(self.latent_channels, self.dtype, kernel=1)

    def encode(self, images: Float[Array, "batch h w c"]) -> Float[Array, "batch hl wl moments"]:
        """Images in [−1, 1] to the posterior's mean, then its log-variance, float32, not clamped.

        h and w must be multiples of `downsampling`.
        """
        moments = self.encoder(images)
        if self.quant_conv:
            moments = self.quant(moments)
        return moments.astype(jnp.float32)

    def decode(self, latents: Float[Array, "batch hl wl cl"]) -> Float[Array, "batch h w c"]:
        """Latents as the encoder gives them, not scaled, to images in about [−1, 1], float32."""
        if self.post_quant_conv:
            latents = self.post_quant(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        """Images decoded from their posterior's mean."""
        return self.decode(self.encode(images)[..., : self.latent_channels])


class Encoder(nn.Module):
    """Images to `features` channels at the coarsest resolution.

    Attributes:
      widths: channels of each stage, in the order they run.
      num_blocks: residual blocks in a stage.
      features: channels that come out.
      The others as in `AutoencoderKL`.
    """

    widths: tuple[int, ...]
    num_blocks: int
    features: int
    norm_groups: int
    attention: tuple[int, ...]
    mid_attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch hl wl f"]:
        x = _conv(self.widths[0], self.dtype, "conv_in")(x)
        for i, width in enumerate(self.widths):
            attends = i in self.attention
            x = Stage(
                width, self.num_blocks, self.norm_groups, attends, self.dtype, name=f"down_{i}"
            )(x)
            if i < len(self.widths) - 1:
                # A pixel more at the bottom and at the right only, as the weights were trained.
                x = _conv(
                    width,
                    self.dtype,
                    f"downsample_{i}",
                    strides=2,
                    padding=((0, 1), (0, 1)),
                )(x)
        x = MidBlock(self.norm_groups, self.mid_attention, self.dtype, name="mid")(x)
        x = nn.silu(_group_norm(self.norm_groups, "norm_out")(x))
        return _conv(self.features, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Latents to `features` channels at the finest resolution; attributes as `Encoder`'s."""

    widths: tuple[int, ...]
    num_blocks: int
    features: int
    norm_groups: int
    attention: tuple[int, ...]
    mid_attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch hl wl c"]) -> Float[Array, "batch h w f"]:
        x = _conv(self.widths[0], self.dtype, "conv_in")(x)
        x = MidBlock(self.norm_groups, self.mid_attention, self.dtype, name="mid")(x)
        for i, width in enumerate(self.widths):
            attends = i in self.attention
            x = Stage(
                width, self.num_blocks, self.norm_groups, attends, self.dtype, name=f"up_{i}"
            )(x)
            if i < len(self.widths) - 1:
                x = repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2)  # nearest neighbour
                x = _conv(width, self.dtype, f"upsample_{i}")(x)
        x = nn.silu(_group_norm(self.norm_groups, "norm_out")(x))
        return _conv(self.features, self.dtype, "conv_out")(x)


class Stage(nn.Module):
    """Residual blocks at one resolution, with attention after each where `attention` says so."""

    width: int
    num_blocks: int
    norm_groups: int
    attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w {self.width}"]:
        for i in range(self.num_blocks):
            x = ResidualBlock(self.width, self.norm_groups, self.dtype, name=f"block_{i}")(x)
            if self.attention:
                x = SpatialAttention(self.norm_groups, self.dtype, name=f"attn_{i}")(x)
        return x


class MidBlock(nn.Module):
    """A residual block, attention where `attention` says so, a residual block."""

    norm_groups: int
    attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        x = ResidualBlock(x.shape[-1], self.norm_groups, self.dtype, name="block_0")(x)
        if self.attention:
            x = SpatialAttention(self.norm_groups, self.dtype, name="attn_0")(x)
        return ResidualBlock(x.shape[-1], self.norm_groups, self.dtype, name="block_1")(x)


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), x through a 1 × 1 convolution if widths differ."""

    width: int
    norm_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w {self.width}"]:
        h = nn.silu(_group_norm(self.norm_groups, "norm1")(x))
        h = _conv(self.width, self.dtype, "conv1")(h)
        h = nn.silu(_group_norm(self.norm_groups, "norm2")(h))
        h = _conv(self.width, self.dtype, "conv2")(h)
        if x.shape[-1] != self.width:
            x = _conv(self.width, self.dtype, "shortcut", kernel=1)(x)
        return x + h


class SpatialAttention(nn.Module):
    """Single-head self-attention between all positions, added to its input.

    The logits are (h·w)² floats a sample: 64 MB for an image of 512 pixels, 1 GB for one of 1024.
    """

    norm_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        _, height, _, width = x.shape
        precision = matmul_precision(self.dtype)

        def linear(name: str) -> nn.Dense:
            return nn.Dense(width, dtype=self.dtype, precision=precision, name=name)

        tokens = rearrange(_group_norm(self.norm_groups, "norm")(x), "b h w c -> b (h w) c")
        q, k, v = linear("q")(tokens), linear("k")(tokens), linear("v")(tokens)
        logits = jnp.einsum(
            "bqc,bkc->bqk",
            q * width**-0.5,
            k,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        out = linear("proj")(jnp.einsum("bqk,bkc->bqc", weights, v, precision=precision))
        return x + rearrange(out, "b (h w) c -> b h w c", h=height)


def _conv(
    features: int,
    dtype: DTypeLike,
    name: str | None = None,
    *,
    kernel: int = 3,
    strides: int = 1,
    padding: int | tuple[tuple[int, int], ...] | None = None,
) -> nn.Conv:
    """A square convolution, its padding keeping the sides unless it is given."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=strides,
        padding=kernel // 2 if padding is None else padding,
        dtype=dtype,
        precision=matmul_precision(dtype),
        name=name,
    )


def _group_norm(groups: int, name: str) -> nn.GroupNorm:
    """GroupNorm with affine, computed and returned in float32."""
    return nn.GroupNorm(
        groups,
        epsilon=GROUP_NORM_EPSILON,
        use_fast_variance=False,  # E[x²] − E[x]² cancels
        dtype=jnp.float32,
        name=name,
    )
