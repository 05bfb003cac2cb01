"""A training run: the parts of its step, its compiled steps, saving and restoring its state."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mdt_jax import checkpoints
from mdt_jax import config as config_lib
from mdt_jax.basics import ranges
from mdt_jax.checkpoints import CheckpointError, Checkpoints
from mdt_jax.checkpoints.local import LocalCheckpoints
from mdt_jax.data import ExampleKind, Source, example_spec
from mdt_jax.models import flops
from mdt_jax.models.latent_space import LatentSpace
from mdt_jax.models.masking import KeptTokens
from mdt_jax.parallel import sharding
from mdt_jax.parallel.devices import mfu
from mdt_jax.parallel.host_memory import keep_memory
from mdt_jax.training import checks, optimizers, resumption
from mdt_jax.training.checks import check_settings
from mdt_jax.training.finetune import initial_parameters
from mdt_jax.training.optimizers import learning_rate_of
from mdt_jax.training.programs import StepPrograms
from mdt_jax.training.step import Trainer, TrainState
from mdt_jax.weights import descriptions, pretrained
from mdt_jax.weights.descriptions import latents_of_run


def create_trainer(config: ConfigDict, mesh: jax.sharding.Mesh) -> Trainer:
    """The training step of a config on a mesh; raises ValueError for settings that cannot work."""
    check_settings(config, mesh)
    model = config_lib.create_network(config)
    sharding.check_heads(mesh, model.num_heads)
    schedule = learning_rate_of(config)
    return Trainer(
        model=model,
        diffusion=config_lib.create_diffusion(config),
        optimizer=optimizers.create_optimizer(dict(config.optimizer), schedule, model.frozen),
        schedule=schedule,
        mesh=mesh,
        ema_rates=tuple(config.ema_rates),
        label_dropout=config.label_dropout,
        accumulation_steps=config.accumulation_steps,
        timestep_sampler=config.diffusion.timestep_sampler,
        seed=config.seed,
    )


class Run:
    """One training run: a config's step, mesh and state, in a workdir.

    Attributes:
      config: the settings.
      workdir: the run's folder.
      mesh: the device mesh.
      trainer: the training step.
      model: the network.
      kept_tokens: the numbers of tokens that masked passes keep.
      abstract: shapes, dtypes and shardings of the state.
      rates: the averages' rates as text, which are their names in the state.
      latents: the latents that are trained on, of the encoder that the run or its initial weights
        know; None for pixels, and before `restore`.
      local: this process's own checkpoints, while `keeping_local`; None where there are none.
    """

    local: LocalCheckpoints | None = None

    def __init__(
        self, config: ConfigDict, workdir: str | Path, allowed_changes: Collection[str] = ()
    ):
        """
        Args:
          config: the settings.
          workdir: the run's folder.
          allowed_changes: settings that may be others than the run there was saved with
            (`training.resumption`).

        Raises:
          ValueError: settings that cannot work.
        """
        ranges.check_config(config)
        resumption.check_allowed(allowed_changes)
        self.config, self.workdir = config, Path(workdir)
        self._allowed = frozenset(allowed_changes)
        self.mesh = sharding.create_mesh(**config.mesh)
        self.trainer = create_trainer(config, self.mesh)
        self.model = self.trainer.model
        self.kept_tokens = self.model.kept_tokens(**config.masking)
        checks.check_sampling(config)
        self.abstract = self.trainer.abstract_state()
        self._first = 0  # steps done when the run goes on
        self.latents: LatentSpace | None = None
        self.rates = [str(rate) for rate in config.ema_rates]

    def describe(self) -> str:
        """The run's parameters, memory and work, in lines for a person."""
        c, model = self.config, self.model
        trained = {k: v for k, v in self.abstract.params.items() if k not in model.frozen}
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))
        step_flops = self.step_flops()
        lines = [
            f"model          {c.model.name}: {count:,} trainable parameters, "
            f"{model.num_tokens} tokens, {np.dtype(model.dtype).name}",
            f"devices        {self.mesh.size} × {self.mesh.devices.flat[0].device_kind}, mesh "
            + " × ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items()),
            f"state          {sharding.bytes_per_device(self.abstract) / 2**20:,.1f} MiB a device "
            "(parameters, optimiser, EMA)",
            f"batch          {c.batch_size} ({c.batch_size // sharding.batch_shards(self.mesh)} a "
            f"device, in {c.accumulation_steps} microbatch(es))",
            f"kept tokens    {self.kept_tokens}",
            f"work           {step_flops / 1e12:,.3g} model TFLOP a step",
        ]
        return "\n".join(lines)

    def step_flops(self) -> float:
        """Model FLOPs of a step over the whole batch, at the mean number of kept tokens."""
        return flops.train_step_flops(self.model, self.config.batch_size, self.kept_tokens.mean)

    def utilisation(self, seconds_per_step: float) -> float | None:
        """Model FLOP/s utilisation at a speed; None where the devices' peak is not known."""
        device = self.mesh.devices.flat[0].device_kind
        dtype = np.dtype(self.model.dtype).name
        return mfu(self.step_flops(), seconds_per_step, self.mesh.size, device, dtype)

    def sampled(self, state: TrainState) -> Any:
        """The parameters of a state that are sampled and evaluated: the first average."""
        return state.ema[self.rates[0]]

    def kept(self, step: int) -> int | None:
        """The number of tokens that the masked pass of a step keeps; None without such a pass."""
        return self.kept_tokens.draw(self.config.seed, step)

    def compile_steps(self, source: Source | None = None) -> StepPrograms:
        """Compiles the step of the run's next step, and in a thread those of the later ones.

        Args:
          source: the data, whose batches the steps take; None for batches of model inputs.

        Returns:
          The compiled step by number of kept tokens.
        """
        kind = ExampleKind.INPUTS if source is None else source.kind
        trainer = dataclasses.replace(self.trainer, examples=kind)
        if source is not None and source.latent_space:
            trainer = dataclasses.replace(trainer, latent_space=source.latent_space)
        spec = {
            "image": jax.ShapeDtypeStruct(self.model.image_shape, np.float32),
            "label": jax.ShapeDtypeStruct((), np.int32),
        }
        if source is not None:
            spec = example_spec(source, checks.image_size(self.config, source))
        batch, size = sharding.batch_sharding(self.mesh), self.config.batch_size
        abstract_batch = {
            name: jax.ShapeDtypeStruct((size, *one.shape), one.dtype, sharding=batch)
            for name, one in spec.items()
        }

        def compile_step(count: int | None) -> Callable:
            step = trainer.jit_step(count).lower(self.abstract, abstract_batch).compile()
            keep_memory(step.memory_analysis().temp_size_in_bytes)
            return step

        return StepPrograms(compile_step, self.kept_tokens.in_order(self.config.seed, self._first))

    def restore(
        self, store: Checkpoints, latents: LatentSpace | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and meta data to train from.

        They are those of the newest checkpoint that verifies, a shared one or one that each process
        has for itself; without a checkpoint, a fresh state and {}.

        Args:
          store: the run's checkpoints.
          latents: the latents that are trained on; None for pixels.

        Raises:
          ValueError: the checkpoint is of a run with other settings, the weights of `init_from` do
            not fit, or the state does not fit the devices' memory.
          CheckpointError: no checkpoint can be used.
        """
        checks.check_memory(self.abstract, self.mesh)
        self.latents = latents
        found = self._restore_local(store.latest_step())
        if found is None and store.latest_step() is None:
            return self._fresh_state(latents), {}
        state, meta = found or self._restore_shared(store)
        resumption.tell_changes(self._told_changes(meta), self.workdir, int(state.step))
        began = self._kept_tokens_of(meta)
        if began != self.kept_tokens:
            logging.info("kept tokens    %s, with which the run began", began)
        self.kept_tokens, self._first = began, int(state.step)
        self.latents = _with_known_encoder(latents, latents_of_run(meta))
        return state, meta

    @contextlib.contextmanager
    def keeping_local(self, store: Checkpoints) -> Iterator[None]:
        """A context in which the run has `local` checkpoints, if its config asks for them.

        Those that are not later than the shared ones are removed when it ends without an error.

        Args:
          store: the shared ones, which are open.

        Raises:
          ValueError: `checkpoint.local_dir` is empty.
          OSError: it cannot be made, or not be written to.
        """
        c = self.config.checkpoint
        if not c.local_every:
            yield
            return
        if not c.local_dir:
            raise ValueError("checkpoint.local_dir is empty; name a folder of each machine's own")
        self.local = LocalCheckpoints(c.local_dir, self.workdir)
        try:
            yield
            self.local.remove(store.latest_step())
        finally:
            self.local.close()
            self.local = None

    def _restore_local(self, after: int | None) -> tuple[TrainState, dict[str, Any]] | None:
        """What every process holds for itself; None where that is no later than a shared step."""
        step = self.local.newest(self.abstract, after) if self.local else None
        if self.local is None or step is None:
            return None
        self._check_same_run(self.local.read_meta(step))
        logging.info("step %d is restored from local checkpoints", step)
        return self.local.restore(step, self.abstract)

    def _restore_shared(self, store: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
        items = self._saved_items(store)
        try:
            return self._restore_items(store, items)
        except CheckpointError:
            # The newest may have been damaged and set aside. The one before may be of converted
            # weights, and hold other items.
            if (before := self._saved_items(store)) == items:
                raise
            return self._restore_items(store, before)

    def _kept_tokens_of(self, meta: dict[str, Any]) -> KeptTokens:
        """The numbers of kept tokens that a checkpoint's run began with; else the config's."""
        if "weights" in meta or not self.kept_tokens.counts:
            return self.kept_tokens
        if any(change.key.startswith("masking.") for change in self._changes(meta)):
            return self.kept_tokens
        if "kept_tokens" in meta:
            return KeptTokens.from_json(meta["kept_tokens"])
        # A run from before there were four at the most.
        return KeptTokens.of_ratio(
            self.model.num_tokens,
            self.config.masking.ratio,
            self.config.masking.ratio_span,
            at_most=None,
        )

    def _saved_items(self, store: Checkpoints) -> list[str]:
        """The items of the newest checkpoint that hold a state; checks its settings first."""
        # Settings come before arrays: those of another model would not fit. `store.restore` reports
        # damage.
        with contextlib.suppress(CheckpointError):
            meta = checkpoints.read_meta(self.workdir, store.latest_step())[1]
            self._check_same_run(meta)
            if "weights" in meta:
                return meta["weights"]["items"]
        return ["state"]

    def _restore_items(
        self, store: Checkpoints, items: list[str]
    ) -> tuple[TrainState, dict[str, Any]]:
        if "state" not in items:
            return self._restore_weights(store, items)
        averages = {f"ema_{rate}": self.abstract.ema[rate] for rate in self.rates}
        _, restored, meta = store.restore({"state": self.abstract.replace(ema={}), **averages})
        self._check_same_run(meta)
        ema = {rate: restored[f"ema_{rate}"] for rate in self.rates}
        return restored["state"].replace(ema=ema), meta

    def _restore_weights(
        self, store: Checkpoints, items: list[str]
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state that starts with converted weights, which have no optimiser state."""
        step, restored, meta = store.restore(dict.fromkeys(sorted(items), self.abstract.params))
        (average,) = (item for item in items if item.startswith("ema_"))
        params = restored.get("params", restored[average])
        logging.info("starting from converted weights (%s)", meta["weights"]["source"])
        return self.trainer.start_from(params, restored[average], step), meta

    def _fresh_state(self, latents: LatentSpace | None) -> TrainState:
        """The state at step 0: as initialised, or from the weights that `init_from` names."""
        if not self.config.init_from:
            return self.trainer.create_state()
        create = self.trainer.create_parameters
        params, known = initial_parameters(self.config, self.model, create, latents)
        self.latents = _with_known_encoder(latents, known)
        return self.trainer.start_from(pretrained.place_parameters(params, self.abstract.params))

    def _check_same_run(self, meta: dict[str, Any]) -> None:
        """Refuses, with ValueError, to go on with a checkpoint of another run."""
        if "weights" not in meta:
            resumption.check_changes(self._changes(meta), self.workdir, self._allowed)
            return
        # Of converted weights only their network and process are known.
        saved = config_lib.from_json(meta["config"])
        changed = self._other_model(saved)
        rates = [str(rate) for rate in saved.ema_rates]
        if "state" in meta["weights"]["items"]:
            before, now = saved.optimizer.name, self.config.optimizer.name
            if optimizers.MOMENTS.get(before) != optimizers.MOMENTS[now]:
                changed.append(f"optimizer.name: {before}, now {now}")
            if rates != self.rates:
                changed.append(f"ema_rates: {', '.join(rates)}, now {', '.join(self.rates)}")
        if self.config.init_from:
            raise ValueError(
                f"{self.workdir} holds converted weights ({meta['weights']['source']}), so "
                f"init_from {self.config.init_from} has no use there; give one of the two"
            )
        if changed:
            raise ValueError(
                f"{self.workdir} holds a run with other settings ({'; '.join(changed)}); "
                "give this one another --workdir"
            )

    def _changes(self, meta: dict[str, Any]) -> list[resumption.Change]:
        """The settings that are others than a checkpoint's."""
        # A config of today has defaults for settings newer than the run, which are no difference.
        saved = config_lib.from_json(meta["config"])
        return resumption.changes(saved, self.config)

    def _told_changes(self, meta: dict[str, Any]) -> list[resumption.Change]:
        """The changes that a person is told of when the run goes on from a checkpoint."""
        found = self._changes(meta)
        if "weights" not in meta:
            return found
        # Of a run from PyTorch only its optimiser is known, as far as its state says.
        known = "state" in meta["weights"]["items"]
        return [
            change
            for change in found
            if known and change.key.startswith("optimizer.") and None not in change
        ]

    def _other_model(self, saved: ConfigDict) -> list[str]:
        """Changes of network and process since a saved config, as "key: old, now new"."""
        ours = dataclasses.asdict(descriptions.architecture_of(self.model))
        theirs = descriptions.architecture_of(config_lib.create_network(saved))
        theirs = dataclasses.asdict(theirs)
        pairs = [(f"model.{key}", theirs[key], ours[key]) for key in ours]
        pairs += [
            (f"diffusion.{key}", saved.diffusion[key], self.config.diffusion[key])
            for key in ("schedule", "num_timesteps", "prediction", "variance")
        ]
        return [f"{key}: {before}, now {now}" for key, before, now in pairs if before != now]

    def save(self, store: Checkpoints, state: TrainState, step: int, meta: dict) -> None:
        """Starts saving a state; its averages are checkpoint items of their own."""
        averages = {f"ema_{rate}": state.ema[rate] for rate in self.rates}
        store.save(step, {"state": state.replace(ema={}), **averages}, meta)


def _with_known_encoder(
    latents: LatentSpace | None, before: LatentSpace | None
) -> LatentSpace | None:
    """The latents that are trained on, of the encoder that was known before if theirs is not."""
    if latents is None or before is None or latents.digest:
        return latents
    return dataclasses.replace(latents, digest=before.digest, autoencoder=before.autoencoder)
