"""Files that are written whole or not at all, also when the machine stops or the disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from typing import BinaryIO

_Name = str | os.PathLike

# No room on the disk, a quota that is used up, a file larger than may be written.
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def whole_path(path: _Name, folder: _Name | None = None) -> Iterator[str]:
    """Another path, for a writer that takes names; the file written there becomes `path`.

    When the body ends, the file is on the disk before it takes the place of `path`. When the body
    fails, the file is removed, and `path` is what it was.

    Args:
      path: the file to write; missing folders are made.
      folder: where it is written meanwhile, on the same file system; by default beside `path`.

    Yields:
      The path to write to, which ends in ".tmp".
    """
    path = os.path.abspath(path)
    place, name = os.path.split(path)
    os.makedirs(place, exist_ok=True)
    # Not the process's number: one of another host, or container, may have the same.
    aside = os.path.join(folder or place, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(aside)
        raise


@contextlib.contextmanager
def whole_file(path: _Name, folder: _Name | None = None) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when all is written; arguments as for `whole_path`."""
    with whole_path(path, folder) as aside, open(aside, "wb") as file:
        yield file


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that there is no room on the disk.

    Libraries hand on the system's error as text alone, so its text is looked for, too.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL_DISK
    return any(os.strerror(code) in str(error) for code in _FULL_DISK)
