"""Periodic work between two training steps: grids of samples, checkpoints, judgements.

`mdt_jax.training.profiling` has one more, the trace. After every step the training loop calls the
actions that are due, in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import jax
import numpy as np
from absl import logging

from mdt_jax import config as config_lib
from mdt_jax import sampling
from mdt_jax.basics.atomic import is_full_disk
from mdt_jax.checkpoints import Checkpoints, SaveError
from mdt_jax.data import Source
from mdt_jax.diffusion.seeds import key_of
from mdt_jax.parallel import sharding
from mdt_jax.parallel.command import one_line
from mdt_jax.parallel.preemption import Stop
from mdt_jax.sampling import images
from mdt_jax.training import checks, run_evaluation
from mdt_jax.training.run import Run
from mdt_jax.training.run_evaluation import RunEvaluator
from mdt_jax.training.step import TrainState
from mdt_jax.training.step_log import StepLog


class Action(Protocol):
    """Periodic work between two steps that is not training; it pauses the run's clock."""

    def due(self, step: int) -> bool:
        """Whether the action is to be called once `step` steps are done."""

    def __call__(self, step: int, state: TrainState, log: StepLog) -> None:
        """Does the work; all processes call it alike.

        Args:
          step: steps done.
          state: the state after them.
          log: the run's log, whose clock the action pauses and to which it may write.
        """


