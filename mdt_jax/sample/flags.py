"""The flags of `python -m mdt_jax.sample`, some of which `mdt_jax.evaluate` has too."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from absl import flags

from mdt_jax.basics import ranges
from mdt_jax.basics.places import refuse_url
from mdt_jax.diffusion.options import SAMPLER_OPTIONS
from mdt_jax.models.latent_space import AUTOENCODERS
from mdt_jax.parallel.flag_parsing import NONE, check_flags, flag_values, keep_none, says_none

flags.disclaim_key_flags()  # they are the command's, whose --help lists them

_NUMBERS = (flags.DEFINE_integer, flags.DEFINE_float)
_LABEL_ORDER = functools.partial(flags.DEFINE_enum, enum_values=["in_turn", "random"])
# Each flag: absl's function that defines it, name, default, help.
SAMPLE_FLAGS = (
    (flags.DEFINE_string, "workdir", None, "The run to sample from."),
    (
        flags.DEFINE_string,
        "checkpoint",
        None,
        "Or weights: .pt, .safetensors, a folder, hf://O/R[/F].",
    ),
    (flags.DEFINE_integer, "decode_layers", None, "Decoder depth of such an MDT v1; 2 by default."),
    (flags.DEFINE_integer, "num_heads", None, "Heads of such a DiT, if of no known width."),
    (flags.DEFINE_integer, "num_classes", None, "Settles whether their last label is a class."),
    (flags.DEFINE_integer, "input_size", None, "Side of the latents of diffusers' DiT."),
    (
        flags.DEFINE_string,
        "vae",
        None,
        f"Decoder of latents: {', '.join(AUTOENCODERS)}, a file or folder.",
    ),
    (flags.DEFINE_integer, "vae_batch_size", 16, "Images en- or decoded at a time."),
    (flags.DEFINE_integer, "vae_tile_size", None, "Side in latents of tiles, for large images."),
    (flags.DEFINE_string, "inpaint", None, "A picture to paint into, with --mask."),
    (flags.DEFINE_string, "mask", None, "A picture of its size, white where it is to be painted."),
    (flags.DEFINE_integer, "resamples", 4, "How often each step of painting is taken."),
    (flags.DEFINE_float, "masked_share", None, "Share of masked passes in painting; the model's."),
    (flags.DEFINE_string, "output", "samples", "Where to: OUTPUT.npz and OUTPUT.png."),
    (flags.DEFINE_bool, "keep_parts", False, "Keep OUTPUT.parts/, to raise num_samples later."),
    (flags.DEFINE_integer, "num_samples", None, "How many; labels are repeated to that many."),
    (flags.DEFINE_list, "labels", [], "Classes by number or name; all in turn by default."),
    (_LABEL_ORDER, "label_order", "in_turn", "in_turn, balanced, or random, drawn uniformly."),
    (
        flags.DEFINE_integer,
        "seed",
        0,
        "Seed of noise and labels; sample i depends on it and on i.",
    ),
    *((o.define, name, None, o.help) for name, o in SAMPLER_OPTIONS.items()),
    (flags.DEFINE_float, "ema_rate", None, "Which average; the run's first by default."),
    (flags.DEFINE_integer, "step", None, "Which checkpoint; the newest by default."),
    (flags.DEFINE_integer, "mesh_fsdp", 1, "Devices that share one copy of the parameters."),
    (flags.DEFINE_integer, "mesh_tensor", 1, "Devices that share each head and hidden layer."),
    (flags.DEFINE_integer, "batch_size", None, "Samples at a time, over all devices; what fits."),
)

GROUPS = {
    "The model": (
        "workdir", "ema_rate", "step", "checkpoint", "decode_layers", "num_heads", "num_classes",
        "input_size",
    ),
    "The samples": ("labels", "num_samples", "label_order", "seed", "output", "keep_parts"),
    "The sampler": tuple(SAMPLER_OPTIONS),
    "Latents": ("vae", "vae_batch_size", "vae_tile_size"),
    "Inpainting": ("inpaint", "mask", "resamples", "masked_share"),
    "Devices": ("batch_size", "mesh_fsdp", "mesh_tensor"),
}  # fmt: skip


def define_flags(f: flags.FlagValues) -> None:
    """The command's flags."""
    define_all(f, SAMPLE_FLAGS)


def define_all(f: flags.FlagValues, table: Iterable[tuple[Callable, str, Any, str]]) -> None:
    """Defines the flags of a table as `SAMPLE_FLAGS` is, some of which are the samplers' options.

    Args:
      f: the flags.
      table: of each flag absl's function that defines it, its name, default and help.
    """
    for define, name, default, text in table:
        define(name, default, help=text, flag_values=f)
        if takes_none(name) and SAMPLER_OPTIONS[name].define in _NUMBERS:
            keep_none(f[name])


def takes_none(name: str) -> bool:
    """Whether a flag is an option of the samplers of which None is a value."""
    return name in SAMPLER_OPTIONS and bool(SAMPLER_OPTIONS[name].none)


def check_sample_flags(f: flags.FlagValues) -> None:
    """Refuses, with ValueError, flags that no run could take: numbers, empty paths and names."""
    check_flags(flag_values(f))
    if not all(name.strip() for name in f.labels):
        raise ValueError(
            f"--labels {','.join(f.labels)} holds an empty name; give classes by number or name, "
            "such as 0,1,2"
        )
    given_options(f)


def given_options(f: flags.FlagValues) -> dict[str, Any]:
    """The sampler's options that flags give, as `sampling.resolve_options` takes them.

    Raises:
      ValueError: a number outside its range.
    """
    values = {name: getattr(f, name) for name in SAMPLER_OPTIONS}
    options = {
        name: None if value == NONE and takes_none(name) else SAMPLER_OPTIONS[name].read(value)
        for name, value in values.items()
        if value not in (None, []) and not (name == "steps" and says_none(value))
    }
    for name, value in options.items():
        if ranges.is_numeric(value):
            ranges.check(f"--{name}", value)
        elif isinstance(value, str) and f"sample.{name}" in ranges.RANGES:  # a respacing
            ranges.check(f"sample.{name}", value, f"--{name}")
    return options


def output_files(output: str | Path) -> tuple[Path, Path]:
    """OUTPUT.npz and OUTPUT.png, of an --output with either ending or none; no URL or folder."""
    refuse_url(output, "--output")
    stem = str(output).removesuffix(".png").removesuffix(".npz")
    if os.path.basename(stem).strip() in ("", ".", ".."):
        raise ValueError(
            f"--output {str(output)!r} names no file; give a name for OUTPUT.npz and OUTPUT.png, "
            f"such as {os.path.join(os.path.dirname(stem), 'samples')}"
        )
    return Path(f"{stem}.npz"), Path(f"{stem}.png")
