"""What this process is reading just now: a run that waits for its input can say which file it is.

Reading threads note it; the notes cost a fraction of a microsecond an image. What worker processes
read is known only by the examples of the run that are waited for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class _Note:
    """What a thread reads, since when, and from which file, as far as that is known."""

    def __init__(self, what: str, place: Callable[[], str], waits: bool):
        self.what, self.place, self.waits = what, place, waits
        self.since = time.monotonic()


_notes: dict[int, _Note] = {}  # by thread
_LIST = threading.Lock()


@contextlib.contextmanager
def noting(what: str, place: Callable[[], str], waits: bool = False) -> Iterator[None]:
    """A context for reading some examples in this thread.

    Args:
      what: the source's name.
      place: gives the file of the first of them, if nothing deeper says which it is.
      waits: whether the thread waits for others, which note more; its note is the last resort.
    """
    thread = threading.get_ident()
    with _LIST:
        outer, _notes[thread] = _notes.get(thread), _Note(what, place, waits)
    try:
        yield
    finally:
        with _LIST:
            if outer is None:
                del _notes[thread]
            else:
                _notes[thread] = outer


def at(place: Callable[..., str], *arguments: Any) -> None:
    """Notes the file that this thread reads now, if it reads for a run.

    Args:
      place: gives the file's name, of `arguments`; called only when it is asked for.
    """
    if (note := _notes.get(threading.get_ident())) is not None:
        note.since, note.place = time.monotonic(), lambda: place(*arguments)


def longest() -> str:
    """What has been read for longest: "SOURCE: FILE, for 12.3 s"; empty where nothing is read."""
    with _LIST:
        notes = sorted(_notes.values(), key=lambda note: (note.waits, note.since))
    if not notes:
        return ""
    first = notes[0]
    place, seconds = first.place(), time.monotonic() - first.since
    where = place if first.what in place else f"{first.what}: {place}"
    return f"{where}, for {seconds:.1f} s"
