"""NumPy's .npy files as others made them: their headers, which may be damaged, and memory maps."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mdt_jax.basics.names import printable
from mdt_jax.basics.places import open_file, wrong_kind


class NpyHeader(NamedTuple):
    """What the header of an .npy file says of its array.

    Attributes:
      shape: its shape.
      fortran: whether its first index varies fastest.
      dtype: its type.
      num_bytes: how many bytes its numbers take.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    num_bytes: int


def read_header(file: io.BufferedIOBase) -> NpyHeader:
    """Reads an .npy file up to its first number; nothing is allocated by what the header says.

    Args:
      file: an open file, at its beginning.

    Raises:
      ValueError: no .npy file, a damaged one, or one of pickled objects; the message is the reason.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in read:
            raise ValueError(f"version {version} of the format, of which NumPy makes no numbers")
        shape, fortran, dtype = read[version](file)
    except OSError:
        raise
    except Exception as error:  # garbled text can raise anything in NumPy's parser
        raise ValueError(" ".join(printable(str(error)).split()) or "a garbled header") from error
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"its header says the shape {shape}")
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are not read; save numbers")
    return NpyHeader(shape, fortran, dtype, math.prod(shape) * dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class MemoryMap:
    """A .npy file that pickles as its path: NumPy would pickle the contents of a memory map."""

    path: Path

    @functools.cached_property
    def array(self) -> np.ndarray:
        """The array, whose numbers are read when they are used.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is damaged, or no file.
        """
        if not self.path.is_file():
            raise ValueError(f"{wrong_kind(self.path)}; write one with np.save")
        try:
            with open_file(self.path) as file:
                header = read_header(file)
                start, end = file.tell(), os.fstat(file.fileno()).st_size
            if start + header.num_bytes > end:
                missing = start + header.num_bytes - end
                raise ValueError(f"it is cut off, {missing:,} bytes before its end")
            order = "F" if header.fortran else "C"
            if not header.num_bytes:  # an empty file cannot be mapped
                return np.empty(header.shape, header.dtype, order)
            return np.memmap(self.path, header.dtype, "r", start, header.shape, order)
        except (ValueError, OverflowError, TypeError) as error:
            raise ValueError(
                f"{printable(self.path)}: cannot be memory-mapped ({error}); write it again with "
                "np.save"
            ) from error

    def __reduce__(self):
        return MemoryMap, (self.path,)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.array[index]
