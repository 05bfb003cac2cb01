"""A source of examples: the interface between a data set and the pipeline.

A `Source` gives example i of a data set by its index, decoded when it is asked for. It knows
nothing of order, epochs, batches or processes, which the pipeline decides.
"""

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mdt_jax.basics.names import check_class_names, printable
from mdt_jax.models.latent_space import LatentSpace


class ExampleKind(enum.Enum):
    """The content of a batch's "image" array, and so how the training step makes inputs of it.

    Attributes:
      PIXELS: uint8 (B, H, W, C), which the step scales to [-1, 1].
      POSTERIORS: floating-point (B, h, w, 2c), an autoencoder's means before its standard
        deviations; the step draws latents from them.
      INPUTS: floating-point (B, H, W, C), the model's inputs themselves. No source gives them;
        benchmarks and compilers do.
    """

    PIXELS = "pixels"
    POSTERIORS = "posteriors of latents"
    INPUTS = "the model's inputs"


@runtime_checkable
class Records(Protocol):
    """The examples that a `Source` reads, by index. They pickle, to travel to worker processes.

    Records may also have any of these:

    - `__getitems__(indices)`, a list of what `__getitem__` gives for each index, where reading
      many at a time is faster;
    - `pictures(indices)`, the same with Pillow's pictures in place of arrays, where images are
      stored encoded;
    - `digest`, a short string of their number, order, names and labels, where it is cheap to tell;
    - `place(index)`, the file of a record and its number there, for messages.

    Posteriors that are stored in shards also have `read_posteriors(indices, mirror)`, `mirrored`,
    `stored_dtype` and `latent_space` (see `LatentCache`).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Record `index` of 0 ... len(self) - 1 as (image, label), label 0 where there is none."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset with random access: `source[i]` for 0 <= i < `len(source)`.

    Attributes:
      name: its name in messages.
      records: the stored examples, one record each.
      image_shape: (height, width, channels) of an image as a model sees it; height and width
        are None where they vary, and the pipeline then needs an `image_size`.
      class_names: the name of each label, in order; empty for an unconditional dataset, whose
        labels are all 0.
      kind: the content of an example's "image": pixels, uint8, or an autoencoder's posterior,
        float32 of shape (height, width, 2 * channels).
      note: how the classes were found, where that was a guess; for `describe`.

    Raises:
      ValueError: no examples, or a class whose name no list of classes can hold.
    """

    name: str
    records: Records
    image_shape: tuple[int | None, int | None, int]
    class_names: tuple[str, ...] = ()
    kind: ExampleKind = ExampleKind.PIXELS
    note: str = ""

    def __post_init__(self):
        if len(self.records) == 0:
            raise ValueError(
                f"{printable(self.name)}: holds no examples; a source needs at least one"
            )
        check_class_names(self.name, self.class_names)

    @property
    def latents(self) -> bool:
        """Whether a model of these examples works on an autoencoder's latents, not on pixels."""
        return self.kind is ExampleKind.POSTERIORS

    @property
    def latent_space(self) -> LatentSpace | None:
        """What the latents are; None for pixels.

        Records that do not say it hold Stable Diffusion's, of an encoder that is not known.
        """
        if not self.latents:
            return None
        told = getattr(self.records, "latent_space", None)
        return told or LatentSpace(channels=self.image_shape[-1], stride=0)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 (H, W, C) or float32 (h, w, 2c), "label": np.int32}.

        Raises:
          IndexError: `index` is not in 0 ... len(self) - 1.
          BadImage: its image cannot be used.
          ValueError: its label is not that of a class.
        """
        self._check_index(index)
        return self._example(index, *self.records[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """`[self[i] for i in indices]`, read as one block where the records can be.

        Raises:
          IndexError, BadImage, ValueError: the error of the first `self[i]` that fails.
        """
        for index in indices:
            self._check_index(index)
        read_block = getattr(self.records, "__getitems__", None)
        if read_block is None:
            return [self._example(i, *self.records[i]) for i in indices]
        return [self._example(i, *r) for i, r in zip(indices, read_block(indices), strict=True)]

    def pictures(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """`__getitems__`, with Pillow's pictures where images are stored encoded.

        Cropping a picture takes less time than cropping its pixels.
        """
        read_pictures = getattr(self.records, "pictures", None)
        if read_pictures is None:
            return self.__getitems__(indices)
        for index in indices:
            self._check_index(index)
        found = zip(indices, read_pictures(indices), strict=True)
        return [{"image": picture, "label": self._label(i, n)} for i, (picture, n) in found]

    def place(self, index: int) -> str:
        """Where example `index` is stored, for messages."""
        place = getattr(self.records, "place", None)
        return place(index) if place else f"{printable(self.name)}: record {index}"

    def identity(self) -> dict[str, str]:
        """Short strings that tell these data from others, empty where there is nothing to tell.

        They agree where two processes, or a run and its resumption, have the same data. It takes a
        second for a million images: files are told apart by their names in the folder, not by their
        contents, and arrays by some of their rows.

        Returns:
          "examples", their number; "classes", their number and a digest of their names in order;
          "records", a digest of which records there are, in what order and with which labels;
          "autoencoder", the digest of the encoder that made a cache of latents; "normalisation",
          the numbers that latents are normalised by.
        """
        names, space = "", self.latent_space
        if self.class_names:
            names = f"{len(self.class_names)} ({short_digest(*self.class_names)})"
        return {
            "examples": str(len(self)),
            "classes": names,
            "records": getattr(self.records, "digest", ""),
            "autoencoder": space.digest[:16] if space else "",
            "normalisation": _short(repr(space.normalisation)) if space else "",
        }

    def describe(self) -> str:
        """One line for a log: how many examples, and which label each class has.

        It lists the first ten and the last where there are more than twenty.
        """
        names = [f"{label} = {name}" for label, name in enumerate(self.class_names)]
        if len(names) > 20:
            names[10:-1] = ["..."]
        classes = f", {len(self.class_names):,} classes: {', '.join(names)}" if names else ""
        note = f" ({self.note})" if self.note else ""
        return printable(f"{self.name}: {len(self):,} examples{classes}{note}")

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: no example {index}; it holds 0 ... {len(self) - 1}")

    def _example(self, index: int, image: np.ndarray, label: int) -> dict[str, Any]:
        return {
            "image": np.asarray(image, np.float32 if self.latents else np.uint8),
            "label": self._label(index, label),
        }

    def _label(self, index: int, label: int) -> np.int32:
        if not 0 <= label < max(1, len(self.class_names)):
            raise ValueError(
                f"{self.place(index)} has label {label}; with {len(self.class_names)} "
                f"classes labels are 0 ... {max(0, len(self.class_names) - 1)}"
            )
        return np.int32(label)


def check_posteriors(
    posteriors: np.ndarray,
    place: Callable[[int], str],
    way_out: str = "encode that image again, or leave it out",
) -> None:
    """Refuses, with ValueError, posteriors that training cannot draw latents from.

    Their means must be finite, and so must their standard deviations, which cannot be negative.

    Args:
      posteriors: floating-point (n, h, w, 2c), means before standard deviations.
      place: gives the place of a row, for the message.
      way_out: what the message advises.
    """
    channels = posteriors.shape[-1] // 2
    if _seem_good(posteriors, channels):
        return
    bad = ~np.isfinite(posteriors)
    bad[..., channels:] |= posteriors[..., channels:] < 0
    if not bad.any():
        return
    row, y, x, channel = (int(found[0]) for found in np.nonzero(bad))
    what = "mean" if channel < channels else "standard deviation"
    raise ValueError(
        f"{place(row)}: the {what} of its latent is {posteriors[row, y, x, channel]} in row {y}, "
        f"column {x}, channel {channel % channels}, which cannot be trained on; {way_out}"
    )


def _seem_good(posteriors: np.ndarray, channels: int) -> bool:
    """Whether posteriors are certainly good, by two passes over their bits.

    As integers, numbers that are not finite are those with all bits of the exponent, and negative
    ones are the largest. For float16 comparing numbers would take twenty times as long, and a third
    as long as reading them.
    """
    exponents = {"float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}
    if not posteriors.size or (known := exponents.get(str(posteriors.dtype))) is None:
        return False
    bits = posteriors.view(known[0])
    exponent = known[0](known[1])
    largest = max((bits & exponent).max(), bits.max(axis=0)[..., channels:].max(initial=0))
    return bool(largest < exponent)


def _short(text: str) -> str:
    """A text, or its digest where it is long."""
    return text if len(text) <= 24 else short_digest(text)


def short_digest(*parts: str | bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of some parts, each ended by a byte 0.

    Text must not hold that byte: it would look like two parts.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape"))
        digest.update(b"\0")
    return digest.hexdigest()[:16]
