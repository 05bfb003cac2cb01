"""New samples of the flags' classes: drawn batch by batch into parts, then joined."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from mdt_jax import sampling
from mdt_jax.parallel.distributed import by_first_process
from mdt_jax.sample.flags import given_options, output_files
from mdt_jax.sample.settings import decoder_digest, sample_settings, weights_digest
from mdt_jax.sampling import images
from mdt_jax.sampling.parts import Parts
from mdt_jax.weights.autoencoder import Autoencoder

GRID_IMAGES = 100  # the first samples, which the grid shows


def draw_samples(
    f: flags.FlagValues,
    model: sampling.DiffusionModel,
    params: Any,
    autoencoder: Autoencoder | None,
    mesh: jax.sharding.Mesh,
) -> list[Path]:
    """Samples the flags' classes, decodes them if there is an autoencoder, and writes them."""
    options = sampling.resolve_options(model, **given_options(f))
    labels = chosen_labels(f, model)
    batch_size = sampling.resolve_batch_size(f.batch_size, model, params, mesh, options)
    size = sampling.global_batch_size(batch_size, len(labels), mesh)
    shape = model.network.image_shape
    if autoencoder:
        factor, channels = autoencoder.module.downsampling, autoencoder.module.out_channels
        shape = (shape[0] * factor, shape[1] * factor, channels)
    pixels = shape[-1] in (1, 3)
    digests = by_first_process(lambda: [weights_digest(f, model), decoder_digest(autoencoder)])
    settings = sample_settings(f, model, options, size, *digests)
    npz, png = output_files(f.output)
    parts = Parts(
        f"{npz.with_suffix('')}.parts", settings, shape, np.dtype("u1" if pixels else "<f4")
    )
    written = [npz, png] if pixels else [npz]

    def begin() -> list[int] | None:
        if all(path.exists() for path in written) and parts.is_joined(npz, len(labels)):
            logging.warning("%s holds these samples already; remove it to make them again", npz)
            return None
        return parts.begin(len(labels))

    with parts.held():
        done = by_first_process(begin)
        if done is not None:
            sampler = sampling.compile_sampler(model, mesh, size, options)
            draw_missing_parts(f, sampler, params, autoencoder, labels, parts, set(done))
            about = vars(options) | {"seed": f.seed, "ema_rate": f.ema_rate, "vae": f.vae}
            about = {"model": model.name, "step": model.step, "label_order": f.label_order} | about
            by_first_process(lambda: join_samples(parts, labels, written, about))
        if not f.keep_parts:
            by_first_process(parts.remove)
    return written if jax.process_index() == 0 else []


def draw_missing_parts(
    f: flags.FlagValues,
    sampler: sampling.CompiledSampler,
    params: Any,
    autoencoder: Autoencoder | None,
    labels: np.ndarray,
    parts: Parts,
    done: set[int],
) -> None:
    """Draws and decodes the batches that are not done, and writes each as a part.

    Args:
      f: the flags.
      sampler: for the batches.
      params: the network's.
      autoencoder: decodes the samples; None if they are written as they are.
      labels: the class of every sample.
      parts: where the batches are written.
      done: first indices of the batches that are there.
    """
    batches = sampling.in_batches(
        sampler,
        params,
        len(labels),
        lambda rows: (labels[rows],),
        key=f.seed,
        progress=True,
        done=done,
    )
    for first, samples in batches:
        sampling.check_samples(samples, first, params)
        if autoencoder:
            size = sampler.shape[0]
            samples = autoencoder.decode_batch(samples, size, f.vae_batch_size, f.vae_tile_size)
        rows = images.to_uint8(samples, first) if parts.dtype == np.uint8 else samples
        by_first_process(functools.partial(parts.write, first, rows))


def join_samples(
    parts: Parts, labels: np.ndarray, written: list[Path], about: dict[str, Any]
) -> None:
    """Writes a grid of the first samples if they are images, then joins the parts into an .npz.

    Labels are in the grid's metadata, and in the .npz's if the grid shows all of its samples.

    Args:
      parts: the samples.
      labels: their classes.
      written: the .npz and, for images, the .png.
      about: settings for the metadata.
    """
    npz, *grids = written
    shown = labels[:GRID_IMAGES].tolist()
    for png in grids:
        grid = images.image_grid(parts.first_samples(len(shown)))
        with parts.explained():
            images.save_png(png, grid, images.provenance(labels=shown, **about))
    said = images.provenance(labels=shown if len(shown) == len(labels) else None, **about)
    parts.join(npz, labels, {"metadata": said})


def chosen_labels(f: flags.FlagValues, model: sampling.DiffusionModel) -> np.ndarray:
    """The class of every sample, in turn or drawn; sample i's does not depend on how many."""
    if f.label_order == "random":
        return sampling.draw_labels(model, f.labels or None, f.num_samples, key=f.seed)
    return sampling.resolve_labels(model, f.labels or None, f.num_samples)
