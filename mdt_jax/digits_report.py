"""Measures a model's samples of digits against scikit-learn's 8x8 scans.

    mdt digits-report --workdir runs/digits

It draws 50 samples of each class twice, with guidance and without, prints what `report` measures,
and exits with status 1 when a requirement is not met. A model that ignores its labels, one that
draws class means and one that repeats its training scans each miss a different requirement.
"""

import argparse
import dataclasses
import math

import numpy as np
from absl import app
from jaxtyping import Float, Integer, UInt8

from mdt_jax.basics.help_page import Page

PAGE = Page(
    "mdt digits-report", "python -m mdt_jax.digits_report", "--workdir RUN [OPTION ...]", __doc__
)
DigitImages = UInt8[np.ndarray, "_n 8 8 1"]
Labels = Integer[np.ndarray, "_n"]


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


MEASURES = (
    # A check of the classifier: one that misreads scans says nothing about samples.
    Measure("classifier_accuracy", "held-out scans the classifier reads right", low=0.97),
    Measure("guided_accuracy", "guided samples read as the class asked for", low=0.9),
    Measure("plain_accuracy", "samples at guidance 1 read as the class asked for"),
    Measure("variance_ratio", "within-class variance, samples / training scans", 0.7, 1.3),
    Measure("distance_ratio", "distance to nearest training scan, samples / held-out", low=0.6),
)


def report(
    samples_guided: DigitImages,
    labels: Labels,
    samples_plain: DigitImages,
    labels_plain: Labels,
    real_train: DigitImages,
    real_train_labels: Labels,
    real_heldout: DigitImages,
    real_heldout_labels: Labels,
) -> dict[str, float | list[str]]:
    """Measures whether samples of the digits are of the class asked for, varied, and new.

    Args:
      samples_guided: (N, 8, 8, 1) in 0..255, drawn with guidance.
      labels: (N,) the classes asked for.
      samples_plain: (M, 8, 8, 1) drawn at guidance 1, which is the data's own distribution.
      labels_plain: (M,) the classes asked for; every class of the scans, at least twice.
      real_train: the scans the model was trained on.
      real_train_labels: their classes.
      real_heldout: scans that neither the model nor the classifier has seen.
      real_heldout_labels: their classes.

    Returns:
      classifier_accuracy: share of held-out scans read right by a classifier trained on
        `real_train` only.
      guided_accuracy, plain_accuracy: share of samples that it reads as the class asked for.
      variance_ratio: variance of a pixel within a class, averaged over pixels and classes, of
        the plain samples over that of the training scans; 0 for class means.
      distance_ratio: median Euclidean distance from a plain sample to the nearest training scan,
        over the same median of the held-out scans; 0 for copies.
      failed: names of the measures outside what `MEASURES` requires, empty when all is well.

    Raises:
      ValueError: a class of the training scans has fewer than two plain samples.
    """
    from sklearn.neighbors import NearestNeighbors  # take a second, which --help should not
    from sklearn.svm import SVC

    train, heldout = _pixels(real_train), _pixels(real_heldout)
    guided, plain = _pixels(samples_guided), _pixels(samples_plain)
    classifier = SVC(C=10.0).fit(train, real_train_labels)
    classes = np.unique(real_train_labels)
    nearest = NearestNeighbors(n_neighbors=1).fit(train)

    values = {
        "classifier_accuracy": classifier.score(heldout, real_heldout_labels),
        "guided_accuracy": classifier.score(guided, labels),
        "plain_accuracy": classifier.score(plain, labels_plain),
        "variance_ratio": _within_class_variance(plain, labels_plain, classes)
        / _within_class_variance(train, real_train_labels, classes),
        "distance_ratio": np.median(nearest.kneighbors(plain)[0])
        / np.median(nearest.kneighbors(heldout)[0]),
    }
    values = {name: float(value) for name, value in values.items()}
    failed = [measure.name for measure in MEASURES if not measure.is_met(values[measure.name])]
    return values | {"failed": failed}


