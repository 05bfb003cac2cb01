"""Encodes a data set once, for training on its latents.

    python tools/encode_latents.py --data_name folder --data_path DIR --vae mse --image_size 256 \
        --output LATENTS

crops images as ADM does and writes the folder that `data.name=npy data.path=LATENTS` reads:
`latents.npy` (posterior mean, then standard deviation, in each image's place), `labels.npy` and
`class_names.txt`. With --mirror, the default, rows n to 2n - 1 are the mirrored images, in the same
order: train on those with `data.flip=False`. Without, `data.flip=True` mirrors the latents, which
is half the work and nearly, but not exactly, the latents of the mirrored images.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import ml_collections
import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from mdt_jax.data import LATENT_SCALE, Source, center_crop, create_source, to_unit_range
from mdt_jax.latents import Autoencoder


def encode_latents(
    source: Source,
    autoencoder: Autoencoder,
    output: str | Path,
    *,
    image_size: int,
    mirror: bool = True,
    dtype: str = "float32",
    batch_size: int = 64,
    progress: bool = False,
) -> Path:
    """Writes the posteriors of a source's images, whole or not at all.

    Args:
      source: images, RGB or gray, not latents.
      autoencoder: of the scale that the input pipeline multiplies latents by.
      output: the folder to make. What is not finished is in OUTPUT.partial.
      image_size: side that images are cropped to.
      mirror: whether the mirrored images follow the others.
      dtype: of latents.npy, "float32" or "float16", which rounds means by up to 1 in 2,000: more
        than most posteriors' standard deviations.
      batch_size: images at a time, over all devices.
      progress: whether to show a progress bar.

    Returns:
      The folder.

    Raises:
      FileExistsError: the folder, or its unfinished part, is there already.
      ValueError: a source, autoencoder or size that do not fit each other, or too small a disk.
    """
    output = Path(output)
    factor = autoencoder.module.downsampling
    _check(source, autoencoder, image_size)
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size} is below 1")
    partial = output.with_name(f"{output.name}.partial")
    for folder, what in ((output, "is there already"), (partial, "is left from a run that ended")):
        if folder.exists():
            raise FileExistsError(f"{folder} {what}; remove it, or give another --output")
    rows, batch_size = len(source) * (2 if mirror else 1), min(batch_size, len(source))
    side, channels = image_size // factor, 2 * autoencoder.module.latent_channels
    shape = (rows, side, side, channels)
    output.parent.mkdir(parents=True, exist_ok=True)
    _check_space(output.parent, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    partial.mkdir()
    try:
        latents = np.lib.format.open_memmap(partial / "latents.npy", "w+", np.dtype(dtype), shape)
        labels = np.zeros(len(source), np.int64)
        with tqdm(total=len(source), unit="image", disable=not progress) as bar:
            for first, images, batch_labels in _batches(source, image_size, batch_size):
                last = first + len(images)
                labels[first:last] = batch_labels
                latents[first:last] = _posterior(autoencoder, images, batch_size)
                if mirror:
                    mirrored = _posterior(autoencoder, images[:, :, ::-1], batch_size)
                    latents[len(source) + first : len(source) + last] = mirrored
                bar.update(len(images))
        latents.flush()
        if source.class_names:
            np.save(partial / "labels.npy", np.tile(labels, rows // len(source)))
            names = "".join(f"{name}\n" for name in source.class_names)
            (partial / "class_names.txt").write_text(names, encoding="utf-8")
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return output


def _posterior(autoencoder: Autoencoder, images: np.ndarray, batch_size: int) -> np.ndarray:
    # The last batch is filled up: another size would be compiled anew.
    filled = np.zeros((batch_size, *images.shape[1:]), np.float32)
    filled[: len(images)] = images
    mean, std = autoencoder.encode(filled, batch_size=batch_size)
    return np.concatenate([mean, std], axis=-1)[: len(images)]


def _batches(
    source: Source, image_size: int, batch_size: int
) -> Iterator[tuple[int, np.ndarray, list[int]]]:
    """Index of the first, images in [-1, 1] and labels, read one batch ahead in threads."""

    def read(index: int) -> tuple[np.ndarray, int]:
        example = source[index]
        image = to_unit_range(center_crop(example["image"], image_size))
        return image.repeat(3, axis=2) if image.shape[-1] == 1 else image, int(example["label"])

    with ThreadPoolExecutor() as pool:

        def start(first: int) -> list[Future]:
            last = min(first + batch_size, len(source))
            return [pool.submit(read, index) for index in range(first, last)]

        ahead = start(0)
        for first in range(0, len(source), batch_size):
            now, ahead = ahead, start(first + batch_size)
            try:
                images, labels = zip(*(future.result() for future in now), strict=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            yield first, np.stack(images), list(labels)


def _check(source: Source, autoencoder: Autoencoder, image_size: int) -> None:
    """Refuses, with ValueError, what could not be encoded or trained on."""
    if source.latents:
        raise ValueError(f"{source.name}: holds latents already; give a source of images")
    if source.image_shape[-1] not in (1, 3):
        raise ValueError(
            f"{source.name}: images of {source.image_shape[-1]} channels; they must be RGB or gray"
        )
    factor = autoencoder.module.downsampling
    if image_size < 1 or image_size % factor:
        fit = max(image_size // factor, 1) * factor
        raise ValueError(
            f"--image_size {image_size}: the autoencoder {autoencoder.name} takes multiples of "
            f"{factor}; {fit} would do"
        )
    if (autoencoder.scale, autoencoder.shift) != (LATENT_SCALE, 0):
        raise ValueError(
            f"--vae {autoencoder.name}: its scale and shift are {autoencoder.scale} and "
            f"{autoencoder.shift}, but the input pipeline scales latents by {LATENT_SCALE}, Stable "
            "Diffusion's; give 'mse', 'ema' or another autoencoder of that scale"
        )


def _check_space(folder: Path, needed: int) -> None:
    """A memory map on a full disk would end the program without a word."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder}: {free / 1e9:,.1f} GB are free, the latents take {needed / 1e9:,.1f}; give "
            "--output on another disk, or --dtype float16, or --nomirror, half as much each"
        )


def main(_: list[str]) -> None:
    """The command: one clear line and exit status 1 for what a user can mend."""
    f = flags.FLAGS
    try:
        config = {"name": f.data_name, "path": f.data_path, "split": f.data_split}
        source = create_source(ml_collections.ConfigDict(config))
        folder = encode_latents(
            source,
            Autoencoder.load(f.vae, dtype=f.compute_dtype),
            f.output,
            image_size=f.image_size,
            mirror=f.mirror,
            dtype=f.dtype,
            batch_size=f.batch_size,
            progress=True,
        )
        print(folder)
    except (ValueError, OSError) as error:
        if logging.level_debug():
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    flags.DEFINE_string("data_name", "folder", "As config.data.name: folder, tfds:NAME, ...")
    flags.DEFINE_string("data_path", "", "As config.data.path: where the images are.")
    flags.DEFINE_string("data_split", "train", "As config.data.split.")
    flags.DEFINE_string("vae", "mse", "mse (training's), ema, or a path to an autoencoder.")
    flags.DEFINE_integer("image_size", 256, "Pixels that images are cropped to.")
    flags.DEFINE_string("output", None, "The folder to make.", required=True)
    flags.DEFINE_bool("mirror", True, "Whether the mirrored images are further rows.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Of latents.npy.")
    flags.DEFINE_enum("compute_dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    flags.DEFINE_integer("batch_size", 64, "Images at a time, over all devices.")
    app.run(main)
