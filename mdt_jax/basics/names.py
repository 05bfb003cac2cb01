"""Names of files and classes: how messages show them, and which no class has."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable

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
