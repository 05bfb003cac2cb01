"""KL-autoencoder weights between PyTorch's names and this project's trees.

Three namings are in use for one network: CompVis's (latent-diffusion, and every checkpoint that
carries its first stage), diffusers', and diffusers' before its attention layers were renamed. Each
is a column of one table, and each array of a kind of layer has one einops pattern, which read
backwards is the inverse: the directions cannot disagree, and since patterns only move entries, both
are exact.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from einops import rearrange

from mdt_jax.convert import trees
from mdt_jax.convert.autoencoder_settings import DEFAULT_NORM_GROUPS, AutoencoderSettings
from mdt_jax.convert.trees import Shape, Tree

# Places of layers: our path, diffusers' name, CompVis's. i counts stages in the order they run, and
# `rest` the stages after i, by which CompVis counts the decoder's. j counts blocks.
_PLACES = (
    ("conv_in", "conv_in", "conv_in"),
    ("down_{i}/block_{j}", "down_blocks.{i}.resnets.{j}", "down.{i}.block.{j}"),
    ("down_{i}/attn_{j}", "down_blocks.{i}.attentions.{j}", "down.{i}.attn.{j}"),
    ("downsample_{i}", "down_blocks.{i}.downsamplers.0.conv", "down.{i}.downsample.conv"),
    ("up_{i}/block_{j}", "up_blocks.{i}.resnets.{j}", "up.{rest}.block.{j}"),
    ("up_{i}/attn_{j}", "up_blocks.{i}.attentions.{j}", "up.{rest}.attn.{j}"),
    ("upsample_{i}", "up_blocks.{i}.upsamplers.0.conv", "up.{rest}.upsample.conv"),
    ("mid/block_0", "mid_block.resnets.0", "mid.block_1"),
    ("mid/attn_0", "mid_block.attentions.0", "mid.attn_1"),
    ("mid/block_1", "mid_block.resnets.1", "mid.block_2"),
    ("norm_out", "conv_norm_out", "norm_out"),
    ("conv_out", "conv_out", "conv_out"),
    ("quant", "quant_conv", "quant_conv"),
    ("post_quant", "post_quant_conv", "post_quant_conv"),
)
# Parts of residual blocks and attention: our names, diffusers', its old ones, CompVis's.
_PARTS = (
    ("norm1", "norm1", "norm1", "norm1"),
    ("conv1", "conv1", "conv1", "conv1"),
    ("norm2", "norm2", "norm2", "norm2"),
    ("conv2", "conv2", "conv2", "conv2"),
    ("shortcut", "conv_shortcut", "conv_shortcut", "nin_shortcut"),
    ("norm", "group_norm", "group_norm", "norm"),
    ("q", "to_q", "query", "q"),
    ("k", "to_k", "key", "k"),
    ("v", "to_v", "value", "v"),
    ("proj", "to_out.0", "proj_attn", "proj_out"),
)
_DIFFUSERS, _OLD_DIFFUSERS, _COMPVIS = range(3)
_PLACE_NAMES = {
    naming: {ours: (compvis if naming == _COMPVIS else diffusers)
             for ours, diffusers, compvis in _PLACES}
    for naming in (_DIFFUSERS, _OLD_DIFFUSERS, _COMPVIS)
}  # fmt: skip
_PART_NAMES = {
    naming: {ours: theirs[naming] for ours, *theirs in _PARTS}
    for naming in (_DIFFUSERS, _OLD_DIFFUSERS, _COMPVIS)
}
# (PyTorch's name, our name, pattern) of each array of a kind of layer. CompVis stores linear layers
# as 1 × 1 convolutions.
_ARRAYS = {
    "conv": (("weight", "kernel", "o i p q -> p q i o"), ("bias", "bias", "o -> o")),
    "linear": (("weight", "kernel", "o i -> i o"), ("bias", "bias", "o -> o")),
    "norm": (("weight", "scale", "c -> c"), ("bias", "bias", "c -> c")),
}
# Names in training files that are not the autoencoder's: discriminator and LPIPS, averages.
_IGNORED = ("loss.", "model_ema.")


def settings_from_shapes(shapes: Mapping[str, Shape]) -> AutoencoderSettings:
    """The settings of an autoencoder, read off the names and shapes of its weights, in any naming.

    The number of norm groups and the scale do not show: they are taken to be Stable Diffusion's.

    Raises:
      ValueError: these are no KL autoencoder's weights.
    """
    prefix, naming = _locate(shapes)

    def name(place: str, part: str = "", i: int = 0, j: int = 0, stages: int = 1) -> str:
        layer = _Layer(place, part, "", 0, 0, i, j, rest=stages - 1 - i)
        return f"{prefix}{_name(naming, layer)}.weight"

    def convolution(place: str, part: str = "", i: int = 0) -> Shape:
        key = name(place, part, i)
        if len(shapes.get(key, ())) != 4:
            held = f"is of shape {shapes[key]}" if key in shapes else "is missing"
            raise ValueError(f"weight {key!r} {held}; it must be a convolution's, of 4 axes")
        return shapes[key]

    block, first = "encoder/down_{i}/block_{j}", "conv1"
    widths, blocks = [convolution(block, first)[0]], 1
    while name(block, first, len(widths)) in shapes:
        widths.append(convolution(block, first, len(widths))[0])
    while name(block, first, 0, blocks) in shapes:
        blocks += 1
    latent_channels = convolution("decoder/conv_in")[1]
    moments = convolution("encoder/conv_out")[0]
    if moments != 2 * latent_channels:
        raise ValueError(
            f"the encoder gives {moments} channels and the decoder takes {latent_channels}: not "
            f"means and variances, {2 * latent_channels}, so this is no KL autoencoder"
        )

    def attentive(place: str) -> tuple[int, ...]:
        stages = range(len(widths))
        return tuple(i for i in stages if name(place, "q", i, 0, len(widths)) in shapes)

    return AutoencoderSettings(
        in_channels=convolution("encoder/conv_in")[1],
        out_channels=convolution("decoder/conv_out")[0],
        latent_channels=latent_channels,
        block_widths=tuple(widths),
        layers_per_block=blocks,
        norm_groups=DEFAULT_NORM_GROUPS,
        down_attention=attentive("encoder/down_{i}/attn_{j}"),
        up_attention=attentive("decoder/up_{i}/attn_{j}"),
        mid_attention=name("encoder/mid/attn_0", "q") in shapes,
        quant_conv=name("quant") in shapes,
        post_quant_conv=name("post_quant") in shapes,
    )


def from_torch(weights: Mapping[str, np.ndarray], settings: AutoencoderSettings) -> Tree:
    """The parameter tree of a state dict in any of the three namings, in its types.

    Other weights of a training file are left out: everything outside the autoencoder's prefix
    (`first_stage_model.`), `loss.` and `model_ema.`.

    Raises:
      ValueError: a weight is missing, unknown or of a wrong shape, or the file holds other things.
    """
    prefix, naming = _locate(weights)
    layers = {prefix + _name(naming, layer): layer for layer in _layers(settings)}
    ignored = tuple(f"{prefix}{part}" for part in _IGNORED)
    found = [n for n in weights if n.startswith(prefix) and not n.startswith(ignored)]
    expected = [
        f"{name}.{array}" for name, layer in layers.items() for array, _, _ in _ARRAYS[layer.kind]
    ]
    check_names(found, expected)
    flat = {}
    for name, layer in layers.items():
        for theirs, ours, pattern in _ARRAYS[layer.kind]:
            array, key = weights[f"{name}.{theirs}"], f"{name}.{theirs}"
            shape = layer.shape if theirs == "weight" else (layer.outputs,)
            if layer.kind == "linear" and array.shape == (*shape, 1, 1):
                array = array[..., 0, 0]
            check_shape(key, array.shape, shape)
            flat[f"{layer.path}/{ours}"] = rearrange(array, pattern)
    return trees.nest(flat)


def to_torch(params: Tree, settings: AutoencoderSettings) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: weights by diffusers' present names.

    Raises:
      ValueError: the tree lacks a parameter, by its path.
    """
    weights = {}
    for layer in _layers(settings):
        for theirs, ours, pattern in _ARRAYS[layer.kind]:
            left, right = pattern.split(" -> ")
            path, name = f"{layer.path}/{ours}", f"{_name(_DIFFUSERS, layer)}.{theirs}"
            array = rearrange(parameter(params, path), f"{right} -> {left}")
            weights[name] = np.ascontiguousarray(array)
    return weights


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer with arrays.

    Attributes:
      place: a template of `_PLACES`, after its side: "encoder/conv_in"; "quant" has no side.
      part: its name in `_PARTS`, "" outside blocks and attention.
      kind: "conv", "linear" or "norm".
      inputs, outputs: channels.
      i, j, rest: the numbers that fill the template.
      kernel: side of a convolution's kernel.
    """

    place: str
    part: str
    kind: str
    inputs: int
    outputs: int
    i: int = 0
    j: int = 0
    rest: int = 0
    kernel: int = 3

    @property
    def path(self) -> str:
        """Its path in our tree."""
        path = self.place.format(i=self.i, j=self.j)
        return f"{path}/{self.part}" if self.part else path

    @property
    def shape(self) -> Shape:
        """The shape of its weight in PyTorch."""
        if self.kind == "norm":
            return (self.outputs,)
        kernel = (self.kernel, self.kernel) if self.kind == "conv" else ()
        return (self.outputs, self.inputs, *kernel)


def _name(naming: int, layer: _Layer) -> str:
    """A layer's PyTorch name in one of the namings."""
    side, _, place = layer.place.partition("/")
    names = _PLACE_NAMES[naming]
    template = f"{side}.{names[place]}" if place else names[side]
    name = template.format(i=layer.i, j=layer.j, rest=layer.rest)
    return f"{name}.{_PART_NAMES[naming][layer.part]}" if layer.part else name


