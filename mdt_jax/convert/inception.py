"""Weights of the FID Inception-v3 under PyTorch's names, the TensorFlow graph's, and ours.

One table has a row for each array: its three names, its shape, and the einops pattern from
PyTorch's layout to ours, which read backwards is the inverse. The graph keeps arrays in our layout.
Patterns only move entries, so every direction is exact.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from einops import rearrange

from mdt_jax.convert import trees
from mdt_jax.convert.trees import Shape, Tree

# A convolution of a block: PyTorch's name, the graph's, channels in and out, kernel.
_Row = tuple[str, str, int, int, tuple[int, int]]

# A convolution of the first block, by which the weights are recognised, in each naming.
BLOCK = "Mixed_5b"
_MARKS = (
    f"{BLOCK}.branch1x1.conv.weight",
    f"{BLOCK}/branch1x1/conv/kernel",
    "mixed/conv/conv2d_params",
)
# PyTorch's batch norm counts its updates; inference has no use for the count.
_COUNTER = ".num_batches_tracked"

_STEM: tuple[_Row, ...] = (
    ("Conv2d_1a_3x3", "conv", 3, 32, (3, 3)),
    ("Conv2d_2a_3x3", "conv_1", 32, 32, (3, 3)),
    ("Conv2d_2b_3x3", "conv_2", 32, 64, (3, 3)),
    ("Conv2d_3b_1x1", "conv_3", 64, 80, (1, 1)),
    ("Conv2d_4a_3x3", "conv_4", 80, 192, (3, 3)),
)


def _block_a(c: int, pool: int) -> tuple[_Row, ...]:
    return (
        ("branch1x1", "conv", c, 64, (1, 1)),
        ("branch5x5_1", "tower/conv", c, 48, (1, 1)),
        ("branch5x5_2", "tower/conv_1", 48, 64, (5, 5)),
        ("branch3x3dbl_1", "tower_1/conv", c, 64, (1, 1)),
        ("branch3x3dbl_2", "tower_1/conv_1", 64, 96, (3, 3)),
        ("branch3x3dbl_3", "tower_1/conv_2", 96, 96, (3, 3)),
        ("branch_pool", "tower_2/conv", c, pool, (1, 1)),
    )


_REDUCTION_A: tuple[_Row, ...] = (
    ("branch3x3", "conv", 288, 384, (3, 3)),
    ("branch3x3dbl_1", "tower/conv", 288, 64, (1, 1)),
    ("branch3x3dbl_2", "tower/conv_1", 64, 96, (3, 3)),
    ("branch3x3dbl_3", "tower/conv_2", 96, 96, (3, 3)),
)


def _block_b(w: int) -> tuple[_Row, ...]:
    return (
        ("branch1x1", "conv", 768, 192, (1, 1)),
        ("branch7x7_1", "tower/conv", 768, w, (1, 1)),
        ("branch7x7_2", "tower/conv_1", w, w, (1, 7)),
        ("branch7x7_3", "tower/conv_2", w, 192, (7, 1)),
        ("branch7x7dbl_1", "tower_1/conv", 768, w, (1, 1)),
        ("branch7x7dbl_2", "tower_1/conv_1", w, w, (7, 1)),
        ("branch7x7dbl_3", "tower_1/conv_2", w, w, (1, 7)),
        ("branch7x7dbl_4", "tower_1/conv_3", w, w, (7, 1)),
        ("branch7x7dbl_5", "tower_1/conv_4", w, 192, (1, 7)),
        ("branch_pool", "tower_2/conv", 768, 192, (1, 1)),
    )


_REDUCTION_B: tuple[_Row, ...] = (
    ("branch3x3_1", "tower/conv", 768, 192, (1, 1)),
    ("branch3x3_2", "tower/conv_1", 192, 320, (3, 3)),
    ("branch7x7x3_1", "tower_1/conv", 768, 192, (1, 1)),
    ("branch7x7x3_2", "tower_1/conv_1", 192, 192, (1, 7)),
    ("branch7x7x3_3", "tower_1/conv_2", 192, 192, (7, 1)),
    ("branch7x7x3_4", "tower_1/conv_3", 192, 192, (3, 3)),
)


def _block_c(c: int) -> tuple[_Row, ...]:
    return (
        ("branch1x1", "conv", c, 320, (1, 1)),
        ("branch3x3_1", "tower/conv", c, 384, (1, 1)),
        ("branch3x3_2a", "tower/mixed/conv", 384, 384, (1, 3)),
        ("branch3x3_2b", "tower/mixed/conv_1", 384, 384, (3, 1)),
        ("branch3x3dbl_1", "tower_1/conv", c, 448, (1, 1)),
        ("branch3x3dbl_2", "tower_1/conv_1", 448, 384, (3, 3)),
        ("branch3x3dbl_3a", "tower_1/mixed/conv", 384, 384, (1, 3)),
        ("branch3x3dbl_3b", "tower_1/mixed/conv_1", 384, 384, (3, 1)),
        ("branch_pool", "tower_2/conv", c, 192, (1, 1)),
    )


_BLOCKS: tuple[tuple[str, str, tuple[_Row, ...]], ...] = (
    ("Mixed_5b", "mixed", _block_a(192, 32)),
    ("Mixed_5c", "mixed_1", _block_a(256, 64)),
    ("Mixed_5d", "mixed_2", _block_a(288, 64)),
    ("Mixed_6a", "mixed_3", _REDUCTION_A),
    ("Mixed_6b", "mixed_4", _block_b(128)),
    ("Mixed_6c", "mixed_5", _block_b(160)),
    ("Mixed_6d", "mixed_6", _block_b(160)),
    ("Mixed_6e", "mixed_7", _block_b(192)),
    ("Mixed_7a", "mixed_8", _REDUCTION_B),
    ("Mixed_7b", "mixed_9", _block_c(1280)),
    ("Mixed_7c", "mixed_10", _block_c(2048)),
)
# The arrays of a convolution and its batch norm: PyTorch's name, ours, the graph's, pattern.
_ARRAYS = (
    ("conv.weight", "conv/kernel", "conv2d_params", "o i p q -> p q i o"),
    ("bn.weight", "bn/scale", "batchnorm/gamma", "c -> c"),
    ("bn.bias", "bn/bias", "batchnorm/beta", "c -> c"),
    ("bn.running_mean", "bn/mean", "batchnorm/moving_mean", "c -> c"),
    ("bn.running_var", "bn/var", "batchnorm/moving_variance", "c -> c"),
)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """An array: its names, PyTorch's shape, and the pattern from PyTorch's layout to ours."""

    torch: str
    path: str
    graph: str
    shape: Shape
    pattern: str

    @property
    def inverse(self) -> str:
        """The pattern from our layout to PyTorch's."""
        left, right = self.pattern.split(" -> ")
        return f"{right} -> {left}"

    @property
    def our_shape(self) -> Shape:
        """The shape in our tree and in the graph."""
        return tuple(_moved(self.shape, self.pattern))


