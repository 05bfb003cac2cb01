"""Images to judge, in npz files of ADM's layout, folders or arrays, read in batches.

`open_images` recognises files and folders. No set is loaded whole: the member `arr_0` of an npz is
read from the zip piece by piece, compressed or not, and its checksum is verified on the way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt8

from mdt_jax.basics.places import refuse_url
from mdt_jax.data.decoding import decode_image
from mdt_jax.data.folders import IMAGE_SUFFIXES, read_folder
from mdt_jax.evaluation.npz import NpzMember, npz_members, read_npz


@runtime_checkable
class ImageSet(Protocol):
    """Images of one size, in an order, with or without labels.

    Attributes:
      name: their name in messages.
      count: how many there are.
      labels: (count,) integers; None where there are none.
    """

    name: str
    count: int
    labels: np.ndarray | None

    def read(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Batches of images start ... stop − 1, in order, uint8 (≤ batch_size, h, w, 1 or 3)."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in memory."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Integer[np.ndarray, "n"] | None = None
    name: str = "array"

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.images)

    def read(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """As `ImageSet.read`."""
        for first in range(start, stop, batch_size):
            yield self.images[first : min(first + batch_size, stop)]


@dataclasses.dataclass(frozen=True, eq=False)
class NpzImages:
    """The images `arr_0` of an npz, and their labels `arr_1` if it has them; `open` makes one.

    Attributes:
      path: the file.
      shape: the shape of `arr_0`, (n, h, w, c).
      labels: `arr_1`, or None.
    """

    path: Path
    shape: tuple[int, int, int, int]
    labels: np.ndarray | None

    @classmethod
    def open(cls, path: str | Path) -> NpzImages:
        """Reads the headers and the labels of an npz.

        Raises:
          FileNotFoundError: no such file.
          ValueError: a damaged file, one without `arr_0`, or images that cannot be judged.
        """
        path = Path(path)
        names = npz_members(path)
        if "arr_0" not in names:
            raise ValueError(
                f"{path}: no arr_0; it holds {', '.join(names) or 'nothing'}. Images are to be "
                "saved as arr_0, uint8 (n, height, width, 3), as `mdt_jax.sample` writes them"
            )
        with NpzMember.open(path, "arr_0") as member:
            shape = member.header.shape
            _check_layout(path, member)
        if len(shape) != 4 or shape[-1] not in (1, 3) or not all(shape):
            raise ValueError(
                f"{path}: arr_0 has the shape {shape}; images are (n, height, width, 3), or 1 "
                "channel for gray, channels last"
            )
        labels = read_npz(path, "arr_1") if "arr_1" in names else None
        if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
            raise ValueError(
                f"{path}: arr_1 is {labels.dtype} {labels.shape}, which is not a label for each of "
                f"the {shape[0]} images of arr_0; save integers ({shape[0]},) or leave arr_1 out"
            )
        return cls(path, shape, labels)

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def count(self) -> int:
        """How many images there are."""
        return self.shape[0]

    def read(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """As `ImageSet.read`.

        Raises:
          ValueError: the file is damaged.
        """
        image_bytes = math.prod(self.shape[1:])
        with NpzMember.open(self.path, "arr_0") as member:
            member.read(start * image_bytes, keep=False)
            for first in range(start, stop, batch_size):
                count = min(batch_size, stop - first)
                read = member.read(count * image_bytes)
                yield np.frombuffer(read, np.uint8).reshape(count, *self.shape[1:])
            if stop == self.count:
                member.check_end()


@dataclasses.dataclass(frozen=True, eq=False)
class FolderImages:
    """Image files in a folder, decoded in threads.

    Attributes:
      path: the folder.
      files: paths in it, in order.
      labels: one for each file, as `data.folders.read_folder` finds them; or None.
    """

    path: Path
    files: Sequence[str]
    labels: np.ndarray | None

    @classmethod
    def open(cls, path: str | Path) -> FolderImages:
        """Lists the images of a folder, with the errors of `read_folder`."""
        folder = read_folder(path, settings=False)
        return cls(folder.path, folder.files, folder.labels)

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.files)

    def read(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """As `ImageSet.read`, always RGB.

        Raises:
          BadImage: a file that cannot be decoded.
          ValueError: images of two sizes.
        """

        def load(index: int) -> np.ndarray:
            path = str(self.path / self.files[index])
            return decode_image(path, path)

        shape = load(0).shape  # image 0 of the set, which every process compares its share with
        with ThreadPoolExecutor() as pool:
            for first in range(start, stop, batch_size):
                indices = range(first, min(first + batch_size, stop))
                images = list(pool.map(load, indices))
                for index, image in zip(indices, images, strict=True):
                    if image.shape != shape:
                        raise ValueError(
                            f"{self.path / self.files[index]} is {_size(image.shape)} pixels, "
                            f"{self.files[0]} is {_size(shape)}: all images must be of one size; "
                            "crop them as the reference was"
                        )
                yield np.stack(images)


@dataclasses.dataclass(frozen=True, eq=False)
class JoinedImages:
    """Several sets of images, one after the other."""

    parts: Sequence[ImageSet]
    name: str

    @property
    def count(self) -> int:
        """How many images all parts have."""
        return sum(part.count for part in self.parts)

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of all images; None if a part has none."""
        labels = [part.labels for part in self.parts]
        return None if any(part is None for part in labels) else np.concatenate(labels)

    def read(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """As `ImageSet.read`; each batch is of one part."""
        before = 0
        for part in self.parts:
            first, last = max(start - before, 0), min(stop - before, part.count)
            if first < last:
                yield from part.read(first, last, batch_size)
            before += part.count


def open_images(place: str | Path) -> ImageSet:
    """The images that a path names.

    Args:
      place: an npz of ADM's layout, several of them joined by commas, a folder of such files
        (shards, in the order of their names), or a folder of images.

    Raises:
      FileNotFoundError: no such file or folder.
      ValueError: neither npz nor folder, a damaged file, or images that cannot be judged.
    """
    for part in str(place).split(","):
        refuse_url(part, "the images")
    places = [Path(part) for part in str(place).split(",") if part]
    if len(places) > 1:
        return _joined(places, str(place))
    path = Path(place)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        shards = [file for file in files if file.suffix == ".npz"]
        if shards and not any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
            return _joined(shards, str(path))
        return FolderImages.open(path)
    if path.exists() and path.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: one image; give a folder of them, or an npz")
    return NpzImages.open(path)


def _joined(paths: Sequence[Path], name: str) -> ImageSet:
    parts = [NpzImages.open(path) for path in paths]
    for part in parts:
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"{part.path} holds images of {_size(part.shape[1:])}, {parts[0].path} of "
                f"{_size(parts[0].shape[1:])}: all must be of one size"
            )
    return parts[0] if len(parts) == 1 else JoinedImages(parts, name)