def _layers(s: AutoencoderSettings) -> Iterator[_Layer]:
    """Every layer of an autoencoder."""
    widths, moments = s.block_widths, 2 * s.latent_channels
    yield _Layer("encoder/conv_in", "", "conv", s.in_channels, widths[0])
    yield from _stages("encoder/down", widths, s.layers_per_block, s.down_attention)
    yield from _mid("encoder", widths[-1], s.mid_attention)
    yield _Layer("encoder/norm_out", "", "norm", widths[-1], widths[-1])
    yield _Layer("encoder/conv_out", "", "conv", widths[-1], moments)
    if s.quant_conv:
        yield _Layer("quant", "", "conv", moments, moments, kernel=1)
    if s.post_quant_conv:
        yield _Layer("post_quant", "", "conv", s.latent_channels, s.latent_channels, kernel=1)
    yield _Layer("decoder/conv_in", "", "conv", s.latent_channels, widths[-1])
    yield from _mid("decoder", widths[-1], s.mid_attention)
    yield from _stages("decoder/up", widths[::-1], s.layers_per_block + 1, s.up_attention)
    yield _Layer("decoder/norm_out", "", "norm", widths[0], widths[0])
    yield _Layer("decoder/conv_out", "", "conv", widths[0], s.out_channels)


def _stages(
    stage: str, widths: tuple[int, ...], blocks: int, attention: tuple[int, ...]
) -> Iterator[_Layer]:
    previous = widths[0]
    for i, width in enumerate(widths):
        rest = len(widths) - 1 - i
        for j in range(blocks):
            yield from _block(f"{stage}_{{i}}/block_{{j}}", previous, width, i, j, rest)
            previous = width
            if i in attention:
                yield from _attention(f"{stage}_{{i}}/attn_{{j}}", width, i, j, rest)
        if rest:
            yield _Layer(f"{stage}sample_{{i}}", "", "conv", width, width, i, 0, rest)


