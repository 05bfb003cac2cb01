"""Trains a model: `python -m mdt_jax.train --config configs/digits.py --workdir runs/digits`.

The same command again resumes the run. `--config.KEY=VALUE` changes a setting, `--dry_run` shows
what would be trained and stops.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mdt_jax import config as config_lib
from mdt_jax import metrics, run_data, sharding
from mdt_jax.checkpoints import CheckpointError, Checkpoints
from mdt_jax.data import create_batches, create_source, prefetch_to_device
from mdt_jax.distributed import initialize_distributed
from mdt_jax.monitors import GridSampler, NonFiniteLoss, StepLog
from mdt_jax.run import Run
from mdt_jax.train_step import TrainState


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains, or goes on training, to config.num_steps and returns the final state.

    Raises:
      ValueError: settings that cannot work, or a workdir of another run.
      CheckpointError: no checkpoint of the workdir can be used.
      NonFiniteLoss: the loss or the gradient norm stopped being finite.
    """
    config = run_data.count_classes(config)
    run = Run(config, workdir)
    source = create_source(config.data)
    run_data.check_source(config, source)
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
    run_data.check_same(meta, source, run.workdir)
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
                    "autoencoder": run_data.autoencoder_digest(source),
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
        image_size=run_data.image_size(config, source),
        position=position,
        num_workers=config.data.num_workers,
        read_ahead=config.data.read_ahead,
        crop=config.data.crop,
        on_bad_image=config.data.on_bad_image,
        max_bad_fraction=config.data.max_bad_fraction,
    )
    with batches, prefetch_to_device(batches, sharding.batch_sharding(run.mesh)) as on_device:
        yield on_device


def dry_run(config: ConfigDict) -> str:
    """What `--dry_run` prints: the run, and its data if they are there."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # told of below
        config = run_data.count_classes(config)
    if config.model.num_classes == -1:
        config = config_lib.resolve_classes(config, ())
    run = Run(config, "")
    try:
        source = create_source(config.data)
    except (FileNotFoundError, ValueError) as error:  # the latter without a data.path
        data = f"not there: {error}"
    else:
        run_data.check_source(config, source)
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
