"""Samples from a run: `python -m mdt_jax.sample --workdir runs/digits --num_samples 64 --output s`.

Or from PyTorch weights, `--checkpoint mdt_xl2_v2_ckpt.pt --vae ema`; `--inpaint IMAGE --mask MASK`
paints the white part of a mask into a picture. Writes a PNG grid and an .npz in ADM's layout
(`arr_0` uint8 NHWC images, `arr_1` labels, the number of classes where there is none), both saying
what made them. `import mdt_jax; mdt_jax.sample(...)` does the same in Python.
"""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from einops import reduce

from mdt_jax import images, inpainting, sampling, sharding
from mdt_jax.checkpoints import CheckpointError
from mdt_jax.distributed import initialize_distributed
from mdt_jax.latents import Autoencoder


def write(
    model: sampling.DiffusionModel,
    samples: np.ndarray,
    labels: np.ndarray,
    output: str | Path,
    **settings: Any,
) -> list[Path]:
    """Writes OUTPUT.npz, and OUTPUT.png where samples are images; returns the files written.

    Latents (neither 1 nor 3 channels) are written as they are, float32 `arr_0`: they need their
    autoencoder's decoder before they are pictures.
    """
    metadata = images.provenance(
        model=model.name, step=model.step, labels=labels.tolist(), **settings
    )
    pixels = samples.shape[-1] in (1, 3)
    stem = str(output).removesuffix(".png").removesuffix(".npz")
    written = [Path(f"{stem}.npz")]
    images.save_npz(written[0], images.to_uint8(samples) if pixels else samples, labels, metadata)
    if pixels:
        written.append(Path(f"{stem}.png"))
        images.save_png(written[1], images.image_grid(images.to_uint8(samples)), metadata)
    return written


# Samples, their labels (num_classes where there is none), and what their files tell of them.
Made = tuple[np.ndarray, np.ndarray, dict[str, Any]]


def draw(
    f: flags.FlagValues,
    model: sampling.DiffusionModel,
    params: Any,
    autoencoder: Autoencoder | None,
    mesh: jax.sharding.Mesh,
) -> Made:
    """Samples of the flags' classes, decoded if there is an autoencoder."""
    given = given_options(f)
    options = sampling.resolve_options(model, **given)
    labels = sampling.resolve_labels(model, f.labels or None, f.num_samples)
    samples = sampling.sample(
        model,
        params,
        labels=f.labels or None,
        num_samples=len(labels),
        **given,
        **running(f, mesh),
    )
    if autoencoder:
        samples = autoencoder.decode(samples, f.vae_batch_size, f.vae_tile_size)
    return samples, labels, vars(options)


def paint(
    f: flags.FlagValues,
    model: sampling.DiffusionModel,
    params: Any,
    autoencoder: Autoencoder | None,
    mesh: jax.sharding.Mesh,
) -> Made:
    """Paints the white part of --mask into --inpaint; the rest stays as it is, exactly."""
    image, mask = read_pictures(f, model, autoencoder)
    given, unknown = image, mask
    if autoencoder:
        given, unknown = to_latents(autoencoder, image, mask, f.vae_batch_size)
    task = inpainting.prepare(
        model,
        given,
        unknown,
        labels=f.labels or None,
        num_samples=f.num_samples,
        **given_options(f),
    )
    painted = inpainting.paint(model, params, task, **running(f, mesh))
    if autoencoder:
        decoded = autoencoder.decode(painted, f.vae_batch_size, f.vae_tile_size)
        painted = np.where(mask[..., None], decoded, image)
    about = vars(task.options) | {
        "resamples": task.resamples,
        "masked_share": task.masked_share,
        "inpainted": f.inpaint,
        "mask": f.mask,
    }
    return painted, task.labels, about


