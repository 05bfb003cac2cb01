"""The compiled training steps of a run, one for each number of kept tokens, as they get ready."""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from mdt_jax.parallel.command import UserError
from mdt_jax.parallel.distributed import leave

Step = Callable[..., Any]
_THREAD = "compile_steps"


@contextlib.contextmanager
def leaving_compilations() -> Iterator[None]:
    """A context for a command's body, that ends the process without waiting for a compilation.

    A run may end, be asked to stop, be interrupted or fail while a step that it no longer needs is
    being compiled, which can take minutes.
    """
    status = 0
    try:
        yield
    except BaseException as error:
        if not _is_compiling():
            raise
        if isinstance(error, SystemExit):
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        else:
            traceback.print_exc()
            status = 130 if isinstance(error, KeyboardInterrupt) else 1
    if _is_compiling():
        leave(status)


def _is_compiling() -> bool:
    return any(thread.name == _THREAD for thread in threading.enumerate())


class StepPrograms(Mapping[int | None, Step]):
    """Compiled steps by their number of kept tokens; asking for one waits until it is there.

    The first is compiled when the object is made, the others after it, in their order, in a thread
    while training goes on. In a job of several processes all have one order, so that none waits for
    a program that another has yet to begin.
    """

    def __init__(self, compile_step: Callable[[int | None], Step], counts: Sequence[int | None]):
        """Compiles the first program, and starts with the others.

        Args:
          compile_step: compiles the step that keeps so many tokens.
          counts: the numbers of kept tokens, in the order in which they are needed.

        Raises:
          Exception: whatever compiling the first one raises.
        """
        self._compile, self._counts = compile_step, tuple(counts)
        first, *others = self._counts
        self._steps: dict[int | None, Step] = {first: compile_step(first)}
        self._failure: Exception | None = None
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: a compilation cannot be interrupted, and must not keep a stopped run alive.
        self._thread = threading.Thread(
            target=self._compile_others, args=(others,), name=_THREAD, daemon=True
        )
        if others:
            self._thread.start()
            atexit.register(self._end)

    def __getitem__(self, count: int | None) -> Step:
        """The step that keeps so many tokens; waits until it is compiled.

        Raises:
          KeyError: there is no such step.
          UserError: one of the steps cannot be compiled; the message says which, and why.
        """
        if count not in self._counts:
            raise KeyError(count)
        with self._changed:
            self._changed.wait_for(lambda: self._failure or count in self._steps)
            if self._failure:
                raise self._failure
            return self._steps[count]

    def __iter__(self) -> Iterator[int | None]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def wait(self, count: int | None, seconds: float) -> bool:
        """Waits for a step, no longer than some seconds; whether asking for it returns at once."""
        with self._changed:
            return bool(
                self._changed.wait_for(lambda: self._failure or count in self._steps, seconds)
            )

    def close(self) -> None:
        """Begins no further compilation; one that goes on cannot be stopped."""
        self._closed = True
        if not self._thread.is_alive():
            atexit.unregister(self._end)

    def _end(self) -> None:
        """Waits for the compilation that is going on: the interpreter must not end beneath it."""
        self._closed = True
        self._thread.join()

    def _compile_others(self, counts: Sequence[int | None]) -> None:
        for count in counts:
            if self._closed:
                return
            try:
                step = self._compile(count)
            except Exception as error:  # whatever a compiler raises ends the run, in its own thread
                reason = " ".join(str(error).split()) or type(error).__name__
                failure = UserError(
                    f"the step that keeps {count} tokens could not be compiled: {reason}"
                )
                failure.__cause__ = error
                with self._changed:
                    self._failure = failure
                    self._changed.notify_all()
                return
            with self._changed:
                self._steps[count] = step
                self._changed.notify_all()
        logging.info("all %d steps are compiled", len(self._counts))


@contextlib.contextmanager
def closing(steps: Any) -> Iterator[None]:
    """Closes `StepPrograms` at the end; does nothing with other mappings of compiled steps."""
    try:
        yield
    finally:
        if isinstance(steps, StepPrograms):
            steps.close()
