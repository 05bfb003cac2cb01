"""Paths that a user gives: below a home, and small files that must be files to be read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mdt_jax.basics.names import printable


def expand(path: str | os.PathLike) -> Path:
    """A path with its leading ~ or ~USER replaced by that user's home.

    Raises:
      ValueError: there is no such user, or no home of this one; names the path.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise ValueError(
            f"{printable(path)}: the home of {printable(user)} is not known; write the path in "
            "full, or as ./~… for a folder of that name"
        ) from error


def what_is_there(path: str | os.PathLike) -> str:
    """What is at a path where something else was wanted, in words, such as "a pipe"."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            return f"a link to {printable(os.readlink(path))}, which leads to nothing"
        return "nothing" if isinstance(error, FileNotFoundError) else f"closed ({error.strerror})"
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder"}
    kinds |= {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def wrong_kind(path: str | os.PathLike, wanted: str = "file") -> str:
    """What a message says of a path that is no file, or no folder, as wanted."""
    return f"{printable(path)}: is no {wanted} but {what_is_there(path)}"


def read_text(path: str | os.PathLike) -> str:
    """A small file's text in UTF-8, with or without a mark in front.

    A pipe, a socket or a device is not opened: reading it could wait for ever.

    Raises:
      FileNotFoundError: nothing is there.
      OSError: it cannot be read.
      ValueError: it is no file, or no text in UTF-8.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"is no file but {what_is_there(path)}")
    return Path(path).read_text(encoding="utf-8-sig")
