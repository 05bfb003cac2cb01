"""What a run's settings give reason to say at its start: those without use, and steps beyond it.

A setting that another one makes useless is no error: a file of an experiment has settings of its
schedule, and `--config.schedule.name=constant` needs none of them. Whoever gave it is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from mdt_jax import config as config_lib

# The share of the initial weights in the sampled average, at the end of a run, from which samples
# would show them.
_SHARE = 0.1


class Use(NamedTuple):
    """When some settings are in use.

    Attributes:
      keys: the settings.
      on: the setting that decides it.
      needs: what that would have to be, in words.
      has: whether a config has it.
    """

    keys: tuple[str, ...]
    on: str
    needs: str
    has: Callable[[ConfigDict], bool]


_JUDGED = ("evaluator", "inception", "reference", "num_samples", "batch_size", "seed")
USES = (
    Use(
        ("schedule.boundaries", "schedule.factor"),
        "schedule.name",
        "'step'",
        lambda c: c.schedule.name == "step",
    ),
    Use(
        ("model.decoder_depth",),
        "model.name",
        "a model with a decoder, such as MDTv2",
        config_lib.has_decoder,
    ),
    Use(
        ("masking.ratio", "masking.ratio_span", "masking.masked_pass"),
        "model.name",
        "a model with a masked pass, such as MDTv2",
        config_lib.has_masked_pass,
    ),
    Use(
        ("masking.ratio", "masking.ratio_span"),
        "masking.masked_pass",
        "True",
        lambda c: c.masking.masked_pass,
    ),
    Use(
        ("diffusion.min_snr",),
        "diffusion.loss",
        "'mse' or 'rescaled_mse'",
        lambda c: c.diffusion.loss in ("mse", "rescaled_mse"),
    ),
    Use(
        ("label_dropout", "sample.cfg_scale", "eval.cfg_scale"),
        "model.num_classes",
        "1 or more",
        lambda c: c.model.num_classes != 0,
    ),
    Use(
        ("data.max_bad_fraction",),
        "data.on_bad_image",
        "'skip'",
        lambda c: c.data.on_bad_image == "skip",
    ),
    Use(("data.path",), "data.name", "data in a folder", lambda c: c.data.name != "digits"),
    Use(("sample.num_samples",), "sample.every", "1 or more", lambda c: c.sample.every > 0),
    Use(
        tuple(f"eval.{name}" for name in _JUDGED),
        "eval_every",
        "1 or more",
        lambda c: c.eval_every > 0,
    ),
    Use(
        ("eval.vae",),
        "eval_every",
        "1 or more, or sample.every",
        lambda c: c.eval_every > 0 or c.sample.every > 0,
    ),
    Use(("sample.every",), "num_steps", "as many", lambda c: c.sample.every <= c.num_steps),
    Use(
        ("keep_every",),
        "checkpoint_every",
        "a divisor of it",
        lambda c: (c.keep_every or c.num_steps) >= c.num_steps or any(_kept_for_ever(c)),
    ),
)
# Values that turn their settings off, which are of use where these are not.
_OFF = {"label_dropout": 0.0, "sample.cfg_scale": 1.0, "eval.cfg_scale": 1.0}


def _kept_for_ever(config: ConfigDict) -> Iterable[bool]:
    """Whether checkpoints are saved at multiples of keep_every: periodic, judged, and the last."""
    for every in (config.checkpoint_every, config.eval_every):
        yield every > 0 and math.lcm(every, config.keep_every) <= config.num_steps
    yield config.num_steps % config.keep_every == 0


def value_of(config: ConfigDict, key: str) -> Any:
    """A setting by its key, such as "schedule.name"."""
    section, _, name = key.rpartition(".")
    return (config[section] if section else config)[name]


def unused(config: ConfigDict) -> dict[str, Use]:
    """The settings that a run of a config has no use for, whatever they are, and why."""
    return {key: use for use in reversed(USES) if not use.has(config) for key in use.keys}


def _unused_and_told(config: ConfigDict, given: Iterable[str]) -> list[str]:
    """A line for each setting that has no use, and is another than by default or was given."""
    plain = config_lib.default_config()
    recipe = plain.copy_and_resolve_references()
    recipe.model.name = config.model.name
    config_lib.apply_recipe(recipe)
    said = []
    for key, use in sorted(unused(config).items()):
        value = value_of(config, key)
        ordinary = (value_of(plain, key), value_of(recipe, key), _OFF.get(key))
        if key in given or value not in ordinary:
            said.append(
                f"{key} {value!r} is of no use: {use.on} is {value_of(config, use.on)!r}, and it "
                f"needs {use.needs}"
            )
    return said


def remarks(config: ConfigDict, given: Iterable[str] = ()) -> list[str]:
    """What a run's settings give reason to say, a line each.

    Args:
      config: the settings, which `checks.check_settings` takes.
      given: the keys that a person gave on the command line: these are told though they are as by
        default.
    """
    said = _unused_and_told(config, set(given))
    for key, steps in (
        ("schedule.boundaries", config.schedule.boundaries),
        ("profile_steps", config.profile_steps),
    ):
        beyond = [str(step) for step in steps if step > config.num_steps]
        if beyond and key not in unused(config):
            said.append(
                f"{key} {tuple(steps)}: the run ends before, at num_steps {config.num_steps}, and "
                f"never reaches {', '.join(beyond)}"
            )
    rate = config.ema_rates[0]
    share = rate**config.num_steps
    if share > _SHARE and not config.init_from:
        said.append(
            f"ema_rates {rate}: after num_steps {config.num_steps} the average that is sampled and "
            f"judged still holds {share:.0%} of the initial weights; give a lower rate first"
        )
    if config.sample.clip and config.model.in_channels not in (1, 3):
        said.append(
            f"sample.clip cuts the {config.model.in_channels} model.in_channels, which latents "
            "are, to [-1, 1]; it is meant for pixels"
        )
    return said


def log_remarks(config: ConfigDict, given: Iterable[str] = ()) -> None:
    """Logs `remarks` as warnings."""
    for line in remarks(config, given):
        logging.warning("%s", line)
