"""Judging a run while it trains: EMA samples against real images, the same way for every model.

`config.eval_every` says how often, `config.eval` how. The metrics are those of `mdt_jax.evaluate`,
in the features of Inception or of a small classifier of the training images. Errors show before the
first step, and everything is compiled before it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mdt_jax import sampling
from mdt_jax.data import BadImage, Source, center_crop
from mdt_jax.evaluation import classifier, evaluator
from mdt_jax.evaluation.batches import ArrayImages, ImageSet, share
from mdt_jax.evaluation.descriptions import (
    ImageSetDescription,
    check_reference,
    describe_images,
    describe_reference,
)
from mdt_jax.evaluation.extractors import Extractor, load_inception
from mdt_jax.parallel.distributed import by_first_process
from mdt_jax.sampling import images
from mdt_jax.training import checks, metrics
from mdt_jax.training.run import Run
from mdt_jax.training.step import TrainState
from mdt_jax.weights import inception
from mdt_jax.weights.autoencoder import Autoencoder

# Training images that the classifier learns from, and that are its reference by default.
REAL_IMAGES = 10_000
CLASSIFIER_FILE = "eval_classifier.npy"  # in the workdir
EXTRACTED_AT_ONCE = 64  # images through the extractor at a time
DECODED_AT_ONCE = 16  # latents, over all devices
TOLD = {
    "eval_fid": "Fréchet distance {:.4g}",
    "eval_inception_score": "Inception Score {:.4g}",
    "eval_precision": "precision {:.3f}",
    "eval_recall": "recall {:.3f}",
}


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The result of judging a run's samples.

    Attributes:
      metrics: "eval_fid", the Fréchet distance in the evaluator's features (with Inception the
        FID), and the others of `evaluator.EVALUATION_METRICS`, "eval_" before each, as far as
        evaluator and reference have them; "eval_samples", the number of samples; "eval_seconds".
      evaluator: the name of the network that computed the features, and the digest of its weights.
        Numbers of different evaluators cannot be compared.
    """

    metrics: dict[str, float]
    evaluator: str

    def describe(self) -> str:
        """The metrics in one line for the log."""
        m = self.metrics
        told = [text.format(m[name]) for name, text in TOLD.items() if name in m]
        count, seconds = int(m["eval_samples"]), m["eval_seconds"]
        told.append(f"of {count:,} samples by {self.evaluator} in {seconds:.1f} s")
        return ", ".join(told)


def check_evaluation(config: ConfigDict, source: Source) -> None:
    """Checks the settings of the evaluation, and opens its files as far as headers go.

    Raises:
      ValueError: settings or files that cannot work; the message is one line.
      FileNotFoundError: the reference is not there.
    """
    if not config.eval_every:
        return
    _options(sampling.DiffusionModel.from_config(config), config)
    kind, e = evaluator_kind(config, source), config.eval
    if source.latents and not e.vae:
        raise ValueError(
            "eval.vae is missing: samples are latents, and are decoded to be judged; 'ema' decodes "
            "them as published numbers were"
        )
    if e.vae and not source.latents:
        raise ValueError(f"eval.vae is {e.vae!r}, but the model's samples are pixels; leave it out")
    if not source.latents and source.image_shape[-1] not in (1, 3):
        raise ValueError(f"eval_every: images of {source.image_shape[-1]} channels are not judged")
    if kind == "inception":
        _check_inception(config)
    if e.reference:
        size = check_reference(e.reference, what="eval.reference")
        _check_size(e.reference, size, None if source.latents else config.model.input_size)


def judgement_is_due(config: ConfigDict, step: int) -> bool:
    """Whether samples are judged after a step: at multiples of eval_every and at the last step."""
    every = config.eval_every
    return every > 0 and (step % every == 0 or step == config.num_steps)


def judgement_is_owed(config: ConfigDict, workdir: Path, step: int) -> bool:
    """Whether the judgement due at the step of a resumed run is missing: it was cut short."""
    if not 0 < step <= config.num_steps or not judgement_is_due(config, step):
        return False
    path = workdir / metrics.METRICS_FILE
    return by_first_process(lambda: step not in metrics.steps_with(path, "eval_fid"))