class GridSampler:
    """Draws a grid of EMA samples every `config.sample.every` steps; compiled when made.

    Latents are decoded by the autoencoder of `config.eval.vae`.
    """

    def __init__(self, run: Run, source: Source, stop: Stop):
        self._run, self._stop = run, stop
        # First of all: another autoencoder is refused before minutes of compiling.
        self._autoencoder = run_evaluation.load_decoder(run, source) if source.latents else None
        self._model = sampling.DiffusionModel.from_config(
            run.config, source.class_names, latents=source.latent_space
        )
        shards = sharding.batch_shards(run.mesh)
        size = -(-run.config.sample.num_samples // shards) * shards
        self._options = sampling.resolve_options(self._model)
        self._sampler = sampling.CompiledSampler(self._model, run.mesh, size, self._options)
        self._sampler.warm_up(run.sampled(run.abstract))

    @classmethod
    def asked_for(cls, run: Run, source: Source, stop: Stop) -> GridSampler | None:
        """The sampler of a run's grids; None if its config asks for none, or cannot show them."""
        config = run.config
        if config.sample.every and source.latents and not config.eval.vae:
            logging.warning("no grids: samples are latents; eval.vae names what decodes them")
            return None
        return cls(run, source, stop) if config.sample.every else None

    def due(self, step: int) -> bool:
        """Whether a grid is drawn after a step; not where the run stops early."""
        return step % self._run.config.sample.every == 0 and not self._stop.stopping

    def __call__(self, step: int, state: TrainState, log: StepLog) -> None:
        """Draws a grid, saves it as a file and adds it to TensorBoard."""
        with log.paused("evaluate"):
            grid = None
            with tolerate_full_disk():
                grid = self._draw(state, step)
            if grid is not None:
                log.image(step, "samples", grid)

    def _draw(self, state: TrainState, step: int) -> np.ndarray | None:
        """Saves WORKDIR/samples/STEP.png and returns it; None where another process does."""
        run, o = self._run, self._options
        labels = sampling.resolve_labels(self._model, None, run.config.sample.num_samples)
        key = key_of(run.config.seed, "seed")
        samples = self._sampler(run.sampled(state), labels, key)
        try:
            sampling.check_samples(samples, 0, run.sampled(state))
        except ValueError as error:
            logging.warning("step %d: %s; no grid is drawn", step, error)
            return None
        if self._autoencoder:
            samples = self._autoencoder.decode(samples, run_evaluation.DECODED_AT_ONCE)
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


class CheckpointSaver:
    """Saves the state periodically, before each judgement, and at the run's last step.

    No state is saved whose loss is not finite.
    """

    def __init__(
        self,
        run: Run,
        source: Source,
        store: Checkpoints,
        stop: Stop,
        *,
        first_step: int = 0,
        position: int = 0,
    ):
        """
        Args:
          run: the run.
          source: its data.
          store: its checkpoints.
          stop: says whether the run stops early.
          first_step: steps done before.
          position: examples used before the first step.
        """
        self._run, self._store, self._stop = run, store, stop
        self._data = checks.data_record(source, run.latents)
        self._first_step, self._position = first_step, position

    def check(self) -> None:
        """Warns if the last checkpoint could not be written; see `tolerate_full_disk`."""
        with tolerate_full_disk():
            self._store.check()

    def due(self, step: int) -> bool:
        """Whether the state is saved after a step.

        A step to be judged is saved first, so that nothing is lost while it is judged.
        """
        return self._is_shared(step) or self._is_local(step)

    def _is_shared(self, step: int) -> bool:
        c = self._run.config
        periodic = step % c.checkpoint_every == 0
        return periodic or self._is_last(step) or run_evaluation.judgement_is_due(c, step)

    def _is_local(self, step: int) -> bool:
        """Whether each process also keeps a step for itself; not the last, which is soon shared."""
        local = self._run.local is not None and not self._is_last(step)
        return local and step % self._run.config.checkpoint.local_every == 0

    def __call__(self, step: int, state: TrainState, log: StepLog) -> None:
        """Starts to save the state, with the meta data that a resumed run needs.

        Raises:
          SaveError: the state cannot be saved and this is the run's last step.
        """
        c, done = self._run.config, step - self._first_step
        with log.paused("checkpoint"):
            meta = {
                "config": config_lib.to_json(c),
                **self._data,
                "kept_tokens": self._run.kept_tokens.to_json(),
                "position": self._position + done * c.batch_size,
                **log.state(),
            }
            if self._run.local is not None and self._is_local(step):
                self._run.local.save(step, state, meta)
            if not self._is_shared(step):
                return
            with tolerate_full_disk():
                self._store.wait()
            with contextlib.nullcontext() if self._is_last(step) else tolerate_full_disk():
                self._run.save(self._store, state, step, meta)

    def _is_last(self, step: int) -> bool:
        return self._stop.stopping or step == self._run.config.num_steps


class SampleJudge:
    """Judges samples every `config.eval_every` steps and writes the metrics found as a line."""

    def __init__(self, run: Run, evaluator: RunEvaluator, stop: Stop):
        self._config, self._evaluator, self._stop = run.config, evaluator, stop

    def due(self, step: int) -> bool:
        """Whether samples are judged after a step; not where the run stops early."""
        return run_evaluation.judgement_is_due(self._config, step) and not self._stop.stopping

    def __call__(self, step: int, state: TrainState, log: StepLog) -> None:
        """Judges samples and writes a line; gives up if the run is asked to stop meanwhile."""
        with log.paused("evaluate"):
            found = self._evaluator.judge(state, self._stop.requested)
            if found is None:
                return
            log.write(step, found.metrics, {"evaluator": found.evaluator})
        if jax.process_index() == 0:
            logging.info("step %d: %s", step, found.describe())


@contextlib.contextmanager
def tolerate_full_disk() -> Iterator[None]:
    """A context that warns of what could not be written, instead of ending the run.

    The run tries again at the next checkpoint, or the next grid. In a job of several processes the
    error ends it: the processes that wrote their part would wait for the one that could not.
    """
    try:
        yield
    except SaveError as error:
        if jax.process_count() > 1:
            raise
        logging.warning("%s; training goes on, to be saved at the next checkpoint", error)
    except OSError as error:
        if jax.process_count() > 1 or not is_full_disk(error):
            raise
        logging.warning("%s; training goes on", one_line(error))
