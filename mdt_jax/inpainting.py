"""Inpainting: `inpaint` paints the unknown pixels of images so that they fit the known ones.

No training of its own is needed. At every reverse step the known pixels are the given ones, noised
to the step's level, so that the model paints the others to go with them; at the end the known
pixels are copied back. The known pixels' noise is drawn without regard to what has been painted, so
a step is taken several times, from noise added anew, for the two to come to agree (`resamples`;
RePaint, Lugmayr et al. 2022): on the digits 16 steps 4 times err less than 64 steps once (0.62
against 0.65; see below for the unit).

**Masked passes.** MDT's side-interpolator, kept at inference, predicts hidden tokens from others.
Here a masked pass hides every token that has an unknown pixel, so that the encoder sees known
tokens alone. What that is good for depends on the family (`default_masked_share`):

- MDTv2's decoder is fed all noisy tokens, so that a masked pass is a denoiser, of a shorter
  encoder. On a small model of the digits its x̂0 at the hidden half of the tokens errs as much as
  the full pass's at high noise, and up to 3% more below (t = 800: 0.954 and 0.947; t = 400: 0.636
  and 0.620). Paintings made with masked passes throughout err 2 to 4% more than with full passes;
  with masked passes for the noisier half of the steps they err the same (0.606 and 0.607). That
  half is the default.
- MDT v1 drops hidden tokens before the encoder and nothing after it sees their noise, which it is
  asked for: the masked pass cannot denoise them, at any noise. Its x̂0 errs 7.4, where the full
  pass's errs 1.1, at t = 800, 1.8 and 0.7 at t = 400, 0.22 and 0.16 at t = 50. The default is full
  passes.
- DiT has no masked pass.

Training hides 30 to 50% of the tokens. At 75% hidden, MDTv2's masked pass still erred 3% more than
the full one, as at 50%. Where a mask touches every token, all passes are full. (Errors are RMSE at
the unknown pixels of held-out scans, over that of the mean of the class's training scans; of
paintings, the error of the mean of 8. tests/test_inpainting.py has the model.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from mdt_jax import sampling, sharding
from mdt_jax.diffusion import guided
from mdt_jax.diffusion.samplers import SAMPLERS
from mdt_jax.models import LatentTransformer, MDTv2

# What a draw of noise is for: the first state, a reverse step, the known pixels, going back a step.
START, STEP, KNOWN, BACK = range(4)


def inpaint(
    model: sampling.DiffusionModel,
    params: dict[str, Any],
    images: np.ndarray | Array,
    mask: np.ndarray | Array,
    *,
    labels: Sequence[int | str] | np.ndarray | Array | None = None,
    num_samples: int | None = None,
    key: Array | int | np.integer = 0,
    resamples: int = 4,
    masked_share: float | None = None,
    cfg_scale: float | None = None,
    cfg_power: float | None | str = "default",
    guided_channels: int | None | str = "default",
    sampler: str | None = None,
    steps: int | str | None = None,
    eta: float = 0.0,
    clip: bool | None = None,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "n h w c"]:
    """Images whose known pixels are those given, bit for bit, and whose others are painted.

    Settings not described here are `sampling.sample`'s.

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
      resamples: how often each step is taken, from noise added anew; the time is in proportion.
      masked_share: which share of the steps, the noisiest, are masked passes; by default
        `default_masked_share`. 0 where the model or the mask allows none.

    Raises:
      ValueError: images, a mask, labels or settings that do not fit the model or each other.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1")
    if resamples < 1:
        raise ValueError(f"resamples {resamples} is below 1; 1 takes each step once")
    mask = check_mask(model.network, mask)
    images = check_images(model.network, images, mask)
    labels = _resolve_labels(model, labels, len(images), num_samples, cfg_scale)
    count = len(labels)
    if (labels == model.network.num_classes).all():  # also if unconditional
        cfg_scale = 1.0
    options = sampling.resolve_options(
        model, cfg_scale, cfg_power, guided_channels, sampler, steps, eta, clip
    )
    ids_keep = known_tokens(model.network, mask)
    share = default_masked_share(model.network) if masked_share is None else masked_share
    if not 0 <= share <= 1:
        raise ValueError(f"masked_share {share} is outside 0 to 1")
    if share and masked_share and not model.network.supports_masking:
        raise ValueError(f"masked_share {share}: {model.name} has no masked pass; 0 works")
    if not mask.any():
        return images[np.arange(count) % len(images)]

    mesh = sharding.create_mesh() if mesh is None else mesh
    key = jax.random.key(int(key)) if isinstance(key, (int, np.integer)) else key
    shards = sharding.batch_shards(mesh)
    batch_size = -(-min(batch_size, count) // shards) * shards
    run = compile_inpainter(model, mesh, batch_size, options, resamples)
    params = sampling.on_mesh(params, mesh)
    share = share if len(ids_keep) else 0.0

    total = run.num_steps * -(-count // batch_size)
    with tqdm(total=total, unit="step", disable=not progress or jax.process_index() > 0) as bar:
        batches = []
        for first in range(0, count, batch_size):
            rows = np.arange(first, min(first + batch_size, count)) % len(images)
            given = (images[rows], labels[first : first + batch_size])
            batches.append(run(params, *given, mask, ids_keep, share, key, first, bar.update))
    return np.concatenate(batches)


def check_mask(network: LatentTransformer, mask: np.ndarray | Array) -> Bool[np.ndarray, "h w"]:
    """The mask as booleans; refuses, with ValueError, another shape and values beside 0 and 1."""
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
    """The class of every result, num_classes being none; there are as many as results."""
    network, given = model.network, 0 if labels is None else len(labels)
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


class CompiledInpainter:
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
        self.diffusion = diffusion = model.diffusion.respaced(options.steps)
        self.mesh, self.resamples = mesh, resamples
        self.shape = (batch_size, *model.network.image_shape)
        network = model.network
        settings = {"clip": options.clip} | (
            {"eta": options.eta} if options.sampler == "ddim" else {}
        )
        betas = jnp.asarray(diffusion.schedule.betas, jnp.float32)

        def noise(keys: Array, purpose: int, step: Int[Array, ""] | int) -> Array:
            def draw(key: Array) -> Array:
                key = jax.random.fold_in(jax.random.fold_in(key, purpose), step)
                return jax.random.normal(key, self.shape[1:])

            return jax.vmap(draw)(keys)

        def start(key: Array, first: Array) -> tuple[Array, Array]:
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(batch_size))
            return keys, noise(keys, START, 0)

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
            def apply(x: Array, t: Array, y: Array) -> Array:
                if ids_keep is None:
                    return network.apply({"params": params}, x, t, y)
                ids = jnp.broadcast_to(ids_keep, (len(x), len(ids_keep)))
                return network.apply({"params": params}, x, t, y, ids)

            def body(step: Array, x: Array) -> Array:
                i = diffusion.num_steps - 1 - step // resamples
                batch = jnp.full(x.shape[:1], i, jnp.int32)
                known = diffusion.add_noise(images, batch, noise(keys, KNOWN, step))
                x = jnp.where(mask, x, known)
                drawn = noise(keys, STEP, step)
                x = SAMPLERS[options.sampler](diffusion, model_fn, x, batch, drawn, **settings)
                if resamples == 1:
                    return x
                # q(x_i | x_{i−1}), unless this was the last time at i (RePaint algorithm 1).
                back = jnp.sqrt(1 - betas[i]) * x + jnp.sqrt(betas[i]) * noise(keys, BACK, step)
                return jnp.where((i > 0) & ((step + 1) % resamples > 0), back, x)

            with sharding.activations(mesh):
                model_fn = guided(
                    apply,
                    labels,
                    network.num_classes,
                    scale=options.cfg_scale,
                    power=options.cfg_power,
                    channels=options.guided_channels,
                    num_train_timesteps=model.diffusion.schedule.num_train_timesteps,
                )
                return jax.lax.fori_loop(first, last, body, x)

        batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self._start = jax.jit(start, in_shardings=(whole, whole), out_shardings=(batch, batch))
        self._chunk = jax.jit(chunk, out_shardings=batch, donate_argnums=1)

    @property
    def num_steps(self) -> int:
        """Calls of the sampler's step for one batch."""
        return self.diffusion.num_steps * self.resamples

    def __call__(
        self,
        params: Any,
        images: Float[np.ndarray, "n h w c"],
        labels: Int[np.ndarray, " n"],
        mask: Bool[np.ndarray, "h w"],
        ids_keep: Int[np.ndarray, " kept"],
        masked_share: float,
        key: Array,
        first_index: int = 0,
        advance: Callable[[int], Any] = lambda steps: None,
    ) -> Float[np.ndarray, "n h w c"]:
        """Paints up to a batch of images, the first being sample `first_index` of the key."""
        count, fill = len(images), self.shape[0] - len(images)
        unknown = mask[..., None]
        keys, x = self._start(key, np.int32(first_index))
        inputs = (
            self._place(np.pad(labels, (0, fill))),
            self._place(np.pad(images, ((0, fill), (0, 0), (0, 0), (0, 0)))),
            unknown,
        )
        for first, last, masked in self._chunks(masked_share):
            ids = ids_keep if masked else None
            x = self._chunk(params, x, keys, *inputs, ids, np.int32(first), np.int32(last))
            x.block_until_ready()
            advance(last - first)
        if jax.process_count() > 1:
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.where(unknown, np.asarray(x)[:count], images)

    def _chunks(self, masked_share: float) -> Iterator[tuple[int, int, bool]]:
        """(first step, step after the last, whether they are masked passes) of each chunk."""
        turn = round(masked_share * self.diffusion.num_steps) * self.resamples
        for begin, end, masked in ((0, turn, True), (turn, self.num_steps, False)):
            for first in range(begin, end, sampling.CHUNK_STEPS):
                yield first, min(first + sampling.CHUNK_STEPS, end), masked

    def _place(self, rows: np.ndarray) -> Array:
        shard = sharding.batch_sharding(self.mesh)
        return jax.make_array_from_callback(rows.shape, shard, lambda index: rows[index])


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


def default_masked_share(network: LatentTransformer) -> float:
    """The share of masked passes that suits a family; the module's docstring has the reasons."""
    return 0.5 if isinstance(network, MDTv2) else 0.0


def read_image(path: str | os.PathLike, channels: int) -> Float[np.ndarray, "h w c"]:
    """A picture as a pixel model takes it, in [−1, 1]; `images.to_uint8` gives its levels back.

    Args:
      path: of a PNG, JPEG, ….
      channels: 1 (read as grey) or 3 (RGB), the model's.

    Raises:
      ValueError: it is not a picture, or the model is not one of pixels.
    """
    if channels not in (1, 3):
        raise ValueError(f"{path}: a picture has 1 or 3 channels, the model {channels}")
    levels = _open(path).convert("L" if channels == 1 else "RGB")
    levels = np.asarray(levels, np.float32).reshape(levels.height, levels.width, channels)
    # A hundredth of a level up: to_uint8 truncates, and rounding had left some just below theirs.
    return np.minimum((levels + np.float32(0.01)) / np.float32(127.5) - 1, np.float32(1))


def read_mask(path: str | os.PathLike) -> Bool[np.ndarray, "h w"]:
    """A picture's white pixels, which are to be painted.

    Raises:
      ValueError: it is not a picture, or has a pixel that is neither black nor white.
    """
    levels = np.asarray(_open(path).convert("L"))
    grey = (levels != 0) & (levels != 255)
    if grey.any():
        row, column = np.argwhere(grey)[0]
        raise ValueError(
            f"{path}: the pixel at row {row}, column {column} is grey ({levels[row, column]}); a "
            "mask is white (255) where pixels are unknown and black (0) elsewhere, kept as PNG"
        )
    return levels == 255


def _open(path: str | os.PathLike) -> Image.Image:
    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that can be read") from error
