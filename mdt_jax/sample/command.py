"""The command `python -m mdt_jax.sample`, from its flags to the files it writes."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
from absl import flags, logging
from jaxtyping import PyTree

from mdt_jax import checkpoints, sampling
from mdt_jax import config as config_lib
from mdt_jax.basics.atomic import check_writable
from mdt_jax.parallel import sharding
from mdt_jax.parallel.command import command_ending, one_line
from mdt_jax.parallel.compilation_cache import use_compilation_cache
from mdt_jax.parallel.distributed import initialize_distributed
from mdt_jax.parallel.host_memory import use_main_heap
from mdt_jax.sample.drawing import chosen_labels, draw_samples
from mdt_jax.sample.flags import check_sample_flags, given_options, output_files
from mdt_jax.sample.painting import paint_picture
from mdt_jax.weights import descriptions, hub_folder, pretrained
from mdt_jax.weights.autoencoder import Autoencoder

# This command's flags for the keys of a config that messages may name.
FLAGS_OF_KEYS = {"mesh.fsdp": "--mesh_fsdp", "mesh.tensor": "--mesh_tensor"}


def generate(f: flags.FlagValues, mesh: jax.sharding.Mesh) -> list[Path]:
    """Samples, decodes and writes what the flags ask for; returns the files written."""
    check_sample_flags(f)
    if bool(f.workdir) == bool(f.checkpoint):
        raise ValueError("give --workdir, a run, or --checkpoint, a file or folder of weights")
    if bool(f.inpaint) != bool(f.mask):
        raise ValueError("--inpaint IMAGE and --mask MASK go together")
    if f.inpaint and f.label_order == "random":
        raise ValueError("--label_order random and --inpaint do not go together; give --labels")
    model, params, autoencoder = load_models(f, mesh)
    # Before the work: an output that cannot be written would lose it.
    check_writable(output_files(f.output)[0])
    make = paint_picture if f.inpaint else draw_samples
    return make(f, model, params, autoencoder, mesh)


def check_model(f: flags.FlagValues, mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Opens the flags' model as far as headers go, and its decoder; resolves options and classes.

    Returns:
      Height and width of the samples.

    Raises:
      ValueError, CheckpointError: it is not there or damaged, or a flag does not fit it.
    """
    if f.workdir and not hub_folder.is_one_set(f.workdir):
        step, meta = checkpoints.read_meta(f.workdir, f.step)
        config, names = config_lib.from_json(meta["config"]), meta["class_names"]
        descriptions.average_item(f.workdir, config, f.ema_rate)
        latents = descriptions.latents_of_run(meta)
    else:
        sizes = ("decode_layers", "num_heads", "num_classes", "input_size")
        found = pretrained.read_pretrained(
            f.workdir or f.checkpoint, **{name: f[name].value for name in sizes}
        )
        step, config, names = found.step, found.config, found.class_names
        latents = found.latents
    model = sampling.DiffusionModel.from_config(config, names, step, latents)
    sampling.resolve_options(model, **given_options(f))
    chosen_labels(f, model)
    check_writable(output_files(f.output)[0])
    autoencoder = load_autoencoder(f, model, mesh)
    factor = autoencoder.module.downsampling if autoencoder else 1
    height, width, _ = model.network.image_shape
    return height * factor, width * factor


def load_models(
    f: flags.FlagValues, mesh: jax.sharding.Mesh
) -> tuple[sampling.DiffusionModel, PyTree, Autoencoder | None]:
    """What --workdir or --checkpoint names, its parameters, and --vae, None if it is not given.

    Raises:
      ValueError: as `load_autoencoder`.
      CheckpointError, WeightsError: no run or no weights are there.
    """
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
    return model, params, load_autoencoder(f, model, mesh)


def load_autoencoder(
    f: flags.FlagValues, model: sampling.DiffusionModel, mesh: jax.sharding.Mesh
) -> Autoencoder | None:
    """--vae, None if it is not given, with the normalisation of the model's latents.

    Raises:
      ValueError: an autoencoder of other latents than the model's.
    """
    if not f.vae:
        return None
    autoencoder = Autoencoder.load(f.vae, mesh)
    if autoencoder.module.latent_channels != model.network.in_channels:
        raise ValueError(
            f"--vae {f.vae} decodes {autoencoder.module.latent_channels} channels, {model.name} "
            f"makes {model.network.in_channels}"
        )
    source = f.workdir or f.checkpoint
    if model.latents is None:
        logging.warning(
            "%s does not say which latents it was trained on; taken to be those of --vae %s. "
            "Published MDTs and DiTs are of Stable Diffusion's autoencoder",
            source,
            autoencoder.latents.describe(),
        )
        return autoencoder
    return autoencoder.for_latents(model.latents, whose=source, option=f"--vae {f.vae}")


def main(_: list[str]) -> None:
    """The command."""
    f = flags.FLAGS
    with command_ending(f, message=functools.partial(one_line, flags_of_keys=FLAGS_OF_KEYS)):
        check_sample_flags(f)
        initialize_distributed()
        use_main_heap()
        use_compilation_cache()
        for path in generate(f, sharding.create_mesh(fsdp=f.mesh_fsdp, tensor=f.mesh_tensor)):
            print(path)
