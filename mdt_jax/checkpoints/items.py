"""The items of a checkpoint, trees of arrays and JSON, written and read through Orbax."""

import functools
import sys
from collections.abc import Callable
from logging import DEBUG, getLogger
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jaxtyping import PyTree

from mdt_jax.checkpoints.seal import CheckpointError, verified_step
from mdt_jax.convert.trees import LazyArray

META = "meta"
_HELD_BYTES = 32 * 2**20  # Most bytes of `LazyArray`s that wait to be written, beside the last.


def read_meta(workdir: str | Path, step: int | None = None) -> tuple[int, dict]:
    """A step, by default the newest sealed one, and its meta. Reads no array, changes nothing.

    Raises:
      CheckpointError: there is no such step, or its meta is damaged.
    """
    directory = verified_step(workdir, step, META)
    return int(directory.name), read_step_meta(directory)


def restore_item(
    workdir: str | Path, name: str, abstract: PyTree | None = None, step: int | None = None
) -> PyTree:
    """One item of a step. Verifies and reads nothing else, changes nothing, waits for nobody.

    Args:
      workdir: the run's workdir.
      name: the item's name.
      abstract: pytree of jax.ShapeDtypeStruct with sharding; None gives NumPy arrays, in dicts
        and lists nested as the saved tree was.
      step: the step; by default the newest sealed one, and never an older one if that is damaged.

    Raises:
      CheckpointError: there is no such step or item; it is damaged; it does not fit `abstract`.
    """
    silence_orbax()
    return read_item(verified_step(workdir, step, name), name, abstract)


def lazy_item(
    workdir: str | Path, name: str, part: str | None = None, step: int | None = None
) -> PyTree:
    """One item of a step, or one part of it ("params" of "state"), as a tree of `LazyArray`s.

    Each leaf is read when it is asked for, so that a large model is never in memory whole.

    Raises:
      CheckpointError: there is no such step, item or part, or it is damaged.
    """
    silence_orbax()
    path = epath.Path(verified_step(workdir, step, name) / name)
    handler = tree_handler()
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
    item: Any = jax.ShapeDtypeStruct(saved.shape, saved.dtype)
    restore_args: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(keys):
        item, restore_args = {key: item}, {key: restore_args}
    args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
    return jax.tree.leaves(tree_handler().restore(path, args=args))[0]


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """A handler that writes and reads pytrees without compiling.

    Orbax's default slices replicated arrays on the device, so that replicas share the writing, and
    compiles for every new shape in the middle of training.
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
    """Makes and writes `LazyArray`s in small groups, where Orbax would hold all of them twice."""

    async def serialize(self, values, infos, args=None):
        pending, held = [], 0
        try:
            for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
                array = np.asarray(value)
                pending += await super().serialize([array], [info], [arg or ocp.SaveArgs()])
                held += array.nbytes
                if held > _HELD_BYTES:  # to wait for each alone costs some 20 ms an array
                    _wait_for(pending)
                    held = 0
        finally:
            _wait_for(pending)
        return []


def _wait_for(pending: list) -> None:
    """Waits for all futures and empties the list; then raises the first of their errors."""
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


def read_item(directory: Path, name: str, abstract: PyTree | None) -> PyTree:
    """One item of the step in a directory; `abstract` as for `restore_item`."""
    path, what = epath.Path(directory / name), f"item {name!r} of checkpoint {directory}"
    if not path.is_dir():
        items = sorted(path.name for path in directory.iterdir() if path.is_dir())
        raise CheckpointError(f"there is no {what}, only {items}")
    handler = tree_handler()
    saved = handler.metadata(path).tree
    if abstract is None:
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    else:
        _check_fits(what, _shapes(saved), _shapes(abstract))
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return handler.restore(path, args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args))


def read_step_meta(directory: Path) -> dict:
    """The meta of the step in a directory, not verified."""
    return ocp.JsonCheckpointHandler().restore(epath.Path(directory / META))


def _shapes(tree: PyTree) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}


def _check_fits(what: str, saved: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    """Raises CheckpointError where shapes differ, naming the arrays.

    Orbax's own message about a shape has hundreds of lines and does not name the array.
    """
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


def silence_orbax() -> None:
    """Keeps three kinds of messages out of sight, unless absl's verbosity is DEBUG.

    They are Orbax's INFO, dozens of lines for each save; tracebacks of errors that it also raises;
    and those of its writes that end after a save has failed, for which nobody waits.
    """
    logging.get_absl_logger().addFilter(_is_worth_reading)
    getLogger("asyncio").addFilter(_is_waited_for)
    if getattr(sys.unraisablehook, "func", None) is not _report_unraisable:
        sys.unraisablehook = functools.partial(_report_unraisable, sys.unraisablehook)


def _report_unraisable(report: Callable[[Any], Any], unraisable: Any) -> None:
    """Reports an error in a background thread, but for those of writes that end too late."""
    error = unraisable.exc_value
    late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    if not late or logging.get_absl_logger().isEnabledFor(DEBUG):
        report(unraisable)


def _is_waited_for(record) -> bool:
    """Whether a record of asyncio's is of another error than that of a write of Orbax's."""
    trace = record.exc_info and record.exc_info[2]
    while trace is not None and "orbax/checkpoint" not in trace.tb_frame.f_code.co_filename:
        trace = trace.tb_next
    return not trace or logging.get_absl_logger().isEnabledFor(DEBUG)


def _is_worth_reading(record) -> bool:
    kind = record.levelname == "INFO" or record.exc_info
    chatter = kind and "orbax/checkpoint" in record.pathname
    return not chatter or logging.get_absl_logger().isEnabledFor(DEBUG)
