"""What happens to one example on the host: crop, mirror, scale, or draw a latent. NumPy and Pillow.

Whatever is random takes its generator as an argument, so that the caller decides what a draw
depends on.
"""

import math

import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt8
from PIL import Image

# Stable Diffusion's first-stage scale: latents times this have about unit variance
# (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, appendix G).
LATENT_SCALE = 0.18215


def center_crop(
    image: UInt8[np.ndarray, "h w c"], size: int
) -> UInt8[np.ndarray, "{size} {size} c"]:
    """The image's middle square, `size` pixels wide, by the rule ADM's training images were cut by.

    Resize until the shorter side is `size` (see `_resize_shorter_side`), then crop the centre
    (`center_crop_arr` in `guided_diffusion/image_datasets.py` of
    https://github.com/openai/guided-diffusion). An image already `size` x `size` is returned as it
    is.

    Raises:
        ValueError: an image to be resized has no pixels, or neither 1 (gray) nor 3 (RGB) channels.
    """
    if image.shape[:2] == (size, size):
        return image
    pixels = _resize_shorter_side(image, size)
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def random_crop(
    image: UInt8[np.ndarray, "h w c"],
    size: int,
    rng: np.random.Generator,
    min_fraction: float = 0.8,
    max_fraction: float = 1.0,
) -> UInt8[np.ndarray, "{size} {size} c"]:
    """A random square of the image, `size` pixels wide, by ADM's rule.

    Resize until the shorter side is s, uniform in ceil(size / max_fraction) ... ceil(size /
    min_fraction), then crop anywhere (`random_crop_arr` in ADM's file, as above). The square is
    that fraction of the shorter side, or a little less.

    Args:
        image: at least one pixel.
        size: of the result.
        rng: gives three draws: s, top, left.
        min_fraction: 0 < min_fraction <= max_fraction <= 1.
        max_fraction: see there.

    Raises:
        ValueError: fractions out of order, or an image that cannot be resized.
    """
    if not 0 < min_fraction <= max_fraction <= 1:
        raise ValueError(
            f"min_fraction {min_fraction} and max_fraction {max_fraction}: they must be in order, "
            "above 0 and at most 1"
        )
    least, most = math.ceil(size / max_fraction), math.ceil(size / min_fraction)
    pixels = _resize_shorter_side(image, int(rng.integers(least, most, endpoint=True)))
    top, left = (int(rng.integers(side - size, endpoint=True)) for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


# No photograph is this much longer than wide. A file one pixel wide, enlarged whole, would take
# gigabytes; cut to its middle first it gives the same centre crop.
_LONGEST = 64


def _resize_shorter_side(
    image: UInt8[np.ndarray, "h w c"], size: int
) -> UInt8[np.ndarray, "new_h new_w c"]:
    """The image with a shorter side of `size`, by ADM's rule: halve with a box filter while that is
    at least twice too long, then resize bicubically."""
    channels = image.shape[2]
    if channels not in (1, 3) or not image.size:
        raise ValueError(
            f"cannot resize an image of shape {image.shape}: it must have pixels, and 1 channel or "
            f"3; store other images at {size} x {size}"
        )
    image = _cut_to_middle(image)
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    while min(picture.size) >= 2 * size:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.resize((width, height), resample=Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(height, width, channels)


def _cut_to_middle(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "new_h new_w c"]:
    """The image without what is beyond `_LONGEST` times its shorter side, exactly centred."""
    most = _LONGEST * min(image.shape[:2])
    margins = [max(0, (side - most) // 2) for side in image.shape[:2]]
    if not any(margins):
        return image
    rows, columns = (
        slice(margin, side - margin) for margin, side in zip(margins, image.shape[:2], strict=True)
    )
    return image[rows, columns]


def random_flip(
    image: Shaped[np.ndarray, "h w c"], rng: np.random.Generator
) -> Shaped[np.ndarray, "h w c"]:
    """The image, mirrored left to right with probability 1/2; takes one draw from `rng`."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def to_unit_range(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Pixels 0 ... 255 as float32 in [-1, 1]: x / 127.5 - 1."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def sample_latent(
    posterior: Float[np.ndarray, "h w moments"], rng: np.random.Generator
) -> Float32[np.ndarray, "h w c"]:
    """A latent drawn from an autoencoder's Gaussian posterior: (mean + std * noise) * 0.18215.

    Args:
        posterior: the mean's c channels, then the standard deviation's.
        rng: gives h * w * c normal draws.
    """
    mean, std = np.split(posterior.astype(np.float32), 2, axis=-1)
    noise = rng.standard_normal(mean.shape, dtype=np.float32)
    return (mean + std * noise) * np.float32(LATENT_SCALE)
