"""Images to latents and back, through a pretrained autoencoder on the devices of a mesh."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from mdt_jax.basics.places import refuse_url
from mdt_jax.convert import autoencoder as convert_kl
from mdt_jax.convert import autoencoder_dc as convert_dc
from mdt_jax.convert.autoencoder_settings import check_stable_diffusions, settings_from_config
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.autoencoder_dc import AutoencoderDC
from mdt_jax.models.latent_space import LatentSpace, check_same_latents
from mdt_jax.parallel import sharding
from mdt_jax.weights import files as weight_files
from mdt_jax.weights.files import WeightsError

# The Hugging Face repository of each of `AUTOENCODERS`, and the folder in it.
PUBLISHED = {
    "ema": "stabilityai/sd-vae-ft-ema",
    "mse": "stabilityai/sd-vae-ft-mse",
    "sdxl": "stabilityai/sdxl-vae",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers/vae",
    "flux": "black-forest-labs/FLUX.1-schnell/vae",
    "dc-ae-f32": "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
    "dc-ae-f64": "mit-han-lab/dc-ae-f64c128-in-1.0-diffusers",
}
DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# A posterior's log-variance is clipped to this range, beyond which its exponential overflows.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
MIN_TILE_SIZE = 4
# The network of each kind, by the converter of its weights.
_NETWORKS: dict[ModuleType, Any] = {
    convert_kl: AutoencoderKL,
    convert_dc: AutoencoderDC,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
    """An autoencoder with its weights; `Autoencoder.load` makes one.

    Attributes:
      module: the network.
      params: its parameters, float32, a copy on each device of the mesh.
      latents: its latents, with the numbers that a diffusion model sees them normalised by.
      mesh: the devices; batches are split over its data axes.
    """

    module: AutoencoderKL | AutoencoderDC
    params: dict[str, Any]
    latents: LatentSpace
    mesh: Mesh

    @classmethod
    def load(
        cls, source: str | Path, mesh: Mesh | None = None, dtype: DTypeLike = jnp.float32
    ) -> Autoencoder:
        """An autoencoder from weights in CompVis's naming or diffusers', old or new.

        Args:
          source: a name of `PUBLISHED`, such as Stable Diffusion's "ema" or "mse"; a folder with
            `config.json` and a file of weights; or such a file, or hf://OWNER/REPO/FILE, with
            `config.json` beside it. Weights without one must be of Stable Diffusion's layout. Its
            32 norm groups and its scale do not show in them: they are assumed, which the log says.
          mesh: devices to use; all by default.
          dtype: the type of the computation. float32 asks for float32 products, too.

        Raises:
          WeightsError: nothing there, or not an autoencoder's; one line says what and where.
        """
        weights_file, config = _find(source)
        weights = weight_files.read_weights(weights_file)
        settings, convert = _settings(weights, config)
        try:
            params = convert.from_torch(weights, settings)
        except ValueError as error:
            raise WeightsError(f"{weights.path}: {error}") from error
        mesh = sharding.create_mesh() if mesh is None else mesh
        params = jax.tree.map(lambda array: np.asarray(array, np.float32), params)
        return cls(
            module=_NETWORKS[convert](**settings.module_settings(), dtype=jnp.dtype(dtype)),
            params=jax.device_put(params, sharding.replicated(mesh)),
            latents=dataclasses.replace(
                settings.latents, autoencoder=str(source), digest=encoder_digest(params)
            ),
            mesh=mesh,
        )

    @property
    def name(self) -> str:
        """ "ema", "mse" or the path, as it was asked for."""
        return self.latents.autoencoder

    def for_latents(self, latents: LatentSpace, *, whose: str, option: str) -> Autoencoder:
        """This autoencoder with the normalisation of latents that are to be decoded or painted.

        Those have numbers of their own where they were measured over the data. A decoder that was
        trained on behind the same encoder fits.

        Args:
          latents: the latents.
          whose: the model or the data that they are of, for messages.
          option: the flag or setting that names this autoencoder, and its value.

        Raises:
          ValueError: latents of another encoder, or of another scale, naming both.
        """
        own, wanted = self.latents, latents
        if latents.mean and latents.digest:  # measured numbers take the place of the autoencoder's
            own = dataclasses.replace(own, mean=latents.mean, std=latents.std)
        elif latents.mean and not own.mean:  # without a digest the others have to tell
            wanted = dataclasses.replace(latents, mean=(), std=())
        trained = latents.autoencoder or latents.digest[:12]
        check_same_latents(
            wanted,
            own,
            whose=whose,
            other=option,
            way_out=f"give the autoencoder of those latents{f', {trained}' if trained else ''}",
        )
        if latents.mean:
            own = dataclasses.replace(own, mean=latents.mean, std=latents.std)
        return dataclasses.replace(self, latents=own)

    def encode(
        self, images: Float[Array | np.ndarray, "n h w c"], batch_size: int = 16
    ) -> tuple[Float32[np.ndarray, "n hl wl cl"], Float32[np.ndarray, "n hl wl cl"]]:
        """Mean and standard deviation of the posterior of images' latents, not normalised.

        Where an autoencoder has no posterior, the standard deviation is 0.

        Args:
          images: in [−1, 1], sides multiples of `module.downsampling`.
          batch_size: images at a time, over all devices; rounded up to fill them.

        Raises:
          ValueError: images that the network does not take, saying which it would.
        """
        height, width = self._check_images(images)
        factor = self.module.downsampling
        shape = (len(images), height // factor, width // factor, self.module.latent_channels)
        mean, std = np.empty(shape, np.float32), np.empty(shape, np.float32)
        for first, rows in self._run(_encode, images, batch_size):
            mean[first : first + len(rows[0])], std[first : first + len(rows[1])] = rows
        return mean, std

    def decode(
        self,
        latents: Float[Array | np.ndarray, "n hl wl cl"],
        batch_size: int = 16,
        tile_size: int | None = None,
    ) -> Float32[np.ndarray, "n h w c"]:
        """Images, in about [−1, 1], of a diffusion model's latents.

        Args:
          latents: normalised, as the model makes them.
          batch_size: images (or tiles) at a time, over all devices; rounded up to fill them.
          tile_size: side, in latents, of the overlapping tiles that larger images are decoded in,
            blended linearly, where one pass over them would not fit the memory; None for one pass.
            An approximation: GroupNorm and attention see one tile instead of the image, so tones
            can drift from tile to tile. 64, the size the weights were trained at, or more is wise.

        Raises:
          ValueError: latents with another number of channels, or a tile that is too small.
        """
        if latents.shape[-1] != self.module.latent_channels:
            raise ValueError(
                f"latents of {latents.shape[-1]} channels; the autoencoder {self.name} has "
                f"{self.module.latent_channels}"
            )
        own = self.latents.denormalize(np.asarray(latents, np.float32))
        tile = max(own.shape[1:3]) if tile_size is None else tile_size
        if tile_size is not None and tile_size < MIN_TILE_SIZE:
            raise ValueError(f"tile_size {tile_size} is below {MIN_TILE_SIZE} latents")
        return self._decode_tiles(own, batch_size, tile)

    def decode_batch(
        self,
        latents: Float[Array | np.ndarray, "n hl wl cl"],
        size: int,
        batch_size: int = 16,
        tile_size: int | None = None,
    ) -> Float32[np.ndarray, "n h w c"]:
        """Decodes one of many batches, the last of which may be smaller than the others.

        The smaller one is padded, so that it runs the program that is compiled for the others.

        Args:
          latents: normalised, at most `size`.
          size: latents in every batch but the last.
          batch_size, tile_size: as for `decode`.
        """
        padding = -len(latents) % min(batch_size, size)
        padded = np.pad(latents, [(0, padding), (0, 0), (0, 0), (0, 0)])
        return self.decode(padded, batch_size, tile_size)[: len(latents)]

    def _decode_tiles(self, latents: np.ndarray, batch_size: int, tile: int) -> np.ndarray:
        factor = self.module.downsampling
        count, *sides, _ = latents.shape
        rows, columns = (_tiles(side, tile, factor) for side in sides)
        height, width = (min(side, tile) for side in sides)
        places = list(itertools.product(range(count), rows, columns))
        tiles = np.array(
            [latents[n, y : y + height, x : x + width] for n, (y, _), (x, _) in places]
        ).reshape(-1, height, width, latents.shape[-1])
        images = np.zeros(
            (count, *(side * factor for side in sides), self.module.out_channels), np.float32
        )
        for first, (decoded,) in self._run(_decode, tiles, batch_size):
            for (n, (y, row_weights), (x, column_weights)), pixels in zip(
                places[first:], decoded, strict=False
            ):
                top, left = y * factor, x * factor
                place = images[n, top : top + len(pixels), left : left + pixels.shape[1]]
                place += pixels * row_weights[:, None, None] * column_weights[:, None]
        return images

    def _run(
        self, method: Callable, inputs: Any, batch_size: int
    ) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Runs a method batch by batch; yields the index of a batch's first row, and its outputs.

        The next batch is computed while the caller works on the one before.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is below 1")
        shards = sharding.batch_shards(self.mesh)
        batch_size = -(-min(batch_size, len(inputs)) // shards) * shards
        function = _compiled(method, self.module, self.mesh)
        pending: list[tuple[int, Any]] = []
        for first in range(0, len(inputs), batch_size or 1):
            batch = np.zeros((batch_size, *inputs.shape[1:]), np.float32)
            rows = np.asarray(inputs[first : first + batch_size], np.float32)
            batch[: len(rows)] = rows
            pending.append((first, function(self.params, self._place(batch))))
            if len(pending) == 2:
                yield self._fetch(*pending.pop(0), len(inputs))
        for first, outputs in pending:
            yield self._fetch(first, outputs, len(inputs))

    def _place(self, batch: np.ndarray) -> Array:
        shard = sharding.batch_sharding(self.mesh)
        return jax.make_array_from_callback(batch.shape, shard, lambda index: batch[index])

    def _fetch(
        self, first: int, outputs: tuple[Array, ...], count: int
    ) -> tuple[int, tuple[np.ndarray, ...]]:
        if not outputs[0].is_fully_addressable:
            outputs = multihost_utils.process_allgather(outputs, tiled=True)
        return first, tuple(np.asarray(output)[: count - first] for output in outputs)

    def _check_images(self, images: Any) -> tuple[int, int]:
        """Height and width of images that the encoder takes."""
        _, height, width, channels = images.shape
        if channels != self.module.in_channels:
            raise ValueError(
                f"images of {channels} channels; the autoencoder {self.name} takes "
                f"{self.module.in_channels}"
            )
        if np.dtype(images.dtype).kind in "iu":
            raise ValueError(
                f"images of type {images.dtype}; give floats in [-1, 1] "
                "(mdt_jax.data.transforms.to_unit_range)"
            )
        factor = self.module.downsampling
        if height % factor or width % factor or not height or not width:
            fit = " x ".join(str(max(side // factor, 1) * factor) for side in (height, width))
            raise ValueError(
                f"images of {height} x {width} pixels; the autoencoder {self.name} takes sides "
                f"that are multiples of {factor}: {fit} would fit"
            )
        return height, width


def encoder_digest(params: Mapping[str, Any]) -> str:
    """The SHA-256 of an encoder's weights, which stand for its latents: the decoder's are left out.

    Args:
      params: an autoencoder's parameters, NumPy's arrays or JAX's.
    """
    digest = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith(("encoder/", "quant/")):
            digest.update(f"{name} {leaf.shape}\n".encode())
            digest.update(np.ascontiguousarray(leaf, "<f4").data)
    return digest.hexdigest()


@functools.lru_cache(maxsize=8)
def _compiled(method: Callable, module: nn.Module, mesh: Mesh) -> Callable:
    """The jitted method; it is kept, so that a later call compiles only for another shape."""
    return jax.jit(functools.partial(method, module), out_shardings=sharding.batch_sharding(mesh))


def _encode(module: nn.Module, params: Any, images: Array) -> tuple[Array, Array]:
    moments: Any = module.apply({"params": params}, images, method="encode")
    if isinstance(module, AutoencoderDC):  # it has no posterior
        return moments, jnp.zeros_like(moments)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE_RANGE))


def _decode(module: nn.Module, params: Any, latents: Array) -> tuple[Array]:
    images: Any = module.apply({"params": params}, latents, method="decode")
    return (images,)


def _tiles(side: int, tile: int, factor: int) -> list[tuple[int, np.ndarray]]:
    """For each tile along a side of latents: where it starts, and the weights of its pixels.

    Neighbours overlap by a quarter of a tile, the last two by the rest of the side, and their
    weights change linearly across the overlap. The weights of all tiles sum to 1 at every pixel.
    """
    tile = min(tile, side)
    overlap = tile // 4
    starts = [*range(0, side - tile, max(tile - overlap, 1)), side - tile]
    from_edge = (np.arange(tile * factor) + 0.5) / max(overlap * factor, 1)
    windows = []
    for start in starts:
        rise = from_edge if start > 0 else np.inf
        fall = from_edge[::-1] if start < side - tile else np.inf
        windows.append(np.minimum(np.minimum(rise, fall), np.ones(tile * factor)))
    total = np.zeros(side * factor)
    for start, window in zip(starts, windows, strict=True):
        total[start * factor : (start + tile) * factor] += window
    return [
        (start, (window / total[start * factor : (start + tile) * factor]).astype(np.float32))
        for start, window in zip(starts, windows, strict=True)
    ]


def _find(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of weights that a source names, and what its config.json holds, {} without one."""
    if source in PUBLISHED:
        repository = PUBLISHED[source]
        try:
            return _with_config(f"hf://{repository}/{DIFFUSERS_FILES[0]}")
        except WeightsError as error:
            raise WeightsError(
                f"the autoencoder {source!r} cannot be fetched: where there is a network, download "
                f"{DIFFUSERS_FILES[0]} and config.json of the Hugging Face repository {repository} "
                f"into one folder, copy it here, and give its path in place of {source!r}"
            ) from error
    if str(source).startswith("hf://"):
        return _with_config(source)
    path = Path(source)
    if not path.exists():
        refuse_url(source, "the file")
        raise WeightsError(
            f"autoencoder {str(source)!r}: no such file or folder; give "
            f"{', '.join(map(repr, PUBLISHED))}, a folder with config.json and weights, or a file "
            "of weights"
        )
    return _with_config(_weights_in(path) if path.is_dir() else path)