def state_dict_shapes() -> dict[str, Shape]:
    """Names and shapes of PyTorch's state dict, in its order, without the update counters."""
    return {weight.torch: weight.shape for weight in _weights()}


def is_inception(names: Iterable[str]) -> bool:
    """Whether names of weights are an Inception-v3's, in any of the three namings."""
    return any(mark in names for mark in _MARKS)


def from_torch(weights: Mapping[str, np.ndarray]) -> Tree:
    """The parameter tree of the state dict of `pt_inception-2015-12-05-6726825d.pth`.

    Raises:
      ValueError: torchvision's weights, which are not FID's; a weight that is missing, unknown, of
        a wrong shape or not float32, by name.
    """
    names = [name for name in weights if not name.endswith(_COUNTER)]
    classes = weights["fc.weight"].shape[:1] if "fc.weight" in weights else ()
    if classes == (1000,) or any(name.startswith("AuxLogits.") for name in names):
        raise ValueError(
            "these are torchvision's inception_v3 weights (1000 classes), trained anew; FID is "
            "defined by those of 2015 (1008 classes)"
        )
    _check({n: weights[n] for n in names}, {w.torch: w.shape for w in _weights()})
    return trees.nest({w.path: rearrange(weights[w.torch], w.pattern) for w in _weights()})


