"""The options of a sampler: one list, of which configs, flags and arguments are made."""

import dataclasses
import inspect

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

import mdt_jax
from mdt_jax import config as config_lib
from mdt_jax import sampling
from mdt_jax.evaluate import flags as evaluate_flags
from mdt_jax.parallel.flag_parsing import parse_flags
from mdt_jax.sample import flags as sample_flags
from mdt_jax.sampling import SAMPLER_OPTIONS, SamplerOptions

NAMES = [field.name for field in dataclasses.fields(SamplerOptions)]


@pytest.fixture
def model():
    config = config_lib.default_config()
    config.model.update(name="DiT", input_size=8, in_channels=4, num_classes=3, patch_size=4)
    config.model.update(hidden_size=8, depth=1, num_heads=2)
    return sampling.DiffusionModel.from_config(config)


def parse(*arguments):
    values = flags.FlagValues()
    sample_flags.define_flags(values)
    parse_flags(["sample", *arguments], values)
    return values


def test_every_option_is_a_key_a_flag_and_a_default(model):
    config = config_lib.default_config()
    for name in NAMES:
        assert config.sample[name] == SAMPLER_OPTIONS[name].config == model.defaults[name]
        assert config.eval[name] is None
        assert parse()[name].value is None
    assert sample_flags.given_options(parse()) == {}


def test_an_option_that_is_not_given_is_the_models_own(model):
    options = sampling.resolve_options(model)
    assert vars(options) == {
        "sampler": "ddpm", "steps": 250, "cfg_scale": 3.8, "cfg_power": 4.0, "cfg_interval": None,
        "guided_channels": 3, "eta": 0.0, "clip": False,
    }  # fmt: skip
    nothing = dict.fromkeys(set(NAMES) - {"cfg_power", "guided_channels"})
    assert sampling.resolve_options(model, **nothing) == options


def test_none_is_a_value_where_it_means_something(model):
    options = sampling.resolve_options(model, cfg_power=None, guided_channels=None)
    assert options.cfg_power is None and options.guided_channels == 4


def test_a_model_without_values_of_its_own_is_sampled_plainly(model):
    plain = sampling.resolve_options(dataclasses.replace(model, defaults={}))
    assert plain == dataclasses.replace(SamplerOptions(), guided_channels=4)


def test_flags_give_options():
    given = ("--cfg_power=0", "--cfg_interval=0.1,0.7", "--steps=10,15", "--noclip", "--eta=1")
    assert sample_flags.given_options(parse(*given)) == {
        "cfg_power": 0.0, "cfg_interval": [0.1, 0.7], "steps": "10,15", "clip": False, "eta": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^--cfg_interval a,1 is not LOW,HIGH, as in 0.1,0.7$"):
        sample_flags.given_options(parse("--cfg_interval=a,1"))


@pytest.mark.parametrize("define", [sample_flags.define_flags, evaluate_flags.define_flags])
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("seed=1e6", 10**6), ("num_samples=1e3", 1000), ("num_samples=None", None),
        ("vae_tile_size=None", None), ("step=none", None), ("ema_rate=None", None),
        ("batch_size=8.0", 8), ("cfg_scale=None", None),
    ],
)  # fmt: skip
def test_numbers_of_flags_are_written_as_those_of_a_config(flag, value, define):
    f = flags.FlagValues()
    define(f)
    parse_flags(["command", f"--{flag}"], f)
    found = f[flag.partition("=")[0]].value
    assert found == value and isinstance(found, type(value))


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("cfg_power=None", {"cfg_power": None}),
        ("guided_channels=none", {"guided_channels": None}),
        ("cfg_interval=None", {"cfg_interval": [0.0, 1.0]}),
        ("cfg_scale=None", {}),
        ("guided_channels=3.0", {"guided_channels": 3}),
    ],
)
def test_none_as_a_flag_is_a_value_where_it_means_something(flag, options):
    f = parse(f"--{flag}")
    assert sample_flags.given_options(f) == options
    copy = parse()
    for name in NAMES:  # as mdt_jax.evaluate hands its flags on
        setattr(copy, name, getattr(f, name))
    assert sample_flags.given_options(copy) == options


@pytest.mark.parametrize("section", ["sample", "eval"])
def test_steps_in_a_config_are_a_number_or_a_respacing(section, model):
    config = config_lib.default_config()
    for steps in ("ddim50", "10,20", 40):
        config[section].steps = steps
        again = config_lib.from_json(config_lib.to_json(config))
        assert again[section].steps == steps
        assert type(config_lib.to_json(config)[section]["steps"]) is type(steps)
    with pytest.raises(TypeError):
        config[section].steps = 2.5


@pytest.mark.parametrize(
    ("function", "keyword", "says"),
    [
        (mdt_jax.sample, "cfg_scal", r"sample\(\) has no argument 'cfg_scal'; .* 'cfg_scale'"),
        (mdt_jax.sample, "num_sample", r"sample\(\) has no argument .* 'num_samples'"),
        (mdt_jax.inpaint, "resample", r"inpaint\(\) has no argument .* 'resamples'"),
        (sampling.resolve_options, "xyz", r"'xyz'; options are sampler, steps, cfg_scale, cfg_p"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(function, keyword, says, model):
    needed = {"model": model, "params": {}, "images": np.zeros(1), "mask": np.zeros(1)}
    names = inspect.signature(function).parameters
    with pytest.raises(TypeError, match=says):
        function(**{k: v for k, v in needed.items() if k in names}, **{keyword: 1})


def test_the_help_of_the_options_describes_each():
    for name in NAMES:
        assert f"\n      {name}: {SAMPLER_OPTIONS[name].help}\n" in SamplerOptions.__doc__


def test_samples_of_a_run_are_judged_with_what_eval_says(model):
    config = config_lib.default_config()
    assert sampling.judging_options(config) == {}
    config.eval.update(sampler="dpm++", steps=12, cfg_interval=(0.1, 0.7))
    options = sampling.resolve_options(model, **sampling.judging_options(config))
    assert (options.sampler, options.steps) == ("dpm++", "logsnr12")
    assert (options.cfg_interval, options.cfg_scale) == ((0.1, 0.7), 3.8)


def test_a_key_that_was_none_is_set_again():
    config = config_lib.default_config()
    config.sample.update(cfg_power=None, guided_channels=None)
    assert config_lib.from_json(config_lib.to_json(config)).sample.cfg_power is None
    assert config.sample.get_type("cfg_power") is float  # how a flag's text is read
    config.sample.cfg_power, config.sample.guided_channels = 2, 1
    assert (config.sample.cfg_power, config.sample.guided_channels) == (2.0, 1)
    with pytest.raises(TypeError):
        config.sample.cfg_power = "two"


def test_no_key_is_set_twice(monkeypatch):
    seen, twice = set(), []
    set_item = ConfigDict.__setitem__

    def record(self, key, value):
        twice.extend([key] if (id(self), key) in seen else [])
        seen.add((id(self), key))
        set_item(self, key, value)

    monkeypatch.setattr(ConfigDict, "__setitem__", record)
    config_lib.default_config()
    assert len(seen) > 80 and twice == []
