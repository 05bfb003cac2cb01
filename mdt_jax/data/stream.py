"""A run's examples, each a pure function of the seed and its number.

A run is a sequence of examples i = 0, 1, 2, ..., and example i (which image, where cropped, whether
mirrored) is a pure function of (seed, i). Batch size, processes, workers and restarts only decide
where and when it is computed.

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

from mdt_jax.data import reading
from mdt_jax.data.decoding import BadImage
from mdt_jax.data.source import Source, check_posteriors
from mdt_jax.data.transforms import center_crop, random_crop

# Philox is keyed by (seed, purpose), so that draws for two purposes never coincide.
_ORDER, _AUGMENTATION = 0, 1
CROPS = {"center": lambda image, size, rng: center_crop(image, size), "random": random_crop}
ON_BAD_IMAGE = ("error", "skip")
# Images of a block that are decoded before the first of them is cropped.
IMAGES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class ExampleStream:
    """A run's examples: `stream[i]` is example i of an endless sequence, a function of (seed, i).

    Examples k * len(source) ... (k + 1) * len(source) - 1 are epoch k: each record once, in an
    order of its own.

    Attributes:
      source: the data set.
      seed: the seed of order, crops and mirroring, 0 <= seed < 2**64.
      image_size: crop and resize images to this height and width; None leaves them as they are.
      flip: mirror each example with probability 1/2. A cache of latents with mirror images gives
        the posterior of the mirrored image; other encoded data give the mirrored posterior, which
        is close to it, but not the same.
      crop: "center" or "random", how images are cropped.
      on_bad_image: "error" stops at an image that cannot be used; "skip" takes the next record that
        can be used in its place, the first after the last.
      max_bad_fraction: with "skip", stop when more than this part of all the source's records was
        found bad by one process since its `BatchIterator` was made.

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
        """Example `index`, as one row of `block`."""
        block = self.block(index, 1)
        return {"image": block["image"][0], "label": block["label"][0]}

    def block(self, first: int, count: int) -> dict[str, Any]:
        """Examples `first` ... `first + count - 1`, read at once.

        Returns:
          {"image": (count, H, W, C) uint8 pixels, or (count, h, w, 2c) posteriors of the stored
          type, "label": int32 (count,)}. If bad images are skipped, also "bad", pairs of a record
          that was passed over and the reason.

        Raises:
          BadImage: an image that cannot be used, or too many of them.
          ValueError: a posterior that latents cannot be drawn from, naming its file and number.
          Exception: any other error of the source; its message ends with what was being read.
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
        with self._located("", indices), self._noted(records):
            cache = self.source.records
            if hasattr(cache, "read_posteriors"):
                rows = mirror if cache.mirrored else None
                posteriors, labels = cache.read_posteriors(records, rows)
            else:
                examples = self.source.__getitems__(records.tolist())
                posteriors = np.stack([example["image"] for example in examples])
                labels = np.array([example["label"] for example in examples])
                check_posteriors(posteriors, lambda row: self.source.place(int(records[row])))
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
        """The examples of records, or of others in place of bad ones, which go into `bad`.

        They are read a few at a time: hundreds of decoded images would not stay in the processor's
        cache.
        """
        # Pictures are cropped before their pixels are copied into an array.
        read = self.source.__getitems__ if self.image_size is None else self.source.pictures
        at_once = IMAGES_AT_ONCE if hasattr(self.source.records, "__getitems__") else 1
        for first in range(0, len(records), at_once):
            some, places = records[first : first + at_once], indices[first : first + at_once]
            if at_once > 1:
                try:
                    with self._located("", places), self._noted(some):
                        examples = read(some)
                except BadImage:
                    if self.on_bad_image == "error":
                        raise
                else:
                    yield from examples
                    continue
            for record, index in zip(some, places, strict=True):
                with self._located(f"record {record} of ", [index]), self._noted([record]):
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

    def place(self, index: int) -> str:
        """Where example `index` of the run is stored, for messages."""
        (record,) = _records(self.seed, range(index, index + 1), len(self.source))
        return self.source.place(int(record))

    def _noted(self, records: Sequence[int] | np.ndarray) -> contextlib.AbstractContextManager:
        """A context for reading records, which says so to whoever waits for them."""
        return reading.noting(self.source.name, lambda: self.source.place(int(records[0])))

    @contextlib.contextmanager
    def _located(self, what: str, indices: Sequence[int]) -> Iterator[None]:
        """Adds to an exception's message which examples were being read."""
        try:
            yield
        except Exception as error:
            examples = " ... ".join(map(str, sorted({indices[0], indices[-1]})))
            _add_place(error, f"in {what}{self.source.name}, example {examples} of the run")
            raise


def _add_place(error: Exception, place: str) -> None:
    """Ends an exception's message with a place; not as a note, which commands do not print."""
    if isinstance(error, OSError) and error.strerror:
        error.strerror = f"{error.strerror} ({place})"
        error.args = (error.errno, error.strerror)  # these travel from a worker
    elif len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} ({place})",)
    else:
        error.add_note(place)


def _mirror(image: UInt8[np.ndarray, "h w c"], out: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes an image's mirror image into `out`, seven times as fast as `out[:] = image[:, ::-1]`.

    NumPy's inner loop then goes over the pixels of a row, not over the channels of a pixel.
    """
    for channel in range(image.shape[2]):
        out[:, :, channel] = image[:, ::-1, channel]


def check_bad_fraction(source: Source, max_fraction: float, bad: dict[int, str]) -> None:
    """Raises BadImage if all of a source's records are bad, or more than `max_fraction` of them.

    Args:
      source: the data set.
      max_fraction: the part of all records that may be bad.
      bad: the reason for each bad record found so far.
    """
    if len(bad) > max_fraction * len(source) or len(bad) == len(source):
        raise BadImage(
            f"{source.name}: {len(bad):,} of {len(source):,} images cannot be used, more than "
            f"max_bad_fraction {max_fraction:g} allows; the last: {list(bad.values())[-1]}"
        )


def example_spec(source: Source, image_size: int | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of a batch's "image" and "label", without the batch axis.

    Args:
      source: the data set.
      image_size: height and width that images are cropped to; None leaves them as they are.
    """
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
    """The records of consecutive examples, which may belong to several epochs."""
    parts, first = [], indices.start
    while first < indices.stop:
        epoch, place = divmod(first, count)
        part = epoch_order(seed, epoch, count)[place : place + indices.stop - first]
        parts.append(part)
        first += len(part)
    return np.concatenate(parts)


# 8 bytes a record, 10 MB for ImageNet. Four epochs are kept: reading ahead and a second stream
# (evaluation beside training) can need as many at once.
@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, "{count}"]:
    """The order of `count` records in an epoch, every permutation as likely as any other.

    It is the argsort of uniform 64-bit draws.
    """
    draws = _philox(seed, _ORDER, epoch).random_raw(count)
    return np.argsort(draws, kind="stable")


def _philox(seed: int, purpose: int, index: int) -> np.random.Philox:
    """Philox at block (0, 0, 0, index) of its counter, 2**192 blocks before the next index's."""
    key = np.array([seed, purpose], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, index], np.uint64))


def _generators(seed: int, purpose: int, indices: Sequence[int]) -> Iterator[np.random.Generator]:
    """The generator of each index in turn, valid until the next one is taken.

    It is one object that is set anew: making another takes seven times as long.
    """
    bits = _philox(seed, purpose, 0)
    generator, state = np.random.Generator(bits), bits.state
    for index in indices:
        state["state"]["counter"][3] = index
        bits.state = state
        yield generator
