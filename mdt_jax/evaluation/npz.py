"""Arrays in npz files as others made them, read piece by piece, with nothing taken on trust.

A header can say any shape; an array is only made of as many bytes as were read.
"""

from __future__ import annotations

import contextlib
import errno
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mdt_jax.basics.names import printable
from mdt_jax.data.npy import NpyHeader, read_header

# The errors of zipfile and its decompressors for a zip file or member that is cut off, altered or
# encrypted; ValueError: an offset below 0, or a name that is no text; KeyError: no such member.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError,
    RuntimeError, OverflowError, ValueError, KeyError,
)  # fmt: skip


def npz_members(path: str | Path) -> list[str]:
    """The names of the arrays in an npz.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no zip file, or a damaged one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{printable(path)}: no such file; give an npz, or a folder of images"
        )
    if not path.is_file():  # a pipe would be waited for
        raise damaged(path, "it is no file")
    with _explained(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz(path: str | Path, name: str) -> np.ndarray:
    """One small array of an npz, whole.

    Raises:
      ValueError: the file is damaged, or the array a pickle.
    """
    path = Path(path)
    with NpzMember.open(path, name) as member:
        data = member.read(member.header.num_bytes)
        member.check_end()
    order = "F" if member.header.fortran else "C"
    return np.ndarray(member.header.shape, member.header.dtype, data, order=order)


class NpzMember:
    """An array of an npz that is being read; `open` makes one.

    Attributes:
      header: what its header says, which fits the size that the npz tells of it.
    """

    def __init__(self, path: Path, name: str, file: io.BufferedIOBase, size: int):
        """Reads the header; `size` is the bytes of the array's file. Raises ValueError: damage."""
        self._path, self._name, self._file = path, name, file
        try:
            self.header: NpyHeader = read_header(file)
        except ValueError as error:
            raise damaged(path, f"{error}, in {name}") from error
        missing = self.header.num_bytes - (size - file.tell())
        if missing:
            ends = f"ends {missing} bytes early" if missing > 0 else f"is {-missing} bytes too long"
            raise damaged(path, f"{name} {ends}")

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, name: str) -> Iterator[NpzMember]:
        """Opens an array up to its first number.

        Raises:
          ValueError: the file is damaged, or has no such array.
        """
        with contextlib.ExitStack() as stack:
            with _explained(path):
                archive = stack.enter_context(zipfile.ZipFile(path))
                file = stack.enter_context(archive.open(f"{name}.npy"))
                size = archive.getinfo(f"{name}.npy").file_size
            yield cls(path, name, file, size)

    def read(self, count: int, *, keep: bool = True) -> bytearray:
        """The next `count` bytes; with `keep` False they are only read past.

        Raises:
          ValueError: there are fewer, or they are damaged.
        """
        read, left = bytearray(), count
        while left and (piece := self._piece(min(left, 1 << 24))):
            left -= len(piece)
            if keep:
                read += piece
        if left:
            raise damaged(self._path, f"{self._name} ends {left} bytes early")
        return read

    def check_end(self) -> None:
        """Reads to the end, where the checksum is compared; raises ValueError if it differs."""
        self._piece(1)

    def _piece(self, count: int) -> bytes:
        with _explained(self._path):
            return self._file.read(count)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise damaged(path, error) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # the system's, of an offset that no file has
            raise
        raise damaged(path, error) from error


def damaged(path: Path, reason: object) -> ValueError:
    """The error of an npz that cannot be read."""
    said = " ".join(printable(str(reason)).split())[:200] or type(reason).__name__
    return ValueError(
        f"{printable(path)}: cannot be read as npz ({said}); it is damaged or no npz at all"
    )
