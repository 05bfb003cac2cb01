"""A small classifier of the training images as an extractor, for data that Inception cannot read.

Inception's features are made for photographs and say little of 8 × 8 digits. A perceptron with two
hidden layers, trained on the real images and their classes in seconds, takes its place: its last
hidden layer is the feature space of the Fréchet distance, precision and recall, and its class
probabilities are the Inception Score's. Distances are in that classifier's units: they can be
compared only where its digest is the same, and never with published FIDs.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Integer, UInt8

from mdt_jax.basics.atomic import whole_file
from mdt_jax.basics.places import check_is_file
from mdt_jax.evaluation.extractors import Features, digest
from mdt_jax.evaluation.processes import gather_arrays
from mdt_jax.parallel.distributed import by_first_process

MAX_SIDE = 64  # pixels; the first layer takes a whole image at once
HIDDEN_SIZES = (256, 64)
MAX_EPOCHS = 30
MINIBATCH_SIZE = 64
# L2. With a tenth of it, the classes of the training images drift apart from those of others.
WEIGHT_DECAY = 0.1

Layer = tuple[Float32[np.ndarray, "_i _o"], Float32[np.ndarray, "_o"]]


@dataclasses.dataclass(frozen=True, eq=False)
class PixelClassifier:
    """An `Extractor` for images of one shape; `train_classifier` makes one.

    Attributes:
      layers: weights and biases, the last layer's outputs being logits.
      image_shape: (height, width, channels).
      name: see `Extractor`.
    """

    layers: tuple[Layer, ...]
    image_shape: tuple[int, int, int]
    name: str = "classifier"

    @functools.cached_property
    def digest(self) -> str:
        """See `Extractor`."""
        return digest(self.layers)

    def extract(self, images: UInt8[np.ndarray, "n h w c"]) -> Features:
        """As `Extractor.extract`, in float64, so that features do not depend on the batch.

        Raises:
          ValueError: images of another shape.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images of {images.shape[1:]}; the classifier was trained on {self.image_shape}"
            )
        *hidden, last = ([part.astype(np.float64) for part in layer] for layer in self.layers)
        rows = _rows(images).astype(np.float64)
        for weights, biases in hidden:
            rows = np.maximum(rows @ weights + biases, 0)
        logits = rows @ last[0] + last[1]
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        return Features(
            pool=rows.astype(np.float32), probabilities=probabilities.astype(np.float32)
        )


def train_classifier(
    images: UInt8[np.ndarray, "n h w c"], labels: Integer[np.ndarray, "n"], num_classes: int
) -> PixelClassifier:
    """A classifier trained on images: the same bits for the same images, on one kind of machine.

    Args:
      images: the training images, whose sides should not exceed `MAX_SIDE`.
      labels: their classes, 0 to num_classes − 1.
      num_classes: how many logits it has; those of classes without images stay far below the
        others'.

    Raises:
      ValueError: images of fewer than two classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    present = np.unique(labels)
    if len(present) < 2:
        raise ValueError(f"images of {len(present)} class: a classifier needs at least two")
    network = MLPClassifier(
        HIDDEN_SIZES,
        alpha=WEIGHT_DECAY,
        batch_size=min(MINIBATCH_SIZE, len(images)),
        max_iter=MAX_EPOCHS,
        random_state=0,
    )
    # One thread: sums in the same order however many cores there are.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(_rows(images), labels)
    layers = list(zip(network.coefs_, network.intercepts_, strict=True))
    weights, biases = layers[-1]
    if len(present) == 2:  # scikit-learn has one logit for two classes
        weights, biases = (np.concatenate([np.zeros_like(p), p], axis=-1) for p in layers[-1])
    whole = np.zeros((len(weights), num_classes)), np.full(num_classes, -1e3)
    whole[0][:, present], whole[1][present] = weights, biases
    layers[-1] = whole
    return PixelClassifier(
        tuple((w.astype(np.float32), b.astype(np.float32)) for w, b in layers), images.shape[1:]
    )


def load_or_train(
    path: str | Path,
    images: UInt8[np.ndarray, "n h w c"],
    labels: Integer[np.ndarray, "n"],
    num_classes: int,
) -> PixelClassifier:
    """The classifier in a file; without the file, one that is trained and written there.

    So a resumed run goes on with the classifier it began with, on any machine. Process 0 alone
    reads or writes the file, and all processes get its classifier.

    Raises:
      ValueError: a file that cannot be read, or of images of another shape; or an error of
        `train_classifier`.
    """
    sizes = (int(np.prod(images.shape[1:])), *HIDDEN_SIZES, num_classes)
    count = sum((before + 1) * after for before, after in zip(sizes, sizes[1:], strict=False))
    flat, path = np.zeros(count, np.float32), Path(path)

    def find() -> None:
        if path.exists():
            flat[:] = _read(path, count)
            return
        trained = train_classifier(images, labels, num_classes)
        flat[:] = np.concatenate([part.ravel() for layer in trained.layers for part in layer])
        with whole_file(path) as file:
            np.save(file, flat)

    by_first_process(find)
    return PixelClassifier(_layers(gather_arrays(flat)[0], sizes), images.shape[1:])


def _read(path: Path, count: int) -> Float32[np.ndarray, "{count}"]:
    check_is_file(path)
    try:
        flat = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove it to train it again") from None
    if flat.shape != (count,) or flat.dtype != np.float32:
        raise ValueError(
            f"{path}: a classifier of {flat.size:,} numbers, these images take one of {count:,}; "
            "remove it to train another"
        )
    return flat


def _layers(flat: np.ndarray, sizes: tuple[int, ...]) -> tuple[Layer, ...]:
    layers, start = [], 0
    for before, after in zip(sizes, sizes[1:], strict=False):
        middle = start + before * after
        weights = flat[start:middle].reshape(before, after)
        layers.append((weights, flat[middle : middle + after]))
        start = middle + after
    return tuple(layers)


def _rows(images: UInt8[np.ndarray, "n h w c"]) -> Float32[np.ndarray, "n d"]:
    """Each image as one row of numbers in [−1, 1]."""
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(127.5) - 1
