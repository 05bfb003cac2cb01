"""The table of ranges: every number of a config and of every command's flags keeps to its own."""

import math

import numpy as np
import pytest
from command_flags import commands, flags_of

import mdt_jax
from mdt_jax import config as config_lib
from mdt_jax.basics import ranges
from mdt_jax.basics.ranges import RANGES, Range

COMMANDS = commands()


def flat(section, prefix=""):
    """The settings of a config by key, and each one's type."""
    for name in section:
        if hasattr(section[name], "items"):
            yield from flat(section[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", section.get_type(name), section[name]


def numbers_of_config():
    return {
        key: value
        for key, kind, value in flat(config_lib.default_config())
        if kind in (int, int | str, float, tuple)
    }


def test_every_number_of_the_config_has_a_range_and_the_defaults_are_in_them():
    found = numbers_of_config()
    assert {key for key in RANGES if not key.startswith("--")} == found.keys()
    for key, value in found.items():
        assert RANGES[key].fault(value) == "", key
        if value is None:
            assert RANGES[key].none, key
    ranges.check_config(config_lib.default_config())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_numeric_flag_has_a_range(name, monkeypatch):
    numeric = [flag for flag in flags_of(COMMANDS[name], monkeypatch) if flag.kind in (int, float)]
    assert [flag.name for flag in numeric if f"--{flag.name}" not in RANGES] == []
    for flag in numeric:
        assert RANGES[f"--{flag.name}"].whole == (flag.kind is int), flag


def test_every_range_of_a_flag_is_some_commands(monkeypatch):
    there = {flag.name for c in COMMANDS.values() for flag in flags_of(c, monkeypatch)}
    assert {key for key in RANGES if key.startswith("--")} == {
        f"--{name}" for name in there
    } & RANGES.keys()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), -np.inf])
def test_no_range_has_nan_or_infinity(value):
    for key, range_ in RANGES.items():
        within = [(value,), (0.5, value), (value, 0.5)] if range_.counts else []
        for given in (value, *within):
            with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
                ranges.check(key, given)
            assert str(error.value).startswith(key)


@pytest.mark.parametrize("ends", [(0, math.inf), (math.nan, 1), (-math.inf, 0), (1, 0)])
def test_a_range_without_finite_ends_cannot_be_made(ends):
    with pytest.raises(ValueError, match="finite ends"):
        Range(*ends)


