"""diffusers' layout of DiT (`facebook/DiT-XL-2-256`, a Transformer2DModel), under DiT's own names.

Every block there has its own copy of the two embedders, and separate arrays for q, k and v; the
position table is not stored. Everything else is DiT's under another name.

The outputs are DiT's, not quite those of diffusers: its timestep embedding spaces the frequencies
by 1/127 where the weights were trained with 1/128.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mdt_jax.convert.architecture import UnknownWeights, nearest
from mdt_jax.convert.trees import Shape

MARK = "transformer_blocks.0.norm1.linear.weight"  # a name that no other layout has
_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
}
_LABELS = "class_embedder.embedding_table.weight"
_MODEL = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
}
_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}


def depth(names: Iterable[str]) -> int:
    """The number of blocks among diffusers' names."""
    return 1 + max(int(n.split(".")[1]) for n in names if n.startswith("transformer_blocks."))


def sources(num_blocks: int) -> dict[str, tuple[str, ...]]:
    """The authors' names, each with diffusers' names whose arrays it joins along axis 0."""
    found: dict[str, tuple[str, ...]] = {}
    embeddings = "transformer_blocks.0.norm1.emb"
    for kind in ("weight", "bias"):
        found |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for ours, theirs in _MODEL.items()}
        for ours, theirs in _EMBEDDERS.items():
            found[f"{ours}.{kind}"] = (f"{embeddings}.{theirs}.{kind}",)
        for i in range(num_blocks):
            ours_block, theirs_block = f"blocks.{i}", f"transformer_blocks.{i}"
            found[f"{ours_block}.attn.qkv.{kind}"] = tuple(
                f"{theirs_block}.attn1.to_{part}.{kind}" for part in "qkv"
            )
            for ours, theirs in _BLOCK.items():
                found[f"{ours_block}.{ours}.{kind}"] = (f"{theirs_block}.{theirs}.{kind}",)
    return found | {"y_embedder.embedding_table.weight": (f"{embeddings}.{_LABELS}",)}


def copies(num_blocks: int) -> dict[str, list[str]]:
    """The names of block 0's embedders, each with its copies in the other blocks.

    The copies must hold the same numbers.
    """
    names = [f"{theirs}.{kind}" for theirs in _EMBEDDERS.values() for kind in ("weight", "bias")]
    block = "transformer_blocks.{}.norm1.emb.{}"
    return {
        block.format(0, name): [block.format(i, name) for i in range(1, num_blocks)]
        for name in [*names, _LABELS]
    }


def check_shapes(shapes: Mapping[str, Shape], num_blocks: int) -> None:
    """Raises UnknownWeights for a missing or unknown name, or parts that cannot be joined."""
    joined, copied = sources(num_blocks), copies(num_blocks)
    expected = [name for names in (*joined.values(), *copied.values()) for name in names]
    for name in expected:
        if name not in shapes:
            raise UnknownWeights(f"{name} of diffusers' DiT is missing{nearest(name, shapes)}")
    for name, shape in shapes.items():
        if name not in expected:
            near = nearest(name, expected, "the nearest expected")
            raise UnknownWeights(f"{name} {shape} is no weight of diffusers' DiT{near}")
    for names in joined.values():
        for name in names[1:]:
            if shapes[name] != shapes[names[0]]:
                raise UnknownWeights(
                    f"{name} has shape {shapes[name]}, {names[0]} has {shapes[names[0]]}"
                )
    patch = shapes["pos_embed.proj.weight"]
    if len(patch) != 4:
        raise UnknownWeights(f"pos_embed.proj.weight has shape {patch}, not 4 axes")
