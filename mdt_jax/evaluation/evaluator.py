"""Images to a description, two descriptions to a report: FID, sFID, Inception Score and the rest.

The metrics are those of ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py), which
published numbers come from, and differ from it only in rounding: distances between features in
float32 or better where it has float16, Fréchet distances without a general matrix square root, sums
in float64. A description needs memory for the features of its images (8 kB each with Inception),
never for the images.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32, Float64, Integer
from tqdm import tqdm

from mdt_jax.evaluation import manifold, spectrum
from mdt_jax.evaluation.batches import Images, npz_members, open_images, read_npz, share
from mdt_jax.evaluation.extractors import Extractor, Features
from mdt_jax.evaluation.processes import gather, gather_rows
from mdt_jax.evaluation.spectrum import PowerSpectrum
from mdt_jax.evaluation.statistics import Gaussian, InceptionScore, Moments, frechet_distance

SPLIT_SIZE = 5000
# What published FIDs are measured with; fewer samples give a higher FID.
PUBLISHED_SAMPLES = 50_000
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
DIGEST_KEY = "extractor_digest"  # in the metadata of a reference, see tools/reference_stats.py


@dataclasses.dataclass(frozen=True, eq=False)
class Description:
    """All that the metrics need to know of a set of images.

    Attributes:
      name: where the images came from.
      extractor, digest: what computed the features, and of which weights.
      count: how many images were looked at; 0 for a reference that is statistics alone.
      size: (height, width), None without images.
      labels: (n,), None where there are none.
      features: (n, d) for precision and recall, None without images.
      pool, spatial: moments of the features, None where too few images or no such features.
      inception_score: None where the extractor has no classes.
      power: (rings,) mean radial power spectrum, None without images.
      stored: whether the moments were stored with the reference, and not of these images.
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


def describe(
    images: Images,
    extractor: Extractor,
    *,
    batch_size: int = 64,
    split_size: int = SPLIT_SIZE,
    progress: bool = False,
) -> Description:
    """Looks at every image once, in several processes each at its share; all get the whole.

    Args:
      images: of one size.
      extractor: of this process's devices.
      batch_size: images read at a time.
      split_size: of the Inception Score.
      progress: whether to show a bar, on process 0.

    Raises:
      ValueError: features that are not finite, fewer images than processes, or what reading raises.
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
            if counted:
                counted.result()
            # Sums of this batch, while the devices have the next one.
            counted = counting.submit(collected.add, first, batch, features)
            bar.update(len(batch))
        if counted:
            counted.result()
    collected.join()
    return collected.description(extractor)


def describe_reference(
    place: str | Path, extractor: Extractor, *, recompute: bool = False, **settings
) -> Description:
    """A reference in ADM's layout, or any images.

    Stored `mu` and `sigma` (`mu_s` and `sigma_s` for sFID) take the place of the moments of its
    images: ADM's references hold those of the whole training set, and images for precision and
    recall. A reference without images gives Fréchet distances alone.

    Args:
      place: as `open_images` takes it, or an npz of statistics alone.
      extractor: must have the weights of the stored statistics.
      recompute: whether stored statistics are to be passed over.
      **settings: as `describe` takes them.

    Raises:
      ValueError: statistics of other weights or of another number of features, or what reading
        raises.
    """
    path = Path(place)
    members = npz_members(path) if path.suffix == ".npz" and path.exists() else []
    if recompute or "mu" not in members or "sigma" not in members:
        return describe(open_images(place), extractor, **settings)
    _check_digest(path, members, extractor)
    stored = {
        name: _stored(path, members, *keys)
        for name, keys in (("pool", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s")))
    }
    if "arr_0" not in members:
        return Description(
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
    found = describe(open_images(place), extractor, **settings)
    for name, gaussian in stored.items():
        ours = getattr(found, name)
        if gaussian and ours and gaussian.mean.shape != ours.mean.shape:
            raise ValueError(
                f"{path}: stored statistics of {gaussian.mean.size} features, {extractor.name} has "
                f"{ours.mean.size}: they are another extractor's; make the reference anew with "
                "tools/reference_stats.py, or give --recompute_reference"
            )
    kept = {name: gaussian for name, gaussian in stored.items() if gaussian}
    return dataclasses.replace(found, stored=True, **kept)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `evaluate` found.

    Attributes:
      metrics: numbers by name, see `METRICS`.
      missing: why a metric is not there, by name.
      warnings: what to know before believing the numbers, a sentence each.
      classes: by label: samples, precision, precision_within.
      power: of samples and reference in each ring, and their ratio in decibels.
      about: names, counts, sizes and settings.
    """

    metrics: dict[str, float]
    missing: dict[str, str]
    warnings: list[str]
    classes: dict[int, dict[str, float]]
    power: dict[str, list[float]]
    about: dict[str, object]

    def as_json(self) -> dict[str, object]:
        """The report as JSON's types."""
        return dataclasses.asdict(self) | {"classes": {str(k): v for k, v in self.classes.items()}}


