"""Whether samples of a labelled data set are of the class asked for, varied, and new.

A model that ignores its labels, one that draws class means and one that repeats its training images
each miss a different requirement. What is required, and the classifier that reads the samples,
belong to the data set: `KINDS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer, UInt8
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

from mdt_jax.evaluation import image_classifier

Images = UInt8[np.ndarray, "_n _h _w _c"]
Labels = Integer[np.ndarray, "_n"]
MOST_HELDOUT = 2_000  # whose nearest training images are looked for
CLASSIFIER_FILE = "report_classifier.npz"  # in the workdir


@dataclasses.dataclass(frozen=True)
class Measure:
    """One row of the report: a key of its result, and the range required of it, ends included."""

    name: str
    text: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def requirement(self) -> str:
        """The range as the table shows it; empty where anything is allowed."""
        if math.isfinite(self.high):
            return f"{self.low:.2f} to {self.high:.2f}"
        return f">= {self.low:.2f}" if math.isfinite(self.low) else ""

    def is_met(self, value: float) -> bool:
        """Whether `value` is in the range."""
        return self.low <= value <= self.high


@dataclasses.dataclass(frozen=True, eq=False)
class RealImages:
    """A data set's images.

    Attributes:
      train, train_labels: those that the model was trained on, and their classes.
      heldout, heldout_labels: those that neither the model nor the classifier has seen.
    """

    train: Images
    train_labels: Labels
    heldout: Images
    heldout_labels: Labels


# (images) → the classes they are read as; and what makes such a function of the real images, for
# whose classifier the file may be used again.
Reader = Callable[[Images], Labels]
MakeReader = Callable[[RealImages, Path | None], Reader]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A data set whose samples can be reported on.

    Attributes:
      image: what one of its images is called.
      heldout: the split that is held out.
      image_shape: (height, width, channels) of a sample.
      make_reader: makes the classifier.
      measures: the report's rows.
    """

    image: str
    heldout: str
    image_shape: tuple[int, int, int]
    make_reader: MakeReader
    measures: tuple[Measure, ...]


def _measures(image: str, accuracy: float, guided: float) -> tuple[Measure, ...]:
    return (
        # A check of the classifier: one that misreads real images says nothing about samples.
        Measure(
            "classifier_accuracy", f"held-out {image}s the classifier reads right", low=accuracy
        ),
        Measure("guided_accuracy", "guided samples read as the class asked for", low=guided),
        Measure("plain_accuracy", "samples at guidance 1 read as the class asked for"),
        Measure("variance_ratio", f"within-class variance, samples / training {image}s", 0.7, 1.3),
        Measure(
            "distance_ratio", f"distance to nearest training {image}, samples / held-out", low=0.6
        ),
    )


def _support_vectors(real: RealImages, file: Path | None) -> Reader:
    classifier = SVC(C=10.0).fit(_pixels(real.train), real.train_labels)
    return lambda images: classifier.predict(_pixels(images))


def _convolutions(real: RealImages, file: Path | None) -> Reader:
    given = (real.train, real.train_labels, int(real.train_labels.max()) + 1)
    if file is None:
        return image_classifier.train_image_classifier(*given).read
    return image_classifier.load_or_train(file, *given).read


KINDS = {
    "digits": Kind("scan", "heldout", (8, 8, 1), _support_vectors, _measures("scan", 0.97, 0.9)),
    "fashion_mnist": Kind(
        "picture", "test", (32, 32, 1), _convolutions, _measures("picture", 0.9, 0.8)
    ),
}


def report(
    kind: Kind,
    samples_guided: Images,
    labels: Labels,
    samples_plain: Images,
    labels_plain: Labels,
    real: RealImages,
    file: Path | None = None,
) -> dict[str, float | list[str]]:
    """Measures samples of a data set.

    Args:
      kind: the data set.
      samples_guided: (N, H, W, C) in 0..255, drawn with guidance.
      labels: (N,) the classes asked for.
      samples_plain: (M, H, W, C) drawn at guidance 1, which is the data's own distribution.
      labels_plain: (M,) the classes asked for; every class of the images, at least twice.
      real: the real images.
      file: where a classifier that takes long to train is kept; None for nowhere.

    Returns:
      classifier_accuracy: share of held-out images read right by a classifier trained on the
        training images only.
      guided_accuracy, plain_accuracy: share of samples that it reads as the class asked for.
      variance_ratio: variance of a pixel within a class, averaged over pixels and classes, of
        the plain samples over that of the training images; 0 for class means.
      distance_ratio: median Euclidean distance from a plain sample to the nearest training image,
        over the same median of at most `MOST_HELDOUT` held-out ones; 0 for copies.
      failed: names of the measures outside what the kind requires, empty when all is well.

    Raises:
      ValueError: a class of the training images has fewer than two plain samples; or the file is
        no such classifier.
    """
    classes = np.unique(real.train_labels)
    variance = _within_class_variance(samples_plain, labels_plain, classes)
    read = kind.make_reader(real, file)
    nearest = NearestNeighbors(n_neighbors=1).fit(_rows(real.train))
    some = np.linspace(0, len(real.heldout) - 1, min(len(real.heldout), MOST_HELDOUT)).astype(int)
    plain, heldout = (
        np.median(nearest.kneighbors(_rows(images))[0])
        for images in (samples_plain, real.heldout[some])
    )
    values = {
        "classifier_accuracy": np.mean(read(real.heldout) == real.heldout_labels),
        "guided_accuracy": np.mean(read(samples_guided) == labels),
        "plain_accuracy": np.mean(read(samples_plain) == labels_plain),
        "variance_ratio": variance / _within_class_variance(real.train, real.train_labels, classes),
        "distance_ratio": plain / heldout,
    }
    values = {name: float(value) for name, value in values.items()}
    failed = [measure.name for measure in kind.measures if not measure.is_met(values[measure.name])]
    return values | {"failed": failed}


def _pixels(images: Images) -> Float[np.ndarray, "_n _d"]:
    """Each image as one row of numbers in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0


def _rows(images: Images) -> Float[np.ndarray, "_n _d"]:
    """Each image as one row of numbers in [0, 255], in half the memory."""
    return images.reshape(len(images), -1).astype(np.float32)


def _within_class_variance(
    images: Images, labels: Labels, classes: Integer[np.ndarray, "_k"]
) -> float:
    """The unbiased variance of each pixel in each class, averaged over both."""
    for label in classes:
        if (count := int((labels == label).sum())) < 2:
            raise ValueError(f"class {label} has {count} of the samples: draw at least 2 of it")
    return float(
        np.mean([_pixels(images[labels == label]).var(axis=0, ddof=1) for label in classes])
    )


def report_table(kind: Kind, result: dict[str, float | list[str]]) -> str:
    """The result of `report` as a table, a measure to a row, with what is required of it."""
    width = max(len(measure.text) for measure in kind.measures)
    rows = [f"{'measure':{width}}  value  required"]
    for measure in kind.measures:
        verdict = "FAIL" if measure.name in result["failed"] else "pass"
        required = f"{measure.requirement:12}  {verdict}" if measure.requirement else ""
        rows.append(f"{measure.text:{width}}  {result[measure.name]:5.3f}  {required}".rstrip())
    return "\n".join(rows)


def conclusion(kind: Kind, result: dict[str, float | list[str]]) -> str:
    """A sentence: whether the samples pass, and what they miss."""
    missed = [
        f"{measure.name} is {result[measure.name]:.3f}, required {measure.requirement}"
        for measure in kind.measures
        if measure.name in result["failed"]
    ]
    return f"The samples {'do not pass: ' + '; '.join(missed) if missed else 'pass'}."
