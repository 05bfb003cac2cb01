"""Settings that contradict each other: refused in a line that names both, told, or harmless.

The table has the pairs of `mdt_jax/config.py`; `test_settings.py` draws others.
"""

import importlib
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from settings_drawn import keys, small_config, with_settings
from test_settings import prepare

from mdt_jax import config as config_lib
from mdt_jax import sampling
from mdt_jax.basics.ranges import RANGES
from mdt_jax.parallel import sharding
from mdt_jax.parallel.command import USER_ERRORS, one_line
from mdt_jax.training import remarks, run_evaluation
from mdt_jax.training.actions import CheckpointSaver
from mdt_jax.training.optimizers import learning_rate_of

STEP = {"num_steps": 50, "schedule.name": "step"}
UNCONDITIONAL = {"model.num_classes": 0, "data.name": "npy"}

# What is changed, and the names that the line must hold.
REFUSED = [
    ({"schedule.warmup_steps": 2, "num_steps": 2}, ("schedule.warmup_steps", "num_steps")),
    (STEP, ("schedule.name", "schedule.boundaries")),
    (
        STEP | {"schedule.boundaries": (5, 9), "schedule.warmup_steps": 6},
        ("schedule.boundaries", "schedule.warmup_steps"),
    ),
    ({"model.patch_size": 3}, ("patch_size", "input_size")),
    ({"model.num_heads": 3}, ("num_heads", "hidden_size")),
    ({"model.hidden_size": 4, "model.mlp_ratio": 0.1}, ("mlp_ratio", "hidden_size")),
    ({"model.input_size": 512, "model.patch_size": 1}, ("input_size", "patch_size")),
    ({"model.decoder_depth": 4}, ("decoder_depth", "depth")),
    ({"model.decoder_depth": 1}, ("decoder_depth", "depth")),
    ({"model.name": "MDT", "model.decoder_depth": 4}, ("decoder_depth", "depth")),
    ({"masking.ratio": 0.9, "masking.ratio_span": 0.2}, ("masking.ratio", "masking.ratio_span")),
    ({"masking.ratio": 0.9, "masking.ratio_span": 0.0}, ("masking.ratio", "patch_size")),
    ({"batch_size": 12}, ("batch_size", "mesh.data")),
    ({"accumulation_steps": 2}, ("batch_size", "accumulation_steps")),
    ({"mesh.fsdp": 3}, ("fsdp", "devices")),
    ({"mesh.data": -1, "mesh.fsdp": -1}, ("mesh.data", "mesh.fsdp")),
    ({"mesh.tensor": 4}, ("tensor", "num_heads")),
    ({"optimizer.betas": (0.9, 0.99)}, ("optimizer.betas", "optimizer.name")),
    (
        {"optimizer.name": "adamw", "optimizer.betas": (0.9, 0.9, 0.99)},
        ("optimizer.betas", "optimizer.name"),
    ),
    ({"diffusion.num_timesteps": 8, "sample.steps": 9}, ("sample.steps", "num_timesteps")),
    (
        {"diffusion.schedule": "linear", "diffusion.num_timesteps": 10, "sample.steps": 4},
        ("schedule", "num_timesteps"),
    ),
    ({"label_dropout": 0.0}, ("cfg_scale", "label_dropout")),
    ({"sample.guided_channels": 2}, ("guided_channels", "in_channels")),
    ({"sample.cfg_interval": (0.5, 0.5)}, ("sample.cfg_interval",)),
    ({"model.in_channels": 3}, ("data.name", "model.in_channels")),
    ({"model.num_classes": 9}, ("data", "model.num_classes")),
    ({"model.kernels": "cudnn"}, ("model.kernels", "GPU")),
    ({"model.kernels": "pallas"}, ("model.kernels", "TPU")),
    ({"data.class_order": "numeric"}, ("data.class_order", "data.name")),
    ({"data.labels": "none"}, ("data.labels", "data.name")),
    ({"data.name": "folder"}, ("data.name", "data.path")),
    ({"data.name": "npy", "data.path": "/", "data.split": "test"}, ("data.split", "data.path")),
    ({"eval_every": 1, "eval.evaluator": "inception"}, ("eval.inception", "eval_every")),
    ({"eval_every": 1, "eval.vae": "ema"}, ("eval.vae", "pixels")),
    ({"eval_every": 1, "eval.guided_channels": 2}, ("eval.guided_channels", "in_channels")),
    (
        {"eval_every": 1, "eval.steps": 9, "diffusion.num_timesteps": 8},
        ("eval.steps", "num_timesteps"),
    ),
]  # fmt: skip

# What is changed, the setting that is of no use, and the one that makes it so.
TOLD = [
    ({"schedule.boundaries": (5, 9)}, "schedule.boundaries", "schedule.name"),
    ({"schedule.factor": 0.5}, "schedule.factor", "schedule.name"),
    (STEP | {"schedule.boundaries": (5, 99)}, "schedule.boundaries", "num_steps"),
    ({"profile_steps": (1, 99)}, "profile_steps", "num_steps"),
    ({"model.name": "DiT"}, "model.decoder_depth", "model.name"),
    (
        {"model.name": "DiT", "model.decoder_depth": None, "masking.ratio": 0.5},
        "masking.ratio",
        "model.name",
    ),
    ({"masking.masked_pass": False, "masking.ratio": 0.5}, "masking.ratio", "masking.masked_pass"),
    ({"diffusion.loss": "kl", "diffusion.min_snr": 3.0}, "diffusion.min_snr", "diffusion.loss"),
    (UNCONDITIONAL | {"label_dropout": 0.2}, "label_dropout", "model.num_classes"),
    (UNCONDITIONAL, "sample.cfg_scale", "model.num_classes"),
    ({"data.max_bad_fraction": 0.5}, "data.max_bad_fraction", "data.on_bad_image"),
    ({"data.path": "/data"}, "data.path", "data.name"),
    ({"sample.num_samples": 64}, "sample.num_samples", "sample.every"),
    ({"sample.every": 100}, "sample.every", "num_steps"),
    ({"eval.reference": "/r.npz"}, "eval.reference", "eval_every"),
    ({"eval.evaluator": "inception"}, "eval.evaluator", "eval_every"),
    ({"eval.seed": 3}, "eval.seed", "eval_every"),
    ({"eval.vae": "ema"}, "eval.vae", "eval_every"),
    ({"num_steps": 5, "keep_every": 3, "checkpoint_every": 4}, "keep_every", "checkpoint_every"),
    ({"ema_rates": (0.9999,)}, "ema_rates", "num_steps"),
    ({"model.in_channels": 4}, "sample.clip", "model.in_channels"),
]  # fmt: skip


