"""The range of every number that a person gives: one table, `RANGES`.

It has the numeric keys of a config ("optimizer.learning_rate") and the numeric flags of all
commands and tools ("--num_samples"); a flag that means the same as a key has its range. A range has
two finite ends, so that NaN and infinity are in none. Tests compare the table with the config and
with the flags, so that no number is without an entry.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any

# The largest seed: the least that NumPy's and JAX's 64-bit integers have in common.
MAX_SEED = 2**63 - 1
# Steps, and the indices of samples, are 32-bit integers on the devices.
MAX_COUNT = 2**31 - 1
# Most tokens of a model: at 16,384 the table of the pairs that attention compares is 1 GiB.
MAX_TOKENS = 2**14
# The devices compute in float32. Its least normal number is a little below; what is smaller may be
# 0 there.
LEAST = 1.2e-38
# A rate of decay: float32 tells the highest from 1, which would keep what it decays for ever.
HIGHEST_RATE = 0.999999
_EMPTY = "is empty"


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number, or each number of a sequence, may have.

    Attributes:
      low, high: the finite ends.
      whole: whether it is a whole number.
      above, below: whether `low`, or `high`, is itself outside.
      also: a number outside the ends that has a meaning of its own, and that meaning.
      none: the meaning of None; empty where None is no value.
      text: the meaning of a text in place of the number; empty where there is none.
      form: the regular expression of such texts.
      counts: how many numbers a sequence may have; empty for a number alone.
      ascending: whether each number of the sequence must be above the one before.
      distinct: whether the numbers of the sequence must differ in float32.
      example: a value that would do, for messages on sequences.
    """

    low: int | float
    high: int | float
    whole: bool = False
    above: bool = False
    below: bool = False
    also: tuple[int, str] | None = None
    none: str = ""
    text: str = ""
    form: str = ""
    counts: tuple[int, ...] = ()
    ascending: bool = False
    distinct: bool = False
    example: str = ""

    def __post_init__(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"a range needs finite ends, not {self.low} and {self.high}")

    @property
    def interval(self) -> str:
        """Both ends in words: "0 to 1", "[0, 1)"."""
        low, high = (f"{end:,}" if self.whole else f"{end:g}" for end in (self.low, self.high))
        if not (self.above or self.below):
            return f"{low} to {high}"
        return f"{'(' if self.above else '['}{low}, {high}{')' if self.below else ']'}"

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        where = f"{'in' if self.above or self.below else 'from'} {self.interval}"
        said = f"a {kind} {where}"
        if self.counts:
            order = " in ascending order" if self.ascending else ""
            order = order or (", all different" if self.distinct else "")
            said = f"{kind}s {where}{order}"
            said += f", such as {self.example}" if self.example else ""
        said += f", or {self.also[0]}: {self.also[1]}" if self.also else ""
        said += f", or {self.text}" if self.text else ""
        return said + (f", or None: {self.none}" if self.none else "")

    def fault(self, value: Any) -> str:
        """What is wrong with a value, in a few words that follow it; empty if nothing is."""
        if value is None:
            return "" if self.none else "is no number"
        if isinstance(value, str):
            if not self.text:
                return "is a text, no number"
            return (
                "" if re.fullmatch(self.form, value, re.ASCII) else "is no number and no such text"
            )
        return self._sequence_fault(value) if self.counts else self._number_fault(value)

    def _sequence_fault(self, values: Any) -> str:
        if not isinstance(values, Iterable):
            return "is no sequence of numbers"
        values = list(values)
        if len(values) not in self.counts:
            return f"holds {len(values)} numbers" if values else _EMPTY
        for value in values:
            if fault := self._number_fault(value):
                return f"holds {value}, which {fault}"
        if self.ascending and any(a >= b for a, b in zip(values, values[1:], strict=False)):
            return "is not in ascending order"
        if self.distinct and len(set(values)) < len(values):
            return "holds a number twice"
        if self.distinct and len(set(map(_in_float32, values))) < len(values):
            return "holds a number twice, as float32 has it"
        return ""

    def _number_fault(self, value: Any) -> str:
        if getattr(value, "ndim", None) == 0:  # a scalar of NumPy's or JAX's
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"is no {'whole ' if self.whole else ''}number"
        if self.whole and not isinstance(value, int):
            return "is no whole number"
        if self.also and value == self.also[0]:
            return ""
        low_enough = value < self.high if self.below else value <= self.high
        high_enough = value > self.low if self.above else value >= self.low
        if low_enough and high_enough:  # which NaN never is
            return ""
        if self.whole and isinstance(value, int) and not high_enough:
            return f"is below {self.low:,}"
        return f"is outside {self.interval}"

    def check(self, name: str, value: Any) -> None:
        """Refuses a value, with a ValueError of one line.

        Args:
          name: the key, flag or argument that it was given as.
          value: the value.
        """
        if fault := self.fault(value):
            shown = repr(value) if isinstance(value, str) else " ".join(str(value).split())
            shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
            what = name if fault == _EMPTY else f"{name} {shown}"
            told = fault == f"is outside {self.interval}" and str(self).endswith(self.interval)
            raise ValueError(f"{what} {fault}" + ("" if told else f"; it takes {self}"))