def read_pictures(
    f: flags.FlagValues, model: sampling.DiffusionModel, autoencoder: Autoencoder | None
) -> tuple[np.ndarray, np.ndarray]:
    """--inpaint as (h, w, c) in [−1, 1] and --mask as (h, w) booleans, of the model's size.

    Raises:
      ValueError: pictures that cannot be read, or of another size; latents without a --vae.
    """
    network = model.network
    if autoencoder is None and network.in_channels not in (1, 3):
        raise ValueError(
            f"--inpaint {f.inpaint}: {model.name} is a model of latents, of {network.in_channels} "
            "channels; give --vae, the autoencoder that makes them of pictures"
        )
    channels = autoencoder.module.in_channels if autoencoder else network.in_channels
    image = inpainting.read_image(f.inpaint, channels)
    side = network.input_size * (autoencoder.module.downsampling if autoencoder else 1)
    if image.shape[:2] != (side, side):
        raise ValueError(
            f"--inpaint {f.inpaint} is {_size(image)} pixels; {model.name} paints {side} × {side}"
        )
    mask = inpainting.read_mask(f.mask)
    if mask.shape != image.shape[:2]:
        raise ValueError(
            f"--mask {f.mask} is {_size(mask)} pixels, --inpaint {f.inpaint} {_size(image)}: both "
            "must be of one size"
        )
    return image, mask


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]} × {picture.shape[0]}"


