"""Fine-tuning: the parameters that a run starts with when `config.init_from` names weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mdt_jax.convert.adapt import adapt
from mdt_jax.models import LatentTransformer
from mdt_jax.models.latent_space import LatentSpace, check_same_latents
from mdt_jax.weights import descriptions, pretrained


def initial_parameters(
    config: ConfigDict,
    model: LatentTransformer,
    create_parameters: Callable[[], Any],
    latents: LatentSpace | None = None,
) -> tuple[Any, LatentSpace | None]:
    """The parameters of `config.init_from`, fitted to a model; logs how each was fitted.

    Args:
      config: the run's settings.
      model: the run's network, of the source's family and width; classes, resolution and an MDT
        v1's decoder depth may differ.
      create_parameters: initialises all parameters of the model, some of which replace those that
        do not fit. It runs on all processes or on none.
      latents: the latents that are to be trained on; None for pixels.

    Returns:
      A tree of NumPy arrays in the source's dtypes, and the latents that they were trained on; None
      if these are not known, or pixels.

    Raises:
      WeightsError, UnknownWeights, CheckpointError: the source cannot be read.
      ValueError: the source does not fit the model; the message names the setting.
    """
    ours = descriptions.architecture_of(model)
    found = pretrained.read_pretrained(config.init_from, **ours.hints())
    if found.latents and latents:
        check_same_latents(
            found.latents,
            latents,
            whose=f"init_from {found.source}",
            other=f"data.path {config.data.path}",
            way_out="give latents of that autoencoder, or other weights",
        )
    created = functools.cache(create_parameters)

    def fresh(path: str) -> np.ndarray:
        return _whole(functools.reduce(lambda tree, key: tree[key], path.split("/"), created()))

    arrays = jax.tree.map(np.asarray, found.params)
    if (name := pretrained.first_not_finite(arrays)) is not None:
        raise ValueError(
            f"init_from {found.source}: {name} holds NaN or infinite values; give other weights"
        )
    params, report = adapt(arrays, found.architecture, ours, fresh)
    logging.info("starting from %s (%s):\n%s", found.source, found.architecture.name, report)
    for key in ("schedule", "prediction"):
        known, wanted = found.config.diffusion[key], config.diffusion[key]
        if known != wanted:
            logging.warning("diffusion.%s is %s; the weights know %s", key, wanted, known)
    return params, found.latents


def _whole(array: jax.Array) -> np.ndarray:
    """A whole array on the host, whichever processes hold its shards."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
