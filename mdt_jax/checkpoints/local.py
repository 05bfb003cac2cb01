"""Checkpoints of each process on its own disk, or in memory: saved often, gone with the machine.

    LOCAL_DIR/mdt_jax-USER/<run>/<process>/<step>/arrays.bin     the process's shards
                                                  index.json     where they are, and the meta data
                                                  manifest.json  the seal, as of shared checkpoints

A process keeps the shards that its devices hold, so that nothing travels. After a restart of the
same processes they agree on the newest step that each of them holds, whole. Orbax's emergency
manager keeps local checkpoints only where the mesh has several replicas, and does not notice
flipped bits; these stand on the same seal as the shared ones.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import PyTree

from mdt_jax.basics.atomic import make_folder, reason_of
from mdt_jax.basics.places import open_file, read_bytes, read_text
from mdt_jax.checkpoints.seal import (
    SEAL_FILE,
    find_problems,
    fingerprint,
    sealed_steps,
    step_files,
    write_json,
)
from mdt_jax.parallel.distributed import by_first_process, gather_json

RUN_FILE = ".run"  # in the workdir: a name of its own for the run, which a new one there is given
_ARRAYS, _INDEX = "arrays.bin", "index.json"
_KEPT = 2  # steps: while one is being written, and not all processes have it, the one before counts


class LocalCheckpoints:
    """One process's local checkpoints of a run, which it alone writes and removes.

    All processes make the same calls in the same order. What cannot be written is told and left
    out: a run does not end for want of a local checkpoint.
    """

    def __init__(self, folder: str | Path, workdir: str | Path):
        """Opens, or makes, this process's folder.

        Args:
          folder: a folder of this machine, `config.checkpoint.local_dir`.
          workdir: the run's folder, which all processes see.

        Raises:
          OSError: the folder cannot be made, or not be written to.
        """
        run = by_first_process(lambda: _run_name(Path(workdir)))
        self._run = Path(folder).absolute() / f"mdt_jax-{getpass.getuser()}" / run
        self._root = self._run / str(jax.process_index())
        make_folder(self._root, flag="--config.checkpoint.local_dir")
        self._run.parent.chmod(0o700)  # of a folder that all may use, such as /dev/shm
        self._background = ThreadPoolExecutor(1, thread_name_prefix="local_checkpoint")
        self._pending: Future | None = None

    def newest(self, abstract: PyTree, after: int | None) -> int | None:
        """The newest step that every process holds whole; None if none is later than `after`.

        Damaged steps are told and removed.

        Args:
          abstract: the state as it would be restored, jax.ShapeDtypeStructs with shardings.
          after: the newest shared step; None without one.
        """
        held = set()
        for step in sealed_steps(self._root):
            directory = self._root / str(step)
            if problems := find_problems(directory):
                logging.warning(
                    "local checkpoint %s is damaged: %s; it is removed",
                    directory,
                    "; ".join(problems),
                )
                shutil.rmtree(directory, ignore_errors=True)
            elif self._fits(directory, abstract):
                held.add(step)
        everywhere = set.intersection(*map(set, gather_json("local steps", sorted(held))))
        newest = max(everywhere, default=None)
        return newest if newest is not None and newest > (-1 if after is None else after) else None

    def read_meta(self, step: int) -> dict:
        """The meta data of a step that `newest` gave."""
        return json.loads(read_bytes(self._root / str(step) / _INDEX))["meta"]

    def restore(self, step: int, abstract: PyTree) -> tuple[PyTree, dict]:
        """A step that `newest` gave: the state, on the devices, and its meta data."""
        directory = self._root / str(step)
        index = json.loads(read_bytes(directory / _INDEX))
        data = np.memmap(directory / _ARRAYS, np.uint8, "r")

        def leaf(path: tuple, wanted: jax.ShapeDtypeStruct) -> jax.Array:
            shards = index["leaves"][_name(path)]["shards"]
            arrays = []
            for device, where in _indices(wanted).items():
                offset, shape = shards[where]["offset"], shards[where]["shape"]
                size = int(np.prod(shape)) * wanted.dtype.itemsize
                host = data[offset : offset + size].view(wanted.dtype).reshape(shape)
                arrays.append(jax.device_put(np.array(host), device))
            return jax.make_array_from_single_device_arrays(
                wanted.shape, wanted.sharding, arrays, dtype=wanted.dtype
            )

        return jax.tree_util.tree_map_with_path(leaf, abstract), index["meta"]

    def save(self, step: int, state: PyTree, meta: Mapping[str, Any]) -> None:
        """Copies this process's shards to the host, and writes them in the background.

        Args:
          step: steps done.
          state: a pytree of jax.Arrays, which may be donated or changed afterwards.
          meta: JSON.
        """
        self.wait()
        leaves = jax.tree_util.tree_leaves_with_path(state)
        for _, array in leaves:
            array.copy_to_host_async()
        copied = [(_name(path), array.shape, array.dtype, _copy(array)) for path, array in leaves]
        self._pending = self._background.submit(self._write, step, copied, dict(meta))

    def wait(self) -> None:
        """Returns when the last save is written; tells if it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and ends the background thread."""
        self.wait()
        self._background.shutdown()

    def remove(self, up_to: int | None) -> None:
        """Removes this process's checkpoints that are not later than a shared step."""
        self.wait()
        for step in sealed_steps(self._root):
            if up_to is not None and step <= up_to:
                shutil.rmtree(self._root / str(step), ignore_errors=True)
        for folder in (self._root, self._run):
            with contextlib.suppress(OSError):  # it holds others
                folder.rmdir()

    def _write(self, step: int, copied: list, meta: dict) -> None:
        directory = self._root / str(step)
        try:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            leaves = {}
            with open_file(directory / _ARRAYS, "wb") as file:
                for name, shape, dtype, shards in copied:
                    places = {}
                    for where, array in shards.items():
                        file.seek(-file.tell() % dtype.itemsize, 1)
                        places[where] = {"offset": file.tell(), "shape": array.shape}
                        file.write(array.tobytes())
                    leaves[name] = {"shape": shape, "dtype": dtype.name, "shards": places}
            write_json(directory / _INDEX, {"leaves": leaves, "meta": meta})
            found = {name: fingerprint(directory / name) for name in step_files(directory)}
            write_json(directory / SEAL_FILE, {"files": found})
            self._remove_old()
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            told = "no local checkpoint of step %d: %s: %s; training goes on"
            logging.warning(told, step, directory, reason_of(error)[0])

    def _remove_old(self) -> None:
        for step in sealed_steps(self._root)[:-_KEPT]:
            directory = self._root / str(step)
            (directory / SEAL_FILE).unlink()  # first: from here on the step does not exist
            shutil.rmtree(directory)

    def _fits(self, directory: Path, abstract: PyTree) -> bool:
        """Whether a step has all shards that this process's devices need."""
        leaves = json.loads(read_bytes(directory / _INDEX))["leaves"]
        wanted = dict(_named(abstract))
        return leaves.keys() == wanted.keys() and all(
            (leaves[name]["dtype"], tuple(leaves[name]["shape"])) == (leaf.dtype.name, leaf.shape)
            and set(_indices(leaf).values()) <= leaves[name]["shards"].keys()
            for name, leaf in wanted.items()
        )


def _run_name(workdir: Path) -> str:
    """The run's own name, kept in its workdir; a run in a new workdir of that path has another."""
    path = workdir / RUN_FILE
    try:
        return read_text(path).strip()
    except FileNotFoundError:
        name = uuid.uuid4().hex
        path.write_text(name)
        return name


def _named(tree: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _name(path), leaf


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _indices(leaf: jax.ShapeDtypeStruct) -> dict[jax.Device, str]:
    """The part of an array that each of this process's devices holds, as a key of the index."""
    parts = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    return {device: _key(part, leaf.shape) for device, part in parts.items()}


def _key(part: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    ranges = [one.indices(size)[:2] for one, size in zip(part, shape, strict=True)]
    return ",".join(f"{start}:{stop}" for start, stop in ranges)


def _copy(array: jax.Array) -> dict[str, np.ndarray]:
    """This process's shards of an array, each part once."""
    shards = {}
    for shard in array.addressable_shards:
        key = _key(shard.index, array.shape)
        if key not in shards:
            shards[key] = np.array(shard.data)
    return shards
