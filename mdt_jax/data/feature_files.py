"""Latents of fast-DiT's `extract_features.py`: an .npy file for each image, and one for its label.

DIR/imagenet256_features/0.npy and on hold float arrays (1, 4, 32, 32), channels first, of latents
that were drawn once from the posterior and multiplied by Stable Diffusion's scale;
DIR/imagenet256_labels/0.npy and on hold integers (1,). (github.com/chuanyangjin/fast-DiT)

A training step draws latents of posteriors and multiplies them by the scale, so an example here is
the posterior of mean x / 0.18215 and standard deviation 0: what the step makes of it is
(x / 0.18215 + 0) * 0.18215 in float32, which two roundings take from x by one unit in its last
place at most. No training can tell that.

Half of the images were mirrored before they were encoded, at random. `data.flip` mirrors latents on
top of that, which are nearly, but not exactly, those of the mirrored image; fast-DiT's own training
does not: set it to False to train as it does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from mdt_jax.basics.names import printable
from mdt_jax.basics.places import open_file
from mdt_jax.data import reading
from mdt_jax.data.npy import read_header
from mdt_jax.models.latent_space import STABLE_DIFFUSION_SCALE

FEATURES, LABELS = "_features", "_labels"  # the ends of the two folders' names


@dataclasses.dataclass(frozen=True)
class FeatureFiles:
    """Records of one file each, for a `Source` of posteriors.

    Attributes:
      features: the folder of latents.
      names: the files in it, 0.npy, 1.npy and on.
      shape: (channels, height, width) of a latent as it is stored.
      labels: the label of each.
    """

    features: Path
    names: tuple[str, ...]
    shape: tuple[int, int, int]
    labels: np.ndarray

    @classmethod
    def open(cls, features: Path, labels: Path) -> FeatureFiles:
        """Lists the files, and reads all labels: a million take about a minute.

        Raises:
          ValueError: a latent without a label or the other way round, or files that are damaged or
            hold other things.
        """
        names, found = _numbered(features), _numbered(labels)
        alone = sorted(set(names) ^ set(found), key=_number)
        if alone:
            one, other = (features, labels) if alone[0] in set(names) else (labels, features)
            raise ValueError(
                f"{printable(one / alone[0])}: has no {other.name}/{alone[0]} beside it; each "
                "latent needs its label"
            )
        if not names:
            raise ValueError(f"{printable(features)}: holds no files 0.npy, 1.npy and on")
        shape = _read(features / names[0]).shape
        if len(shape) != 4 or shape[0] != 1 or 0 in shape:
            raise ValueError(
                f"{printable(features / names[0])}: holds an array of shape {shape}; a file of "
                "latents is (1, channels, height, width), as fast-DiT's are"
            )
        if shape[2] != shape[3]:
            last = " (channels are the last axis there)" if shape[1] == shape[2] else ""
            raise ValueError(
                f"{printable(features / names[0])}: holds an array of shape {shape}{last}; a file "
                "of latents is (1, channels, height, width), height and width being equal"
            )
        with ThreadPoolExecutor() as pool:  # of file systems far away, most of the time is waiting
            read = pool.map(functools.partial(_read_labels, labels), np.array_split(names, 64))
            return cls(features, tuple(names), shape[1:], np.concatenate(list(read)))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Float32[np.ndarray, "h w moments"], int]:
        path = self.features / self.names[index]
        reading.at(printable, path)
        stored = _read(path)
        if stored.shape != (1, *self.shape) or stored.dtype.kind != "f":
            raise ValueError(
                f"{printable(path)}: holds {stored.dtype} {stored.shape}, not floating-point "
                f"{(1, *self.shape)} as {self.names[0]}; extract it again"
            )
        mean = np.moveaxis(stored[0], 0, -1).astype(np.float32) / np.float32(STABLE_DIFFUSION_SCALE)
        return np.concatenate([mean, np.zeros_like(mean)], axis=-1), int(self.labels[index])

    def place(self, index: int) -> str:
        """The file of a record, for messages."""
        return printable(self.features / self.names[index])

    @property
    def digest(self) -> str:
        """A digest of the files' names, in order, and labels."""
        digest = hashlib.sha256("\0".join(self.names).encode())
        digest.update(b"\0" + self.labels.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def feature_folders(folder: Path) -> tuple[Path, Path] | None:
    """The folders NAME_features and NAME_labels in a folder; None where there are none.

    Raises:
      ValueError: there are several such pairs.
    """
    pairs = [
        (features, labels)
        for features in sorted(folder.glob(f"*{FEATURES}"))
        if (labels := features.with_name(features.name.removesuffix(FEATURES) + LABELS)).is_dir()
    ]
    if len(pairs) > 1:
        names = ", ".join(printable(features.name) for features, _ in pairs)
        raise ValueError(f"{printable(folder)}: holds {names}; keep one of them in a folder")
    return pairs[0] if pairs else None


def _numbered(folder: Path) -> list[str]:
    """The files N.npy in a folder, by their numbers."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.endswith(".npy") and _is_number(e.name[:-4])]
    return sorted(names, key=_number)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(name: str) -> tuple[int, str]:
    return int(name[:-4]), name


def _read(path: Path) -> np.ndarray:
    """A small .npy file, whole."""
    with open_file(path) as file:
        try:
            header = read_header(file)
        except ValueError as error:
            raise ValueError(
                f"{printable(path)}: is damaged ({error}); extract it again"
            ) from error
        data = file.read()
    if len(data) < header.num_bytes:
        raise ValueError(f"{printable(path)}: is cut off; extract it again")
    order = "F" if header.fortran else "C"
    return np.ndarray(header.shape, header.dtype, data, order=order)


def _read_labels(folder: Path, names: np.ndarray) -> np.ndarray:
    labels = np.zeros(len(names), np.int64)
    for row, name in enumerate(names.tolist()):
        label = _read(folder / name)
        if label.size != 1 or label.dtype.kind not in "iu" or label.min() < 0:
            raise ValueError(
                f"{printable(folder / name)}: holds {label.dtype} {label.ravel()[:9].tolist()}; a "
                "label is one integer from 0 on"
            )
        labels[row] = label.item()
    return labels
