"""The deep compression autoencoder: images to latents of a 32nd of the side or less, and back.

Chen et al. 2024 (https://arxiv.org/abs/2410.10733), as diffusers publishes it. It has no posterior:
an image has one latent. It is not trained here: `mdt_jax.convert.autoencoder_dc` has its weights'
names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from mdt_jax.models.linear import matmul_precision

NORM_EPSILON = 1e-5
ATTENTION_EPSILON = 1e-15
EXPANSION = 4  # of the width inside a gated convolution
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "mish": jax.nn.mish,
}


class AutoencoderDC(nn.Module):
    """Encoder and decoder, each a stack of stages at halving or doubling resolutions.

    Tuples have an entry for each stage, finest first, in the decoder too.

    Attributes:
      in_channels: channels of images.
      latent_channels: channels of latents.
      attention_head_dim: channels of a head of attention.
      encoder_block_types, decoder_block_types: what the blocks of a stage are, "ResBlock" or
        "EfficientViTBlock", which has attention.
      encoder_block_out_channels, decoder_block_out_channels: channels of a stage.
      encoder_layers_per_block, decoder_layers_per_block: blocks of a stage. A first stage without
        blocks is left out: the encoder's first layer halves the sides, the decoder's last doubles
        them.
      encoder_qkv_multiscales, decoder_qkv_multiscales: kernels, each of which adds heads to the
        attention of a stage's blocks, with queries, keys and values of so many pixels a side.
      upsample_block_type: how sides are doubled: "pixel_shuffle" or "interpolate".
      downsample_block_type: how sides are halved: "pixel_unshuffle" or "conv".
      decoder_norm_types: "rms_norm" or "batch_norm", with the statistics of its training.
      decoder_act_fns: activations of residual blocks, of `ACTIVATIONS`.
      encoder_out_shortcut: whether averaged channels are added to the encoder's last layer.
      decoder_in_shortcut: whether repeated channels are added to the decoder's first layer.
      decoder_conv_act_fn: the activation before the decoder's last layer.
      dtype: compute dtype; norms and attention's sums are float32 whatever it is.
    """

    in_channels: int
    latent_channels: int
    attention_head_dim: int
    encoder_block_types: tuple[str, ...]
    decoder_block_types: tuple[str, ...]
    encoder_block_out_channels: tuple[int, ...]
    decoder_block_out_channels: tuple[int, ...]
    encoder_layers_per_block: tuple[int, ...]
    decoder_layers_per_block: tuple[int, ...]
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...]
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...]
    upsample_block_type: str
    downsample_block_type: str
    decoder_norm_types: tuple[str, ...]
    decoder_act_fns: tuple[str, ...]
    encoder_out_shortcut: bool
    decoder_in_shortcut: bool
    decoder_conv_act_fn: str
    dtype: DTypeLike = jnp.float32

    @property
    def out_channels(self) -> int:
        """Channels of decoded images."""
        return self.in_channels

    @property
    def downsampling(self) -> int:
        """Pixels of an image to one of its latents, along each side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    def setup(self) -> None:
        stages = len(self.encoder_block_out_channels)
        self.encoder = Encoder(
            self._stages("encoder", ("rms_norm",) * stages, ("silu",) * stages),
            self.latent_channels,
            self.attention_head_dim,
            self.downsample_block_type,
            self.encoder_out_shortcut,
            self.dtype,
        )
        self.decoder = Decoder(
            self._stages("decoder", self.decoder_norm_types, self.decoder_act_fns),
            self.in_channels,
            self.attention_head_dim,
            self.upsample_block_type,
            self.decoder_in_shortcut,
            self.decoder_conv_act_fn,
            self.dtype,
        )

    def _stages(
        self, side: str, norms: tuple[str, ...], activations: tuple[str, ...]
    ) -> tuple[Blocks, ...]:
        keys = ("block_out_channels", "layers_per_block", "block_types", "qkv_multiscales")
        columns = (getattr(self, f"{side}_{key}") for key in keys)
        return tuple(Blocks(*row) for row in zip(*columns, norms, activations, strict=True))

    def encode(self, images: Float[Array, "batch h w c"]) -> Float32[Array, "batch hl wl cl"]:
        """Images in [−1, 1] to their latents, float32, not scaled.

        Raises:
          ValueError: a side is no multiple of `downsampling`.
        """
        _, height, width, _ = images.shape
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"images of {height} x {width} pixels; their sides must be multiples of "
                f"{self.downsampling}"
            )
        return self.encoder(images).astype(jnp.float32)

    def decode(self, latents: Float[Array, "batch hl wl cl"]) -> Float32[Array, "batch h w c"]:
        """Latents as the encoder gives them, not scaled, to images in about [−1, 1], float32."""
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images: Float[Array, "batch h w c"]) -> Float32[Array, "batch h w c"]:
        """Images decoded from their latents."""
        return self.decode(self.encode(images))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What the blocks at one resolution are.

    Attributes:
      width: channels.
      count: how many there are.
      block_type: "ResBlock" or "EfficientViTBlock".
      qkv_scales: kernels that add heads to attention.
      norm: "rms_norm" or "batch_norm".
      activation: of residual blocks.
    """

    width: int
    count: int
    block_type: str
    qkv_scales: tuple[int, ...]
    norm: str
    activation: str


class Encoder(nn.Module):
    """Images to `features` channels at the coarsest resolution.

    Attributes:
      stages: blocks at each resolution, finest first.
      features: channels that come out.
      head_dim: channels of a head of attention.
      downsample: "pixel_unshuffle" or "conv".
      shortcut: whether averaged channels are added to the last convolution.
      dtype: compute dtype.
    """

    stages: tuple[Blocks, ...]
    features: int
    head_dim: int
    downsample: str
    shortcut: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch hl wl f"]:
        if self.stages[0].count:
            x = _conv(self.stages[0].width, self.dtype, "conv_in")(x.astype(self.dtype))
        else:
            x = _halve(x, self.stages[1].width, self.downsample, self.dtype, "conv_in")
        for i, blocks in enumerate(self.stages):
            x = Stage(blocks, self.head_dim, self.dtype, name=f"down_{i}")(x)
            if blocks.count and i < len(self.stages) - 1:
                width = self.stages[i + 1].width
                halved = _halve(x, width, self.downsample, self.dtype, f"downsample_{i}")
                x = halved + _average(_unshuffle(x), width)
        features = _conv(self.features, self.dtype, "conv_out")(x)
        return features + _average(x, self.features) if self.shortcut else features


class Decoder(nn.Module):
    """Latents to `features` channels at the finest resolution.

    Attributes:
      upsample: "pixel_shuffle" or "interpolate".
      shortcut: whether repeated channels are added to the first convolution.
      activation: before the last layer.
      The others as in `Encoder`.
    """

    stages: tuple[Blocks, ...]
    features: int
    head_dim: int
    upsample: str
    shortcut: bool
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch hl wl c"]) -> Float[Array, "batch h w f"]:
        latents = x.astype(self.dtype)
        x = _conv(self.stages[-1].width, self.dtype, "conv_in")(latents)
        if self.shortcut:
            x = x + _repeat(latents, x.shape[-1])
        for i, blocks in reversed(list(enumerate(self.stages))):
            if blocks.count and i < len(self.stages) - 1:
                doubled = _double(x, blocks.width, self.upsample, self.dtype, f"upsample_{i}")
                x = doubled + _shuffle(_repeat(x, 4 * blocks.width))
            x = Stage(blocks, self.head_dim, self.dtype, name=f"up_{i}")(x)
        x = RMSNorm(self.dtype, name="norm_out")(x)
        x = ACTIVATIONS[self.activation](x)
        if self.stages[0].count:
            return _conv(self.features, self.dtype, "conv_out")(x)
        return _double(x, self.features, self.upsample, self.dtype, "conv_out")


class Stage(nn.Module):
    """The blocks at one resolution."""

    blocks: Blocks
    head_dim: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        _, _, block_type, qkv_scales, norm, activation = dataclasses.astuple(self.blocks)
        for i in range(self.blocks.count):
            if block_type == "EfficientViTBlock":
                x = MultiscaleAttention(
                    self.head_dim, qkv_scales, norm, self.dtype, name=f"attn_{i}"
                )(x)
                x = GatedConv(self.dtype, name=f"glu_{i}")(x)
            else:
                x = ResidualBlock(norm, activation, self.dtype, name=f"block_{i}")(x)
        return x


class ResidualBlock(nn.Module):
    """x + norm(conv(activation(conv(x))))."""

    norm: str
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        width = x.shape[-1]
        h = ACTIVATIONS[self.activation](_conv(width, self.dtype, "conv1")(x))
        h = _conv(width, self.dtype, "conv2", bias=False)(h)
        return x + NORMS[self.norm](self.dtype, name="norm")(h)


class MultiscaleAttention(nn.Module):
    """x + norm(linear attention between all positions), over heads at several scales.

    Attributes:
      head_dim: channels of a head.
      qkv_scales: kernels of convolutions over queries, keys and values, each of which gives as many
        heads again.
      norm: "rms_norm" or "batch_norm".
      dtype: compute dtype; attention is float32.
    """

    head_dim: int
    qkv_scales: tuple[int, ...]
    norm: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        _, height, _, width = x.shape
        heads = width // self.head_dim
        channels = 3 * heads * self.head_dim

        def linear(features: int, name: str) -> nn.Dense:
            precision = matmul_precision(self.dtype)
            return nn.Dense(
                features, use_bias=False, dtype=self.dtype, precision=precision, name=name
            )

        def conv(name: str, kernel: int, groups: int) -> nn.Conv:
            return _conv(channels, self.dtype, name, kernel=kernel, groups=groups, bias=False)

        qkv = jnp.concatenate([linear(channels // 3, name)(x) for name in ("q", "k", "v")], axis=-1)
        scales = [qkv]
        for i, kernel in enumerate(self.qkv_scales):
            nearby = conv(f"depth_{i}", kernel, channels)(qkv)
            scales.append(conv(f"point_{i}", 1, 3 * heads)(nearby))
        # A head is 3·head_dim neighbouring channels, whichever layer they are from: diffusers cuts
        # one layer, whose channels are in this order, in three without sorting them.
        q, k, v = rearrange(
            jnp.concatenate(scales, axis=-1).astype(jnp.float32),
            "b h w (heads qkv c) -> qkv b (h w) heads c",
            qkv=3,
            c=self.head_dim,
        )
        out = linear_attention(nn.relu(q), nn.relu(k), v).astype(self.dtype)
        out = rearrange(out, "b (h w) heads c -> b h w (heads c)", h=height)
        return x + NORMS[self.norm](self.dtype, name="norm")(linear(width, "proj")(out))


def linear_attention(
    q: Float32[Array, "batch n heads c"],
    k: Float32[Array, "batch n heads c"],
    v: Float32[Array, "batch n heads c"],
) -> Float32[Array, "batch n heads c"]:
    """Means of the values, weighted by the products of a query and each key, none of them negative.

    Values are summed over keys before queries are seen: the cost is linear in n.
    """
    product = partial(jnp.einsum, precision=matmul_precision(jnp.float32))
    total = product("bnhc,bhcd->bnhd", q, product("bnhc,bnhd->bhcd", k, v))
    weight = product("bnhc,bhc->bnh", q, k.sum(axis=1))
    return total / (weight[..., None] + ATTENTION_EPSILON)


class GatedConv(nn.Module):
    """x + norm(point(h · SiLU(gate))), h and gate from a depthwise convolution of a wider x."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        width = x.shape[-1]
        hidden = 2 * EXPANSION * width
        h = nn.silu(_conv(hidden, self.dtype, "inverted", kernel=1)(x))
        h, gate = jnp.split(_conv(hidden, self.dtype, "depth", groups=hidden)(h), 2, axis=-1)
        h = _conv(width, self.dtype, "point", kernel=1, bias=False)(h * nn.silu(gate))
        return x + RMSNorm(self.dtype, name="norm")(h)