def _pixels(images: DigitImages) -> Float[np.ndarray, "_n 64"]:
    """Each image as one row of numbers in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0


def _within_class_variance(
    pixels: Float[np.ndarray, "_n 64"], labels: Labels, classes: Integer[np.ndarray, "_k"]
) -> float:
    """The unbiased variance of each pixel in each class, averaged over both."""
    for label in classes:
        if (count := int((labels == label).sum())) < 2:
            raise ValueError(f"class {label} has {count} of the samples: draw at least 2 of it")
    return float(np.mean([pixels[labels == label].var(axis=0, ddof=1) for label in classes]))


def report_table(result: dict[str, float | list[str]]) -> str:
    """The result of `report` as a table, a measure to a row, with what is required of it."""
    width = max(len(measure.text) for measure in MEASURES)
    rows = [f"{'measure':{width}}  value  required"]
    for measure in MEASURES:
        verdict = "FAIL" if measure.name in result["failed"] else "pass"
        required = f"{measure.requirement:12}  {verdict}" if measure.requirement else ""
        rows.append(f"{measure.text:{width}}  {result[measure.name]:5.3f}  {required}".rstrip())
    return "\n".join(rows)


def _scans(split: str) -> tuple[DigitImages, Labels]:
    """All scans of the train or heldout split, and their classes."""
    from mdt_jax.data import digits

    source = digits(split=split)
    examples = [source[index] for index in range(len(source))]
    return (
        np.stack([example["image"] for example in examples]),
        np.array([example["label"] for example in examples]),
    )


def parse_report_flags(argv: list[str]) -> argparse.Namespace:
    """The command's settings. No flag is defined by importing this module."""
    from mdt_jax.parallel.flag_parsing import AbslArgumentParser

    parser = AbslArgumentParser(page=PAGE)
    parser.add_argument("--workdir", required=True, help="directory of the trained run")
    parser.add_argument(
        "--cfg_scale", type=float, default=2.0, help="guidance scale of the guided samples"
    )
    parser.add_argument("--sampler", default="ddpm", help="sampler, as for mdt_jax.sample")
    parser.add_argument("--steps", type=int, default=250, help="sampling steps")
    parser.add_argument("--per_class", type=int, default=50, help="samples of each class, >= 2")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling noise")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> int:
    """Samples the run in `args.workdir`, prints the table, and returns the exit status."""
    # Here and not above, so that `report` can be used on arrays without JAX starting up.
    from mdt_jax.parallel.command import command_ending
    from mdt_jax.parallel.distributed import initialize_distributed

    with command_ending(args):
        initialize_distributed()
        guided, plain, labels = _draw_samples(args)
        result = report(guided, labels, plain, labels, *_scans("train"), *_scans("heldout"))
        print(f"{len(labels)} samples of {args.workdir} at guidance {args.cfg_scale:g} and 1\n")
        print(report_table(result))
        missed = [
            f"{measure.name} is {result[measure.name]:.3f}, required {measure.requirement}"
            for measure in MEASURES
            if measure.name in result["failed"]
        ]
        passed = f"do not pass: {'; '.join(missed)}" if missed else "pass"
        print(f"\nThe samples {passed}.")
    return 1 if missed else 0


def _draw_samples(args: argparse.Namespace) -> tuple[DigitImages, DigitImages, Labels]:
    """Samples with guidance and without, and the class asked for in each.

    Raises:
      CheckpointError: no run there.
      ValueError: a run of other images than the digits.
    """
    from mdt_jax.sampling.images import to_uint8
    from mdt_jax.sampling.model import load
    from mdt_jax.sampling.sampler import sample

    model, params = load(args.workdir)
    if model.network.image_shape != (8, 8, 1) or model.network.num_classes != 10:
        shape, classes = model.network.image_shape, model.network.num_classes
        raise ValueError(f"{args.workdir}: {classes} classes of {shape} are no digits")
    labels = np.repeat(np.arange(10), args.per_class)
    guided, plain = (
        to_uint8(
            sample(
                model,
                params,
                labels=labels,
                key=args.seed,
                cfg_scale=cfg_scale,
                steps=args.steps,
                sampler=args.sampler,
            )
        )
        for cfg_scale in (args.cfg_scale, 1.0)
    )
    return guided, plain, labels


if __name__ == "__main__":
    from mdt_jax.parallel.command import ending_quietly

    with ending_quietly():
        app.run(main, flags_parser=parse_report_flags)
