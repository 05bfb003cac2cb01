"""Distances from a run's training images, in the features of a small classifier of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from mdt_jax.data import create_source
from mdt_jax.evaluation import classifier
from mdt_jax.evaluation.batches import ArrayImages
from mdt_jax.evaluation.statistics import FeatureMoments, Gaussian, frechet_distance
from mdt_jax.training import run_evaluation

Batches = Sequence[UInt8[np.ndarray, "_n _h _w _c"]]
_AT_ONCE = 500  # images


class Judge:
    """Judges samples as `RunEvaluator` judges a run's while it trains, by the distance alone.

    Attributes:
      real: the training images that samples are compared with.
      digest: the digest of the classifier's weights.
    """

    def __init__(self, config: ConfigDict, file: Path):
        """Reads the classifier in a file; without the file, trains it.

        Args:
          config: the run's settings, whose data are read.
          file: the classifier's, in a run `WORKDIR/eval_classifier.npy`.

        Raises:
          ValueError: a run that no classifier judges, or a file that is no such classifier.
        """
        source = create_source(config.data)
        if run_evaluation.evaluator_kind(config, source) != "classifier":
            raise ValueError(
                f"{file.parent}: this compares runs that a classifier judges, labelled images of "
                f"up to {classifier.MAX_SIDE} pixels such as configs/digits.py's"
            )
        self._config = config
        self.real = run_evaluation.real_images(source, config)
        self._extractor = classifier.load_or_train(
            file, self.real.images, self.real.labels, len(source.class_names)
        )
        self.digest = self._extractor.digest
        self._reference = self.describe([self.real.images])

    def describe(self, batches: Batches) -> Gaussian:
        """Mean and covariance of the features of batches of images."""
        moments = None
        for batch in batches:
            for first in range(0, len(batch), _AT_ONCE):
                rows = self._extractor.extract(batch[first : first + _AT_ONCE]).pool
                moments = moments or FeatureMoments(rows.shape[1])
                moments.update(rows)
        return moments.gaussian()

    def distance(self, batches: Batches, reference: Gaussian | None = None) -> float:
        """The Fréchet distance of batches of images from a reference, by default the real ones."""
        return frechet_distance(reference or self._reference, self.describe(batches))

    def images(self, split: str) -> ArrayImages:
        """Images of another split of the data, as many as samples are compared with."""
        config = self._config.copy_and_resolve_references()
        config.data.split = split
        return run_evaluation.real_images(create_source(config.data), config)