class RMSNorm(nn.Module):
    """Root-mean-square norm of the channels with affine, computed in float32, to `dtype`."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + NORM_EPSILON)
        return (x * scale + bias).astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch norm by the statistics of its training, which are parameters here; in float32."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        mean = self.param("mean", nn.initializers.zeros, x.shape[-1:])
        var = self.param("var", nn.initializers.ones, x.shape[-1:])
        x = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + NORM_EPSILON)
        return (x * scale + bias).astype(self.dtype)


NORMS: dict[str, type[RMSNorm] | type[BatchNorm]] = {"rms_norm": RMSNorm, "batch_norm": BatchNorm}


def _halve(x: Array, width: int, kind: str, dtype: DTypeLike, name: str) -> Array:
    """x at half the sides, with `width` channels, by a learnt layer."""
    if kind == "pixel_unshuffle":
        return _unshuffle(_conv(width // 4, dtype, name)(x))
    return _conv(width, dtype, name, strides=2)(x)


def _double(x: Array, width: int, kind: str, dtype: DTypeLike, name: str) -> Array:
    """x at twice the sides, with `width` channels, by a learnt layer."""
    if kind == "pixel_shuffle":
        return _shuffle(_conv(4 * width, dtype, name)(x))
    x = repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2)  # nearest neighbour
    return _conv(width, dtype, name)(x)


def _unshuffle(x: Array) -> Array:
    """The channels of 2 × 2 pixels in one."""
    return rearrange(x, "b (h p) (w q) c -> b h w (c p q)", p=2, q=2)


def _shuffle(x: Array) -> Array:
    """The inverse of `_unshuffle`."""
    return rearrange(x, "b h w (c p q) -> b (h p) (w q) c", p=2, q=2)


def _average(x: Array, width: int) -> Array:
    """`width` channels, each the mean of as many neighbouring ones."""
    return reduce(x, "b h w (c group) -> b h w c", "mean", c=width)


def _repeat(x: Array, width: int) -> Array:
    """`width` channels, each of x's as many times in a row."""
    return repeat(x, "b h w c -> b h w (c r)", r=width // x.shape[-1])


def _conv(
    features: int,
    dtype: DTypeLike,
    name: str,
    *,
    kernel: int = 3,
    strides: int = 1,
    groups: int = 1,
    bias: bool = True,
) -> nn.Conv:
    """A square convolution of an odd kernel, padded by half of it on every side."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=strides,
        padding=kernel // 2,
        feature_group_count=groups,
        use_bias=bias,
        dtype=dtype,
        precision=matmul_precision(dtype),
        name=name,
    )
