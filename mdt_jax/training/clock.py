"""A run's clock: its seconds, those of single steps, and how far it is and when it will be done."""

import contextlib
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

Number = float | int


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
