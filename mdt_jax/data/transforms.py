"""What happens to one example on the host: crop, mirror, scale, or draw a latent. NumPy and Pillow.

Whatever is random takes its generator as an argument, so that the caller decides what a draw
depends on.
"""

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

    Halve with a box filter while the shorter side is at least twice too long, resize bicubically
    until it is `size`, then crop the centre (`center_crop_arr` in `guided_diffusion/
    image_datasets.py` of https://github.com/openai/guided-diffusion). An image already
    `size` x `size` is returned as it is.

    Raises:
        ValueError: an image to be resized has neither 1 (gray) nor 3 (RGB) channels.
    """
    if image.shape[:2] == (size, size):
        return image
    channels = image.shape[2]
    if channels not in (1, 3):
        raise ValueError(
            f"cannot resize an image of shape {image.shape}: it must have 1 channel or 3; "
            f"store other images at {size} x {size}"
        )
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    while min(picture.size) >= 2 * size:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.resize((width, height), resample=Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    pixels = np.asarray(picture)[top : top + size, left : left + size]
    return pixels.reshape(size, size, channels)


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
