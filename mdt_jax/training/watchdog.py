"""Hangs and slow processes: a step that does not end ends the run, and what holds it up is named.

A thread of each process looks at what the process's main thread does. In a job the processes leave
each other short reports at JAX's coordination service, from a thread: a step computes nothing for
it and waits for nobody. A step is hung when it has taken much longer than the others. Then every
process prints the stacks of its threads, the reports tell which one did not arrive, and all end
with status 1, to be started again.

A process's own part of a step is its waiting for input and the handing over of the step. The rest
is waiting for the devices, and so for the slowest of the processes: there all look alike, so that a
slow device is not told from the others.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import io
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from mdt_jax.data import reading
from mdt_jax.parallel import distributed

PARTS = ("input", "dispatch", "wait")  # of a step, as the main thread has it
_WORDS = {
    "input": "waits for its input",
    "dispatch": "hands over the step",
    "wait": "waits for its devices",
    "other": "is between two steps",
}
_MOST_TICK, _TICKS = 10.0, 20  # a limit is looked at so often; the longest between two looks
_HANG_POLL = 1.0
_ANSWER_SECONDS = 10.0  # for the other processes' last words, and for the service to answer
_STALL = 0.1  # of `least_seconds`: a wait for input that is told of
_SIGNIFICANT = 0.05  # of a step: what a slow process takes longer than the others
_MOST_NAMED = 4  # processes in a message
_QUIET_WINDOWS = 10  # windows until a process that stays slow is named again


class Watchdog:
    """Watches the steps of one process, from the constructor until `close`.

    The main thread says what it does; `paused` is for work between two steps, which may take any
    time. Time in which this process was itself stopped (Ctrl-Z, a debugger) does not count.
    """

    def __init__(self, settings: ConfigDict, step: int = 0):
        """Starts to watch.

        Args:
          settings: `config.watchdog`.
          step: steps done.
        """
        self._settings = settings
        self._lock = threading.Lock()
        self._pauses, self._beats = 0, 0
        self._done = self._begun = step
        self._part, self._since = "other", time.monotonic()
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._began, self._idle = self._since, 0.0
        size = settings.window
        self._times = {name: collections.deque(maxlen=size) for name in ("step", *PARTS)}
        self._closed, self._told = threading.Event(), threading.Event()
        self._tick = min(_MOST_TICK, settings.least_seconds / _TICKS)
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if distributed.joined():
            hosts = distributed.gather_json("watchdog", socket.gethostname())
            self._exchange = _Exchange(self, hosts, self._tick)
            self._threads.append(self._exchange)
        for thread in self._threads:
            thread.start()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context for a part of a step, one of `PARTS`."""
        began = time.monotonic()
        outer, self._part, self._since = self._part, name, began
        self._begun += name == "dispatch"
        try:
            yield
        finally:
            self._part, self._since = outer, time.monotonic()
            self._spent[name] += self._since - began

    def ended(self, step: int) -> None:
        """Takes down that the devices have done so many steps."""
        now = time.monotonic()
        with self._lock:
            self._times["step"].append(now - self._began - self._idle)
            for name, seconds in self._spent.items():
                self._times[name].append(seconds)
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._began, self._idle = now, 0.0
        self._done, self._beats = step, self._beats + 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context for work between two steps, which is not watched."""
        began = time.monotonic()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self._beats += 1
            self._idle += time.monotonic() - began

    def close(self) -> None:
        """Ends the threads."""
        self._closed.set()
        for thread in self._threads:
            thread.join(_ANSWER_SECONDS)  # no longer: the service may be gone

    def limit(self) -> float:
        """The seconds after which a step is hung."""
        least, medians = self._settings.least_seconds, self.medians()
        return max(least, self._settings.factor * medians["step"]) if medians else least

    def medians(self) -> dict[str, float]:
        """Medians of the last steps' seconds, "step" of the whole; empty before the first."""
        with self._lock:
            times = {name: list(found) for name, found in self._times.items()}
        return {name: statistics.median(found) for name, found in times.items() if found}

    def report(self) -> dict[str, Any]:
        """What this process says of itself, as JSON values."""
        full = len(self._times["step"]) == self._settings.window
        medians = self.medians() if full else {}
        part, waited = self._part, time.monotonic() - self._since
        return {
            "begun": self._begun,
            "done": self._done,
            "part": "other" if self._pauses else part,
            "seconds": round(waited, 3),
            "reads": reading.longest() if self._reads(part, medians) else "",
            "medians": medians,
        }

    def _reads(self, part: str, medians: Mapping[str, float]) -> bool:
        """Whether this process waits for its input, now or most of the time."""
        return part == "input" or medians.get("input", 0.0) > 0.5 * medians.get("step", 1.0)

    def _watch(self) -> None:
        """Counts how long the step in hand has taken; runs in a thread until `close`."""
        waited, beats, last, stalled = 0.0, -1, time.monotonic(), False
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            if self._pauses or self._beats != beats:
                waited, beats, stalled = 0.0, self._beats, False
            else:
                waited += min(now - last, 2 * self._tick)
            last = now
            if self._settings.factor and waited > self.limit():
                return self._end(waited)
            long = waited > _STALL * self._settings.least_seconds
            if long and not stalled and self._part == "input":
                stalled = True
                logging.warning(
                    "step %d has waited %.1f s for its input; being read: %s",
                    self._begun + 1,
                    time.monotonic() - self._since,
                    reading.longest() or "nothing; it is being copied to the devices",
                )
        return None

    def _end(self, waited: float) -> None:
        """Ends the run, whose step does not end."""
        what = f"step {self._done + 1} has not ended within {waited:.1f} s"
        if not distributed.joined():
            print_stacks(what)
            distributed.fail(f"{what}: this process {_doing(self.report())}")
        self._exchange.hung(what)

    def print_stacks(self, why: str) -> None:
        """Prints the stacks of all threads, once."""
        with self._lock:
            first = not self._told.is_set()
            self._told.set()
        if first:
            print_stacks(why)


