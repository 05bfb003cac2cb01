"""What latents are goes with them, and whatever pairs them with an autoencoder compares the two."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.latent_space import (
    AUTOENCODERS,
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_SCALE,
    LatentSpace,
    check_same_latents,
)
from mdt_jax.parallel import sharding
from mdt_jax.weights import autoencoder as autoencoder_lib

MEASURED = LatentSpace(3, 2, mean=(0.5, -1.0, 2.0), std=(2.0, 0.5, 1.5), digest="a" * 64)
OFFSET = LatentSpace(channels=3, scale=1.5305, shift=0.0609)


def test_stable_diffusions_numbers_are_the_products_that_they_were():
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    expected = latents * np.float32(STABLE_DIFFUSION_SCALE)
    assert np.array_equal(STABLE_DIFFUSION.normalize(latents), expected)
    assert np.array_equal(jax.jit(STABLE_DIFFUSION.normalize)(latents), expected)
    back = expected / np.float32(STABLE_DIFFUSION_SCALE) + np.float32(0)
    assert np.array_equal(STABLE_DIFFUSION.denormalize(expected), back)


@pytest.mark.parametrize("space", [MEASURED, OFFSET])
def test_numbers_are_those_of_the_formula_on_the_host_and_on_devices(space):
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    if space.mean:
        expected = (latents - np.array(space.mean)) / np.array(space.std)
    else:
        expected = (latents - space.shift) * space.scale
    for found in (space.normalize(latents), space.normalize(jnp.asarray(latents))):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(space.denormalize(found), latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", [MEASURED, OFFSET, *AUTOENCODERS.values()])
def test_a_space_comes_back_from_json(space):
    assert LatentSpace.from_json(json.loads(json.dumps(space.to_json()))) == space


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": 0}, "scale is 0.0; it must be a number above 0"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": math.nan}, "scale is nan"),
        ({"shift": math.inf}, "shift is inf"),
        ({"scale": "0.1"}, "scale is '0.1'"),
        ({"scale": True}, "scale is True"),
        ({"channels": 0}, "channels is 0; it must be a whole number from 1 on"),
        ({"stride": -8}, "stride is -8; it must be a whole number from 0 on"),
        ({"stride": 1.5}, "stride is 1.5"),
        ({"mean": [0.0]}, "mean has 1 values, and the latents 4 channels"),
        ({"mean": [0.0] * 4}, "mean has 4 values|std has 0 values"),
        ({"mean": [0.0] * 4, "std": [1.0, 1.0, 0.0, 1.0]}, "std of channel 2 is 0.0"),
        ({"mean": 3, "std": [1.0]}, "mean is 3; it must be a list"),
        ({"digest": 7}, "digest is 7; it must be text"),
        ({"scael": 1.0}, "has 'scael'; known: autoencoder, channels"),
        ([1], "is a list, not an object"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message) as error:
        LatentSpace.from_json(values)
    assert "\n" not in str(error.value)


SAME = LatentSpace(autoencoder="mse", digest="1" * 64)
DIFFERENT = {
    "channels": ({"channels": 16}, "4 channels", "16 channels"),
    "stride": ({"stride": 16}, "8 pixels a latent", "16 pixels a latent"),
    "encoder": ({"digest": "2" * 64}, "the encoder 111111111111", "the encoder 222222222222"),
    "scale": ({"scale": 0.13025}, "scale 0.18215, shift 0", "scale 0.13025, shift 0"),
    "shift": ({"shift": 0.0609}, "scale 0.18215, shift 0", "scale 0.18215, shift 0.0609"),
    "channels' numbers": (
        {"mean": (0.0,) * 4, "std": (1.0,) * 4},
        "scale 0.18215, shift 0",
        "mean 0, std 1 of channel 0 and others",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_autoencoder_is_refused_naming_both(case):
    changes, ours, theirs = DIFFERENT[case]
    other = dataclasses.replace(SAME, autoencoder="B", **changes)
    with pytest.raises(ValueError) as error:
        check_same_latents(SAME, other, whose="runs/a", other="--vae B", way_out="give A")
    said = str(error.value)
    assert said == (
        f"--vae B: latents of B with {theirs}, but runs/a has latents of mse with {ours}; give A"
    )


def test_a_finetuned_decoder_and_an_encoder_that_is_not_known_are_no_difference():
    for other in (
        dataclasses.replace(SAME, autoencoder="ema"),
        dataclasses.replace(SAME, digest=""),
        dataclasses.replace(SAME, stride=0),
    ):
        assert SAME.difference(other) is None and other.difference(SAME) is None


def test_measured_numbers_that_differ_are_told_by_their_channel():
    other = dataclasses.replace(MEASURED, std=(2.0, 0.5, 1.5000001))
    assert MEASURED.difference(other) == ("std 1.5 of channel 2", "std 1.5000001 of channel 2")


@pytest.mark.parametrize("digest", ["", "1" * 64])
def test_measured_numbers_take_the_place_of_the_autoencoders_own_alone(digest):
    """Without a digest, scale and shift have to tell whose latents they are."""
    sd3 = dataclasses.replace(AUTOENCODERS["sd3"], mean=(0.5,) * 16, std=(2.0,) * 16, digest=digest)
    pair = {
        name: autoencoder_lib.Autoencoder(
            AutoencoderKL(),
            {},
            dataclasses.replace(AUTOENCODERS[name], digest=digest),
            sharding.create_mesh(),
        )
        for name in ("sd3", "flux")
    }
    took = pair["sd3"].for_latents(sd3, whose="runs/a", option="--vae sd3")
    assert took.latents.normalisation == sd3.normalisation
    if not digest:
        with pytest.raises(ValueError, match="--vae flux: .* scale 0.3611, .* scale 1.5305"):
            pair["flux"].for_latents(sd3, whose="runs/a", option="--vae flux")


def test_every_published_autoencoder_has_a_repository():
    assert AUTOENCODERS.keys() == autoencoder_lib.PUBLISHED.keys()
    assert AUTOENCODERS["mse"] == dataclasses.replace(STABLE_DIFFUSION, autoencoder="mse")
