"""The settings and weights that samples' bits depend on, which are kept beside them on disk."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from mdt_jax import checkpoints, sampling
from mdt_jax import config as config_lib
from mdt_jax.basics.places import open_file
from mdt_jax.weights import descriptions, hub_folder
from mdt_jax.weights.autoencoder import Autoencoder


def sample_settings(
    f: flags.FlagValues,
    model: sampling.DiffusionModel,
    options: sampling.SamplerOptions,
    batch_size: int,
    weights: str,
    decoder: str | None,
) -> dict[str, Any]:
    """All that a sample's bits depend on except the machine, under the flags' names.

    Args:
      f: the flags.
      model: the model.
      options: the sampler's options, as they are used.
      batch_size: samples at a time.
      weights: from `weights_digest`.
      decoder: from `decoder_digest`.
    """
    ema_rate, source = f.ema_rate, f.workdir or f.checkpoint
    if ema_rate is None and not hub_folder.is_one_set(source):
        _, meta = checkpoints.read_meta(source, model.step)
        ema_rate = config_lib.from_json(meta["config"]).ema_rates[0]
    network = model.network
    return {
        "model": model.name,
        "step": model.step,
        "ema_rate": ema_rate,
        "seed": f.seed,
        "label_order": f.label_order,
        "labels": sampling.class_numbers(model, f.labels or None).tolist(),
        **vars(options),
        "steps": str(options.steps),
        "batch_size": batch_size,
        "vae": decoder,
        "vae_batch_size": f.vae_batch_size if decoder else None,
        "vae_tile_size": f.vae_tile_size if decoder else None,
        "dtype": np.dtype(network.dtype).name,
        **dataclasses.asdict(descriptions.architecture_of(network)),
        "weights": weights,
    }


def weights_digest(f: flags.FlagValues, model: sampling.DiffusionModel) -> str:
    """BLAKE2b of the file of weights, or of the seal of a run's checkpoint, which holds digests."""
    source = f.workdir or f.checkpoint
    if hub_folder.is_one_set(source):
        path = hub_folder.weights_of(source)
    else:
        path = Path(source) / "checkpoints" / str(model.step) / "manifest.json"
    with open_file(path) as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def decoder_digest(autoencoder: Autoencoder | None) -> str | None:
    """BLAKE2b of an autoencoder's weights and scale, None without one."""
    if autoencoder is None:
        return None
    space = autoencoder.latents
    numbers = f"{space.mean} {space.std}" if space.mean else f"{space.scale} {space.shift}"
    digest = hashlib.blake2b(numbers.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(autoencoder.params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:32]
