"""A file that is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator:
    """A binary file that takes the place of `path` when all is written, and is removed if not.

    Until then it has a name of its own in the same folder, .NAME.ID.tmp. Several processes may
    write one path at once, each a whole file; the last one stays.
    """
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    # Not the process's number: one of another host, or container, may have the same.
    aside = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(aside)
        raise
