"""Names of files and classes: how messages show them, what is there, and which no class has."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path

# Control characters, ends of lines and of paragraphs, and bytes that are no UTF-8, which Python
# keeps in a file's name as surrogates.
_UNUSABLE = ("Cc", "Zl", "Zp", "Cs")


def printable(text: str | os.PathLike) -> str:
    """A name or a message as a terminal can show it.

    Letters, signs and plain spaces of any script stay. What else could move the cursor, change
    colours or turn the direction of writing becomes Python's escape of it, such as \\n, \\x1b or
    \\u202e, and so does each byte of a file's name that is no UTF-8.
    """
    text = os.fspath(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


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


def check_class_names(place: str | os.PathLike, names: Iterable[str]) -> None:
    """Refuses, with ValueError, classes whose names lists of classes cannot hold, a name a line.

    Args:
      place: the data, for the message.
      names: the classes' names, in order.
    """
    for label, name in enumerate(names):
        kinds = {} if name.isprintable() else {unicodedata.category(c): c for c in name}
        if not kinds.keys().isdisjoint(_UNUSABLE):
            why = "a byte that is no UTF-8" if "Cs" in kinds else "a control character"
            raise ValueError(
                f"{printable(place)}: the name of class {label}, '{printable(name)}', holds {why}, "
                "which no list of classes can; rename it"
            )


def _escape(character: str) -> str:
    byte = ord(character) - 0xDC00  # of a surrogate that stands for a byte
    if 0x80 <= byte <= 0xFF:
        return f"\\x{byte:02x}"
    return character.encode("unicode_escape").decode()
