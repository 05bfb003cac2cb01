"""Samples from a run: `python -m mdt_jax.sample --workdir runs/digits --num_samples 64 --output s`.

Or from PyTorch weights, `--checkpoint mdt_xl2_v2_ckpt.pt --vae ema`; `--inpaint IMAGE --mask MASK`
paints the white part of a mask into a picture. Writes a PNG grid and an .npz in ADM's layout
(`arr_0` uint8 NHWC images, `arr_1` labels, the number of classes where there is none), both saying
what made them. `import mdt_jax; mdt_jax.sample(...)` does the same in Python.

Samples are written batch by batch into OUTPUT.parts/ (`sample_parts.py`), then joined: the same
command goes on where it was killed, to the same bits, and does nothing when all is there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from einops import reduce

from mdt_jax import checkpoints, sampling
from mdt_jax import config as config_lib
from mdt_jax.checkpoints import CheckpointError
from mdt_jax.diffusion import SAMPLERS
from mdt_jax.parallel import sharding
from mdt_jax.parallel.compilation_cache import use_compilation_cache
from mdt_jax.parallel.distributed import by_first_process, ending_together, initialize_distributed
from mdt_jax.sampling import images, inpainting
from mdt_jax.sampling.parts import Parts
from mdt_jax.weights import files as weight_files
from mdt_jax.weights import pretrained
from mdt_jax.weights.autoencoder import Autoencoder

GRID_IMAGES = 100  # at most, of the first samples


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
    npz, png = outputs(output)
    images.save_npz(npz, images.to_uint8(samples) if pixels else samples, labels, metadata)
    if not pixels:
        return [npz]
    images.save_png(png, images.image_grid(images.to_uint8(samples)), metadata)
    return [npz, png]


def draw(
    f: flags.FlagValues,
    model: sampling.DiffusionModel,
    params: Any,
    autoencoder: Autoencoder | None,
    mesh: jax.sharding.Mesh,
) -> list[Path]:
    """Samples the flags' classes, decodes them if there is an autoencoder, and writes them."""
    options = sampling.resolve_options(model, **given_options(f))
    labels = resolve_labels(f, model)
    batch_size = sampling.resolve_batch_size(f.batch_size, model, params, mesh, options)
    size = sampling.global_batch_size(batch_size, len(labels), mesh)
    shape = model.network.image_shape
    if autoencoder:
        factor, channels = autoencoder.module.downsampling, autoencoder.module.out_channels
        shape = (shape[0] * factor, shape[1] * factor, channels)
    pixels = shape[-1] in (1, 3)
    digests = by_first_process(lambda: [weights_digest(f, model), decoder_digest(autoencoder)])
    settings = describe(f, model, options, size, *digests)
    npz, png = outputs(f.output)
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
            batches = sampling.in_batches(
                sampling.compile_sampler(model, mesh, size, options),
                params,
                len(labels),
                lambda rows: (labels[rows],),
                key=f.seed,
                progress=True,
                done=set(done),
            )
            for first, samples in batches:
                if autoencoder:
                    samples = decode(f, autoencoder, samples, size)
                rows = images.to_uint8(samples, first) if pixels else samples
                by_first_process(functools.partial(parts.write, first, rows))
            about = vars(options) | {"seed": f.seed, "ema_rate": f.ema_rate, "vae": f.vae}
            about = {"model": model.name, "step": model.step, "label_order": f.label_order} | about
            by_first_process(lambda: finish(parts, labels, written, about))
        if not f.keep_parts:
            by_first_process(parts.remove)
    return written if jax.process_index() == 0 else []


def finish(parts: Parts, labels: np.ndarray, written: list[Path], about: dict[str, Any]) -> None:
    """Joins the parts into an .npz, after a grid of the first samples if they are images.

    Labels are text in a grid's metadata, and in that of an .npz that the grid shows all of.
    """
    npz, *grids = written
    shown = labels[:GRID_IMAGES].tolist()
    for png in grids:
        grid = images.image_grid(parts.first_samples(len(shown)))
        with parts.explained():
            images.save_png(png, grid, images.provenance(labels=shown, **about))
    said = images.provenance(labels=shown if len(shown) == len(labels) else None, **about)
    parts.join(npz, labels, {"metadata": said})


