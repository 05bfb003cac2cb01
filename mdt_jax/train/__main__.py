"""Trains a model, or goes on with a run.

    mdt train --config digits --workdir runs/digits
    mdt train --config imagenet256:MDTv2-XL/2 --workdir runs/xl2 --config.data.path=DIR

The same command resumes the run. SIGTERM, SIGUSR1 and --max_hours save a checkpoint and end it.
--config.KEY=VALUE changes a setting; --dry_run shows what would be trained, and stops;
--compile_only compiles it, and stops.
"""

import functools

from absl import logging

from mdt_jax.basics.help_page import Page
from mdt_jax.parallel.flag_parsing import run_command
from mdt_jax.train.flags import GROUPS, define_flags
from mdt_jax.training.config_flag import parse_config_flags

PAGE = Page(
    "mdt train",
    "python -m mdt_jax.train",
    "--config NAME --workdir DIR [OPTION ...]",
    __doc__,
    GROUPS,
)


def main(arguments: list[str]) -> None:
    """The command, which imports what it needs when its work begins."""
    from mdt_jax.train import command

    command.main(arguments)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    run_command(main, define_flags, PAGE, functools.partial(parse_config_flags, required=True))
