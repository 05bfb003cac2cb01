"""Trees of parameters, nested dicts, addressed by paths such as "encoder/conv_in/kernel"."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Tree = dict[str, Any]
Shape = tuple[int, ...]  # an array's


def get(tree: Mapping[str, Any], path: str) -> Any:
    """The subtree or leaf at a path; None if there is none."""
    node: Any = tree
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def put(tree: Tree, path: str, value: Any) -> None:
    """Puts a value at a path, and makes the dicts on the way."""
    *parents, leaf = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path, as (path, leaf), in the tree's order."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def nest(leaves: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`: the tree of leaves that are given by path."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        put(tree, path, leaf)
    return tree


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """A leaf of a tree that is made anew each time `np.asarray` asks for it.

    Attributes:
      load: makes the array.
    """

    load: Callable[[], np.ndarray]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        array = self.load()
        return array if dtype is None else array.astype(dtype)
