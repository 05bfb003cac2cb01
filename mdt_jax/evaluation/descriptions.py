"""Describing a set of images: the features and sums that the metrics are computed from.

A description needs memory for the features of its images (8 kB each with Inception), never for the
images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32, Float64, Integer
from tqdm import tqdm

from mdt_jax.basics.names import printable
from mdt_jax.evaluation import SPLIT_SIZE
from mdt_jax.evaluation.batches import ImageSet, image_size, open_images, read_ahead, share
from mdt_jax.evaluation.extractors import Extractor, Features, check_finite
from mdt_jax.evaluation.npz import npz_members, read_npz
from mdt_jax.evaluation.processes import gather_arrays, gather_rows
from mdt_jax.evaluation.spectrum import PowerSpectrum
from mdt_jax.evaluation.statistics import FeatureMoments, Gaussian, InceptionScore

DIGEST_KEY = "extractor_digest"  # in the metadata of a reference, see mdt reference-stats


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSetDescription:
    """A set of images as the metrics need it. Without images it has the stored moments alone.

    Attributes:
      name: the images' origin.
      extractor: the name of the extractor that computed the features.
      digest: the digest of its weights.
      count: how many images were looked at; 0 without images.
      size: (height, width); None without images.
      labels: (n,); None where there are none.
      features: (n, d) features for precision and recall; None without images.
      pool: moments of the features for FID; None for fewer than two images.
      spatial: moments of the features for sFID; None where there are none.
      inception_score: None where the extractor has no classes.
      power: (rings,) mean radial power spectrum; None without images.
      stored: whether the moments were stored with the reference, and not computed from the images.
    """

    name: str
    extractor: str
    digest: str
    count: int
    size: tuple[int, int] | None
    labels: Integer[np.ndarray, "n"] | None
    features: Float32[np.ndarray, "n d"] | None
    pool: Gaussian | None
    spatial: Gaussian | None
    inception_score: float | None
    power: Float64[np.ndarray, "rings"] | None
    stored: bool = False


def describe_images(
    images: ImageSet,
    extractor: Extractor,
    *,
    batch_size: int = 64,
    split_size: int = SPLIT_SIZE,
    progress: bool = False,
    check: Callable[[Features], None] | None = None,
) -> ImageSetDescription:
    """Describes a set of images; every image is read once.

    Each of several processes reads its share, and all get the description of the whole.

    Args:
      images: the set.
      extractor: an extractor on this process's devices.
      batch_size: images read at a time.
      split_size: images of a split of the Inception Score.
      progress: whether process 0 shows a bar.
      check: is given the features of the first batch, and may refuse them.

    Raises:
      ValueError: features that are not finite, fewer images than processes, or an error of reading
        or of `check`.
    """
    processes, index = jax.process_count(), jax.process_index()
    mine = share(images.count, index, processes)
    collected = _Collected(images, mine, split_size)
    bar = tqdm(
        total=len(mine),
        unit="image",
        desc=_shortened(images.name),
        disable=not progress or index > 0,
    )
    with bar, ThreadPoolExecutor(1) as counting:
        counted: Future | None = None
        for first, batch in read_ahead(images, mine, batch_size):
            features = extractor.extract(batch)
            if check and first == mine.start:
                check(features)
            if counted:
                counted.result()
            # This batch is summed while the devices work on the next one.
            counted = counting.submit(collected.add, first, batch, features)
            bar.update(len(batch))
        if counted:
            counted.result()
    collected.join()
    return collected.description(extractor)


def check_reference(
    place: str | Path, *, recompute: bool = False, what: str = "--reference"
) -> tuple[int, int] | None:
    """Opens a reference as far as headers, stored statistics and its first image go.

    Args:
      place, recompute: as for `describe_reference`.
      what: the flag or key that names it, for messages.

    Returns:
      Height and width of its images; None where it has none.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: it is damaged, or holds neither images nor statistics.
    """
    path = Path(place)
    if not path.exists() and "," not in str(place):
        raise FileNotFoundError(
            f"{what} {printable(path)}: no such file or folder; mdt reference-stats makes one"
        )
    members = _members(path)
    if members is not None and not recompute and {"mu", "sigma"} <= set(members):
        _read_statistics(path, members)
        if "arr_0" not in members:
            return None
    elif members is not None and "arr_0" not in members:
        raise ValueError(
            f"{what} {printable(path)}: holds neither images (arr_0) nor statistics (mu, sigma), "
            f"but {printable(', '.join(members)) or 'nothing'}"
        )
    return image_size(open_images(place))


def describe_reference(
    place: str | Path, extractor: Extractor, *, recompute: bool = False, **settings
) -> ImageSetDescription:
    """Describes a reference: an npz of ADM's layout, or any images.

    The `mu` and `sigma` (`mu_s` and `sigma_s` for sFID) of an npz take the place of the moments of
    its images: ADM's references hold the moments of the whole training set, and images for
    precision and recall. A reference without images gives Fréchet distances alone.

    Args:
      place: images as `open_images` takes them, or an npz of statistics alone.
      extractor: an extractor with the weights of the stored statistics.
      recompute: whether to ignore stored statistics.
      **settings: the keywords of `describe_images`.

    Raises:
      ValueError: statistics of other weights or of another number of features, or an error of
        reading.
    """
    path = Path(place)
    members = _members(path) or []
    if recompute or "mu" not in members or "sigma" not in members:
        return describe_images(open_images(place), extractor, **settings)
    _check_digest(path, members, extractor)
    stored = _read_statistics(path, members)
    for gaussian in filter(None, stored.values()):
        try:
            _ = gaussian.factor  # kept; a matrix that has none would be found at the very end
        except (ValueError, np.linalg.LinAlgError) as error:
            raise ValueError(f"{printable(path)}: {error}") from error
    if "arr_0" not in members:
        return ImageSetDescription(
            name=str(place),
            extractor=extractor.name,
            digest=extractor.digest,
            count=0,
            size=None,
            labels=None,
            features=None,
            inception_score=None,
            power=None,
            stored=True,
            **stored,
        )

    def check(features: Features) -> None:
        """Refuses statistics of another number of features, before all images are looked at."""
        for name, gaussian in stored.items():
            ours = getattr(features, name)
            if gaussian and ours is not None and gaussian.mean.size != ours.shape[1]:
                raise ValueError(
                    f"{path}: stored statistics of {gaussian.mean.size} features, {extractor.name} "
                    f"has {ours.shape[1]}: they are another extractor's; make the reference anew "
                    "with mdt reference-stats, or give --recompute_reference"
                )

    found = describe_images(open_images(place), extractor, check=check, **settings)
    kept = {name: gaussian for name, gaussian in stored.items() if gaussian}
    return dataclasses.replace(found, stored=True, **kept)


class _Collected:
    """Running sums over the images of one process, then of all."""

    def __init__(self, images: ImageSet, mine: range, split_size: int):
        if split_size < 1:
            raise ValueError(f"--split_size {split_size} is below 1")
        self.images, self.mine, self.split_size = images, mine, split_size
        self.features: np.ndarray | None = None
        self.pool = self.spatial = self.score = self.power = None

    def add(self, first: int, batch: np.ndarray, found: Features) -> None:
        """Adds a batch and its features; `first` is the index of its first image in the set."""
        check_finite(found, self.images.name, first)
        if self.features is None:
            self._begin(batch, found)
        start = first - self.mine.start
        self.features[start : start + len(batch)] = found.pool
        self.pool.update(found.pool)
        if self.spatial:
            self.spatial.update(found.spatial)
        if self.score:
            self.score.update(first, found.probabilities)
        self.power.update(batch)

    def _begin(self, batch: np.ndarray, found: Features) -> None:
        self.features = np.zeros((len(self.mine), found.pool.shape[1]), np.float32)
        self.pool = FeatureMoments(found.pool.shape[1])
        if found.spatial is not None:
            self.spatial = FeatureMoments(found.spatial.shape[1])
        if found.probabilities is not None:
            classes = found.probabilities.shape[1]
            self.score = InceptionScore(self.images.count, classes, self.split_size)
        self.power = PowerSpectrum(*batch.shape[1:3])
        self.size = batch.shape[1:3]

    def join(self) -> None:
        """Adds up all processes' sums, in the order of the processes."""
        if jax.process_count() == 1:
            return
        self.features = gather_rows(self.features, self.images.count)
        self.pool = _joined(self.pool)
        self.spatial = self.spatial and _joined(self.spatial)
        if self.score:
            self.score.sums = np.sum(gather_arrays(self.score.sums), axis=0)
        self.power.sums = np.sum(gather_arrays(self.power.sums), axis=0)
        self.power.count = self.images.count

    def description(self, extractor: Extractor) -> ImageSetDescription:
        """The description of the images that were added."""
        enough = self.images.count > 1
        return ImageSetDescription(
            name=self.images.name,
            extractor=extractor.name,
            digest=extractor.digest,
            count=self.images.count,
            size=self.size,
            labels=self.images.labels,
            features=self.features,
            pool=self.pool.gaussian() if enough else None,
            spatial=self.spatial.gaussian() if enough and self.spatial else None,
            inception_score=self.score.value() if self.score else None,
            power=self.power.mean(),
        )


