"""Deep compression autoencoders between diffusers' files and this project's trees.

Their settings are read from diffusers' config.json and keep its names. Each array is a row of one
table: its PyTorch name, its path here and its shape, whose number of axes gives an einops pattern.
Patterns only move entries, and read backwards they are the inverse, so both directions are exact.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from einops import rearrange

from mdt_jax.convert import trees
from mdt_jax.convert.autoencoder import check_names, check_shape, parameter
from mdt_jax.convert.autoencoder_settings import (
    COUNT,
    COUNTS,
    SCALE,
    SWITCH,
    Check,
    check_config,
    is_count,
    is_list,
)
from mdt_jax.convert.trees import Shape, Tree
from mdt_jax.models.latent_space import LatentSpace

_RES, _ATTENTION = "ResBlock", "EfficientViTBlock"
_RMS_NORM, _BATCH_NORM = "rms_norm", "batch_norm"
_SIDES = ("encoder", "decoder")
_UNSHUFFLE, _SHUFFLE = "pixel_unshuffle", "pixel_shuffle"
_ACTIVATIONS = ("relu", "silu", "swish", "gelu", "mish")
_CHOICES = {
    "encoder_block_types": (_RES, _ATTENTION),
    "decoder_block_types": (_RES, _ATTENTION),
    "downsample_block_type": (_UNSHUFFLE, "conv"),
    "upsample_block_type": (_SHUFFLE, "interpolate"),
    "decoder_norm_types": (_RMS_NORM, _BATCH_NORM),
    "decoder_act_fns": _ACTIVATIONS,
    "decoder_conv_act_fn": _ACTIVATIONS,
}
_ANY_CASE = ("decoder_act_fns", "decoder_conv_act_fn")  # in diffusers, too
_SPELLINGS = {"Conv": "conv"}  # Sana's file has the first
# How names begin in the authors' own files, and those of the encoder's blocks in diffusers'.
_AUTHORS = "encoder.project_in."
_IN_BLOCK = re.compile(r"encoder\.down_blocks\.\d+\.\d+\.")
# Entries with a value for each stage; those of the second tuple may also be one name for all.
_BY_STAGE = ("block_out_channels", "layers_per_block", "qkv_multiscales")
_NAMES_BY_STAGE = ("encoder_block_types", "decoder_block_types", "decoder_norm_types",
                   "decoder_act_fns")  # fmt: skip
# PyTorch's batch norm counts the batches it was trained on, to no effect afterwards.
_COUNTER = ".num_batches_tracked"
_PATTERNS = {4: "o i p q -> p q i o", 2: "o i -> i o", 1: "c -> c"}


@dataclasses.dataclass(frozen=True)
class AutoencoderDCSettings:
    """The fields of `mdt_jax.models.autoencoder_dc.AutoencoderDC`, and the scaling of its latents.

    Names and defaults are those of diffusers' config.json. Tuples have an entry for each stage,
    finest first, in the decoder too. A diffusion model's latents are (latent − shift)·scale.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = (_RES,) * 6
    decoder_block_types: tuple[str, ...] = (_RES,) * 6
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = _SHUFFLE
    downsample_block_type: str = _UNSHUFFLE
    decoder_norm_types: tuple[str, ...] = (_RMS_NORM,) * 6
    decoder_act_fns: tuple[str, ...] = ("silu",) * 6
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self):
        self._check_stages()
        for side in _SIDES:
            self._check_widths(side)

    def module_settings(self) -> dict[str, Any]:
        """The fields as keywords of `AutoencoderDC`."""
        fields = dataclasses.asdict(self)
        del fields["scale"], fields["shift"]
        return fields

    @property
    def latents(self) -> LatentSpace:
        """The latents, of an encoder that is not known yet."""
        stride = 2 ** (len(self.encoder_block_out_channels) - 1)
        return LatentSpace(self.latent_channels, stride, self.scale, self.shift)

    def _check_stages(self) -> None:
        stages = len(self.encoder_block_out_channels)
        by_stage = [f"{side}_{key}" for side in _SIDES for key in _BY_STAGE]
        for key in (*by_stage, *_NAMES_BY_STAGE):
            if len(getattr(self, key)) != stages:
                raise ValueError(
                    f"{key} has {len(getattr(self, key))} stages, encoder_block_out_channels "
                    f"{stages}"
                )
        for side in _SIDES:
            blocks = getattr(self, f"{side}_layers_per_block")
            # In diffusers a stage without blocks does not change the sides either. In place of the
            # first, the encoder's first layer and the decoder's last do; the last need not.
            if 0 in blocks[1:-1] or blocks == (0,):
                raise ValueError(
                    f"{side}_layers_per_block {list(blocks)}: only the first and the last of "
                    "several stages may have no blocks"
                )

    def _check_widths(self, side: str) -> None:
        key = f"{side}_block_out_channels"
        widths = getattr(self, key)
        types = getattr(self, f"{side}_block_types")
        blocks = getattr(self, f"{side}_layers_per_block")
        for width, kind, count in zip(widths, types, blocks, strict=True):
            if kind == _ATTENTION and count and width < self.attention_head_dim:
                raise ValueError(
                    f"{key} {width} is below attention_head_dim {self.attention_head_dim}: "
                    f"an {_ATTENTION} of that width has no heads"
                )
        for i, (fine, coarse) in enumerate(zip(widths, widths[1:], strict=False)):
            # Shortcuts average or repeat the channels of four pixels in one.
            if blocks[i] and 4 * fine % coarse:
                raise ValueError(
                    f"{key} goes from {fine} to {coarse}: the latter does not divide 4 x {fine}, "
                    "as the shortcut between the stages needs"
                )
            unshuffles = side == "encoder" and self.downsample_block_type == _UNSHUFFLE
            if unshuffles and coarse % 4:
                raise ValueError(
                    f"{key} {coarse} is no multiple of 4, as downsample_block_type "
                    f"{_UNSHUFFLE!r} needs"
                )
        shortcut = "encoder_out_shortcut" if side == "encoder" else "decoder_in_shortcut"
        if getattr(self, shortcut) and widths[-1] % self.latent_channels:
            raise ValueError(
                f"latent_channels {self.latent_channels} does not divide {key} {widths[-1]}, as "
                f"{shortcut} needs"
            )