def _mid(side: str, width: int, attention: bool) -> Iterator[_Layer]:
    yield from _block(f"{side}/mid/block_0", width, width)
    if attention:
        yield from _attention(f"{side}/mid/attn_0", width)
    yield from _block(f"{side}/mid/block_1", width, width)


def _block(place: str, inputs: int, width: int, *numbers: int) -> Iterator[_Layer]:
    yield _Layer(place, "norm1", "norm", inputs, inputs, *numbers)
    yield _Layer(place, "conv1", "conv", inputs, width, *numbers)
    yield _Layer(place, "norm2", "norm", width, width, *numbers)
    yield _Layer(place, "conv2", "conv", width, width, *numbers)
    if inputs != width:
        layer = _Layer(place, "shortcut", "conv", inputs, width, *numbers)
        yield dataclasses.replace(layer, kernel=1)


def _attention(place: str, width: int, *numbers: int) -> Iterator[_Layer]:
    yield _Layer(place, "norm", "norm", width, width, *numbers)
    for part in ("q", "k", "v", "proj"):
        yield _Layer(place, part, "linear", width, width, *numbers)


def _locate(names: Iterable[str]) -> tuple[str, int]:
    """The prefix of an autoencoder's weights, and their naming.

    Raises:
      ValueError: there is no autoencoder, or more than one.
    """
    names, root = list(names), "encoder.conv_in.weight"
    prefixes = [n.removesuffix(root) for n in names if n == root or n.endswith(f".{root}")]
    chosen = next((p for p in ("", "first_stage_model.") if p in prefixes), None)
    if chosen is None and len(prefixes) > 1:
        raise ValueError(f"several autoencoders, under {', '.join(prefixes)}: save one by itself")
    if not prefixes:
        for mark in ("x_embedder.proj.weight", "t_embedder.mlp.0.weight"):
            found = next((n for n in names if n.endswith(mark)), None)
            if found is not None:
                raise ValueError(
                    f"these are the weights of a diffusion transformer (MDT or DiT: {found!r}), "
                    "not of an autoencoder"
                )
        held = ", ".join(repr(name) for name in names[:3])
        raise ValueError(f"weight {root!r} is missing: this is no KL autoencoder; it holds {held}")
    prefix = prefixes[0] if chosen is None else chosen
    inside = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
    if any(n.startswith("encoder.down.") for n in inside):
        return prefix, _COMPVIS
    old = any(n.endswith(".query.weight") for n in inside)
    return prefix, _OLD_DIFFUSERS if old else _DIFFUSERS


