"""How samples are drawn: a sampler's options and the samples' labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mdt_jax.diffusion import SAMPLERS
from mdt_jax.diffusion.samplers import FEW_STEPS, spaced
from mdt_jax.sampling.model import DiffusionModel

# Under a sample's key, the number of the draw of its label; those of noise count up from 0.
_LABEL = np.uint32(2**32 - 1)
_LABEL_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """What a compiled sampler is specialised to."""

    sampler: str
    steps: int | str
    cfg_scale: float
    cfg_power: float | None
    cfg_interval: tuple[float, float] | None
    guided_channels: int
    eta: float
    clip: bool


def resolve_options(
    model: DiffusionModel,
    cfg_scale: float | None = None,
    cfg_power: float | None | str = "default",
    cfg_interval: Sequence[float | int] | None = None,
    guided_channels: int | None | str = "default",
    sampler: str | None = None,
    steps: int | str | None = None,
    eta: float = 0.0,
    clip: bool | None = None,
) -> SamplerOptions:
    """The caller's settings over the model's own; refuses those that cannot be."""
    given = {"cfg_scale": cfg_scale, "sampler": sampler, "steps": steps, "clip": clip}
    fallback = {"cfg_scale": 1.0, "sampler": "ddpm", "steps": 250, "clip": False} | model.defaults
    if sampler != fallback["sampler"]:  # the model's number of steps is its own sampler's
        fallback["steps"] = FEW_STEPS.get(sampler, fallback["steps"])
    chosen = {k: fallback[k] if v is None else v for k, v in given.items()}
    power = model.defaults.get("cfg_power") if cfg_power == "default" else cfg_power
    channels = (
        model.defaults.get("guided_channels") if guided_channels == "default" else guided_channels
    )
    interval = cfg_interval or model.defaults.get("cfg_interval") or (0.0, 1.0)
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"cfg_interval {tuple(interval)} is not (low, high), 0 <= low < high <= 1")
    if chosen["sampler"] not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sampler {chosen['sampler']!r} is unknown; known: {known}")
    chosen["steps"] = spaced(chosen["sampler"], chosen["steps"])
    model.diffusion.respaced(chosen["steps"])  # refuses steps that the process does not have
    available = model.network.in_channels
    channels = available if channels is None else channels
    if not 1 <= channels <= available:
        raise ValueError(
            f"guided_channels {channels} is outside 1 to {available}; None guides all of them"
        )
    if model.network.num_classes == 0:
        chosen["cfg_scale"] = 1.0
    elif chosen["cfg_scale"] != 1 and not model.network.null_class:
        raise ValueError(f"cfg_scale {chosen['cfg_scale']}: the model has no null class; 1 works")
    return SamplerOptions(
        **{**chosen, "cfg_scale": float(chosen["cfg_scale"])},
        cfg_power=power,
        cfg_interval=None if tuple(interval) == (0, 1) else tuple(map(float, interval)),
        guided_channels=channels,
        eta=eta,
    )


def resolve_labels(
    model: DiffusionModel, labels: Any = None, num_samples: int | None = None
) -> Int[np.ndarray, " n"]:
    """Labels as numbers, repeated or in turn to `num_samples`; zeros if unconditional."""
    given = labels is not None and len(labels) > 0
    classes = resolve_classes(model, labels)
    return np.resize(classes, _count(num_samples, len(classes) if given else 16))


def draw_labels(
    model: DiffusionModel,
    labels: Any = None,
    num_samples: int | None = None,
    key: Array | int | np.integer = 0,
) -> Int[np.ndarray, " n"]:
    """`resolve_labels`, but each is drawn of the classes uniformly, by (key, index) alone."""
    given = labels is not None and len(labels) > 0
    classes = resolve_classes(model, labels)
    count = _count(num_samples, len(classes) if given else 16)
    key = jax.random.key(int(key)) if isinstance(key, (int, np.integer)) else key
    # In blocks of one size, so that it compiles once.
    blocks = range(0, count, _LABEL_BLOCK)
    drawn = [np.asarray(_draw(key, np.int32(first), np.int32(len(classes)))) for first in blocks]
    return classes[np.concatenate(drawn)[:count]]


@jax.jit
def _draw(key: Array, first: Array, num_classes: Array) -> Array:
    """Uniform integers below `num_classes` of the `_LABEL_BLOCK` samples from `first` on."""

    def draw(index: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, index), _LABEL)
        return jax.random.randint(own, (), 0, num_classes)

    return jax.vmap(draw)(first + jnp.arange(_LABEL_BLOCK))


def resolve_classes(model: DiffusionModel, labels: Any = None) -> Int[np.ndarray, " n"]:
    """The classes that labels name, as numbers: all of them without any, 0 if unconditional.

    Raises:
      ValueError: a class that the model does not have.
    """
    count = model.network.num_classes
    if labels is None or not len(labels):
        return np.arange(max(count, 1), dtype=np.int32)
    if count == 0:
        raise ValueError("the model is unconditional; it takes no labels")
    return np.array([model.label(name) for name in np.asarray(labels).tolist()], np.int32)


def _count(num_samples: int | None, default: int) -> int:
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples {num_samples} is below 1")
    return num_samples or default
