"""Orbax checkpoints of a run: asynchronous, atomic, checksummed, sealed.

    WORKDIR/checkpoints/<step>/<item>/         one Orbax item per name, written by all processes
                               meta/           JSON: what is not an array
                               manifest.json   the seal: every file, its size and BLAKE2b digest

Orbax lets a step appear by one rename, but restores flipped bits without noticing. So once it has
committed a step, the processes share out the step's files and checksum them, and process 0 writes
the seal. A step without one is a save that was interrupted, and counts for nothing. (This is why
`ocp.CheckpointManager` is not used: it deletes an old step when a new one is committed, which is
before that one is sealed, and a run killed in between could have nothing left. It can read what
is written here.)

Nothing here compiles while a run is saving: arrays are copied from device to host, and processes
meet at JAX's coordination service, not in a collective.
"""

import hashlib
import json
import os
import shutil
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import multihost

from mdt_jax.distributed import gather
from mdt_jax.lazy import LazyArray
from mdt_jax.workdir_lock import WorkdirInUse, WorkdirLock

_MANIFEST = "manifest.json"
_PART = "checksums.{}.json"  # One process's share of the manifest, until there is a manifest.
_META = "meta"
_HELD_BYTES = 32 * 2**20  # Of `LazyArray`s being written, beside the last.
_BARRIER_TIMEOUT_MS = 20 * 60 * 1000  # Orbax's own limit for a background save.
_LAST_SECONDS = 15  # What a save in progress is given when the job fails.


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, of another model, or could not be written."""


class SaveError(CheckpointError):
    """A checkpoint could not be written, the disk being full perhaps; those before it are whole."""


class Checkpoints:
    """The checkpoints of a training run, which alone writes and removes them.

    All processes make the same calls in the same order, and see the same `workdir`. Call `close`,
    or use it in a `with`: a save still going on when the interpreter ends is lost.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        async_save: bool = True,
    ):
        """Opens (and creates) `workdir`/checkpoints; removes what interrupted saves left there.

        Args:
            workdir: a directory shared by all processes.
            keep_last: how many of the newest steps are kept, at least 1.
            keep_every: steps divisible by it are kept for ever; None keeps none for ever.
            async_save: whether `save` returns while files are still being written.

        Raises:
            ValueError: `keep_last` or `keep_every` is below 1, or `workdir` is a URL.
            CheckpointError: another run has the workdir.
        """
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep_last={keep_last}, keep_every={keep_every}: give 1 or more")
        _silence_orbax()
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
        handlers.add(None, ocp.args.PyTreeSave, _tree_handler())
        handlers.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                handler_registry=handlers,
                composite_options=ocp.CompositeOptions(multiprocessing_options=everyone),
            ),
            multiprocessing_options=everyone,
        )
        self._background = ThreadPoolExecutor(1, thread_name_prefix="seal_checkpoint")
        self._pending: Future | None = None
        self._lock: WorkdirLock | None = None
        if self._process == 0:
            self._root.mkdir(parents=True, exist_ok=True)
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

        What was passed may then be donated or changed. Writing, sealing and removing old steps
        go on in the background, one save at a time.

        Args:
            step: later than every sealed step.
            items: name → pytree of arrays and numbers; any name but "meta". Leaves that are
                `LazyArray`s are made and written few at a time, before this returns.
            meta: JSON. Floats come back exactly, tuples as lists.

        Raises:
            SaveError: the save before failed, or this one at once.
            CheckpointError: `step` is not later than the last one.
            TypeError: `meta` is not JSON.
        """
        self.wait()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"step {step} cannot be saved: {self._root} holds step {latest} already; move "
                "the later steps away, or train in another workdir"
            )
        if _META in items:
            raise ValueError(f"an item cannot be called {_META!r}: meta itself is kept there")
        args = {name: ocp.args.PyTreeSave(item) for name, item in items.items()}
        # Orbax writes JSON in the background; this takes a copy, and fails here if at all.
        args[_META] = ocp.args.JsonSave(json.loads(json.dumps(meta)))
        # `force`: a directory already there has no seal, it is what a failed save left.
        directory = self._root / str(step)
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
            chosen = _choose(self._root, steps, step)
            directory = self._root / str(chosen)
            mine = slice(self._process, None, self._n_processes)
            problems = sum(gather(f"verify {directory}", find_problems(directory, share=mine)), [])
            if not problems:
                break
            damage = f"checkpoint {directory} is damaged: {'; '.join(problems)}"
            if step is not None or len(steps) == 1:
                raise CheckpointError(f"{damage}; sealed steps: {steps}")
            logging.warning("%s; it is set aside for the step before it", damage)
            self._set_aside(directory)
        items = {name: _read_item(directory, name, tree) for name, tree in abstract_items.items()}
        return chosen, items, _read_meta(directory)

    def wait(self) -> None:
        """Returns when the last save is sealed; raises SaveError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raises SaveError if the last save failed; does not wait for one that goes on."""
        if self._pending is not None and self._pending.done():
            self.wait()

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
        """What to raise. What was written is in the way of others; alone, we can remove it."""
        if self._n_processes == 1:
            for path in self._unsealed(str(step)):
                shutil.rmtree(path, ignore_errors=True)
        return SaveError(f"saving {self._root / str(step)} failed: {error!r}")

    def _seal(self, step: int) -> None:
        directory = self._root / str(step)
        mine = _files(directory)[self._process :: self._n_processes]
        part = str(directory / _PART)
        _write_json(
            part.format(self._process), {name: _fingerprint(directory / name) for name in mine}
        )
        self._barrier(f"checksummed {step}")
        if self._process == 0:
            files = {}
            for process in range(self._n_processes):
                files |= json.loads(Path(part.format(process)).read_bytes())
                os.unlink(part.format(process))
            if sorted(files) != _files(directory):
                raise CheckpointError(f"processes saw different files in {directory}")
            _write_json(directory / _MANIFEST, {"files": files})
        self._barrier(f"sealed {step}")

    def _remove_old_steps(self) -> None:
        for step in _sealed_steps(self._root)[: -self._keep_last]:
            directory = self._root / str(step)
            # Converted weights were not made here, and their source may be gone.
            kept = "weights" in _read_meta(directory)
            if not kept and (self._keep_every is None or step % self._keep_every):
                # The seal goes first: from here on the step does not exist, whatever happens.
                (directory / _MANIFEST).unlink()
                shutil.rmtree(directory)

    def _remove_leftovers(self) -> None:
        for path in self._unsealed():
            logging.warning("removing %s: saving (or removing) it was interrupted", path)
            shutil.rmtree(path)

    def _unsealed(self, step: str | None = None) -> list[Path]:
        """What saves that were not finished left, of all steps or one."""
        return [
            path
            for path in sorted(self._root.iterdir())
            if step in (None, path.name.partition(".")[0]) and is_unsealed(path)
        ]

    def _set_aside(self, directory: Path) -> None:
        if self._process == 0:
            aside = directory.with_name(f"damaged-{directory.name}")
            if aside.exists():  # Damaged, trained again, and damaged again.
                shutil.rmtree(aside)
            directory.rename(aside)
        self._barrier(f"moved {directory.name}")

    def _barrier(self, name: str) -> None:
        """Waits for all processes, in any thread; returns at once if there is only one."""
        self._barrier_fn(key=f"{self._root} {name}", timeout_ms=_BARRIER_TIMEOUT_MS)

    def _steps(self) -> list[int]:
        """The sealed steps by process 0: a network file system may show others an older list."""
        return gather(f"steps of {self._root}", _sealed_steps(self._root))[0]


def read_meta(workdir: str | Path, step: int | None = None) -> tuple[int, dict]:
    """The step (by default the newest sealed) and its meta. Reads no array, changes nothing.

    Raises:
        CheckpointError: there is no such step, or its meta is damaged.
    """
    directory = _verified(workdir, step, _META)
    return int(directory.name), _read_meta(directory)


def restore_item(
    workdir: str | Path, name: str, abstract: PyTree | None = None, step: int | None = None
) -> PyTree:
    """One item of a step. Verifies and reads nothing else, changes nothing, waits for nobody.

    Args:
        workdir: the run's.
        name: the item's.
        abstract: pytree of jax.ShapeDtypeStruct with sharding; None gives NumPy arrays, in dicts
            and lists nested as the saved tree was.
        step: by default the newest sealed. Unlike a run, a reader never gets an older one.

    Raises:
        CheckpointError: there is no such step or item; it is damaged; it does not fit `abstract`.
    """
    _silence_orbax()
    return _read_item(_verified(workdir, step, name), name, abstract)


def lazy_item(
    workdir: str | Path, name: str, part: str | None = None, step: int | None = None
) -> PyTree:
    """One item of a step, or one part of it ("params" of "state"), as a tree of `LazyArray`s.

    Each leaf is read when it is asked for, so that a large model never is in memory whole.

    Raises:
        CheckpointError: there is no such step, item or part, or it is damaged.
    """
    _silence_orbax()
    path = epath.Path(_verified(workdir, step, name) / name)
    handler = _tree_handler()
    if not path.is_dir():
        raise CheckpointError(f"there is no item {name!r} in checkpoint {path.parent}")
    saved = handler.metadata(path).tree
    if part is not None and part not in saved:
        raise CheckpointError(f"item {name!r} of checkpoint {path.parent} has no {part!r}")

    def leaf(keys: tuple, saved: PyTree) -> PyTree:
        if isinstance(saved, dict):
            return {key: leaf((*keys, key), below) for key, below in saved.items()}
        return LazyArray(lambda: _read_leaf(path, keys, saved))

    return leaf((), saved) if part is None else leaf((part,), saved[part])


def _read_leaf(path: epath.Path, keys: tuple[str, ...], saved: PyTree) -> np.ndarray:
    item = jax.ShapeDtypeStruct(saved.shape, saved.dtype)
    restore_args = ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(keys):
        item, restore_args = {key: item}, {key: restore_args}
    args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
    return jax.tree.leaves(_tree_handler().restore(path, args=args))[0]


def checkpoint_root(workdir: str | Path) -> Path:
    """The folder of a run's checkpoints; ValueError for a URL."""
    if "://" in str(workdir):
        raise ValueError(f"workdir {workdir} is a URL: mount it (gcsfuse), and give the path")
    return Path(workdir).absolute() / "checkpoints"