# Name, how a table shows it, which way is better.
METRICS = (
    ("fid", "FID", "lower"),
    ("sfid", "sFID", "lower"),
    ("inception_score", "Inception Score", "higher"),
    ("precision", "precision", "higher"),
    ("recall", "recall", "higher"),
    ("precision_per_class", "precision, mean of classes", "higher"),
    ("precision_within_classes", "precision within the class, mean", "higher"),
    ("spectrum_distance_db", "power spectra apart, dB", "lower"),
    ("high_frequencies_db", "high frequencies, dB", "near 0"),
)


def evaluate(
    reference: Description,
    samples: Description,
    *,
    k: int = manifold.NEIGHBOURS,
    progress: bool = False,
) -> Report:
    """All metrics of samples against a reference, or why one is not there.

    Args:
      reference: from `describe_reference` or `describe`.
      samples: from `describe`, by the same extractor.
      k: which neighbour the balls of precision and recall reach to.
      progress: whether to show a bar.

    Raises:
      ValueError: descriptions by different weights, or of images of different sizes.
    """
    _check_pair(reference, samples)
    if k < 1:
        raise ValueError(f"--neighbours {k} is below 1")
    report = Report({}, {}, _warnings(reference, samples), {}, {}, {})
    _add_distances(report, reference, samples)
    _add_score(report, samples)
    _add_manifolds(report, reference, samples, k, progress)
    _add_spectra(report, reference, samples)
    report.about.update(
        reference=_about(reference), samples=_about(samples), extractor=samples.extractor,
        extractor_digest=samples.digest, neighbours=k,
    )  # fmt: skip
    return report


def table(report: Report, worst: int = 5) -> str:
    """The report for a person: metrics, what is missing, the worst classes, warnings."""
    width = max(len(text) for _, text, _ in METRICS)
    lines = []
    for name, text, better in METRICS:
        if name in report.metrics:
            lines.append(f"{text:{width}}  {report.metrics[name]:12.4f}  {better} is better")
        else:
            lines.append(f"{text:{width}}  {'-':>12}  not computed: {report.missing[name]}")
    lines = [line.replace("near 0 is better", "below 0: too little detail") for line in lines]
    key = "precision_within" if "precision_within_classes" in report.metrics else "precision"
    ranked = sorted((c[key], label) for label, c in report.classes.items() if key in c)
    if ranked:
        listed = ", ".join(f"{label} ({value:.2f})" for value, label in ranked[:worst])
        named = "within the class" if key == "precision_within" else "by class"
        lines.append(f"lowest precision {named}: {listed}")
    return "\n".join(lines + [f"note: {text}" for text in report.warnings])


