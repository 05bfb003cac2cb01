"""An array that is made when it is needed: trees of them hold a large model without its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """A leaf of a tree that `np.asarray` makes, anew each time it is asked for.

    Attributes:
      load: makes the array.
    """

    load: Callable[[], np.ndarray]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        array = self.load()
        return array if dtype is None else array.astype(dtype)
