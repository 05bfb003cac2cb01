"""The input pipeline: shuffled, endless batches for each process, and from there onto the devices.

A run is a sequence of examples i = 0, 1, 2, ..., and example i (which image, whether mirrored,
which latent of its posterior) is a pure function of (seed, i). Batch size, processes, workers and
restarts only decide who computes it and when. So an iterator's whole state is one number, the
global position: how many examples of the run all the processes have been given.

Grain reads in parallel; order and randomness are computed here, from Philox, whose raw output (all
that the order needs) NumPy promises never to change. Grain's own `shuffle` is as pure a function,
but a four-round cipher, whose order over ImageNet's length is correlated (0.05 at lag 1024), and
nothing promises its algorithm to later versions.
"""

import contextlib
import dataclasses
import functools
import math
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int64

from mdt_jax.data.sources import Source
from mdt_jax.data.transforms import center_crop, random_flip, sample_latent, to_unit_range

# Philox is keyed by (seed, purpose), so that the draws for one purpose never meet another's.
_ORDER, _AUGMENTATION = 0, 1


@dataclasses.dataclass(frozen=True)
class ExampleStream:
    """A run's examples: `stream[i]` is example i of an endless sequence, a function of (seed, i).

    Every `len(source)` consecutive examples from a multiple of `len(source)` on are one epoch:
    each record once, in an order of its own.

    Attributes:
        source: what the examples are read from.
        seed: 0 <= seed < 2**64.
        image_size: crop and resize images to this height and width; None leaves them as they are.
        flip: mirror each example with probability 1/2. The mirrored latent of an image is close
            to, but not exactly, the latent of the mirrored image.

    Raises:
        ValueError: a seed out of range, or an image size that the source needs or cannot have.
    """

    source: Source
    seed: int
    image_size: int | None = None
    flip: bool = False

    def __post_init__(self):
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be in 0 ... 2**64 - 1")
        height, width, _ = self.source.image_shape
        if self.image_size is None:
            if height is None or width is None:
                raise ValueError(
                    f"{self.source.name}: its images vary in size; set image_size to crop them to"
                )
        elif self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; it must be at least 1")
        elif self.source.latents and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"{self.source.name}: latents are {height} x {width} and cannot be resized to "
                f"image_size {self.image_size}; encode the images again at the size wanted"
            )

    def __len__(self) -> int:
        return sys.maxsize  # Grain wants a length; this one is never reached

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": float32 (H, W, C), pixels in [-1, 1], "label": np.int32} of example `index`."""
        epoch, place = divmod(index, len(self.source))
        record = int(epoch_order(self.seed, epoch, len(self.source))[place])
        try:
            example = self.source[record]
            image = self._augment(example["image"], _generator(self.seed, _AUGMENTATION, index))
        except Exception as error:
            error.add_note(f"in record {record} of {self.source.name}, example {index} of the run")
            raise
        return {"image": image, "label": example["label"]}

    def _augment(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # The latent is drawn first, so that its noise does not depend on the `flip` setting.
        if self.source.latents:
            image = sample_latent(image, rng)
        elif self.image_size is not None:
            image = center_crop(image, self.image_size)
        if self.flip:
            image = random_flip(image, rng)
        return image if self.source.latents else to_unit_range(image)


# 8 bytes a record, 10 MB for ImageNet: kept for the epochs that reading ahead and a second stream
# (evaluation beside training) can touch at once.
@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, "{count}"]:
    """The order of `count` records in an epoch: the argsort of uniform 64-bit draws, so that every
    permutation is as likely as any other."""
    draws = _generator(seed, _ORDER, epoch).bit_generator.random_raw(count)
    return np.argsort(draws, kind="stable")


