"""Requests: what a page's controls ask for, read from any values into what the engine takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from mdt_jax.basics import ranges
from mdt_jax.demo import limits as read
from mdt_jax.demo.limits import Limits
from mdt_jax.diffusion.options import SamplerOptions
from mdt_jax.diffusion.samplers import SAMPLERS, SINGLE_STEP
from mdt_jax.sampling import resolve_labels, resolve_options
from mdt_jax.sampling.model import DiffusionModel
from mdt_jax.weights.autoencoder import Autoencoder

ALL_CLASSES = -1  # the choice of each class in turn
HIDDEN_TIMES = (0.05, 0.95)  # the noise of a picture of which tokens are hidden, in parts of T


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a request is read for.

    Attributes:
      model: the model.
      autoencoder: decodes its latents; None for a model of pixels.
      limits: of every request.
      data_pictures: pictures of the model's own data, uint8, and their classes; empty if there are
        none at hand.
    """

    model: DiffusionModel
    autoencoder: Autoencoder | None
    limits: Limits
    data_pictures: tuple[tuple[UInt8[np.ndarray, "h w c"], int], ...] = ()

    @property
    def side(self) -> int:
        """Height and width of the model's pictures."""
        factor = self.autoencoder.module.downsampling if self.autoencoder else 1
        return self.model.network.input_size * factor

    @property
    def channels(self) -> int:
        """1 for grey pictures, 3 for RGB."""
        network = self.model.network
        return self.autoencoder.module.in_channels if self.autoencoder else network.in_channels


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """New pictures: a class for each, the sampler's options, and the seed of their noise."""

    labels: Int[np.ndarray, " n"]
    options: SamplerOptions
    seed: int


@dataclasses.dataclass(frozen=True)
class PaintRequest:
    """Parts of a picture to be painted anew.

    Attributes:
      image: uint8, of the model's size.
      mask: True where it is to be painted.
      labels: the class of every painting; empty for none.
      count: how many paintings.
      settings: `inpainting.prepare_task`'s other keywords.
      seed: of the noise.
    """

    image: UInt8[np.ndarray, "h w c"]
    mask: Bool[np.ndarray, "h w"]
    labels: tuple[int, ...]
    count: int
    settings: dict[str, Any]
    seed: int


@dataclasses.dataclass(frozen=True)
class HiddenRequest:
    """A picture of which tokens are hidden.

    Attributes:
      image: uint8, of the model's size.
      label: its class, num_classes for none.
      kept: how many tokens the encoder sees.
      timestep: the noise that is added, a timestep of the training process.
      seed: of the noise, and of which tokens are kept.
    """

    image: UInt8[np.ndarray, "h w c"]
    label: int
    kept: int
    timestep: int
    seed: int


def kept_tokens(num_tokens: int, share: float) -> int:
    """How many of N tokens a share of them keeps, at least one: int(N · share), as MDT counts."""
    return max(1, int(num_tokens * share))


def sample_request(
    around: Surroundings,
    label: Any,
    count: Any,
    sampler: Any,
    steps: Any,
    scale: Any,
    power: Any,
    low: Any,
    high: Any,
    seed: Any,
) -> SampleRequest:
    """New pictures, from the values of the page's first tab.

    Args:
      around: what it is read for.
      label: the class, or `ALL_CLASSES`.
      count: how many pictures.
      sampler, steps: how they are drawn.
      scale, power: of the guidance; power 0 is a constant scale.
      low, high: the guided part of the process.
      seed: of the noise.

    Raises:
      ValueError: a value that is out of its range; one line.
    """
    count = read.whole("number of pictures", count, 1, around.limits.pictures)
    options = _options(around, SAMPLERS, sampler, steps, scale)
    options["cfg_power"] = read.number("power of the guidance", power, 0, 100) or None
    interval = [read.number(f"guided {end}", at, 0, 1) for end, at in (("from", low), ("to", high))]
    if interval[0] >= interval[1]:
        raise ValueError(f"guided from {low:g} to {high:g} is no part of the process")
    options["cfg_interval"] = tuple(interval)
    labels = _labels(around, label, none_is_a_class=False)
    return SampleRequest(
        resolve_labels(around.model, list(labels) or None, count),
        resolve_options(around.model, **options),
        _seed(seed),
    )


