"""Encodes a data set once, for training on its latents.

    python tools/encode_latents.py --data_name folder --data_path DIR --vae mse --image_size 256 \\
        --output LATENTS

crops images as ADM does and writes the folder that `data.name=latents data.path=LATENTS` reads:
ArrayRecord shards of the posteriors' means and standard deviations, with labels, and a manifest
(see `mdt_jax/data/latent_cache.py`). With --mirror, the default, that of the mirrored image is
there, too, and `data.flip=True` chooses between them. Without, it mirrors the latents, which is
half the work and nearly, but not exactly, the latents of the mirrored images.

The same command again goes on with a run that ended, shard by shard. A shard that is finished is
not encoded again, one that is damaged is. Several processes, each with its --process_index and the
same --process_count and --output, encode shards of their own (the hosts of a TPU pod slice know
theirs); run one process alone at the end if none of them wrote the manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from mdt_jax import sharding
from mdt_jax.data import (
    LATENT_SCALE,
    BadImage,
    Source,
    center_crop,
    create_source,
    latent_cache,
    to_unit_range,
)
from mdt_jax.data.latent_cache import Description
from mdt_jax.data.pipeline import check_bad_fraction
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
    images_per_shard: int = 4096,
    on_bad_image: str = "error",
    max_bad_fraction: float = 0.01,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = False,
) -> bool:
    """Writes the posteriors of a source's images, or what is still missing of them.

    Args:
      source: images, RGB or gray, not latents.
      autoencoder: of the scale that training multiplies latents by, on this process's devices.
      output: the folder to make, or to go on with.
      image_size: side that images are cropped to.
      mirror: whether to encode the mirrored images, too.
      dtype: to store, "float32" or "float16", which rounds means by up to 1 in 2,000: more than
        most posteriors' standard deviations.
      batch_size: images at a time, over all devices.
      images_per_shard: which are encoded again if the run ends in the middle of them.
      on_bad_image: "error", or "skip", which leaves out images that cannot be used, unless they
        are more than `max_bad_fraction` of all.
      process_index, process_count: whose shards to encode, every `process_count`-th.
      progress: whether to show a progress bar, of this process's shards.

    Returns:
      Whether the whole is finished: other processes may still be at work.

    Raises:
      BadImage: an image cannot be used.
      FileExistsError: the folder holds other things.
      ValueError: a source, autoencoder or size that do not fit each other, too small a disk, or a
        folder of other latents.
    """
    output = Path(output)
    _check(source, autoencoder, image_size)
    for flag, value in (("batch_size", batch_size), ("images_per_shard", images_per_shard)):
        if value < 1:
            raise ValueError(f"--{flag} {value} is below 1")
    description = describe(source, autoencoder, image_size, mirror, dtype, images_per_shard)
    latent_cache.begin(output, description)
    mine = range(process_index, description.num_shards, process_count)
    todo = [k for k in mine if latent_cache.finished_shard(output, description, k) is None]
    _check_space(output, sum(map(description.shard_bytes, todo)))
    total, left = (sum(len(description.shard_images(k)) for k in ks) for ks in (mine, todo))
    batch_size = min(batch_size, images_per_shard, len(source))
    with tqdm(total=total, initial=total - left, unit="image", disable=not progress) as bar:
        max_bad = max_bad_fraction if on_bad_image == "skip" else None
        batches = _batches(source, description, todo, batch_size, max_bad)
        for shard, images in itertools.groupby(batches, key=lambda batch: batch[0]):
            records = _records(description, autoencoder, images, batch_size, bar)
            latent_cache.write_shard(output, description, shard, records)
    return latent_cache.finish(output, description)


def describe(
    source: Source,
    autoencoder: Autoencoder,
    image_size: int,
    mirror: bool,
    dtype: str,
    images_per_shard: int,
) -> Description:
    """What the cache is to hold."""
    side = image_size // autoencoder.module.downsampling
    return Description(
        source=source.name,
        num_images=len(source),
        class_names=tuple(source.class_names),
        image_size=image_size,
        vae=autoencoder.name,
        vae_digest=encoder_digest(autoencoder),
        scale=autoencoder.scale,
        compute_dtype=np.dtype(autoencoder.module.dtype).name,
        latent_shape=(side, side, autoencoder.module.latent_channels),
        dtype=dtype,
        mirror=mirror,
        images_per_shard=images_per_shard,
    )


def encoder_digest(autoencoder: Autoencoder) -> str:
    """SHA-256 of the encoder's weights: "mse" and "ema" differ in their decoders alone."""
    digest = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(autoencoder.params)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith(("encoder/", "quant/")):
            digest.update(f"{name} {leaf.shape}\n".encode())
            digest.update(np.ascontiguousarray(leaf, "<f4").tobytes())
    return digest.hexdigest()


def _records(
    description: Description,
    autoencoder: Autoencoder,
    batches: Iterator[tuple[int, list[int], np.ndarray, list[int]]],
    batch_size: int,
    bar: tqdm,
) -> Iterator[np.ndarray]:
    """A shard's records, batch by batch, each image's before its mirror image's."""
    for _, indices, images, labels in batches:
        versions = [images, images[:, :, ::-1]] if description.mirror else [images]
        records = np.zeros((len(indices), len(versions)), description.record_type)
        records["index"], records["label"] = np.array(indices)[:, None], np.array(labels)[:, None]
        for k, version in enumerate(versions):
            records["mirrored"][:, k] = k
            records["posterior"][:, k] = _posterior(autoencoder, version, batch_size)
        yield records.reshape(-1)
        bar.update(len(indices))