def _sealed_steps(root: Path) -> list[int]:
    """Ascending."""
    names = (path.parent.name for path in root.glob(f"*/{_MANIFEST}"))
    return sorted(int(name) for name in names if name.isdecimal())


def is_unsealed(path: Path) -> bool:
    """Whether a folder is a save that is going on, or that was interrupted."""
    step = path.name.isdecimal() and not (path / _MANIFEST).exists()
    return step or ocp.utils.TMP_DIR_SUFFIX in path.name


def _choose(root: Path, steps: list[int], step: int | None) -> int:
    if not steps or step not in (None, *steps):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        there = f"complete ones: {steps}" if steps else "nothing was saved there"
        missing = "" if root.is_dir() else ", a folder that does not exist"
        raise CheckpointError(f"no {wanted} in {root}{missing}; {there}")
    return steps[-1] if step is None else step


def _files(directory: Path) -> list[str]:
    """The files of a step that its seal covers, relative, sorted alike on every process."""
    own = (_MANIFEST, _PART.split("{")[0])
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if not name.startswith(own))


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
        return {"bytes": file.tell(), "blake2b": digest}


def _write_json(path: str | Path, value: dict) -> None:
    """All of it or nothing, whenever the machine stops."""
    aside = f"{path}.tmp"
    with open(aside, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def find_problems(
    directory: Path, item: str | None = None, share: slice | None = None
) -> list[str]:
    """What is wrong with a step, or with one item of it, in words; empty if nothing is.

    `share` limits which files are read, not which names are compared.
    """
    prefix = f"{item}/" if item else ""
    try:
        manifest = json.loads((directory / _MANIFEST).read_bytes())["files"]
        expected = {
            name: (known["bytes"], known["blake2b"])
            for name, known in manifest.items()
            if name.startswith(prefix)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{_MANIFEST} cannot be read: {error!r}"]
    found = {name for name in _files(directory) if name.startswith(prefix)}
    problems = [f"file {name} is missing" for name in sorted(expected.keys() - found)]
    problems += [f"file {name} is in no manifest" for name in sorted(found - expected.keys())]
    for name in sorted(expected.keys() & found)[share or slice(None)]:
        size, digest = expected[name]
        try:
            actual = _fingerprint(directory / name)
        except OSError as error:
            problems.append(f"file {name} cannot be read: {error!r}")
            continue
        if actual["bytes"] != size:
            problems.append(f"file {name} has {actual['bytes']} bytes, expected {size}")
        elif actual["blake2b"] != digest:
            problems.append(f"file {name}: checksum differs")
    return problems


def _verified(workdir: str | Path, step: int | None, item: str) -> Path:
    """The directory of a sealed step, `item` of which is sound."""
    root = checkpoint_root(workdir)
    steps = _sealed_steps(root)
    if step is not None and step not in steps and (root / str(step) / _MANIFEST).exists():
        steps.append(step)  # which an older listing of a network file system did not have
    directory = root / str(_choose(root, steps, step))
    if problems := find_problems(directory, item):
        damage = f"{item!r} of checkpoint {directory} is damaged: {'; '.join(problems)}"
        raise CheckpointError(f"{damage}; sealed steps: {steps}")
    return directory


def _tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes and reads pytrees without compiling.

    By default Orbax slices replicated arrays on the device, so that replicas share the writing:
    every new shape is a compilation in the middle of training.
    """
    types = ocp.type_handlers
    scalar = types.ScalarHandler()
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=types.create_type_handler_registry(
            (int, scalar),
            (float, scalar),
            (np.number, scalar),
            (np.ndarray, types.NumpyHandler()),
            (LazyArray, _FewAtATime(deepcopy_host_arrays=False)),
            (jax.Array, types.ArrayHandler(use_replica_parallel=False)),
        ),
    )


class _FewAtATime(ocp.type_handlers.NumpyHandler):
    """Makes and writes `LazyArray`s in small groups: Orbax would hold all of them, and a copy."""

    async def serialize(self, values, infos, args=None):
        pending, held = [], 0
        try:
            for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
                array = np.asarray(value)
                pending += await super().serialize([array], [info], [arg or ocp.SaveArgs()])
                held += array.nbytes
                if held > _HELD_BYTES:  # waiting for each alone costs some 20 ms an array
                    _wait_for(pending)
                    held = 0
        finally:
            _wait_for(pending)
        return []


def _wait_for(pending: list) -> None:
    """Empties a list of futures: none still writes when the first error is raised."""
    errors = [error for future in pending if (error := _error_of(future))]
    pending.clear()
    if errors:
        raise errors[0]


def _error_of(future) -> Exception | None:
    try:
        future.result()
    except Exception as error:
        return error
    return None


def _read_item(directory: Path, name: str, abstract: PyTree | None) -> PyTree:
    path, what = epath.Path(directory / name), f"item {name!r} of checkpoint {directory}"
    if not path.is_dir():
        items = sorted(path.name for path in directory.iterdir() if path.is_dir())
        raise CheckpointError(f"there is no {what}, only {items}")
    handler = _tree_handler()
    saved = handler.metadata(path).tree
    if abstract is None:
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    else:
        _check_fits(what, _shapes(saved), _shapes(abstract))
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return handler.restore(path, args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args))


def _read_meta(directory: Path) -> dict:
    return ocp.JsonCheckpointHandler().restore(epath.Path(directory / _META))


def _shapes(tree: PyTree) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}


def _check_fits(what: str, saved: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    """Orbax's own complaint about a shape is hundreds of lines, and does not name the array."""
    differences = [
        f"{path} is saved as {saved.get(path, 'nothing')}, expected {wanted.get(path, 'nothing')}"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]
    if differences:
        raise CheckpointError(
            f"{what} is of another model or optimizer: {'; '.join(differences[:5])} "
            f"({len(differences)} differences); give the config it was trained with"
        )


def _silence_orbax() -> None:
    """Drops two kinds of Orbax's lines, unless absl's verbosity is DEBUG.

    Its INFO, dozens of lines for each save, and the tracebacks of errors that it raises as well.
    """
    logging.get_absl_logger().addFilter(_is_worth_reading)


def _is_worth_reading(record) -> bool:
    kind = record.levelname == "INFO" or record.exc_info
    chatter = kind and "orbax/checkpoint" in record.pathname
    return not chatter or logging.get_absl_logger().isEnabledFor(logging.converter.STANDARD_DEBUG)


if __name__ == "__main__":
    from mdt_jax import checkpoint_list

    checkpoint_list.run()
