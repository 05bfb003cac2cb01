"""Samples from a run: `python -m mdt_jax.sample --workdir runs/digits --num_samples 64 --output s`.

Or from PyTorch weights, `--checkpoint mdt_xl2_v2_ckpt.pt --vae ema`; `--inpaint IMAGE --mask MASK`
paints the white part of a mask into a picture. Writes a PNG grid and an .npz in ADM's layout
(`arr_0` uint8 NHWC images, `arr_1` labels, the number of classes where there is none), both saying
what made them. `import mdt_jax; mdt_jax.sample(...)` does the same in Python.
"""

from __future__ import annotations

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


def paint(
    model: sampling.DiffusionModel,
    params: Any,
    image_path: str,
    mask_path: str,
    autoencoder: Autoencoder | None = None,
    **settings: Any,
) -> np.ndarray:
    """Paints the white part of a mask into a picture; the rest stays as it is, exactly.

    Args:
      model, params: from `sampling.load`.
      image_path, mask_path: two pictures of one size, the mask black and white.
      autoencoder: of a model of latents. A latent is unknown if one of its pixels is.
      **settings: of `inpainting.inpaint`.

    Returns:
      (n, h, w, c) in [−1, 1].
    """
    image = inpainting.read_image(image_path, 3 if autoencoder else model.network.in_channels)
    mask = inpainting.read_mask(mask_path)
    if image.shape[:2] != mask.shape:
        raise ValueError(
            f"--mask {mask_path} is {mask.shape[1]} × {mask.shape[0]} pixels, --inpaint "
            f"{image_path} {image.shape[1]} × {image.shape[0]}: both must be of one size"
        )
    if autoencoder is None:
        return inpainting.inpaint(model, params, image, mask, **settings)
    known = np.where(mask[..., None], np.float32(0), image)  # what is unknown must not leak
    mean, _ = autoencoder.encode(known[None])
    factor = autoencoder.module.downsampling
    latent_mask = reduce(mask, "(h a) (w b) -> h w", "max", a=factor, b=factor)
    latents = (mean - autoencoder.shift) * autoencoder.scale
    painted = autoencoder.decode(
        inpainting.inpaint(model, params, latents, latent_mask, **settings)
    )
    return np.where(mask[..., None], painted, image)


def generate(f: flags.FlagValues, mesh: jax.sharding.Mesh) -> list[Path]:
    """Samples, decodes and writes what the flags ask for."""
    if bool(f.workdir) == bool(f.checkpoint):
        raise ValueError("give --workdir, a run, or --checkpoint, a file of PyTorch weights")
    if bool(f.inpaint) != bool(f.mask):
        raise ValueError("--inpaint IMAGE and --mask MASK go together")
    source = f.workdir or f.checkpoint
    model, params = sampling.load(
        source,
        ema_rate=f.ema_rate,
        step=f.step,
        mesh=mesh,
        decode_layers=f.decode_layers,
        num_heads=f.num_heads,
        num_classes=f.num_classes,
    )
    autoencoder = Autoencoder.load(f.vae, mesh) if f.vae else None
    if autoencoder and autoencoder.module.latent_channels != model.network.in_channels:
        raise ValueError(
            f"--vae {f.vae} decodes {autoencoder.module.latent_channels} channels, {model.name} "
            f"makes {model.network.in_channels}"
        )
    given = {
        name: value
        for name in ("cfg_scale", "cfg_power", "guided_channels", "sampler", "steps", "clip")
        if (value := getattr(f, name)) is not None
    } | {"eta": f.eta}
    options = sampling.resolve_options(model, **given)
    # Before the work: an output that cannot be written would lose it.
    Path(f.output).parent.mkdir(parents=True, exist_ok=True)
    settings = given | {
        "labels": f.labels or None, "num_samples": f.num_samples, "key": f.seed,
        "batch_size": f.batch_size, "mesh": mesh, "progress": True,
    }  # fmt: skip
    about = vars(options) | {"seed": f.seed, "ema_rate": f.ema_rate, "vae": f.vae}
    if f.inpaint:
        samples = paint(model, params, f.inpaint, f.mask, autoencoder, **settings)
        labels = np.full(len(samples), model.network.num_classes)
        about |= {"inpainted": f.inpaint, "mask": f.mask}
    else:
        samples = sampling.sample(model, params, **settings)
        if autoencoder:
            samples = autoencoder.decode(samples, f.vae_batch_size, f.vae_tile_size)
    if f.labels or not f.inpaint:
        labels = sampling.resolve_labels(model, f.labels or None, len(samples))
    return write(model, samples, labels, f.output, **about) if jax.process_index() == 0 else []


