"""How commands and tools read their flags: one line that names the flag, where one is wrong."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NoReturn

from absl import app, flags
from absl.flags import argparse_flags

import mdt_jax
from mdt_jax.basics import help_page, ranges
from mdt_jax.basics.help_page import Page
from mdt_jax.basics.places import refuse_urls
from mdt_jax.parallel.command import command_ending, ending_quietly

flags.disclaim_key_flags()  # the flags here are the command's, whose --help lists them

# Flags that name a file or a folder. An empty one comes of an unset variable of a shell.
PLACES = (
    "checkpoint", "data_dir", "ema", "folder", "grid", "imagenet", "inception", "inpaint", "input",
    "json", "lmdb", "mask", "model", "opt", "output", "parquet", "reference", "samples", "scratch",
    "workdir",
)  # fmt: skip


def check_flags(values: Mapping[str, Any]) -> None:
    """Refuses, with ValueError, numbers outside their ranges, empty places, and URLs.

    Args:
      values: the flags' values by name, without dashes.
    """
    for name, value in values.items():
        if name in PLACES and value == "":
            raise ValueError(f"--{name} is empty; give a path, or leave it out")
    refuse_urls(values)
    ranges.check_flags(values)


def says_none(value: Any) -> bool:
    """Whether a flag's text, or a tuple that was read from it, stands for None."""
    if isinstance(value, tuple) and len(value) == 1:
        (value,) = value
        return value is None or says_none(value)
    return isinstance(value, str) and value.lower() == "none"


class WholeParser(flags.IntegerParser):
    """A whole number, also as 1e6, or None."""

    def convert(self, argument: Any) -> Any:
        """As absl has it, whose `parse` calls it."""
        if not isinstance(argument, str) or says_none(argument):
            return None if isinstance(argument, str) else super().convert(argument)
        try:
            return super().convert(argument)
        except ValueError:
            try:
                whole = float(argument).is_integer()
            except ValueError:
                whole = False
        if not whole:
            raise ValueError("it takes a whole number, such as 256 or 1e6") from None
        return int(Decimal(argument))


class NumberParser(flags.FloatParser):
    """A number, or None."""

    def convert(self, argument: Any) -> Any:
        """As absl has it, whose `parse` calls it."""
        if says_none(argument):
            return None
        try:
            return super().convert(argument)
        except ValueError:
            raise ValueError("it takes a number, such as 0.1 or 1e-4") from None


# What a flag holds that says None where that is a value, and not the same as no flag.
NONE = "none"


def _refuse_none(name: str) -> NoReturn:
    raise ValueError(f"None is no value of it; it takes {ranges.range_of(f'--{name}')}")


def _parser_of(flag: flags.Flag, keeps_none: bool = False) -> flags.ArgumentParser:
    """A parser for a numeric flag of absl: the number as --config takes it, or None.

    Args:
      flag: the flag.
      keeps_none: whether None is told from a flag that is not given, and kept as `NONE`. Else None
        stands for a flag that is not given, if that has no default.
    """
    kind = WholeParser if isinstance(flag.parser, flags.IntegerParser) else NumberParser

    class Parser(kind):
        def parse(self, argument: Any) -> Any:
            if not says_none(argument):
                return super().parse(argument)
            if flag.default is not None:
                _refuse_none(flag.name)
            return NONE if keeps_none else None

    return Parser(flag.parser.lower_bound, flag.parser.upper_bound)


def keep_none(flag: flags.Flag) -> None:
    """Has a numeric flag of absl tell None, which it keeps as `NONE`, from not being given."""
    flag.parser = _parser_of(flag, keeps_none=True)


def take_numbers(f: flags.FlagValues) -> None:
    """Has every numeric flag of absl that has a range take numbers as --config does: 1e6, None."""
    for name in f:
        plain = type(f[name].parser) in (flags.IntegerParser, flags.FloatParser)
        if plain and f"--{name}" in ranges.RANGES:
            f[name].parser = _parser_of(f[name])


def flag_values(f: flags.FlagValues) -> dict[str, Any]:
    """The values of absl's flags by name."""
    return {name: f[name].value for name in f}


def flag_message(error: flags.Error) -> str:
    """absl's message on a flag; shorter for one that must be given and is not."""
    said = str(error)
    return re.sub(
        r"^flag (--\w+)=None: .* must have a value other than None\.$", r"\1 is missing", said
    )


def run_command(
    main: Callable[[list[str]], None],
    define_flags: Callable[[flags.FlagValues], None],
    page: Page,
    parse: Callable[[Sequence[str]], list[str]] | None = None,
) -> None:
    """Runs a command whose flags are absl's.

    Args:
      main: the command. What takes long to import it imports itself, so that `--help` is quick.
      define_flags: defines its flags.
      page: what `--help` says.
      parse: parses the command line; `parse_flags` by default.
    """
    define_flags(flags.FLAGS)

    def read(argv: Sequence[str]) -> list[str]:
        answer_help(argv, page, flags.FLAGS)
        return (parse or parse_flags)(argv)

    with ending_quietly():
        app.run(main, flags_parser=read)


def answer_help(argv: Sequence[str], page: Page, f: flags.FlagValues) -> None:
    """Ends a command that is asked for its help or version, with status 0.

    Args:
      argv: the command line, the program's name first.
      page: what `--help` says; `--helpfull` lists the flags of all modules, too.
      f: the flags.
    """
    if help_page.asked_for(argv[1:], help_page.VERSION):
        print(f"mdt_jax {mdt_jax.__version__}")
    elif help_page.asked_for(argv[1:], help_page.FULL):
        print(f"{absl_help(page, f)}\n{f.get_help()}")
    elif help_page.asked_for(argv[1:], help_page.SHORT):
        print(absl_help(page, f), end="")
    else:
        return
    sys.exit(0)


