"""A data set as the posteriors of an autoencoder: what the command `mdt encode-latents` writes."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from mdt_jax.basics import ranges
from mdt_jax.basics.places import expand, read_text
from mdt_jax.data import (
    BadImage,
    Source,
    center_crop,
    latent_cache,
    latent_writing,
    to_unit_range,
)
from mdt_jax.data.latent_cache import CacheDescription
from mdt_jax.data.source import check_posteriors
from mdt_jax.data.stream import check_bad_fraction
from mdt_jax.weights.autoencoder import Autoencoder

_BEYOND = (
    "look whether the autoencoder's file is whole; numbers that are too large need --dtype float32 "
    "and --compute_dtype float32"
)


class Batch(NamedTuple):
    """Some images of a shard, cropped, in [-1, 1], with their labels and places in the data set."""

    shard: int
    indices: list[int]
    images: np.ndarray
    labels: list[int]


def encode_latents(
    source: Source,
    autoencoder: Autoencoder,
    output: str | Path,
    *,
    image_size: int,
    mirror: bool = True,
    dtype: str = "float32",
    batch_size: int = 64,
    images_per_shard: int = 4096,
    on_bad_image: str = "error",
    max_bad_fraction: float = 0.01,
    normalize: str = "autoencoder",
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = False,
) -> bool:
    """Writes the posteriors of a source's images, or those that are still missing.

    Args:
      source: images, RGB or gray, not latents.
      autoencoder: an autoencoder on this process's devices.
      output: the folder to make, or to go on with.
      image_size: side that images are cropped to.
      mirror: whether to encode the mirrored images, too.
      dtype: the type to store, "float32" or "float16", which rounds means by up to 1 in 2,000: more
        than most posteriors' standard deviations.
      batch_size: images at a time, over all devices.
      images_per_shard: images in a file; a run that ends in the middle of it encodes them again.
      on_bad_image: "error", or "skip", which leaves out images that cannot be used.
      max_bad_fraction: with "skip", stop when more than this part of all images is bad.
      normalize: the numbers that training normalises latents by: "autoencoder", its own; or
        "channel", each channel's mean and standard deviation, measured over the cache as it is
        written.
      process_index: encode the shards from this one on, every `process_count`-th.
      process_count: how many processes share the shards.
      progress: whether to show a progress bar, of this process's shards.

    Returns:
      Whether the whole cache is finished; other processes may still be at work.

    Raises:
      BadImage: an image cannot be used.
      FileExistsError: the folder holds other things, or another process is at the same shards.
      OSError: the disk is full.
      ValueError: a source, autoencoder or size that do not fit each other, settings out of range,
        too small a disk, or a folder of other latents.
    """
    output = expand(output)
    _check(source, autoencoder, image_size)
    numbers = {"image_size": image_size, "batch_size": batch_size}
    numbers |= {"images_per_shard": images_per_shard, "max_bad_fraction": max_bad_fraction}
    ranges.check_flags(numbers)
    description = describe_cache(
        source, autoencoder, image_size, mirror, dtype, images_per_shard, normalize
    )
    latent_writing.begin_cache(output, description)
    mine = range(process_index, description.num_shards, process_count)
    batch_size = min(batch_size, images_per_shard, len(source))
    with latent_writing.claim_shards(output, description, mine):
        todo = latent_writing.unfinished_shards(output, description, mine)
        _check_space(output, latent_writing.bytes_to_come(output, description, todo))
        total, left = (sum(len(description.shard_images(k)) for k in ks) for ks in (mine, todo))
        max_bad = max_bad_fraction if on_bad_image == "skip" else None
        read = _reader(source, image_size, max_bad)
        with (
            contextlib.closing(_batches(read, description, todo, batch_size)) as batches,
            tqdm(total=total, initial=total - left, unit="image", disable=not progress) as bar,
        ):
            for shard, of_shard in itertools.groupby(batches, key=lambda batch: batch.shard):
                encoded = _encode(source, description, autoencoder, of_shard, batch_size, bar)
                latent_writing.write_shard(output, description, shard, encoded)
    return latent_writing.finish_cache(output, description)


def describe_cache(
    source: Source,
    autoencoder: Autoencoder,
    image_size: int,
    mirror: bool,
    dtype: str,
    images_per_shard: int,
    normalize: str = "autoencoder",
) -> CacheDescription:
    """The description of the cache that is to be made."""
    side = image_size // autoencoder.module.downsampling
    space = autoencoder.latents
    return CacheDescription(
        source=source.name,
        num_images=len(source),
        class_names=tuple(source.class_names),
        image_size=image_size,
        vae=autoencoder.name,
        vae_digest=space.digest,
        scale=space.scale,
        compute_dtype=np.dtype(autoencoder.module.dtype).name,
        latent_shape=(side, side, autoencoder.module.latent_channels),
        dtype=dtype,
        mirror=mirror,
        images_per_shard=images_per_shard,
        source_digest=source.identity()["records"],
        shift=space.shift,
        mean=space.mean,
        std=space.std,
        normalize=normalize,
    )


def _encode(
    source: Source,
    description: CacheDescription,
    autoencoder: Autoencoder,
    batches: Iterable[Batch],
    batch_size: int,
    bar: tqdm,
) -> Iterator[np.ndarray]:
    """Encodes batches: arrays of a cache's records, each image's before its mirror image's.

    Raises:
      ValueError: an image's posterior is not finite, in the type that it is to be stored in.
    """
    for batch in batches:
        place = functools.partial(_place, source, description, autoencoder, batch.indices)
        versions = [batch.images, batch.images[:, :, ::-1]][: description.versions]
        rows = np.zeros((len(batch.indices), len(versions)), description.record_type)
        rows["index"], rows["label"] = np.c_[batch.indices], np.c_[batch.labels]
        for k, version in enumerate(versions):
            rows["mirrored"][:, k] = k
            with np.errstate(over="ignore"):  # what float16 cannot hold is infinite, and refused
                rows["posterior"][:, k] = _posterior(autoencoder, version, batch_size)
            check_posteriors(rows["posterior"][:, k], place, _BEYOND)
        yield rows.reshape(-1)
        bar.update(len(batch.indices))


def _place(
    source: Source, description: CacheDescription, autoencoder: Autoencoder, indices: list[int],
    row: int,
) -> str:  # fmt: skip
    """The image of a batch's row and its encoder, for messages."""
    how = f"computed in {description.compute_dtype} and stored in {description.dtype}"
    return f"{source.place(indices[row])}, encoded by {autoencoder.name}, {how}"


