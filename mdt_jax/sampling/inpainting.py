"""Inpainting: `inpaint` paints the unknown pixels of images so that they fit the known ones.

It needs no training of its own. At every reverse step the known pixels are the given ones, noised
to the step's level, so that the model paints the others to go with them; at the end the known
pixels are copied back. The known pixels' noise is drawn independently of what has been painted. So
each step is taken several times, from noise added anew, until the two agree (`resamples`; RePaint,
Lugmayr et al. 2022): on the digits, 16 steps taken 4 times err less than 64 steps taken once (0.60
against 0.67; the unit is below). The last step leads to x₀, which has no noise to add anew, and is
taken once.

**Masked passes.** MDT's side-interpolator, kept at inference, predicts hidden tokens from others.
Here a masked pass hides every token that has an unknown pixel, so that the encoder sees known
tokens alone. Its use depends on the family (`inpainting_masked_share`):

- MDTv2's decoder is fed all noisy tokens, so a masked pass is a denoiser with a shorter encoder. On
  a small model of the digits its x̂0 at the hidden half of the tokens errs as much as the full
  pass's at high noise, and up to 3% more below (t = 800: 0.954 and 0.947; t = 400: 0.636 and
  0.620). Paintings made with masked passes throughout err 2 to 4% more than with full passes. With
  masked passes for the noisier half of the steps they err the same (0.590 and 0.590), so that half
  is the default.
- MDT v1 drops hidden tokens before the encoder, and nothing after it sees their noise, which the
  model is to predict: the masked pass cannot denoise them at any noise level. Its x̂0 errs 7.4,
  where the full pass's errs 1.1, at t = 800, 1.8 and 0.7 at t = 400, 0.22 and 0.16 at t = 50. The
  default is full passes.
- DiT has no masked pass.

Training hides 30 to 50% of the tokens. At 75% hidden, MDTv2's masked pass still erred 3% more than
the full one, as at 50%. If a mask touches every token, all passes are full. (An error is the RMSE
at the unknown pixels of held-out scans, over the RMSE of the mean of the class's training scans
there; for paintings, the error of the mean of 8. tests/test_inpainting.py has the model.)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from mdt_jax import sampling
from mdt_jax.basics import ranges
from mdt_jax.basics.places import refuse_url
from mdt_jax.data.decoding import decode_image
from mdt_jax.diffusion.samplers import SINGLE_STEP
from mdt_jax.models import LatentTransformer
from mdt_jax.parallel import sharding
from mdt_jax.sampling.options import given_labels
from mdt_jax.sampling.sampler import chunks

# The uses of noise, each keyed by its number: the first state, a reverse step, the known pixels,
# going back a step.
START, STEP, KNOWN, BACK = range(4)


def inpaint(
    model: sampling.DiffusionModel,
    params: dict[str, Any],
    images: np.ndarray | Array,
    mask: np.ndarray | Array,
    *,
    labels: Any = None,
    num_samples: int | None = None,
    key: Any = 0,
    resamples: int = 4,
    masked_share: float | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    **options: Any,
) -> Float[np.ndarray, "n h w c"]:
    """Paints the unknown pixels of images; known pixels come back bit for bit.

    Args:
      model, params: from `sampling.load`, or a model of your own and its parameters.
      images: (h, w, c) or (n, h, w, c) in the model's own range: pixels in [−1, 1], or latents.
        Unknown pixels are not read, and may hold anything.
      mask: (h, w), True where a pixel is unknown; the same for every image.
      labels: one class for each image, or one for all, by number or name. None leaves a
        class-conditional model without one: its null class, unguided.
      num_samples: how many results; images and labels are taken in turn to that many, so that
        n·m results are m paintings of each of n images. By default one for each image or label.
      key: PRNG key or seed; sample i's noise depends on it and i alone.
      resamples: how often each step but the last is taken, from noise added anew; the time is in
        proportion.
      masked_share: the share of the steps, the noisiest ones, that are masked passes; by default
        `inpainting_masked_share`. It is 0 where the model or the mask allows none.
      batch_size, mesh, progress: `sampling.sample`'s.
      **options: how the sampler draws, fields of `SamplerOptions`, as `sampling.sample` has them.

    Raises:
      TypeError: an unknown option.
      ValueError: images, a mask, labels or settings that do not fit the model or each other.
    """
    sampling.check_options(inpaint, options)
    task = prepare_task(
        model,
        images,
        mask,
        labels=labels,
        num_samples=num_samples,
        resamples=resamples,
        masked_share=masked_share,
        **options,
    )
    return paint_task(
        model, params, task, key=key, batch_size=batch_size, mesh=mesh, progress=progress
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The arguments of `inpaint`, checked and complete.

    Attributes:
      images: (n, h, w, c) float32, 0 at unknown pixels.
      mask: (h, w), True where a pixel is unknown.
      labels: class of each result, num_classes for none; there are as many as results.
      options: the sampler's options, as they will be used.
      resamples: how often each step but the last is taken.
      masked_share: the share of the steps that are masked passes.
      ids_keep: ids of the tokens that a masked pass sees.
    """

    images: Float[np.ndarray, "n h w c"]
    mask: Bool[np.ndarray, "h w"]
    labels: Int[np.ndarray, " count"]
    options: sampling.SamplerOptions
    resamples: int
    masked_share: float
    ids_keep: Int[np.ndarray, " kept"]


