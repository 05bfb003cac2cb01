"""The flag --config: the file that it names, and the file's settings as flags, --config.KEY=VALUE.

What is wrong with any of them ends the command with one line: an error inside the file with the
file's line, a value with its key.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from mdt_jax.basics import help_page, ranges
from mdt_jax.basics.places import refuse_url
from mdt_jax.parallel.command import command_ending
from mdt_jax.parallel.flag_parsing import (
    NumberParser,
    WholeParser,
    check_flags,
    flag_message,
    flag_values,
    says_none,
    take_numbers,
)
from mdt_jax.training import config_files

# Flags with which a command does nothing that needs a config.
_HELP = (*help_page.SHORT, *help_page.FULL, *help_page.VERSION, "--helpxml")


class _SwitchParser(flags.BooleanParser):
    """true, false, or None."""

    def parse(self, argument: Any) -> Any:
        if says_none(argument):
            return None
        try:
            return super().parse(argument)
        except ValueError:
            raise ValueError("it takes true or false") from None


class _TupleParser(tuple_parser.TupleParser):
    """Numbers or texts joined by commas, in parentheses or not."""

    def parse(self, argument: Any) -> tuple:
        try:
            parsed = super().parse(argument)
        except (ValueError, SyntaxError):
            raise ValueError("it takes values joined by commas, such as 0.9,0.999") from None
        if len(parsed) == 1 and isinstance(parsed[0], str) and "," in parsed[0]:
            # Python's own syntax has no nan or inf.
            return tuple(map(_number_or_text, parsed[0].strip("()[] ").split(",")))
        return parsed


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()


class _NumberOrTextParser(WholeParser):
    """A whole number, or a text that stands for one, such as a respacing."""

    def parse(self, argument: Any) -> Any:
        try:
            return super().parse(argument)
        except ValueError:
            return argument


class _SwitchOrTextParser(flags.ArgumentParser):
    """A text, of which true, false and None are the switch."""

    def parse(self, argument: Any) -> Any:
        text = argument.strip().lower() if isinstance(argument, str) else argument
        if text in ("", "none", "false", "no"):
            return False
        return True if text in ("true", "yes") else argument


for _kind, _parser in (
    (int, WholeParser()),
    (int | str, _NumberOrTextParser()),
    (float, NumberParser()),
    (bool, _SwitchParser()),
    (bool | str, _SwitchOrTextParser()),
    (tuple, _TupleParser()),
):
    config_flags.register_flag_parser_for_type(_kind, _parser)


# --config and its keys, in the words of `--help`.
CONFIG_OPTIONS = (
    ("--config NAME[:ARG]", "The experiment: a name (--config list shows them) or a file."),
    ("--config.KEY VALUE", "A setting of it: --config.batch_size=64, --config.mesh.fsdp=8."),
)


def define_config_flag(f: flags.FlagValues, argv: Sequence[str] | None = None) -> None:
    """Defines --config, for `parse_config_flags`.

    Args:
      f: the flags.
      argv: the command line that will be parsed; the process's by default.
    """
    config_flags.DEFINE_config_file(
        "config",
        None,
        "The experiment: a name, or a file.",
        flag_values=f,
        sys_argv=None if argv is None else list(argv),
    )


def parse_config_flags(
    argv: Sequence[str], f: flags.FlagValues = flags.FLAGS, required: bool = False
) -> list[str]:
    """Parses the flags of a command that has --config, for `app.run`.

    Args:
      argv: the command line, the program's name first.
      f: the flags.
      required: whether --config must be given.

    Returns:
      The arguments that are no flags, the program's name first.
    """
    with command_ending():
        place, argv = _find_config(argv, required)
        take_numbers(f)
        try:
            rest = f(argv)
        except Exception as error:
            raise ValueError(_explain(error, place, argv)) from error
        if place:
            _check_is_config(f.config, place)
            _take_values(f.config, f["config"].override_values)
            ranges.check_config(f.config)
        check_flags(flag_values(f))
    return rest


def _find_config(argv: Sequence[str], required: bool) -> tuple[str, list[str]]:
    """The value of --config on a command line, and the line with the file's path in its place.

    Raises:
      ValueError: it is missing, or no file is there and nothing has that name.
    """
    argv, found = list(argv), ""
    for i, flag in enumerate(argv):
        if flag in ("--config", "-config"):
            found = argv[i + 1] if i + 1 < len(argv) else ""
            argv[i + 1 :] = [_path_of(found), *argv[i + 2 :]]
        elif flag.startswith(("--config=", "-config=")):
            found = flag.partition("=")[2]
            argv[i] = f"--config={_path_of(found)}"
    wanted = required or any(flag.startswith(("--config.", "-config.")) for flag in argv)
    if not found.partition(":")[0] and wanted and not any(flag in _HELP for flag in argv):
        there = ", ".join(config_files.config_names())
        raise ValueError(f"--config is missing: a file, or one of {there} (--config list)")
    return found, argv


def _path_of(place: str) -> str:
    """A value of --config with the file's path in place of a name; ends with a list if asked to."""
    refuse_url(place, "--config")
    if place == config_files.LIST and not os.path.exists(place):
        print(config_files.describe_configs())
        sys.exit(0)
    return config_files.find_config(place) if place.partition(":")[0] else place


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or beside."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(error: Exception, place: str, argv: Sequence[str] = ()) -> str:
    """What is wrong with a command line, in one line that names the flag, or the file and its line.

    Args:
      error: what parsing raised.
      place: the value of --config.
      argv: the command line.
    """
    path = config_files.find_config(place).partition(":")[0] if place else ""
    innermost = error
    for innermost in _chain(error):
        if where := _line_in_config(innermost, path):
            said = innermost.msg if isinstance(innermost, SyntaxError) else _short(innermost)
            return f"--config {place}: {where}: {type(innermost).__name__}: {said}"
    if "get_config" in str(innermost):
        return f"--config {place}: {str(innermost).replace('config_config', path)}"
    if isinstance(error, flags.Error):
        return flag_message(error)
    said = _short(error)
    return f"--config has no such key: {said if 'Did you mean' in said else _unknown(argv) or said}"


