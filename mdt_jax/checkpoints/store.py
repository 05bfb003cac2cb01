"""The checkpoints of a training run, which alone writes and removes them."""

import errno
import json
import os
import shutil
import time
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree
from orbax.checkpoint import multihost

from mdt_jax.basics.atomic import make_folder, reason_of
from mdt_jax.basics.places import read_bytes
from mdt_jax.checkpoints.items import META, read_item, read_step_meta, silence_orbax, tree_handler
from mdt_jax.checkpoints.lock import WorkdirInUse, WorkdirLock
from mdt_jax.checkpoints.seal import (
    PART,
    SEAL_FILE,
    CheckpointError,
    SaveError,
    checkpoint_root,
    choose_step,
    find_problems,
    fingerprint,
    is_unsealed,
    sealed_steps,
    step_files,
    write_json,
)
from mdt_jax.parallel.command import WAYS_OUT
from mdt_jax.parallel.distributed import gather_json

_BARRIER_TIMEOUT_MS = 20 * 60 * 1000  # Orbax's own limit for a background save.
_LAST_SECONDS = 15  # The time a save in progress is given when the job fails.
# How long writes that are under way when a save fails may go on, and how long none must come.
_LATE_SECONDS, _QUIET_SECONDS = 20.0, 0.3
_MOST_WRITES = 100  # that Orbax has under way beside a save's arrays


