"""Files of PyTorch weights: .pt, .safetensors and `hf://OWNER/REPO/FILE`, read and written.

Arrays are read one by one, when they are asked for, from a memory map: a file of any size costs no
memory by itself.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from operator import getitem
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mdt_jax.basics.atomic import is_full_disk, reason_of, whole_path
from mdt_jax.basics.places import open_file, read_text, refuse_url, what_is_there
from mdt_jax.parallel.command import WAYS_OUT
from mdt_jax.weights import hub
from mdt_jax.weights import names as weight_names
from mdt_jax.weights.errors import NoSuchFile, WeightsError
from mdt_jax.weights.names import Part
from mdt_jax.weights.tensors import (
    DTYPES,
    first_line,
    import_torch,
    numpy_dtype,
    to_numpy,
    to_torch,
    unpickle,
)

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"
_POINTER = b"version https://git-lfs"


class WeightFile(Mapping[str, np.ndarray]):
    """Arrays by name, each read when it is asked for.

    Attributes:
      path: the file.
      metadata: text that a .safetensors file carries about itself.
      nest: the names, joined by dots, under which the arrays were found, "" if they are the whole
        file.
      step: the training steps that the file says were done, None if it does not say.
      arguments: the training script's settings that are stored beside the weights, by name.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype],
        read: Callable[[str], np.ndarray],
        metadata: Mapping[str, str] | None = None,
        nest: str = "",
        step: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ):
        self.path, self.metadata, self.nest = path, dict(metadata or {}), nest
        self.step, self.arguments = step, dict(arguments or {})
        self.shapes, self.dtypes, self._read = dict(shapes), dict(dtypes), read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def is_weight_file(source: str | Path) -> bool:
    """Whether a source is named like a file of weights rather than a run's folder."""
    return str(source).startswith("hf://") or str(source).endswith((*PICKLES, SAFETENSORS))


def fetch(source: str | Path) -> Path:
    """The local path of a file; `hf://OWNER/REPO/FILE` goes through the Hugging Face cache.

    HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are honoured.

    Raises:
      WeightsError: no such file, or a hub that cannot be reached; says which file to fetch by hand.
      ValueError: another URL.
    """
    text = str(source)
    if text.startswith("hf://"):
        return hub.fetch(text)
    refuse_url(source, "the file")
    path = Path(text)
    if not path.is_file():
        what = f"{what_is_there(path)}, not a file" if os.path.lexists(path) else "not there"
        raise WeightsError(
            f"{path} is {what}; give a .pt or .safetensors file, or hf://OWNER/REPO/FILE"
        )
    with open_file(path) as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise WeightsError(f"{path} is a pointer of Git LFS, not a file: run git lfs pull")
    return path


def json_beside(source: str | Path, path: Path) -> dict[str, Any]:
    """The config.json of diffusers' beside a file of weights, {} if there is none.

    Args:
      source: the source that `fetch` was given.
      path: the path that `fetch` returned.

    Raises:
      WeightsError: it is not JSON, or the hub that may have one cannot be reached.
    """
    beside = path.parent / "config.json"
    if str(source).startswith("hf://"):
        try:
            beside = fetch(str(source).rpartition("/")[0] + "/config.json")
        except NoSuchFile:
            return {}
    if not beside.exists():
        return {}
    try:
        settings = json.loads(read_text(beside))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{beside} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{beside} holds a {type(settings).__name__}, not settings by name")
    return settings


def read_weights(source: str | Path, nest: str | None = None) -> WeightFile:
    """The arrays of a file by name; each is read when it is asked for.

    Names that wrappers put into an array's (`module`, `_orig_mod`) are taken off, and so is what
    stands before all names of a network (`mdt_jax.weights.names`). The log says which of a training
    file's parts was taken.

    Args:
      source: a path or hf://OWNER/REPO/FILE.
      nest: which of a training file's parts to take: "ema" for an average, "model" for the weights
        themselves, or a part's own name; by default an average, if there is one.

    Raises:
      WeightsError: not there, truncated, or it holds no arrays.
    """
    path = fetch(source)
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path, nest)
    tree = unpickle(path)
    entries = tree if isinstance(tree, Mapping) else {}
    part = _take_part(path, entries, nest)
    if part is None:
        if nest is not None and weight_names.find_parts(entries):
            raise WeightsError(f"{path} holds no {nest!r}")
        raise WeightsError(f"{path} holds no weights by name, but {weight_names.describe(tree)}")
    tensors = {name: functools.reduce(getitem, keys, tree) for name, keys in part.names.items()}
    return WeightFile(
        path,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: numpy_dtype(path, part.names[name][-1], tensor) for name, tensor in tensors.items()},
        lambda name: to_numpy(tensors[name]),
        nest=part.place,
        step=weight_names.read_step(entries),
        arguments=weight_names.read_arguments(entries),
    )


