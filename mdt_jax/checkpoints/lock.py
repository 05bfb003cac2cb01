"""A lock that keeps a folder to one run; it is gone when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from absl import logging

from mdt_jax.basics.atomic import is_at
from mdt_jax.basics.places import open_file

LOCK_FILE = ".lock"  # Says who holds the lock. The file may stay; the lock on it counts.
_POLL_SECONDS = 0.5


class WorkdirInUse(RuntimeError):
    """Another run has the folder."""


class WorkdirLock:
    """A lock on a folder, held from the constructor until `release` or the end of the process.

    It is a POSIX lock (`fcntl`), which NFS carries from host to host and child processes do not
    inherit. One process must not lock the folder twice: POSIX has one lock a file and process.
    """

    def __init__(self, folder: Path, patience: float = 10.0, flag: str = "--workdir"):
        """Locks `folder`, which must exist.

        Args:
          folder: the folder to lock.
          patience: seconds to wait for the process that holds it: a killed job may still be ending.
          flag: the command's flag by which a user gives another folder.

        Raises:
          WorkdirInUse: it is locked; says by which host and process.
          ValueError: the file of the lock is no file.
        """
        self._file = open_file(folder / LOCK_FILE, "a+", encoding="utf-8")
        try:
            self._lock(folder, patience, flag)
        except BaseException:
            self._file.close()
            raise

    def _lock(self, folder: Path, patience: float, flag: str) -> None:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    logging.warning(
                        "%s cannot be locked (%s): nothing keeps two runs out of it", folder, error
                    )
                    return
            if time.monotonic() > until:
                raise WorkdirInUse(
                    f"{folder} is in use by {self._holder()}; two runs cannot share a folder: end "
                    f"that one, or give this one another {flag}"
                )
            time.sleep(_POLL_SECONDS)
        if not self.is_there():
            raise WorkdirInUse(f"{folder} was removed by the run that had it; start this one again")
        self._file.truncate(0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%c")}
        self._file.write(json.dumps(holder))
        self._file.flush()

    def is_there(self) -> bool:
        """Whether the locked file is the one that others find."""
        return is_at(self._file, self._file.name)

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
            return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (ValueError, KeyError):  # caught while it writes
            return "another process"

    def release(self) -> None:
        """Lets others have the folder; a second call is harmless."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()
