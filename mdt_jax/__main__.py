"""The commands of mdt_jax, each with its own --help.

    mdt train --config digits --workdir runs/digits
    mdt sample --workdir runs/digits --output runs/digits/samples
    mdt sample --help

`import mdt_jax` does the same from Python.
"""

from __future__ import annotations

import difflib
import runpy
import sys

import mdt_jax
from mdt_jax.basics import help_page
from mdt_jax.basics.help_page import Page
from mdt_jax.commands.table import COMMANDS, modules
from mdt_jax.parallel.command import command_ending, ending_quietly

PAGE = Page("mdt", "python -m mdt_jax", "COMMAND [OPTION ...]", __doc__)


def main() -> None:
    """Runs the command that the command line names; lists all without one."""
    name, *arguments = sys.argv[1:] or ["--help"]
    with ending_quietly():
        if name in help_page.VERSION:
            print(f"mdt_jax {mdt_jax.__version__}")
        elif name in (*help_page.SHORT, *help_page.FULL, "help"):
            print(overview(), end="")
        else:
            with command_ending():
                module = module_of(name)
            sys.argv = [f"mdt {name}", *arguments]
            # As `python -m` runs it: worker processes that it starts find it by its name.
            runpy.run_module(module, run_name="__main__", alter_sys=True)


def overview() -> str:
    """The list of commands."""
    listed = {
        title: [(name, command.summary) for name, command in part.items()]
        for title, part in COMMANDS.items()
    }
    options = [("--help", "this list; after a command, its own"), ("--version", "the version")]
    return help_page.render(PAGE, listed | {"Options": options})


def module_of(name: str) -> str:
    """The module of a command.

    Raises:
      ValueError: there is no such command; the message names the nearest.
    """
    known = modules()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
    guess = f"did you mean mdt {near[0]}? " if near else ""
    raise ValueError(f"mdt has no command {name!r}; {guess}There are {', '.join(known)}")


if __name__ == "__main__":
    main()
