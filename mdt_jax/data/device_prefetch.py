"""Batches from the host to the devices, copied by a thread ahead of need."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator

import jax
import numpy as np


def prefetch_to_device(
    batches: Iterable[dict[str, np.ndarray]], sharding: jax.sharding.Sharding, depth: int = 2
) -> DevicePrefetcher:
    """The batches as global arrays on the devices, copied there by a thread ahead of need.

    The thread takes up to `depth` batches more than the caller has seen, so `batches.position` runs
    ahead of the caller. Save the position that the caller counts in a checkpoint: its start plus
    the global batch size for each step that it has done.

    Args:
      batches: this process's rows of each global batch, arrays whose first axis is the batch's.
      sharding: every array's sharding over its first axis, for instance
        `NamedSharding(mesh, PartitionSpec("data"))`. Rows keep their order when each process's
        devices hold the rows that `batches` gives it.
      depth: batches on the devices, or on their way, beside the one the caller works on.

    Returns:
      An iterator of the same dictionaries, with `jax.Array`s. Its `next` raises an exception of
      `batches`, or of the copying, after the batches before it. `close()`, or leaving its `with`
      block, ends the thread.

    Raises:
      ValueError: `depth` is less than 1.
    """
    return DevicePrefetcher(batches, sharding, depth)


class DevicePrefetcher(Iterator[dict[str, jax.Array]]):
    """The iterator that `prefetch_to_device` returns."""

    def __init__(self, batches: Iterable, sharding: jax.sharding.Sharding, depth: int):
        if depth < 1:
            raise ValueError(f"depth is {depth}; it must be at least 1")
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._free_slots = threading.Semaphore(depth)
        self._ending: BaseException | None = None
        stop = threading.Event()
        # The thread must not refer to this object, which could then never be collected.
        thread = threading.Thread(
            target=_copy_to_device,
            args=(iter(batches), sharding, self._free_slots, self._ready, stop),
            name="prefetch_to_device",
            daemon=True,
        )
        # Runs on close(), on collection or at exit: a thread still copying while the interpreter
        # goes away would crash it.
        self._finalizer = weakref.finalize(self, _end_thread, thread, self._free_slots, stop)
        thread.start()

    def __next__(self) -> dict[str, jax.Array]:
        if self._ending is None:
            batch, self._ending = self._ready.get()
        if self._ending is not None:
            raise self._ending
        self._free_slots.release()
        return batch

    def close(self) -> None:
        """Ends the thread after the batch in hand. May be called again."""
        self._finalizer()
        self._ending = self._ending or ValueError("this prefetch_to_device iterator is closed")

    def __enter__(self) -> DevicePrefetcher:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _copy_to_device(
    batches: Iterator,
    sharding: jax.sharding.Sharding,
    free_slots: threading.Semaphore,
    ready: queue.SimpleQueue,
    stop: threading.Event,
) -> None:
    """The thread: for each free slot it puts (arrays of the next batch, None) into `ready`.

    At the end it puts (None, exception): StopIteration where `batches` simply ended.
    """
    place = functools.partial(jax.make_array_from_process_local_data, sharding)
    try:
        while True:
            free_slots.acquire()
            if stop.is_set():
                return
            ready.put((jax.tree.map(place, next(batches)), None))
    except BaseException as error:
        ready.put((None, error))


def _end_thread(
    thread: threading.Thread, free_slots: threading.Semaphore, stop: threading.Event
) -> None:
    stop.set()
    free_slots.release()
    with contextlib.suppress(RuntimeError):  # collected by the thread itself, or never started
        thread.join()