def absl_help(page: Page, f: flags.FlagValues) -> str:
    """The text of `--help` of a command with absl's flags."""
    sections = {
        title: [_absl_option(f, name) if isinstance(name, str) else name for name in names]
        for title, names in page.groups.items()
    }
    return help_page.render(page, sections)


_VALUES = {"int": "N", "float": "X", "bool": ""}


def _absl_option(f: flags.FlagValues, name: str) -> help_page.Option:
    """A flag of absl as it is written, and its help with its default."""
    flag, kind = f[name], f[name].flag_type()
    if kind == "bool":
        return f"--[no]{name}", f"{flag.help} (on)" if flag.default else flag.help
    value = "A,B,..." if "list" in kind else _VALUES.get(kind, "TEXT")
    if name in PLACES:
        value = "PATH"
    if isinstance(flag, flags.EnumFlag):
        value = "{" + ",".join(flag.parser.enum_values) + "}"
    shown = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
    default = "" if shown in (None, "") else f" ({shown})"
    # absl itself puts the values of an enumeration before its help.
    text = re.sub(r"^<[^<>]*>: ", "", flag.help)
    return f"--{name} {value}", f"{text}{default}"


def parse_flags(argv: Sequence[str], f: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses a command line as absl does, for `app.run`; a wrong flag ends it with one line.

    Args:
      argv: the command line, the program's name first.
      f: the flags.

    Returns:
      The arguments that are no flags, the program's name first.
    """
    take_numbers(f)
    with command_ending():
        try:
            rest = f(argv)
        except flags.Error as error:
            raise ValueError(flag_message(error)) from error
        check_flags(flag_values(f))
    return rest


def _number_of_argparse(parse: Callable[[Any], Any]) -> Callable[[str], Any]:
    """A type of argparse: a number as --config takes it, or None."""

    def number(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error}") from None

    return number


class _InRanges:
    """A parser whose numbers are as those of --config, and whose errors are one line.

    `page`, if it is given, is what `--help` says beside the arguments, which stand under their
    groups' titles.
    """

    def __init__(self, *args: Any, page: Page | None = None, **settings: Any):
        super().__init__(*args, **{"prog": page.command if page else None} | settings)
        self.page = page
        self.register("type", int, _number_of_argparse(WholeParser().convert))
        self.register("type", float, _number_of_argparse(NumberParser().convert))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse has it, whose `parse_args` calls it."""
        if help_page.asked_for(sys.argv[1:] if args is None else args, help_page.VERSION):
            print(f"mdt_jax {mdt_jax.__version__}")
            sys.exit(0)
        parsed, rest = super().parse_known_args(args, namespace)
        try:
            for action in self._actions:
                if action.type in (int, float):
                    _check_none(action, getattr(parsed, action.dest, action.default))
            check_flags(vars(parsed))
        except ValueError as error:
            self.error(str(error))
        return parsed, rest

    def format_help(self) -> str:
        """The text of `--help`."""
        titles = {"positional arguments": "Arguments", "options": "Options"}
        sections = {
            titles.get(group.title, group.title): [
                option for action in group._group_actions for option in _argparse_options(action)
            ]
            for group in self._action_groups
        }
        needed = [next(_argparse_options(action))[0] for action in self._actions if action.required]
        usage = " ".join([*needed, "[OPTION ...]"])
        page = self.page or Page(self.prog, "", usage, self.description or "")
        return help_page.render(page, sections)

    def error(self, message: str) -> NoReturn:
        """Ends the command."""
        sys.exit(f"error: {' '.join(message.split())}")


def _check_none(action: argparse.Action, value: Any) -> None:
    """Refuses, with ValueError, None for a number that cannot be left out, or in a list of them."""
    needed = action.default is not None or action.required
    if (value is None and needed) or (isinstance(value, list) and None in value):
        try:
            _refuse_none(action.dest)
        except ValueError as error:
            raise ValueError(f"--{action.dest}=None: {error}") from None


def _argparse_options(action: argparse.Action) -> Iterator[help_page.Option]:
    """An argument of argparse as it is written, and its help; each command of several."""
    if isinstance(action, argparse._SubParsersAction):
        yield from ((choice.dest, choice.help or "") for choice in action._choices_actions)
        return
    if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
        return
    plain = "PATH" if action.dest in PLACES else "TEXT"
    value = {int: "N", float: "X"}.get(action.type, plain)
    if action.metavar:
        value = action.metavar
    elif action.choices:
        value = "{" + ",".join(filter(None, map(str, action.choices))) + "}"
    value += " ..." if action.nargs in ("+", "*") else ""
    names = [name for name in action.option_strings if name.startswith("--")]
    written = value if not names else f"{names[0]} {value}" if action.nargs != 0 else names[0]
    text = (action.help or "") % {"default": action.default}
    default = action.default
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default))
    is_told = default in (None, "", False) or "default)s" in (action.help or "")
    yield written, text if is_told else f"{text} ({default})"


class ArgumentParser(_InRanges, argparse.ArgumentParser):
    """argparse's, with ranges."""


class AbslArgumentParser(_InRanges, argparse_flags.ArgumentParser):
    """absl's, which parses absl's own flags, too, with ranges."""