def _in_float32(value: int | float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def _whole(low: int, high: int, **more: Any) -> Range:
    return Range(low, high, whole=True, **more)


def _number(low: int | float, high: int | float, **more: Any) -> Range:
    return Range(low, high, **more)


_COUNT = _whole(1, MAX_COUNT)
_EVERY = _whole(0, MAX_COUNT)  # 0: never
_STEP = _whole(0, MAX_COUNT)
_SEED = _whole(0, MAX_SEED)
_BATCH = _whole(1, 2**20)
_FRACTION = _number(0, 1)
_AXIS = _whole(1, 2**20, also=(-1, "all devices that are left"))
_OWN_SIZE = "the size that the model's name stands for"
_MANY = tuple(range(1, 65))
# A number of images, of samples say, whose labels or statistics lie in memory.
_IMAGES = _whole(1, 100_000_000)

# Counts of one section or of several, "ddim50" or "logsnr20".
_RESPACING = r"(ddim|logsnr)0*[1-9]\d*|\s*0*[1-9]\d*\s*(,\s*0*[1-9]\d*\s*)*"

RANGES: dict[str, Range] = {
    "seed": _SEED,
    "num_steps": _COUNT,
    "batch_size": _BATCH,
    "accumulation_steps": _BATCH,
    "ema_rates": _number(0, HIGHEST_RATE, counts=_MANY, distinct=True, example="(0.9999,)"),
    # At 1 no label would be trained.
    "label_dropout": _number(0, 1, below=True),
    "model.input_size": _whole(1, 4096),
    "model.in_channels": _whole(1, 4096),
    "model.num_classes": _whole(0, 2**24, also=(-1, "as many as the data have")),
    "model.patch_size": _whole(1, 4096, none=_OWN_SIZE),
    "model.hidden_size": _whole(4, 2**14, none=_OWN_SIZE),
    "model.depth": _whole(1, 512, none=_OWN_SIZE),
    "model.num_heads": _whole(1, 1024, none=_OWN_SIZE),
    "model.mlp_ratio": _number(0, 64, above=True, none=_OWN_SIZE),
    "model.decoder_depth": _whole(1, 512, none=_OWN_SIZE),
    "model.scan_unroll": _whole(1, 512),
    "masking.ratio": _number(0, 1, below=True),
    "masking.ratio_span": _number(0, 1, below=True),
    "diffusion.num_timesteps": _whole(2, 100_000),
    # γ is 5 in the paper. Near 0 it makes every weight 0, and the loss seems to be excellent.
    "diffusion.min_snr": _number(0.01, 1e6, none="plain MSE"),
    "optimizer.learning_rate": _number(LEAST, 1),
    "optimizer.weight_decay": _number(0, 1000),
    # The correction of the moments' bias divides by what is left to 1.
    "optimizer.betas": _number(
        0, HIGHEST_RATE, counts=(2, 3), none="the optimiser's defaults", example="(0.9, 0.999)"
    ),
    # Below, gradients whose squares are 0 in float32 would be divided by next to nothing.
    "optimizer.eps": _number(1e-20, 1),
    "optimizer.clip_norm": _number(LEAST, 1e12, none="no clipping"),
    "schedule.warmup_steps": _EVERY,
    "schedule.boundaries": _whole(
        1, MAX_COUNT, counts=(0, *_MANY), ascending=True, example="(100000, 125000)"
    ),
    "schedule.factor": _number(LEAST, 10),
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "data.max_bad_fraction": _FRACTION,
    "data.num_workers": _whole(0, 1024),
    "data.read_ahead": _whole(1, 4096),
    "log_every": _COUNT,
    "profile_steps": _whole(
        1, MAX_COUNT, counts=(0, 2), ascending=True, example="(100, 105), the first and the last"
    ),
    "checkpoint_every": _COUNT,
    "keep_last": _COUNT,
    "keep_every": _whole(1, MAX_COUNT, none="none is kept for ever"),
    "checkpoint.local_every": _EVERY,
    "watchdog.factor": _number(2, 1e6, also=(0, "no step ends the run")),
    "watchdog.least_seconds": _number(5, 1e6),
    "watchdog.slow": _number(1.05, 1e6, also=(0, "none is named")),
    "watchdog.window": _whole(2, 10_000),
    "sample.every": _EVERY,
    "sample.num_samples": _whole(1, 10_000),
    "sample.steps": _whole(1, 100_000, text='a respacing, such as "ddim50"', form=_RESPACING),
    "sample.cfg_scale": _number(-1000, 1000),
    "sample.cfg_power": _number(0, 100, none="a constant scale"),
    "sample.cfg_interval": _number(
        0, 1, counts=(0, 2), ascending=True, none="all of the process", example="(0.1, 0.7)"
    ),
    "sample.guided_channels": _whole(1, 4096, none="all channels"),
    "sample.eta": _FRACTION,
    "eval_every": _EVERY,
    "eval.num_samples": _whole(2, 100_000_000),
    "eval.batch_size": _BATCH,
    "eval.seed": _SEED,
    # Flags.
    "--max_hours": _number(0, 1e6, above=True),
    "--num_samples": _IMAGES,
    "--vae_batch_size": _BATCH,
    "--vae_tile_size": _whole(1, 4096),
    "--resamples": _whole(1, 10_000),
    "--masked_share": _FRACTION,
    "--ema_rate": _number(0, HIGHEST_RATE),
    "--step": _STEP,
    "--num_classes": _whole(0, 2**24),
    "--feature_batch_size": _BATCH,
    "--split_size": _COUNT,
    "--neighbours": _whole(1, 10_000),
    "--per_class": _whole(2, 10_000_000),
    # Of the demo.
    "--port": _whole(0, 65_535),
    "--most_pictures": _whole(1, 256),
    "--most_steps": _whole(1, 100_000),
    "--most_waiting": _whole(0, 1000),
    # Of tools.
    "--image_size": _whole(1, 2**16),
    "--images_per_shard": _COUNT,
    "--process_index": _whole(0, 2**20),
    "--process_count": _whole(1, 2**20),
    "--processes": _whole(1, 2**20),
    "--num_devices": _whole(1, 2**20),
    "--num_images": _IMAGES,
    "--stats_images": _IMAGES,
    "--kills": _whole(1, 10_000),
    "--shard_mb": _whole(1, 2**20),
    "--repeats": _whole(1, 10_000),
    "--rounds": _whole(1, 10_000),
    "--seconds": _number(0, 1e6, above=True),
    "--images_per_second": _number(0, 1e12, above=True),
    "--mfu": _number(0, 1, above=True),
    "--examples": _IMAGES,
    "--samples": _IMAGES,
    "--references": dataclasses.replace(_IMAGES, counts=_MANY, example="10000 50000"),
    "--features": _whole(1, 2**16),
    "--seeds": dataclasses.replace(_SEED, counts=_MANY, example="0 1 2"),
    "--num_slices": _whole(1, 2**16),
    "--num_nodes": _whole(1, 2**16),
}
# Flags that mean the same as a key of the config.
SHARED = {
    "--seed": "seed",
    "--batch_size": "batch_size",
    "--sample_batch_size": "batch_size",
    "--mesh_fsdp": "mesh.fsdp",
    "--mesh_tensor": "mesh.tensor",
    "--decode_layers": "model.decoder_depth",
    "--num_heads": "model.num_heads",
    "--input_size": "model.input_size",
    "--unroll": "model.scan_unroll",
    "--workers": "data.num_workers",
    "--read_ahead": "data.read_ahead",
    "--max_bad_fraction": "data.max_bad_fraction",
}
# So do those of the sampler's options. In config.eval None stands for the value in config.sample.
for _key in [key for key in RANGES if key.startswith("sample.")]:
    _name = _key.removeprefix("sample.")
    if _name not in ("every", "num_samples"):
        SHARED[f"--{_name}"] = _key
        RANGES[f"eval.{_name}"] = dataclasses.replace(RANGES[_key], none="config.sample's value")
RANGES |= {flag: dataclasses.replace(RANGES[key], none="", text="") for flag, key in SHARED.items()}
# All others of their devices are copies: there is no axis to leave the rest to.
for _key in ("--mesh_fsdp", "--mesh_tensor"):
    RANGES[_key] = dataclasses.replace(RANGES[_key], also=None)
RANGES["--workers"] = dataclasses.replace(RANGES["--workers"], counts=_MANY, example="0 2")
# The last parts of the config's keys whose values are sequences of whole numbers.
WHOLE_SEQUENCES = {
    key.rpartition(".")[2]
    for key, range_ in RANGES.items()
    if range_.whole and range_.counts and not key.startswith("--")
}


def as_whole(value: Any) -> Any:
    """A number that is whole as an int, such as 1e6 or NumPy's; any other value as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return value


def range_of(name: str) -> Range:
    """The range of a config key or of a flag; raises KeyError, a developer's, for one without."""
    if name not in RANGES:
        raise KeyError(f"{name} has no entry in basics.ranges.RANGES: every number has a range")
    return RANGES[name]


def check(name: str, value: Any, named: str | None = None) -> None:
    """Refuses a number outside its range, with a ValueError of one line.

    Args:
      name: its entry in `RANGES`.
      value: the number.
      named: what the message calls it; `name` by default.
    """
    range_of(name).check(named or name, value)


def check_arguments(function_arguments: Mapping[str, Any]) -> None:
    """Refuses arguments of a Python function by the ranges of the flags of their names.

    None stands for an argument that is not given.
    """
    for name, value in function_arguments.items():
        if value is not None:
            check(f"--{name}", value, name)


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Refuses fields of a network outside the ranges of `config.model`, by their own names.

    None is no size there, and -1 no number of classes. Fields that are no numbers are left alone.
    """
    for name, value in sizes.items():
        if name == "num_classes":
            check("--num_classes", value, name)
        elif f"model.{name}" in RANGES:
            dataclasses.replace(RANGES[f"model.{name}"], none="").check(name, value)


def is_numeric(value: Any) -> bool:
    """Whether a value is a number, or a sequence that holds nothing else."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(is_numeric, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_flags(flags: Mapping[str, Any]) -> None:
    """Refuses flags whose numbers are outside their ranges.

    Args:
      flags: values by name, without dashes. Those that are no numbers are left alone; None is a
        flag that is not given.

    Raises:
      ValueError: the first such flag, in one line.
    """
    for name, value in flags.items():
        if f"--{name}" in RANGES and is_numeric(value):
            check(f"--{name}", value)


def check_config(config: Any) -> None:
    """Refuses a config in which a number is outside its range, with a ValueError of one line.

    Args:
      config: a `config.default_config()` with other values.
    """
    for key, range_ in RANGES.items():
        if key.startswith("--"):
            continue
        section, _, name = key.rpartition(".")
        range_.check(key, (config[section] if section else config)[name])
