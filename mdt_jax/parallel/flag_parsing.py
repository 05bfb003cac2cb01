"""How commands and tools read their flags: one line that names the flag, where one is wrong."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from absl import flags
from absl.flags import argparse_flags

from mdt_jax.basics import ranges
from mdt_jax.parallel.command import command_ending

# Flags that name a file or a folder. An empty one comes of an unset variable of a shell.
PLACES = (
    "checkpoint", "data_dir", "ema", "folder", "imagenet", "inception", "inpaint", "input", "json",
    "lmdb", "mask", "model", "opt", "output", "parquet", "reference", "samples", "scratch",
    "workdir",
)  # fmt: skip


def check_flags(values: Mapping[str, Any]) -> None:
    """Refuses, with ValueError, numbers outside their ranges (`basics.ranges`) and empty places.

    Args:
      values: the flags' values by name, without dashes.
    """
    for name, value in values.items():
        if name in PLACES and value == "":
            raise ValueError(f"--{name} is empty; give a path, or leave it out")
    ranges.check_flags(values)


def flag_values(f: flags.FlagValues) -> dict[str, Any]:
    """The values of absl's flags by name."""
    return {name: f[name].value for name in f}


def flag_message(error: flags.Error) -> str:
    """absl's message on a flag; shorter for one that must be given and is not."""
    said = str(error)
    return re.sub(
        r"^flag (--\w+)=None: .* must have a value other than None\.$", r"\1 is missing", said
    )


def parse_flags(argv: Sequence[str], f: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses a command line as absl does, for `app.run`; a wrong flag ends it with one line.

    Args:
      argv: the command line, the program's name first.
      f: the flags.

    Returns:
      The arguments that are no flags, the program's name first.
    """
    with command_ending():
        try:
            rest = f(argv)
        except flags.Error as error:
            raise ValueError(flag_message(error)) from error
        check_flags(flag_values(f))
    return rest


class _InRanges:
    """A parser whose numbers have the ranges of `basics.ranges`, and whose errors are one line."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse has it, whose `parse_args` calls it."""
        parsed, rest = super().parse_known_args(args, namespace)
        try:
            check_flags(vars(parsed))
        except ValueError as error:
            self.error(str(error))
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        """Ends the command."""
        sys.exit(f"error: {' '.join(message.split())}")


class ArgumentParser(_InRanges, argparse.ArgumentParser):
    """argparse's, with ranges."""


class AbslArgumentParser(_InRanges, argparse_flags.ArgumentParser):
    """absl's, which parses absl's own flags, too, with ranges."""
