"""The flags that `mdt compile-tpu` and `mdt compile-gpu` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags

from mdt_jax.training.config_flag import define_config_flag

# Each flag of both tools: absl's function that defines it, name, default, help.
SHARED_FLAGS: tuple[tuple[Callable, str, Any, str], ...] = (
    (flags.DEFINE_bool, "advise", False, "Try other settings until one fits; report on that."),
    (flags.DEFINE_bool, "quick", False, "Compile one number of kept tokens for all of them."),
    (flags.DEFINE_bool, "sampler", True, "Compile the sampler too."),
    (flags.DEFINE_integer, "sample_batch_size", None, "Samples at a time; the batch size if none."),
    (flags.DEFINE_bool, "calibration", True, "Set a lone product beside the MFU."),
    (flags.DEFINE_bool, "calibrate", False, "Compile only a lone product; needs no --config."),
    (flags.DEFINE_string, "output", None, "The JSON file of --all; its rows stay as they are."),
)


def define_flags(
    f: flags.FlagValues,
    own: Iterable[tuple[Callable, str, Any, str]],
    argv: Sequence[str] | None = None,
) -> None:
    """Defines the flags of a tool: --config, those of both, and its own.

    Args:
      f: the flags.
      own: the tool's own, as `SHARED_FLAGS`.
      argv: the command line; the process's by default.
    """
    define_config_flag(f, argv)
    for define, name, default, text in (*SHARED_FLAGS, *own):
        define(name, default, help=text, flag_values=f)
