"""IDX files, the format of MNIST and its descendants, and the data sets of images and labels in it.

An IDX file is two zero bytes, a code of the element type, the number of axes, the length of each
axis (32 bits, big-endian) and the elements (big-endian), row by row; often compressed by gzip.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from mdt_jax.basics.places import expand, open_file
from mdt_jax.data.array_sources import arrays
from mdt_jax.data.missing import MissingData
from mdt_jax.data.source import Source

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
# Deflate makes at most about 1,032 bytes of one.
_MOST_FROM_A_BYTE = 1032
_CHUNK = 1 << 24
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian puts it
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_SPLITS = {"train": "train", "test": "t10k"}
FASHION_SIDE = 32  # the images' 28 pixels and a border of 2, so that patches of 2, 4 and 8 fit


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file, in the byte order of this machine.

    Args:
      path: the file; one that starts with gzip's mark is decompressed.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no file, not an IDX file, or more or fewer bytes than its header says.
    """
    path = Path(path)
    with open_file(path) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        size = path.stat().st_size
        try:
            if not packed:
                return _read(path, file, size)
            with gzip.open(file) as unpacked:
                return _read(path, unpacked, size * _MOST_FROM_A_BYTE)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}: is cut off or damaged ({' '.join(str(error).split())}); fetch it again"
            ) from error


def _read(path: Path, file: io.BufferedIOBase, most: int) -> np.ndarray:
    """The array of an open file that can hold no more than `most` bytes."""
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _TYPES or not start[3]:
        raise ValueError(
            f"{path}: is no IDX file: it starts with {start!r}, and not with two zeros, a type "
            f"({', '.join(f'0x{code:02x}' for code in _TYPES)}) and a number of axes"
        )
    lengths = file.read(4 * start[3])
    if len(lengths) < 4 * start[3]:
        raise ValueError(f"{path}: is cut off in its header of {start[3]} axes; fetch it again")
    shape = struct.unpack(f">{start[3]}I", lengths)
    dtype = np.dtype(_TYPES[start[2]])
    wanted = math.prod(shape) * dtype.itemsize
    if wanted > most:  # before memory is asked for
        raise ValueError(
            f"{path}: its header says {_words(shape)} of {dtype.name}, {wanted:,} bytes, which the "
            "file is too small to hold; fetch it again"
        )
    content = bytearray()
    while len(content) < wanted and (part := file.read(min(_CHUNK, wanted - len(content)))):
        content += part
    if len(content) < wanted or file.read(1):
        held = f"only {len(content):,}" if len(content) < wanted else "more"
        raise ValueError(
            f"{path}: its header says {_words(shape)} of {dtype.name}, {wanted:,} bytes, and it "
            f"holds {held}; fetch it again"
        )
    array = np.frombuffer(content, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _words(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def fashion_mnist(path: str | Path = "", split: str = "train") -> Source:
    """Fashion-MNIST: photographs of products, gray, each with one of ten classes.

    Xiao et al. 2017 (https://arxiv.org/abs/1708.07747). The 28 × 28 pixels are padded with black to
    32 × 32.

    Args:
      path: the folder of the four IDX files, by gzip or not; "" for Debian's.
      split: "train", 60,000 images, or "test", 10,000.

    Raises:
      MissingData: a file is missing; the message says how to get them.
      ValueError: an unknown split, or a damaged file, or one that holds other things.
    """
    if split not in FASHION_SPLITS:
        known = " or ".join(map(repr, FASHION_SPLITS))
        raise ValueError(f"data.split is {split!r}; fashion_mnist has {known}")
    folder = expand(path or FASHION_MNIST)
    images_file, labels_file = (
        _find(folder, f"{FASHION_SPLITS[split]}-{what}-ubyte")
        for what in ("images-idx3", "labels-idx1")
    )
    images, labels = read_idx(images_file), read_idx(labels_file)
    if images.ndim != 3 or images.dtype != np.uint8 or images.shape[1:] != (28, 28):
        raise ValueError(
            f"{images_file}: holds {_words(images.shape)} of {images.dtype}, not images of 28 × 28 "
            "bytes; are images and labels swapped?"
        )
    if labels.shape != images.shape[:1] or labels.dtype != np.uint8:
        raise ValueError(
            f"{labels_file}: holds {_words(labels.shape)} of {labels.dtype}, not a label for each "
            f"of the {len(images)} images of {images_file}"
        )
    if len(labels) and labels.max() >= len(FASHION_CLASSES):
        raise ValueError(
            f"{labels_file}: label {labels.max()} of image {int(labels.argmax())}; there are ten "
            "classes, 0 to 9"
        )
    border = (FASHION_SIDE - 28) // 2
    padded = np.pad(images, ((0, 0), (border, border), (border, border)))[..., None]
    source = arrays(padded, labels.astype(np.int64), FASHION_CLASSES)
    return dataclasses.replace(source, name=f"fashion_mnist/{split}")


def _find(folder: Path, name: str) -> Path:
    """A file of a folder by its name, with or without ".gz"."""
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    raise MissingData(
        f"{folder / name}.gz: no such file; get Fashion-MNIST by `apt-get install "
        "dataset-fashion-mnist`, or download the four files of "
        "https://github.com/zalandoresearch/fashion-mnist into a folder and give it as data.path"
    )
