"""A run's examples, each a pure function of the seed and its number.

A run is a sequence of examples i = 0, 1, 2, ..., and example i (which image, where cropped, whether
mirrored) is a pure function of (seed, i). Batch size, processes, workers and restarts only decide
which of them is computed where and when.

Pixels stay in uint8 until the training step scales them: in float32 they would be four times as
much to write, to pass between processes and to copy to a device.

An example of encoded data is the posterior of a latent, mean and standard deviation. The training
step draws the latent from it on the devices, like the step's other noise: a CPU core takes longer
to draw 4,096 normal numbers than to read a latent and do all the rest.

Order and randomness come from Philox, whose raw output (all that the order needs) NumPy promises
never to change. Grain's own `shuffle` is as pure a function, but a four-round cipher, whose order
over ImageNet's length is correlated (0.05 at lag 1024), and nothing promises its algorithm to later
versions.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64, UInt8

from mdt_jax.data.decoding import BadImage
from mdt_jax.data.source import Source
from mdt_jax.data.transforms import center_crop, random_crop

# Philox is keyed by (seed, purpose), so that the draws for one purpose never meet another's.
_ORDER, _AUGMENTATION = 0, 1
CROPS = {"center": lambda image, size, rng: center_crop(image, size), "random": random_crop}
ON_BAD_IMAGE = ("error", "skip")
# Images of a block that are decoded before the first of them is cropped.
IMAGES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class ExampleStream:
    """A run's examples: `stream[i]` is example i of an endless sequence, a function of (seed, i).

    Every `len(source)` consecutive examples from a multiple of `len(source)` on are one epoch:
    each record once, in an order of its own.

    Attributes:
      source: what the examples are read from.
      seed: 0 <= seed < 2**64.
      image_size: crop and resize images to this height and width; None leaves them as they are.
      flip: mirror each example with probability 1/2. Encoded data of a cache with mirror images
        give the posterior of the mirrored image; others the mirrored posterior, which is close
        to it, but not the same.
      crop: "center" or "random", how images are cropped.
      on_bad_image: what becomes of an image that cannot be used: "error", or "skip", which puts
        the next record that can be used in its place, after the last the first.
      max_bad_fraction: with "skip", stop when more than this part of all the source's records was
        found bad: by one process, since its `BatchIterator` was made.

    Raises:
      ValueError: a seed or fraction out of range, an unknown `crop` or `on_bad_image`, or an
        image size that the source needs or cannot have.
    """

    source: Source
    seed: int
    image_size: int | None = None
    flip: bool = False
    crop: str = "center"
    on_bad_image: str = "error"
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be in 0 ... 2**64 - 1")
        for name, known in (("crop", CROPS), ("on_bad_image", ON_BAD_IMAGE)):
            if getattr(self, name) not in known:
                choices = ", ".join(map(repr, known))
                raise ValueError(f"{name} is {getattr(self, name)!r}; known are {choices}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}; it must be in 0 ... 1")
        height, width, _ = self.source.image_shape
        if self.image_size is None:
            if height is None or width is None:
                raise ValueError(
                    f"{self.source.name}: its images vary in size; set image_size to crop them to"
                )
        elif self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; it must be at least 1")
        elif self.source.latents and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"{self.source.name}: latents are {height} x {width} and cannot be resized to "
                f"image_size {self.image_size}; encode the images again at the size wanted"
            )

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Example `index`, a row of what `block` gives."""
        block = self.block(index, 1)
        return {"image": block["image"][0], "label": block["label"][0]}

    def block(self, first: int, count: int) -> dict[str, Any]:
        """Examples `first` ... `first + count - 1`, read at once.

        Returns:
          {"image": uint8 (count, H, W, C), pixels, or posteriors of latents, of the stored type
          and 2C channels, "label": int32 (count,)}; and "bad", pairs of a record that was passed
          over and what is wrong with it, if bad images are skipped.

        Raises:
          BadImage: an image that cannot be used, or too many of them.
          Exception: whatever else the source raises; what was being read ends its message.
        """
        indices = range(first, first + count)
        records = _records(self.seed, indices, len(self.source))
        if self.source.latents:
            return self._read_posteriors(records, indices)
        return self._read_images(records, indices)

    def _read_posteriors(
        self, records: Int64[np.ndarray, "n"], indices: range
    ) -> dict[str, np.ndarray]:
        rngs = _generators(self.seed, _AUGMENTATION, indices) if self.flip else ()
        mirror = np.array([rng.random() < 0.5 for rng in rngs] or [False] * len(indices))
        with self._located("", indices):
            cache = self.source.records
            if hasattr(cache, "read_posteriors"):
                rows = mirror if cache.mirrored else None
                posteriors, labels = cache.read_posteriors(records, rows)
            else:
                examples = self.source.__getitems__(records.tolist())
                posteriors = np.stack([example["image"] for example in examples])
                labels = np.array([example["label"] for example in examples])
        if mirror.any() and not getattr(cache, "mirrored", False):
            posteriors[mirror] = posteriors[mirror, :, ::-1]
        return {"image": posteriors, "label": labels}

    def _read_images(self, records: Int64[np.ndarray, "n"], indices: range) -> dict[str, Any]:
        pixels, labels, bad = None, np.empty(len(indices), np.int32), []
        rngs = _generators(self.seed, _AUGMENTATION, indices)
        examples = self._read_examples(records.tolist(), indices, bad)
        for row, (example, rng) in enumerate(zip(examples, rngs, strict=True)):
            mirror = rng.random() < 0.5  # drawn first, so that no other setting changes it
            image = example["image"]
            if self.image_size is not None:
                image = CROPS[self.crop](image, self.image_size, rng)
            if pixels is None:
                pixels = np.empty((len(indices), *image.shape), np.uint8)
            if self.flip and mirror:
                _mirror(image, pixels[row])
            else:
                pixels[row] = image
            labels[row] = example["label"]
        block = {"image": pixels, "label": labels}
        return block | {"bad": bad} if self.on_bad_image == "skip" else block

    def _read_examples(
        self, records: list[int], indices: range, bad: list[tuple[int, str]]
    ) -> Iterator[dict[str, Any]]:
        """The examples of records, or of those in their place; takes down the bad ones.

        A few at a time: hundreds of decoded images would not stay in the processor's cache.
        """
        # Pictures are cropped before their pixels are looked at.
        read = self.source.__getitems__ if self.image_size is None else self.source.pictures
        at_once = IMAGES_AT_ONCE if hasattr(self.source.records, "__getitems__") else 1
        for first in range(0, len(records), at_once):
            some, places = records[first : first + at_once], indices[first : first + at_once]
            if at_once > 1:
                try:
                    with self._located("", places):
                        examples = read(some)
                except BadImage:
                    if self.on_bad_image == "error":
                        raise
                else:
                    yield from examples
                    continue
            for record, index in zip(some, places, strict=True):
                with self._located(f"record {record} of ", [index]):
                    if self.on_bad_image == "skip":
                        example = self._next_good(read, record, bad)
                    else:
                        (example,) = read([record])
                yield example

    def _next_good(self, read: Callable, record: int, bad: list[tuple[int, str]]) -> dict[str, Any]:
        """The example of the first record from `record` on that can be used."""
        known = len(bad)
        while True:
            try:
                return read([record])[0]
            except BadImage as error:
                bad.append((record, str(error)))
            check_bad_fraction(self.source, self.max_bad_fraction, dict(bad[known:]))
            record = (record + 1) % len(self.source)

    @contextlib.contextmanager
    def _located(self, what: str, indices: Sequence[int]) -> Iterator[None]:
        """Adds to an exception's message what was being read."""
        try:
            yield
        except Exception as error:
            examples = " ... ".join(map(str, sorted({indices[0], indices[-1]})))
            _add_place(error, f"in {what}{self.source.name}, example {examples} of the run")
            raise


