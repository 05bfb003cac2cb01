"""Sources of arrays: in memory, in a folder of .npy files, and scikit-learn's digits."""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float, Integer, UInt8

from mdt_jax.basics.names import printable
from mdt_jax.basics.places import expand, read_text, wrong_kind
from mdt_jax.data.feature_files import FEATURES, LABELS, FeatureFiles, feature_folders
from mdt_jax.data.missing import MissingData
from mdt_jax.data.npy import MemoryMap
from mdt_jax.data.source import ExampleKind, Source, short_digest
from mdt_jax.models.latent_space import LatentSpace

# Without class names, as many classes are made as the largest label says.
MOST_CLASSES = 2**20


def digits(split: str = "train") -> Source:
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 gray, which need no download.

    Their values 0 ... 16 become round(value * 255 / 16) in uint8; round(pixel * 16 / 255) gives
    them back.

    Args:
      split: "heldout" is every sixth scan, those whose index leaves 5 when divided by 6 (299);
        "train" is the rest (1,498); "all" is both, in scikit-learn's order.

    Raises:
      ValueError: an unknown split.
    """
    from sklearn.datasets import load_digits  # over a second to import

    scans = load_digits()
    heldout = np.arange(len(scans.target)) % 6 == 5
    splits = {"train": ~heldout, "heldout": heldout, "all": np.full_like(heldout, True)}
    if split not in splits:
        raise ValueError(f"digits: no split {split!r}; there are {', '.join(splits)}")
    chosen = splits[split]
    images = np.rint(scans.images[chosen] * (255 / 16)).astype(np.uint8)
    names = tuple(str(name) for name in scans.target_names)
    return dataclasses.replace(
        arrays(images[..., None], scans.target[chosen], names), name=f"digits/{split}"
    )


def arrays(
    images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"],
    labels: Integer[np.ndarray, "n"] | None = None,
    class_names: Sequence[str] = (),
) -> Source:
    """Examples in memory.

    Args:
      images: uint8 pixels; or floating-point posteriors of latents, whose channels are the
        mean's followed by as many of the standard deviation.
      labels: one per image; None for an unconditional dataset.
      class_names: one per class; with labels and no names, the classes are called "0", "1", ...
        up to the largest label.

    Raises:
      ValueError: the arrays do not fit each other, or the labels the names.
    """
    return _from_arrays("arrays", images, labels, class_names)


def npy_directory(path: str | Path) -> Source:
    """Examples in a folder of NumPy files, memory-mapped: images are read when they are used.

    Args:
      path: a folder with either `images.npy`, uint8 (n, h, w, c), or `latents.npy`, float16 or
        float32 (n, h, w, 2c), posterior means before standard deviations; and, where they
        have classes, `labels.npy`, integers (n,), with `class_names.txt`, a name per line,
        or without (the names are then "0", "1", ... up to the largest label). `latents.json`, an
        object with the fields of `LatentSpace` that are known ({"scale": 0.13025, "shift": 0}),
        says what latents are; without it they are Stable Diffusion's. Or a folder with
        fast-DiT's features, in `imagenet256_features` and `imagenet256_labels` or another such
        pair of names; see `data.feature_files`.

    Raises:
      MissingData: no such folder, or nothing to read in it.
      ValueError: a file that cannot be read, or files that do not fit each other.
    """
    folder = expand(path)
    shown = printable(folder)
    if not folder.is_dir():
        wanted = "data.path must name one with images.npy or latents.npy"
        if os.path.lexists(folder):
            raise NotADirectoryError(f"{wrong_kind(folder, 'folder')}; {wanted}")
        raise MissingData(f"{shown}: no such folder; {wanted}")
    # A link that leads nowhere is there, too, and is refused where it is read.
    present = [name for name in ("images.npy", "latents.npy") if os.path.lexists(folder / name)]
    names_file, labels_file = folder / "class_names.txt", folder / "labels.npy"
    names = _read_class_names(names_file) if os.path.lexists(names_file) else ()
    if not present and (pair := feature_folders(folder)):
        return _from_features(str(folder), FeatureFiles.open(*pair), names)
    if len(present) != 1:
        found = "both images.npy and latents.npy" if present else "no images.npy or latents.npy"
        error = ValueError if present else MissingData
        own = folder.name.endswith((FEATURES, LABELS)) and (folder / "0.npy").exists()
        if own and feature_folders(folder.parent):
            raise ValueError(
                f"{shown}: is one of fast-DiT's two folders; set data.path to the one around both, "
                f"{printable(folder.parent)}"
            )
        raise error(
            f"{shown}: holds {found}; data.path must name a folder with one of them, or with "
            f"fast-DiT's imagenet256{FEATURES} and imagenet256{LABELS}"
        )

    images = MemoryMap(folder / present[0])
    if images.array.dtype.kind != ("u" if present[0] == "images.npy" else "f"):
        raise ValueError(
            f"{shown}/{present[0]}: holds {images.array.dtype}; images.npy must be uint8 pixels, "
            "latents.npy floating-point posteriors"
        )
    # Labels are small and every one is checked, so they are read at once.
    labels = np.array(MemoryMap(labels_file).array) if os.path.lexists(labels_file) else None
    source = _from_arrays(str(folder), images.array, labels, names, read_from=images)
    return _with_latent_space(source, folder / "latents.json")


def _with_latent_space(source: Source, path: Path) -> Source:
    """A source whose latents are what a file says, if it is there.

    Raises:
      ValueError: the file describes no latents, or the data are not latents of its channels.
    """
    if not os.path.lexists(path):
        return source
    channels = source.image_shape[-1]
    try:
        values = json.loads(read_text(path))
        if not isinstance(values, dict):
            raise ValueError(
                f"it holds {str(values)[:40]!r}, and must hold an object such as "
                '{"scale": 0.13025, "shift": 0}'
            )
        space = LatentSpace.from_json({"channels": channels, "stride": 0} | values)
        if not source.latents or space.channels != channels:
            held = f"latents of {channels} channels" if source.latents else "images"
            raise ValueError(f"it describes latents of {space.channels} channels, beside {held}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{printable(path)}: {' '.join(str(error).split())}; mend it, or remove it"
        ) from error
    records = dataclasses.replace(source.records, latent_space=space)
    return dataclasses.replace(source, records=records)


@dataclasses.dataclass(frozen=True)
class _ArrayRecords:
    """Images and labels by index, from memory or from a memory map."""

    images: "np.ndarray | MemoryMap"
    labels: np.ndarray | None
    latent_space: LatentSpace | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], 0 if self.labels is None else int(self.labels[index])

    def place(self, index: int) -> str:
        """The file of an example, if it is in one, and its number, for messages."""
        file = printable(self.images.path) if isinstance(self.images, MemoryMap) else "arrays"
        return f"{file}: example {index}"

    @property
    def digest(self) -> str:
        images = self.images.array if isinstance(self.images, MemoryMap) else self.images
        rows = np.linspace(0, len(images) - 1, min(len(images), 64)).astype(int)
        some = np.ascontiguousarray(images[rows])
        labels = b"" if self.labels is None else np.asarray(self.labels, "<i8").tobytes()
        return short_digest(f"{images.dtype} {images.shape}", some.tobytes(), labels)


def _read_class_names(path: Path) -> list[str]:
    """The lines of a class_names.txt, of any system's line ends, with or without a mark in front.

    Raises:
      ValueError: it is no file of text in UTF-8, or a line is empty.
    """
    shown = printable(path)
    if not path.is_file():
        raise ValueError(f"{wrong_kind(path)}; it must be one with a line for each class")
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown}: is no text in UTF-8 ({error.reason} at byte {error.start}); save it as such"
        ) from error
    # Not `splitlines`, which also ends lines at characters within a name, such as a form feed.
    names = re.split(r"\r\n|\r|\n", text)
    if names[-1] == "":
        names.pop()
    for number, name in enumerate(names, start=1):
        if not name.strip():
            raise ValueError(
                f"{shown}: line {number} is empty; it must have one line for each class, so remove "
                "that one or name the class"
            )
    for name, count in Counter(names).items():
        if count > 1:
            logging.warning(
                "%s: %d classes are called %s; that name means the first of them",
                *(shown, count, printable(name)),
            )
    return names


def _from_features(place: str, records: FeatureFiles, class_names: Sequence[str]) -> Source:
    channels, height, width = records.shape
    names = _check_labels(place, records.labels, len(records), class_names)
    return Source(
        place, records, (height, width, channels), tuple(names), ExampleKind.POSTERIORS,
        note="fast-DiT's features",
    )  # fmt: skip


def _from_arrays(
    place: str,
    images: np.ndarray,
    labels: np.ndarray | None,
    class_names: Sequence[str],
    read_from: MemoryMap | None = None,
) -> Source:
    """Checks arrays and makes a source of them, which reads `read_from` if given, or `images`."""
    shown = printable(place)
    if images.ndim != 4:
        raise ValueError(
            f"{shown}: images of shape {images.shape}; they must be (count, height, width, "
            "channels), with a channel axis even for gray"
        )
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(
            f"{shown}: images of type {images.dtype}; they must be uint8 pixels, or "
            "floating-point posteriors of latents"
        )
    *size, channels = images.shape[1:]
    latents = images.dtype != np.uint8
    if 0 in images.shape[1:]:
        raise ValueError(f"{shown}: images of shape {images.shape}, which have no pixels")
    # No model takes images that are not square, so this refuses none of use.
    if size[0] != size[1] == channels:
        raise ValueError(
            f"{shown}: {'latents' if latents else 'images'} of shape {images.shape}, which looks "
            "like (count, channels, height, width); they must be (count, height, width, channels): "
            "np.moveaxis(array, 1, -1)"
        )
    if latents and channels % 2:
        raise ValueError(
            f"{shown}: latents of {channels} channels; they must be even in number, the mean's "
            "and then the standard deviation's (pixels are uint8)"
        )
    if labels is not None:
        class_names = _check_labels(place, labels, len(images), class_names)
    elif class_names:
        raise ValueError(
            f"{shown}: {len(class_names)} class names but no labels; give labels (labels.npy) or "
            "leave out the names (class_names.txt)"
        )
    return Source(
        name=place,
        records=_ArrayRecords(images if read_from is None else read_from, labels),
        image_shape=(*size, channels // 2 if latents else channels),
        class_names=tuple(class_names),
        kind=ExampleKind.POSTERIORS if latents else ExampleKind.PIXELS,
    )


def _check_labels(
    place: str, labels: np.ndarray, count: int, class_names: Sequence[str]
) -> Sequence[str]:
    """The class names, or the labels' own numbers where there are none.

    Raises:
      ValueError: labels that do not fit the names or the `count` images.
    """
    place = printable(place)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{place}: labels of shape {labels.shape} and type {labels.dtype} for {count} images; "
            "there must be one integer for each"
        )
    if count and labels.min() < 0:
        raise ValueError(f"{place}: label {labels.min()}; labels count from 0")
    if count and class_names and labels.max() >= len(class_names):
        raise ValueError(
            f"{place}: label {labels.max()} with {len(class_names)} class names; labels must be "
            f"0 ... {len(class_names) - 1}, or class_names.txt have a line for each class"
        )
    if count and not class_names and labels.max() >= MOST_CLASSES:
        raise ValueError(
            f"{place}: label {labels.max()}; without class_names.txt labels must be below "
            f"{MOST_CLASSES:,}"
        )
    return class_names or [str(label) for label in range(labels.max() + 1 if count else 0)]