def told(changes, given=()):
    quiet = {"ema_rates": (0.1,), "eval.num_samples": 5000, "sample.num_samples": 16}
    return remarks.remarks(with_settings(small_config(), quiet | changes), given)


@pytest.mark.parametrize(("changes", "names"), REFUSED)
def test_a_contradiction_is_refused_in_a_line_that_names_both(changes, names):
    with pytest.raises(USER_ERRORS) as error:
        prepare(with_settings(small_config(), changes))
    said = one_line(error.value)
    assert "\n" not in str(error.value)
    assert [name for name in names if name not in said] == [], said


@pytest.mark.parametrize(("changes", "key", "on"), TOLD)
def test_a_setting_without_use_is_told_with_the_one_that_makes_it_so(changes, key, on):
    assert [line for line in told(changes) if line.startswith(key) and on in line], told(changes)


def test_nothing_is_told_of_settings_that_fit():
    assert told({}) == []
    assert told(STEP | {"schedule.boundaries": (5, 9), "keep_every": 4, "sample.every": 5}) == []


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.py")), ids=lambda path: path.stem)
def test_the_configs_have_no_setting_without_use(path):
    config = importlib.import_module(f"configs.{path.stem}").get_config()
    assert remarks.remarks(config) == []


def test_a_setting_that_a_person_gave_is_told_though_it_is_as_by_default():
    config = {"model.name": "DiT", "model.decoder_depth": None, "masking.ratio_span": 0.0}
    assert told(config) == []
    (line,) = told(config, ["masking.ratio", "num_steps"])
    assert line.startswith("masking.ratio 0.3 is of no use: model.name is 'DiT'")


def test_every_setting_that_uses_name_is_one_of_the_configs():
    named = {key for use in remarks.USES for key in (*use.keys, use.on)}
    assert named <= set(keys())


# What is changed, and why nothing is lost by it: a check of the changed config.
def _first_save(config):
    run = SimpleNamespace(config=config, latents=None, local=None)
    source = SimpleNamespace(class_names=(), __len__=lambda: 0)
    saver = CheckpointSaver.__new__(CheckpointSaver)
    saver._run, saver._stop, saver._source = run, SimpleNamespace(stopping=False), source
    return next(step for step in range(1, 99) if saver.due(step))


HARMLESS = {
    "checkpoint_every beyond num_steps: the last step is saved": (
        {"checkpoint_every": 99}, lambda c: _first_save(c) == c.num_steps),
    "eval_every beyond num_steps: the last step is judged": (
        {"eval_every": 99}, lambda c: run_evaluation.judgement_is_due(c, c.num_steps)),
    "eval.batch_size beyond eval.num_samples: it becomes as many": (
        {"eval.batch_size": 256, "eval.num_samples": 40},
        lambda c: sampling.global_batch_size(
            c.eval.batch_size, c.eval.num_samples, sharding.create_mesh()) == 40),
    "cfg_interval of none is all of the process": (
        {"sample.cfg_interval": ()},
        lambda c: sampling.resolve_options(
            sampling.DiffusionModel.from_config(c)).cfg_interval is None),
    "masking.ratio of 0 keeps every token": (
        {"masking.ratio": 0.0, "masking.ratio_span": 0.0},
        lambda c: prepare(c)[0].kept_tokens.counts == (4,)),
    "boundaries of another schedule change no rate": (
        {"num_steps": 50, "schedule.boundaries": (5, 9)},
        lambda c: {float(learning_rate_of(c)(step)) for step in (0, 5, 9, 49)}
        == {float(learning_rate_of(small_config())(0))}),
    "decoder_depth of a DiT changes nothing": (
        {"model.name": "DiT", "model.decoder_depth": 2},
        lambda c: config_lib.create_network(c)
        == config_lib.create_network(with_settings(c, {"model.decoder_depth": None}))),
    "sizes beside a size's name are the sizes": (
        {"model.name": "MDTv2-S/2", "model.depth": 6},
        lambda c: config_lib.create_network(c).depth == 6),
    "the classes that data lack are told of by the data's check": (
        {"model.num_classes": 12}, lambda c: prepare(c)[0].model.num_classes == 12),
}  # fmt: skip


@pytest.mark.parametrize("what", HARMLESS)
def test_a_pair_is_harmless(what):
    changes, holds = HARMLESS[what]
    config = with_settings(small_config(), changes)
    prepare(config)
    assert holds(config)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "velocity"])
def test_min_snr_weighs_every_prediction(prediction):
    changes = {
        "diffusion.prediction": prediction,
        "diffusion.min_snr": RANGES["diffusion.min_snr"].low,
    }
    diffusion = config_lib.create_diffusion(with_settings(small_config(), changes))
    weights = np.asarray(diffusion._mse_weight(jnp.arange(diffusion.num_steps)))
    assert np.isfinite(weights).all() and (weights > 0).all()
