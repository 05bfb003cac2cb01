"""Where a run's wall time goes, over all its starts: `WORKDIR/goodput.json`, kept by process 0.

At every moment the main thread does one of `KINDS`, so that their seconds add up to the wall time.
Steps that a killed run had done after the checkpoint from which it goes on are done again: their
seconds, and those of their input, are then lost. A checkpoint knows both as they were when it was
made, the record as they were a moment before the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from mdt_jax.basics.places import read_bytes, read_text

RECORD = "goodput.json"  # in the workdir
# What wall time is spent on, and the words for it. What the compiler does while steps run is none.
KINDS = {
    "steps": "steps",
    "start": "starting up",
    "compile": "compiling",
    "input": "waiting for input",
    "checkpoint": "checkpoints",
    "evaluate": "samples and judgements",
    "lost": "lost: steps done again",
}
_DONE_AGAIN = ("steps", "input")
# A run that is killed has a record that lacks this share of its time, but for the first moments of
# a start and where that would be longer than a minute.
_SHARE, _LEAST_SECONDS, _MOST_SECONDS = 0.004, 0.1, 60.0


def process_began() -> float | None:
    """When this process was started, by `time.monotonic`; None where only Linux would tell."""
    try:
        fields = read_text("/proc/self/stat").rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return time.monotonic() - max(age, 0.0)


class Goodput:
    """The account of a run's wall time, by what its main thread does; starts with "start".

    Before `open` nothing is read, and before `keep` nothing is written.
    """

    def __init__(self, began: float | None = None):
        """Starts the clock.

        Args:
          began: when the run was started, by `time.monotonic`; by default now.
        """
        self._began = time.monotonic() if began is None else began
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "start", self._began
        self._starts, self._step, self._stopped = 1, 0, 0.0
        self._path: Path | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, workdir: str | Path) -> None:
        """Adds up with what the workdir's record says of starts before; call it once."""
        if jax.process_index() != 0:
            return
        self._path = Path(workdir) / RECORD
        if (before := read_record(workdir)) is not None:
            began = time.time() - (time.monotonic() - self._began)
            with self._lock:
                for kind, seconds in before["seconds"].items():
                    self._seconds[kind] += seconds
                self._starts = before["starts"] + 1
                self._step = before["step"]
                self._stopped = before["stopped_seconds"] + max(began - before["until"], 0.0)

    def keep(self) -> None:
        """From now on the workdir's record is written; a second call does nothing."""
        if self._path is None or self._thread is not None:
            return
        self._thread = threading.Thread(target=self._write_often, name="goodput", daemon=True)
        self._thread.start()

    def resume(self, step: int, saved: Mapping[str, float] | None) -> None:
        """Says at which step the run goes on; what was done after it is lost.

        Args:
          step: steps done.
          saved: `state()` as the step's checkpoint has it; None for a fresh run, and where the
            checkpoint has none.
        """
        saved = saved or {}
        with self._lock:
            if self._step > step:
                for kind in _DONE_AGAIN:
                    lost = max(self._seconds[kind] - saved.get(kind, 0.0), 0.0)
                    self._seconds[kind] -= lost
                    self._seconds["lost"] += lost
            self._step = step

    def begin(self, kind: str) -> None:
        """From now on the time is of another kind, one of `KINDS`."""
        with self._lock:
            now = time.monotonic()
            self._seconds[self._kind] += now - self._since
            self._kind, self._since = kind, now

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """A context whose time is of a kind, unless an inner one says otherwise."""
        outer = self._kind
        self.begin(kind)
        try:
            yield
        finally:
            self.begin(outer)

    def reached(self, step: int) -> None:
        """Takes down that so many steps are done, or under way."""
        self._step = step

    def age(self) -> float:
        """Seconds since this start."""
        return time.monotonic() - self._began

    def seconds(self) -> dict[str, float]:
        """The seconds of each kind over all starts; their sum is the wall time."""
        with self._lock:
            running = time.monotonic() - self._since
            return self._seconds | {self._kind: self._seconds[self._kind] + running}

    def state(self) -> dict[str, float]:
        """What the checkpoint of the steps that are done keeps for `resume`."""
        seconds = self.seconds()
        return {kind: seconds[kind] for kind in _DONE_AGAIN}

    def metrics(self) -> dict[str, float]:
        """The account as a line of metrics has it: `METRICS`, over all starts."""
        seconds = self.seconds()
        wall = sum(seconds.values())
        return {
            "goodput": seconds["steps"] / wall if wall else 0.0,
            "wall_seconds": wall,
            **{f"wall_{kind}": value for kind, value in seconds.items()},
        }

    def record(self) -> dict[str, Any]:
        """The account as JSON values, as `read_record` gives it.

        "starts", how often the run was started; "step", steps done or under way; "until", when this
        was, seconds since 1970; "stopped_seconds", the time between the starts, which is no wall
        time of the run; "seconds" by kind.
        """
        seconds = {kind: round(value, 3) for kind, value in self.seconds().items()}
        return {
            "starts": self._starts,
            "step": self._step,
            "until": round(time.time(), 3),
            "stopped_seconds": round(self._stopped, 3),
            "seconds": seconds,
        }

    def close(self) -> None:
        """Writes the record for the last time, and says in the log where the time went."""
        self._closed.set()
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._write()
        logging.info("wall time      %s", summary(self.record()))

    def _write_often(self) -> None:
        while True:
            self._write()
            if self._closed.wait(min(max(_SHARE * self.age(), _LEAST_SECONDS), _MOST_SECONDS)):
                return

    def _write(self) -> None:
        """Replaces the record. A run does not end because its time cannot be written down."""
        assert self._path is not None
        aside = self._path.with_name(f".{RECORD}.tmp")
        # Not made safe against a power cut, as files of value are: this is often, and a record
        # that is lost costs a figure.
        with contextlib.suppress(OSError):
            aside.write_text(json.dumps(self.record()))
            os.replace(aside, self._path)


