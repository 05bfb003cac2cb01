"""Fixed functions of token positions: sin-cos tables and relative-position rows. NumPy."""

from __future__ import annotations

import numpy as np


def sincos_position_table(width: int, grid_size: int) -> np.ndarray:
    """MAE's 2-D sin-cos position table, (grid_size², width) float32.

    The column coordinate fills the first half, the row the second; each has its sines before its
    cosines. Raises ValueError when width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"hidden_size {width} is not a multiple of 4, as sin-cos tables need")
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    rows, columns = np.divmod(np.arange(grid_size**2), grid_size)
    halves = [np.outer(position, frequencies) for position in (columns, rows)]
    table = np.concatenate([f(half) for half in halves for f in (np.sin, np.cos)], axis=1)
    return table.astype(np.float32)


def relative_position_index(grid_size: int) -> np.ndarray:
    """Row of the bias table for every (query, key) pair of tokens.

    Returns (N, N) int32, N = grid_size²: (r_i − r_j + G − 1)(2G − 1) + (c_i − c_j + G − 1), i the
    query, tokens row by row (BEiT's window rule, as MDT uses it).
    """
    rows, columns = np.divmod(np.arange(grid_size**2), grid_size)
    row_offset = rows[:, None] - rows[None, :] + grid_size - 1
    column_offset = columns[:, None] - columns[None, :] + grid_size - 1
    return (row_offset * (2 * grid_size - 1) + column_offset).astype(np.int32)
