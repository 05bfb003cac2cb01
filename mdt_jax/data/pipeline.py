"""The input pipeline: shuffled, endless batches for each process, and from there onto the devices.

A run is a sequence of examples i = 0, 1, 2, ..., and example i (which image, where cropped, whether
mirrored) is a pure function of (seed, i). Batch size, processes, workers and restarts only decide
who computes it and when. So an iterator's whole state is one number, the global position: how many
examples of the run all the processes have been given.

Pixels stay in uint8 until the training step scales them: in float32 they would be four times as
much to write, to pass between processes and to copy to a device.

An example of encoded data is the posterior of a latent, mean and standard deviation. The latent is
drawn from it on the devices, in the training step, like the step's other noise: 4,096 normal
numbers take a CPU core longer to draw than all the rest of a latent takes to read.

A process's rows of a batch are read as one block. Grain has blocks read in parallel; order and
randomness are computed here, from Philox, whose raw output (all that the order needs) NumPy
promises never to change. Grain's own `shuffle` is as pure a function, but a four-round cipher,
whose order over ImageNet's length is correlated (0.05 at lag 1024), and nothing promises its
algorithm to later versions.
"""

import contextlib
import dataclasses
import functools
import math
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags, logging
from jaxtyping import Int64, UInt8

from mdt_jax.data.decoding import BadImage
from mdt_jax.data.source import Source
from mdt_jax.data.transforms import center_crop, random_crop

# Philox is keyed by (seed, purpose), so that the draws for one purpose never meet another's.
_ORDER, _AUGMENTATION = 0, 1
CROPS = {"center": lambda image, size, rng: center_crop(image, size), "random": random_crop}
ON_BAD_IMAGE = ("error", "skip")
IMAGES_AT_ONCE = 16  # of a block, decoded before the first of them is cropped