REFUSED = {
    "seed": [-1, 2**63, 0.5, True, "5", None],
    "num_steps": [0, -1, 2**31],
    "batch_size": [0, 2.0, "8", True],
    "ema_rates": [(), (0.9, 0.9), (0, 0.0), (1.0,), (-0.1,), 0.9, ("0.9",), (True,),
                  (0.99999999,), (0.9999, 0.99990000001)],
    "label_dropout": [-0.1, 1, 1.0, 1.1, None],
    "model.patch_size": [0, -4, 2.5],
    "model.num_heads": [0],
    "model.hidden_size": [0, -8],
    "model.mlp_ratio": [0, -1, 1e9],
    "model.num_classes": [-7, -2, 2**40],
    "model.input_size": [0, 100_000_000],
    "model.depth": [0, 10**9],
    "masking.ratio": [-0.1, 1],
    "masking.ratio_span": [-0.1, 1],
    "diffusion.num_timesteps": [0, 1, -1],
    "diffusion.min_snr": [0, -5.0, 1e-9],
    "optimizer.learning_rate": [0, -1e-4, 100, 1e-46, 1e-320],
    "optimizer.weight_decay": [-0.1, 1e9],
    "optimizer.eps": [0, -1e-8, 1e-40],
    "optimizer.betas": [(0.9, 2, 0.9), (0.9, 1.0), (0.9,), (-0.1, 0.9), (0.9, 0.99999999), 0.9],
    "optimizer.clip_norm": [0, -1, 1e-46, 1e-320],
    "schedule.factor": [0, -0.1, 1e-300],
    "schedule.boundaries": [(5, 5), (6, 5), (0,), (1.5,)],
    "schedule.warmup_steps": [-1],
    "mesh.data": [0, -2],
    "mesh.fsdp": [0, 1.5],
    "data.max_bad_fraction": [-0.1, 1.1],
    "profile_steps": [(5,), (7, 5), (0, 5), (1, 2, 3)],
    "keep_every": [0, -1],
    "sample.steps": [0, 2.5, "", "0", "None", "-5", "ddim", "ddim0", "10,", "٣", "ddim٣", "1e3"],
    "sample.cfg_scale": [1e9],
    "sample.cfg_power": [-1],
    "sample.cfg_interval": [(0.5, 0.5), (0.7, 0.1), (0.5,), (-0.1, 0.5), (0.5, 2)],
    "sample.eta": [-1, 2],
    "eval.num_samples": [1],
    "--num_samples": [0, 99_999_999_999_999],
    "--max_hours": [0, -1],
    "--masked_share": [-0.1, 2],
    "--ema_rate": [1, -0.1, 0.99999999],
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_outside_is_refused_in_a_line_that_says_what_would_do(key):
    for value in REFUSED[key]:
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            ranges.check(key, value)
        said = str(error.value)
        assert said.startswith(key), said
        assert said.endswith((f"; it takes {RANGES[key]}", f" is outside {RANGES[key].interval}"))


@pytest.mark.parametrize(
    "key", ["optimizer.learning_rate", "optimizer.clip_norm", "schedule.factor", "ema_rates"]
)
def test_the_ends_of_a_range_are_normal_numbers_of_float32_below_1_for_rates(key):
    assert RANGES[key].low == 0 or np.float32(RANGES[key].low) >= np.finfo(np.float32).tiny
    assert key != "ema_rates" or np.float32(RANGES[key].high) < 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**63 - 1), ("seed", np.int64(3)), ("batch_size", np.uint8(8)),
        ("optimizer.learning_rate", np.float32(1e-4)), ("optimizer.learning_rate", 1),
        ("ema_rates", (0.999999,)), ("ema_rates", (0, 0.5)),
        ("ema_rates", (0.9999, 0.99991)), ("label_dropout", 0.99),
        ("optimizer.learning_rate", 1.2e-38), ("optimizer.clip_norm", 1e-37),
        ("optimizer.betas", [0, 0.9]), ("optimizer.betas", np.array([0.9, 0.999])),
        ("optimizer.betas", None), ("diffusion.min_snr", None), ("mesh.data", -1),
        ("model.num_classes", -1), ("model.num_classes", 0), ("schedule.boundaries", ()),
        ("sample.steps", "ddim50"), ("sample.steps", "10, 20"), ("sample.steps", "logsnr20"),
        ("sample.steps", "250"), ("sample.cfg_interval", None), ("sample.cfg_scale", -1.5),
    ],
)  # fmt: skip
def test_what_is_inside_is_taken(key, value):
    ranges.check(key, value)


SIZES = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 4,
         "num_heads": 2, "num_classes": 3}  # fmt: skip


@pytest.mark.parametrize("family", ["MDT", "MDTv2", "DiT"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("patch_size", 0), ("patch_size", -4), ("patch_size", 3), ("patch_size", None),
        ("num_heads", 0), ("num_heads", 3), ("num_heads", True), ("hidden_size", 0),
        ("hidden_size", 18), ("hidden_size", "16"), ("hidden_size", 16.0), ("mlp_ratio", 0),
        ("mlp_ratio", -1), ("mlp_ratio", math.nan), ("mlp_ratio", 0.01), ("num_classes", -7),
        ("num_classes", -1), ("input_size", 100_000_000), ("input_size", 4096), ("depth", 0),
        ("depth", 2.5), ("in_channels", 0), ("scan_unroll", 0), ("decoder_depth", 0),
        ("decoder_depth", 1.0),
    ],
)  # fmt: skip
def test_sizes_of_a_model_are_refused_before_anything_is_made(family, setting, value):
    sizes = SIZES | {"decoder_depth": 2} if family != "DiT" else SIZES
    mdt_jax.create_model(family, **sizes)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        mdt_jax.create_model(family, **sizes | {setting: value})
    assert setting in str(error.value)
