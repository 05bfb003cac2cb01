"""Stopping a run early and in order: by SIGTERM, SIGUSR1 or a time limit, on any of its processes.

In a job of several processes JAX's preemption service catches SIGTERM and lets the processes agree
on the step after which all stop. There a process turns SIGUSR1 and the time limit into a SIGTERM to
itself, so that there is one way of agreeing. It costs a training step nothing: between signals,
asking reads a number in this process.

A process of several that waits for a step which is still being compiled, in the first minutes of a
run, hears of a stop when that is done.

Before the first step there is nothing to save, and compiling or restoring can take longer than a
scheduler waits: a thread then ends the processes.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

import jax
from absl import logging
from jax.experimental import multihost_utils

from mdt_jax.basics import ranges
from mdt_jax.parallel import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_POLL_SECONDS = 0.3  # while the run is being set up


class Stop:
    """Tells a run whether to stop now, with the same answer on all its processes.

    A context manager, to be entered in the main thread. While open it handles SIGTERM and SIGUSR1
    and watches the clock. Until `ready` is called, a reason to stop ends the process at once, with
    status 0.
    """

    def __init__(self, max_hours: float | None = None):
        """Starts the time limit's clock.

        Args:
          max_hours: hours after which to stop; None for no limit.

        Raises:
          ValueError: the limit is not positive, or out of its range.
        """
        ranges.check_arguments({"max_hours": max_hours})
        self._max_hours = max_hours
        self._deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
        self._joined = jax.process_count() > 1
        self._asks = 0  # how often the service was asked: the processes agree on one of the asks
        self._said = ""  # the reason to stop, if this process was asked
        self._setting_up = True
        self._agreed = self._told = False
        self._lock = threading.RLock()

    def __enter__(self) -> Stop:
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        # In a job JAX handles SIGTERM below Python; a handler of ours would replace it.
        handled = [s for s in _SIGNALS if not (self._joined and s is signal.SIGTERM)]
        # Our thread sees a signal through the pipe at once; Python's handler would wait until the
        # main thread returns from a compilation.
        self._before = {s: signal.signal(s, lambda *_: None) for s in handled}
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="watch_for_stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.ready()
        with self._lock:  # our thread holds it while it ends the process
            self._setting_up = False
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)  # ends the thread
        self._thread.join()
        os.close(self._read)

    def ready(self) -> None:
        """Says that training starts, and waits for all processes; a second call does nothing."""
        with self._lock:
            if self._setting_up:
                self._setting_up = False
                self._meet()

    def requested(self) -> bool:
        """Asks whether to stop now, and logs the first yes. All processes ask equally often."""
        agreed = self._ask()
        if agreed and not self._told:
            self._told = True
            logging.info("stopping: %s", self._reason())
        return agreed

    @property
    def stopping(self) -> bool:
        """The last answer of `requested`, the same on all processes; asks nothing."""
        return self._agreed

    def _reason(self) -> str:
        return self._said or "SIGTERM, SIGUSR1 or --max_hours, on a process of this job"

    def _ask(self) -> bool:
        if not self._joined:
            self._agreed = bool(self._said)
        elif not self._agreed:
            self._asks += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._asks)
        return self._agreed

    def _meet(self) -> None:
        """Brings all processes to the same number of asks.

        The service answers yes to one number only, so none may be skipped.
        """
        furthest = max(distributed.gather_json("stop", self._asks))
        while self._asks < furthest and not self._ask():
            pass

    def _request(self, reason: str) -> None:
        if not self._said:
            self._said = reason
            logging.info("asked to stop: %s", reason)
            if self._joined:
                os.kill(os.getpid(), signal.SIGTERM)

    def _watch(self) -> None:
        """Notes signals and the time limit; runs in a thread until `__exit__`."""
        while True:
            wait = _POLL_SECONDS if self._setting_up else 1.0
            if select.select([self._read], [], [], wait)[0]:
                if not (numbers := os.read(self._read, 64)):
                    return
                for number in set(numbers) & set(_SIGNALS):
                    self._request(signal.Signals(number).name)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._request(f"--max_hours {self._max_hours:g}")
            with self._lock:
                if self._setting_up and self._ask():
                    logging.info("stopping before the first step: %s", self._reason())
                    self._meet()
                    distributed.leave()
