"""What a run shows of itself between its steps: metrics, judgements and grids of samples."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import jax
import numpy as np
from absl import logging

from mdt_jax import sampling
from mdt_jax.checkpoints import Checkpoints, SaveError
from mdt_jax.parallel import sharding
from mdt_jax.parallel.command import UserError
from mdt_jax.parallel.devices import device_memory, mfu
from mdt_jax.parallel.preemption import Stop
from mdt_jax.sampling import images
from mdt_jax.training import metrics
from mdt_jax.training.run import Run
from mdt_jax.training.run_evaluation import RunEvaluator
from mdt_jax.training.step import TrainState


class NonFiniteLoss(UserError):
    """A loss or gradient norm that is not finite; the message says where to go on."""


class StepLog:
    """Takes each step's metrics one step late, so that the devices never wait for the host.

    Keeps the means since the last log line, writes them, and stops the run at a loss or gradient
    norm that is not finite.

    Attributes:
      watch: seconds of the training loop over all its resumptions: waiting for data, the steps and
        their logging. To be paused for all else, once what was handed over is settled.
      times: of single steps; the loop tells it when it waits for data.
      skipped_images: bad images that others took the place of, in this process since its start.
    """

    def __init__(
        self,
        run: Run,
        first_step: int,
        window: metrics.Window,
        store: Checkpoints,
        train_seconds: float = 0.0,
        compile_seconds: float | None = None,
    ):
        """compile_seconds: what the first line says that compiling took."""
        c = run.config
        self._run, self._window, self._store = run, window, store
        self._writer = metrics.MetricsWriter(
            run.workdir, resume_step=first_step, total_steps=c.num_steps
        )
        self._progress = metrics.Progress(c.num_steps, first_step=first_step)
        self._pending: tuple[int, Any] | None = None
        self.watch = metrics.Stopwatch(train_seconds)
        self._since, self._logged_step = train_seconds, first_step
        self.times = metrics.StepTimes(self.watch)
        self._once = {} if compile_seconds is None else {"compile_seconds": compile_seconds}
        self.skipped_images = 0

    def add(self, step: int, values: Any) -> None:
        """Hands over a step's metrics, still on their way, and takes the step before's."""
        pending, self._pending = self._pending, (step, values)
        self._take(pending)

    def settle(self) -> None:
        """Waits for the metrics of the last step handed over."""
        pending, self._pending = self._pending, None
        self._take(pending)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Puts a picture into the TensorBoard events."""
        self._writer.image(step, name, image)

    def judge(self, step: int, evaluator: RunEvaluator, state: TrainState, stop: Stop) -> bool:
        """Has a step's samples judged and writes what came of it, as a line of its own.

        Returns whether it came to an end before the run was asked to stop.
        """
        self.settle()
        with self.watch.paused():
            found = evaluator.judge(state, stop.requested)
            if found is None:
                return False
            line = found.metrics | {"train_seconds": self.watch.seconds}
            self._writer.write(step, line, {"evaluator": found.evaluator})
        if jax.process_index() == 0:
            logging.info("step %d: %s", step, found.describe())
        return True

    def close(self) -> None:
        """Closes the files and the bar."""
        self._progress.close()
        self._writer.close()

    def _take(self, pending: tuple[int, Any] | None) -> None:
        if pending is None:
            return
        step, values = pending
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
        self._progress.advance(step)
        c = self._run.config
        if step % c.log_every == 0 or step == c.num_steps:
            self._log(step, values["learning_rate"])

    def _log(self, step: int, learning_rate: float) -> None:
        now, run = self.watch.seconds, self._run
        seconds = (now - self._since) / max(step - self._logged_step, 1)
        self._since, self._logged_step = now, step
        # A quartile in which no sample of the window fell has no mean.
        line = {name: mean for name, mean in self._window.means().items() if not math.isnan(mean)}
        line["learning_rate"] = learning_rate
        self._window.reset()
        line |= {"seconds_per_step": seconds, "images_per_second": run.config.batch_size / seconds}
        line |= self.times.metrics() | device_memory() | self._once
        self.times.reset()
        self._once = {}
        line["train_seconds"] = now
        if run.config.data.on_bad_image == "skip":
            line["skipped_images"] = self.skipped_images
        device = run.mesh.devices.flat[0].device_kind
        dtype = np.dtype(run.model.dtype).name
        used = mfu(run.step_flops(), seconds, run.mesh.size, device, dtype)
        if used is not None:
            line["mfu"] = used
        self._writer.write(step, line)
        self._progress.log(step, loss=line["loss"], images_per_second=line["images_per_second"])


class GridSampler:
    """Draws a grid of EMA samples every so often; compiled before training starts."""

    def __init__(self, run: Run, class_names: tuple[str, ...]):
        c = run.config
        self._run = run
        self._model = sampling.DiffusionModel.from_config(c, class_names)
        shards = sharding.batch_shards(run.mesh)
        size = -(-c.sample.num_samples // shards) * shards
        self._options = sampling.resolve_options(self._model)
        self._sampler = sampling.CompiledSampler(self._model, run.mesh, size, self._options)
        self._sampler.warm_up(run.abstract.ema[run.rates[0]])

    def draw(self, state: TrainState, step: int) -> np.ndarray | None:
        """Saves WORKDIR/samples/STEP.png and returns it; None for latents, which need a decoder."""
        run, o = self._run, self._options
        labels = sampling.resolve_labels(self._model, None, run.config.sample.num_samples)
        samples = self._sampler(state.ema[run.rates[0]], labels, jax.random.key(run.config.seed))
        if samples.shape[-1] not in (1, 3) or jax.process_index() > 0:
            return None
        grid = images.image_grid(images.to_uint8(samples))
        metadata = images.provenance(
            model=run.config.model.name,
            step=step,
            seed=run.config.seed,
            labels=labels.tolist(),
            **vars(o),
        )
        images.save_png(run.workdir / "samples" / f"{step:08d}.png", grid, metadata)
        return grid