def settings_from_config(config: Mapping[str, Any]) -> AutoencoderDCSettings:
    """The settings in a `config.json` of diffusers' AutoencoderDC, with its defaults.

    Raises:
      ValueError: a value of a wrong type, a value or an entry that the network here does not have,
        or values that do not fit each other; by name.
    """
    check_config("AutoencoderDC", config, _READ, {"_class_name": ("AutoencoderDC",)})
    fields = {key: _tuples(value) for key, value in config.items() if key in _READ}
    scale = fields.pop("scaling_factor", None) or AutoencoderDCSettings.scale
    stages = len(fields.get("encoder_block_out_channels", (None,) * 6))
    for key in _NAMES_BY_STAGE:
        value = fields.get(key, getattr(AutoencoderDCSettings, key)[0])
        fields[key] = (value,) * stages if isinstance(value, str) else value
    for key in _CHOICES:
        if key in fields:
            fields[key] = _chosen(key, fields[key])
    return AutoencoderDCSettings(**fields, scale=float(scale))


def _chosen(key: str, value: Any) -> Any:
    """The name that an entry has, or its names, if they are known, as `_CHOICES` has them."""
    if isinstance(value, tuple):
        return tuple(_chosen(key, name) for name in value)
    name = value.lower() if key in _ANY_CASE else _SPELLINGS.get(value, value)
    if name not in _CHOICES[key]:
        known = ", ".join(_CHOICES[key])
        raise ValueError(f"{key} {value!r} is not supported; known: {known}")
    return name


def is_autoencoder_dc(names: Iterable[str]) -> bool:
    """Whether weights of these names are a deep compression autoencoder's.

    True for the authors' names, too, which `from_torch` refuses.
    """
    return any(name.startswith(_AUTHORS) or _IN_BLOCK.match(name) for name in names)


def from_torch(weights: Mapping[str, np.ndarray], settings: AutoencoderDCSettings) -> Tree:
    """The parameter tree of a state dict of diffusers', in its types.

    Raises:
      ValueError: a weight is missing, unknown or of a wrong shape, or these are other weights.
    """
    if not is_autoencoder_dc(weights):
        held = ", ".join(repr(name) for name in list(weights)[:3])
        raise ValueError(
            "weights 'encoder.down_blocks.0.0.…' are missing: this is no deep compression "
            f"autoencoder by diffusers' names; it holds {held}"
        )
    if any(name.startswith(_AUTHORS) for name in weights):
        raise ValueError(
            f"these weights have the names of the authors' code ('{_AUTHORS}…'); give those that "
            "diffusers saves, of the repository whose name ends in -diffusers"
        )
    rows = {row.name: row for row in _arrays(settings)}
    check_names([name for name in weights if not name.endswith(_COUNTER)], list(rows))
    flat = {}
    for name, row in rows.items():
        array = weights[name]
        check_shape(name, array.shape, row.shape)
        flat[row.path] = rearrange(array, row.pattern)
    return trees.nest(flat)


