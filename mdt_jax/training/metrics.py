"""A run's metrics while it trains, and the means behind them.

`WORKDIR/metrics.jsonl` is the record: one JSON object per logged step and one per judgement of
samples. Kills and resumes leave no gaps or duplicates in it. `WORKDIR/tensorboard` holds the same
numbers, and images, for TensorBoard, and so does Weights & Biases, if the run is to be there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import ScalarLike, UInt8

from mdt_jax.basics.atomic import is_at, is_full_disk, whole_file
from mdt_jax.basics.places import open_file, read_bytes, refuse_url
from mdt_jax.checkpoints import goodput
from mdt_jax.training.tensorboard import EventLog
from mdt_jax.training.wandb_log import WandbLog

METRICS_FILE = "metrics.jsonl"  # in the workdir
# Metrics that depend on clock and machine. All others are the same in every run of a config.
CLOCK = ("seconds_per_step", "images_per_second", "train_seconds", "eval_seconds",
         "step_seconds_p50", "step_seconds_p99", "input_wait_seconds", "compile_seconds",
         "device_memory_bytes", "device_memory_peak_bytes", "mfu",
         "first_step_seconds", *goodput.METRICS)  # fmt: skip


class MetricsWriter:
    """Writes metrics to `WORKDIR/metrics.jsonl` and wherever else, from process 0 only.

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
        wandb: WandbLog | None = None,
    ):
        """Opens both files, and removes what a killed run logged after its last checkpoint.

        Args:
          workdir: the run's directory on a local or mounted file system; created if missing.
          total_steps: the last step of the run.
          resume_step: steps done at the checkpoint restored from, 0..total_steps. Lines of later
            steps, which this run will write again, and an incomplete last line are removed from
            metrics.jsonl and hidden in TensorBoard.
          start_message: the beginning of the line logged here.
          wandb: the run at Weights & Biases, which gets the same lines and images, those from
            before, too; None for none.

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
        self._file = self._events = self._wandb = None
        self._owed: list[bytes] = []  # lines that found no room yet
        if jax.process_index() != 0:
            return
        os.makedirs(workdir, exist_ok=True)
        self._path = path = os.path.join(workdir, METRICS_FILE)
        kept, dropped = _keep_until(path, resume_step)
        self._file = _appended(path)
        self._events = EventLog(workdir, resume_step)
        self._wandb = wandb
        if wandb is not None and kept:
            wandb.catch_up(read_lines(path))
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
        self._events.write(int(step), values)
        if self._wandb is not None:
            self._wandb.write(int(step), values | texts)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Adds an image to TensorBoard, and to Weights & Biases.

        Args:
          step: number of steps done.
          name: the image's name there.
          image: (H, W, C) in 0..255, C 1 (grey) or 3 (RGB); `images.image_grid` makes one.
        """
        if self._events is not None:
            self._events.image(int(step), name, image)
        if self._events is not None and self._wandb is not None:
            self._wandb.image(int(step), name, image)

    def close(self) -> None:
        """Writes pending events and closes both files; may be called twice."""
        if self._file is not None:
            if self._owed:
                self._write_lines()
            self._file.close()
            self._events.close()
            self._file = self._events = None
            if self._wandb is not None:
                self._wandb.close()

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
