"""How samples are drawn: a sampler's options and the samples' labels."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from mdt_jax.basics import ranges
from mdt_jax.diffusion import SAMPLERS
from mdt_jax.diffusion.options import SAMPLER_OPTIONS, SamplerOptions
from mdt_jax.diffusion.samplers import FEW_STEPS, spaced
from mdt_jax.diffusion.seeds import key_of
from mdt_jax.sampling.model import DiffusionModel

# The number, under a sample's key, of the draw of its label. Draws of noise count up from 0.
_LABEL = np.uint32(2**32 - 1)
_LABEL_BLOCK = 1024


def check_options(function: Callable, options: Iterable[str]) -> None:
    """Refuses keywords that are no options of a sampler, naming the nearest argument.

    Args:
      function: the function that was called with them, for the names of its other arguments.
      options: the keywords.

    Raises:
      TypeError: one that is unknown.
    """
    unknown = [name for name in options if name not in SAMPLER_OPTIONS]
    if not unknown:
        return
    known = [*inspect.signature(function).parameters, *SAMPLER_OPTIONS]
    near = difflib.get_close_matches(unknown[0], known, n=1)
    hint = f"the nearest is {near[0]!r}" if near else f"options are {', '.join(SAMPLER_OPTIONS)}"
    raise TypeError(f"{function.__name__}() has no argument {unknown[0]!r}; {hint}")


def resolve_options(model: DiffusionModel, **options: Any) -> SamplerOptions:
    """The caller's options over the model's own; refuses those that cannot be.

    Args:
      model: the model; its `defaults` hold where the caller gives nothing.
      **options: fields of `SamplerOptions`. None means a constant scale as cfg_power, and all
        channels as guided_channels. Any other option that is None counts as not given.

    Raises:
      TypeError: an unknown option.
      ValueError: a value that the model or the process does not have.
    """
    check_options(resolve_options, options)
    given = {
        name: value
        for name, value in options.items()
        if value is not None or SAMPLER_OPTIONS[name].none
    }
    own = vars(SamplerOptions()) | model.defaults
    chosen = own | {name: _plain(name, value) for name, value in given.items()}
    if not isinstance(chosen["sampler"], str) or chosen["sampler"] not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sampler {chosen['sampler']!r} is unknown; known: {known}")
    if "steps" not in given and chosen["sampler"] != own["sampler"]:
        # The model's number of steps is its own sampler's.
        chosen["steps"] = FEW_STEPS.get(chosen["sampler"], own["steps"])
    interval = (0.0, 1.0) if chosen["cfg_interval"] in (None, ()) else chosen["cfg_interval"]
    if ranges.range_of("sample.cfg_interval").fault(interval):
        raise ValueError(f"cfg_interval {interval} is not (low, high), 0 <= low < high <= 1")
    for name, value in chosen.items():
        if is_number(name):
            ranges.check(f"sample.{name}", value, name)
    chosen["cfg_interval"] = None if tuple(interval) == (0, 1) else tuple(map(float, interval))
    if not isinstance(chosen["clip"], bool):
        raise ValueError(f"clip {chosen['clip']!r} is neither True nor False; it takes one of them")
    chosen["steps"] = spaced(chosen["sampler"], chosen["steps"])
    try:  # which refuses steps that the process does not have
        model.diffusion.respaced(chosen["steps"])
    except ValueError as error:
        total = model.diffusion.num_steps
        raise ValueError(f"steps {chosen['steps']}: {error}; num_timesteps is {total}") from None
    available = model.network.in_channels
    if chosen["guided_channels"] is None:
        chosen["guided_channels"] = available
    if not 1 <= chosen["guided_channels"] <= available:
        raise ValueError(
            f"guided_channels {chosen['guided_channels']} is outside 1 to {available}; None guides "
            f"all of them (in_channels is {available})"
        )
    if model.network.num_classes == 0:
        chosen["cfg_scale"] = 1.0
    elif chosen["cfg_scale"] != 1 and not model.network.null_class:
        raise ValueError(
            f"cfg_scale {chosen['cfg_scale']}: the model has no null class (label_dropout was 0); "
            "1 works"
        )
    chosen["cfg_scale"] = float(chosen["cfg_scale"])
    return SamplerOptions(**chosen)


def _plain(name: str, value: Any) -> Any:
    """An option's value as Python has it: arrays as tuples, and their scalars as numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if name == "cfg_interval" and isinstance(value, list) else value