def to_latents(
    autoencoder: Autoencoder, image: np.ndarray, mask: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(1, h, w, c) scaled latents of a picture, and their mask: unknown if a pixel of theirs is."""
    known = np.where(mask[..., None], np.float32(0), image)  # what is unknown must not leak
    mean, _ = autoencoder.encode(known[None], batch_size)
    factor = autoencoder.module.downsampling
    latent_mask = reduce(mask, "(h a) (w b) -> h w", "max", a=factor, b=factor)
    return (mean - autoencoder.shift) * autoencoder.scale, latent_mask


def given_options(f: flags.FlagValues) -> dict[str, Any]:
    """The sampler's options that flags give, as `sampling.resolve_options` takes them."""
    names = ("cfg_scale", "cfg_power", "guided_channels", "sampler", "steps", "clip", "eta")
    return {name: getattr(f, name) for name in names if getattr(f, name) is not None}


def running(f: flags.FlagValues, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Where and how the work is done, as `sampling.sample` takes it."""
    return {"key": f.seed, "batch_size": f.batch_size, "mesh": mesh, "progress": True}


def load_autoencoder(
    f: flags.FlagValues, model: sampling.DiffusionModel, mesh: jax.sharding.Mesh
) -> Autoencoder | None:
    """--vae, None if it is not given; refuses one of other latents than the model's."""
    if not f.vae:
        return None
    autoencoder = Autoencoder.load(f.vae, mesh)
    if autoencoder.module.latent_channels != model.network.in_channels:
        raise ValueError(
            f"--vae {f.vae} decodes {autoencoder.module.latent_channels} channels, {model.name} "
            f"makes {model.network.in_channels}"
        )
    return autoencoder


def generate(f: flags.FlagValues, mesh: jax.sharding.Mesh) -> list[Path]:
    """Samples, decodes and writes what the flags ask for; returns the files written."""
    if bool(f.workdir) == bool(f.checkpoint):
        raise ValueError("give --workdir, a run, or --checkpoint, a file of PyTorch weights")
    if bool(f.inpaint) != bool(f.mask):
        raise ValueError("--inpaint IMAGE and --mask MASK go together")
    model, params = sampling.load(
        f.workdir or f.checkpoint,
        ema_rate=f.ema_rate,
        step=f.step,
        mesh=mesh,
        decode_layers=f.decode_layers,
        num_heads=f.num_heads,
        num_classes=f.num_classes,
        input_size=f.input_size,
    )
    autoencoder = load_autoencoder(f, model, mesh)
    # Before the work: an output that cannot be written would lose it.
    Path(f.output).parent.mkdir(parents=True, exist_ok=True)
    make = paint if f.inpaint else draw
    samples, labels, about = make(f, model, params, autoencoder, mesh)
    about = about | {"seed": f.seed, "ema_rate": f.ema_rate, "vae": f.vae}
    return write(model, samples, labels, f.output, **about) if jax.process_index() == 0 else []


_SAMPLER = functools.partial(flags.DEFINE_enum, enum_values=["ddpm", "ddim"])
# What defines a flag, its name, default and help.
FLAGS = (
    (flags.DEFINE_string, "workdir", None, "The run to sample from."),
    (flags.DEFINE_string, "checkpoint", None, "Or PyTorch weights: .pt, .safetensors, hf://O/R/F."),
    (flags.DEFINE_integer, "decode_layers", None, "Decoder depth of such an MDT v1; 2 by default."),
    (flags.DEFINE_integer, "num_heads", None, "Heads of such a DiT, if of no known width."),
    (flags.DEFINE_integer, "num_classes", None, "Settles whether their last label is a class."),
    (flags.DEFINE_integer, "input_size", None, "Side of the latents of diffusers' DiT."),
    (flags.DEFINE_string, "vae", None, "Decoder of latents: ema, mse, a file or folder of one."),
    (flags.DEFINE_integer, "vae_batch_size", 16, "Images en- or decoded at a time."),
    (flags.DEFINE_integer, "vae_tile_size", None, "Side in latents of tiles, for large images."),
    (flags.DEFINE_string, "inpaint", None, "A picture to paint into, with --mask."),
    (flags.DEFINE_string, "mask", None, "A picture of its size, white where it is to be painted."),
    (flags.DEFINE_string, "output", "samples", "Where to: OUTPUT.npz and OUTPUT.png."),
    (flags.DEFINE_integer, "num_samples", None, "How many; labels are repeated to that many."),
    (flags.DEFINE_list, "labels", [], "Classes by number or name; all in turn by default."),
    (flags.DEFINE_integer, "seed", 0, "Of the noise; sample i depends on it and i alone."),
    (flags.DEFINE_float, "cfg_scale", None, "Guidance scale, 1 for none; the run's by default."),
    (flags.DEFINE_float, "cfg_power", None, "Exponent of the power-cosine scale; 0: constant."),
    (flags.DEFINE_integer, "guided_channels", None, "Channels that are guided; the run's."),
    (flags.DEFINE_string, "steps", None, "Steps, or a respacing (ddim50, 10,15,20); the run's."),
    (_SAMPLER, "sampler", None, "The run's by default."),
    (flags.DEFINE_bool, "clip", None, "Whether x0 is clipped to [-1, 1]; the run's by default."),
    (flags.DEFINE_float, "eta", 0.0, "DDIM's: 0 deterministic, 1 ancestral."),
    (flags.DEFINE_float, "ema_rate", None, "Which average; the run's first by default."),
    (flags.DEFINE_integer, "step", None, "Which checkpoint; the newest by default."),
    (flags.DEFINE_integer, "mesh_fsdp", 1, "Devices that share one copy of the parameters."),
    (flags.DEFINE_integer, "mesh_tensor", 1, "Devices that share each head and hidden layer."),
    (flags.DEFINE_integer, "batch_size", 256, "Samples at a time, over all devices."),
)


def define_flags(f: flags.FlagValues) -> None:
    """The command's flags."""
    for define, name, default, text in FLAGS:
        define(name, default, help=text, flag_values=f)


def main(_: list[str]) -> None:
    """The command: one clear line and exit status 1 for what a user can mend."""
    f = flags.FLAGS
    try:
        initialize_distributed()
        for path in generate(f, sharding.create_mesh(fsdp=f.mesh_fsdp, tensor=f.mesh_tensor)):
            print(path)
    except (ValueError, OSError, CheckpointError) as error:
        if logging.level_debug():
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")


class _CallableModule(types.ModuleType):
    """Keeps `mdt_jax.sample(...)` the function when this module of the same name is imported."""

    def __call__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return sampling.sample(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
