"""PyTorch's pickles and tensors: read without running code, and arrays made of them and back.

A pickle is read by PyTorch's restricted unpickler alone, which builds tensors and plain containers
and runs no code. NumPy has no bfloat16 of its own; ml_dtypes' stands for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mdt_jax.basics.places import open_file
from mdt_jax.weights import names as weight_names
from mdt_jax.weights.errors import WeightsError

DTYPES = {
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (8, 4, 2)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (8, 4, 2, 1)},
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}


def unpickle(path: Path) -> Any:
    """The object in a pickle of PyTorch's, its tensors in a memory map where the format has one.

    Raises:
      WeightsError: it is not a pickle, is truncated, or could run code.
    """
    torch = import_torch(path)
    import pickle

    with open_file(path) as file:
        start = file.read(24)
    if not start.startswith((b"PK\x03\x04", b"\x80")):  # a zip; a pickle alone before PyTorch 1.6
        holds = f"starts with {start!r}" if start else "is empty"
        raise WeightsError(f"{path} is not a PyTorch file: it {holds}; fetch it again")
    # DiT keeps the command's arguments beside its weights.
    with torch.serialization.safe_globals(weight_names.plain_types()):
        try:
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, ValueError) as error:
                if "mmap" not in str(error):
                    raise
                # The format from before PyTorch 1.6 cannot be mapped.
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"{path} was not loaded: it holds more than tensors, and unpickling it could run "
                f"code of its own{_named_global(error)}. Save its state_dict() alone, or as "
                ".safetensors"
            ) from error
        except Exception as error:  # garbled bytes can raise anything in an unpickler
            if "TorchScript" in str(error):
                raise WeightsError(
                    f"{path} is a TorchScript program, not weights by name; save its state_dict()"
                ) from error
            raise WeightsError(
                f"{path} ({path.stat().st_size:,} bytes) is truncated or not a PyTorch file: "
                f"{first_line(error)}; fetch it again"
            ) from error


def import_torch(path: Path) -> Any:
    """PyTorch; raises WeightsError, which names the file that needs it, if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path} is a PyTorch file, and PyTorch is not installed: pip install torch, "
            "or use a .safetensors file, which needs none"
        ) from error
    return torch


def to_numpy(tensor: Any) -> np.ndarray:
    """A CPU tensor as an array that shares its memory."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # it has no .numpy()
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def numpy_dtype(path: Path, name: str, tensor: Any) -> np.dtype:
    """The type of the array that `to_numpy` makes of a tensor.

    Args:
      path, name: the tensor's file and its place there, for the message.
      tensor: the tensor.

    Raises:
      WeightsError: it has no plain numbers (sparse, quantized, without memory), or a type that no
        model here has.
    """
    layout = str(getattr(tensor, "layout", "")).removeprefix("torch.")
    kind = "meta" if getattr(tensor, "is_meta", False) else layout
    if getattr(tensor, "is_nested", False):
        kind = "nested"
    elif getattr(tensor, "is_quantized", False):
        kind = "quantized"
    if kind not in ("strided", ""):
        raise WeightsError(
            f"{path}: {name or 'it'} is a {kind} tensor, which has no plain numbers; save the "
            "state_dict() of a network that is in memory, dense"
        )
    kind = str(tensor.dtype).removeprefix("torch.")
    for dtype in DTYPES.values():
        if dtype.name == kind:
            return dtype
    raise WeightsError(f"{path}: {name} is of type {kind}, which no model here has")


def to_torch(torch: Any, array: np.ndarray) -> Any:
    """An array as a tensor."""
    array = np.asarray(array, order="C")
    if not array.flags.writeable:  # PyTorch warns of these, though nothing here writes to them
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def first_line(error: BaseException) -> str:
    """The first sentence of a library's message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].strip().rstrip(".")


def _named_global(error: BaseException) -> str:
    """The function that PyTorch's unpickler refused, as its message names it."""
    words = str(error).split("GLOBAL ", 1)
    return f" ({words[1].split()[0][:80]})" if len(words) == 2 else ""
