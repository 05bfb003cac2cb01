"""Configs: recipes by family, and when two runs are the same run."""

import pytest

from configs import digits, imagenet256, imagenet256_step_decay, imagenet512
from mdt_jax import config as config_lib
from mdt_jax.training import resumption
from mdt_jax.training.optimizers import learning_rate_of


@pytest.mark.parametrize(
    ("model", "optimizer", "rate", "clip", "min_snr", "span"),
    [
        ("MDT-XL/2", "adamw", 1e-4, None, None, 0.0),
        ("MDTv2-XL/2", "adan", 3e-4, 1.0, 5.0, 0.2),
        ("MDTv2-S/2", "adan", 5e-4, 1.0, 5.0, 0.2),
        ("DiT-XL/2", "adamw", 1e-4, None, None, 0.0),
    ],
)
def test_each_family_has_its_authors_recipe(model, optimizer, rate, clip, min_snr, span):
    c = imagenet256.get_config(model)
    assert (c.optimizer.name, c.optimizer.learning_rate) == (optimizer, rate)
    assert (c.optimizer.clip_norm, c.diffusion.min_snr) == (clip, min_snr)
    assert (c.masking.ratio, c.masking.ratio_span, c.batch_size) == (0.3, span, 256)
    assert (c.optimizer.weight_decay, tuple(c.ema_rates)) == (0.0, (0.9999,))


def test_the_model_cards_step_decay():
    c = imagenet256_step_decay.get_config()
    rate = learning_rate_of(c)
    assert (c.optimizer.name, c.batch_size, c.num_steps) == ("adam", 32, 150_000)
    assert [float(rate(s)) for s in (0, 99_999, 100_001, 125_001)] == pytest.approx(
        [1e-4, 1e-4, 1e-5, 1e-6]
    )


@pytest.mark.parametrize(
    ("argument", "pixels", "model"),
    [
        ("", 256, ("MDTv2-XL/2", 32, 4, None, 3, "")),
        ("MDT-B/4,vae=mse", 256, ("MDT-B/4", 32, 4, None, 3, "")),
        ("vae=sdxl", 256, ("MDTv2-XL/2", 32, 4, None, None, "sdxl")),
        ("vae=sd3,DiT-B/2", 256, ("DiT-B/2", 32, 16, None, None, "sd3")),
        ("MDTv2-B/2,vae=flux", 512, ("MDTv2-B/2", 64, 16, None, None, "flux")),
        ("vae=dc-ae-f32", 512, ("MDTv2-XL/2", 16, 32, 1, None, "dc-ae-f32")),
        ("vae=dc-ae-f64", 512, ("MDTv2-XL/2", 8, 128, 1, None, "dc-ae-f64")),
    ],
)
def test_a_config_takes_another_autoencoder(argument, pixels, model):
    c = {256: imagenet256, 512: imagenet512}[pixels].get_config(argument)
    m = c.model
    found = (m.name, m.input_size, m.in_channels, m.patch_size, c.sample.guided_channels)
    assert (*found, c.eval.vae) == model
    network = config_lib.create_network(c)
    assert network.num_tokens == (m.input_size // network.patch_size) ** 2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("vae=sdxl2", "vae=sdxl2 is unknown; known: ema, mse, sdxl"),
        ("vea=sdxl", "the config's argument 'vea=sdxl': vea is unknown; it is MODEL,vae=VAE"),
        ("MDT-B/2,DiT-B/2", "model is given twice"),
    ],
)
def test_an_argument_that_a_config_does_not_know_is_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        imagenet256.get_config(argument)


def test_at_512_pixels_a_step_recomputes_what_would_not_fit():
    assert imagenet512.get_config().model.remat == "full"
    assert imagenet512.get_config("vae=dc-ae-f32").model.remat == "none"


def test_a_config_comes_back_from_json():
    c = imagenet256.get_config("MDT-B/4")
    again = config_lib.from_json(config_lib.to_json(c))
    assert config_lib.to_json(again) == config_lib.to_json(c)


def test_a_setting_newer_than_a_run_is_no_difference():
    now = config_lib.default_config()
    old = config_lib.to_json(now)
    del old["diffusion"]["timestep_sampler"]
    assert resumption.changes(config_lib.from_json(old), now) == []


def test_the_digits_baseline_differs_in_its_network_alone():
    mdt, dit = (config_lib.to_json(digits.get_config(name)) for name in ("MDTv2", "DiT"))
    assert (mdt["model"].pop("name"), dit["model"].pop("name")) == ("MDTv2", "DiT")
    assert (mdt["model"].pop("decoder_depth"), dit["model"].pop("decoder_depth")) == (2, None)
    assert mdt == dit