def prepare_task(
    model: sampling.DiffusionModel,
    images: np.ndarray | Array,
    mask: np.ndarray | Array,
    *,
    labels: Any = None,
    num_samples: int | None = None,
    resamples: int = 4,
    masked_share: float | None = None,
    **options: Any,
) -> Task:
    """The task that `inpaint`'s arguments describe.

    Raises:
      ValueError: images, a mask, labels or settings that do not fit the model or each other.
    """
    ranges.check("--resamples", resamples, "resamples")
    ranges.check_arguments({"masked_share": masked_share, "num_samples": num_samples})
    mask = check_mask(model.network, mask)
    images = check_images(model.network, images, mask)
    given = options.get("cfg_scale")
    labels = _resolve_labels(model, labels, len(images), num_samples, given)
    if (labels == model.network.num_classes).all():  # also if unconditional
        options["cfg_scale"] = 1.0
    share = model.network.inpainting_masked_share if masked_share is None else masked_share
    if share and masked_share and not model.network.supports_masking:
        raise ValueError(f"masked_share {share}: {model.name} has no masked pass; 0 works")
    ids_keep = known_tokens(model.network, mask)
    resolved = sampling.resolve_options(model, **options)
    if resolved.sampler not in SINGLE_STEP:
        known = ", ".join(SINGLE_STEP)
        raise ValueError(f"sampler {resolved.sampler!r} does not inpaint; these do: {known}")
    return Task(
        images,
        mask,
        labels,
        resolved,
        resamples,
        float(share) if len(ids_keep) else 0.0,
        ids_keep,
    )


def paint_task(
    model: sampling.DiffusionModel,
    params: dict[str, Any],
    task: Task,
    *,
    key: Any = 0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "n h w c"]:
    """Paints a task that `prepare_task` made; the other arguments are `inpaint`'s."""
    count = len(task.labels)
    if not task.mask.any():
        return task.images[np.arange(count) % len(task.images)]
    mesh = sharding.create_mesh() if mesh is None else mesh
    return sampling.run_in_batches(
        lambda mesh, size: compile_inpainter(model, mesh, size, task.options, task.resamples),
        params,
        count,
        lambda rows: (task, rows),
        key=key,
        batch_size=sampling.resolve_batch_size(batch_size, model, params, mesh, task.options),
        mesh=mesh,
        progress=progress,
    )


def check_mask(network: LatentTransformer, mask: np.ndarray | Array) -> Bool[np.ndarray, "h w"]:
    """The mask as booleans; raises ValueError for another shape or values beside 0 and 1."""
    mask = np.asarray(mask)
    size = network.image_shape[:2]
    if mask.shape != size:
        raise ValueError(f"mask of shape {mask.shape}; the model's images need one of {size}")
    strange = mask[(mask != 0) & (mask != 1)]
    if strange.size:
        raise ValueError(
            f"mask holds {strange[0]}; it must be True (or 1) where a pixel is unknown, and False "
            "(or 0) elsewhere"
        )
    return mask.astype(bool)


