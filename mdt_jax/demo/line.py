"""The line before the devices: one request at a time, a few that wait, and a word for the rest."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from mdt_jax.parallel.command import one_line

TOLD_EVERY = 1.0  # seconds after which one who waits is told again, if nothing has changed
# Seconds without a question after which whoever waits for a job is taken to have gone.
GONE_AFTER = 30.0

_Work = Callable[[], Iterator[Any]]


class Busy(ValueError):
    """As many requests wait as may."""


class Stopped(ValueError):
    """The request ended before its pictures were made; the message says why."""


class Job:
    """A request in the line. Whoever asks gets its latest update; those in between are dropped.

    So a slow reader costs no memory.
    """

    def __init__(self, line: Line, work: _Work, owner: str):
        self.owner = owner
        self._line, self._work = line, work
        self._changed = threading.Condition()
        self._latest: Any = None
        self._is_new = self._is_over = False
        self._error: Exception | None = None
        self._reason = ""  # to stop
        self._asked = time.monotonic()

    def cancel(self, reason: str = "cancelled") -> None:
        """Stops the job: at once if it waits, else after the steps that the devices are at.

        Whoever waits for it is told at once.
        """
        with self._changed:
            if self._is_over or self._reason:
                return
            self._reason = reason
            self._changed.notify_all()
        self._line.leave(self)

    def updates(self) -> Iterator[Any]:
        """The job's updates, and while it waits its place in the line, a whole number from 1.

        Closing this, or asking no more for `GONE_AFTER` seconds, cancels the job.

        Raises:
          Stopped: it was cancelled.
          Exception: the work's own.
        """
        try:
            while True:
                with self._changed:
                    self._asked = time.monotonic()
                    self._changed.wait_for(
                        lambda: self._is_new or self._is_over or self._reason, TOLD_EVERY
                    )
                    self._asked = time.monotonic()
                    fresh, self._is_new = self._is_new, False
                    latest, over, error = self._latest, self._is_over, self._error
                    stopped = Stopped(self._reason) if self._reason else None
                if error or stopped:
                    raise error or stopped
                if fresh:
                    yield latest
                elif over:
                    return
                elif place := self._line.place(self):
                    yield place
        finally:
            self.cancel("nobody waits for it")

    def run(self) -> None:
        """Does the work, until it is done or cancelled; called by the line's thread."""
        error: Exception | None = None
        try:
            with contextlib.closing(self._work()) as updates:
                while not (reason := self._why_stop()):
                    try:
                        update = next(updates)
                    except StopIteration:
                        break
                    with self._changed:
                        self._latest, self._is_new = update, True
                        self._changed.notify_all()
                if reason:
                    error = Stopped(reason)
        except Exception as failure:
            error = failure
            if not isinstance(failure, ValueError):
                logging.exception("a request failed: %s", one_line(failure))
        self.end(error)

    def end(self, error: Exception | None) -> None:
        """Says that nothing more comes."""
        with self._changed:
            self._is_over, self._error = True, error
            self._changed.notify_all()

    def _why_stop(self) -> str:
        if not self._reason and time.monotonic() - self._asked > GONE_AFTER:
            return "nobody waits for it"
        return self._reason


class Line:
    """Jobs in the order in which they came, done by one thread.

    Attributes:
      most_waiting: how many may wait beside the one that is being done.
    """

    def __init__(self, most_waiting: int):
        self.most_waiting = most_waiting
        self._jobs: collections.deque[Job] = collections.deque()
        self._current: Job | None = None
        self._closed = ""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="demo_line", daemon=True)
        self._thread.start()

    def submit(self, work: _Work, owner: str) -> Job:
        """Puts a job at the end of the line.

        Args:
          work: called when its turn has come; what it yields are the job's updates.
          owner: whose it is, for `cancel`.

        Raises:
          Busy: too many wait.
          Stopped: the line is closed.
        """
        job = Job(self, work, owner)
        with self._changed:
            if self._closed:
                raise Stopped(self._closed)
            if len(self._jobs) >= self.most_waiting + (self._current is None):
                raise Busy(
                    f"busy: {len(self._jobs)} requests are waiting already; try again in a while"
                )
            self._jobs.append(job)
            self._changed.notify_all()
        return job

    def place(self, job: Job) -> int:
        """How many jobs are before this one, the one being done too; 0 if it does not wait."""
        with self._changed:
            if job not in self._jobs:
                return 0
            return self._jobs.index(job) + (self._current is not None)

    def leave(self, job: Job) -> None:
        """Takes a waiting job out of the line, which ends it."""
        with self._changed:
            if job not in self._jobs:
                return
            self._jobs.remove(job)
        job.end(Stopped(job._reason))

    def cancel(self, owner: str) -> bool:
        """Cancels an owner's jobs; whether there were any."""
        with self._changed:
            jobs = [job for job in (*self._jobs, self._current) if job and job.owner == owner]
        for job in jobs:
            job.cancel()
        return bool(jobs)

    def close(self, reason: str, timeout: int | float) -> bool:
        """Ends all jobs with a reason, and takes no more; whether the thread ended in time."""
        with self._changed:
            self._closed = reason
            jobs = [job for job in (*self._jobs, self._current) if job]
            self._changed.notify_all()
        for job in jobs:
            job.cancel(reason)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                self._current = job = self._jobs.popleft()
            job.run()
