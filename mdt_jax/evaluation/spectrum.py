"""Radially averaged power spectra of images, and the distance of two sets' spectra in decibels.

An image's luminance (Rec. 601) in [0, 1], less its mean, times a Hann window in both directions,
has the power |F|² / Σ window² at each frequency of its Fourier transform: white noise of variance
σ² has power σ² everywhere. Frequencies are averaged over rings: ring r holds those whose length
rounds to r cycles over the shorter side, r = 1 to half of it, the highest that all directions have.
A set's spectrum is the mean over its images.

The distance is the root mean square, over rings, of 10·log₁₀ of the spectra's ratio, with the power
of 8-bit rounding, 1 / (12·255²), added to both, so that an empty ring means "below what 8 bits
hold". The authors of MDT name high-frequency detail as its limit, so the mean of the signed ratio
over the upper half of the rings is given beside it: below zero, samples have too little of it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, UInt8

LUMINANCE = (0.299, 0.587, 0.114)
ROUNDING_POWER = 1 / (12 * 255**2)


class PowerSpectrum:
    """Running mean of the radial power spectra of images of one size."""

    def __init__(self, height: int, width: int):
        """A mean over no images yet, which will be (height, width)."""
        self.count = 0
        self.sums = np.zeros(min(height, width) // 2)
        window = np.outer(_hann(height), _hann(width))
        self._window = (window / np.sqrt((window**2).sum())).astype(np.float32)
        self._rings, self._weights = _rings(height, width)

    def update(self, images: UInt8[np.ndarray, "n h w c"]) -> None:
        """Adds the spectra of images, gray or RGB."""
        for image in images:  # one at a time: a batch of transforms would fill memory
            gray = image[..., 0] if image.shape[-1] == 1 else image @ np.float32(LUMINANCE)
            gray = gray * np.float32(1 / 255)
            transform = np.fft.rfft2((gray - gray.mean()) * self._window)
            power = (transform.real**2 + transform.imag**2).astype(np.float64)
            self.sums += np.bincount(
                self._rings.ravel(), (power * self._weights).ravel(), len(self.sums) + 2
            )[1:-1]
        self.count += len(images)

    def mean(self) -> Float64[np.ndarray, "rings"]:
        """The mean power in each ring, of images in [0, 1].

        Raises:
          ValueError: no images were added.
        """
        if not self.count:
            raise ValueError("a power spectrum needs an image")
        return self.sums / self.count


def decibels(
    samples: Float64[np.ndarray, "rings"], reference: Float64[np.ndarray, "rings"]
) -> Float64[np.ndarray, "rings"]:
    """10·log₁₀ of the samples' power over the reference's in each ring, rounding added to both."""
    return 10 * np.log10((samples + ROUNDING_POWER) / (reference + ROUNDING_POWER))


def distance(
    samples: Float64[np.ndarray, "rings"], reference: Float64[np.ndarray, "rings"]
) -> float:
    """The root mean square of `decibels` over rings."""
    return float(np.sqrt((decibels(samples, reference) ** 2).mean()))


def high_frequencies(
    samples: Float64[np.ndarray, "rings"], reference: Float64[np.ndarray, "rings"]
) -> float:
    """The mean of `decibels` over the upper half of the rings; below 0, samples lack detail."""
    return float(decibels(samples, reference)[len(reference) // 2 :].mean())


def _hann(size: int) -> np.ndarray:
    """The periodic Hann window, shifted by half a pixel so that no pixel gets weight 0."""
    return np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2


def _rings(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The ring of each coefficient of rfft2, and its weight in the ring.

    Ring 0 and the one after the last are for coefficients that are in none. The weights in a ring
    sum to 1; a column that also stands for its mirror image, which rfft2 leaves out, counts double.
    """
    shorter = min(height, width)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    rings = np.rint(np.hypot(rows, columns) * shorter).astype(np.int64)
    rings = np.minimum(rings, shorter // 2 + 1)
    doubled = np.broadcast_to((columns > 0) & (columns < 0.5), rings.shape)
    weights = np.where(doubled, 2.0, 1.0)
    return rings, weights / np.bincount(rings.ravel(), weights.ravel())[rings]