def define_flags(f: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("workdir", None, "The run to sample from.", flag_values=f)
    flags.DEFINE_string(
        "checkpoint", None, "Or PyTorch weights: .pt, .safetensors or hf://O/R/F.", flag_values=f
    )
    flags.DEFINE_integer(
        "decode_layers", 2, "Decoder depth of an MDT v1 among such weights.", flag_values=f
    )
    flags.DEFINE_integer(
        "num_heads", None, "Heads of a DiT of no known width among such weights.", flag_values=f
    )
    flags.DEFINE_integer(
        "num_classes", None, "Settles whether their last label row is a class.", flag_values=f
    )
    flags.DEFINE_string(
        "vae", None, "Decoder of latents: ema, mse, or a file or folder of one.", flag_values=f
    )
    flags.DEFINE_integer("vae_batch_size", 16, "Images decoded at a time.", flag_values=f)
    flags.DEFINE_integer(
        "vae_tile_size", None, "Side in latents of tiles, for very large images.", flag_values=f
    )
    flags.DEFINE_string("inpaint", None, "A picture to paint into, with --mask.", flag_values=f)
    flags.DEFINE_string(
        "mask", None, "A picture of its size, white where it is to be painted.", flag_values=f
    )
    flags.DEFINE_string("output", "samples", "Where to: OUTPUT.npz and OUTPUT.png.", flag_values=f)
    flags.DEFINE_integer(
        "num_samples", None, "How many; labels are repeated to that many.", flag_values=f
    )
    flags.DEFINE_list(
        "labels", [], "Classes by number or name; all in turn by default.", flag_values=f
    )
    flags.DEFINE_integer(
        "seed", 0, "Of the noise; sample i depends on it and i alone.", flag_values=f
    )
    flags.DEFINE_float(
        "cfg_scale", None, "Guidance scale, 1 for none; the run's by default.", flag_values=f
    )
    flags.DEFINE_float(
        "cfg_power", None, "Exponent of the power-cosine scale; 0: constant.", flag_values=f
    )
    flags.DEFINE_integer(
        "guided_channels", None, "Channels that are guided; the run's.", flag_values=f
    )
    flags.DEFINE_string(
        "steps", None, "Steps, or a respacing (ddim50, 10,15,20); the run's.", flag_values=f
    )
    flags.DEFINE_enum("sampler", None, ["ddpm", "ddim"], "The run's by default.", flag_values=f)
    flags.DEFINE_bool(
        "clip", None, "Whether x0 is clipped to [-1, 1]; the run's by default.", flag_values=f
    )
    flags.DEFINE_float("eta", 0.0, "DDIM's: 0 deterministic, 1 ancestral.", flag_values=f)
    flags.DEFINE_float(
        "ema_rate", None, "Which average; the run's first by default.", flag_values=f
    )
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.", flag_values=f)
    flags.DEFINE_integer(
        "mesh_fsdp", 1, "Devices that share one copy of the parameters.", flag_values=f
    )
    flags.DEFINE_integer(
        "mesh_tensor", 1, "Devices that share each head and hidden layer.", flag_values=f
    )
    flags.DEFINE_integer("batch_size", 256, "Samples at a time, over all devices.", flag_values=f)


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