def outputs(output: str | Path) -> tuple[Path, Path]:
    """OUTPUT.npz and OUTPUT.png, of an --output with either ending or none; no URL."""
    if "://" in str(output):
        raise ValueError(f"--output {output} is a URL: mount the bucket (gcsfuse), give the path")
    stem = str(output).removesuffix(".png").removesuffix(".npz")
    return Path(f"{stem}.npz"), Path(f"{stem}.png")


def resolve_labels(f: flags.FlagValues, model: sampling.DiffusionModel) -> np.ndarray:
    """The class of every sample, in turn or drawn; sample i's does not depend on how many."""
    if f.label_order == "random":
        return sampling.draw_labels(model, f.labels or None, f.num_samples, key=f.seed)
    return sampling.resolve_labels(model, f.labels or None, f.num_samples)


def decode(
    f: flags.FlagValues, autoencoder: Autoencoder, latents: np.ndarray, batch_size: int
) -> np.ndarray:
    """A batch's images, or a last, smaller one's, through the same program as a whole one's."""
    padding = -len(latents) % min(f.vae_batch_size, batch_size)
    padded = np.pad(latents, [(0, padding), (0, 0), (0, 0), (0, 0)])
    return autoencoder.decode(padded, f.vae_batch_size, f.vae_tile_size)[: len(latents)]


def describe(
    f: flags.FlagValues,
    model: sampling.DiffusionModel,
    options: sampling.SamplerOptions,
    batch_size: int,
    weights: str,
    decoder: str | None,
) -> dict[str, Any]:
    """All that a sample's bits depend on, but the machine, under the flags' names."""
    ema_rate, source = f.ema_rate, f.workdir or f.checkpoint
    if ema_rate is None and not _is_file(source):
        _, meta = checkpoints.read_meta(source, model.step)
        ema_rate = config_lib.from_json(meta["config"]).ema_rates[0]
    network = model.network
    return {
        "model": model.name,
        "step": model.step,
        "ema_rate": ema_rate,
        "seed": f.seed,
        "label_order": f.label_order,
        "labels": sampling.resolve_classes(model, f.labels or None).tolist(),
        **vars(options),
        "steps": str(options.steps),
        "batch_size": batch_size,
        "vae": decoder,
        "vae_batch_size": f.vae_batch_size if decoder else None,
        "vae_tile_size": f.vae_tile_size if decoder else None,
        "dtype": np.dtype(network.dtype).name,
        **dataclasses.asdict(pretrained.architecture_of(network)),
        "weights": weights,
    }


def weights_digest(f: flags.FlagValues, model: sampling.DiffusionModel) -> str:
    """BLAKE2b of the file of weights, or of the seal of a run's checkpoint (which has digests)."""
    source = f.workdir or f.checkpoint
    if _is_file(source):
        path = weight_files.fetch(source)
    else:
        path = Path(source) / "checkpoints" / str(model.step) / "manifest.json"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _is_file(source: str) -> bool:
    return weight_files.is_weight_file(source) or Path(source).is_file()


def decoder_digest(autoencoder: Autoencoder | None) -> str | None:
    """BLAKE2b of an autoencoder's weights and scale, None without one."""
    if autoencoder is None:
        return None
    digest = hashlib.blake2b(f"{autoencoder.scale} {autoencoder.shift}".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(autoencoder.params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:32]


def paint(
    f: flags.FlagValues,
    model: sampling.DiffusionModel,
    params: Any,
    autoencoder: Autoencoder | None,
    mesh: jax.sharding.Mesh,
) -> list[Path]:
    """Paints the white part of --mask into --inpaint, the rest left exactly as it is; writes it."""
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
        resamples=f.resamples,
        masked_share=f.masked_share,
        **given_options(f),
    )
    painted = inpainting.paint(
        model, params, task, key=f.seed, batch_size=f.batch_size, mesh=mesh, progress=True
    )
    if autoencoder:
        decoded = autoencoder.decode(painted, f.vae_batch_size, f.vae_tile_size)
        painted = np.where(mask[..., None], decoded, image)
    about = vars(task.options) | {
        "resamples": task.resamples,
        "masked_share": task.masked_share,
        "inpainted": f.inpaint,
        "mask": f.mask,
        "seed": f.seed,
        "ema_rate": f.ema_rate,
        "vae": f.vae,
    }
    if jax.process_index() > 0:
        return []
    return write(model, painted, task.labels, f.output, **about)


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
    interval = {"cfg_interval": _numbers(f.cfg_interval)} if f.cfg_interval else {}
    return interval | {name: getattr(f, name) for name in names if getattr(f, name) is not None}


