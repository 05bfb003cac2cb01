"""The experiments that come with the package, by name, from anywhere: `--config digits`.

They are the files of configs/ in a clone, which a wheel holds as mdt_jax/configs/.
"""

from __future__ import annotations

import ast
import difflib
import os
from pathlib import Path

import mdt_jax
from mdt_jax.basics.places import read_text

LIST = "list"  # `--config list` lists them


def config_folder() -> Path:
    """Where the experiments are: in the installed package, or beside it in a clone."""
    package = Path(mdt_jax.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_names() -> dict[str, Path]:
    """Every experiment's file by its name."""
    files = sorted(config_folder().glob("*.py"))
    return {file.stem: file for file in files if file.stem != "__init__"}


def find_config(place: str) -> str:
    """The value of --config, with the file's path in place of a name.

    Args:
      place: a file or a name, each with its argument after a colon. A file that is there is taken.

    Raises:
      ValueError: neither, naming the nearest.
    """
    path, colon, argument = place.partition(":")
    if os.path.isfile(path):
        return place
    named = config_names()
    if path in named:
        return f"{named[path]}{colon}{argument}"
    problem = "is no file" if os.path.exists(path) else "is not there"
    near = difflib.get_close_matches(Path(path).stem, named, n=1)
    guess = f"did you mean --config {near[0]}{colon}{argument}? " if near else ""
    raise ValueError(
        f"--config {path} {problem}; {guess}It takes a file, or one of {', '.join(named)} "
        f"(--config {LIST} describes them)"
    )


def describe_configs() -> str:
    """A line on each experiment: its name and the first sentence of its file."""
    named = config_names()
    width = max(map(len, named), default=0)
    lines = [f"{name:<{width}}  {_summary(file)}" for name, file in named.items()]
    lines += ["", "An argument follows a colon: --config imagenet256:MDTv2-XL/2. The files, which"]
    lines += [f"say what they take and aim at, are in {config_folder()}"]
    return "\n".join(lines)


def _summary(file: Path) -> str:
    text = ast.get_docstring(ast.parse(read_text(file))) or ""
    return " ".join(text.partition("\n\n")[0].split())
