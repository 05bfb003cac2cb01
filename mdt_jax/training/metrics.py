"""A run's output while it trains: logged metrics, the clock behind them, and a progress bar.

`WORKDIR/metrics.jsonl` is the record: one JSON object per logged step and one per judgement of
samples. Kills and resumes leave no gaps or duplicates in it. `WORKDIR/tensorboard` holds the same
numbers, and images, for TensorBoard.
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import ScalarLike, UInt8
from tensorboardX import SummaryWriter
from tqdm import tqdm

from mdt_jax.basics.atomic import is_at, is_full_disk, whole_file
from mdt_jax.basics.places import open_file, read_bytes, refuse_url

Number = float | int
METRICS_FILE = "metrics.jsonl"  # in the workdir
# Metrics that depend on clock and machine. All others are the same in every run of a config.
CLOCK = ("seconds_per_step", "images_per_second", "train_seconds", "eval_seconds",
         "step_seconds_p50", "step_seconds_p99", "input_wait_seconds", "compile_seconds",
         "device_memory_bytes", "device_memory_peak_bytes", "mfu")  # fmt: skip


class MetricsWriter:
    """Writes metrics to `WORKDIR/metrics.jsonl` and `WORKDIR/tensorboard`, from process 0 only.

    On the other processes of a run every method does nothing. A line of metrics.jsonl holds "step"
    and then the metrics in the order given. Steps never decrease; lines of different metrics may
    have the same step. Floats read back to the same bits. JSON cannot hold non-finite ones: they
    are the strings "nan", "inf" and "-inf", which `float` reads. A line has reached the operating
    system when `write` returns; a thread writes TensorBoard's events within a second.

    On a full disk lines are kept, and written with a later one; the log says so. A metrics.jsonl
    that is removed or replaced meanwhile is told there, too, and begun anew.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        total_steps: int,
        resume_step: int = 0,
        start_message: str = "Training",
    ):
        """Opens both files, and removes what a killed run logged after its last checkpoint.

        Args:
          workdir: the run's directory on a local or mounted file system; created if missing.
          total_steps: the last step of the run.
          resume_step: steps done at the checkpoint restored from, 0..total_steps. Lines of later
            steps, which this run will write again, and an incomplete last line are removed from
            metrics.jsonl and hidden in TensorBoard.
          start_message: the beginning of the line logged here.

        Raises:
          ValueError: `resume_step` is outside 0..total_steps, `workdir` is a URL, or the metrics
            there are no file.
        """
        workdir = os.fspath(workdir)
        refuse_url(workdir, "workdir")
        if not 0 <= resume_step <= total_steps:
            raise ValueError(
                f"resume_step {resume_step} is outside 0..total_steps ({total_steps}): the "
                f"checkpoint in {workdir} is from a longer run; raise total_steps or start in "
                "another workdir"
            )
        self._file = self._events = None
        self._owed: list[bytes] = []  # lines that found no room yet
        if jax.process_index() != 0:
            return
        os.makedirs(workdir, exist_ok=True)
        self._path = path = os.path.join(workdir, METRICS_FILE)
        kept, dropped = _keep_until(path, resume_step)
        self._file = _appended(path)
        self._events = SummaryWriter(
            os.path.join(workdir, "tensorboard"),
            # TensorBoard hides earlier events whose step is at least this one.
            purge_step=resume_step + 1,
            # TensorBoard names files by the second and overwrites them: without a suffix a run
            # resumed within a second would erase the file of the run before.
            filename_suffix=f".{time.time_ns()}",
            flush_secs=1,
        )
        _let_events_go(self._events)
        logging.info(
            "%s: steps %d to %d, metrics in %s (%d lines kept, %d dropped)",
            start_message,
            resume_step + 1,
            total_steps,
            path,
            kept,
            dropped,
        )

    def write(
        self,
        step: int,
        metrics: Mapping[str, ScalarLike],
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Logs the metrics of a step, as one line and as TensorBoard scalars.

        Args:
          step: number of steps done, 1 after the first, and no less than at the last call.
          metrics: names and scalars (Python's, NumPy's or JAX's), written as float64.
          texts: names and strings that end the line, in metrics.jsonl alone.

        Raises:
          ValueError: a metric is called "step".
        """
        if self._file is None:
            return
        texts = texts or {}
        if "step" in metrics or "step" in texts:
            raise ValueError(f'a metric at step {step} is named "step", the line\'s own key')
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": int(step)} | {name: _json_number(value) for name, value in values.items()}
        line |= texts
        self._owed.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._write_lines()
        for name, value in values.items():
            self._events.add_scalar(name, value, int(step))

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Adds an image to TensorBoard.

        Args:
          step: number of steps done.
          name: the image's TensorBoard tag.
          image: (H, W, C) in 0..255, C 1 (grey) or 3 (RGB); `images.image_grid` makes one.
        """
        if self._events is not None:
            self._events.add_image(name, image, int(step), dataformats="HWC")

    def close(self) -> None:
        """Writes pending events and closes both files; may be called twice."""
        if self._file is not None:
            if self._owed:
                self._write_lines()
            self._file.close()
            self._events.close()
            self._file = self._events = None

    def _write_lines(self) -> None:
        """Writes the lines that are owed, all or none."""
        if not is_at(self._file, self._path):
            logging.warning(
                "%s was removed or replaced while this run writes to it; it goes on in a file of "
                "that name",
                self._path,
            )
            self._file.close()
            self._file = _appended(self._path)
        size = os.fstat(self._file.fileno()).st_size
        data = memoryview(b"".join(self._owed))
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            if not is_full_disk(error):
                raise
            self._file.truncate(size)
            logging.warning(
                "%s: %s; %d line(s) are kept, to be written with the next; make room",
                self._path,
                error.strerror,
                len(self._owed),
            )
        else:
            self._owed.clear()


def _appended(path: str) -> Any:
    """A file to append to, whose writes reach the operating system at once."""
    return open_file(path, "ab", buffering=0)


def _let_events_go(events: SummaryWriter) -> None:
    """Lets TensorBoard's events go where they find no room, with one warning.

    Their thread would end at the first error, and `add_scalar` wait for it for ever.
    """
    writer = getattr(events.file_writer.event_writer, "_ev_writer", None)  # tensorboardX's own
    warned = []

    def tolerant(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def attempt(*arguments: Any) -> Any:
            try:
                return call(*arguments)
            except OSError as error:
                if not warned:
                    warned.append(error)
                    logging.warning("TensorBoard's events cannot be written: %s", error)

        return attempt

    for name in ("write_event", "flush", "close") if writer else ():
        setattr(writer, name, tolerant(getattr(writer, name)))


def read_lines(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl, without those that cannot be parsed, as an incomplete last one.

    Raises:
      OSError: the file is not there, or cannot be read.
      ValueError: it is no file.
    """
    lines = []
    with open_file(path, "r", encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


def steps_with(path: str | os.PathLike, metric: str) -> set[int]:
    """The steps whose lines in a metrics.jsonl hold a metric; empty if there is no file."""
    try:
        return {line["step"] for line in read_lines(path) if metric in line}
    except FileNotFoundError:
        return set()


def _keep_until(path: str, last_step: int) -> tuple[int, int]:
    """Removes from a metrics file the lines after `last_step`, and lines that cannot be parsed.

    The new file replaces the old one in one step, so that a kill during the call loses nothing.

    Returns:
      The number of lines kept and dropped; (0, 0) when there is no file.
    """
    try:
        before = read_bytes(path)
    except FileNotFoundError:
        return 0, 0
    lines = before.removesuffix(b"\n").split(b"\n") if before else []
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            # No proper prefix of a JSON object parses: a line that parses is complete, even if it
            # is the last one and lacks its newline.
            keep = json.loads(line)["step"] <= last_step
        except (ValueError, KeyError, TypeError, RecursionError):
            keep = False
            if number < len(lines):  # a kill leaves only the last line incomplete
                logging.warning("%s:%d is not a metrics line, removed: %r", path, number, line)
        if keep:
            kept.append(line)
    after = b"".join(line + b"\n" for line in kept)
    if after != before:
        with whole_file(path) as file:
            file.write(after)
    return len(kept), len(lines) - len(kept)


def _json_number(value: float) -> float | str:
    """`value`, or its name if it is not finite; `float` of the result gives `value` back."""
    return value if math.isfinite(value) else str(value)


class Window:
    """Means of per-step metrics over the steps between two log lines.

    NaN means "no value at this step" (the loss of a timestep quartile without samples) and is
    skipped: a mean is over the steps that have a value. A loss that is itself NaN gives a mean of
    NaN only if no step of the window has a finite one.

    A checkpoint in the middle of a window saves `state()`, so that the means logged after a resume
    have the same bits as without the interruption.
    """

    def __init__(self):
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, ScalarLike]) -> None:
        """Adds the metrics of one step; their names may differ from step to step."""
        for name, value in metrics.items():
            value = float(value)
            present = not math.isnan(value)
            self._sums[name] = self._sums.get(name, 0.0) + (value if present else 0.0)
            self._counts[name] = self._counts.get(name, 0) + present

    def means(self) -> dict[str, float]:
        """The mean of every metric added since the last reset; NaN if all its values were NaN."""
        return {
            name: total / self._counts[name] if self._counts[name] else math.nan
            for name, total in self._sums.items()
        }

    def reset(self) -> None:
        """Starts the next window."""
        self._sums.clear()
        self._counts.clear()

    def state(self) -> dict[str, list]:
        """The window as JSON values: {"metrics": [[name, sum, count], ...]}, in logging order."""
        return {
            "metrics": [
                [name, _json_number(total), self._counts[name]]
                for name, total in self._sums.items()
            ]
        }

    @classmethod
    def from_state(cls, state: Mapping[str, list]) -> "Window":
        """The window, bit for bit, whose `state()` is given, also after a pass through JSON."""
        window = cls()
        for name, total, count in state["metrics"]:
            window._sums[name] = float(total)
            window._counts[name] = int(count)
        return window


class Stopwatch:
    """Seconds of wall-clock time since construction, without those spent in `paused`."""

    def __init__(self, seconds: float = 0.0):
        """Starts the watch, which shows `seconds` at first."""
        self._seconds, self._since = seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        """The seconds it shows; in a pause those when the pause began."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._seconds + running

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the watch while the context is open."""
        self._seconds, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.perf_counter()


class StepTimes:
    """Seconds of single steps, and of waiting for their input, between two log lines.

    A step's time is measured on the host, from the arrival there of one step's metrics to that of
    the next. While the devices limit the speed, that is how long they took for a step.
    """

    def __init__(self, watch: Stopwatch):
        """Measures by a watch that is paused only between steps."""
        self._watch = watch
        self.reset()
        self._since = watch.seconds

    def reset(self) -> None:
        """Starts the next window."""
        self._steps: list[float] = []
        self._waited = 0.0

    def step(self) -> None:
        """Records that a step's metrics have arrived."""
        now = self._watch.seconds
        self._steps.append(now - self._since)
        self._since = now

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context for taking the next batch, whose time counts as waiting for input."""
        began = self._watch.seconds
        yield
        self._waited += self._watch.seconds - began

    def metrics(self) -> dict[str, float]:
        """Median and 99th percentile of the steps' seconds, and the mean wait for input."""
        if not self._steps:
            return {}
        median, slow = np.percentile(self._steps, (50, 99))
        return {
            "step_seconds_p50": float(median),
            "step_seconds_p99": float(slow),
            "input_wait_seconds": self._waited / len(self._steps),
        }


class RunProgress:
    """Shows how far a run is and when it will be done: a bar on a terminal, log lines elsewhere.

    The bar is on standard error, where that is a terminal; elsewhere each `log` is one INFO line.
    Processes other than 0 show nothing. The time left is estimated from the speed since
    construction: construct it after the steps are compiled.
    """

    def __init__(self, total_steps: int, *, first_step: int = 0):
        """
        Args:
          total_steps: the last step of the run.
          first_step: steps already done, in a resumed run.
        """
        is_shown = jax.process_index() == 0
        is_terminal = sys.stderr.isatty()
        self._logs_lines = is_shown and not is_terminal
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not (is_shown and is_terminal),
        )
        self._total_steps = total_steps
        self._first_step = first_step
        self._start = time.monotonic()

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps done."""
        self._bar.update(step - self._bar.n)

    def log(self, step: int, *, loss: Number, images_per_second: Number) -> None:
        """Shows the loss and the speed at `step`, beside the bar or as one log line."""
        self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:,.1f} images/s")
        if self._logs_lines:
            done = step - self._first_step
            seconds = (time.monotonic() - self._start) / max(done, 1) * (self._total_steps - step)
            logging.info(
                "step %d/%d (%.0f%%), loss %.4f, %s images/s, %s left",
                step,
                self._total_steps,
                100 * step / self._total_steps,
                loss,
                f"{images_per_second:,.1f}",
                tqdm.format_interval(seconds),
            )

    def close(self) -> None:
        """Ends the bar, which stays on the screen."""
        self._bar.close()
