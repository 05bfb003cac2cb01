"""The input pipeline: endless batches for each process, read in parallel ahead of need.

An `ExampleStream` gives the run's examples. The pipeline divides them among the processes: each
reads its rows of a batch as one block, and Grain reads blocks in threads or worker processes. The
whole state of an iterator is one number, the global position: how many examples of the run all
processes together have been given.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from mdt_jax.data import reading
from mdt_jax.data.source import Source
from mdt_jax.data.stream import ExampleStream, check_bad_fraction


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
      source: the data set.
      global_batch_size: examples in a batch of all processes together.
      seed: the seed of order, crops and mirroring, 0 <= seed < 2**64.
      process_index: which part of the rows to read, 0 <= process_index < process_count, or several
        parts, whose rows then come in that order. Processes that hold the same rows (replicas, or
        parts of one tensor-parallel group) pass the same index.
      process_count: into how many parts the rows are divided. With pure data parallelism the two
        are `jax.process_index()` and `jax.process_count()`.
      flip: mirror each example with probability 1/2.
      image_size: crop and resize images to this height and width; None leaves them as they are.
      position: the first example: 0, or the `position` of the run's last iterator, which may have
        had another batch size and number of processes.
      num_workers: reading processes, each with its own copy of a source in memory. 0 reads with
        threads in this process, which is enough unless Python code (decoding, cropping) takes most
        of the time. A program with workers needs an `if __name__ == "__main__":` guard.
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


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """One process's rows of every global batch, read ahead of need; `create_batches` makes it.

    Each batch is {"image": (b, H, W, C), "label": int32 (b,)}, b being the global batch size over
    the number of processes: images uint8, or posteriors of latents, with twice the latent's
    channels (see `ExampleStream.block`). It is also a context manager, which closes it.

    Attributes:
      stream: the run's examples.
      num_skipped: how many times a bad image was passed over, in the batches given since the
        iterator was made. Any thread may read it.
      bad_records: the reason for each of those images, by record.
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
        self._readers: list[grain.DatasetIterator] = []  # one while it reads, or none
        # Also at exit: Grain's workers end badly once the interpreter is half gone.
        weakref.finalize(self, _close_all, self._readers)

    @property
    def position(self) -> int:
        """How many examples of the run all processes together have been given, from its start.

        Examples that are only read ahead do not count. `create_batches(..., position=...)` goes on
        from here.
        """
        return self._position

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._readers:
            self._readers.append(self._open_at(self._position))
        try:
            with reading.noting(self.stream.source.name, self._place, waits=True):
                batch = next(self._readers[0])
            self._report(batch.pop("bad", ()))
        except BaseException as error:
            # Its note, of frames that it leaves out of a traceback, is no part of a message.
            notes = getattr(error, "__notes__", ())
            error.__notes__ = [note for note in notes if "Grain has removed" not in note]
            # Grain would go on with the batch after the one that failed; a caller that tries again
            # must get the one that failed.
            self.close()
            raise
        self._position += self._global_batch_size
        return {name: _own_memory(rows) for name, rows in batch.items()}

    def _place(self) -> str:
        first, last = self._position, self._position + self._global_batch_size - 1
        return f"examples {first} to {last} of the run, the first at {self.stream.place(first)}"

    def _report(self, bad: Iterable[tuple[int, str]]) -> None:
        """Counts bad images, and warns of each when it is met for the first time."""
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
        """Ends the reading threads and workers; a later `next` starts them again at `position`."""
        _close_all(self._readers)

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _close_all(readers: list[grain.DatasetIterator]) -> None:
    while readers:
        readers.pop().close()


def _own_memory(rows: np.ndarray) -> np.ndarray:
    """`rows`, copied if they lie in a worker's shared memory.

    That memory would live as long as any reference to it, such as a CPU device's array, and leak
    when the program ends.
    """
    return np.array(rows) if isinstance(rows, grain.multiprocessing.SharedMemoryArray) else rows


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """One process's rows of global batch k, by k. Grain reads them in its threads and workers.

    A batch has `parts` equal parts of `rows` rows; the process reads those in `mine`.
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


def _read(batches: grain.MapDataset, num_workers: int, read_ahead: int) -> grain.DatasetIterator:
    """An iterator over batches, read ahead.

    Without workers `read_ahead` threads read one batch each; with workers they together read that
    many batches ahead.
    """
    if num_workers == 0:
        threads = grain.ReadOptions(num_threads=read_ahead, prefetch_buffer_size=read_ahead)
        return iter(batches.to_iter_dataset(threads))
    if not flags.FLAGS.is_parsed():  # in a notebook or a test; Grain's workers read its flags
        flags.FLAGS.mark_as_parsed()
    no_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    workers = grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=math.ceil(read_ahead / num_workers)
    )
    return iter(batches.to_iter_dataset(no_threads).mp_prefetch(workers))
