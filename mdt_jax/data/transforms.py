"""Crops and scaling of one image on the host, in NumPy and Pillow.

A random crop takes its generator as an argument, so that the caller decides what a draw depends on.
"""

import math

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image


def center_crop(
    image: UInt8[np.ndarray, "h w c"] | Image.Image, size: int
) -> UInt8[np.ndarray, "{size} {size} c"]:
    """The image's middle square, `size` pixels wide, by ADM's rule for training images.

    Resize until the shorter side is `size` (see `_resize_shorter_side`), then crop the centre
    (`center_crop_arr` in `guided_diffusion/image_datasets.py` of
    https://github.com/openai/guided-diffusion). An image already `size` x `size` is returned as it
    is.

    Args:
      image: its pixels; or a picture of Pillow's of mode RGB or L, which saves two copies.
      size: height and width of the result.

    Raises:
      ValueError: an image to be resized has no pixels, or neither 1 (gray) nor 3 (RGB) channels.
    """
    if isinstance(image, np.ndarray) and image.shape[:2] == (size, size):
        return image
    picture = _to_picture(image)
    if picture.size != (size, size):
        picture = _resize_shorter_side(picture, size)
    left, top = ((side - size) // 2 for side in picture.size)
    return _crop(picture, top, left, size)


def random_crop(
    image: UInt8[np.ndarray, "h w c"] | Image.Image,
    size: int,
    rng: np.random.Generator,
    min_fraction: float = 0.8,
    max_fraction: float = 1.0,
) -> UInt8[np.ndarray, "{size} {size} c"]:
    """A random square of the image, `size` pixels wide, by ADM's rule.

    Resize until the shorter side is s, uniform in ceil(size / max_fraction) ... ceil(size /
    min_fraction), then crop anywhere (`random_crop_arr` in the file that `center_crop` names). The
    square is size / s of the image's shorter side.

    Args:
      image: at least one pixel; or a picture of Pillow's of mode RGB or L.
      size: height and width of the result.
      rng: gives three draws: s, top, left.
      min_fraction: least part of the shorter side, 0 < min_fraction <= max_fraction.
      max_fraction: largest part of the shorter side, at most 1.

    Raises:
      ValueError: fractions out of order, or an image that cannot be resized.
    """
    if not 0 < min_fraction <= max_fraction <= 1:
        raise ValueError(
            f"min_fraction {min_fraction} and max_fraction {max_fraction}: they must be in order, "
            "above 0 and at most 1"
        )
    least, most = math.ceil(size / max_fraction), math.ceil(size / min_fraction)
    shorter = int(rng.integers(least, most, endpoint=True))
    picture = _resize_shorter_side(_to_picture(image), shorter)
    height_first = reversed(picture.size)
    top, left = (int(rng.integers(side - size, endpoint=True)) for side in height_first)
    return _crop(picture, top, left, size)


# No photograph is this many times as long as wide. A file one pixel wide, enlarged whole, would
# take gigabytes; cut to its middle first, it gives the same centre crop.
_LONGEST = 64


def _to_picture(image: np.ndarray | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if image.shape[2] not in (1, 3) or not image.size:
        raise ValueError(
            f"cannot resize an image of shape {image.shape}: it must have pixels, and 1 channel or "
            f"3; store other images at the size wanted"
        )
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _crop(picture: Image.Image, top: int, left: int, size: int) -> np.ndarray:
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)))
    return pixels.reshape(size, size, -1)


def _resize_shorter_side(picture: Image.Image, size: int) -> Image.Image:
    """The picture with a shorter side of `size`, by ADM's rule.

    Halve with a box filter while that side is at least twice `size`, then resize bicubically.
    """
    picture = _cut_to_middle(picture)
    while min(picture.size) >= 2 * size:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    return picture.resize((width, height), resample=Image.Resampling.BICUBIC)


def _cut_to_middle(picture: Image.Image) -> Image.Image:
    """The middle of a picture, at most `_LONGEST` times as long as its shorter side."""
    most = _LONGEST * min(picture.size)
    left, top = (max(0, (side - most) // 2) for side in picture.size)
    if not left and not top:
        return picture
    return picture.crop((left, top, picture.width - left, picture.height - top))


def to_unit_range(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Pixels 0 ... 255 as float32 in [-1, 1]: x / 127.5 - 1.

    `training.step.scale_pixels` gives the same bits on the devices.
    """
    # In place: allocating another array takes as long as the arithmetic.
    scaled = np.divide(image, np.float32(127.5), dtype=np.float32)
    return np.subtract(scaled, np.float32(1), out=scaled)