def _joined(moments: FeatureMoments) -> FeatureMoments:
    count, *arrays = moments.state()
    states = zip(*(gather_arrays(np.asarray(part)) for part in (count, *arrays)), strict=True)
    first, *others = (FeatureMoments.from_state(*state) for state in states)
    for other in others:
        first.merge(other)
    return first


def _check_digest(path: Path, members: list[str], extractor: Extractor) -> None:
    """Refuses, with ValueError, statistics whose metadata name other weights."""
    if "metadata" not in members:
        return
    try:
        stored = json.loads(str(read_npz(path, "metadata")))[DIGEST_KEY]
    except KeyError:  # of another program, or of samples
        return
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{printable(path)}: its metadata cannot be read; make the reference anew with "
            "mdt reference-stats, or give --recompute_reference to use its images"
        ) from error
    if stored and stored != extractor.digest:
        raise ValueError(
            f"{path}: its statistics are of weights {stored}, {extractor.name} has "
            f"{extractor.digest}; make the reference anew with mdt reference-stats, or give "
            "--recompute_reference to use its images"
        )


def _members(path: Path) -> list[str] | None:
    """The names of the arrays in a reference; None where it is no npz."""
    return npz_members(path) if path.suffix == ".npz" and path.exists() else None


def _read_statistics(path: Path, members: list[str]) -> dict[str, Gaussian | None]:
    """The statistics that are stored in a reference, by the name of their attribute."""
    keys = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    return {name: _stored(path, members, *pair) for name, pair in keys.items()}


def _stored(path: Path, members: list[str], mean: str, covariance: str) -> Gaussian | None:
    if mean not in members or covariance not in members:
        return None
    try:
        arrays = (read_npz(path, key).astype(np.float64) for key in (mean, covariance))
        return Gaussian(*arrays)
    except (TypeError, ValueError, np.linalg.LinAlgError) as error:
        raise ValueError(f"{printable(path)}: {mean}, {covariance}: {error}") from error


def _shortened(name: str, width: int = 24) -> str:
    name = printable(name)
    return name if len(name) <= width else "…" + name[1 - width :]
