"""The flags of `python -m mdt_jax.train`."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from mdt_jax.training.config_flag import CONFIG_OPTIONS, define_config_flag

GROUPS = {
    "The run": (*CONFIG_OPTIONS, "workdir", "allow_changes"),
    "How it ends": ("dry_run", "compile_only", "max_hours"),
}


def define_flags(f: flags.FlagValues, argv: Sequence[str] | None = None) -> None:
    """The command's flags; `argv` is the command line, the process's by default."""
    define_config_flag(f, argv)
    text = "Where checkpoints, metrics and samples go."
    flags.DEFINE_string("workdir", None, text, flag_values=f)
    text = "Show parameters, memory and data, and stop."
    flags.DEFINE_bool("dry_run", False, text, flag_values=f)
    text = "Compile what the run needs, keep it on disk for its start, and stop."
    flags.DEFINE_bool("compile_only", False, text, flag_values=f)
    text = "Save and end after so many hours."
    flags.DEFINE_float("max_hours", None, text, flag_values=f)
    text = "Settings with which the run may go on though they were others, such as data.flip."
    flags.DEFINE_list("allow_changes", [], text, flag_values=f)
