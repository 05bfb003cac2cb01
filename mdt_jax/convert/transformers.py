"""MDT, MDTv2 and DiT weights between the authors' PyTorch names and this project's trees.

Every rule is an einops pattern from PyTorch's layout to ours, which read backwards is the inverse:
the two directions cannot disagree, and since patterns only move entries, both are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from einops import rearrange

from mdt_jax.convert import trees
from mdt_jax.convert.architecture import BUFFER
from mdt_jax.convert.trees import LazyArray, Tree
from mdt_jax.models.positions import relative_position_index

# (PyTorch name, path in our tree, pattern). `h` is the number of heads; the other factors that have
# names are fixed.
_FACTORS = {"qkv": 3, "six": 6, "two": 2}
_LINEAR = "o i -> i o"
_SAME = "... -> ..."
_BLOCK_RULES = (
    ("attn.qkv.weight", "attn/qkv/kernel", "(qkv h e) i -> i qkv h e"),
    ("attn.qkv.bias", "attn/qkv/bias", "(qkv h e) -> qkv h e"),
    ("attn.proj.weight", "attn/proj/kernel", "o (h e) -> h e o"),
    ("attn.proj.bias", "attn/proj/bias", _SAME),
    ("attn.rel_pos_bias.relative_position_bias_table", "attn/relative_bias", _SAME),
    ("mlp.fc1.weight", "mlp/fc1/kernel", _LINEAR),
    ("mlp.fc1.bias", "mlp/fc1/bias", _SAME),
    ("mlp.fc2.weight", "mlp/fc2/kernel", _LINEAR),
    ("mlp.fc2.bias", "mlp/fc2/bias", _SAME),
    ("adaLN_modulation.1.weight", "modulation/linear/kernel", "(six o) i -> i six o"),
    ("adaLN_modulation.1.bias", "modulation/linear/bias", "(six o) -> six o"),
    ("skip_linear.weight", "skip/kernel", "o (two i) -> two i o"),
    ("skip_linear.bias", "skip/bias", _SAME),
)
_OPTIONAL = ("attn.rel_pos_bias", "skip_linear")  # not in every kind of block
_MODEL_RULES = (
    ("pos_embed", "pos_embed", "1 n d -> n d"),
    ("decoder_pos_embed", "decoder_pos_embed", "1 n d -> n d"),
    ("mask_token", "mask_token", "1 1 d -> d"),
    ("x_embedder.proj.weight", "patch_embed/proj/kernel", "d c p q -> p q c d"),
    ("x_embedder.proj.bias", "patch_embed/proj/bias", _SAME),
    ("t_embedder.mlp.0.weight", "timestep_embed/fc1/kernel", _LINEAR),
    ("t_embedder.mlp.0.bias", "timestep_embed/fc1/bias", _SAME),
    ("t_embedder.mlp.2.weight", "timestep_embed/fc2/kernel", _LINEAR),
    ("t_embedder.mlp.2.bias", "timestep_embed/fc2/bias", _SAME),
    ("y_embedder.embedding_table.weight", "label_embed", _SAME),
    ("final_layer.linear.weight", "final_layer/linear/kernel", _LINEAR),
    ("final_layer.linear.bias", "final_layer/linear/bias", _SAME),
    ("final_layer.adaLN_modulation.1.weight", "final_layer/modulation/linear/kernel",
     "(two o) i -> i two o"),
    ("final_layer.adaLN_modulation.1.bias", "final_layer/modulation/linear/bias",
     "(two o) -> two o"),
)  # fmt: skip


def _stacks(family: str, depth: int, decoder_depth: int) -> list[tuple[str, str, range]]:
    """Each of a family's stacks: (PyTorch module list, our stack, its indices in the list)."""
    half = (depth - decoder_depth) // 2
    return {
        "MDT": [
            ("blocks", "encoder_blocks", range(depth - decoder_depth)),
            ("blocks", "decoder_blocks", range(depth - decoder_depth, depth)),
        ],
        "MDTv2": [
            ("en_inblocks", "in_blocks", range(half)),
            ("en_outblocks", "out_blocks", range(half)),
            ("de_blocks", "decoder_blocks", range(decoder_depth)),
        ],
        "DiT": [("blocks", "blocks", range(depth))],
    }[family]


def _to_flax(array: np.ndarray, pattern: str, num_heads: int) -> np.ndarray:
    names = pattern.replace("(", " ").replace(")", " ").split()
    sizes = {k: v for k, v in {**_FACTORS, "h": num_heads}.items() if k in names}
    return rearrange(array, pattern, **sizes)


def _to_torch(array: np.ndarray, pattern: str) -> np.ndarray:
    left, right = pattern.split(" -> ")
    return np.ascontiguousarray(rearrange(array, f"{right} -> {left}"))


