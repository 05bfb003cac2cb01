"""Files that are written whole or not at all, also when the machine stops or the disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_Name = str | os.PathLike

# No room on the disk, a quota that is used up, a file larger than may be written.
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def whole_path(path: _Name, folder: _Name | None = None) -> Iterator[str]:
    """Another path, for a writer that takes names; the file written there becomes `path`.

    When the body ends, the file is on the disk before it takes the place of `path`. When the body
    fails, the file is removed, and `path` is what it was. An OSError names `path`.

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
    short = name if len(os.fsencode(name)) < 200 else name[:50]  # a name has at most 255 bytes
    aside = os.path.join(folder or place, f".{short}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path, aside):
            yield aside
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong before is the error
            os.remove(aside)
        raise


@contextlib.contextmanager
def whole_file(path: _Name, folder: _Name | None = None) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when all is written; arguments as for `whole_path`."""
    with whole_path(path, folder) as aside, open(aside, "wb") as file:
        yield file


@contextlib.contextmanager
def naming(path: _Name, *instead_of: _Name) -> Iterator[None]:
    """Lets an error of the system name the file that a user knows.

    Writing to an open file that fails names none.

    Args:
      path: the file.
      *instead_of: paths that stand for it meanwhile.
    """
    try:
        yield
    except OSError as error:
        # An error without a name may also be of a file that is read.
        unnamed = error.filename is None and error.errno in (*_FULL_DISK, errno.EROFS)
        if unnamed or error.filename in [os.fspath(other) for other in instead_of]:
            error.filename = os.fspath(path)
        raise


def is_at(file: Any, path: _Name) -> bool:
    """Whether an open file is the one that is found at a path, and was not removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def make_folder(path: _Name, flag: str = "--output") -> None:
    """Makes a folder for files to be written to, and those above it; it may be there.

    Args:
      path: the folder.
      flag: the command's flag by which a user gives another.

    Raises:
      OSError: there cannot be such a folder, or nothing can be written to it; one line says why.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = _in_the_way(folder, error)
        raise OSError(f"{folder} cannot be made: {why}, or give another {flag}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        why = "change its permissions, or give"
        raise OSError(f"{folder} cannot be written to: {why} another {flag}")


def check_writable(path: _Name, flag: str = "--output") -> None:
    """Refuses a file that could not be written, before the work for it is done; makes its folder.

    Raises:
      OSError: one line that says why.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"{os.fspath(path)}: is a folder; name a file")
    make_folder(os.path.dirname(os.path.abspath(path)), flag)


def _in_the_way(folder: Path, error: OSError) -> str:
    """What keeps a folder from being made: the first thing above it that is no folder to write."""
    for place in (folder, *folder.parents):
        if os.path.islink(place) and not os.path.exists(place):
            there = os.readlink(place)
            return f"{place} is a symbolic link to {there}, which is not there; mend it"
        if os.path.exists(place):  # not Path's, which raises for names that are too long
            if not os.path.isdir(place):
                return f"{place} is a file; move it away"
            if not os.access(place, os.W_OK | os.X_OK):
                return f"{place} cannot be written to ({error.strerror}); change that"
            break
    if error.errno in _FULL_DISK:
        return f"{error.strerror}; make room"
    return f"{error.strerror}; mend the path"


def reason_of(error: BaseException) -> tuple[str, int | None]:
    """The system's words and number in an error, without what a library puts around them.

    The number is None where the error says none.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or os.strerror(error.errno), error.errno
    text = " ".join(str(error).split())
    for code in (*_FULL_DISK, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EIO):
        if os.strerror(code) in text:
            return os.strerror(code), code
    # TensorStore names three of its own files before the reason.
    return text.rpartition('": ')[2].partition(" [os_error_code")[0] or repr(error), None


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that there is no room on the disk.

    Libraries hand on the system's error as text alone, so its text is looked for, too.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL_DISK
    return any(os.strerror(code) in str(error) for code in _FULL_DISK)
