"""How every command and tool ends: in one line where a person can mend it, quietly in a pipe."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging

from mdt_jax.basics.names import printable
from mdt_jax.basics.places import refuse_urls

UNREAD = 141  # the exit status of a program whose output is no longer read, as a shell has it
# What a person can do about the errors of the operating system, which say it in a word or two.
WAYS_OUT = {
    errno.ENOSPC: "make room, or write elsewhere",
    errno.EDQUOT: "make room in your quota, or write elsewhere",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or write elsewhere",
    errno.EROFS: "give a place that can be written to",
    errno.EACCES: "give a place that is yours, or change its permissions",
    errno.EPERM: "give a place that is yours, or change its permissions",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "is the path right?",
    errno.EEXIST: "a file or a broken link is in the way; move it, or give another path",
    errno.ENOTDIR: "a part of the path is a file; is it right?",
    errno.EISDIR: "give a file",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.EMFILE: "raise the number of files that may be open (ulimit -n)",
}


class UserError(RuntimeError):
    """An error that the person who runs a command can mend, beside ValueError and OSError."""


USER_ERRORS = (ValueError, OSError, UserError)


def one_line(error: Exception, flags_of_keys: Mapping[str, str] | None = None) -> str:
    """An exception's message and its notes as one line.

    An error of the operating system itself gets the path first, and what to do about it.

    Args:
      error: the exception.
      flags_of_keys: the command's own flag for each config key that a message may name, such as
        "--folder" for "data.path".
    """
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        named = isinstance(error.filename, str | bytes)
        parts = [f"{os.fsdecode(error.filename)}: "] if named else []
        way_out = WAYS_OUT.get(error.errno)
        text = "".join([*parts, error.strerror, f"; {way_out}" if way_out else ""])
    said = " ".join(" ".join([text, *getattr(error, "__notes__", ())]).split())
    said = printable(said)  # a file's name may hold what moves the terminal's cursor
    if not flags_of_keys:
        return said
    keys = "|".join(map(re.escape, flags_of_keys))
    return re.sub(rf"(?<![^\s(])({keys})\b", lambda match: flags_of_keys[match[0]], said)


@contextlib.contextmanager
def command_ending(
    settings: Any = None,
    *,
    also: tuple[type[Exception], ...] = (),
    message: Callable[[Any], str] = one_line,
    interrupted: str | None = None,
) -> Iterator[None]:
    """Ends a command whose body raises a user's error: `error: …` on stderr, exit status 1.

    Progress bars end before, so that the line stands alone. At absl's debug verbosity the error
    goes on, for its traceback. In a job of several processes all of them end
    (`distributed.end_the_others`). A command whose output is no longer read, as in
    `command | head`, ends without a word, with status 141, as a shell says of other programs.

    Args:
      settings: the command's flags, of absl or argparse, in which URLs are refused; None for none.
      also: exceptions that are a user's in this command, beside `USER_ERRORS`.
      message: the line of an exception, without "error: ".
      interrupted: the message of a command that is interrupted (Ctrl-C), which then ends with
        status 130, as a shell has it; None lets KeyboardInterrupt go on.
    """
    with _ending_together(), ending_quietly():
        try:
            if settings is not None:
                refuse_urls(getattr(settings, "flag_values_dict", lambda: vars(settings))())
            yield
            _flush(sys.stdout)  # an output that cannot be written is an error like others
        except BrokenPipeError as error:
            if _unread_streams():
                raise
            sys.exit(f"error: {message(error)}")  # another pipe's, such as a worker's
        except (*USER_ERRORS, *also) as error:
            _end_bars()
            if logging.level_debug():
                raise
            _drop_what_cannot_be_written()
            sys.exit(f"error: {message(error)}")
        except KeyboardInterrupt:
            _end_bars()
            if interrupted is None:
                raise
            print(interrupted, file=sys.stderr)
            sys.exit(130)
        except BaseException:
            _end_bars()
            raise


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """`distributed.ending_together` without importing JAX: that module alone joins a job."""
    try:
        yield
    except BaseException as error:
        if distributed := sys.modules.get("mdt_jax.parallel.distributed"):
            distributed.end_the_others(error)
        raise


@contextlib.contextmanager
def ending_quietly() -> Iterator[None]:
    """Ends a program whose output is no longer read without a word, with status 141.

    `command_ending` does so too; this is for what a program prints before and after, such as
    --help.
    """
    try:
        yield
        _flush(sys.stdout)
        _drop_what_cannot_be_written()  # messages
    except BrokenPipeError:
        if not _unread_streams():
            raise
        _drop_what_cannot_be_written()
        sys.exit(UNREAD)
    except SystemExit as end:
        if _drop_what_cannot_be_written() and not end.code:
            sys.exit(UNREAD)
        raise


def _end_bars() -> None:
    """Ends the progress bars that are still open, each with its line."""
    if tqdm := getattr(sys.modules.get("tqdm"), "tqdm", None):
        for bar in list(getattr(tqdm, "_instances", ())):
            with contextlib.suppress(Exception):
                bar.close()


def _flush(stream: Any) -> None:
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except OSError as error:
        error.filename = error.filename or getattr(stream, "name", None)
        raise


def _unread_streams() -> bool:
    """Whether the program's output, or its messages, go into a pipe that nobody reads any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.write("")
            _flush(stream)
            watched = select.poll()
            watched.register(stream.fileno(), select.POLLOUT)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0)):
                return True
        except BrokenPipeError:
            return True
        except (OSError, ValueError, AttributeError):  # no file, or none any more
            continue
    return False


def _drop_what_cannot_be_written() -> bool:
    """Lets Python end without a word about output that cannot be written; whether there is some."""
    dropped = False
    for stream in (sys.stdout, sys.stderr):
        try:
            _flush(stream)
        except OSError:
            dropped = True
            with contextlib.suppress(OSError, io.UnsupportedOperation, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
        except ValueError:
            continue
    return dropped
