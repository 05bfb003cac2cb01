"""Trains a model: `python -m mdt_jax.train --config configs/digits.py --workdir runs/digits`.

The same command again resumes the run. `--config.KEY=VALUE` changes a setting, `--dry_run` shows
what would be trained and stops. SIGTERM, SIGUSR1 and `--max_hours` save a checkpoint and end it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mdt_jax import config as config_lib
from mdt_jax.checkpoints import CheckpointError, Checkpoints, SaveError
from mdt_jax.data import BatchIterator, create_batches, create_source, prefetch_to_device
from mdt_jax.parallel import sharding
from mdt_jax.parallel.compilation_cache import use_compilation_cache
from mdt_jax.parallel.distributed import ending_together, initialize_distributed
from mdt_jax.parallel.preemption import Stop
from mdt_jax.training import checks, metrics, run_evaluation
from mdt_jax.training.monitors import GridSampler, NonFiniteLoss, StepLog
from mdt_jax.training.profiling import StepProfiler
from mdt_jax.training.run import Run
from mdt_jax.training.run_evaluation import RunEvaluator
from mdt_jax.training.step import TrainState


def train(config: ConfigDict, workdir: str | Path, max_hours: float | None = None) -> TrainState:
    """Trains, or goes on training, to config.num_steps and returns the final state.

    Asked to stop before (see `mdt_jax.parallel.preemption`), it saves and returns the state so far.

    Args:
      config: the settings.
      workdir: where checkpoints, metrics and samples go.
      max_hours: after which to stop; None for no limit.

    Raises:
      ValueError: settings that cannot work, a workdir of another run, or processes that differ.
      CheckpointError: no checkpoint of the workdir can be used, another run is using it, or the
        last checkpoint could not be written.
      NonFiniteLoss: the loss or the gradient norm stopped being finite.
    """
    with Stop(max_hours) as stop:
        config = checks.count_classes(config)
        run = Run(config, workdir)
        source = create_source(config.data)
        checks.check_source(config, source)
        checks.check_processes(config, source)
        run_evaluation.check(config, source)
        logging.info("%s", "\n" + run.describe())
        logging.info("data           %s", source.describe())
        logging.info("epoch          %s steps", f"{len(source) / config.batch_size:,.1f}")
        keep = {"keep_last": config.keep_last, "keep_every": config.keep_every}
        with Checkpoints(workdir, **keep) as store:
            return _train(run, source, store, stop)


def _train(run: Run, source: Any, store: Checkpoints, stop: Stop) -> TrainState:
    config = run.config
    state, meta = run.restore(store, source.autoencoder_digest)
    checks.check_same(meta, source, run.workdir)
    first = int(state.step)
    owed = run_evaluation.is_owed(config, run.workdir, first)
    if first >= config.num_steps and not owed:
        logging.info("%s is trained already: step %d of %d", run.workdir, first, config.num_steps)
        return state
    if first:
        logging.info("resuming %s from step %d", run.workdir, first)
    _write_config(run)

    evaluator = RunEvaluator(run, source) if config.eval_every else None
    began = time.perf_counter()
    logging.info("compiling %d step(s), one for each number of kept tokens", len(run.counts))
    with ThreadPoolExecutor(1) as background:  # a compilation alone does not fill the processors
        compiling = background.submit(run.compile_steps, source)
        sampler = GridSampler(run, source.class_names) if config.sample.every else None
        if evaluator:
            evaluator.compile()
        steps = compiling.result()
    compile_seconds = time.perf_counter() - began
    logging.info("compiled in %.1f s", compile_seconds)
    stop.ready()

    if stop.requested():
        return state
    position = meta.get("position", 0)
    window = metrics.Window.from_state(meta["window"]) if meta else metrics.Window()
    log = StepLog(run, first, window, store, meta.get("train_seconds", 0.0), compile_seconds)
    profiler = StepProfiler(run.workdir, config.profile_steps)
    with (
        contextlib.closing(log),
        contextlib.closing(profiler),
        _batches(run, source, position) as (batches, on_device),
    ):
        if owed and not log.judge(first, evaluator, state, stop):
            return state
        for step in range(first + 1, config.num_steps + 1):
            with log.times.waiting():
                batch = next(on_device)
            with profiler.step(step):
                state, values = steps[run.kept(step - 1)](state, batch)
            log.skipped_images = batches.num_skipped
            log.add(step, values)
            if profiler.ends(step):
                log.settle()
                with log.watch.paused():
                    profiler.write(values)
            position += config.batch_size
            with _tolerating_a_full_disk():
                store.check()
            stopping = stop.requested()
            if sampler and step % config.sample.every == 0 and not stopping:
                log.settle()
                with log.watch.paused():
                    grid = sampler.draw(state, step)
                    if grid is not None:
                        log.image(step, "samples", grid)
            last = stopping or step == config.num_steps
            judged = evaluator is not None and evaluator.due(step)
            # A step to be judged is saved first, so that nothing is lost in the meantime.
            if last or judged or step % config.checkpoint_every == 0:
                log.settle()  # no step is committed before its loss was seen finite
                meta = {
                    "config": config_lib.to_json(config),
                    "class_names": list(source.class_names),
                    "num_examples": len(source),
                    "autoencoder": source.autoencoder_digest,
                    "position": position,
                    "window": window.state(),
                    "train_seconds": log.watch.seconds,
                }
                with log.watch.paused():
                    with _tolerating_a_full_disk():
                        store.wait()
                    with contextlib.nullcontext() if last else _tolerating_a_full_disk():
                        run.save(store, state, step, meta)
            if judged and not stopping:
                stopping = not log.judge(step, evaluator, state, stop)
            if stopping:
                store.wait()
                logging.info("stopped at step %d, saved; the same command resumes", step)
                return state
    store.wait()
    logging.info(
        "done; to sample: python -m mdt_jax.sample --workdir %s --output %s",
        run.workdir,
        run.workdir / "picture",
    )
    return state


def _write_config(run: Run) -> None:
    if jax.process_index() == 0:
        run.workdir.mkdir(parents=True, exist_ok=True)
        aside = run.workdir / "config.json.tmp"
        aside.write_text(json.dumps(config_lib.to_json(run.config), indent=2))
        aside.replace(run.workdir / "config.json")


@contextlib.contextmanager
def _tolerating_a_full_disk() -> Iterator[None]:
    """A checkpoint that could not be written ends no run that can try again at the next.

    Several processes end: those that could write their part wait for the one that could not.
    """
    try:
        yield
    except SaveError as error:
        if jax.process_count() > 1:
            raise
        logging.warning("%s; training goes on, to be saved at the next checkpoint", error)


@contextlib.contextmanager
def _batches(
    run: Run, source: Any, position: int
) -> Iterator[tuple[BatchIterator, Iterator[dict[str, jax.Array]]]]:
    """The run's batches, from an example on, and the same on the devices."""
    config = run.config
    parts, num_parts = sharding.batch_parts(run.mesh)
    batches = create_batches(
        source,
        global_batch_size=config.batch_size,
        seed=config.seed,
        process_index=parts,
        process_count=num_parts,
        flip=config.data.flip,
        image_size=checks.image_size(config, source),
        position=position,
        num_workers=config.data.num_workers,
        read_ahead=config.data.read_ahead,
        crop=config.data.crop,
        on_bad_image=config.data.on_bad_image,
        max_bad_fraction=config.data.max_bad_fraction,
    )
    with batches, prefetch_to_device(batches, sharding.batch_sharding(run.mesh)) as on_device:
        yield batches, on_device


