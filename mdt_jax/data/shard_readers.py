"""Reading records of many ArrayRecord files at once, with few of them open."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ShardReaders:
    """Readers of shards, for several threads, each opened when it is first needed.

    They take up to half of the files that a process can have open. The reader that was not used for
    longest makes room for a new one; it closes when the last thread is done with it.
    """

    def __init__(self, folder: Path, files: Sequence[str]):
        self._folder, self._files = folder, files
        self._limit = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._open: dict[int, Any] = {}  # in the order of their last use
        self._lock = threading.Lock()

    def read(self, shard: int, place: int) -> bytes:
        """A record's bytes.

        Raises:
          RuntimeError, ValueError, IndexError: ArrayRecord's errors for damage.
          OSError: this process has too many files open.
        """
        try:
            (data,) = self._reader(shard).read([place])
        except RuntimeError as error:
            if os.strerror(errno.EMFILE) not in str(error):
                raise
            return self._read_alone(shard, place)
        return data

    def _read_alone(self, shard: int, place: int) -> bytes:
        """A record's bytes, read after all other shards' files were closed."""
        with self._lock:
            self._open.clear()
        try:
            (data,) = self._reader(shard).read([place])
        except RuntimeError as error:
            if os.strerror(errno.EMFILE) not in str(error):
                raise
            with self._lock:
                self._open.pop(shard, None)
            raise OSError(
                errno.EMFILE,
                "this process has too many files open; allow more with `ulimit -n`, now "
                f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}",
                str(self._folder / self._files[shard]),
            ) from error
        return data

    def _reader(self, shard: int) -> Any:
        from array_record.python import array_record_module

        with self._lock:
            reader = self._open.pop(shard, None)
            if reader is None:
                reader = array_record_module.ArrayRecordReader(
                    str(self._folder / self._files[shard]),
                    options="readahead_buffer_size:0",
                    file_reader_buffer_size=32768,
                )
            self._open[shard] = reader
            if len(self._open) > self._limit:
                del self._open[next(iter(self._open))]
        return reader

    def __reduce__(self):
        return ShardReaders, (self._folder, self._files)