class Checkpoints:
    """The checkpoints of a training run, which alone writes and removes them.

    All processes make the same calls in the same order, and see the same `workdir`. Call `close`,
    or use a `with`: a save still in progress when the interpreter ends is lost.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        async_save: bool = True,
    ):
        """Opens, or creates, `workdir`/checkpoints, and removes the remains of interrupted saves.

        Args:
          workdir: a directory shared by all processes.
          keep_last: how many of the newest steps are kept, at least 1.
          keep_every: steps that it divides are kept for ever; None keeps none for ever.
          async_save: whether `save` returns while files are still being written.

        Raises:
          ValueError: `keep_last` or `keep_every` is below 1, or `workdir` is a URL.
          CheckpointError: another run has the workdir.
          OSError: the workdir cannot be made, or not be written to.
        """
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep_last={keep_last}, keep_every={keep_every}: give 1 or more")
        silence_orbax()
        self._root = checkpoint_root(workdir)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._async_save = async_save
        self._process, self._n_processes = jax.process_index(), jax.process_count()
        # Naming the processes makes Orbax meet at the coordination service; left to itself it
        # runs a collective on the devices, which compiles and is bound to the main thread.
        everyone = ocp.options.MultiprocessingOptions(
            active_processes=set(range(self._n_processes))
        )
        self._barrier_fn = multihost.get_barrier_sync_fn(processes=everyone.active_processes)
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add(None, ocp.args.PyTreeSave, tree_handler())
        handlers.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                handler_registry=handlers,
                composite_options=ocp.CompositeOptions(multiprocessing_options=everyone),
            ),
            multiprocessing_options=everyone,
        )
        self._bytes = 0  # of the last save
        self._background = ThreadPoolExecutor(1, thread_name_prefix="seal_checkpoint")
        self._pending: Future | None = None
        self._lock: WorkdirLock | None = None
        if self._process == 0:
            make_folder(self._root, flag="--workdir")
            try:
                self._lock = WorkdirLock(self._root.parent)
            except WorkdirInUse as error:
                raise CheckpointError(str(error)) from None
            self._remove_leftovers()
        self._barrier("opened")
        self._latest = max(self._steps(), default=None)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Closes; when a job of several processes fails, leaves without waiting for the others."""
        if error is None or self._n_processes == 1:
            self.close()
        elif self._pending is not None:
            futures.wait([self._pending], _LAST_SECONDS)

    def latest_step(self) -> int | None:
        """The newest sealed step, None if there is none. Only `restore` verifies it."""
        return self._latest

    def save(self, step: int, items: dict[str, PyTree], meta: dict) -> None:
        """Saves `items` and `meta`; returns once the arrays are copied to the host.

        The caller may then donate or change them. Writing, sealing and removing old steps go on in
        the background, one save at a time.

        Args:
          step: a step later than every sealed one.
          items: name → pytree of arrays and numbers; any name but "meta". Leaves that are
            `LazyArray`s are made and written a few at a time, before this returns.
          meta: JSON. Floats come back exactly, tuples as lists.

        Raises:
          SaveError: the save before failed, or this one at once.
          CheckpointError: `step` is not later than the last one; as `check_folder`.
          TypeError: `meta` is not JSON.
        """
        self.wait()
        self.check_folder()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"step {step} cannot be saved: {self._root} holds step {latest} already; move "
                "the later steps away, or train in another workdir"
            )
        if META in items:
            raise ValueError(f"an item cannot be called {META!r}: meta itself is kept there")
        args = {name: ocp.args.PyTreeSave(item) for name, item in items.items()}
        # Orbax writes JSON in the background. A copy is taken here, which fails here if at all.
        args[META] = ocp.args.JsonSave(json.loads(json.dumps(meta)))
        # `force`: a directory that is there has no seal; it was left by a failed save.
        directory = self._root / str(step)
        self._bytes = sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(items))
        try:
            self._checkpointer.save(directory, args=ocp.args.Composite(**args), force=True)
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            raise self._failed(step, error) from error
        self._pending = self._background.submit(self._finish, step)
        if not self._async_save:
            self.wait()

    def restore(
        self, abstract_items: dict[str, PyTree], step: int | None = None
    ) -> tuple[int, dict[str, PyTree], dict]:
        """Restores the newest step whose checksums verify, or exactly `step`.

        A damaged step is logged and renamed damaged-<step>, and the one before it is tried. The
        last one left keeps its name: a restarted run should fail again, not start from nothing.

        Args:
          abstract_items: name → pytree of jax.ShapeDtypeStruct with the sharding to restore
            onto (any mesh) and the dtype to cast to. Items left out are verified, not read.
          step: None for the newest.

        Returns:
          The step, name → pytree of jax.Arrays, and `meta` as saved.

        Raises:
          CheckpointError: no sound step is left; `step` is missing or damaged; an item is not
            in it or has other leaves or shapes.
        """
        self.wait()
        while True:
            steps = self._steps()
            self._latest = max(steps, default=None)
            chosen = choose_step(self._root, steps, step)
            directory = self._root / str(chosen)
            mine = slice(self._process, None, self._n_processes)
            found = gather_json(f"verify {directory}", find_problems(directory, share=mine))
            problems = [problem for part in found for problem in part]
            if not problems:
                break
            damage = f"checkpoint {directory} is damaged: {'; '.join(problems)}"
            if step is not None or len(steps) == 1:
                raise CheckpointError(f"{damage}; sealed steps: {steps}")
            logging.warning("%s; it is set aside for the step before it", damage)
            self._set_aside(directory)
        items = {name: read_item(directory, name, tree) for name, tree in abstract_items.items()}
        return chosen, items, read_step_meta(directory)

    def wait(self) -> None:
        """Returns when the last save is sealed; raises SaveError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raises SaveError if the last save failed; does not wait for one that goes on."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def check_folder(self) -> None:
        """Notices, on process 0, what others removed of the workdir since it was opened.

        Checkpoints and a lock that are gone are told in the log; saving and locking go on.

        Raises:
          CheckpointError: the workdir is gone, or another run has it; says what is left of it.
        """
        if self._lock is None:
            return
        workdir = self._root.parent
        if not self._lock.is_there():
            if not self._root.is_dir():
                there = sorted(os.listdir(workdir)) if workdir.is_dir() else []
                raise CheckpointError(
                    f"{workdir} was removed while this run trained; left of it: "
                    f"{', '.join(there) or 'nothing'}, and no checkpoint: start the run again"
                )
            try:
                lock = WorkdirLock(workdir, patience=0.0)
            except WorkdirInUse as error:
                raise CheckpointError(f"{error}; this run's lock there was removed") from None
            self._lock.release()
            self._lock = lock
            logging.warning("%s: its lock was removed while this run trains; locked again", workdir)
        gone = "%s: %s removed while this run trains; steps left: %s; training goes on"
        if not self._root.is_dir():
            make_folder(self._root, flag="--workdir")
            logging.warning(gone, self._root, "it was", "none")
            self._latest = None
        # A save that is under way may be removing the step before.
        latest = None if self._pending else self._latest
        if latest is not None and not (self._root / str(latest) / SEAL_FILE).exists():
            left = sealed_steps(self._root)
            steps = ", ".join(map(str, left)) or "none"
            logging.warning(gone, self._root, f"step {latest} was", steps)
            self._latest = max(left, default=None)

    def close(self) -> None:
        """Waits (and raises as `wait` does), then ends the background threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()
            if self._lock is not None:
                self._lock.release()

    def _finish(self, step: int) -> None:
        """In the background: waits for Orbax to commit `step`, seals it, removes old steps."""
        try:
            self._checkpointer.wait_until_finished()
            self._seal(step)
        except Exception as error:
            raise self._failed(step, error) from error
        self._latest = step
        if self._process == 0:
            try:
                self._remove_old_steps()
            except OSError as error:
                logging.warning("a checkpoint no longer needed could not be removed: %s", error)

    def _failed(self, step: int, error: Exception) -> SaveError:
        """The error of a save that failed.

        A single process also removes the remains, which several processes could not do safely.
        """
        self._forget_failures()
        if self._n_processes == 1:
            self._remove_remains(step)
        reason, code = reason_of(error)
        parts = [f"saving {self._root / str(step)} failed: {reason}"]
        if code == errno.ENOSPC and self._root.is_dir():
            free = shutil.disk_usage(self._root).free
            parts[0] += f": {_size(free)} are free"
            if free < self._bytes:
                parts[0] += f" of up to {_size(self._bytes)} that it takes"
                parts[0] += f", so {_size(self._bytes - free)} are missing"
        parts += [WAYS_OUT[code]] if code in WAYS_OUT else []
        good = f"step {self._latest} is saved, from which the same command goes on"
        return SaveError("; ".join([*parts, good if self._latest else "no step is saved yet"]))

    def _forget_failures(self) -> None:
        """Waits for what else Orbax writes of a failed save, and takes its failures from it.

        Its metadata come by a thread of their own. A failure there would else be raised by the next
        save, which is another one.
        """
        for _ in range(_MOST_WRITES):
            try:
                self._checkpointer.wait_until_finished()
                return
            except Exception as error:  # each call raises one of them
                logging.info("of the save that failed, this failed too: %s", error)

    def _remove_remains(self, step: int) -> None:
        """Removes what a failed save left, until none of its writes comes after."""
        began = quiet = time.monotonic()
        while time.monotonic() < min(quiet + _QUIET_SECONDS, began + _LATE_SECONDS):
            for path in self._unsealed(str(step)):
                shutil.rmtree(path, ignore_errors=True)
                quiet = time.monotonic()
            time.sleep(0.02)

    def _seal(self, step: int) -> None:
        directory = self._root / str(step)
        mine = step_files(directory)[self._process :: self._n_processes]
        part = str(directory / PART)
        write_json(
            part.format(self._process), {name: fingerprint(directory / name) for name in mine}
        )
        self._barrier(f"checksummed {step}")
        if self._process == 0:
            files: dict[str, Any] = {}
            for process in range(self._n_processes):
                files |= json.loads(read_bytes(part.format(process)))
                os.unlink(part.format(process))
            if sorted(files) != step_files(directory):
                raise CheckpointError(f"processes saw different files in {directory}")
            write_json(directory / SEAL_FILE, {"files": files})
        self._barrier(f"sealed {step}")

    def _remove_old_steps(self) -> None:
        for step in sealed_steps(self._root)[: -self._keep_last]:
            directory = self._root / str(step)
            # Converted weights were not made here, and their source may be gone.
            kept = "weights" in read_step_meta(directory)
            if not kept and (self._keep_every is None or step % self._keep_every):
                # The seal goes first: from here on the step does not exist, whatever happens.
                (directory / SEAL_FILE).unlink()
                shutil.rmtree(directory)

    def _remove_leftovers(self) -> None:
        for path in self._unsealed():
            logging.warning("removing %s: saving (or removing) it was interrupted", path)
            shutil.rmtree(path)

    def _unsealed(self, step: str | None = None) -> list[Path]:
        """Folders that unfinished saves left, of all steps or of one."""
        if not self._root.is_dir():
            return []
        return [
            path
            for path in sorted(self._root.iterdir())
            if step in (None, path.name.partition(".")[0]) and is_unsealed(path)
        ]

    def _set_aside(self, directory: Path) -> None:
        if self._process == 0:
            aside = directory.with_name(f"damaged-{directory.name}")
            if aside.exists():  # the step was damaged before, saved again, and damaged again
                shutil.rmtree(aside)
            directory.rename(aside)
        self._barrier(f"moved {directory.name}")

    def _barrier(self, name: str) -> None:
        """Waits until all processes are here; any thread may wait."""
        self._barrier_fn(key=f"{self._root} {name}", timeout_ms=_BARRIER_TIMEOUT_MS)

    def _steps(self) -> list[int]:
        """The sealed steps by process 0: a network file system may show others an older list."""
        return gather_json(f"steps of {self._root}", sealed_steps(self._root))[0]


def _size(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
