"""MDT, MDTv2 and DiT weights between the authors' PyTorch names and this project's trees.

Every rule is an einops pattern from PyTorch's layout to ours; read backwards it is the inverse, so
the two directions cannot disagree, and since patterns only move entries, both are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

Tree = dict[str, Any]

# (PyTorch name, path in our tree, pattern). `h` are the heads, the other named factors fixed.
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
    """(PyTorch module list, our stack, indices in the list) of each stack of a family."""
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
    return rearrange(array, f"{right} -> {left}")


def _get(tree: Tree, path: str) -> Any:
    for key in path.split("/"):
        if key not in tree:
            return None
        tree = tree[key]
    return tree


def _set(tree: Tree, path: str, value: Any) -> None:
    *parents, leaf = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value


def from_torch(
    weights: Mapping[str, np.ndarray],
    *,
    family: str,
    depth: int,
    num_heads: int,
    decoder_depth: int = 0,
) -> Tree:
    """The parameter tree of a state dict under the authors' names.

    Args:
      weights: arrays by PyTorch name. The buffers `relative_position_index` are left out.
        Gradients or optimiser moments convert the same way.
      family, depth, num_heads, decoder_depth: of the model (`mdt_jax.models`).

    Raises:
      KeyError: a weight is missing, by its PyTorch name.
    """
    tree: Tree = {}
    for name, path, pattern in _MODEL_RULES:
        if family == "DiT" and path in ("decoder_pos_embed", "mask_token"):
            continue
        if family == "DiT" and path == "pos_embed" and name not in weights:
            continue  # its table is fixed, so it has no gradients or moments
        _set(tree, path, _to_flax(weights[name], pattern, num_heads))

    def block(prefix: str) -> Tree:
        rules = [rule for rule in _BLOCK_RULES if f"{prefix}.{rule[0]}" in weights]
        optional = ("attn.rel_pos_bias", "skip_linear")
        for name, _, _ in _BLOCK_RULES:
            if f"{prefix}.{name}" not in weights and not name.startswith(optional):
                raise KeyError(f"{prefix}.{name}")
        return {
            path: _to_flax(weights[f"{prefix}.{name}"], pattern, num_heads)
            for name, path, pattern in rules
        }

    for torch_list, stack, indices in _stacks(family, depth, decoder_depth):
        layers = [block(f"{torch_list}.{i}") for i in indices]
        for path in layers[0]:
            _set(tree, f"{stack}/layers/{path}", np.stack([layer[path] for layer in layers]))
    if family != "DiT":
        for path, array in block("sideblocks.0").items():
            _set(tree, f"side_block/{path}", array)
    return tree


def to_torch(
    params: Tree, *, family: str, depth: int, decoder_depth: int = 0
) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: weights by the authors' names."""
    weights = {}
    for name, path, pattern in _MODEL_RULES:
        array = _get(params, path)
        if array is not None:
            weights[name] = _to_torch(np.asarray(array), pattern)

    def block(prefix: str, subtree: Tree, layer: int | None) -> None:
        for name, path, pattern in _BLOCK_RULES:
            array = _get(subtree, path)
            if array is not None:
                array = np.asarray(array) if layer is None else np.asarray(array)[layer]
                weights[f"{prefix}.{name}"] = _to_torch(array, pattern)

    for torch_list, stack, indices in _stacks(family, depth, decoder_depth):
        for layer, index in enumerate(indices):
            block(f"{torch_list}.{index}", params[stack]["layers"], layer)
    if family != "DiT":
        block("sideblocks.0", params["side_block"], None)
    return weights
