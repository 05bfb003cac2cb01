"""A small convolutional classifier of labelled images, to ask whether samples show their class.

It is trained on a data set's real images in about a minute on two CPU cores, and reads nine of ten
held-out pictures of Fashion-MNIST right. It judges classes alone: distances between sets of images
are measured in other features (`evaluation.classifier`).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Integer, UInt8

from mdt_jax.basics.atomic import whole_file
from mdt_jax.basics.names import printable
from mdt_jax.basics.places import open_file

CHANNELS = (32, 64)  # of the two convolutions, at a half and a quarter of the image's side
HIDDEN = 128
EPOCHS = 5
BATCH_SIZE = 64
LEARNING_RATE = 2e-3  # the highest; it falls to 0 with the cosine
READ_AT_ONCE = 500  # images

Params = dict[str, dict[str, Any]]  # arrays by layer and name


@dataclasses.dataclass(frozen=True, eq=False)
class ImageClassifier:
    """Two convolutions, a hidden layer and logits; `train_image_classifier` makes one.

    Attributes:
      params: weights and biases by layer.
      image_shape: (height, width, channels), the sides multiples of 8.
    """

    params: Params
    image_shape: tuple[int, int, int]

    def read(self, images: UInt8[np.ndarray, "n h w c"]) -> Integer[np.ndarray, "n"]:
        """The class that each image, together with its mirror, is read as.

        Raises:
          ValueError: images of another shape.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images of {images.shape[1:]}; the classifier was trained on {self.image_shape}"
            )
        found = np.zeros(len(images), np.int64)
        for first in range(0, len(images), READ_AT_ONCE):
            rows = images[first : first + READ_AT_ONCE]
            batch = np.zeros((READ_AT_ONCE, *self.image_shape), np.uint8)
            batch[: len(rows)] = rows
            found[first : first + len(rows)] = _read(self.params, batch)[: len(rows)]
        return found


def train_image_classifier(
    images: UInt8[np.ndarray, "n h w c"],
    labels: Integer[np.ndarray, "n"],
    num_classes: int,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> ImageClassifier:
    """A classifier trained on images and their mirrors by Adam.

    Args:
      images: the training images.
      labels: their classes, 0 to num_classes − 1.
      num_classes: how many logits it has.
      epochs: how often each image is seen.
      seed: of the weights and of the order of the images.

    Raises:
      ValueError: no images, or sides that are no multiples of 8.
    """
    if not len(images):
        raise ValueError("no images: a classifier needs some of each class")
    shape = images.shape[1:]
    rng = np.random.default_rng(seed)
    params = _initial(rng, shape, num_classes)
    size = min(BATCH_SIZE, len(images))
    steps = epochs * (len(images) // size)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, images: Array, labels: Array) -> tuple[Params, Any]:
        def loss(params: Params) -> Array:
            logits = _logits(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(epochs):
        order = rng.permutation(len(images))
        for first in range(0, len(images) - size + 1, size):
            rows = order[first : first + size]
            batch = images[rows]
            mirrored = rng.random(size) < 0.5
            batch[mirrored] = batch[mirrored][:, :, ::-1]
            params, state = step(params, state, batch, labels[rows].astype(np.int32))
    return ImageClassifier(jax.device_get(params), shape)


def load_or_train(
    path: str | Path,
    images: UInt8[np.ndarray, "n h w c"],
    labels: Integer[np.ndarray, "n"],
    num_classes: int,
) -> ImageClassifier:
    """The classifier in a file; without the file, one that is trained and written there.

    Raises:
      ValueError: a file that is no classifier of such images, or as `train_image_classifier`.
    """
    path, shape = Path(path), images.shape[1:]
    if path.exists():
        wanted = _initial(np.random.default_rng(0), shape, num_classes)
        return ImageClassifier(_load(path, wanted), shape)
    trained = train_image_classifier(images, labels, num_classes)
    arrays = {
        f"{layer}/{name}": np.asarray(value)
        for layer, parts in trained.params.items()
        for name, value in parts.items()
    }
    held = io.BytesIO()  # a zip file is written back and forth
    np.savez(held, **arrays)
    with whole_file(path) as file:
        file.write(held.getbuffer())
    return trained


def _load(path: Path, wanted: Params) -> Params:
    way_out = "remove it to train another"
    try:
        with open_file(path) as opened, np.load(opened) as file:
            found = {
                layer: {name: file[f"{layer}/{name}"] for name in parts}
                for layer, parts in wanted.items()
            }
    except Exception as error:  # a zip file is damaged in many ways
        raise ValueError(f"{printable(path)}: no classifier ({error}); {way_out}") from error
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, found, wanted)
    if not all(jax.tree.leaves(same)):
        raise ValueError(f"{printable(path)}: a classifier of other images; {way_out}")
    return found


def _initial(rng: np.random.Generator, shape: tuple[int, int, int], num_classes: int) -> Params:
    """He's initialisation: normal weights of variance 2 over the inputs, zero biases.

    Raises:
      ValueError: sides that are no multiples of 8.
    """
    height, width, channels = shape
    if not height or not width or height % 8 or width % 8:
        raise ValueError(
            f"images of {height} × {width} pixels: this classifier takes sides that are multiples "
            "of 8"
        )
    first, second = CHANNELS
    sizes = {
        "near": (9 * 4 * channels, first),
        "far": (9 * first, second),
        "hidden": (height // 8 * (width // 8) * second, HIDDEN),
        "logits": (HIDDEN, num_classes),
    }
    return {
        name: {
            "kernel": rng.normal(0, math.sqrt(2 / inputs), (inputs, outputs)).astype(np.float32),
            "bias": np.zeros(outputs, np.float32),
        }
        for name, (inputs, outputs) in sizes.items()
    }


def _logits(params: Params, images: UInt8[Array, "n h w c"]) -> Float[Array, "n k"]:
    """The network. A convolution is a product of 3 × 3 neighbours, which CPUs compute fast."""
    # Black is 0, as the zeros beyond the border are.
    x = _squares(images.astype(jnp.float32) / 127.5)
    x = x.reshape(*x.shape[:3], -1)  # half the sides; a square's pixels side by side as channels
    for name in ("near", "far"):
        x = _squares(jax.nn.relu(_linear(params[name], _neighbours(x)))).max(axis=3)
    x = jax.nn.relu(_linear(params["hidden"], x.reshape(len(x), -1)))
    return _linear(params["logits"], x)


def _linear(layer: dict[str, Any], x: Array) -> Array:
    return x @ layer["kernel"] + layer["bias"]


def _squares(x: Float[Array, "n h w c"]) -> Float[Array, "n h/2 w/2 4 c"]:
    """The four pixels of each square of two by two."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(n, h // 2, w // 2, 4, c)


def _neighbours(x: Float[Array, "n h w c"]) -> Float[Array, "n h w 9*c"]:
    """A place's 3 × 3 neighbours side by side as channels, zeros beyond the border."""
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    moved = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(moved, axis=-1)


@jax.jit
def _read(params: Params, images: Array) -> Array:
    """The classes of the largest sums of an image's and its mirror's logits."""
    return jnp.argmax(_logits(params, images) + _logits(params, images[:, :, ::-1]), axis=-1)
