"""Gathering the arrays of all processes in every process, without losing a bit."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from mdt_jax.evaluation.batches import share

# Rows that are sent at a time; the devices hold them for a moment.
GATHER_ROWS = 8192


def gather_arrays(array: np.ndarray) -> list[np.ndarray]:
    """The arrays of all processes, in their order; all have one shape and type.

    They are sent as bytes: without 64-bit mode JAX would round float64 to float32.
    """
    if jax.process_count() == 1:
        return [array]
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    stacked = np.asarray(multihost_utils.process_allgather(data))
    return [np.ascontiguousarray(row).view(array.dtype).reshape(array.shape) for row in stacked]


def gather_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """All rows of an array whose rows are divided among the processes by `batches.share`.

    Args:
      rows: this process's share.
      count: how many rows all shares have.
    """
    processes = jax.process_count()
    if processes == 1:
        return rows
    sizes = [len(share(count, process, processes)) for process in range(processes)]
    padded = np.zeros((max(sizes), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    parts = [
        gather_arrays(padded[first : first + GATHER_ROWS])
        for first in range(0, len(padded), GATHER_ROWS)
    ]
    of_process = [np.concatenate(parts_) for parts_ in zip(*parts, strict=True)]
    return np.concatenate([part[:size] for part, size in zip(of_process, sizes, strict=True)])