@dataclasses.dataclass(frozen=True)
class ExampleStream:
    """A run's examples: `stream[i]` is example i of an endless sequence, a function of (seed, i).

    Every `len(source)` consecutive examples from a multiple of `len(source)` on are one epoch:
    each record once, in an order of its own.

    Attributes:
      source: what the examples are read from.
      seed: 0 <= seed < 2**64.
      image_size: crop and resize images to this height and width; None leaves them as they are.
      flip: mirror each example with probability 1/2. Encoded data of a cache with mirror images
        give the posterior of the mirrored image; others the mirrored posterior, which is close
        to it, but not the same.
      crop: "center" or "random", how images are cropped.
      on_bad_image: what becomes of an image that cannot be used: "error", or "skip", which puts
        the next record that can be used in its place, after the last the first.
      max_bad_fraction: with "skip", stop when more than this part of all the source's records was
        found bad: by one process, since its `BatchIterator` was made.

    Raises:
      ValueError: a seed or fraction out of range, an unknown `crop` or `on_bad_image`, or an
        image size that the source needs or cannot have.
    """

    source: Source
    seed: int
    image_size: int | None = None
    flip: bool = False
    crop: str = "center"
    on_bad_image: str = "error"
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be in 0 ... 2**64 - 1")
        for name, known in (("crop", CROPS), ("on_bad_image", ON_BAD_IMAGE)):
            if getattr(self, name) not in known:
                choices = ", ".join(map(repr, known))
                raise ValueError(f"{name} is {getattr(self, name)!r}; known are {choices}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}; it must be in 0 ... 1")
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

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Example `index`, a row of what `block` gives."""
        block = self.block(index, 1)
        return {"image": block["image"][0], "label": block["label"][0]}

    def block(self, first: int, count: int) -> dict[str, Any]:
        """Examples `first` ... `first + count - 1`, read at once.

        Returns:
          {"image": uint8 (count, H, W, C), pixels, or posteriors of latents, of the stored type
          and 2C channels, "label": int32 (count,)}; and "bad", pairs of a record that was passed
          over and what is wrong with it, if bad images are skipped.

        Raises:
          BadImage: an image that cannot be used, or too many of them.
          Exception: whatever else the source raises; what was being read ends its message.
        """
        indices = range(first, first + count)
        records = _records(self.seed, indices, len(self.source))
        if self.source.latents:
            return self._read_posteriors(records, indices)
        return self._read_images(records, indices)

    def _read_posteriors(
        self, records: Int64[np.ndarray, "n"], indices: range
    ) -> dict[str, np.ndarray]:
        rngs = _generators(self.seed, _AUGMENTATION, indices) if self.flip else ()
        mirror = np.array([rng.random() < 0.5 for rng in rngs] or [False] * len(indices))
        with self._located("", indices):
            cache = self.source.records
            if hasattr(cache, "read_posteriors"):
                rows = mirror if cache.mirrored else None
                posteriors, labels = cache.read_posteriors(records, rows)
            else:
                examples = self.source.__getitems__(records.tolist())
                posteriors = np.stack([example["image"] for example in examples])
                labels = np.array([example["label"] for example in examples])
        if mirror.any() and not getattr(cache, "mirrored", False):
            posteriors[mirror] = posteriors[mirror, :, ::-1]
        return {"image": posteriors, "label": labels}

    def _read_images(self, records: Int64[np.ndarray, "n"], indices: range) -> dict[str, Any]:
        pixels, labels, bad = None, np.empty(len(indices), np.int32), []
        rngs = _generators(self.seed, _AUGMENTATION, indices)
        examples = self._read_examples(records.tolist(), indices, bad)
        for row, (example, rng) in enumerate(zip(examples, rngs, strict=True)):
            mirror = rng.random() < 0.5  # drawn first, so that no other setting changes it
            image = example["image"]
            if self.image_size is not None:
                image = CROPS[self.crop](image, self.image_size, rng)
            if pixels is None:
                pixels = np.empty((len(indices), *image.shape), np.uint8)
            if self.flip and mirror:
                _mirror(image, pixels[row])
            else:
                pixels[row] = image
            labels[row] = example["label"]
        block = {"image": pixels, "label": labels}
        return block | {"bad": bad} if self.on_bad_image == "skip" else block

    def _read_examples(
        self, records: list[int], indices: range, bad: list[tuple[int, str]]
    ) -> Iterator[dict[str, Any]]:
        """The examples of records, or of those in their place; takes down the bad ones.

        A few at a time: hundreds of decoded images would not stay in the processor's cache.
        """
        # Pictures are cropped before their pixels are looked at.
        read = self.source.__getitems__ if self.image_size is None else self.source.pictures
        at_once = IMAGES_AT_ONCE if hasattr(self.source.records, "__getitems__") else 1
        for first in range(0, len(records), at_once):
            some, places = records[first : first + at_once], indices[first : first + at_once]
            if at_once > 1:
                try:
                    with self._located("", places):
                        examples = read(some)
                except BadImage:
                    if self.on_bad_image == "error":
                        raise
                else:
                    yield from examples
                    continue
            for record, index in zip(some, places, strict=True):
                with self._located(f"record {record} of ", [index]):
                    if self.on_bad_image == "skip":
                        example = self._next_good(read, record, bad)
                    else:
                        (example,) = read([record])
                yield example

    def _next_good(self, read: Callable, record: int, bad: list[tuple[int, str]]) -> dict[str, Any]:
        """The example of the first record from `record` on that can be used."""
        known = len(bad)
        while True:
            try:
                return read([record])[0]
            except BadImage as error:
                bad.append((record, str(error)))
            check_bad_fraction(self.source, self.max_bad_fraction, dict(bad[known:]))
            record = (record + 1) % len(self.source)

    @contextlib.contextmanager
    def _located(self, what: str, indices: Sequence[int]) -> Iterator[None]:
        """Adds to an exception's message what was being read."""
        try:
            yield
        except Exception as error:
            examples = " ... ".join(map(str, sorted({indices[0], indices[-1]})))
            _add_place(error, f"in {what}{self.source.name}, example {examples} of the run")
            raise