def image_size(images: ImageSet) -> tuple[int, int]:
    """Height and width of a set's images, by its first image.

    Raises:
      BadImage, ValueError: the first image cannot be read.
    """
    height, width = next(images.read(0, 1, 1)).shape[1:3]
    return height, width


def read_ahead(images: ImageSet, mine: range, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Batches, each with the index of its first image; the next is read while one is used.

    Args:
      images: all images.
      mine: the indices to read.
      batch_size: images in a batch.

    Raises:
      ValueError: a batch size below 1, or floats in [0, 1] that were cast to uint8.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size} is below 1")
    batches = images.read(mine.start, mine.stop, batch_size)
    first = mine.start
    with ThreadPoolExecutor(1) as reading:
        following = reading.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reading.submit(next, batches, None)
            if first == 0 and batch.max() <= 1 and batch.any():
                raise ValueError(
                    f"{images.name}: the first {len(batch)} images hold only 0 and 1; images are "
                    "0 ... 255: these seem to be floats in [0, 1] that were cast to uint8"
                )
            yield first, batch
            first += len(batch)


def share(count: int, index: int, processes: int) -> range:
    """The indices of one process's images: consecutive, as many as the others' or one less.

    Raises:
      ValueError: fewer images than processes.
    """
    if count < processes:
        raise ValueError(f"{count} images cannot be shared by {processes} processes; use fewer")
    return range(count * index // processes, count * (index + 1) // processes)


def _check_layout(path: Path, member: NpzMember) -> None:
    """Refuses, with ValueError, images in Fortran order or of other types than uint8.

    The advice goes by the first numbers.
    """
    shape, fortran, dtype, _ = member.header
    if fortran:
        raise ValueError(
            f"{path}: arr_0 is in Fortran order, which cannot be read image by image; save "
            "np.ascontiguousarray of it"
        )
    if dtype == np.uint8:
        return
    advice = "save uint8 in 0 ... 255"
    if dtype.kind == "f" and len(shape) == 4 and shape[-1] not in (1, 3):
        advice = f"these are latents of {shape[-1]} channels; sample with --vae to get images"
    elif dtype.kind == "f" and all(shape):
        count = min(math.prod(shape), 1 << 16)
        values = np.frombuffer(member.read(count * dtype.itemsize), dtype)
        low, high = float(values.min()), float(values.max())
        span = next((s for s in ((0, 1), (-1, 1)) if s[0] <= low and high <= s[1]), None)
        convert = {(0, 1): "255·x", (-1, 1): "127.5·(x + 1)"}.get(span)
        advice = f"its first values are {low:.3g} to {high:.3g}; " + (
            f"save {convert} as uint8" if convert else advice
        )
    raise ValueError(f"{path}: arr_0 is {dtype}, images must be uint8 in 0 ... 255: {advice}")


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} × {shape[0]}"
