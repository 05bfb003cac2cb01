"""What the page's controls offer and begin with, and the requests that they make as they stand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mdt_jax.demo.requests import (
    ALL_CLASSES,
    HiddenRequest,
    PaintRequest,
    Surroundings,
    kept_tokens,
    sample_request,
)
from mdt_jax.diffusion.samplers import FEW_STEPS, SINGLE_STEP
from mdt_jax.sampling import resolve_options

COUNTS = (1, 4, 16)  # of pictures
PAINTINGS = (1, 4)
SHARES = (0.25, 0.5, 0.75)  # of the tokens, which are kept
SCALES = (1.0, 10.0)  # of guidance


@dataclasses.dataclass(frozen=True)
class Start:
    """A model's own way of sampling, as the controls show it.

    Attributes:
      sampler: its name.
      scale, power, low, high: of the guidance; power 0 is a constant scale.
    """

    sampler: str
    scale: float
    power: float
    low: float
    high: float

    @classmethod
    def of(cls, around: Surroundings) -> Start:
        """The controls' beginning for a model."""
        own = resolve_options(around.model)
        low, high = own.cfg_interval or (0.0, 1.0)
        scale = min(max(own.cfg_scale, SCALES[0]), SCALES[1])
        return cls(own.sampler, scale, own.cfg_power or 0.0, low, high)

    @property
    def painter(self) -> str:
        """The sampler of inpainting: the same if it can."""
        return self.sampler if self.sampler in SINGLE_STEP else next(iter(SINGLE_STEP))


def default_steps(around: Surroundings, sampler: Any) -> int:
    """The usual number of steps of a sampler for a model, within the limits."""
    own = resolve_options(around.model)
    usual = around.model.diffusion.respaced(own.steps).num_steps
    if sampler != own.sampler and isinstance(sampler, str):
        usual = FEW_STEPS.get(sampler, usual)
    return min(usual, around.limits.steps, around.model.diffusion.num_steps)


def first_requests(around: Surroundings) -> list[Any]:
    """The requests of the controls as they stand, one for each program that those need."""
    start, network = Start.of(around), around.model.network
    steps = default_steps(around, start.sampler)
    guidance = (start.scale, start.power, start.low, start.high)
    found: list[Any] = [
        sample_request(around, ALL_CLASSES, count, start.sampler, steps, *guidance, 0)
        for count in COUNTS
        if count <= around.limits.pictures
    ]
    if around.channels not in (1, 3):
        return found
    image = np.zeros((around.side, around.side, around.channels), np.uint8)
    mask = np.arange(around.side) >= around.side // 2
    label = (0,) if network.num_classes else ()
    settings = {
        "sampler": start.painter,
        "steps": default_steps(around, start.painter),
        "cfg_scale": start.scale if label and network.null_class else 1.0,
        "resamples": 4,
        "masked_share": 0.0,
    }
    found += [
        PaintRequest(image, np.tile(mask, (around.side, 1)), label, count, settings, 0)
        for count in PAINTINGS
        if count <= around.limits.pictures
    ]
    if network.supports_masking:
        kept = {kept_tokens(network.num_tokens, share) for share in SHARES}
        middle = around.model.diffusion.num_steps // 2
        found += [HiddenRequest(image, 0, n, middle, 0) for n in sorted(kept)]
    return found