def _prefixes(family: str, depth: int, decoder_depth: int) -> list[tuple[str, list[str], bool]]:
    """Each place of blocks: (our path, the PyTorch blocks there, whether they are stacked)."""
    groups = [
        (f"{stack}/layers", [f"{torch_list}.{i}" for i in indices], True)
        for torch_list, stack, indices in _stacks(family, depth, decoder_depth)
    ]
    return groups if family == "DiT" else [*groups, ("side_block", ["sideblocks.0"], False)]


def from_torch(
    weights: Mapping[str, np.ndarray],
    *,
    family: str,
    depth: int,
    num_heads: int,
    decoder_depth: int = 0,
    lazy: bool = False,
) -> Tree:
    """The parameter tree of a state dict under the authors' names, in its dtypes.

    Weights are read one at a time, so that a lazy mapping never holds more than one.

    Args:
      weights: arrays by PyTorch name. Gradients or optimiser moments convert the same way.
      family, depth, num_heads, decoder_depth: settings of the model (`mdt_jax.models`).
      lazy: whether leaves are `LazyArray`s, made when they are asked for.

    Raises:
      KeyError: a weight is missing, by its PyTorch name.
      ValueError: a `relative_position_index` that is not the authors', which means another order of
        tokens.
    """
    tree: Tree = {}
    make = LazyArray if lazy else lambda load: load()
    for name, path, pattern in _MODEL_RULES:
        if family == "DiT" and path in ("decoder_pos_embed", "mask_token"):
            continue
        if family == "DiT" and path == "pos_embed" and name not in weights:
            continue  # its table is fixed, so it has no gradients or moments
        if name not in weights:
            raise KeyError(name)
        trees.put(tree, path, make(partial(_convert, weights, name, pattern, num_heads)))

    for group, blocks, stacked in _prefixes(family, depth, decoder_depth):
        for name, path, pattern in _BLOCK_RULES:
            names = [f"{block}.{name}" for block in blocks]
            if names[0] not in weights and name.startswith(_OPTIONAL):
                continue
            for missing in (n for n in names if n not in weights):
                raise KeyError(missing)
            convert = _stack if stacked else _convert
            names = names if stacked else names[0]
            load = partial(convert, weights, names, pattern, num_heads)
            trees.put(tree, f"{group}/{path}", make(load))
        for block in blocks:
            _check_index(weights, f"{block}.attn.rel_pos_bias.")
    return tree


def _convert(
    weights: Mapping[str, np.ndarray], name: str, pattern: str, num_heads: int
) -> np.ndarray:
    return np.array(_to_flax(weights[name], pattern, num_heads), order="C")


def _stack(
    weights: Mapping[str, np.ndarray], names: Sequence[str], pattern: str, num_heads: int
) -> np.ndarray:
    """Converts the weights of several blocks and stacks them on a new first axis."""
    for i, name in enumerate(names):
        array = _to_flax(weights[name], pattern, num_heads)
        if i == 0:
            stacked = np.empty((len(names), *array.shape), array.dtype)
        elif array.dtype != stacked.dtype:
            wider = np.promote_types(np.float32, stacked.dtype)  # it holds every 16-bit float
            stacked = stacked.astype(np.promote_types(wider, array.dtype), copy=False)
        stacked[i] = array
    return stacked


def _check_index(weights: Mapping[str, np.ndarray], prefix: str) -> None:
    name, table = f"{prefix}{BUFFER}", f"{prefix}relative_position_bias_table"
    if name in weights and not np.array_equal(weights[name], _index_of(weights[table])):
        raise ValueError(f"{name} is not the authors' order of tokens, row by row")


def _index_of(bias_table: np.ndarray) -> np.ndarray:
    """The buffer for a bias table of (2G − 1)² + 3 rows."""
    grid_size = (math.isqrt(bias_table.shape[0] - 3) + 1) // 2
    return relative_position_index(grid_size).astype(np.int64)


def to_torch(
    params: Tree,
    *,
    family: str,
    depth: int,
    decoder_depth: int = 0,
    buffers: bool = False,
) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: weights by the authors' names.

    Args:
      params: a parameter tree; `LazyArray`s are made one at a time.
      family, depth, decoder_depth: settings of the model.
      buffers: whether to add every block's `relative_position_index`, which the authors' strict
        loading needs.
    """
    weights = {}
    for name, path, pattern in _MODEL_RULES:
        if (array := trees.get(params, path)) is not None:
            weights[name] = _to_torch(np.asarray(array), pattern)
    for group, blocks, stacked in _prefixes(family, depth, decoder_depth):
        for name, path, pattern in _BLOCK_RULES:
            if (array := trees.get(params, f"{group}/{path}")) is None:
                continue
            layers = np.asarray(array) if stacked else np.asarray(array)[None]
            for block, layer in zip(blocks, layers, strict=True):
                weights[f"{block}.{name}"] = _to_torch(layer, pattern)
                if buffers and path == "attn/relative_bias":
                    weights[f"{block}.attn.rel_pos_bias.{BUFFER}"] = _index_of(layer)
    return weights
