"""The FID Inception-v3 with its weights, from PyTorch's file, TensorFlow's graph or our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdt_jax.basics.places import read_bytes, refuse_url, what_is_there
from mdt_jax.convert import graph_def, trees
from mdt_jax.convert.inception import BLOCK, from_flat, from_graph, from_torch, is_inception
from mdt_jax.models.inception import InceptionV3
from mdt_jax.weights import files as weight_files
from mdt_jax.weights import hub_folder
from mdt_jax.weights.files import WeightsError

INCEPTION_FILE = "inception.safetensors"  # the file that `save_parameters` writes into a folder
TORCH_FILE = "pt_inception-2015-12-05-6726825d.pth"
GRAPH_FILE = "classify_image_graph_def.pb"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{TORCH_FILE}"
GRAPH = ".pb"
_METADATA = "mdt_jax.inception"  # the metadata key of the file that ours was made from


def load_network(source: str | Path) -> tuple[InceptionV3, dict[str, Any]]:
    """The network and its parameters, float32 arrays in this machine's memory.

    Args:
      source: a folder with `INCEPTION_FILE`, or else `TORCH_FILE`, `GRAPH_FILE` or one file of
        another name; or such a file: .pth, .pt, .safetensors (ours, or PyTorch's names), .pb; or
        hf://OWNER/REPO/FILE.

    Raises:
      WeightsError: nothing there, with where to get it; a file that is damaged, or not these
        weights. One line says what and where.
    """
    return InceptionV3(), read_parameters(source)


def read_parameters(source: str | Path) -> dict[str, Any]:
    """The parameters alone; arguments and errors as `load_network`'s."""
    path, arrays = open_arrays(source)
    convert: Callable[[Any], dict[str, Any]] = from_torch
    if path.suffix == GRAPH:
        convert = from_graph
    elif any(name.startswith(f"{BLOCK}/") for name in arrays):
        convert = from_flat
    try:
        return convert(arrays)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error


def open_arrays(source: str | Path) -> tuple[Path, Mapping[str, np.ndarray]]:
    """The file that a source names, and its arrays: weights, or a graph's float32 constants."""
    path = find_file(source)
    return path, _constants(path) if path.suffix == GRAPH else weight_files.read_weights(path)


def save_parameters(folder: str | Path, params: dict[str, Any], source: str | Path) -> Path:
    """Writes a folder's `INCEPTION_FILE`, which `load_network` reads; returns the file's path.

    Args:
      folder: the folder; made if it is not there.
      params: the tree.
      source: the file they were made from; its name is kept in the new one.

    Raises:
      WeightsError: the file could not be written.
    """
    path = Path(folder) / INCEPTION_FILE
    flat = {name: np.asarray(leaf) for name, leaf in trees.flatten(params)}
    weight_files.write_weights(path, flat, {_METADATA: Path(source).name})
    return path


def holds_inception(source: str | Path) -> bool:
    """Whether a source, a file or a folder, is meant to be an Inception-v3's weights."""
    path = Path(source)
    if hub_folder.is_hub_folder(source):
        return False
    if path.is_dir():
        return (path / INCEPTION_FILE).is_file()
    if path.suffix == GRAPH or path.name in (INCEPTION_FILE, TORCH_FILE):
        return True
    return weight_files.is_weight_file(source) and is_inception(weight_files.read_weights(source))


def find_file(source: str | Path) -> Path:
    """The file of weights that a source names.

    Raises:
      WeightsError: none is there, with where to get it, or several.
    """
    if str(source).startswith("hf://"):
        return weight_files.fetch(source)
    path = Path(source)
    refuse_url(source, "the file")
    if path.is_file():
        if path.suffix != GRAPH and not weight_files.is_weight_file(path):
            raise WeightsError(
                f"{path} is no file of Inception weights by its name; give a .pth, .safetensors or "
                f"{GRAPH} file ({GRAPH_FILE}, unpacked)"
            )
        return path
    if not path.is_dir():
        there = what_is_there(path)
        what = "no such file or folder" if there == "nothing" else f"{there} is there, no file"
        raise WeightsError(f"no Inception weights at {path}: {what}; {_advice()}")
    for name in (INCEPTION_FILE, TORCH_FILE, GRAPH_FILE):
        if (path / name).is_file():
            return path / name
    files = sorted(_weight_files(path.iterdir()))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise WeightsError(f"{path}: several files of weights, {names}; give one of them")
    if not files:
        raise WeightsError(f"no Inception weights in {path}; {_advice()}")
    return files[0]


def _weight_files(paths: Iterable[Path]) -> list[Path]:
    suffixes = (GRAPH, weight_files.SAFETENSORS, *weight_files.PICKLES)
    return [path for path in paths if path.suffix in suffixes and path.is_file()]


def _advice() -> str:
    return (
        f"download {URL} and give the file, or convert it once, after which PyTorch is not needed: "
        f"mdt convert to-jax --input {TORCH_FILE} --output DIR"
    )


def _constants(path: Path) -> dict[str, np.ndarray]:
    """The constants of a graph's file."""
    try:
        found = graph_def.constants(read_bytes(path))
    except ValueError as error:
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes): {error}; fetch {GRAPH_FILE} again"
        ) from error
    if not is_inception(found):
        names = ", ".join(list(found)[:3]) or "none"
        raise WeightsError(
            f"{path} is not {GRAPH_FILE}: the graph's constants ({names}) are another network's"
        )
    return found
