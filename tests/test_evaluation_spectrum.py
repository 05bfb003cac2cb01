"""Radial power spectra: known power at known frequencies, and what the distance tells."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mdt_jax.evaluation import spectrum


def power_of(images):
    found = spectrum.PowerSpectrum(*images.shape[1:3])
    found.update(images)
    return found.mean()


def noise(count=100, shape=(32, 48, 1), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(128, 25, (count, *shape)).clip(0, 255).astype(np.uint8)


def test_white_noise_has_its_variance_at_every_frequency():
    # The lowest ring loses some of it with the mean.
    np.testing.assert_allclose(power_of(noise())[1:] * 255**2, 25**2, rtol=0.1)


def test_a_wave_has_its_power_in_its_ring():
    x = np.arange(64)
    wave = 128 + 100 * np.sin(2 * np.pi * 9 * x / 64)
    images = np.broadcast_to(wave, (64, 64))[None, ..., None].astype(np.uint8)
    for image in (images, images.transpose(0, 2, 1, 3)):
        assert power_of(image).argmax() + 1 == 9


def test_colours_weigh_as_luminance():
    gray = noise(4)
    np.testing.assert_allclose(power_of(gray.repeat(3, axis=3)), power_of(gray), rtol=1e-4)


def test_batches_do_not_matter():
    images = noise(10)
    one = spectrum.PowerSpectrum(32, 48)
    for image in images:
        one.update(image[None])
    np.testing.assert_allclose(one.mean(), power_of(images), rtol=1e-12)


def test_blurred_images_lack_high_frequencies():
    sharp = noise(20, (32, 32, 1))
    pictures = [Image.fromarray(image[..., 0]) for image in sharp]
    blurred = [np.asarray(p.filter(ImageFilter.GaussianBlur(1)))[..., None] for p in pictures]
    reference, samples = power_of(sharp), power_of(np.stack(blurred))
    assert spectrum.high_frequencies(samples, reference) < -10
    assert spectrum.high_frequencies(reference, samples) > 10
    assert spectrum.distance(samples, reference) > 10
    assert spectrum.distance(reference, reference) == 0


def test_twice_the_power_is_three_decibels():
    power = np.full(8, 1.0)
    assert spectrum.distance(2 * power, power) == pytest.approx(10 * np.log10(2), rel=1e-4)


def test_images_of_one_colour_have_a_finite_distance():
    flat = power_of(np.full((2, 16, 16, 3), 7, np.uint8))
    assert np.isfinite(spectrum.distance(flat, power_of(noise(4, (16, 16, 3)))))


def test_no_image_has_no_spectrum():
    with pytest.raises(ValueError, match="needs an image"):
        spectrum.PowerSpectrum(8, 8).mean()
