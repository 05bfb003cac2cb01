"""Makes a reference to evaluate against, in ADM's layout, of any source of images.

    python tools/reference_stats.py --data_name folder --data_path DIR --image_size 256 \\
        --num_images 10000 --inception DIR --output REF.npz

crops images as training does, and writes an npz with `arr_0`, a random choice of --num_images of
them, for precision and recall; `arr_1`, their labels where there are classes; and the moments of
the features of all images (or of --stats_images), `mu` and `sigma` for FID, `mu_s` and `sigma_s`
for sFID. The same seed makes the same choice. `metadata` says how it was made, with a digest of
Inception's weights, so that `mdt_jax.evaluate` refuses samples' features of other weights.

Images are read once and never held, so memory does not grow with their number.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import app, flags
from numpy.lib.format import dtype_to_descr, write_array, write_array_header_1_0
from tqdm import tqdm

from mdt_jax.basics import ranges
from mdt_jax.basics.atomic import check_writable, whole_file
from mdt_jax.basics.names import printable
from mdt_jax.data import Source, center_crop
from mdt_jax.data.source_flags import FLAGS_OF_KEYS, define_source_flags, source_of_flags
from mdt_jax.evaluation.batches import read_ahead
from mdt_jax.evaluation.descriptions import DIGEST_KEY
from mdt_jax.evaluation.extractors import Extractor, check_finite, load_inception
from mdt_jax.evaluation.statistics import FeatureMoments, Gaussian
from mdt_jax.parallel.command import command_ending, ending_quietly, one_line
from mdt_jax.parallel.flag_parsing import parse_flags


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


def main(_: list[str]) -> None:
    """The command."""
    f = flags.FLAGS
    with command_ending(f, message=functools.partial(one_line, flags_of_keys=FLAGS_OF_KEYS)):
        source = source_of_flags(f)
        choose_images(source, f.image_size, f.num_images, f.stats_images, f.seed)
        check_writable(f.output)  # all is checked before hours of work
        make_reference(
            source,
            load_inception(f.inception, f.batch_size),
            f.output,
            image_size=f.image_size,
            num_images=f.num_images,
            stats_images=f.stats_images,
            seed=f.seed,
            batch_size=f.batch_size,
            progress=True,
        )
        print(printable(f.output))


def define_flags(f: flags.FlagValues) -> None:
    """The command's flags."""
    define_source_flags(f)
    flags.DEFINE_integer("image_size", 256, "Pixels that images are cropped to.", flag_values=f)
    flags.DEFINE_integer(
        "num_images", 10_000, "Images kept, for precision and recall.", flag_values=f
    )
    flags.DEFINE_integer(
        "stats_images", None, "Images of the moments; all by default.", flag_values=f
    )
    flags.DEFINE_integer("seed", 0, "Seed of the choice of images.", flag_values=f)
    flags.DEFINE_integer("batch_size", 64, "Images through Inception at a time.", flag_values=f)
    flags.DEFINE_string("inception", None, "Weights of Inception-v3.", required=True, flag_values=f)
    flags.DEFINE_string("output", None, "The npz to write.", required=True, flag_values=f)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    with ending_quietly():
        app.run(main, flags_parser=parse_flags)
