"""A KL autoencoder's settings, read from diffusers' config.json, and the checks of such a file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mdt_jax.models.latent_space import STABLE_DIFFUSION_SCALE, LatentSpace

DEFAULT_NORM_GROUPS = 32
_MOST = 2**14  # channels, layers or groups; more than that in a file is damage, and takes for ever
# A check of a value in a config.json, and what it lets pass, in words.
Check = tuple[Callable[[Any], bool], str]
# Entries of a config.json that do not change the network, and entries that do, with the values that
# the network here has.
_WITHOUT_EFFECT = ("sample_size", "force_upcast")
_ONLY_VALUES = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
}


@dataclasses.dataclass(frozen=True)
class AutoencoderSettings:
    """The fields of `mdt_jax.models.autoencoder.AutoencoderKL`, and its latents' normalisation.

    `scale`, `shift`, `mean` and `std` are those of `LatentSpace`.
    """

    in_channels: int
    out_channels: int
    latent_channels: int
    block_widths: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    down_attention: tuple[int, ...]
    up_attention: tuple[int, ...]
    mid_attention: bool
    quant_conv: bool
    post_quant_conv: bool
    scale: float = STABLE_DIFFUSION_SCALE
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        for width in self.block_widths:
            if self.norm_groups < 1 or width % self.norm_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_groups} does not divide the width {width}; where "
                    "it is not 32, a config.json beside the weights must give it"
                )

        _ = self.latents  # refuses numbers that cannot be

    def module_settings(self) -> dict[str, Any]:
        """The fields as keywords of `AutoencoderKL`."""
        fields = dataclasses.asdict(self)
        for name in ("scale", "shift", "mean", "std"):
            del fields[name]
        return fields

    @property
    def latents(self) -> LatentSpace:
        """The latents, of an encoder that is not known yet."""
        return LatentSpace(
            channels=self.latent_channels,
            stride=2 ** (len(self.block_widths) - 1),
            scale=self.scale,
            shift=self.shift,
            mean=self.mean,
            std=self.std,
        )


def settings_from_config(config: Mapping[str, Any]) -> AutoencoderSettings:
    """The settings in a `config.json` of diffusers' AutoencoderKL, with its defaults.

    Raises:
      ValueError: a value of a wrong type, or a value or an entry that the network here does not
        have, by name.
    """
    check_config("AutoencoderKL", config, _READ, _ONLY_VALUES, _WITHOUT_EFFECT)
    widths = tuple(config.get("block_out_channels", (64,)))
    attention = {}
    for side, direction in (("Down", "down"), ("Up", "up")):
        key, coder = f"{direction}_block_types", "Encoder" if side == "Down" else "Decoder"
        plain, attentive = f"{side}{coder}Block2D", f"Attn{side}{coder}Block2D"
        types = config.get(key, (plain,))
        for kind in types:
            if kind not in (plain, attentive):
                raise ValueError(f"{key} {kind!r} is not supported; known: {plain}, {attentive}")
        if len(types) != len(widths):
            raise ValueError(f"{key} has {len(types)} stages, block_out_channels {len(widths)}")
        attention[direction] = tuple(i for i, kind in enumerate(types) if kind == attentive)
    scale = float(config.get("scaling_factor") or STABLE_DIFFUSION_SCALE)
    return AutoencoderSettings(
        in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3),
        latent_channels=config.get("latent_channels", 4),
        block_widths=widths,
        layers_per_block=config.get("layers_per_block", 1),
        norm_groups=config.get("norm_num_groups", DEFAULT_NORM_GROUPS),
        down_attention=attention["down"],
        up_attention=attention["up"],
        mid_attention=config.get("mid_block_add_attention", True),
        quant_conv=config.get("use_quant_conv", True),
        post_quant_conv=config.get("use_post_quant_conv", True),
        scale=scale,
        shift=float(config.get("shift_factor") or 0.0),
        mean=tuple(map(float, config.get("latents_mean") or ())),
        # diffusers' pipelines multiply by scaling_factor and divide by latents_std.
        std=tuple(float(value) / scale for value in config.get("latents_std") or ()),
    )


def check_stable_diffusions(settings: AutoencoderSettings) -> None:
    """Refuses settings that are plainly not those of Stable Diffusion's first autoencoder.

    Its widths are not compared: smaller ones of its layout are for tests.

    Raises:
      ValueError: they are another autoencoder's, whose scale is not known then.
    """
    wanted = {
        "latent_channels": 4,
        "in_channels": 3,
        "out_channels": 3,
        "stages": 4,
        "layers_per_block": 2,
        "quant_conv": True,
        "post_quant_conv": True,
        "mid_attention": True,
        "down_attention": (),
        "up_attention": (),
    }
    given = dataclasses.asdict(settings) | {"stages": len(settings.block_widths)}
    for name, value in wanted.items():
        if given[name] != value:
            raise ValueError(
                f"no config.json beside it, and this is not Stable Diffusion's autoencoder: "
                f"{name} is {given[name]}, and {value} there; put the autoencoder's config.json "
                "beside the weights, which gives its scale (scaling_factor)"
            )


def check_config(
    network: str,
    config: Mapping[str, Any],
    read: Mapping[str, Check],
    only_values: Mapping[str, tuple[Any, ...]],
    without_effect: tuple[str, ...] = (),
) -> None:
    """Refuses a config.json with entries that a network does not have.

    Args:
      network: its class in diffusers.
      config: what the file holds.
      read: the entries that are read.
      only_values: entries that change the network in diffusers, with the values allowed here.
      without_effect: entries that do not change the network.

    Raises:
      ValueError: an entry, by name, with what it may be.
    """
    for key, value in config.items():
        if key in read:
            is_right, what = read[key]
            if not is_right(value):
                raise ValueError(f"{key} is {value!r}; it must be {what}")
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(number, int) and number > _MOST for number in numbers):
                raise ValueError(f"{key} is above {_MOST:,}, which no network known here has")
        elif key in only_values:
            if value not in only_values[key]:
                known = " or ".join(repr(known) for known in only_values[key])
                raise ValueError(f"{key} {value!r} is not supported; it must be {known}")
        elif not key.startswith("_") and key not in without_effect:
            raise ValueError(
                f"{key} {value!r} is not supported: no {network} known here has a {key}; if it "
                "is of no effect, remove it from config.json"
            )


def is_count(value: Any) -> bool:
    """Whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_list(value: Any, is_entry: Callable[[Any], bool]) -> bool:
    """Whether a value is a list that is not empty, of entries that pass a check."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_entry, value))


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # neither NaN nor infinite


COUNT: Check = (is_count, "a whole number above 0")
COUNTS: Check = (lambda v: is_list(v, is_count), "a list of whole numbers above 0")
SWITCH: Check = (lambda v: isinstance(v, bool), "true or false")
SCALE: Check = (lambda v: v is None or (_is_number(v) and v > 0), "a number above 0")
NUMBERS: Check = (lambda v: v is None or is_list(v, _is_number), "a list of numbers")
SPREADS: Check = (
    lambda v: v is None or is_list(v, lambda entry: _is_number(entry) and entry > 0),
    "a list of numbers above 0",
)
_NAMES: Check = (lambda v: is_list(v, lambda entry: isinstance(entry, str)), "a list of names")
_READ: dict[str, Check] = {
    "in_channels": COUNT,
    "out_channels": COUNT,
    "latent_channels": COUNT,
    "block_out_channels": COUNTS,
    "layers_per_block": COUNT,
    "norm_num_groups": COUNT,
    "down_block_types": _NAMES,
    "up_block_types": _NAMES,
    "mid_block_add_attention": SWITCH,
    "use_quant_conv": SWITCH,
    "use_post_quant_conv": SWITCH,
    "scaling_factor": SCALE,
    "shift_factor": (lambda v: v is None or _is_number(v), "a number"),
    "latents_mean": NUMBERS,
    "latents_std": SPREADS,
}
