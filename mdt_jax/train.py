"""Trains a model: `python -m mdt_jax.train --config configs/digits.py --workdir runs/digits`.

The same command again resumes the run. `--config.KEY=VALUE` changes a setting, `--dry_run` shows
what would be trained and stops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mdt_jax import (
    checkpoints,
    flops,
    images,
    masking,
    metrics,
    optimizers,
    pretrained,
    sampling,
    sharding,
)
from mdt_jax import config as config_lib
from mdt_jax.checkpoints import CheckpointError, Checkpoints
from mdt_jax.data import Source, create_batches, create_source, example_spec, prefetch_to_device
from mdt_jax.distributed import initialize_distributed
from mdt_jax.finetune import initial_parameters
from mdt_jax.train_step import Trainer, TrainState


class NonFiniteLoss(RuntimeError):
    """A loss or gradient norm that is not finite; the message says where to go on."""


def create_trainer(config: ConfigDict, mesh: jax.sharding.Mesh) -> Trainer:
    """The training step's parts from a config; ValueError for what cannot work."""
    config_lib.check(config, mesh)
    model = config_lib.create_network(config)
    sharding.check_heads(mesh, model.num_heads)
    schedule = config_lib.create_schedule(config)
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
    """One training run: its parts, built and checked in the order in which they can fail."""

    def __init__(self, config: ConfigDict, workdir: str | Path):
        self.config, self.workdir = config, Path(workdir)
        self.mesh = sharding.create_mesh(**config.mesh)
        self.trainer = create_trainer(config, self.mesh)
        self.model = self.trainer.model
        self.counts, self.probabilities = config_lib.kept_counts(config, self.model)
        sampling.resolve_options(sampling.DiffusionModel.from_config(config))
        self.abstract = self.trainer.abstract_state()
        self.rates = [str(rate) for rate in config.ema_rates]

    def describe(self) -> str:
        """Parameters, memory and work of the run, for a person."""
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
            f"kept tokens    {', '.join(map(str, self.counts))}"
            if self.counts[0] is not None
            else "kept tokens    no masked pass",
            f"work           {step_flops / 1e12:,.3g} model TFLOP a step",
        ]
        return "\n".join(lines)

    def step_flops(self) -> float:
        """Model FLOPs of a step, at the mean number of kept tokens."""
        if self.counts[0] is None:
            return flops.train_step_flops(self.model, self.config.batch_size)
        mean = float(np.dot(self.counts, self.probabilities))
        return flops.train_step_flops(self.model, self.config.batch_size, mean)

    def kept(self, step: int) -> int | None:
        """How many tokens the masked pass of a step keeps."""
        if self.counts[0] is None:
            return None
        return masking.draw_kept_count(self.counts, self.probabilities, self.config.seed, step)

    def compile_steps(self, source: Source | None = None) -> dict[int | None, Callable]:
        """The compiled step of every number of kept tokens, so that none is compiled later.

        They take what the pipeline makes of a source's examples; without one, the model's inputs.
        """
        spec = {
            "image": jax.ShapeDtypeStruct(self.model.image_shape, np.float32),
            "label": jax.ShapeDtypeStruct((), np.int32),
        }
        if source is not None:
            spec = example_spec(source, _image_size(self.config, source))
        batch, size = sharding.batch_sharding(self.mesh), self.config.batch_size
        abstract_batch = {
            name: jax.ShapeDtypeStruct((size, *one.shape), one.dtype, sharding=batch)
            for name, one in spec.items()
        }
        lowered = [
            self.trainer.jit_step(n).lower(self.abstract, abstract_batch) for n in self.counts
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(lambda step: step.compile(), lowered)
            return dict(zip(self.counts, compiled, strict=True))

    def restore(self, store: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint that verifies, or a fresh state and empty meta data.

        Raises ValueError if the checkpoint is of a run with other settings.
        """
        if store.latest_step() is None:
            return self._fresh_state(), {}
        items = self._saved_items()
        try:
            return self._restore_items(store, items)
        except CheckpointError:
            # The newest may have been damaged and set aside, and the one before it converted.
            if (before := self._saved_items()) == items:
                raise
            return self._restore_items(store, before)

    def _saved_items(self) -> list[str]:
        """What the newest checkpoint holds of a state, once its settings are found to be ours."""
        # Before any array: those of another model would not fit. Damage is `store.restore`'s.
        with contextlib.suppress(CheckpointError):
            meta = checkpoints.read_meta(self.workdir)[1]
            self._check_settings(meta)
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
        self._check_settings(meta)
        ema = {rate: restored[f"ema_{rate}"] for rate in self.rates}
        return restored["state"].replace(ema=ema), meta

    def _restore_weights(
        self, store: Checkpoints, items: list[str]
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state that converted weights start with: they came without an optimiser's."""
        step, restored, meta = store.restore(dict.fromkeys(sorted(items), self.abstract.params))
        (average,) = (item for item in items if item.startswith("ema_"))
        params = restored.get("params", restored[average])
        logging.info("starting from converted weights (%s)", meta["weights"]["source"])
        return self.trainer.start_from(params, restored[average], step), meta

    def _fresh_state(self) -> TrainState:
        """The state at step 0: as initialised, or from the weights that `init_from` names."""
        if not self.config.init_from:
            return self.trainer.create_state()
        params = initial_parameters(self.config, self.model, self.trainer.create_parameters)
        return self.trainer.start_from(pretrained.place(params, self.abstract.params))

    def _check_settings(self, meta: dict[str, Any]) -> None:
        """Refuses, with ValueError, to go on with what is another run."""
        # Through a config of today's, so that a setting newer than the run is not a difference.
        saved = config_lib.from_json(meta["config"])
        if "weights" in meta:  # converted: of its settings only the network and process are known
            changed = self._other_model(saved)
            rates = [str(rate) for rate in saved.ema_rates]
            if "state" in meta["weights"]["items"]:
                self._warn_of_other_optimizer(saved)
                if rates != self.rates:
                    changed.append(f"ema_rates: {', '.join(rates)}, now {', '.join(self.rates)}")
            if self.config.init_from:
                raise ValueError(
                    f"{self.workdir} holds converted weights ({meta['weights']['source']}), so "
                    f"init_from {self.config.init_from} has no use there; give one of the two"
                )
        else:
            changed = config_lib.differences(
                config_lib.to_json(saved), config_lib.to_json(self.config)
            )
        if changed:
            raise ValueError(
                f"{self.workdir} holds a run with other settings ({'; '.join(changed)}); "
                "give this one another --workdir"
            )

    def _warn_of_other_optimizer(self, saved: ConfigDict) -> None:
        """A moved run's settings are known, but the config's are what is used from here on."""
        for key, before in saved.optimizer.items():
            if (now := self.config.optimizer[key]) != before and None not in (now, before):
                logging.warning("optimizer.%s was %s in the moved run, is %s now", key, before, now)

    def _other_model(self, saved: ConfigDict) -> list[str]:
        """How the network and the process differ from those of a config, in words."""
        ours = dataclasses.asdict(pretrained.architecture_of(self.model))
        theirs = pretrained.architecture_of(config_lib.create_network(saved))
        theirs = dataclasses.asdict(theirs)
        pairs = [(f"model.{key}", theirs[key], ours[key]) for key in ours]
        pairs += [
            (f"diffusion.{key}", saved.diffusion[key], self.config.diffusion[key])
            for key in ("schedule", "num_timesteps", "prediction", "variance")
        ]
        return [f"{key}: {before}, now {now}" for key, before, now in pairs if before != now]

    def save(self, store: Checkpoints, state: TrainState, step: int, meta: dict) -> None:
        """Starts saving a state whose loss was seen finite; the averages are items of their own."""
        averages = {f"ema_{rate}": state.ema[rate] for rate in self.rates}
        store.save(step, {"state": state.replace(ema={}), **averages}, meta)


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


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains, or goes on training, to config.num_steps and returns the final state.

    Raises:
      ValueError: settings that cannot work, or a workdir of another run.
      CheckpointError: no checkpoint of the workdir can be used.
      NonFiniteLoss: the loss or the gradient norm stopped being finite.
    """
    config = _count_classes(config)
    run = Run(config, workdir)
    source = create_source(config.data)
    _check_source(config, source)
    logging.info("%s", "\n" + run.describe())
    logging.info("data           %s", source.describe())
    logging.info("epoch          %s steps", f"{len(source) / config.batch_size:,.1f}")
    with contextlib.closing(
        Checkpoints(workdir, keep_last=config.keep_last, keep_every=config.keep_every)
    ) as store:
        return _train(run, source, store)


def _train(run: Run, source: Any, store: Checkpoints) -> TrainState:
    config = run.config
    state, meta = run.restore(store)
    _check_same_data(meta, source, run.workdir)
    first = int(state.step)
    if first >= config.num_steps:
        logging.info("%s is trained already: step %d of %d", run.workdir, first, config.num_steps)
        return state
    if first:
        logging.info("resuming %s from step %d", run.workdir, first)
    if jax.process_index() == 0:
        run.workdir.mkdir(parents=True, exist_ok=True)
        (run.workdir / "config.json").write_text(json.dumps(config_lib.to_json(config), indent=2))

    began = time.perf_counter()
    logging.info("compiling %d step(s), one for each number of kept tokens", len(run.counts))
    steps = run.compile_steps(source)
    sampler = GridSampler(run, source.class_names) if config.sample.every else None
    logging.info("compiled in %.1f s", time.perf_counter() - began)

    position = meta.get("position", 0)
    window = metrics.Window.from_state(meta["window"]) if meta else metrics.Window()
    log = StepLog(run, first, window, store)
    with contextlib.closing(log), _batches(run, source, position) as batches:
        for step in range(first + 1, config.num_steps + 1):
            state, values = steps[run.kept(step - 1)](state, next(batches))
            log.add(step, values)
            position += config.batch_size
            if sampler and step % config.sample.every == 0:
                log.settle()
                grid = sampler.draw(state, step)
                if grid is not None:
                    log.image(step, "samples", grid)
            if step % config.checkpoint_every == 0 or step == config.num_steps:
                log.settle()  # no step is committed before its loss was seen finite
                meta = {
                    "config": config_lib.to_json(config),
                    "class_names": list(source.class_names),
                    "num_examples": len(source),
                    "autoencoder": _autoencoder(source),
                    "position": position,
                    "window": window.state(),
                }
                run.save(store, state, step, meta)
    logging.info(
        "done; to sample: python -m mdt_jax.sample --workdir %s --output %s",
        run.workdir,
        run.workdir / "picture",
    )
    return state


@contextlib.contextmanager
def _batches(run: Run, source: Any, position: int) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """The run's batches on the devices, from an example on."""
    config = run.config
    block, blocks = sharding.batch_rows(run.mesh, config.batch_size)
    batches = create_batches(
        source,
        global_batch_size=config.batch_size,
        seed=config.seed,
        process_index=block,
        process_count=blocks,
        flip=config.data.flip,
        image_size=_image_size(config, source),
        position=position,
        num_workers=config.data.num_workers,
        read_ahead=config.data.read_ahead,
        crop=config.data.crop,
        on_bad_image=config.data.on_bad_image,
        max_bad_fraction=config.data.max_bad_fraction,
    )
    with batches, prefetch_to_device(batches, sharding.batch_sharding(run.mesh)) as on_device:
        yield on_device


def _autoencoder(source: Source) -> str | None:
    """The digest of the encoder that made a cache of latents, None for other sources."""
    return getattr(getattr(source.records, "description", None), "vae_digest", None)


def _check_same_data(meta: dict[str, Any], source: Source, workdir: Path) -> None:
    """Refuses, with ValueError, to go on with other classes or another autoencoder's latents."""
    if not meta or "weights" in meta:  # a fresh run, or weights whose data nobody knows
        return
    way_out = "give the data it was trained on as data.path, or another --workdir"
    names = zip_longest(meta["class_names"], source.class_names)
    for label, (before, now) in enumerate(names):
        if before != now:
            raise ValueError(
                f"{source.name}: class {label} is {now!r}, and was {before!r} when {workdir} was "
                f"trained; {way_out}"
            )
    before, now = meta.get("autoencoder"), _autoencoder(source)
    if before and now and before != now:
        raise ValueError(
            f"{source.name}: encoded by another autoencoder ({now[:12]}) than the latents that "
            f"{workdir} was trained on ({before[:12]}); {way_out}"
        )
    if (count := meta.get("num_examples", len(source))) != len(source):
        logging.warning(
            "%s: %d examples, and %d when the run was last saved: the rest of this epoch is of "
            "another order",
            source.name,
            len(source),
            count,
        )


def _image_size(config: ConfigDict, source: Source) -> int | None:
    """What images are cropped to; latents are not."""
    return None if source.latents else config.model.input_size


def _count_classes(config: ConfigDict) -> ConfigDict:
    """The config with its data's number of classes, if it asks for that."""
    if config.model.num_classes != -1:
        return config
    return config_lib.resolve_classes(config, create_source(config.data).class_names)


def _check_source(config: ConfigDict, source: Any) -> None:
    """Refuses data that the model does not take, with ValueError."""
    size, channels = config.model.input_size, config.model.in_channels
    wanted, given = (size, size, channels), tuple(source.image_shape)
    # Images are cropped to size, latents are not.
    if given != wanted if source.latents else given[-1] != channels:
        raise ValueError(
            f"data.name {config.data.name!r} gives {given}, the model takes {wanted}: "
            "set model.input_size and model.in_channels"
        )
    classes = config.model.num_classes
    if classes and len(source.class_names) > classes:
        raise ValueError(
            f"the data have {len(source.class_names)} classes, model.num_classes is {classes}"
        )
    if classes and not source.class_names:
        raise ValueError(
            f"the data have no labels ({source.note or source.name}); model.num_classes is "
            f"{classes}, 0 would do, or data.labels 'file_names'"
        )


def dry_run(config: ConfigDict) -> str:
    """What `--dry_run` prints: the run, and its data if they are there."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # told of below
        config = _count_classes(config)
    if config.model.num_classes == -1:
        config = config_lib.resolve_classes(config, ())
    run = Run(config, "")
    try:
        source = create_source(config.data)
    except (FileNotFoundError, ValueError) as error:  # the latter without a data.path
        data = f"not there: {error}"
    else:
        _check_source(config, source)
        steps = len(source) / config.batch_size
        data = f"{source.describe()}, {steps:,.1f} steps an epoch"
    return f"{run.describe()}\ndata           {data}"


def main(_: list[str]) -> None:
    """The command: one clear line and exit status 1 for what a user can mend."""
    try:
        initialize_distributed()
        config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
        if flags.FLAGS.dry_run:
            print(dry_run(config))
        elif not workdir:
            raise ValueError(
                "--workdir is missing: the folder for checkpoints, metrics and samples"
            )
        else:
            train(config, workdir)
    except (ValueError, OSError, CheckpointError, NonFiniteLoss) as error:
        if logging.level_debug():
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser; a --config or --config.KEY that is not there ends in one clear line."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag in ("--config", "-config") or flag.startswith("--config="):
            path = Path((flag.partition("=")[2] or value).split(":")[0])
            if not path.is_file():
                there = ", ".join(map(str, sorted(Path("configs").glob("*.py"))))
                sys.exit(
                    f"error: --config {path} is not there; "
                    + (f"there are {there}" if there else "run from the root of the clone")
                )
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        # ml_collections quotes the message of one exception in the next.
        said = str(error.args[0]).replace("\\n", " ").replace("\\", "").replace("'", "")
        sys.exit(f"error: --config has no such key: {' '.join(said.split())}")


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.")
    flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and samples go.")
    flags.DEFINE_bool("dry_run", False, "Show parameters, memory and data, and stop.")
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
