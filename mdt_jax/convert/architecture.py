"""Recognising the network of a set of PyTorch weights by their names and shapes alone."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from mdt_jax.convert.inception import is_inception
from mdt_jax.convert.trees import Shape
from mdt_jax.models.registry import SIZES, model_names

# Widths the authors trained, and the heads they gave them (DiT, table 1).
KNOWN_HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
# A label table of this many rows is taken for ImageNet's without a null row; any other has one.
_KNOWN_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a network, under the names of `mdt_jax.models.LatentTransformer`.

    Attributes:
      family: "MDT", "MDTv2" or "DiT".
      decoder_depth: 0 for DiT, which has no decoder.

    The other fields are those of `LatentTransformer`.
    """

    family: str
    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    decoder_depth: int
    mlp_ratio: float
    num_classes: int
    null_class: bool
    learn_variance: bool

    @property
    def grid_size(self) -> int:
        """The side of the token grid."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """The number of patch tokens."""
        return self.grid_size**2

    @property
    def name(self) -> str:
        """The published model's name, such as "MDTv2-XL/2"; the family's if it is not published."""
        sizes = {key: getattr(self, key) for key in ("depth", "hidden_size", "num_heads")}
        size = next((size for size, known in SIZES.items() if known == sizes), None)
        name = f"{self.family}-{size}/{self.patch_size}"
        return name if name in model_names() and self.mlp_ratio == 4 else self.family

    def settings(self) -> dict[str, Any]:
        """The fields as keywords of `mdt_jax.create_model(family, ...)`."""
        fields = dataclasses.asdict(self)
        del fields["family"]
        if self.family == "DiT":
            del fields["decoder_depth"]
        return fields

    def hints(self) -> dict[str, int]:
        """Keywords of `identify` for weights meant for this network, which may not show them all.

        The number of heads is the authors' for this width where they trained it.
        """
        hints = {"num_heads": KNOWN_HEADS.get(self.hidden_size, self.num_heads)}
        if self.family == "MDT":
            hints["decode_layers"] = self.decoder_depth
        return hints


class UnknownWeights(ValueError):
    """Weights that are not those of an MDT, MDTv2 or DiT; the message says what is wrong."""


BUFFER = "relative_position_index"  # a fixed int64 table in every block, not a parameter


def state_dict_shapes(a: Architecture) -> dict[str, Shape]:
    """Names and shapes of the authors' `state_dict()`, in its order, buffers included."""
    d, p, hidden = a.hidden_size, a.patch_size, int(a.hidden_size * a.mlp_ratio)
    out = a.in_channels * (2 if a.learn_variance else 1)
    rows = a.num_classes + (a.null_class or a.num_classes == 0)
    shapes: dict[str, Shape] = {"pos_embed": (1, a.num_tokens, d)}
    if a.family != "DiT":
        shapes |= {"decoder_pos_embed": (1, a.num_tokens, d), "mask_token": (1, 1, d)}
    shapes |= {
        "x_embedder.proj.weight": (d, a.in_channels, p, p),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (rows, d),
    }

    def block(prefix: str, skip: bool) -> dict[str, Shape]:
        attention = {"qkv.weight": (3 * d, d), "qkv.bias": (3 * d,)}
        attention |= {"proj.weight": (d, d), "proj.bias": (d,)}
        if a.family != "DiT":
            table = (2 * a.grid_size - 1) ** 2 + 3
            attention["rel_pos_bias.relative_position_bias_table"] = (table, a.num_heads)
            attention[f"rel_pos_bias.{BUFFER}"] = (a.num_tokens, a.num_tokens)
        parts = {f"attn.{name}": shape for name, shape in attention.items()}
        parts |= {"mlp.fc1.weight": (hidden, d), "mlp.fc1.bias": (hidden,)}
        parts |= {"mlp.fc2.weight": (d, hidden), "mlp.fc2.bias": (d,)}
        parts |= {"adaLN_modulation.1.weight": (6 * d, d), "adaLN_modulation.1.bias": (6 * d,)}
        if skip:
            parts |= {"skip_linear.weight": (d, 2 * d), "skip_linear.bias": (d,)}
        return {f"{prefix}.{name}": shape for name, shape in parts.items()}

    for torch_list, depth, skip in _lists(a):
        for i in range(depth):
            shapes |= block(f"{torch_list}.{i}", skip)
    return shapes | {
        "final_layer.linear.weight": (p * p * out, d),
        "final_layer.linear.bias": (p * p * out,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }


def parameter_shapes(a: Architecture) -> dict[str, Shape]:
    """`state_dict_shapes` without the buffers, in the order of `parameters()` and optimisers."""
    shapes = state_dict_shapes(a)
    return {name: shape for name, shape in shapes.items() if not name.endswith(BUFFER)}


def _lists(a: Architecture) -> list[tuple[str, int, bool]]:
    """(module list, blocks in it, whether they take a shortcut), in the order of registration."""
    if a.family == "DiT":
        return [("blocks", a.depth, False)]
    if a.family == "MDT":
        return [("blocks", a.depth, False), ("sideblocks", 1, False)]
    half = (a.depth - a.decoder_depth) // 2
    return [
        ("en_inblocks", half, False),
        ("en_outblocks", half, True),
        ("de_blocks", a.decoder_depth, True),
        ("sideblocks", 1, False),
    ]


def identify(
    shapes: Mapping[str, Shape],
    *,
    decode_layers: int = 2,
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> Architecture:
    """The architecture behind a state dict of the authors' names, checked name by name.

    Args:
      shapes: every array's shape, by name.
      decode_layers: decoder depth of an MDT v1, which its weights do not show.
      num_heads: heads of a DiT, whose weights do not show them; None takes those of the known
        widths.
      num_classes: number of classes, which tells whether the last row of the label table is the
        null class. If None, a table of 1000 rows has no null row, one of 1 row is an unconditional
        model's, and any other ends in the null row.

    Raises:
      UnknownWeights: another kind of weights; a key that is missing or unknown, with the nearest
        expected or found; a wrong shape, with the right one; heads that must be given.
    """
    a = _guess(shapes, decode_layers, num_heads, num_classes)
    if a.family == "MDT" and not 0 < decode_layers < a.depth:
        raise UnknownWeights(
            f"--decode_layers {decode_layers}: an MDT of {a.depth} blocks has 1 to {a.depth - 1}"
        )
    if a.num_heads < 1 or a.hidden_size % a.num_heads:
        given = "--num_heads " if a.family == "DiT" else "number of heads "
        raise UnknownWeights(f"{given}{a.num_heads} does not divide the width {a.hidden_size}")
    _check(shapes, state_dict_shapes(a), a)
    return a


def _guess(
    shapes: Mapping[str, Shape],
    decode_layers: int,
    num_heads: int | None,
    num_classes: int | None,
) -> Architecture:
    depths = {name: _count(shapes, name) for name in ("blocks", "en_inblocks", "de_blocks")}
    if not depths["blocks"] and not depths["en_inblocks"]:
        raise UnknownWeights(f"not an MDT, MDTv2 or DiT: {_what_else(shapes)}")
    first = "en_inblocks.0" if depths["en_inblocks"] else "blocks.0"
    bias = f"{first}.attn.rel_pos_bias.relative_position_bias_table"
    family = "MDTv2" if depths["en_inblocks"] else "MDT" if bias in shapes else "DiT"

    def shape(name: str, dimensions: int) -> Shape:
        if len(found := shapes.get(name, ())) == dimensions:
            return found
        problem = f"has shape {found}, not {dimensions} axes" if name in shapes else "is missing"
        near = nearest(name, shapes)
        raise UnknownWeights(f"{name} {problem}{near if name not in shapes else ''}")

    _, tokens, width = shape("pos_embed", 3)
    _, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise UnknownWeights(f"pos_embed {shapes['pos_embed']}: {tokens} tokens are no square grid")
    (outputs,) = shape("final_layer.linear.bias", 1)
    classes, null = _classes(shape("y_embedder.embedding_table.weight", 2)[0], num_classes)
    if family == "DiT":
        heads = num_heads or KNOWN_HEADS.get(width)
        if heads is None:
            known = ", ".join(f"{w}: {h}" for w, h in KNOWN_HEADS.items())
            raise UnknownWeights(
                f"a DiT of width {width} does not show its number of heads: give --num_heads "
                f"(known by width: {known})"
            )
    else:
        heads = shape(bias, 2)[1]
    in_blocks, decoder = depths["en_inblocks"], depths["de_blocks"]
    return Architecture(
        family=family,
        input_size=grid * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=2 * in_blocks + decoder if family == "MDTv2" else depths["blocks"],
        num_heads=heads,
        decoder_depth={"MDTv2": decoder, "MDT": decode_layers, "DiT": 0}[family],
        mlp_ratio=shape(f"{first}.mlp.fc1.bias", 1)[0] / width,
        num_classes=classes,
        null_class=null,
        learn_variance=outputs == 2 * patch * patch * channels,
    )


def _classes(rows: int, num_classes: int | None) -> tuple[int, bool]:
    """The number of classes of a label table, and whether it has a null row."""
    if num_classes is None:
        if rows == 1:
            return 0, True
        return (rows, False) if rows == _KNOWN_CLASSES else (rows - 1, True)
    if rows - num_classes not in (0, 1):
        raise UnknownWeights(
            f"--num_classes {num_classes}: the label table has {rows} rows, so it is {rows - 1} "
            f"with a null class or {rows} without"
        )
    return num_classes, rows > num_classes


def _count(shapes: Mapping[str, Shape], module_list: str) -> int:
    found = {
        int(index)
        for name in shapes
        if name.startswith(f"{module_list}.") and (index := name.split(".")[1]).isdecimal()
    }
    return max(found) + 1 if found else 0


def _check(shapes: Mapping[str, Shape], expected: Mapping[str, Shape], a: Architecture) -> None:
    """Raises UnknownWeights for the first missing or unknown name or wrong shape."""
    missing = [name for name in expected if name not in shapes and not name.endswith(BUFFER)]
    unknown = [name for name in shapes if name not in expected]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UnknownWeights(
            f"{missing[0]} {expected[missing[0]]} of {a.name} is missing{more}"
            f"{nearest(missing[0], unknown or shapes)}"
        )
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UnknownWeights(
            f"{unknown[0]} {shapes[unknown[0]]} is no weight of {a.name}{more}"
            f"{nearest(unknown[0], expected, 'the nearest expected')}"
        )
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            raise UnknownWeights(f"{name} has shape {shapes[name]}; {a.name} has {shape}")


def nearest(name: str, names: Iterable[str], what: str = "the nearest there") -> str:
    """The end of a message that gives the most similar of some names; empty if none is similar."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.1)
    return f"; {what} is {near[0]}" if near else ""


def _what_else(shapes: Mapping[str, Shape]) -> str:
    """Words for weights of another network: its name if it is known, or the first names in it."""
    if any("encoder.conv_in" in name for name in shapes):
        return "these are an autoencoder's (a VAE); give it as --vae instead"
    if is_inception(shapes):
        return "these are an Inception-v3's, which judges samples; give it as --inception instead"
    names = ", ".join(list(shapes)[:3])
    return f"no blocks.0 or en_inblocks.0 among its names ({names}, …)"