def evaluator_kind(config: ConfigDict, source: Source) -> str:
    """The network that judges samples: "inception" or "classifier".

    Raises:
      ValueError: a classifier is asked for, and cannot be made of these data.
    """
    wanted = config.eval.evaluator
    if wanted == "inception" or (wanted == "auto" and config.eval.inception):
        return "inception"
    why_not = None
    if source.latents:
        why_not = "the data are latents"
    elif config.model.input_size > classifier.MAX_SIDE:
        why_not = f"images of {config.model.input_size} pixels are beyond {classifier.MAX_SIDE}"
    elif len(source.class_names) < 2:
        why_not = "the data have no classes"
    if why_not is None:
        return "classifier"
    if wanted == "classifier":
        raise ValueError(
            f"eval.evaluator 'classifier': {why_not}; set eval.evaluator to 'inception', and "
            "eval.inception and eval.reference"
        )
    return "inception"


def _check_inception(config: ConfigDict) -> None:
    e = config.eval
    if not e.inception:
        raise ValueError(
            "eval.inception is missing: the folder or file of Inception-v3's weights; get them at "
            f"{inception.URL}, or set eval_every to 0"
        )
    inception.find_file(e.inception)
    if not e.reference:
        raise ValueError(
            "eval.reference is missing: an npz in ADM's layout, such as its VIRTUAL_imagenet256_"
            "labeled.npz; mdt reference-stats makes one from any data"
        )


def _check_size(place: str, size: tuple[int, int] | None, side: int | None) -> None:
    if None not in (size, side) and tuple(size) != (side, side):
        raise ValueError(
            f"eval.reference {place}: images of {size[1]} × {size[0]} pixels, the samples are of "
            f"{side} × {side}; mdt reference-stats --image_size {side} makes one that fits"
        )