def _posterior(autoencoder: Autoencoder, images: np.ndarray, batch_size: int) -> np.ndarray:
    # The last batch is filled up, since another size would be compiled anew.
    filled = np.zeros((batch_size, *images.shape[1:]), np.float32)
    filled[: len(images)] = images
    mean, std = autoencoder.encode(filled, batch_size=batch_size)
    return np.concatenate([mean, std], axis=-1)[: len(images)]


def _reader(
    source: Source, image_size: int, max_bad: float | None
) -> Callable[[int], tuple[int, np.ndarray, int] | None]:
    """A function that reads image i: its index, pixels and label, or None if it is left out.

    Several threads may call it.

    Args:
      source: the images.
      image_size: side that images are cropped to.
      max_bad: the part of all images that may be left out; None: a bad image is an error.
    """
    bad: dict[int, str] = {}

    def read(index: int) -> tuple[int, np.ndarray, int] | None:
        try:
            example = source[index]
        except BadImage as error:
            if max_bad is None:
                raise BadImage(
                    f"{error}. Or give --on_bad_image=skip, which leaves it out and keeps what is "
                    "encoded: to remove an image changes the others' numbers, so that the encoding "
                    "begins anew"
                ) from error
            logging.warning("left out: %s", error)
            bad[index] = str(error)
            check_bad_fraction(source, max_bad, bad)
            return None
        image = to_unit_range(center_crop(example["image"], image_size))
        image = image.repeat(3, axis=2) if image.shape[-1] == 1 else image
        return index, image, int(example["label"])

    return read


def _batches(
    read: Callable[[int], tuple[int, np.ndarray, int] | None],
    description: CacheDescription,
    shards: Iterable[int],
    batch_size: int,
) -> Iterator[Batch]:
    """The images of shards, read in threads, a batch ahead of need.

    Each shard begins with a new batch, so that its bytes do not depend on where a run began.
    """
    pool = ThreadPoolExecutor()
    ahead: collections.deque[tuple[int, list[Future]]] = collections.deque()
    try:
        for shard in shards:
            images = description.shard_images(shard)
            for first in range(0, len(images), batch_size):
                some = images[first : first + batch_size]
                ahead.append((shard, [pool.submit(read, index) for index in some]))
                if len(ahead) > 1:
                    yield _batch(description, *ahead.popleft())
        while ahead:
            yield _batch(description, *ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _batch(description: CacheDescription, shard: int, futures: list[Future]) -> Batch:
    """A batch of the images that some futures give, without those that are left out."""
    found = [result for future in futures if (result := future.result())]
    images = np.zeros((len(found), description.image_size, description.image_size, 3), np.float32)
    for row, (_, image, _) in enumerate(found):
        images[row] = image
    return Batch(shard, [index for index, _, _ in found], images, [label for *_, label in found])


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


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder}: {free / 1e9:,.1f} GB are free, the latents still to be written, those of "
            f"all processes, take {needed / 1e9:,.1f}; give --output on another disk, or --dtype "
            "float16, or --nomirror, half as much each"
        )


def summary(output: Path) -> str:
    """A line that counts the images and files of a finished cache."""
    manifest = json.loads(read_text(output / latent_cache.CACHE_MANIFEST))
    left_out, count = manifest["left_out"], manifest["num_images"]
    return (
        f"{output}: latents of {count - left_out:,} images in {len(manifest['shards']):,} files; "
        f"left out, as they could not be used, {left_out:,}"
    )