def _add_place(error: Exception, place: str) -> None:
    """Ends an exception's message with a place: commands print the message alone, no notes."""
    if isinstance(error, OSError) and error.strerror:
        error.strerror = f"{error.strerror} ({place})"
        error.args = (error.errno, error.strerror)  # what travels from a worker
    elif len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} ({place})",)
    else:
        error.add_note(place)


def _mirror(image: UInt8[np.ndarray, "h w c"], out: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes an image's mirror image. `out[:] = image[:, ::-1]` takes seven times as long."""
    for channel in range(image.shape[2]):  # loops over all pixels, not over each one's channels
        out[:, :, channel] = image[:, ::-1, channel]


def check_bad_fraction(source: Source, max_fraction: float, bad: dict[int, str]) -> None:
    """Raises BadImage if more records of a source are bad than that part of all."""
    if len(bad) > max_fraction * len(source) or len(bad) == len(source):
        raise BadImage(
            f"{source.name}: {len(bad):,} of {len(source):,} images cannot be used, more than "
            f"max_bad_fraction {max_fraction:g} allows; the last: {list(bad.values())[-1]}"
        )


def example_spec(source: Source, image_size: int | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of an example of the pipeline's, of images cropped to `image_size`."""
    height, width, channels = source.image_shape
    if source.latents:
        dtype = getattr(source.records, "stored_dtype", np.dtype(np.float32))
        shape = (height, width, 2 * channels)
    else:
        dtype = np.dtype(np.uint8)
        shape = (image_size or height, image_size or width, channels)
    return {
        "image": jax.ShapeDtypeStruct(shape, dtype),
        "label": jax.ShapeDtypeStruct((), np.dtype(np.int32)),
    }


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """One process's rows of global batch k, by k: what Grain shares out to threads and workers.

    A batch is of `parts` equal parts of `rows` rows, of which the process has those in `mine`.
    """

    stream: ExampleStream
    position: int
    rows: int
    mine: tuple[int, ...]
    parts: int

    def __len__(self) -> int:
        return (sys.maxsize - self.position) // (self.rows * self.parts)  # never reached

    def __getitem__(self, batch: int) -> dict[str, Any]:
        first = self.position + batch * self.parts * self.rows
        blocks = [self.stream.block(first + part * self.rows, self.rows) for part in self.mine]
        if len(blocks) == 1:
            return blocks[0]
        joined = {name: np.concatenate([b[name] for b in blocks]) for name in ("image", "label")}
        bad = {"bad": [pair for b in blocks for pair in b["bad"]]} if "bad" in blocks[0] else {}
        return joined | bad


def _records(seed: int, indices: range, count: int) -> Int64[np.ndarray, "n"]:
    """The records of consecutive examples, which may run over ends of epochs."""
    parts, first = [], indices.start
    while first < indices.stop:
        epoch, place = divmod(first, count)
        part = epoch_order(seed, epoch, count)[place : place + indices.stop - first]
        parts.append(part)
        first += len(part)
    return np.concatenate(parts)


# 8 bytes a record, 10 MB for ImageNet: kept for the epochs that reading ahead and a second stream
# (evaluation beside training) can touch at once.
@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, "{count}"]:
    """The order of `count` records in an epoch: the argsort of uniform 64-bit draws, so that every
    permutation is as likely as any other."""
    draws = _philox(seed, _ORDER, epoch).random_raw(count)
    return np.argsort(draws, kind="stable")


def _philox(seed: int, purpose: int, index: int) -> np.random.Philox:
    """Philox at block (0, 0, 0, index) of its counter: 2**192 blocks before it meets the next."""
    key = np.array([seed, purpose], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, index], np.uint64))