def _with_config(file: str | Path) -> tuple[Path, dict[str, Any]]:
    path = weight_files.fetch(file)
    return path, weight_files.json_beside(file, path)


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder: diffusers' names first, else the only one there is."""
    files = sorted(file for file in folder.iterdir() if weight_files.is_weight_file(file.name))
    named = [folder / name for name in DIFFUSERS_FILES if folder / name in files]
    if named or len(files) == 1:
        return (named or files)[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise WeightsError(f"{folder}: several files of weights, {names}; give one of them")
    hint = f"; is {folder / 'vae'} meant?" if (folder / "vae").is_dir() else ""
    raise WeightsError(
        f"{folder}: no weights of an autoencoder, such as {DIFFUSERS_FILES[0]}{hint}"
    )


def _settings(weights: weight_files.WeightFile, config: dict[str, Any]) -> tuple[Any, ModuleType]:
    """The settings of an autoencoder, and the converter of its kind.

    Raises:
      WeightsError: settings that no network here has, or that the weights alone do not show.
    """
    place = weights.path.parent / "config.json" if config else weights.path
    try:
        if config.get("_class_name") == "AutoencoderDC":
            return convert_dc.settings_from_config(config), convert_dc
        if config:
            return settings_from_config(config), convert_kl
        if convert_dc.is_autoencoder_dc(weights):
            raise ValueError(
                "a deep compression autoencoder, whose settings do not show in its weights; put "
                "its config.json beside them"
            )
        settings = convert_kl.settings_from_shapes(weights.shapes)
        check_stable_diffusions(settings)
    except ValueError as error:
        raise WeightsError(f"{place}: {error}") from error
    logging.info(
        "%s: no config.json beside it; taken to be Stable Diffusion's autoencoder, of scale %s. "
        "SDXL's has the same shapes and another scale: put its config.json beside it",
        place,
        settings.latents.scale,
    )
    return settings, convert_kl
