"""How every command and tool ends when something is wrong: in one line that says what to mend."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging

from mdt_jax.parallel.distributed import ending_together


class UserError(RuntimeError):
    """An error that the person who runs a command can mend, beside ValueError and OSError."""


USER_ERRORS = (ValueError, OSError, UserError)


def one_line(error: Exception, flags_of_keys: Mapping[str, str] | None = None) -> str:
    """An exception's message and its notes as one line.

    Args:
      error: the exception.
      flags_of_keys: the command's own flag for each config key that a message may name, such as
        "--folder" for "data.path".
    """
    said = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
    if not flags_of_keys:
        return said
    keys = "|".join(map(re.escape, flags_of_keys))
    return re.sub(rf"(?<![^\s(])({keys})\b", lambda match: flags_of_keys[match[0]], said)


@contextlib.contextmanager
def command_ending(
    *,
    also: tuple[type[Exception], ...] = (),
    message: Callable[[Any], str] = one_line,
    interrupted: str | None = None,
) -> Iterator[None]:
    """Ends a command whose body raises a user's error: `error: …` on stderr, exit status 1.

    At absl's debug verbosity the error goes on, for its traceback. In a job of several processes
    all of them end (`distributed.ending_together`).

    Args:
      also: exceptions that are a user's in this command, beside `USER_ERRORS`.
      message: the line of an exception, without "error: ".
      interrupted: the message of a command that is interrupted (Ctrl-C), which then ends with
        status 130, as a shell has it; None lets KeyboardInterrupt go on.
    """
    with ending_together():
        try:
            yield
        except (*USER_ERRORS, *also) as error:
            if logging.level_debug():
                raise
            sys.exit(f"error: {message(error)}")
        except KeyboardInterrupt:
            if interrupted is None:
                raise
            print(interrupted, file=sys.stderr)
            sys.exit(130)