def to_torch(params: Tree, settings: AutoencoderDCSettings) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: weights by diffusers' names.

    The counters of batch norms, which a tree does not have, are 0 as a new network's.

    Raises:
      ValueError: the tree lacks a parameter, by its path.
    """
    weights = {}
    for row in _arrays(settings):
        left, right = row.pattern.split(" -> ")
        array = rearrange(parameter(params, row.path), f"{right} -> {left}")
        weights[row.name] = np.ascontiguousarray(array)
        norm, _, array_name = row.name.rpartition(".")
        if array_name == "running_var":
            weights[norm + _COUNTER] = np.zeros((), np.int64)
    return weights


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array: its PyTorch name, its path in our tree, and its shape in PyTorch."""

    name: str
    path: str
    shape: Shape

    @property
    def pattern(self) -> str:
        """From PyTorch's layout to ours."""
        return _PATTERNS[len(self.shape)]


def _arrays(s: AutoencoderDCSettings) -> Iterator[_Array]:
    """Every array of an autoencoder."""
    yield from _encoder(s)
    yield from _decoder(s)


def _encoder(s: AutoencoderDCSettings) -> Iterator[_Array]:
    widths, blocks = s.encoder_block_out_channels, s.encoder_layers_per_block
    # A layer that doubles or halves the sides is a module in diffusers, whose convolution is .conv.
    divisor = 4 if s.downsample_block_type == _UNSHUFFLE else 1
    if blocks[0]:
        yield from _conv("encoder.conv_in", "encoder/conv_in", s.in_channels, widths[0])
    else:
        name = "encoder.conv_in.conv"
        yield from _conv(name, "encoder/conv_in", s.in_channels, widths[1] // divisor)
    for i, width in enumerate(widths):
        yield from _blocks(s, "encoder", i, _RMS_NORM)
        if blocks[i] and i < len(widths) - 1:
            name = f"encoder.down_blocks.{i}.{blocks[i]}.conv"
            path = f"encoder/downsample_{i}"
            yield from _conv(name, path, width, widths[i + 1] // divisor)
    yield from _conv("encoder.conv_out", "encoder/conv_out", widths[-1], s.latent_channels)


def _decoder(s: AutoencoderDCSettings) -> Iterator[_Array]:
    widths, blocks = s.decoder_block_out_channels, s.decoder_layers_per_block
    factor = 4 if s.upsample_block_type == _SHUFFLE else 1
    yield from _conv("decoder.conv_in", "decoder/conv_in", s.latent_channels, widths[-1])
    for i, width in enumerate(widths):
        first = 0
        if blocks[i] and i < len(widths) - 1:
            name, path = f"decoder.up_blocks.{i}.0.conv", f"decoder/upsample_{i}"
            yield from _conv(name, path, widths[i + 1], width * factor)
            first = 1
        yield from _blocks(s, "decoder", i, s.decoder_norm_types[i], first)
    width = widths[0] if blocks[0] else widths[1]
    yield from _norm("decoder.norm_out", "decoder/norm_out", _RMS_NORM, width)
    if blocks[0]:
        yield from _conv("decoder.conv_out", "decoder/conv_out", width, s.in_channels)
    else:
        name = "decoder.conv_out.conv"
        yield from _conv(name, "decoder/conv_out", width, s.in_channels * factor)


def _blocks(
    s: AutoencoderDCSettings, side: str, i: int, norm: str, first: int = 0
) -> Iterator[_Array]:
    """The blocks of stage i, the first of which has the number `first` in diffusers' list."""
    width = getattr(s, f"{side}_block_out_channels")[i]
    scales = getattr(s, f"{side}_qkv_multiscales")[i]
    attends = getattr(s, f"{side}_block_types")[i] == _ATTENTION
    direction = "down" if side == "encoder" else "up"
    place = f"{side}/{direction}_{i}"
    for j in range(getattr(s, f"{side}_layers_per_block")[i]):
        name = f"{side}.{direction}_blocks.{i}.{first + j}"
        if attends:
            attn = (f"{name}.attn", f"{place}/attn_{j}")
            yield from _attention(*attn, width, s.attention_head_dim, scales, norm)
            yield from _gated_conv(f"{name}.conv_out", f"{place}/glu_{j}", width)
        else:
            path = f"{place}/block_{j}"
            yield from _conv(f"{name}.conv1", f"{path}/conv1", width, width)
            yield from _conv(f"{name}.conv2", f"{path}/conv2", width, width, bias=False)
            yield from _norm(f"{name}.norm", f"{path}/norm", norm, width)


def _attention(
    name: str, path: str, width: int, head_dim: int, scales: tuple[int, ...], norm: str
) -> Iterator[_Array]:
    inner = width // head_dim * head_dim
    for part in ("q", "k", "v"):
        yield _Array(f"{name}.to_{part}.weight", f"{path}/{part}/kernel", (inner, width))
    for i, kernel in enumerate(scales):
        scale, channels = f"{name}.to_qkv_multiscale.{i}", 3 * inner
        there, here = f"{scale}.proj_in", f"{path}/depth_{i}"
        yield from _conv(there, here, 1, channels, kernel=kernel, bias=False)
        there, here = f"{scale}.proj_out", f"{path}/point_{i}"
        yield from _conv(there, here, head_dim, channels, kernel=1, bias=False)
    joined = inner * (1 + len(scales))
    yield _Array(f"{name}.to_out.weight", f"{path}/proj/kernel", (width, joined))
    yield from _norm(f"{name}.norm_out", f"{path}/norm", norm, width)


def _gated_conv(name: str, path: str, width: int) -> Iterator[_Array]:
    hidden = 4 * width  # and as many gates
    yield from _conv(f"{name}.conv_inverted", f"{path}/inverted", width, 2 * hidden, kernel=1)
    yield from _conv(f"{name}.conv_depth", f"{path}/depth", 1, 2 * hidden)
    yield from _conv(f"{name}.conv_point", f"{path}/point", hidden, width, kernel=1, bias=False)
    yield from _norm(f"{name}.norm", f"{path}/norm", _RMS_NORM, width)


def _conv(
    name: str, path: str, inputs: int, outputs: int, *, kernel: int = 3, bias: bool = True
) -> Iterator[_Array]:
    yield _Array(f"{name}.weight", f"{path}/kernel", (outputs, inputs, kernel, kernel))
    if bias:
        yield _Array(f"{name}.bias", f"{path}/bias", (outputs,))


def _norm(name: str, path: str, kind: str, width: int) -> Iterator[_Array]:
    yield _Array(f"{name}.weight", f"{path}/scale", (width,))
    yield _Array(f"{name}.bias", f"{path}/bias", (width,))
    if kind == _BATCH_NORM:
        yield _Array(f"{name}.running_mean", f"{path}/mean", (width,))
        yield _Array(f"{name}.running_var", f"{path}/var", (width,))


def _tuples(value: Any) -> Any:
    """A value of a config.json with tuples for its lists, inner ones too."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_scales(value: Any) -> bool:
    is_kernels = isinstance(value, (list, tuple)) and all(map(is_count, value))
    return is_kernels and all(side % 2 for side in value)


_NAME: Check = (_is_name, "a name")
_NAMES: Check = (lambda v: _is_name(v) or is_list(v, _is_name), "a name or a list of names")
_BLOCKS: Check = (
    lambda v: is_list(v, lambda entry: entry == 0 and type(entry) is int or is_count(entry)),
    "a list of whole numbers of 0 or more",
)
_SCALES: Check = (lambda v: is_list(v, _is_scales), "a list of lists of odd numbers")
# Every entry of the file that is read: the check of its value's type.
_READ: dict[str, Check] = {
    "in_channels": COUNT,
    "latent_channels": COUNT,
    "attention_head_dim": COUNT,
    "encoder_block_types": _NAMES,
    "decoder_block_types": _NAMES,
    "encoder_block_out_channels": COUNTS,
    "decoder_block_out_channels": COUNTS,
    "encoder_layers_per_block": _BLOCKS,
    "decoder_layers_per_block": _BLOCKS,
    "encoder_qkv_multiscales": _SCALES,
    "decoder_qkv_multiscales": _SCALES,
    "upsample_block_type": _NAME,
    "downsample_block_type": _NAME,
    "decoder_norm_types": _NAMES,
    "decoder_act_fns": _NAMES,
    "encoder_out_shortcut": SWITCH,
    "decoder_in_shortcut": SWITCH,
    "decoder_conv_act_fn": _NAME,
    "scaling_factor": SCALE,
}
