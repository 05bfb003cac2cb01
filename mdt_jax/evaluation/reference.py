"""A reference to evaluate against: a choice of a source's images, and moments of all of them."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.lib.format import dtype_to_descr, write_array, write_array_header_1_0
from tqdm import tqdm

from mdt_jax.basics import ranges
from mdt_jax.basics.atomic import whole_file
from mdt_jax.data import Source, center_crop
from mdt_jax.evaluation.batches import read_ahead
from mdt_jax.evaluation.descriptions import DIGEST_KEY
from mdt_jax.evaluation.extractors import Extractor, check_finite
from mdt_jax.evaluation.statistics import FeatureMoments, Gaussian


@dataclasses.dataclass(frozen=True, eq=False)
class SourceImages:
    """Images of a source in a given order, cropped; an `evaluation.batches.ImageSet`.

    Attributes:
      source: a source of pixels.
      order: indices into it.
      image_size: side that images are cropped to.
      labels: one for each image, filled in as images are read; None without classes.
    """

    source: Source
    order: np.ndarray
    image_size: int
    labels: np.ndarray | None

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.order)

    def read(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """As `ImageSet.read`, in threads; fills in the labels of images that are read.

        Raises:
          BadImage: an image cannot be used.
        """

        def load(place: int) -> np.ndarray:
            (example,) = self.source.pictures([int(self.order[place])])
            if self.labels is not None:
                self.labels[place] = example["label"]
            return center_crop(example["image"], self.image_size)

        with ThreadPoolExecutor() as pool:
            for first in range(start, stop, batch_size):
                yield np.stack(list(pool.map(load, range(first, min(first + batch_size, stop)))))


def make_reference(
    source: Source,
    extractor: Extractor,
    output: str | Path,
    *,
    image_size: int,
    num_images: int = 10_000,
    stats_images: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> None:
    """Writes a reference.

    Args:
      source: images, RGB or gray, not latents.
      extractor: computes the features whose moments are kept.
      output: the npz, which appears when it is whole.
      image_size: side that images are cropped to.
      num_images: how many images are kept, all where there are fewer.
      stats_images: how many images the moments are computed from, a random choice that includes the
        kept ones; None for all.
      seed: the seed of the choice.
      batch_size: images at a time.
      progress: whether to show a bar.

    Raises:
      BadImage: an image cannot be used.
      ValueError: a source or numbers that do not fit.
    """
    images, kept = choose_images(source, image_size, num_images, stats_images, seed)
    shape = (kept, image_size, image_size, source.image_shape[-1])
    with whole_file(output) as file, zipfile.ZipFile(file, "w") as archive:
        batches = read_ahead(images, range(images.count), batch_size)
        bar = tqdm(total=images.count, unit="image", disable=not progress)
        pool = spatial = None
        with bar, archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False}
            write_array_header_1_0(member, header | {"shape": shape})
            for first, batch in batches:
                member.write(np.ascontiguousarray(batch[: max(kept - first, 0)]).data)
                found = extractor.extract(batch)
                check_finite(found, source.name, first)
                pool = _updated(pool, found.pool)
                if found.spatial is not None:
                    spatial = _updated(spatial, found.spatial)
                bar.update(len(batch))
        arrays = _moments(pool.gaussian(), "")
        arrays |= _moments(spatial.gaussian(), "_s") if spatial else {}
        if images.labels is not None:
            arrays["arr_1"] = images.labels[:kept]
        about = {
            "Content": "reference for evaluation: real images",
            "Software": "mdt_jax",
            "source": source.name,
            "image_size": image_size,
            "stats_images": images.count,
            "seed": seed,
            "extractor": extractor.name,
            DIGEST_KEY: extractor.digest,
        }
        arrays["metadata"] = np.array(json.dumps(about))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                write_array(member, array, allow_pickle=False)


def choose_images(
    source: Source, image_size: int, num_images: int, stats_images: int | None, seed: int
) -> tuple[SourceImages, int]:
    """The images to read, with those to keep first and shuffled, and how many are kept.

    They are shuffled since an Inception Score's splits of classes in order would mean nothing.

    Raises:
      ValueError: latents, other than 1 or 3 channels, or numbers that are too small.
    """
    if source.latents:
        raise ValueError(
            f"{source.name}: holds latents, and Inception sees images: give the source that they "
            "were encoded from (--data_name folder, tfds:NAME, npy)"
        )
    if source.image_shape[-1] not in (1, 3):
        raise ValueError(
            f"{source.name}: images of {source.image_shape[-1]} channels; they must be RGB or gray"
        )
    ranges.check_flags({"image_size": image_size, "num_images": num_images, "seed": seed})
    ranges.check_flags({"stats_images": stats_images})
    total = len(source) if stats_images is None else min(stats_images, len(source))
    if total < 2:
        raise ValueError(f"a covariance needs two images; there are {total} (--stats_images)")
    kept = min(num_images, total)
    shuffled = np.random.default_rng(seed).permutation(len(source))[:total]
    order = np.concatenate([shuffled[:kept], np.sort(shuffled[kept:])])
    labels = np.zeros(total, np.int64) if source.class_names else None
    return SourceImages(source, order, image_size, labels), kept


def _updated(moments: FeatureMoments | None, rows: np.ndarray) -> FeatureMoments:
    moments = moments or FeatureMoments(rows.shape[1])
    moments.update(rows)
    return moments


def _moments(gaussian: Gaussian, ending: str) -> dict[str, np.ndarray]:
    return {f"mu{ending}": gaussian.mean, f"sigma{ending}": gaussian.covariance}