def _unknown(argv: Sequence[str]) -> str:
    """The first key on a command line that no config has, and those beside it; empty if none is."""
    from mdt_jax.config import default_config  # imports JAX, which --help should not

    for flag in argv:
        key = re.sub("^--?config[.]", "", flag.partition("=")[0])
        if key == flag.partition("=")[0]:
            continue
        section, path = default_config(), "a config"
        for name in key.split("."):
            if not isinstance(section, ConfigDict):
                return f"{key}; {path} is a value, and has no keys"
            if name not in section:
                return f"{key or 'an empty one'}; {path} has {', '.join(section)}"
            section, path = section[name], name if path == "a config" else f"{path}.{name}"
    return ""


def _short(error: BaseException) -> str:
    """An exception's message, without the list of all keys that ml_collections adds."""
    said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # ml_collections quotes one exception's message in the next one's.
    if "Did you mean" in said or "does not exist" in said:
        said = said.replace("\\n", " ").replace("\\", "").replace("'", "")
    return re.sub(
        r"\s*Other fields present:.*?(?=Did you mean|$)", " ", said, flags=re.DOTALL
    ).strip()


def _line_in_config(error: BaseException, path: str) -> str:
    """The file and line at which an error was raised in a config or a config that it imports.

    Empty for an error from elsewhere.
    """
    if not path:
        return ""
    folder = Path(path).resolve().parent
    if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ""):
        return f"{error.filename} line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).resolve().parent == folder]
    return f"{inside[-1].filename} line {inside[-1].lineno}" if inside else ""


def _check_is_config(config: Any, place: str) -> None:
    """Refuses, with ValueError, what a config file gave if that is no ConfigDict."""
    if isinstance(config, ConfigDict):
        return
    try:
        config.seed  # noqa: B018  what stands for a config whose file raised an OSError
    except OSError as error:
        raise ValueError(_explain(error, place)) from error
    except AttributeError:
        pass
    kind = type(config).__name__
    raise ValueError(f"--config {place}: get_config() gives a {kind}, not a ConfigDict")


def _take_values(config: ConfigDict, given: Mapping[str, Any]) -> None:
    """Sets what a flag's None stands for.

    It is the default of a text that is empty by default, and of data.split. Refuses it, with
    ValueError, where it is no value.

    Args:
      config: the settings.
      given: the values that flags gave, by key.
    """
    from mdt_jax.config import default_config  # imports JAX, which --help should not

    defaults = default_config()
    for key, value in given.items():
        *sections, name = key.split(".")
        holder, own = config, defaults
        for section in sections:
            holder, own = holder[section], own.get(section, {})
        if name not in own:
            continue
        if (own[name] == "" or key == "data.split") and says_none(value):
            holder[name] = own[name]
            continue
        optional = bool(ranges.RANGES[key].none) if key in ranges.RANGES else own[name] is None
        if value is None and not optional:
            takes = ranges.RANGES.get(key, "true or false")
            raise ValueError(f"--config.{key}=None: None is no value of it; it takes {takes}")
        if optional and says_none(value):
            holder[name] = None
