"""The flags of every command and tool, in one process: which there are, and what parsing says."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from mdt_jax import digits_report, sampling
from mdt_jax.checkpoints import __main__ as checkpoints_command
from mdt_jax.commands import samples_report
from mdt_jax.demo import command as demo_command
from mdt_jax.demo import flags as demo_flags
from mdt_jax.evaluate import command as evaluate_command
from mdt_jax.evaluate import flags as evaluate_flags
from mdt_jax.evaluation import extractors
from mdt_jax.parallel import flag_parsing, sharding
from mdt_jax.parallel.command import one_line
from mdt_jax.sample import command as sample_command
from mdt_jax.sample import flags as sample_flags
from mdt_jax.train import flags as train_flags
from mdt_jax.training.config_flag import parse_config_flags

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "digits.py")


class Accepted(Exception):
    """Raised where a command has taken its flags, and its work begins."""


class Flag(NamedTuple):
    """A flag: its name, and the type of its values or of each in a list."""

    name: str
    kind: type


def tool(name: str) -> Any:
    """The module of mdt_jax/commands/NAME.py or of tools/NAME.py."""
    if (ROOT / "mdt_jax" / "commands" / f"{name}.py").exists():
        return importlib.import_module(f"mdt_jax.commands.{name}")
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    folder = str(ROOT / "tools")
    if folder not in sys.path:  # where tools import each other from
        sys.path.append(folder)
    sys.modules[name] = module  # which dataclasses ask for
    spec.loader.exec_module(module)
    return module


class Command(NamedTuple):
    """A command or tool.

    Attributes:
      needed: the arguments that it cannot do without.
      define: defines its flags of absl; None for argparse.
      run: takes arguments without the program's name; ends with SystemExit, an error that
        `command_ending` reports, or `Accepted`.
    """

    needed: tuple[str, ...]
    define: Callable | None
    run: Callable[[Sequence[str]], None]


def _absl(define: Callable, then: Callable[[flags.FlagValues], None]) -> Callable:
    def run(arguments: Sequence[str]) -> None:
        f = flags.FlagValues()
        define(f)
        flag_parsing.parse_flags(["command", *arguments], f)
        line = functools.partial(one_line, flags_of_keys=sample_command.FLAGS_OF_KEYS)
        with flag_parsing.command_ending(message=line):
            then(f)
        raise Accepted

    return run


def _with_config(define: Callable, required: bool) -> Callable:
    def run(arguments: Sequence[str]) -> None:
        f, argv = flags.FlagValues(), ["command", *arguments]
        define(f, argv)
        parse_config_flags(argv, f, required)
        raise Accepted

    return run


def _argparse(main: Callable) -> Callable:
    def run(arguments: Sequence[str]) -> None:
        main(list(arguments))
        raise Accepted

    return run


def _generate(f: flags.FlagValues) -> None:
    mesh = sharding.create_mesh(fsdp=f.mesh_fsdp, tensor=f.mesh_tensor)
    sample_command.generate(f, mesh)


def _load_engine(f: flags.FlagValues) -> None:
    demo_command.load_engine(f, sharding.create_mesh(fsdp=f.mesh_fsdp, tensor=f.mesh_tensor))


def commands() -> dict[str, Command]:
    """Every command and tool by name."""
    found = {
        "train": Command(
            (f"--config={CONFIG}",),
            train_flags.define_flags,
            _with_config(train_flags.define_flags, required=True),
        ),
        "sample": Command(
            ("--workdir=w",),
            sample_flags.define_flags,
            _absl(sample_flags.define_flags, _generate),
        ),
        "evaluate": Command(
            ("--workdir=w", "--reference=r", "--inception=i"),
            evaluate_flags.define_flags,
            _absl(evaluate_flags.define_flags, evaluate_command.evaluate_samples),
        ),
        "digits_report": Command(
            ("--workdir=w",),
            None,
            _argparse(lambda argv: digits_report.parse_report_flags(["command", *argv])),
        ),
        "samples_report": Command(
            ("--workdir=w",),
            None,
            _argparse(lambda argv: samples_report.parse_report_flags(["command", *argv])),
        ),
        "checkpoints": Command(
            ("w",),
            checkpoints_command.define_flags,
            _absl(checkpoints_command.define_flags, lambda f: None),
        ),
        "demo": Command(
            ("--workdir=w",),
            demo_flags.define_flags,
            _absl(demo_flags.define_flags, _load_engine),
        ),
    }
    for name, required in (("benchmark", False), ("compile_tpu", False), ("compile_gpu", False)):
        define = tool(name).define_flags
        needed = (f"--config={CONFIG}",)
        found[name] = Command(needed, define, _with_config(define, required))
    for name, needed in (
        ("encode_latents", ("--output=o",)),
        ("reference_stats", ("--output=o", "--inception=i")),
        ("kill_test", ("--workdir=w",)),
    ):
        define = tool(name).define_flags
        found[name] = Command(needed, define, _absl(define, lambda f: None))
    for name, needed in (
        ("benchmark_conversion", ()),
        ("benchmark_evaluation", ()),
        ("benchmark_startup", ()),
        ("compare_runs", ("run", "reference")),
        ("convert_checkpoint", ("to-jax", "--output=o")),
        ("export_params", ("--input=i", "--output=o")),
        ("learning_speed", ()),
        ("plot_runs", ("run", "--output=o")),
        ("prepare_dataset", ("--folder=f",)),
        ("profile_input", ()),
        ("push_to_hub", ("--input=i", "--output=o")),
        ("quality_per_cost", ("--workdir=w",)),
        ("start_time", ("c",)),
    ):
        found[name] = Command(needed, None, _argparse(tool(name).main))
    return found


def stop_at_work(monkeypatch) -> None:
    """Ends every command with `Accepted` where its work would begin."""

    def accept(*args: Any, **kwargs: Any) -> None:
        raise Accepted

    monkeypatch.setattr(sampling, "load", accept)
    monkeypatch.setattr(evaluate_command, "_check_files", accept)
    monkeypatch.setattr(extractors, "load_inception", accept)
    for parser in (flag_parsing.ArgumentParser, flag_parsing.AbslArgumentParser):

        def parse(self, args=None, namespace=None, own=parser.parse_args):
            own(self, args, namespace)
            raise Accepted

        monkeypatch.setattr(parser, "parse_args", parse)


def flags_of(command: Command, monkeypatch) -> list[Flag]:
    """The command's own flags."""
    if command.define is not None:
        f = flags.FlagValues()
        command.define(f)
        return [Flag(name, _KINDS.get(f[name].flag_type(), str)) for name in f if name != "config"]
    parsers: list[argparse.ArgumentParser] = []

    def note(self, *args: Any) -> None:
        parsers.append(self)
        raise Accepted

    with monkeypatch.context() as patch:
        for parser in (flag_parsing.ArgumentParser, flag_parsing.AbslArgumentParser):
            patch.setattr(parser, "parse_args", note)
        with contextlib.suppress(Accepted):
            command.run(command.needed)
    return list(dict.fromkeys(_arguments(parsers[0])))


_KINDS = {"int": int, "float": float, "bool": bool}


def _arguments(parser: argparse.ArgumentParser) -> Iterator[Flag]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _arguments(below)
        elif action.option_strings and action.dest not in ("help", argparse.SUPPRESS):
            kind = action.type if action.type in (int, float) else str
            yield Flag(action.dest, kind)
