"""The options of a sampler: one list, `SamplerOptions`, that all others are made of.

From a field of it follow

- the key of `config.sample`, and that of `config.eval` (`config.py`);
- the flag of `python -m mdt_jax.sample` and `python -m mdt_jax.evaluate` (`sample/flags.py`);
- the argument of `mdt_jax.sample` and `mdt_jax.inpaint` (`sampling/options.py`);
- the entry in what a file of samples says about itself.

So a new option is a field here, if it is a number its range (`mdt_jax.basics.ranges`), and the
place where a sampler uses it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from absl import flags

# What each of `diffusion.samplers.SAMPLERS` is, for the flag's help, which needs no JAX.
SAMPLER_HELP = {
    "ddpm": "ancestral, 100 to 250 steps, as published numbers are made",
    "ddim": "deterministic, 50 or more",
    "heun": "second order, two model calls a step, 10 to 25 steps (10 without --steps)",
    "dpm++": "DPM-Solver++(2M), second order, 10 to 25 (20), evenly spaced in log(SNR)",
    "dpm++sde": "its stochastic form, 20 to 50 (20)",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """How one option is documented, kept in a config and read from a flag.

    Attributes:
      help: the text of its flag.
      config: its value in a config that does not say otherwise, the published MDTs' own.
      kind: type of its values in a config, or a union of types.
      none: the meaning of the value None, such as "a constant scale"; empty if None is no value.
      define: absl's function that defines its flag.
      read: the option's value from the flag's.
    """

    help: str
    config: Any
    kind: Any
    none: str
    define: Callable
    read: Callable[[Any], Any]


_DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
}
_AS_DEFAULT = object()


def option(
    default: Any,
    help: str,
    *,
    config: Any = _AS_DEFAULT,
    kind: Any = None,
    none: str = "",
    define: Callable | None = None,
    read: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """A field of `SamplerOptions`.

    Args:
      default: its value where neither the caller nor the model gives one.
      help: the text of its flag.
      config: as `Option` has it; `default` if not given.
      kind: as `Option` has it; the type of `config` if not given.
      none, define, read: as `Option` has them; by default a flag of the kind's own.
    """
    config = default if config is _AS_DEFAULT else config
    kind = kind or type(config)
    return dataclasses.field(
        default=default,
        metadata={"option": Option(help, config, kind, none, define or _DEFINE[kind], read)},
    )


def _count_or_text(text: str) -> str:
    """A whole number as a respacing has it, 1e2 as 100; any other text as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    plain = number.is_integer() and not text.strip().isdigit()
    return str(int(number)) if plain else text


def _interval(texts: list[str]) -> list[float]:
    if [text.lower() for text in texts] == ["none"]:  # as config.sample has it
        return [0.0, 1.0]
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise ValueError(
            f"--cfg_interval {','.join(texts)} is not LOW,HIGH, as in 0.1,0.7"
        ) from None


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How samples are drawn; a compiled sampler is specialised to it.

    `sampling.resolve_options` makes one of what the caller gives and of the model's own values.
    Defaults here are those of a model that has no values of its own.
    """

    sampler: str = option(
        "ddpm",
        "The run's by default. "
        + " ".join(f"{name}: {text}." for name, text in SAMPLER_HELP.items()),
        define=functools.partial(flags.DEFINE_enum, enum_values=list(SAMPLER_HELP)),
    )
    # A plain count is spaced as the sampler wants (`samplers.spaced`).
    steps: int | str = option(
        250,
        "Steps, or a respacing (ddim50, 10,15,20, logsnr20).",
        kind=int | str,
        define=flags.DEFINE_string,
        read=_count_or_text,
    )
    cfg_scale: float = option(1.0, "Guidance scale, 1 for none; the run's by default.", config=3.8)
    cfg_power: float | None = option(
        None,
        "Exponent of the power-cosine scale; 0: constant.",
        config=4.0,
        none="a constant scale",
    )
    # Kept as None where all of the process is guided; outside the interval a step costs half.
    cfg_interval: tuple[float, float] | None = option(
        None,
        "LOW,HIGH: fractions of the process that are guided.",
        config=(),
        define=flags.DEFINE_list,
        read=_interval,
    )
    # Channels of the mean: 3 of latents' 4, as the published MDT numbers were made.
    guided_channels: int | None = option(
        None, "Channels that are guided; the run's.", config=3, none="all channels"
    )
    eta: float = option(0.0, "DDIM's: 0 deterministic, 1 ancestral.")
    clip: bool = option(False, "Whether x0 is clipped to [-1, 1]; the run's by default.")


# Every option by its name, in the fields' order.
SAMPLER_OPTIONS: dict[str, Option] = {
    field.name: field.metadata["option"] for field in dataclasses.fields(SamplerOptions)
}
# So that `help(SamplerOptions)` describes them.
SamplerOptions.__doc__ += "\n    Attributes:\n" + "".join(
    f"      {name}: {option.help}\n" for name, option in SAMPLER_OPTIONS.items()
)