def check_images(
    network: LatentTransformer, images: np.ndarray | Array, mask: Bool[np.ndarray, "h w"]
) -> Float[np.ndarray, "n h w c"]:
    """The images as a float32 batch, 0 at unknown pixels.

    Raises:
      ValueError: another size or number of channels, integers, or known pixels that are not finite.
    """
    images = np.asarray(images)
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1:] != network.image_shape or not len(images):
        raise ValueError(
            f"images of shape {images.shape}; the model takes {network.image_shape}, one or a "
            "batch of them"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images of type {images.dtype}; they must be floats in the model's own range, "
            "x / 127.5 - 1 for 8-bit pixels"
        )
    images = np.where(mask[..., None], 0, images).astype(np.float32)
    bad = ~np.isfinite(images).all(axis=(1, 2, 3))
    if bad.any():
        raise ValueError(f"image {bad.argmax()} has known pixels that are not finite")
    return images


def _resolve_labels(
    model: sampling.DiffusionModel,
    labels: Any,
    num_images: int,
    num_samples: int | None,
    cfg_scale: float | None,
) -> Int[np.ndarray, " n"]:
    """The class of every result, one each; num_classes stands for no class."""
    labels = given_labels(labels)
    network, given = model.network, len(labels)
    if given > 1 and num_images > 1 and given != num_images:
        raise ValueError(f"{given} labels for {num_images} images; give one for each, or one")
    count = max(num_images, given) if num_samples is None else num_samples
    if given or network.num_classes == 0:
        return sampling.resolve_labels(model, labels, count)
    if not network.null_class:
        raise ValueError(f"labels are needed: {model.name} was trained without a null class")
    if cfg_scale not in (None, 1):
        raise ValueError(f"cfg_scale {cfg_scale} needs labels to guide towards; 1 works without")
    sampling.resolve_labels(model, None, count)  # refuses a count below 1
    return np.full(count, network.num_classes, np.int32)


def known_tokens(
    network: LatentTransformer, mask: Bool[np.ndarray, "h w"]
) -> Int[np.ndarray, " kept"]:
    """Ids of the tokens without an unknown pixel, ascending."""
    grid, patch = network.grid_size, network.patch_size
    unknown = mask.reshape(grid, patch, grid, patch).any(axis=(1, 3))
    return np.flatnonzero(~unknown.reshape(-1)).astype(np.int32)