def check_names(found: Sequence[str], expected: Sequence[str]) -> None:
    """Refuses unknown and missing names of weights.

    Raises:
      ValueError: the first of them, an unknown one with the nearest that is expected.
    """
    known = set(expected)
    unknown, missing = [n for n in found if n not in known], sorted(known - set(found))
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if unknown[1:] else ""
        # It was more likely meant for a missing name than for one that is there.
        nearest = difflib.get_close_matches(unknown[0], missing or expected, n=1, cutoff=0)[0]
        state = "is missing" if missing else "is there"
        raise ValueError(
            f"unknown weight {unknown[0]!r}{more}; the nearest expected, {nearest!r}, {state}"
        )
    if missing:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        raise ValueError(
            f"weight {missing[0]!r}{more} is missing: the file is incomplete, or the settings "
            "(config.json) are another autoencoder's"
        )


def check_shape(name: str, shape: Shape, expected: Shape) -> None:
    """Refuses, with ValueError, a weight of another shape than its settings ask for."""
    if shape != expected:
        raise ValueError(
            f"weight {name!r} is of shape {shape}, where the settings (config.json) ask for "
            f"{expected}"
        )


def parameter(params: Tree, path: str) -> np.ndarray:
    """The parameter at a path of a tree; ValueError names the path if there is none."""
    if (array := trees.get(params, path)) is None:
        raise ValueError(f"parameter {path!r} is missing")
    return np.asarray(array)
