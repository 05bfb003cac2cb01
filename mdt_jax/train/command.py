"""The command `python -m mdt_jax.train`, from its flags to the run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mdt_jax import config as config_lib
from mdt_jax.basics import ranges
from mdt_jax.checkpoints.goodput import process_began
from mdt_jax.data import create_source
from mdt_jax.data.missing import MissingData
from mdt_jax.parallel.command import command_ending, one_line
from mdt_jax.parallel.compilation_cache import use_compilation_cache
from mdt_jax.parallel.distributed import initialize_distributed
from mdt_jax.parallel.host_memory import use_main_heap
from mdt_jax.train.loop import compile_only, train
from mdt_jax.training import checks, run_evaluation
from mdt_jax.training.programs import leaving_compilations
from mdt_jax.training.remarks import log_remarks
from mdt_jax.training.run import Run


def dry_run(config: ConfigDict, given: Collection[str] = ()) -> str:
    """The text that `--dry_run` prints: the run, and its data if they are there.

    Args:
      config: the settings.
      given: as for `train`.

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
    log_remarks(config, given)
    return f"{run.describe()}\ndata           {data}"


def main(_: list[str]) -> None:
    """The command; errors that a user can mend end it with one line and exit status 1."""
    with leaving_compilations(), command_ending(flags.FLAGS):
        initialize_distributed()
        use_main_heap()
        use_compilation_cache()
        _run_command(flags.FLAGS)


def _run_command(f: Any) -> None:
    """Does what the flags ask for."""
    given = getattr(f["config"], "override_values", {})
    if f.dry_run:
        print(dry_run(f.config, given))
    elif f.compile_only:
        compile_only(f.config)
    elif not f.workdir:
        raise ValueError("--workdir is missing: the folder for checkpoints, metrics and samples")
    else:
        began = process_began()
        train(f.config, f.workdir, f.max_hours, f.allow_changes, given, began=began)