def has_part(source: str | Path, part: str) -> bool:
    """Whether a file holds weights of a kind under a name of their own, as DiT's files do.

    `source` is as for `read_weights`, `part` is "ema" or "model".
    """
    path = fetch(source)
    tree = _open_safetensors(path)[1] if path.suffix == SAFETENSORS else unpickle(path)
    found = _take_part(path, tree, part, logs=False) if isinstance(tree, Mapping) else None
    return found is not None and bool(found.place)


def _take_part(
    path: Path, tree: Mapping[Any, Any], nest: str | None, logs: bool = True
) -> Part | None:
    try:
        return weight_names.take_part(tree, nest, file=path if logs else None)
    except ValueError as error:
        raise WeightsError(f"{path} {error}") from error


def read_object(source: str | Path) -> Any:
    """The object in a pickle, such as an optimiser's state, with tensors as memory-mapped arrays.

    Raises:
      WeightsError: it is not a pickle, is truncated, could run code, or holds a tensor that has
        no plain numbers (sparse, quantized, without memory).
    """

    path = fetch(source)

    def convert(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: convert(entry, f"{name}.{key}") for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(convert(entry, f"{name}.{i}") for i, entry in enumerate(value))
        if not hasattr(value, "detach"):
            return value
        numpy_dtype(path, name.removeprefix("."), value)  # which refuses what has no numbers
        return to_numpy(value)

    return convert(unpickle(path), "")


def check_ending(path: str | Path) -> Path:
    """The path of a file to be written, if its ending is of a known format.

    Raises:
      WeightsError: an unknown ending, or one that needs PyTorch where it is not installed.
    """
    path = Path(path)
    if path.suffix not in (*PICKLES, SAFETENSORS):
        raise WeightsError(f"--output {path}: must end in .pt or .safetensors")
    if path.suffix in PICKLES:
        import_torch(path)
    return path


def write_weights(
    path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays as .safetensors or as a PyTorch state dict, whole or not at all.

    Args:
      path: the file; its ending says which format.
      arrays: the arrays by name, in the order they are written.
      metadata: text kept in a .safetensors file; a state dict has no place for it.

    Raises:
      WeightsError: an unknown ending, or a file that could not be written (a full disk).
    """
    path = check_ending(path)
    try:
        with whole_path(path) as aside:
            if path.suffix == SAFETENSORS:
                from safetensors.numpy import save_file

                # It writes memory as it lies, that of a transposed array too.
                ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
                save_file(ordered, aside, dict(metadata or {}))
            else:
                torch = import_torch(path)
                torch.save(
                    {name: to_torch(torch, array) for name, array in arrays.items()},
                    aside,
                )
            os.chmod(aside, 0o666 & ~_umask())  # safetensors makes files only their owner reads
    except Exception as error:
        # The libraries' own errors may leave out why they could not write.
        reason, code = reason_of(error)
        reason = reason if code else first_line(error)
        full = is_full_disk(error) or not (code or isinstance(error, OSError))
        hint = "is the disk full?" if full else WAYS_OUT.get(code, "")
        raise WeightsError(f"{path} could not be written: {reason}; {hint}".rstrip("; ")) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_safetensors(path: Path, nest: str | None) -> WeightFile:
    file, arrays = _open_safetensors(path)
    if not arrays:
        raise WeightsError(f"{path} holds no arrays")
    part = _take_part(path, arrays, nest)
    if part is None:
        raise WeightsError(f"{path} holds no {nest!r}")
    names = {name: keys[0] for name, keys in part.names.items()}
    unknown = [arrays[key].dtype for key in names.values() if arrays[key].dtype not in DTYPES]
    if unknown:
        raise WeightsError(f"{path} holds arrays of type {unknown[0]!r}, which no model here has")
    metadata = file.metadata() or {}
    return WeightFile(
        path,
        {name: arrays[key].shape for name, key in names.items()},
        {name: DTYPES[arrays[key].dtype] for name, key in names.items()},
        lambda name: file.get_tensor(names[name]),
        metadata,
        nest=part.place,
        step=weight_names.read_step(metadata),
        arguments=weight_names.read_arguments({"args": metadata}),
    )


def _open_safetensors(path: Path) -> tuple[Any, dict[str, SimpleNamespace]]:
    """A .safetensors file, open, and the shape and type of every array in it."""
    import safetensors

    try:
        file = safetensors.safe_open(path, "numpy")
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return file, {
            name: SimpleNamespace(shape=tuple(view.get_shape()), dtype=view.get_dtype())
            for name, view in views.items()
        }
    except Exception as error:  # SafetensorError, and the OS's own
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or not a safetensors file: "
            f"{first_line(error)}; fetch it again"
        ) from error