def read_ahead(images: Images, mine: range, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Batches with the index of their first image, one read while the one before is used."""
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size} is below 1")
    batches = images.read(mine.start, mine.stop, batch_size)
    first = mine.start
    with ThreadPoolExecutor(1) as reading:
        following = reading.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reading.submit(next, batches, None)
            if first == 0 and batch.max() <= 1 and batch.any():
                raise ValueError(
                    f"{images.name}: the first {len(batch)} images hold only 0 and 1; images are "
                    "0 ... 255: these seem to be floats in [0, 1] that were cast to uint8"
                )
            yield first, batch
            first += len(batch)


def check_finite(found: Features, name: str, first: int) -> None:
    """Refuses features that are not finite, with ValueError; `first` is the batch's first image."""
    for part in (found.pool, found.spatial, found.probabilities):
        finite = True if part is None else np.isfinite(part).all(axis=1)
        if not np.all(finite):
            raise ValueError(
                f"{name}: image {first + int(np.argmin(finite))} has features that are not finite: "
                "the extractor's weights are damaged, or not of this network"
            )


class _Collected:
    """Running sums over the images of one process, then of all."""

    def __init__(self, images: Images, mine: range, split_size: int):
        if split_size < 1:
            raise ValueError(f"--split_size {split_size} is below 1")
        self.images, self.mine, self.split_size = images, mine, split_size
        self.features: np.ndarray | None = None
        self.pool = self.spatial = self.score = self.power = None

    def add(self, first: int, batch: np.ndarray, found: Features) -> None:
        """A batch whose first image is `first` of all."""
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
        self.pool = Moments(found.pool.shape[1])
        if found.spatial is not None:
            self.spatial = Moments(found.spatial.shape[1])
        if found.probabilities is not None:
            classes = found.probabilities.shape[1]
            self.score = InceptionScore(self.images.count, classes, self.split_size)
        self.power = PowerSpectrum(*batch.shape[1:3])
        self.size = batch.shape[1:3]

    def join(self) -> None:
        """Every process's sums, in the order of the processes."""
        if jax.process_count() == 1:
            return
        self.features = gather_rows(self.features, self.images.count)
        self.pool = _joined(self.pool)
        self.spatial = self.spatial and _joined(self.spatial)
        if self.score:
            self.score.sums = np.sum(gather(self.score.sums), axis=0)
        self.power.sums = np.sum(gather(self.power.sums), axis=0)
        self.power.count = self.images.count

    def description(self, extractor: Extractor) -> Description:
        """What came of it."""
        enough = self.images.count > 1
        return Description(
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


def _joined(moments: Moments) -> Moments:
    count, *arrays = moments.state()
    states = zip(*(gather(np.asarray(part)) for part in (count, *arrays)), strict=True)
    first, *others = (Moments.from_state(*state) for state in states)
    for other in others:
        first.merge(other)
    return first


def _check_digest(path: Path, members: list[str], extractor: Extractor) -> None:
    """Refuses stored statistics that say that they are of other weights."""
    if "metadata" not in members:
        return
    stored = json.loads(str(read_npz(path, "metadata"))).get(DIGEST_KEY)
    if stored and stored != extractor.digest:
        raise ValueError(
            f"{path}: its statistics are of weights {stored}, {extractor.name} has "
            f"{extractor.digest}; make the reference anew with tools/reference_stats.py, or give "
            "--recompute_reference to use its images"
        )


def _stored(path: Path, members: list[str], mean: str, covariance: str) -> Gaussian | None:
    if mean not in members or covariance not in members:
        return None
    try:
        arrays = (read_npz(path, key).astype(np.float64) for key in (mean, covariance))
        return Gaussian(*arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {mean}, {covariance}: {error}") from error


def _check_pair(reference: Description, samples: Description) -> None:
    if reference.digest != samples.digest:
        raise ValueError(
            f"{reference.name} was described by {reference.extractor} {reference.digest}, "
            f"{samples.name} by {samples.extractor} {samples.digest}: use one extractor for both"
        )
    if reference.size and reference.size != samples.size:
        sizes = ["{1} × {0}".format(*d.size) for d in (samples, reference)]
        raise ValueError(
            f"{samples.name} holds images of {sizes[0]} pixels, {reference.name} of {sizes[1]}: "
            "give a reference of the samples' size (tools/reference_stats.py --image_size "
            f"{min(samples.size)} makes one)"
        )


def _warnings(reference: Description, samples: Description) -> list[str]:
    found = []
    sides = [(samples, "samples")] + ([] if reference.stored else [(reference, "reference images")])
    for side, what in sides:
        dimensions = side.features.shape[1]
        if side.count <= dimensions:
            found.append(
                f"{side.count:,} {what} for {dimensions:,} features: their covariance is singular "
                "and FID comes out too high by much, comparable only with FIDs of as many images; "
                f"it is meant to be measured with {PUBLISHED_SAMPLES:,} samples"
            )
    if samples.features.shape[1] < samples.count < PUBLISHED_SAMPLES:
        found.append(
            f"{samples.count:,} samples: published FIDs are of {PUBLISHED_SAMPLES:,}, and fewer "
            "give a higher FID"
        )
    return found


def _add_distances(report: Report, reference: Description, samples: Description) -> None:
    for name, part in (("fid", "pool"), ("sfid", "spatial")):
        ours, theirs = getattr(samples, part), getattr(reference, part)
        if ours and theirs:
            report.metrics[name] = frechet_distance(theirs, ours)
        elif samples.count < 2:
            report.missing[name] = "a covariance needs 2 samples"
        elif not reference.stored and reference.count < 2:
            report.missing[name] = "a covariance needs 2 reference images"
        elif not ours:
            report.missing[name] = f"{samples.extractor} has no spatial features"
        else:
            report.missing[name] = f"{reference.name} holds no mu_s and sigma_s, nor arr_0"


def _add_score(report: Report, samples: Description) -> None:
    if samples.inception_score is None:
        report.missing["inception_score"] = f"{samples.extractor} gives no class probabilities"
    else:
        report.metrics["inception_score"] = samples.inception_score


def _add_manifolds(
    report: Report, reference: Description, samples: Description, k: int, progress: bool
) -> None:
    names = ("precision", "recall", "precision_per_class", "precision_within_classes")
    reason = None
    if reference.features is None:
        reason = f"{reference.name} holds no images (arr_0)"
    elif min(reference.count, samples.count) <= k:
        fewer = min(reference, samples, key=lambda d: d.count)
        reason = f"k = {k} needs {k + 1} images, {fewer.name} holds {fewer.count}"
    if reason:
        report.missing.update(dict.fromkeys(names, reason))
        return
    pairs = manifold.num_pairs(reference.count, samples.count)
    bar = tqdm(
        total=pairs, unit="pair", unit_scale=True, desc="precision, recall", disable=not progress
    )
    with bar:
        found = manifold.compare(reference.features, samples.features, k, progress=bar.update)
    report.metrics.update(precision=found.precision, recall=found.recall)
    _add_classes(report, reference, samples, found, k)


def _add_classes(
    report: Report,
    reference: Description,
    samples: Description,
    found: manifold.Manifolds,
    k: int,
) -> None:
    if samples.labels is None:
        reason = f"{samples.name} holds no labels (arr_1)"
        names = ("precision_per_class", "precision_within_classes")
        report.missing.update(dict.fromkeys(names, reason))
        return
    labels, counts = np.unique(samples.labels, return_counts=True)
    overall = manifold.precision_per_class(found.samples_inside, samples.labels)
    for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
        report.classes[label] = {"samples": count, "precision": overall[label]}
    report.metrics["precision_per_class"] = float(np.mean(list(overall.values())))
    if reference.labels is None:
        report.missing["precision_within_classes"] = f"{reference.name} holds no labels (arr_1)"
        return
    within = manifold.precision_within_classes(
        reference.features, reference.labels, samples.features, samples.labels, k
    )
    for label, value in within.items():
        report.classes[label]["precision_within"] = value
    if len(within) < len(labels):
        text = (
            f"{len(labels) - len(within)} of {len(labels)} classes of the samples have fewer than "
            f"{k + 1} reference images, and so no precision within the class"
        )
        report.warnings.append(text)
    if within:
        report.metrics["precision_within_classes"] = float(np.mean(list(within.values())))
    else:
        report.missing["precision_within_classes"] = f"no class has {k + 1} reference images"


def _add_spectra(report: Report, reference: Description, samples: Description) -> None:
    if reference.power is None or not len(samples.power):
        reason = "images of one pixel"
        if reference.power is None:
            reason = f"{reference.name} holds no images (arr_0)"
        names = ("spectrum_distance_db", "high_frequencies_db")
        report.missing.update(dict.fromkeys(names, reason))
        return
    pair = (samples.power, reference.power)
    report.metrics["spectrum_distance_db"] = spectrum.distance(*pair)
    report.metrics["high_frequencies_db"] = spectrum.high_frequencies(*pair)
    report.power.update(
        samples=samples.power.tolist(),
        reference=reference.power.tolist(),
        decibels=spectrum.decibels(*pair).tolist(),
    )


def _about(d: Description) -> dict[str, object]:
    score = d.inception_score
    return {
        "name": d.name,
        "images": d.count,
        "size": list(d.size) if d.size else None,
        "labelled": d.labels is not None,
        "stored_statistics": d.stored,
        "inception_score": score if score is None or math.isfinite(score) else str(score),
    }


def _shortened(name: str, width: int = 24) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]
