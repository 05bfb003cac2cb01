"""What a run shows of itself between its steps: logged metrics, and grids of samples."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import numpy as np

from mdt_jax import images, metrics, sampling, sharding
from mdt_jax.checkpoints import Checkpoints
from mdt_jax.run import Run
from mdt_jax.train_step import TrainState


class NonFiniteLoss(RuntimeError):
    """A loss or gradient norm that is not finite; the message says where to go on."""


class StepLog:
    """Takes each step's metrics one step late, so that the devices never wait for the host.

    Keeps the means since the last log line, writes them, and stops the run at a loss or gradient
    norm that is not finite.
    """

    def __init__(self, run: Run, first_step: int, window: metrics.Window, store: Checkpoints):
        c = run.config
        self._run, self._window, self._store = run, window, store
        self._writer = metrics.MetricsWriter(
            run.workdir, resume_step=first_step, total_steps=c.num_steps
        )
        self._progress = metrics.Progress(c.num_steps, first_step=first_step)
        self._pending: tuple[int, Any] | None = None
        self._since, self._logged_step = time.perf_counter(), first_step

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
                self._store.wait()  # the last good step may still be being written
                last = self._store.latest_step()
                good = "there is no checkpoint yet" if last is None else f"step {last} is saved"
                raise NonFiniteLoss(
                    f"{name} is {values[name]} at step {step}; {good} in {self._run.workdir}. "
                    "Try a lower --config.optimizer.learning_rate, --config.optimizer.clip_norm=1 "
                    "or --config.model.dtype=float32"
                )
        self._window.add(values)
        self._progress.advance(step)
        c = self._run.config
        if step % c.log_every == 0 or step == c.num_steps:
            self._log(step, values["learning_rate"])

    def _log(self, step: int, learning_rate: float) -> None:
        now, run = time.perf_counter(), self._run
        seconds = (now - self._since) / max(step - self._logged_step, 1)
        self._since, self._logged_step = now, step
        # A quartile in which no sample of the window fell has no mean.
        line = {name: mean for name, mean in self._window.means().items() if not math.isnan(mean)}
        line["learning_rate"] = learning_rate
        self._window.reset()
        line |= {"seconds_per_step": seconds, "images_per_second": run.config.batch_size / seconds}
        device = run.mesh.devices.flat[0].device_kind
        dtype = np.dtype(run.model.dtype).name
        used = metrics.mfu(run.step_flops(), seconds, run.mesh.size, device, dtype)
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
        labels = np.resize(np.arange(max(run.model.num_classes, 1)), run.config.sample.num_samples)
        samples = self._sampler(
            state.ema[run.rates[0]], labels.astype(np.int32), jax.random.key(run.config.seed)
        )
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