def _posterior(autoencoder: Autoencoder, images: np.ndarray, batch_size: int) -> np.ndarray:
    # The last batch is filled up: another size would be compiled anew.
    filled = np.zeros((batch_size, *images.shape[1:]), np.float32)
    filled[: len(images)] = images
    mean, std = autoencoder.encode(filled, batch_size=batch_size)
    return np.concatenate([mean, std], axis=-1)[: len(images)]


def _batches(
    source: Source,
    description: Description,
    shards: list[int],
    batch_size: int,
    max_bad: float | None,
) -> Iterator[tuple[int, list[int], np.ndarray, list[int]]]:
    """Shard, indices, images in [-1, 1] and labels, read one batch ahead in threads.

    A shard begins with a batch of its own, so that its bytes do not depend on where a run began.
    `max_bad` None is an error at the first bad image.
    """
    bad: dict[int, str] = {}

    def read(index: int) -> tuple[int, np.ndarray, int] | None:
        try:
            example = source[index]
        except BadImage as error:
            if max_bad is None:
                raise
            logging.warning("left out: %s", error)
            bad[index] = str(error)
            check_bad_fraction(source, max_bad, bad)
            return None
        image = to_unit_range(center_crop(example["image"], description.image_size))
        image = image.repeat(3, axis=2) if image.shape[-1] == 1 else image
        return index, image, int(example["label"])

    size = (description.image_size, description.image_size, 3)
    with ThreadPoolExecutor() as pool:

        def start(shard: int, indices: range) -> tuple[int, list[Future]]:
            return shard, [pool.submit(read, index) for index in indices]

        pending: list[tuple[int, list[Future]]] = []
        todo = (
            (shard, images[first : first + batch_size])
            for shard in shards
            for images in [description.shard_images(shard)]
            for first in range(0, len(images), batch_size)
        )
        for batch in itertools.chain(todo, [None]):
            pending += [] if batch is None else [start(*batch)]
            if not pending or (batch is not None and len(pending) < 2):
                continue
            shard, futures = pending.pop(0)
            try:
                read_ = [found for future in futures if (found := future.result())]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            images = np.array([image for _, image, _ in read_], np.float32).reshape(-1, *size)
            yield shard, [index for index, _, _ in read_], images, [label for *_, label in read_]


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
            f"{autoencoder.shift}, but training scales latents by {LATENT_SCALE}, Stable "
            "Diffusion's; give 'mse', 'ema' or another autoencoder of that scale"
        )


def _check_space(folder: Path, needed: int) -> None:
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
        config |= {"class_order": f.class_order, "labels": f.labels}
        source = create_source(ml_collections.ConfigDict(config))
        mesh = sharding.create_mesh(devices=jax.local_devices())
        # Not joined by jax.distributed, whose first process to leave would end the others.
        index = jax.process_index() if f.process_index is None else f.process_index
        count = jax.process_count() if f.process_count is None else f.process_count
        if not 0 <= index < count:
            raise ValueError(f"--process_index {index} is outside 0 to --process_count {count} - 1")
        finished = encode_latents(
            source,
            Autoencoder.load(f.vae, mesh, dtype=f.compute_dtype),
            f.output,
            image_size=f.image_size,
            mirror=f.mirror,
            dtype=f.dtype,
            batch_size=f.batch_size,
            images_per_shard=f.images_per_shard,
            on_bad_image=f.on_bad_image,
            max_bad_fraction=f.max_bad_fraction,
            process_index=index,
            process_count=count,
            progress=index == 0,
        )
        print(f.output if finished else f"{f.output}: other processes are still encoding")
    except (ValueError, OSError) as error:
        if logging.level_debug():
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    flags.DEFINE_string("data_name", "folder", "As config.data.name: folder, tfds:NAME, ...")
    flags.DEFINE_string("data_path", "", "As config.data.path: where the images are.")
    flags.DEFINE_string("data_split", "train", "As config.data.split.")
    flags.DEFINE_string("class_order", "string", "As config.data.class_order.")
    flags.DEFINE_string("labels", "auto", "As config.data.labels.")
    flags.DEFINE_string("vae", "mse", "mse (training's), ema, or a path to an autoencoder.")
    flags.DEFINE_integer("image_size", 256, "Pixels that images are cropped to.")
    flags.DEFINE_string("output", None, "The folder to make, or to go on with.", required=True)
    flags.DEFINE_bool("mirror", True, "Whether the mirrored images are encoded, too.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Of the stored numbers.")
    flags.DEFINE_enum("compute_dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    flags.DEFINE_integer("batch_size", 64, "Images at a time, over a process's devices.")
    flags.DEFINE_integer("images_per_shard", 4096, "Images in a file.")
    flags.DEFINE_integer("process_index", None, "Which of several processes this is, from 0 on.")
    flags.DEFINE_integer("process_count", None, "How many there are; 1, or a TPU pod's hosts.")
    flags.DEFINE_enum(
        "on_bad_image", "error", ["error", "skip"], "What becomes of an image that cannot be used."
    )
    flags.DEFINE_float("max_bad_fraction", 0.01, "With skip: stop when more of the images are bad.")
    app.run(main)