class _Exchange(threading.Thread):
    """Leaves this process's reports for the others; process 0 looks for a slow one among them."""

    def __init__(self, watchdog: Watchdog, hosts: Sequence[str], tick: float):
        super().__init__(name="watchdog_reports", daemon=True)
        self._watchdog, self._hosts, self._tick = watchdog, hosts, tick
        self._settings = watchdog._settings
        self._me = jax.process_index()
        self._next: dict[int, int] = {}  # the step from which a slow process is named again
        self._hung = ""  # why, once a step of this process is hung
        self._answered = threading.Event()

    def run(self) -> None:
        """Reports, and listens for a hang, until the watchdog is closed."""
        pause, next_report = min(self._tick, _HANG_POLL), 0.0
        while not self._watchdog._closed.wait(pause):
            try:
                if self._hung:
                    distributed.post("hang", self._hung)
                if hangs := distributed.posts("hang"):
                    self._answered.set()
                    return self._end_all(self._hung or next(iter(hangs.values())))
                if time.monotonic() >= next_report:
                    next_report = time.monotonic() + self._tick
                    self._exchange()
            except jax.errors.JaxRuntimeError as error:
                # The service has ended, and JAX ends this process.
                logging.debug("no more reports: %s", error)
                return None
        return None

    def hung(self, why: str) -> None:
        """Ends the job, a step of which does not end; called by another thread."""
        self._hung = why
        self._watchdog.print_stacks(why)
        if not self._answered.wait(_ANSWER_SECONDS):
            distributed.fail(
                f"{why}: {self._who(0)}, where the processes leave their reports, does not "
                "answer: it is stopped, or cut off from here"
            )

    def _exchange(self) -> None:
        distributed.post("report", self._watchdog.report())
        if self._me == 0 and self._settings.slow and self._watchdog.report()["medians"]:
            reports = distributed.posts("report")
            if len(reports) == len(self._hosts) and all(r["medians"] for r in reports.values()):
                self._name_slow(reports)

    def _name_slow(self, reports: Mapping[int, Mapping[str, Any]]) -> None:
        window = self._settings.window
        for process, said in slow(reports, self._settings.slow).items():
            step = reports[process]["done"]
            if step >= self._next.get(process, 0):
                self._next[process] = step + _QUIET_WINDOWS * window
                logging.warning(
                    "%s is slow: %s; the median of %d steps to step %d",
                    self._who(process),
                    said,
                    window,
                    step,
                )

    def _end_all(self, why: str) -> None:
        """Prints this process's stacks, waits a little for the others' last words, and fails."""
        self._watchdog.print_stacks(why)
        last: dict[int, Any] = {}
        until = time.monotonic() + _ANSWER_SECONDS
        # If the service ends meanwhile, another process has said more.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            distributed.post("last", self._watchdog.report())
            while len(last) < len(self._hosts) and time.monotonic() < until:
                time.sleep(0.2)
                last = distributed.posts("last")
        distributed.fail(f"{why}: {blame(last, [self._who(p) for p in range(len(self._hosts))])}")

    def _who(self, process: int) -> str:
        return f"process {process} ({self._hosts[process]})"


