"""A trace of a few training steps for XProf: `config.profile_steps=(100, 105)`, WORKDIR/profile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import logging

from mdt_jax.training.step import TrainState
from mdt_jax.training.step_log import StepLog


class StepProfiler:
    """Traces a range of steps on process 0; one of the training loop's actions.

    Every process runs the same program, so one process's trace shows them all. A run that starts
    after the first of the steps is not traced. The parts of a step are the scopes "model" (both
    passes), "loss", "optimizer" and "ema".
    """

    def __init__(self, workdir: Path, steps: Sequence[int] = ()):
        """
        Args:
          workdir: the run's folder; the trace goes into its sub-folder `profile`.
          steps: (first, last), both traced, counted from 1; () for no trace.
        """
        self._folder = workdir / "profile"
        self._first, self._last = steps or (0, 0)
        self._tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context for the call of a step, which it names; begins the trace at the first."""
        if number == self._first and jax.process_index() == 0:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def due(self, step: int) -> bool:
        """Whether the trace is written after this step."""
        return self._tracing and step == self._last

    def __call__(self, step: int, state: TrainState, log: StepLog) -> None:
        """Ends the trace once the step's metrics are there, and writes it."""
        with log.paused("evaluate"):
            self._write()

    def close(self) -> None:
        """Writes the trace of a run that ends before the last of the steps."""
        if self._tracing:
            self._write()

    def _write(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        logging.info("traced steps %d to %d: %s", self._first, self._last, self._folder)
