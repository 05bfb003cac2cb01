"""Inpainting by the command: --inpaint and --mask are read, painted and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from einops import reduce

from mdt_jax import sampling
from mdt_jax.sample.flags import given_options, output_files
from mdt_jax.sampling import images, inpainting
from mdt_jax.weights.autoencoder import Autoencoder


def paint_picture(
    f: flags.FlagValues,
    model: sampling.DiffusionModel,
    params: Any,
    autoencoder: Autoencoder | None,
    mesh: jax.sharding.Mesh,
) -> list[Path]:
    """Paints the white part of --mask into --inpaint, and writes the result.

    Pixels outside the mask stay exactly as they are.
    """
    image, mask = read_pictures(f, model, autoencoder)
    given, unknown = image, mask
    if autoencoder:
        given, unknown = to_latents(autoencoder, image, mask, f.vae_batch_size)
    task = inpainting.prepare_task(
        model,
        given,
        unknown,
        labels=f.labels or None,
        num_samples=f.num_samples,
        resamples=f.resamples,
        masked_share=f.masked_share,
        **given_options(f),
    )
    painted = inpainting.paint_task(
        model, params, task, key=f.seed, batch_size=f.batch_size, mesh=mesh, progress=True
    )
    if autoencoder:
        decoded = autoencoder.decode(painted, f.vae_batch_size, f.vae_tile_size)
        painted = np.where(mask[..., None], decoded, image)
    about = vars(task.options) | {
        "resamples": task.resamples,
        "masked_share": task.masked_share,
        "inpainted": f.inpaint,
        "mask": f.mask,
        "seed": f.seed,
        "ema_rate": f.ema_rate,
        "vae": f.vae,
    }
    if jax.process_index() > 0:
        return []
    return write_paintings(model, painted, task.labels, f.output, **about)


def read_pictures(
    f: flags.FlagValues, model: sampling.DiffusionModel, autoencoder: Autoencoder | None
) -> tuple[np.ndarray, np.ndarray]:
    """--inpaint as (h, w, c) in [−1, 1] and --mask as (h, w) booleans, of the model's size.

    Raises:
      ValueError: pictures that cannot be read or are of another size; no --vae for latents.
    """
    network = model.network
    if autoencoder is None and network.in_channels not in (1, 3):
        raise ValueError(
            f"--inpaint {f.inpaint}: {model.name} is a model of latents, of {network.in_channels} "
            "channels; give --vae, the autoencoder that makes them of pictures"
        )
    channels = autoencoder.module.in_channels if autoencoder else network.in_channels
    image = inpainting.read_image(f.inpaint, channels)
    side = network.input_size * (autoencoder.module.downsampling if autoencoder else 1)
    if image.shape[:2] != (side, side):
        raise ValueError(
            f"--inpaint {f.inpaint} is {_size(image)} pixels; {model.name} paints {side} × {side}"
        )
    mask = inpainting.read_mask(f.mask)
    if mask.shape != image.shape[:2]:
        raise ValueError(
            f"--mask {f.mask} is {_size(mask)} pixels, --inpaint {f.inpaint} {_size(image)}: both "
            "must be of one size"
        )
    return image, mask


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]} × {picture.shape[0]}"


def to_latents(
    autoencoder: Autoencoder, image: np.ndarray, mask: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A picture's normalised latents, (1, h, w, c), and their mask.

    A latent is unknown if one of its pixels is.
    """
    known = np.where(mask[..., None], np.float32(0), image)  # unknown pixels must not leak
    mean, _ = autoencoder.encode(known[None], batch_size)
    factor = autoencoder.module.downsampling
    latent_mask = reduce(mask, "(h a) (w b) -> h w", "max", a=factor, b=factor)
    return autoencoder.latents.normalize(mean), latent_mask


def write_paintings(
    model: sampling.DiffusionModel,
    samples: np.ndarray,
    labels: np.ndarray,
    output: str | Path,
    **settings: Any,
) -> list[Path]:
    """Writes OUTPUT.npz, and OUTPUT.png if the samples are images; returns the files written.

    Latents (neither 1 nor 3 channels) are written as they are, as float32 `arr_0`; an
    autoencoder's decoder makes pictures of them.
    """
    metadata = images.provenance(
        model=model.name, step=model.step, labels=labels.tolist(), **settings
    )
    pixels = samples.shape[-1] in (1, 3)
    npz, png = output_files(output)
    images.save_npz(npz, images.to_uint8(samples) if pixels else samples, labels, metadata)
    if not pixels:
        return [npz]
    images.save_png(png, images.image_grid(images.to_uint8(samples)), metadata)
    return [npz, png]