def _numbers(texts: list[str]) -> list[float]:
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise ValueError(
            f"--cfg_interval {','.join(texts)} is not LOW,HIGH, as in 0.1,0.7"
        ) from None


def load_autoencoder(
    f: flags.FlagValues, model: sampling.DiffusionModel, mesh: jax.sharding.Mesh
) -> Autoencoder | None:
    """--vae, None if it is not given; refuses one of other latents than the model's."""
    if not f.vae:
        return None
    if f.vae_batch_size < 1:
        raise ValueError(f"--vae_batch_size {f.vae_batch_size} is below 1")
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
    if f.inpaint and f.label_order == "random":
        raise ValueError("--label_order random and --inpaint do not go together; give --labels")
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
    return make(f, model, params, autoencoder, mesh)


SAMPLER_HELP = (
    "The run's by default. ddpm: ancestral, 100 to 250 steps, as published numbers are made. ddim: "
    "deterministic, 50 or more. heun: second order, two model calls a step, 10 to 25 steps (10 "
    "without --steps). dpm++: DPM-Solver++(2M), second order, 10 to 25 (20), evenly spaced in "
    "log(SNR). dpm++sde: its stochastic form, 20 to 50 (20)."
)
_LABEL_ORDER = functools.partial(flags.DEFINE_enum, enum_values=["in_turn", "random"])
_SAMPLER = functools.partial(flags.DEFINE_enum, enum_values=list(SAMPLERS))
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
    (flags.DEFINE_integer, "resamples", 4, "How often each step of painting is taken."),
    (flags.DEFINE_float, "masked_share", None, "Share of masked passes in painting; the model's."),
    (flags.DEFINE_string, "output", "samples", "Where to: OUTPUT.npz and OUTPUT.png."),
    (flags.DEFINE_bool, "keep_parts", False, "Keep OUTPUT.parts/, to raise num_samples later."),
    (flags.DEFINE_integer, "num_samples", None, "How many; labels are repeated to that many."),
    (flags.DEFINE_list, "labels", [], "Classes by number or name; all in turn by default."),
    (_LABEL_ORDER, "label_order", "in_turn", "in_turn, balanced, or random, drawn uniformly."),
    (flags.DEFINE_integer, "seed", 0, "Of noise and drawn labels; sample i depends on it and i."),
    (flags.DEFINE_float, "cfg_scale", None, "Guidance scale, 1 for none; the run's by default."),
    (flags.DEFINE_float, "cfg_power", None, "Exponent of the power-cosine scale; 0: constant."),
    (flags.DEFINE_list, "cfg_interval", [], "LOW,HIGH: fractions of the process that are guided."),
    (flags.DEFINE_integer, "guided_channels", None, "Channels that are guided; the run's."),
    (flags.DEFINE_string, "steps", None, "Steps, or a respacing (ddim50, 10,15,20, logsnr20)."),
    (_SAMPLER, "sampler", None, SAMPLER_HELP),
    (flags.DEFINE_bool, "clip", None, "Whether x0 is clipped to [-1, 1]; the run's by default."),
    (flags.DEFINE_float, "eta", 0.0, "DDIM's: 0 deterministic, 1 ancestral."),
    (flags.DEFINE_float, "ema_rate", None, "Which average; the run's first by default."),
    (flags.DEFINE_integer, "step", None, "Which checkpoint; the newest by default."),
    (flags.DEFINE_integer, "mesh_fsdp", 1, "Devices that share one copy of the parameters."),
    (flags.DEFINE_integer, "mesh_tensor", 1, "Devices that share each head and hidden layer."),
    (flags.DEFINE_integer, "batch_size", None, "Samples at a time, over all devices; what fits."),
)


def define_flags(f: flags.FlagValues) -> None:
    """The command's flags."""
    for define, name, default, text in FLAGS:
        define(name, default, help=text, flag_values=f)


def main(_: list[str]) -> None:
    """The command: one clear line and exit status 1 for what a user can mend."""
    f = flags.FLAGS
    with ending_together():
        try:
            initialize_distributed()
            use_compilation_cache()
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