def _generators(seed: int, purpose: int, indices: Sequence[int]) -> Iterator[np.random.Generator]:
    """The generator of each index in turn, of use until the next one is taken.

    It is one object that is set anew: to make another takes seven times as long.
    """
    bits = _philox(seed, purpose, 0)
    generator, state = np.random.Generator(bits), bits.state
    for index in indices:
        state["state"]["counter"][3] = index
        bits.state = state
        yield generator


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """One process's rows of every global batch, read ahead of need; `create_batches` makes it.

    Each batch is {"image": (b, H, W, C), "label": int32 (b,)}, b being the global batch size over
    the number of processes: images uint8, or posteriors of latents, with twice the latent's
    channels (see `ExampleStream.block`). Also a context manager, which closes it.

    Attributes:
      stream: the run's examples.
      num_skipped: how many times a bad image was passed over in the batches given since this was
        made. May be read in any thread.
      bad_records: what is wrong with each of those, by record.
    """

    def __init__(
        self,
        stream: ExampleStream,
        open_at: Callable[[int], grain.DatasetIterator],
        position: int,
        global_batch_size: int,
    ):
        self.stream = stream
        self.num_skipped = 0
        self.bad_records: dict[int, str] = {}
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
            self._report(batch.pop("bad", ()))
        except BaseException:
            # Grain would go on with the batch after the one that failed; a caller that tries
            # again must get the one that it was owed.
            self.close()
            raise
        self._position += self._global_batch_size
        return {name: _own_memory(rows) for name, rows in batch.items()}

    def _report(self, bad: Iterable[tuple[int, str]]) -> None:
        """Counts bad images, and warns of each the first time that it is met."""
        for record, reason in bad:
            self.num_skipped += 1
            if record not in self.bad_records:
                self.bad_records[record] = reason
                count = len(self.bad_records)
                logging.warning("skipping %s (%d bad so far)", reason, count)
                check_bad_fraction(
                    self.stream.source, self.stream.max_bad_fraction, self.bad_records
                )

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
    process_index: int | Sequence[int],
    process_count: int,
    flip: bool,
    image_size: int | None = None,
    position: int = 0,
    num_workers: int = 0,
    read_ahead: int = 4,
    crop: str = "center",
    on_bad_image: str = "error",
    max_bad_fraction: float = 0.01,
) -> BatchIterator:
    """This process's batches of an endless run over `source`, shuffled anew each epoch.

    Global batch k holds examples position + k * global_batch_size and on, of an `ExampleStream`;
    process p of P gets rows p * b ... (p + 1) * b - 1 of it, b = global_batch_size / P. Batches
    run across the ends of epochs, and no example is left out.

    Args:
      source: what to read.
      global_batch_size: examples in a batch of all processes together.
      seed: of order, crops and mirroring, 0 <= seed < 2**64.
      process_index: which rows to read, 0 <= process_index < process_count, or several such
        indices, in whose order the rows then are. Processes that hold the same rows (replicas,
        or parts of one tensor-parallel group) pass the same.
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
      crop, on_bad_image, max_bad_fraction: as `ExampleStream` has them.

    Raises:
      ValueError: a number out of range, a batch that the processes cannot share equally, an
        image size that the source needs or cannot have, or an unknown word.
    """
    mine = (process_index,) if isinstance(process_index, int) else tuple(process_index)
    if process_count < 1 or not mine or not all(0 <= part < process_count for part in mine):
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
    stream = ExampleStream(source, seed, image_size, flip, crop, on_bad_image, max_bad_fraction)
    rows = global_batch_size // process_count

    def open_at(position: int) -> grain.DatasetIterator:
        blocks = _Blocks(stream, position, rows, mine, process_count)
        return _read(grain.MapDataset.source(blocks), num_workers, read_ahead)

    return BatchIterator(stream, open_at, position, global_batch_size)


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
