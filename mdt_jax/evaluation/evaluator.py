"""Comparing two descriptions: FID, sFID, Inception Score, precision, recall and power spectra.

The metrics are those of ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py), which
published numbers come from, and differ from it only in rounding: distances between features in
float32 or better where it has float16, Fréchet distances without a general matrix square root, sums
in float64.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from tqdm import tqdm

from mdt_jax.evaluation import manifold, spectrum
from mdt_jax.evaluation.descriptions import ImageSetDescription
from mdt_jax.evaluation.statistics import frechet_distance

# How many samples published FIDs are measured with; fewer give a higher FID.
PUBLISHED_SAMPLES = 50_000
# Each metric's name, its name in a table, and which way is better.
EVALUATION_METRICS = (
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


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """The result of an evaluation.

    Attributes:
      metrics: numbers by the names of `EVALUATION_METRICS`.
      missing: the reason for each metric that was not computed, by name.
      warnings: reasons to doubt the numbers, a sentence each.
      classes: by label, "samples", "precision" and "precision_within".
      power: "samples" and "reference", the power in each ring, and "decibels", their ratio.
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

    def table(self, worst: int = 5) -> str:
        """The report as text: metrics, reasons for missing ones, the worst classes, warnings.

        Args:
          worst: how many classes are listed, those of the lowest precision first.
        """
        width = max(len(text) for _, text, _ in EVALUATION_METRICS)
        lines = []
        for name, text, better in EVALUATION_METRICS:
            if name in self.metrics:
                lines.append(f"{text:{width}}  {self.metrics[name]:12.4f}  {better} is better")
            else:
                lines.append(f"{text:{width}}  {'-':>12}  not computed: {self.missing[name]}")
        lines = [line.replace("near 0 is better", "below 0: too little detail") for line in lines]
        key = "precision_within" if "precision_within_classes" in self.metrics else "precision"
        ranked = sorted((c[key], label) for label, c in self.classes.items() if key in c)
        if ranked:
            listed = ", ".join(f"{label} ({value:.2f})" for value, label in ranked[:worst])
            named = "within the class" if key == "precision_within" else "by class"
            lines.append(f"lowest precision {named}: {listed}")
        return "\n".join(lines + [f"note: {text}" for text in self.warnings])


def evaluate(
    reference: ImageSetDescription,
    samples: ImageSetDescription,
    *,
    k: int = manifold.NEIGHBOURS,
    progress: bool = False,
) -> EvaluationReport:
    """Computes all metrics of samples against a reference, or the reason why one is missing.

    Args:
      reference: a result of `describe_reference` or `describe_images`.
      samples: a result of `describe_images`, by the same extractor.
      k: the balls of precision and recall reach to the k-th nearest neighbour.
      progress: whether to show a bar.

    Raises:
      ValueError: descriptions by different weights, or of images of different sizes.
    """
    _check_pair(reference, samples)
    if k < 1:
        raise ValueError(f"--neighbours {k} is below 1")
    report = EvaluationReport({}, {}, _warnings(reference, samples), {}, {}, {})
    _add_distances(report, reference, samples)
    _add_score(report, samples)
    _add_manifolds(report, reference, samples, k, progress)
    _add_spectra(report, reference, samples)
    report.about.update(
        reference=_about(reference), samples=_about(samples), extractor=samples.extractor,
        extractor_digest=samples.digest, neighbours=k,
    )  # fmt: skip
    return report


def _check_pair(reference: ImageSetDescription, samples: ImageSetDescription) -> None:
    if reference.digest != samples.digest:
        raise ValueError(
            f"{reference.name} was described by {reference.extractor} {reference.digest}, "
            f"{samples.name} by {samples.extractor} {samples.digest}: use one extractor for both"
        )
    if reference.size:
        check_sizes(reference.name, reference.size, samples.name, samples.size)


def check_sizes(
    reference: str, reference_size: tuple[int, int], samples: str, size: tuple[int, int]
) -> None:
    """Refuses, with ValueError, samples of another (height, width) than a reference's images.

    Args:
      reference, samples: their names.
      reference_size, size: the sizes of their images.
    """
    if tuple(reference_size) != tuple(size):
        sizes = ["{1} × {0}".format(*pair) for pair in (size, reference_size)]
        raise ValueError(
            f"{samples} holds images of {sizes[0]} pixels, {reference} of {sizes[1]}: give a "
            "reference of the samples' size (mdt reference-stats --image_size "
            f"{min(size)} makes one)"
        )


def _warnings(reference: ImageSetDescription, samples: ImageSetDescription) -> list[str]:
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


def _add_distances(
    report: EvaluationReport, reference: ImageSetDescription, samples: ImageSetDescription
) -> None:
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


def _add_score(report: EvaluationReport, samples: ImageSetDescription) -> None:
    if samples.inception_score is None:
        report.missing["inception_score"] = f"{samples.extractor} gives no class probabilities"
    else:
        report.metrics["inception_score"] = samples.inception_score


def _add_manifolds(
    report: EvaluationReport,
    reference: ImageSetDescription,
    samples: ImageSetDescription,
    k: int,
    progress: bool,
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
        found = manifold.compare_manifolds(
            reference.features, samples.features, k, progress=bar.update
        )
    report.metrics.update(precision=found.precision, recall=found.recall)
    _add_classes(report, reference, samples, found, k)


def _add_classes(
    report: EvaluationReport,
    reference: ImageSetDescription,
    samples: ImageSetDescription,
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


def _add_spectra(
    report: EvaluationReport, reference: ImageSetDescription, samples: ImageSetDescription
) -> None:
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


def _about(d: ImageSetDescription) -> dict[str, object]:
    score = d.inception_score
    return {
        "name": d.name,
        "images": d.count,
        "size": list(d.size) if d.size else None,
        "labelled": d.labels is not None,
        "stored_statistics": d.stored,
        "inception_score": score if score is None or math.isfinite(score) else str(score),
    }