def _add_place(error: Exception, place: str) -> None:
    """Ends an exception's message with a place: commands print the message alone, no notes."""
    if isinstance(error, OSError) and error.strerror:
        error.strerror = f"{error.strerror} ({place})"
        error.args = (error.errno, error.strerror)  # what travels from a worker
    elif len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} ({place})",)
    else:
        error.add_note(place)


def _mirror(image: UInt8[np.ndarray, "h w c"], out: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes an image's mirror image. `out[:] = image[:, ::-1]` takes seven times as long."""
    for channel in range(image.shape[2]):  # loops over all pixels, not over each one's channels
        out[:, :, channel] = image[:, ::-1, channel]


def check_bad_fraction(source: Source, max_fraction: float, bad: dict[int, str]) -> None:
    """Raises BadImage if more records of a source are bad than that part of all."""
    if len(bad) > max_fraction * len(source) or len(bad) == len(source):
        raise BadImage(
            f"{source.name}: {len(bad):,} of {len(source):,} images cannot be used, more than "
            f"max_bad_fraction {max_fraction:g} allows; the last: {list(bad.values())[-1]}"
        )


def example_spec(source: Source, image_size: int | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of an example of the pipeline's, of images cropped to `image_size`."""
    height, width, channels = source.image_shape
    if source.latents:
        dtype = getattr(source.records, "stored_dtype", np.dtype(np.float32))
        shape = (height, width, 2 * channels)
    else:
        dtype = np.dtype(np.uint8)
        shape = (image_size or height, image_size or width, channels)
    return {
        "image": jax.ShapeDtypeStruct(shape, dtype),
        "label": jax.ShapeDtypeStruct((), np.dtype(np.int32)),
    }


def _records(seed: int, indices: range, count: int) -> Int64[np.ndarray, "n"]:
    """The records of consecutive examples, which may run over ends of epochs."""
    parts, first = [], indices.start
    while first < indices.stop:
        epoch, place = divmod(first, count)
        part = epoch_order(seed, epoch, count)[place : place + indices.stop - first]
        parts.append(part)
        first += len(part)
    return np.concatenate(parts)


# 8 bytes a record, 10 MB for ImageNet: kept for the epochs that reading ahead and a second stream
# (evaluation beside training) can touch at once.
@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, "{count}"]:
    """The order of `count` records in an epoch: the argsort of uniform 64-bit draws, so that every
    permutation is as likely as any other."""
    draws = _philox(seed, _ORDER, epoch).random_raw(count)
    return np.argsort(draws, kind="stable")


def _philox(seed: int, purpose: int, index: int) -> np.random.Philox:
    """Philox at block (0, 0, 0, index) of its counter: 2**192 blocks before it meets the next."""
    key = np.array([seed, purpose], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, index], np.uint64))


def _generators(seed: int, purpose: int, indices: Sequence[int]) -> Iterator[np.random.Generator]:
    """The generator of each index in turn, of use until the next one is taken.

    It is one object that is set anew: to make another takes seven times as long.
    """
    bits = _philox(seed, purpose, 0)
    generator, state = np.random.Generator(bits), bits.state
    for index in indices:
        state["state"]["counter"][3] = index
        bits.state = state
        yield generator
