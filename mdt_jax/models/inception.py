"""The Inception-v3 of December 2015 that FID is defined by, as its TensorFlow graph computes it.

Szegedy et al. 2015 (https://arxiv.org/abs/1512.00567), in the graph `classify_image_graph_def.pb`
of http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz. torchvision's
network differs in its resize, its average pools, the last block's pool, and the weights, which here
have 1008 classes. Modules are named as in the PyTorch port (https://github.com/mseitzer/pytorch-fid).
It is not trained here: `mdt_jax.weights.inception` loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, Num

IMAGE_SIZE = 299
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
BATCH_NORM_EPSILON = 1e-3
# Feature distances are compared between implementations: no bfloat16 or TF32 products anywhere.
PRECISION = jax.lax.Precision.HIGHEST


class InceptionOutputs(NamedTuple):
    """Everything the metrics read, float32. Under `jax.jit` what is not returned costs nothing.

    Attributes:
      pool_3: means over the last block's positions: FID, precision and recall.
      spatial: the first 7 channels of the 1 × 1 branch of the graph's mixed_6 (PyTorch's Mixed_6d)
        after its ReLU; flattened row by row to 2023, sFID.
      logits_unbiased: pool_3 through the classifier without its bias, as ADM's Inception Score has
        it.
      logits: with the bias.
      features_64, features_192: means over the positions after the first and second max pool.
      features_768: after Mixed_6e, the last block before the sides are halved again.
    """

    pool_3: Float32[Array, "n 2048"]
    spatial: Float32[Array, "n 17 17 7"]
    logits_unbiased: Float32[Array, "n 1008"]
    logits: Float32[Array, "n 1008"]
    features_64: Float32[Array, "n 64"]
    features_192: Float32[Array, "n 192"]
    features_768: Float32[Array, "n 768"]


class InceptionV3(nn.Module):
    """Images of any size to features and logits, in float32 throughout."""

    @nn.compact
    def __call__(self, images: Num[Array, "n h w c"]) -> InceptionOutputs:
        """Features of RGB or grey images.

        Args:
          images: uint8, or floats in 0…255 (float32, or float64 where JAX has it). One channel is
            repeated over the three, as a grey JPEG is when it is read as RGB.

        Raises:
          ValueError: another type or number of channels.
        """
        x = (resize(_as_rgb(images)) - 128) / 128
        x = ConvNorm(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _halve(x)
        features_64 = _mean(x)
        x = ConvNorm(80, name="Conv2d_3b_1x1")(x)
        x = ConvNorm(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = _halve(x)
        features_192 = _mean(x)
        x = BlockA(32, name="Mixed_5b")(x)
        x = BlockA(64, name="Mixed_5c")(x)
        x = BlockA(64, name="Mixed_5d")(x)
        x = ReductionA(name="Mixed_6a")(x)
        x = BlockB(128, name="Mixed_6b")(x)
        x = BlockB(160, name="Mixed_6c")(x)
        x = BlockB(160, name="Mixed_6d")(x)
        spatial = x[..., :SPATIAL_CHANNELS]  # a block's 1 × 1 branch comes first
        x = BlockB(192, name="Mixed_6e")(x)
        features_768 = _mean(x)
        x = ReductionB(name="Mixed_7a")(x)
        x = BlockC(average_pool, name="Mixed_7b")(x)
        x = BlockC(max_pool, name="Mixed_7c")(x)
        pool_3 = _mean(x)
        logits_unbiased, logits = Classifier(NUM_CLASSES, name="fc")(pool_3)
        return InceptionOutputs(
            pool_3, spatial, logits_unbiased, logits, features_64, features_192, features_768
        )


def resize(
    images: Num[Array, "n h w c"], size: int = IMAGE_SIZE
) -> Float32[Array, "n {size} {size} c"]:
    """TensorFlow 1's bilinear resize: pixel i of the result is the source's at i · source / size.

    No half-pixel centres, no aligned corners and no antialiasing: `tf.compat.v1.image.
    resize_bilinear` with its defaults. Done as two products with sparse matrices, which an
    accelerator likes better than a gather and which cost 2 % of what the network does.
    """
    rows, columns = (_interpolation(side, size) for side in images.shape[1:3])
    x = jnp.einsum("yh,nhwc->nywc", rows, images.astype(jnp.float32), precision=PRECISION)
    return jnp.einsum("xw,nywc->nyxc", columns, x, precision=PRECISION)


def _interpolation(source: int, size: int) -> np.ndarray:
    """(size, source): the weights of the source's pixels, positions in float32 as TensorFlow's."""
    positions = np.arange(size, dtype=np.float32) * (np.float32(source) / np.float32(size))
    lower = np.floor(positions).astype(np.int64)
    fraction = positions - lower.astype(np.float32)
    weights = np.zeros((size, source), np.float32)
    np.add.at(weights, (np.arange(size), lower), 1 - fraction)
    np.add.at(weights, (np.arange(size), np.minimum(lower + 1, source - 1)), fraction)
    return weights


def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """The largest of the 3 × 3 neighbours, sides kept."""
    return nn.max_pool(x, (3, 3), padding="SAME")


def average_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """The mean of the 3 × 3 neighbours that are inside the image, sides kept."""
    zero = np.zeros((), x.dtype)
    sums = jax.lax.reduce_window(x, zero, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    rows, columns = (np.convolve(np.ones(side), np.ones(3), "same") for side in x.shape[1:3])
    return sums / np.multiply.outer(rows, columns)[..., None].astype(x.dtype)


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm by the stored statistics, ReLU.

    Attributes:
      features: channels that come out.
      kernel: height and width.
      strides: along both sides.
      padding: "SAME" or "VALID".
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    strides: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        x = nn.Conv(
            self.features,
            self.kernel,
            self.strides,
            self.padding,
            use_bias=False,
            precision=PRECISION,
            name="conv",
        )(x)
        return nn.relu(StoredBatchNorm(name="bn")(x))


class StoredBatchNorm(nn.Module):
    """Batch norm in its inference form, its statistics parameters like the others.

    The graph's own scales are all 1 (https://github.com/tensorflow/tensorflow/issues/564).
    """

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        shape = x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
        return (x - mean) * (scale * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)) + bias


class BlockA(nn.Module):
    """Branches of 1 × 1, 5 × 5, twice 3 × 3 and the average pool (paper, figure 5).

    Attributes:
      pool_features: channels of the last.
    """

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w f"]:
        one = ConvNorm(64, name="branch1x1")(x)
        five = ConvNorm(48, name="branch5x5_1")(x)
        five = ConvNorm(64, (5, 5), name="branch5x5_2")(five)
        three = ConvNorm(64, name="branch3x3dbl_1")(x)
        three = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(three)
        three = ConvNorm(96, (3, 3), name="branch3x3dbl_3")(three)
        pool = ConvNorm(self.pool_features, name="branch_pool")(average_pool(x))
        return jnp.concatenate([one, five, three, pool], axis=-1)


class ReductionA(nn.Module):
    """Sides halved by 3 × 3, twice 3 × 3 and the max pool (paper, figure 10)."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo f"]:
        once = ConvNorm(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        twice = ConvNorm(64, name="branch3x3dbl_1")(x)
        twice = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(twice)
        twice = ConvNorm(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(twice)
        return jnp.concatenate([once, twice, _halve(x)], axis=-1)


class BlockB(nn.Module):
    """Branches of 1 × 1, 7 × 7 once and twice in factors, and the average pool (paper, figure 6).

    Attributes:
      width: channels inside the 7 × 7 branches.
    """

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w 768"]:
        width = self.width
        one = ConvNorm(192, name="branch1x1")(x)
        once = ConvNorm(width, name="branch7x7_1")(x)
        once = ConvNorm(width, (1, 7), name="branch7x7_2")(once)
        once = ConvNorm(192, (7, 1), name="branch7x7_3")(once)
        twice = ConvNorm(width, name="branch7x7dbl_1")(x)
        twice = ConvNorm(width, (7, 1), name="branch7x7dbl_2")(twice)
        twice = ConvNorm(width, (1, 7), name="branch7x7dbl_3")(twice)
        twice = ConvNorm(width, (7, 1), name="branch7x7dbl_4")(twice)
        twice = ConvNorm(192, (1, 7), name="branch7x7dbl_5")(twice)
        pool = ConvNorm(192, name="branch_pool")(average_pool(x))
        return jnp.concatenate([one, once, twice, pool], axis=-1)


class ReductionB(nn.Module):
    """Sides halved by 3 × 3, by 7 × 7 in factors and 3 × 3, and the max pool."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo 1280"]:
        three = ConvNorm(192, name="branch3x3_1")(x)
        three = ConvNorm(320, (3, 3), 2, "VALID", name="branch3x3_2")(three)
        seven = ConvNorm(192, name="branch7x7x3_1")(x)
        seven = ConvNorm(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = ConvNorm(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = ConvNorm(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, _halve(x)], axis=-1)


class BlockC(nn.Module):
    """Branches of 1 × 1, 3 × 3 and twice 3 × 3, both ending in a fork, and a pool (figure 7).

    Attributes:
      pool: `average_pool`, or `max_pool`, which the graph has in its last block by what looks like
        an oversight; FID has it ever since.
    """

    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w 2048"]:
        one = ConvNorm(320, name="branch1x1")(x)
        once = ConvNorm(384, name="branch3x3_1")(x)
        twice = ConvNorm(448, name="branch3x3dbl_1")(x)
        twice = ConvNorm(384, (3, 3), name="branch3x3dbl_2")(twice)
        forks = [
            ConvNorm(384, (1, 3), name="branch3x3_2a")(once),
            ConvNorm(384, (3, 1), name="branch3x3_2b")(once),
            ConvNorm(384, (1, 3), name="branch3x3dbl_3a")(twice),
            ConvNorm(384, (3, 1), name="branch3x3dbl_3b")(twice),
        ]
        pool = ConvNorm(192, name="branch_pool")(self.pool(x))
        return jnp.concatenate([one, *forks, pool], axis=-1)


class Classifier(nn.Module):
    """A linear layer that gives its result without the bias and with it."""

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "n c"]
    ) -> tuple[Float[Array, "n {self.features}"], Float[Array, "n {self.features}"]]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        product = jnp.matmul(x, kernel, precision=PRECISION)
        return product, product + bias


def _halve(x: Array) -> Array:
    """The 3 × 3 max pool at every other position, without padding."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


def _mean(x: Array) -> Array:
    return jnp.mean(x, axis=(1, 2))


def _as_rgb(images: Array) -> Array:
    if images.dtype not in (jnp.uint8, jnp.float32, jnp.float64):
        raise ValueError(
            f"images of type {images.dtype}; Inception takes uint8, or float32 0 to 255"
        )
    channels = images.shape[-1]
    if channels not in (1, 3):
        raise ValueError(f"images of {channels} channels; Inception takes 3, or 1 for grey")
    return jnp.broadcast_to(images, (*images.shape[:-1], 3))