def to_torch(params: Tree) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`.

    Raises:
      ValueError: the tree lacks or has too many parameters, by path.
    """
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params)}
    _check(flat, {w.path: w.our_shape for w in _weights()})
    return {w.torch: np.ascontiguousarray(rearrange(flat[w.path], w.inverse)) for w in _weights()}


def from_graph(constants: Mapping[str, np.ndarray]) -> Tree:
    """The parameter tree of the constants of `classify_image_graph_def.pb`, by their node names.

    Constants of other names, the resize's among them, are left out.

    Raises:
      ValueError: a constant is missing or of a wrong shape, by name.
    """
    expected = {w.graph: w.our_shape for w in _weights()}
    _check({name: constants[name] for name in expected if name in constants}, expected)
    return trees.nest({w.path: constants[w.graph] for w in _weights()})


def from_flat(arrays: Mapping[str, np.ndarray]) -> Tree:
    """The parameter tree of arrays by path, such as "Mixed_5b/branch1x1/conv/kernel".

    Raises:
      ValueError: an array that is missing, unknown, of a wrong shape or not float32, by path.
    """
    arrays = dict(arrays)
    _check(arrays, {w.path: w.our_shape for w in _weights()})
    return trees.nest({w.path: arrays[w.path] for w in _weights()})


@functools.cache
def _weights() -> tuple[_Weight, ...]:
    """The table, in the order of PyTorch's state dict."""
    rows = list(_STEM)
    for block, graph, block_rows in _BLOCKS:
        rows += [
            (f"{block}.{name}", f"{graph}/{scope}", *rest) for name, scope, *rest in block_rows
        ]
    weights = [weight for row in rows for weight in _convolution(row)]
    return (
        *weights,
        _Weight("fc.weight", "fc/kernel", "softmax/weights", (1008, 2048), "o i -> i o"),
        _Weight("fc.bias", "fc/bias", "softmax/biases", (1008,), "o -> o"),
    )


def _convolution(row: _Row) -> Iterator[_Weight]:
    name, scope, inputs, outputs, kernel = row
    place = name.replace(".", "/")
    for theirs, ours, graph, pattern in _ARRAYS:
        shape = (outputs, inputs, *kernel) if ours == "conv/kernel" else (outputs,)
        yield _Weight(f"{name}.{theirs}", f"{place}/{ours}", f"{scope}/{graph}", shape, pattern)


def _moved(shape: Shape, pattern: str) -> Iterator[int]:
    """The sides of a shape in the order that a pattern moves them to."""
    left, right = (side.split() for side in pattern.split(" -> "))
    return (shape[left.index(axis)] for axis in right)


def _check(arrays: Mapping[str, np.ndarray], expected: Mapping[str, Shape]) -> None:
    """Raises ValueError for the first missing or unknown name, wrong shape or type."""
    missing = [name for name in expected if name not in arrays]
    unknown = [name for name in arrays if name not in expected]
    if missing:
        near = difflib.get_close_matches(missing[0], unknown, n=1, cutoff=0.5)
        raise ValueError(
            f"weight {missing[0]!r} {expected[missing[0]]} of the FID Inception is missing"
            + (f" (and {len(missing) - 1} more)" if missing[1:] else "")
            + (f"; the nearest there is {near[0]!r}" if near else "")
        )
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(expected), n=1, cutoff=0.0)
        raise ValueError(
            f"{unknown[0]!r} is no weight of the FID Inception"
            + (f" (nor are {len(unknown) - 1} more)" if unknown[1:] else "")
            + f"; the nearest expected, {near[0]!r}, is there"
        )
    for name, shape in expected.items():
        array = arrays[name]
        if array.shape != shape:
            raise ValueError(f"weight {name!r} is of shape {array.shape}; it must be {shape}")
        if array.dtype != np.float32:
            raise ValueError(
                f"weight {name!r} is of type {array.dtype}; it must be float32, since rounded "
                "weights give other features"
            )