def slow(reports: Mapping[int, Mapping[str, Any]], ratio: float) -> dict[int, str]:
    """The processes whose own part of a step takes longer than the others', each in words.

    Args:
      reports: `Watchdog.report` of all processes, with medians.
      ratio: how many times the others' median it must be.
    """
    own = {p: r["medians"]["input"] + r["medians"]["dispatch"] for p, r in reports.items()}
    found = {}
    for process, seconds in own.items():
        others = [other for p, other in own.items() if p != process]
        usual = statistics.median(others) if others else seconds
        medians = reports[process]["medians"]
        if seconds < ratio * usual or seconds - usual < _SIGNIFICANT * medians["step"]:
            continue
        reads = reports[process]["reads"]
        found[process] = (
            f"its own part of a step takes {seconds:.3g} s, {usual:.3g} s elsewhere (input "
            f"{medians['input']:.3g} s, handing over {medians['dispatch']:.3g} s, devices "
            f"{medians['wait']:.3g} s)" + (f"; it reads {reads}" if reads else "")
        )
    return found


def blame(reports: Mapping[int, Mapping[str, Any]], names: Sequence[str]) -> str:
    """Who did not arrive at a step, in words.

    Args:
      reports: `Watchdog.report` of the processes that still answer.
      names: the names of all processes, in their order.
    """
    silent = [name for process, name in enumerate(names) if process not in reports]
    if silent:
        more = f", and {len(silent) - _MOST_NAMED} more" if len(silent) > _MOST_NAMED else ""
        return f"{', '.join(silent[:_MOST_NAMED])}{more} did not answer: stopped, or cut off"
    first = min(report["begun"] for report in reports.values())
    late = {p: r for p, r in reports.items() if r["begun"] == first and r["part"] != "wait"}
    handing_over = all(report["part"] == "dispatch" for report in reports.values())
    if not late or (handing_over and len(late) == len(reports)):
        return (
            f"all processes have begun step {first} and wait for their devices, or for each other"
        )
    told = [
        f"{names[p]} did not arrive, and {_doing(report)}" for p, report in sorted(late.items())
    ]
    more = f", and {len(told) - _MOST_NAMED} more" if len(told) > _MOST_NAMED else ""
    return " and ".join(told[:_MOST_NAMED]) + more


def _doing(report: Mapping[str, Any]) -> str:
    said = f"{_WORDS[report['part']]}, for {report['seconds']:.1f} s"
    if report["part"] == "input":
        said += f"; being read: {report['reads'] or 'nothing'}"
    return said


def print_stacks(why: str) -> None:
    """Prints a reason, the names of this process's threads, and their stacks to standard error."""
    names = ", ".join(f"{thread.ident:#018x} {thread.name}" for thread in threading.enumerate())
    print(f"{why}. The stacks of this process's threads ({names}):", file=sys.stderr, flush=True)
    try:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
    except (io.UnsupportedOperation, AttributeError, ValueError):  # a stream that is no file
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