def paint_request(
    around: Surroundings,
    picture: Any,
    mask: Any,
    label: Any,
    count: Any,
    sampler: Any,
    steps: Any,
    scale: Any,
    resamples: Any,
    masked_share: Any,
    seed: Any,
) -> PaintRequest:
    """Parts of a picture to be painted anew, from the values of the second tab.

    Args:
      around: what it is read for.
      picture, mask: as `limits.picture` and `limits.mask` read them.
      label: the class, or `ALL_CLASSES` for none.
      count: how many paintings.
      sampler, steps, scale: how they are drawn.
      resamples, masked_share: as `mdt_jax.inpaint` has them.
      seed: of the noise.

    Raises:
      ValueError: a value that is out of its range, no picture, or an empty mask; one line.
    """
    count = read.whole("number of pictures", count, 1, around.limits.pictures)
    labels = _labels(around, label, none_is_a_class=True)
    options = _options(around, tuple(SINGLE_STEP), sampler, steps, scale)
    if not labels:
        options["cfg_scale"] = 1.0
    resolve_options(around.model, **options)
    settings = options | {
        "resamples": read.whole("resamples", resamples, 1, around.limits.resamples),
        "masked_share": read.number("share of masked passes", masked_share, 0, 1),
    }
    if not around.model.network.supports_masking and settings["masked_share"]:
        raise ValueError(f"{around.model.name} has no masked pass; a share of 0 works")
    return PaintRequest(
        read.picture(picture, around.limits, around.side, around.channels),
        read.mask(mask, around.side),
        labels,
        count,
        settings,
        _seed(seed),
    )


def hidden_request(
    around: Surroundings,
    picture: Any,
    of_the_data: Any,
    label: Any,
    share: Any,
    time: Any,
    seed: Any,
) -> HiddenRequest:
    """A picture of which tokens are hidden, from the values of the third tab.

    Args:
      around: what it is read for.
      picture: as `limits.picture` reads it; unused where `of_the_data` names one.
      of_the_data: the index of one of the data's pictures, -1 for `picture`.
      label: the class, or `ALL_CLASSES` for the picture's own, or none.
      share: the share of the tokens that are kept.
      time: the noise, as a part of the process.
      seed: of the noise, and of which tokens are kept.

    Raises:
      ValueError: a value that is out of its range, or no picture; one line.
    """
    network = around.model.network
    if not network.supports_masking:
        raise ValueError(f"{around.model.name} has no masked pass, so it hides no tokens")
    labels = _labels(around, label, none_is_a_class=True)
    index = read.whole("picture of the data", of_the_data, -1, len(around.data_pictures) - 1)
    if index >= 0:
        image, own = around.data_pictures[index]
        labels = labels or (own,)
    else:
        image = read.picture(picture, around.limits, around.side, around.channels)
    steps = around.model.diffusion.num_steps
    time = read.number("noise", time, *HIDDEN_TIMES)
    share = read.number("share of kept tokens", share, 0.01, 0.99)
    no_class = network.num_classes
    return HiddenRequest(
        image,
        labels[0] if labels and no_class else no_class,
        kept_tokens(network.num_tokens, share),
        min(int(time * steps), steps - 1),
        _seed(seed),
    )


def _labels(around: Surroundings, label: Any, none_is_a_class: bool) -> tuple[int, ...]:
    """The chosen class, none where each in turn or no class was chosen."""
    network = around.model.network
    if network.num_classes == 0:
        return ()
    chosen = read.whole("class", label, ALL_CLASSES, network.num_classes - 1)
    if chosen == ALL_CLASSES and none_is_a_class and not network.null_class:
        raise ValueError(f"choose a class: {around.model.name} was trained without a null class")
    return () if chosen == ALL_CLASSES else (chosen,)


def _options(
    around: Surroundings,
    samplers: tuple[str, ...],
    sampler: Any,
    steps: Any,
    scale: Any,
) -> dict[str, Any]:
    """The sampler's options among a request's values."""
    total = min(around.limits.steps, around.model.diffusion.num_steps)
    scales = ranges.range_of("--cfg_scale")
    options = {
        "sampler": read.text("sampler", sampler, samplers),
        "steps": read.whole("steps", steps, 1, total),
        "cfg_scale": read.number("guidance scale", scale, scales.low, scales.high),
    }
    network = around.model.network
    if not (network.num_classes and network.null_class):
        options["cfg_scale"] = 1.0  # there is nothing to guide by, and no control of it
    return options


def _seed(value: Any) -> int:
    return read.whole("seed", value, 0, read.MOST_SEED)