class RunEvaluator:
    """Draws EMA samples of a run and compares them with real images.

    Every process makes one before training starts, and takes part in every judgement.
    """

    def __init__(self, run: Run, source: Source):
        """Loads the networks and computes the reference's statistics; `compile` does the rest.

        Raises:
          ValueError, OSError: as in `check_evaluation`, or a file is damaged.
        """
        check_evaluation(run.config, source)
        c, e = run.config, run.config.eval
        self._run, self._count = run, e.num_samples
        model = sampling.DiffusionModel.from_config(
            c, source.class_names, latents=source.latent_space
        )
        self._labels = sampling.resolve_labels(model, None, self._count)
        self._autoencoder = load_decoder(run, source) if source.latents else None
        side = c.model.input_size * self._downsampling
        channels = self._autoencoder.module.out_channels if source.latents else c.model.in_channels
        self._shape = (side, side, channels)
        self._extractor, self._reference = self._find_reference(source)
        _check_size(e.reference, self._reference.size, side)
        size = sampling.global_batch_size(e.batch_size, self._count, run.mesh)
        self._sampler = sampling.CompiledSampler(model, run.mesh, size, _options(model, c))

    @property
    def evaluator(self) -> str:
        """The name of the network that computes the features, and the digest of its weights."""
        return f"{self._extractor.name} {self._extractor.digest[:12]}"

    def compile(self) -> None:
        """Compiles all that a judgement needs, before the first step."""
        self._sampler.warm_up(self._run.sampled(self._run.abstract))
        self._decode(np.zeros((1, *self._sampler.shape[1:]), np.float32))
        # Exchanges between processes are compiled for a size: that of a real judgement.
        count = self._count if jax.process_count() > 1 else min(self._count, EXTRACTED_AT_ONCE)
        mine = share(count, jax.process_index(), jax.process_count())
        black = np.zeros((len(mine), *self._shape), np.uint8)
        describe_images(
            _Share(black, mine, count, None), self._extractor, batch_size=EXTRACTED_AT_ONCE
        )

    def judge(
        self, state: TrainState, should_stop: Callable[[], bool] = lambda: False
    ) -> Judgement | None:
        """Draws samples of the first EMA and compares them with the reference.

        Args:
          state: the state after the step to be judged.
          should_stop: asked between batches; it gives one answer on all processes.

        Returns:
          The judgement, whose metrics are complete on process 0 alone; None if asked to stop.
        """
        began = time.perf_counter()
        drawn = self._draw(state, should_stop)
        if drawn is None:
            return None
        samples, num_bad = drawn
        found = {"eval_fid": math.nan}
        if num_bad:
            said = "%d samples hold NaN or infinite values: they are not judged"
            logging.warning(said, num_bad)
        else:
            described = self._describe(samples)
            if jax.process_index() == 0:  # the others wait in their next step
                report = evaluator.evaluate(self._reference, described)
                found = {f"eval_{name}": value for name, value in report.metrics.items()}
        seconds = time.perf_counter() - began
        counted = {"eval_samples": float(self._count), "eval_seconds": seconds}
        return Judgement(found | counted, self.evaluator)

    @property
    def _downsampling(self) -> int:
        return self._autoencoder.module.downsampling if self._autoencoder else 1

    def _find_reference(self, source: Source) -> tuple[Extractor, ImageSetDescription]:
        """The extractor, and its statistics of the reference."""
        run, e = self._run, self._run.config.eval
        if evaluator_kind(run.config, source) == "inception":
            extractor = load_inception(e.inception, EXTRACTED_AT_ONCE)
        else:
            real = real_images(source, run.config)
            extractor = classifier.load_or_train(
                run.workdir / CLASSIFIER_FILE, real.images, real.labels, len(source.class_names)
            )
            if not e.reference:
                return extractor, describe_images(real, extractor, batch_size=EXTRACTED_AT_ONCE)
        logging.info("describing the reference %s", e.reference)
        found = describe_reference(e.reference, extractor, batch_size=EXTRACTED_AT_ONCE)
        return extractor, found

    def _draw(
        self, state: TrainState, should_stop: Callable[[], bool]
    ) -> tuple[ImageSet, int] | None:
        """Draws the samples, of which this process keeps its share as uint8 images.

        Returns:
          The share, and how many of all samples are not finite; None if asked to stop.
        """
        mine = share(self._count, jax.process_index(), jax.process_count())
        kept = np.zeros((len(mine), *self._shape), np.uint8)
        batches = sampling.in_batches(
            self._sampler,
            self._run.sampled(state),
            self._count,
            lambda rows: (self._labels[rows],),
            key=self._run.config.eval.seed,
            progress=sys.stderr.isatty(),
        )
        num_bad = 0
        for first, samples in batches:
            if should_stop():
                return None
            pixels = self._decode(samples)
            bad = ~(images.is_finite(samples) & images.is_finite(pixels))
            num_bad += int(bad.sum())
            pixels = np.where(bad[:, None, None, None], np.float32(0), pixels)
            start, stop = max(first, mine.start), min(first + len(pixels), mine.stop)
            if start < stop:
                rows = images.to_uint8(pixels[start - first : stop - first], start)
                kept[start - mine.start : stop - mine.start] = rows
        labels = self._labels if self._run.model.num_classes else None
        return _Share(kept, mine, self._count, labels), num_bad

    def _decode(self, samples: np.ndarray) -> np.ndarray:
        if self._autoencoder is None:
            return samples
        return self._autoencoder.decode_batch(samples, self._sampler.shape[0], DECODED_AT_ONCE)

    def _describe(self, drawn: ImageSet) -> ImageSetDescription:
        return describe_images(
            drawn, self._extractor, batch_size=EXTRACTED_AT_ONCE, progress=sys.stderr.isatty()
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Share:
    """Images as `batches.ImageSet`, of which this process holds its share alone."""

    images: np.ndarray
    mine: range
    count: int
    labels: np.ndarray | None
    name: str = "samples"

    def read(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Batches of images start to stop, as `ImageSet.read`; all must be of the share."""
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop)
            yield self.images[first - self.mine.start : last - self.mine.start]


def load_decoder(run: Run, source: Source) -> Autoencoder:
    """The autoencoder of `eval.vae`, for the latents of a run's data.

    Raises:
      ValueError: an autoencoder of other latents.
    """
    vae = run.config.eval.vae
    autoencoder = Autoencoder.load(vae, run.mesh)
    return autoencoder.for_latents(source.latent_space, whose=source.name, option=f"eval.vae {vae}")


def real_images(source: Source, config: ConfigDict) -> ArrayImages:
    """At most `REAL_IMAGES` training images with labels, spread evenly over the source.

    They are cropped to the centre at the run's size, and not mirrored.

    Raises:
      BadImage: an image cannot be used, and data.on_bad_image is "error".
    """
    indices = np.linspace(0, len(source) - 1, min(len(source), REAL_IMAGES)).astype(int)
    pixels, labels = [], []
    for index in indices.tolist():
        try:
            (example,) = source.pictures([index])
        except BadImage:
            if config.data.on_bad_image == "error":
                raise
            continue
        pixels.append(center_crop(example["image"], checks.image_size(config, source)))
        labels.append(int(example["label"]))
    return ArrayImages(np.stack(pixels), np.array(labels), source.name)


def _options(model: sampling.DiffusionModel, config: ConfigDict) -> sampling.SamplerOptions:
    """The options of `config.eval` for drawing samples; raises ValueError for unusable ones."""
    try:
        return sampling.resolve_options(model, **sampling.judging_options(config))
    except ValueError as error:
        raise ValueError(f"eval.{error}") from error