def _generator(seed: int, purpose: int, index: int) -> np.random.Generator:
    """Philox at block (0, 0, 0, index) of its counter: 2**192 blocks before it meets the next."""
    key = np.array([seed, purpose], np.uint64)
    counter = np.array([0, 0, 0, index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """One process's rows of every global batch, read ahead of need; `create_batches` makes it.

    Each batch is {"image": float32 (b, H, W, C), "label": int32 (b,)}, b being the global batch
    size over the number of processes. Also a context manager, which closes it.
    """

    def __init__(
        self,
        open_at: Callable[[int], grain.DatasetIterator],
        position: int,
        global_batch_size: int,
    ):
        self._open_at = open_at
        self._position = position
        self._global_batch_size = global_batch_size
        self._readers: list[grain.DatasetIterator] = []  # the one in use, or none
        # Also at exit: Grain's workers end badly once the interpreter is half gone.
        weakref.finalize(self, _close_all, self._readers)

    @property
    def position(self) -> int:
        """How many examples of the run all processes together have been given, from its start.

        What is read ahead does not count. `create_batches(..., position=...)` continues from here.
        """
        return self._position

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._readers:
            self._readers.append(self._open_at(self._position))
        try:
            batch = next(self._readers[0])
        except BaseException:
            # Grain would go on with the batch after the one that failed; a caller that tries
            # again must get the one that it was owed.
            self.close()
            raise
        self._position += self._global_batch_size
        return {name: _own_memory(rows) for name, rows in batch.items()}

    def close(self) -> None:
        """Ends the reading threads and workers; a later `next` would start them at `position`."""
        _close_all(self._readers)

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _close_all(readers: list[grain.DatasetIterator]) -> None:
    while readers:
        readers.pop().close()


def _own_memory(rows: np.ndarray) -> np.ndarray:
    """`rows`, copied where a worker shared its memory: that would live as long as any reference to
    it, a CPU device's arrays among them, and leak when the program ends."""
    return np.array(rows) if isinstance(rows, grain.multiprocessing.SharedMemoryArray) else rows


def create_batches(
    source: Source,
    *,
    global_batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    flip: bool,
    image_size: int | None = None,
    position: int = 0,
    num_workers: int = 0,
    read_ahead: int = 4,
) -> BatchIterator:
    """This process's batches of an endless run over `source`, shuffled anew each epoch.

    Global batch k holds examples position + k * global_batch_size and on, of an `ExampleStream`;
    process p of P gets rows p * b ... (p + 1) * b - 1 of it, b = global_batch_size / P. Batches
    run across the ends of epochs, and no example is left out.

    Args:
        source: what to read.
        global_batch_size: examples in a batch of all processes together.
        seed: of order, mirroring and latent noise, 0 <= seed < 2**64.
        process_index: which rows to read, 0 <= process_index < process_count. Processes that hold
            the same rows (replicas, or parts of one tensor-parallel group) pass the same index.
        process_count: into how many parts the rows are divided; with pure data parallelism
            `jax.process_index()` and `jax.process_count()`.
        flip: mirror each example with probability 1/2.
        image_size: crop and resize images to this height and width; None leaves them as they are.
        position: the first example: 0, or what the run's last iterator had as `position`, whatever
            its batch size and number of processes.
        num_workers: reading processes; 0 reads with threads in this one, enough unless Python
            code (decoding, cropping) is what takes the time. Each holds its own copy of a source
            in memory. A program that uses them needs an `if __name__ == "__main__":` guard.
        read_ahead: batches prepared before they are asked for, and without workers also the
            number of threads that prepare them.

    Raises:
        ValueError: a number out of range, a batch that the processes cannot share equally, or an
            image size that the source needs or cannot have.
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index is {process_index} of process_count {process_count}; it must be "
            "0 ... process_count - 1"
        )
    if global_batch_size < 1 or global_batch_size % process_count:
        raise ValueError(
            f"global_batch_size is {global_batch_size}, for {process_count} processes; it must be "
            f"a positive multiple of {process_count}"
        )
    for name, value, least in (
        ("position", position, 0),
        ("num_workers", num_workers, 0),
        ("read_ahead", read_ahead, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    stream = ExampleStream(source, seed, image_size, flip)
    rows = global_batch_size // process_count

    def open_at(position: int) -> grain.DatasetIterator:
        # Batches are formed before workers share them out: after, a batch would hold one worker's
        # examples instead of consecutive ones.
        batches = grain.MapDataset.source(stream).slice(slice(position, None)).batch(rows)
        return _read(
            batches.slice(slice(process_index, None, process_count)), num_workers, read_ahead
        )

    return BatchIterator(open_at, position, global_batch_size)


def _read(batches: grain.MapDataset, num_workers: int, read_ahead: int) -> grain.DatasetIterator:
    """Iterates over `batches` with `read_ahead` threads, or that far ahead in worker processes."""
    if num_workers == 0:
        threads = grain.ReadOptions(num_threads=read_ahead, prefetch_buffer_size=read_ahead)
        return iter(batches.to_iter_dataset(threads))
    if not flags.FLAGS.is_parsed():  # a notebook or a test: Grain's workers read its flags
        flags.FLAGS.mark_as_parsed()
    no_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    workers = grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=math.ceil(read_ahead / num_workers)
    )
    return iter(batches.to_iter_dataset(no_threads).mp_prefetch(workers))


def prefetch_to_device(
    batches: Iterable[dict[str, np.ndarray]], sharding: jax.sharding.Sharding, depth: int = 2
) -> "DevicePrefetcher":
    """The batches as global arrays on the devices, copied there by a thread ahead of need.

    The thread takes up to `depth` batches more than the caller has seen, so `batches.position`
    is then no longer where the caller is. What belongs in a checkpoint is the position that the
    caller counts: its start plus the global batch size for each step that it has consumed.

    Args:
        batches: this process's rows of each global batch, arrays whose first axis is the batch's.
        sharding: of every array in a batch, over its first axis, for instance
            `NamedSharding(mesh, PartitionSpec("data"))`. Rows keep their order when each process's
            devices hold the rows that `batches` gives it.
        depth: batches on the devices, or on their way, beside the one the caller works on.

    Returns:
        An iterator of the same dictionaries, of `jax.Array`s. An exception in `batches` or in the
        copying is raised from its `next`, after the batches before it. `close()`, or leaving its
        `with` block, ends the thread.

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
        """Ends the thread, once it has finished the batch in hand. Safe to repeat."""
        self._finalizer()
        self._ending = self._ending or ValueError("this prefetch_to_device iterator is closed")

    def __enter__(self) -> "DevicePrefetcher":
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
    """The thread: a slot, a batch, and (arrays, None) into `ready`; at the end (None, exception),
    which is StopIteration where `batches` simply ended."""
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
