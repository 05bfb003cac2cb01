"""A small run of the digits, and values of all kinds for each of its settings and for flags."""

from __future__ import annotations

import functools
import math
from typing import Any

from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs.digits import get_config
from mdt_jax import config as config_lib
from mdt_jax.basics.ranges import RANGES

# Sizes, counts and widths that a test can afford, where a setting's range goes beyond.
AFFORDABLE = {
    "num_steps": 50, "batch_size": 64, "accumulation_steps": 16, "ema_rates": 1, "seed": None,
    "model.input_size": 24, "model.in_channels": 8, "model.num_classes": 40,
    "model.patch_size": 24, "model.hidden_size": 64, "model.depth": 6, "model.num_heads": 16,
    "model.mlp_ratio": 8.0, "model.decoder_depth": 6, "model.scan_unroll": 12,
    "sample.num_samples": 40, "sample.steps": 40, "eval.num_samples": 40, "eval.batch_size": 64,
    "diffusion.num_timesteps": 400, "data.num_workers": 0, "data.read_ahead": 8,
}  # fmt: skip
# Settings by which nothing of the two steps changes.
TEXTS = {
    "model.name": ["MDT", "MDTv2", "DiT", "MDT-S/2", "DiT-S/8", "MTD", ""],
    "model.dtype": ["auto", "float32", "bfloat16", "float16", ""],
    "model.kernels": ["auto", "plain", "pallas", "cudnn", "fast"],
    "model.remat": ["none", "dots", "full", "all"],
    "diffusion.schedule": ["linear", "squared_cosine", "cosine"],
    "diffusion.prediction": ["epsilon", "x0", "velocity", "v"],
    "diffusion.variance": ["learned_range", "fixed_small", "fixed_large", "learned"],
    "diffusion.loss": ["mse", "rescaled_mse", "kl", "rescaled_kl", "mae"],
    "diffusion.timestep_sampler": ["uniform", "loss_second_moment", "sobol"],
    "optimizer.name": ["adan", "adamw", "adam", "lion"],
    "schedule.name": ["constant", "linear", "cosine", "step", "sine"],
    "data.name": ["digits", "folder", "latents", "npy", "tfds:none", "mnist"],
    "data.split": ["train", "heldout", "all", "test"],
    "data.path": ["", "/nowhere"],
    "data.class_order": ["string", "numeric", "none"],
    "data.labels": ["auto", "file_names", "none", "some"],
    "data.crop": ["center", "random", "middle"],
    "data.on_bad_image": ["error", "skip", "ignore"],
    "sample.sampler": ["ddpm", "ddim", "heun", "dpm++", "dpm++sde", "euler"],
    "eval.evaluator": ["auto", "inception", "classifier", "judge"],
    "eval.sampler": ["ddpm", "dpm++", "euler"],
    "checkpoint.local_dir": ["", "/dev/shm", "/nowhere"],
    "init_from": ["/nowhere", "weights.pt"],
    "eval.inception": ["", "/nowhere"],
    "eval.reference": ["", "/nowhere"],
    "eval.vae": ["", "ema"],
    "log.wandb": [False, True, "", "project", "a/b", "x" * 200],
}


def small_config() -> ConfigDict:
    """Two steps of a small MDTv2 on the digits."""
    config = get_config()
    config.model.update(hidden_size=16, depth=4, num_heads=2, decoder_depth=2)
    config.update(num_steps=2, batch_size=8, log_every=1, checkpoint_every=2, eval_every=0)
    config.schedule.update(name="constant", warmup_steps=0)
    config.sample.update(every=0, steps=4)
    return config


def keys() -> list[str]:
    """Every setting by its key."""
    found: list[str] = []

    def walk(section: ConfigDict, prefix: str) -> None:
        for name in section:
            if isinstance(section[name], ConfigDict):
                walk(section[name], f"{prefix}{name}.")
            else:
                found.append(f"{prefix}{name}")

    walk(config_lib.default_config(), "")
    return found


def _numbers(low: float, high: float, whole: bool) -> st.SearchStrategy:
    """Numbers of a range, at its ends and beyond, and what is no number."""
    ends = [low, high, low - 1, high + 1, -1, 0, 1, 2, 2**31, 2**32, 2**63, -(2**63), 10**14]
    odd = [math.nan, math.inf, -math.inf, 0.5, 1e-30, -1e-30, 1e30, True, False, "5", ""]
    ints = st.integers(math.ceil(low), max(math.floor(high), math.ceil(low)))
    inside = ints if whole else st.floats(low, high)
    return st.one_of(inside, inside, inside, st.sampled_from(ends), st.sampled_from(odd))


@functools.cache
def values(key: str) -> st.SearchStrategy:
    """Values of all kinds for a setting, sizes and counts as a test can afford."""
    defaults = config_lib.default_config()
    section, _, name = key.rpartition(".")
    kind = (defaults[section] if section else defaults).get_type(name)
    if key in RANGES:
        range_ = RANGES[key]
        high = AFFORDABLE.get(key) or range_.high
        one = _numbers(range_.low, min(high, range_.high), range_.whole)
        if range_.counts:
            many = st.lists(one, max_size=4).map(tuple)
            likely = st.lists(st.floats(0, 0.9999), min_size=1, max_size=3).map(tuple)
            return st.one_of(likely if not range_.whole else many, many, st.none())
        # Beyond what is affordable nothing may be trained; it is refused, or never drawn.
        return st.one_of(one.filter(lambda v: _affordable(key, v)), st.none())
    if kind is bool:
        return st.booleans()
    return st.one_of(st.sampled_from(TEXTS[key]), st.text(max_size=5))


def _affordable(key: str, value: Any) -> bool:
    limit = AFFORDABLE.get(key)
    if limit is None or isinstance(value, (bool, str)):
        return True
    return not (limit < value <= RANGES[key].high)


def tiny_config() -> ConfigDict:
    """Two steps of a DiT of one block, whose step compiles in seconds."""
    config = small_config()
    config.model.update(name="DiT", hidden_size=8, depth=1, decoder_depth=None)
    return config


def with_settings(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """The config with some settings changed, past its own check of types."""
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        holder = config[section] if section else config
        if holder.get_type(name) is float and type(value) is int:
            value = float(value)
        with holder.ignore_type():
            holder[name] = value
    return config


def changed(drawn_keys: list[str]) -> st.SearchStrategy:
    """A value for each of some settings, by key."""
    return st.fixed_dictionaries({key: values(key) for key in drawn_keys})


# One setting with any value, and two.
DRAWN = st.sampled_from(keys()).flatmap(lambda key: changed([key]))
PAIRS = st.lists(st.sampled_from(keys()), min_size=2, max_size=2, unique=True).flatmap(changed)