def is_number(option: str) -> bool:
    """Whether an option of the samplers takes numbers."""
    return SAMPLER_OPTIONS[option].kind in (int, int | str, float, tuple)


def judging_options(config: ConfigDict) -> dict[str, Any]:
    """The options that a run's samples are judged with, where `config.eval` gives them."""
    return {name: config.eval[name] for name in SAMPLER_OPTIONS if config.eval[name] is not None}


def resolve_labels(
    model: DiffusionModel, labels: Any = None, num_samples: int | None = None
) -> Int[np.ndarray, " n"]:
    """Labels as numbers, repeated or in turn to `num_samples`; zeros if unconditional."""
    given = given_labels(labels)  # once: an iterator is empty after that
    classes = class_numbers(model, given)
    return np.resize(classes, _count(num_samples, len(given) or 16))


def draw_labels(
    model: DiffusionModel,
    labels: Any = None,
    num_samples: int | None = None,
    key: Any = 0,
) -> Int[np.ndarray, " n"]:
    """Labels drawn uniformly from the classes given, each by (key, index of the sample) alone.

    Arguments as for `resolve_labels`, and the key.
    """
    given = given_labels(labels)
    classes = class_numbers(model, given)
    count = _count(num_samples, len(given) or 16)
    key = key_of(key)
    # In blocks of one size, so that it compiles once.
    blocks = range(0, count, _LABEL_BLOCK)
    drawn = [np.asarray(_draw(key, np.int32(first), np.int32(len(classes)))) for first in blocks]
    return classes[np.concatenate(drawn)[:count]]


@jax.jit
def _draw(key: Array, first: Array, num_classes: Array) -> Array:
    """Integers uniform below `num_classes`, for the `_LABEL_BLOCK` samples from `first` on."""

    def draw(index: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, index), _LABEL)
        return jax.random.randint(own, (), 0, num_classes)

    return jax.vmap(draw)(first + jnp.arange(_LABEL_BLOCK))


def class_numbers(model: DiffusionModel, labels: Any = None) -> Int[np.ndarray, " n"]:
    """The classes that labels name, as numbers: all of them without any, 0 if unconditional.

    Raises:
      ValueError: a class that the model does not have, or no list of classes.
    """
    count, given = model.network.num_classes, given_labels(labels)
    if not given:
        return np.arange(max(count, 1), dtype=np.int32)
    if count == 0:
        raise ValueError("the model is unconditional; it takes no labels")
    return np.array([model.label(name) for name in given], np.int32)


def given_labels(labels: Any) -> list[Any]:
    """Labels as a list, as they were given; empty where there are none.

    Raises:
      ValueError: something else than a flat list of them.
    """
    if labels is None:
        return []
    if hasattr(labels, "tolist"):  # an array of NumPy's or JAX's
        labels = labels.tolist()
    if isinstance(labels, (Set, Mapping)):
        raise ValueError(f"labels {labels!r} have no order; give a list, a class for each sample")
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
        raise ValueError(f"labels {labels!r} is one label; give a list of them, [{labels!r}]")
    given = list(labels)
    for label in given:
        if isinstance(label, (list, tuple, dict, set)) or np.ndim(label):
            raise ValueError(f"labels hold {label}; give a flat list, a class for each sample")
    return given


def _count(num_samples: int | None, default: int) -> int:
    ranges.check_arguments({"num_samples": num_samples})
    return default if num_samples is None else num_samples