# The names of `Goodput.metrics`.
METRICS = ("goodput", "wall_seconds", *(f"wall_{kind}" for kind in KINDS))


def read_record(workdir: str | Path) -> dict[str, Any] | None:
    """The record in a workdir, `Goodput.record`; None if there is none that can be read."""
    path = Path(workdir) / RECORD
    try:
        found = json.loads(read_bytes(path))
        seconds = {kind: float(found["seconds"].get(kind, 0.0)) for kind in KINDS}
        times = {name: float(found[name]) for name in ("until", "stopped_seconds")}
        counts = {name: int(found[name]) for name in ("starts", "step")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning("%s cannot be read (%r): the time before is not known", path, error)
        return None
    return {**counts, **times, "seconds": seconds}


def summary(record: Mapping[str, Any]) -> str:
    """A record in one line: "4 min 05 s in 2 starts: steps 81.3%, starting up 10.0%, …"."""
    seconds = record["seconds"]
    wall = sum(seconds.values())
    shares = ", ".join(f"{KINDS[k]} {v / max(wall, 1e-9):.1%}" for k, v in seconds.items() if v)
    return f"{_wall_in_words(record, wall)}: {shares}"


def table(record: Mapping[str, Any]) -> str:
    """A record as a small table, a line for each kind of time."""
    seconds = record["seconds"]
    wall = sum(seconds.values())
    lines = [
        f"  {words:<24} {in_words(seconds[kind]):>12}  {seconds[kind] / max(wall, 1e-9):6.1%}"
        for kind, words in KINDS.items()
    ]
    stopped = f", and {in_words(record['stopped_seconds'])} between them"
    more = stopped if record["starts"] > 1 else ""
    return "\n".join([f"wall time      {_wall_in_words(record, wall)}{more}", *lines])


def _wall_in_words(record: Mapping[str, Any], wall: float) -> str:
    starts = record["starts"]
    return f"{in_words(wall)} in {starts} start{'s' if starts > 1 else ''}"


def in_words(seconds: float) -> str:
    """A time in its two largest units: "12.3 s", "4 min 05 s", "2 h 03 min", "3 d 04 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, below, smaller in (("d", 86400, 3600, "h"), ("h", 3600, 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below:02} {smaller}"
    return f"{whole // 60} min {whole % 60:02} s"
