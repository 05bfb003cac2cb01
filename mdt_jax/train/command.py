"""The command `python -m mdt_jax.train`, from its flags to the run."""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from mdt_jax import config as config_lib
from mdt_jax.basics import ranges
from mdt_jax.data import create_source
from mdt_jax.data.missing import MissingData
from mdt_jax.parallel.command import command_ending, one_line
from mdt_jax.parallel.compilation_cache import use_compilation_cache
from mdt_jax.parallel.distributed import initialize_distributed
from mdt_jax.train.loop import train
from mdt_jax.training import checks, run_evaluation
from mdt_jax.training.programs import leaving_compilations
from mdt_jax.training.run import Run


def dry_run(config: ConfigDict) -> str:
    """The text that `--dry_run` prints: the run, and its data if they are there.

    Raises:
      ValueError, OSError: settings cannot work, or the data are there and cannot be used.
    """
    ranges.check_config(config)
    data, source = "", None
    try:
        source = create_source(config.data)
    except MissingData as error:  # data that are damaged are an error
        data = f"not there: {one_line(error)}"
    if config.model.num_classes == -1:
        config = config_lib.with_classes(config, source.class_names if source else ())
    run = Run(config, "")
    if source:
        checks.check_data(config, source)
        run_evaluation.check_evaluation(config, source)
        steps = len(source) / config.batch_size
        data = f"{source.describe()}, {steps:,.1f} steps an epoch"
    return f"{run.describe()}\ndata           {data}"


def main(_: list[str]) -> None:
    """The command; errors that a user can mend end it with one line and exit status 1."""
    with leaving_compilations(), command_ending(flags.FLAGS):
        initialize_distributed()
        use_compilation_cache()
        _run_command(flags.FLAGS.config, flags.FLAGS.workdir)


def _run_command(config: ConfigDict, workdir: str | Path | None) -> None:
    if flags.FLAGS.dry_run:
        print(dry_run(config))
    elif not workdir:
        raise ValueError("--workdir is missing: the folder for checkpoints, metrics and samples")
    else:
        train(config, workdir, flags.FLAGS.max_hours)