def dry_run(config: ConfigDict) -> str:
    """What `--dry_run` prints: the run, and its data if they are there."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # told of below
        config = checks.count_classes(config)
    if config.model.num_classes == -1:
        config = config_lib.resolve_classes(config, ())
    run = Run(config, "")
    try:
        source = create_source(config.data)
    except (FileNotFoundError, ValueError) as error:  # the latter without a data.path
        data = f"not there: {error}"
    else:
        checks.check_source(config, source)
        run_evaluation.check(config, source)
        steps = len(source) / config.batch_size
        data = f"{source.describe()}, {steps:,.1f} steps an epoch"
    return f"{run.describe()}\ndata           {data}"


def main(_: list[str]) -> None:
    """The command: one clear line and exit status 1 for what a user can mend."""
    with ending_together():
        try:
            initialize_distributed()
            use_compilation_cache()
            _run_command(flags.FLAGS.config, flags.FLAGS.workdir)
        except (ValueError, OSError, CheckpointError, NonFiniteLoss) as error:
            if logging.level_debug():
                raise
            sys.exit(f"error: {' '.join(str(error).split())}")


def _run_command(config: ConfigDict, workdir: str | Path | None) -> None:
    if flags.FLAGS.dry_run:
        print(dry_run(config))
    elif not workdir:
        raise ValueError("--workdir is missing: the folder for checkpoints, metrics and samples")
    else:
        train(config, workdir, flags.FLAGS.max_hours)


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
    flags.DEFINE_float("max_hours", None, "Save and end after so many hours.")
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