class CompiledInpainter(sampling.CompiledBatch):
    """An inpainter for batches of one size; `compile_inpainter` makes and keeps them.

    It compiles one program for the full pass and one for each number of kept tokens, whatever the
    mask.
    """

    def __init__(
        self,
        model: sampling.DiffusionModel,
        mesh: Mesh,
        batch_size: int,
        options: sampling.SamplerOptions,
        resamples: int,
    ):
        super().__init__(model, mesh, batch_size, options)
        self.resamples = resamples
        diffusion, step_fn = self.diffusion, SINGLE_STEP[options.sampler]
        betas = jnp.asarray(diffusion.schedule.betas, jnp.float32)

        def chunk(
            params: Any,
            x: Array,
            keys: Array,
            labels: Array,
            images: Array,
            mask: Array,
            ids_keep: Array | None,
            first: Array,
            last: Array,
        ) -> Array:
            def apply(x: Array, t: Array, y: Array) -> Any:
                if ids_keep is None:
                    return model.network.apply({"params": params}, x, t, y)
                ids = jnp.broadcast_to(ids_keep, (len(x), len(ids_keep)))
                return model.network.apply({"params": params}, x, t, y, ids)

            def body(step: Array, x: Array) -> Array:
                i = diffusion.num_steps - 1 - step // resamples
                batch = jnp.full(x.shape[:1], i, jnp.int32)
                known = diffusion.add_noise(images, batch, self._noise(keys, KNOWN, step))
                x = jnp.where(mask, x, known)
                drawn = self._noise(keys, STEP, step)
                x = step_fn(diffusion, model_fn, x, batch, drawn, **self._step_settings())
                if resamples == 1:
                    return x
                # q(x_i | x_{i−1}), unless this was the last time at i (RePaint algorithm 1).
                noise = self._noise(keys, BACK, step)
                back = jnp.sqrt(1 - betas[i]) * x + jnp.sqrt(betas[i]) * noise
                return jnp.where((i > 0) & ((step + 1) % resamples > 0), back, x)

            with sharding.activations(mesh):
                model_fn = self._guided(apply, labels)
                return jax.lax.fori_loop(first, last, body, x)

        self._start, self._chunk = self._compile(chunk, START, 0)

    def __call__(
        self,
        params: Any,
        task: Task,
        rows: Int[np.ndarray, " n"],
        key: Array,
        first_index: int = 0,
        advance: Callable[[int], Any] = lambda steps: None,
    ) -> Float[np.ndarray, "n h w c"]:
        """Paints the results of a task at the indices `rows`, at most a batch.

        Args:
          params: the network's.
          task: from `prepare_task`.
          rows: indices of the results.
          key: PRNG key.
          first_index: the sample whose noise the first result has.
          advance: is told how many steps were taken since it was last called.
        """
        states = self.states(params, task, rows, key, first_index)
        return self.joined(self._last_of(states, len(rows), advance), task, rows)

    def states(
        self,
        params: Any,
        task: Task,
        rows: Int[np.ndarray, " n"],
        key: Array,
        first_index: int = 0,
        pace: Callable[[], int] = lambda: sampling.CHUNK_STEPS,
    ) -> Iterator[tuple[int, Array]]:
        """The states of the painting, as `CompiledSampler.states` yields a sampler's.

        Known pixels are copied into the last one by `joined`.
        """
        images, unknown = task.images[rows % len(task.images)], task.mask[..., None]
        keys, x = self._start(key, np.int32(first_index))
        inputs = (self._place(task.labels[rows]), self._place(images), unknown)
        turn = round(task.masked_share * self.diffusion.num_steps) * self.resamples
        turn = min(turn, self.num_steps)
        for begin, end, ids in ((0, turn, task.ids_keep), (turn, self.num_steps, None)):
            for first, last in chunks(begin, end, pace):
                x = self._chunk(params, x, keys, *inputs, ids, np.int32(first), np.int32(last))
                yield last, x

    def joined(
        self, painted: Float[np.ndarray, "n h w c"], task: Task, rows: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n h w c"]:
        """Painted pixels where the task's are unknown, the known ones elsewhere."""
        return np.where(task.mask[..., None], painted, task.images[rows % len(task.images)])


@lru_cache(maxsize=8)
def compile_inpainter(
    model: sampling.DiffusionModel,
    mesh: Mesh,
    batch_size: int,
    options: sampling.SamplerOptions,
    resamples: int,
) -> CompiledInpainter:
    """The inpainter for these settings, kept for the next call."""
    return CompiledInpainter(model, mesh, batch_size, options, resamples)


def read_image(path: str | os.PathLike, channels: int) -> Float[np.ndarray, "h w c"]:
    """A picture as a pixel model takes it, in [−1, 1]; `images.to_uint8` gives its levels back.

    Args:
      path: a picture, decoded as `data.decode_image` says: upright, transparent parts white.
      channels: 1 (read as grey) or 3 (RGB), the model's.

    Raises:
      ValueError: it is not a picture, is damaged or too large, or the model is not one of pixels.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"{path}: a picture has 1 or 3 channels, the model {channels}; a model of latents "
            "paints the latents that its autoencoder makes of a picture (`Autoencoder.encode`)"
        )
    refuse_url(path, "the picture")
    return to_unit_range(decode_image(Path(path), str(path), channels))


def to_unit_range(levels: UInt8[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w c"]:
    """Levels 0 … 255 in [−1, 1], float32, of which `images.to_uint8` gives the levels back."""
    # A hundredth of a level is added: to_uint8 truncates, and rounding leaves some just too low.
    higher = levels.astype(np.float32) + np.float32(0.01)
    return np.minimum(higher / np.float32(127.5) - 1, np.float32(1))


def read_mask(path: str | os.PathLike) -> Bool[np.ndarray, "h w"]:
    """The mask in a picture: True at its white and transparent pixels, which are to be painted.

    Raises:
      ValueError: it is not a picture, or has a pixel that is neither black nor white.
    """
    refuse_url(path, "the mask")
    levels = decode_image(Path(path), str(path), channels=1)[..., 0]
    grey = (levels != 0) & (levels != 255)
    if grey.any():
        row, column = np.argwhere(grey)[0]
        raise ValueError(
            f"{path}: the pixel at row {row}, column {column} is grey ({levels[row, column]}); a "
            "mask is white (255) where pixels are unknown and black (0) elsewhere, kept as PNG"
        )
    return levels == 255
