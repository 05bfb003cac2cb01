"""The log of a run's steps: means of their metrics, the run's clock, and the check for NaN."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from mdt_jax.checkpoints import Checkpoints, SaveError
from mdt_jax.checkpoints.goodput import Goodput
from mdt_jax.parallel import compilation_cache
from mdt_jax.parallel.command import UserError
from mdt_jax.parallel.devices import device_memory
from mdt_jax.training import clock, metrics
from mdt_jax.training.run import Run
from mdt_jax.training.wandb_log import WandbLog
from mdt_jax.training.watchdog import Watchdog


class NonFiniteLoss(UserError):
    """A loss or gradient norm that is not finite; the message says where to go on."""


class StepLog:
    """Writes the means of the steps' metrics every `config.log_every` steps.

    It reads each step's metrics one step late, so that the devices never wait for the host, and
    ends the run at a loss or gradient norm that is not finite.

    Attributes:
      watch: the run's clock, over all its resumptions: seconds of waiting for data, of the steps
        and of their logging. `paused` stops it for all other work.
      times: seconds of single steps.
    """

    def __init__(
        self,
        run: Run,
        first_step: int,
        store: Checkpoints,
        saved: Mapping[str, Any] | None = None,
        compile_seconds: float | None = None,
        account: Goodput | None = None,
    ):
        """Opens the run's metrics, and starts the clock and the watchdog.

        Args:
          run: the run.
          first_step: steps done before.
          store: the run's checkpoints, for the message about a loss that is not finite.
          saved: `state()` as the checkpoint of the first step has it; None or empty for a fresh
            run.
          compile_seconds: how long compiling took, for the first line.
          account: the account of the run's wall time; None for one that begins here.
        """
        saved = saved or {}
        c = run.config
        self._run, self._store, self._first_step = run, store, first_step
        self._window = metrics.Window.from_state(saved["window"]) if saved else metrics.Window()
        self._writer = metrics.MetricsWriter(
            run.workdir,
            resume_step=first_step,
            total_steps=c.num_steps,
            wandb=WandbLog.asked_for(c, run.workdir),
        )
        self._progress = clock.RunProgress(c.num_steps, first_step=first_step)
        self._pending: tuple[int, Any] | None = None
        self.watch = clock.Stopwatch(saved.get("train_seconds", 0.0))
        self._since, self._logged_step = saved.get("train_seconds", 0.0), first_step
        self.times = clock.StepTimes(self.watch)
        self._account = account or Goodput()
        self._account.keep()
        self._account.begin("steps")
        self._watchdog = Watchdog(c.watchdog, first_step)
        self._once = {} if compile_seconds is None else {"compile_seconds": compile_seconds}
        self._skipped_images = 0

    def add(self, step: int, values: Any, skipped_images: int = 0) -> None:
        """Takes over a step's metrics without waiting for them, and reads the step before's.

        Raises NonFiniteLoss if the loss or gradient norm of the step before is not finite.

        Args:
          step: steps done.
          values: the step's metrics, arrays on the devices.
          skipped_images: bad images replaced by others in this process since it started.
        """
        self._skipped_images = skipped_images
        self._account.reached(step)
        pending, self._pending = self._pending, (step, values)
        self._take(pending)

    def settle(self) -> None:
        """Waits for the metrics of the last step that was added, and reads them."""
        pending, self._pending = self._pending, None
        self._take(pending)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context for taking the next batch."""
        with (
            self._account.spent_on("input"),
            self._watchdog.part("input"),
            self.times.waiting(),
        ):
            yield

    def handing_over(self) -> contextlib.AbstractContextManager[None]:
        """A context for handing a step over to the devices."""
        return self._watchdog.part("dispatch")

    @contextlib.contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Stops the clock while the context is open; reads the last step's metrics before.

        For work between two steps that is not training.

        Args:
          kind: what the time is spent on, one of `goodput.KINDS`.

        Raises:
          NonFiniteLoss: the loss or gradient norm of the last step is not finite.
        """
        self.settle()
        with self.watch.paused(), self._watchdog.paused(), self._account.spent_on(kind):
            yield

    def state(self) -> dict[str, Any]:
        """The window of means and the clocks as JSON values, for a checkpoint."""
        return {
            "window": self._window.state(),
            "train_seconds": self.watch.seconds,
            "goodput": self._account.state(),
        }

    def write(self, step: int, line: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Writes a line beside those of the steps: metrics, the clock's seconds, and texts.

        Raises:
          CheckpointError: the workdir was removed meanwhile.
        """
        self._store.check_folder()
        self._writer.write(step, dict(line) | {"train_seconds": self.watch.seconds}, texts)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Puts a picture beside the metrics, where they can be looked at."""
        self._writer.image(step, name, image)

    def close(self) -> None:
        """Closes the files and the bar, and ends the watchdog; what is left is the last save."""
        self._watchdog.close()
        self._account.begin("checkpoint")
        self._progress.close()
        self._writer.close()

    def _take(self, pending: tuple[int, Any] | None) -> None:
        if pending is None:
            return
        step, values = pending
        with self._watchdog.part("wait"):
            values = {name: float(value) for name, value in jax.device_get(values).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                with contextlib.suppress(SaveError):
                    self._store.wait()  # the last good step may still be being written
                last = self._store.latest_step()
                good = "there is no checkpoint yet" if last is None else f"step {last} is saved"
                raise NonFiniteLoss(
                    f"{name} is {values[name]} at step {step}; {good} in {self._run.workdir}. "
                    "Try a lower --config.optimizer.learning_rate, --config.optimizer.clip_norm=1 "
                    "or --config.model.dtype=float32"
                )
        self._window.add(values)
        self.times.step()
        self._watchdog.ended(step)
        if step == self._first_step + 1:
            self._tell_first_step()
        self._progress.advance(step)
        c = self._run.config
        if step % c.log_every == 0 or step == c.num_steps:
            self._log(step, values["learning_rate"])

    def _tell_first_step(self) -> None:
        seconds = self._account.age()
        self._once["first_step_seconds"] = seconds
        told = "the first step was done %.1f s after the start; %d programs were compiled, %d read"
        logging.info(told, seconds, *compilation_cache.programs())

    def _log(self, step: int, learning_rate: float) -> None:
        now, run = self.watch.seconds, self._run
        seconds = (now - self._since) / max(step - self._logged_step, 1)
        self._since, self._logged_step = now, step
        # A quartile of the timesteps without a sample in the window has no mean.
        line = {name: mean for name, mean in self._window.means().items() if not math.isnan(mean)}
        line["learning_rate"] = learning_rate
        self._window.reset()
        line |= {"seconds_per_step": seconds, "images_per_second": run.config.batch_size / seconds}
        line |= self.times.metrics() | device_memory() | self._once
        self.times.reset()
        self._once = {}
        line["train_seconds"] = now
        line |= self._account.metrics()
        if run.config.data.on_bad_image == "skip":
            line["skipped_images"] = self._skipped_images
        if (used := run.utilisation(seconds)) is not None:
            line["mfu"] = used
        self._store.check_folder()
        self._writer.write(step, line)
        self._progress.log(step, loss=line["loss"], images_per_second=line["images_per_second"])
