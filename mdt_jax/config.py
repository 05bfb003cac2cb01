"""The settings of a run: every key with its default, the recipes, and a config's model."""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from mdt_jax.basics import ranges
from mdt_jax.diffusion import GaussianDiffusion, NoiseSchedule
from mdt_jax.diffusion.options import SAMPLER_OPTIONS
from mdt_jax.models import LatentTransformer, create_model
from mdt_jax.models.latent_space import AUTOENCODERS, STABLE_DIFFUSION
from mdt_jax.models.registry import FAMILIES, family_class


class Settings(ConfigDict):
    """A config, or a section of one: whole numbers can be written as one likes, 256 or 1e6.

    So can those inside a sequence (`ranges.WHOLE_SEQUENCES`). A fraction, such as 1.5, is a
    TypeError where the number stands alone; `ranges.check_config` refuses it in a sequence.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        """As ConfigDict has it, through which every other way of setting goes."""
        kind = self.get_type(key) if key in self else None
        if kind in (int, int | str):
            value = ranges.as_whole(value)
            if self.is_type_safe and isinstance(value, float):
                raise TypeError(f"{key} {value}: it takes a whole number, such as 256 or 1e6")
        elif key in ranges.WHOLE_SEQUENCES and isinstance(value, list | tuple):
            value = tuple(map(ranges.as_whole, value))
        super().__setitem__(key, value)


def default_config() -> ConfigDict:
    """Every setting of `mdt_jax.train` with its default; setting an unknown key is an error."""
    # Types of settings that are None by default. A shared placeholder would be one value for all.
    integer, number = lambda: config_dict.placeholder(int), lambda: config_dict.placeholder(float)
    config = Settings()
    config.seed = 0  # seeds the parameters, the order of the data and every draw of training
    config.num_steps = 400_000  # length of the run
    config.batch_size = 256  # over all devices and processes
    config.accumulation_steps = 1  # microbatches a step: more need less memory
    config.ema_rates = (0.9999,)  # averages of the parameters; the first is sampled and evaluated
    config.label_dropout = 0.1  # probability of training a sample without its label, for guidance

    # Fine-tuning: the weights to start from, a .pt or .safetensors file, hf://OWNER/REPO/FILE or a
    # workdir. Classes, resolution and (v1) decoder depth may differ. "": random weights.
    config.init_from = ""

    config.model = Settings()
    config.model.name = "MDTv2-XL/2"  # or a family ("MDT", "MDTv2", "DiT") with the sizes below
    config.model.input_size = 32  # side of the latents (an eighth of the image's) or images
    config.model.in_channels = 4  # 4: latents; 3 or 1: colour or grey images
    config.model.num_classes = 1000  # 0: unconditional; -1: as many as the data have
    # Sizes of the network; None: those that the name stands for.
    config.model.patch_size = integer()
    config.model.hidden_size = integer()
    config.model.depth = integer()
    config.model.num_heads = integer()
    config.model.mlp_ratio = number()
    config.model.decoder_depth = integer()
    config.model.dtype = "auto"  # bfloat16 on TPU and GPU, float32 on CPU
    # The computation of the blocks: "plain", "pallas" (TPU) or "cudnn" (GPU, bfloat16). "auto":
    # "pallas" on a TPU where the model's shapes allow it, else "plain".
    config.model.kernels = "auto"
    config.model.remat = "none"  # "dots", "full": recompute activations, to need less memory
    config.model.scan_unroll = 1  # layers compiled one by one: more are faster, and compile slower

    config.masking = Settings()  # MDT's masked pass; DiT has none
    config.masking.ratio = 0.3  # share of the tokens that is masked
    config.masking.ratio_span = 0.2  # each step draws from [ratio, ratio + ratio_span)
    config.masking.masked_pass = True  # False: full passes alone, to see what masking does

    config.diffusion = Settings()
    config.diffusion.schedule = "linear"  # noise by timestep; or "squared_cosine"
    config.diffusion.num_timesteps = 1000
    config.diffusion.prediction = "epsilon"  # the model's output; or "x0", "velocity"
    config.diffusion.variance = "learned_range"  # or "fixed_small", "fixed_large"
    config.diffusion.loss = "mse"  # or "rescaled_mse", "kl", "rescaled_kl"
    config.diffusion.min_snr = number()  # γ of min-SNR weighting; None: plain MSE
    config.diffusion.timestep_sampler = "uniform"  # or "loss_second_moment": by recent losses

    config.optimizer = Settings()
    config.optimizer.name = "adan"  # or "adamw", "adam"
    config.optimizer.learning_rate = 3e-4  # the highest of the schedule
    config.optimizer.weight_decay = 0.0
    config.optimizer.betas = config_dict.placeholder(tuple)  # None: the optimiser's defaults
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = number()  # global norm of the gradient; None: no clipping

    config.schedule = Settings()  # the learning rate by step
    config.schedule.name = "constant"  # or "linear", "cosine" (both to 0), "step"
    config.schedule.warmup_steps = 0  # steps of linear growth from 0
    config.schedule.boundaries = ()  # "step": the steps at which the rate is multiplied by factor
    config.schedule.factor = 0.1

    config.mesh = Settings()  # devices along each axis; -1: all that are left
    config.mesh.data = -1  # splits the batch
    config.mesh.fsdp = 1  # splits the batch and the parameters
    config.mesh.tensor = 1  # splits heads and hidden units

    config.data = Settings()
    # "digits", "fashion_mnist", "folder", "latents", "npy" or "tfds:NAME".
    config.data.name = "digits"
    # digits: or "heldout", "all"; fashion_mnist: or "test"; tfds: any split of the data set
    config.data.split = "train"
    config.data.path = ""  # the folder of images, latents, npy files, or TFDS data sets (or one)
    config.data.class_order = "string"  # or "numeric": how a folder's class names are sorted
    config.data.labels = "auto"  # of a folder: or "file_names", "sub_folders", "none" (no classes)
    config.data.crop = "center"  # or "random": ADM's random crop
    config.data.flip = True  # mirror half of the images
    config.data.on_bad_image = "error"  # "skip": the next readable image takes its place
    # "skip" ends the run when one process, since its start, has met more bad images than this
    # fraction of the data set.
    config.data.max_bad_fraction = 0.01
    config.data.num_workers = 0  # processes that read; 0: threads
    config.data.read_ahead = 4  # batches prepared before they are needed

    config.log_every = 100  # steps between lines of metrics.jsonl
    config.log = Settings()  # where the same lines, and grids of samples, go besides
    # Weights & Biases (pip install -e ".[wandb]"): the name of the project; True: "mdt_jax".
    config.log.wandb = config_dict.FieldReference(False, field_type=bool | str)
    config.profile_steps = ()  # (100, 105): a trace of these steps for XProf, in WORKDIR/profile
    config.checkpoint_every = 5_000  # steps between checkpoints
    config.keep_last = 3  # checkpoints kept
    config.keep_every = integer()  # checkpoints at its multiples are kept for ever; None: none are

    config.checkpoint = Settings()  # what each process keeps for itself, beside the shared ones
    config.checkpoint.local_every = 0  # steps between local checkpoints; 0: none
    config.checkpoint.local_dir = "/dev/shm"  # on every machine; memory there, or a local disk

    config.watchdog = Settings()  # ends a run that hangs, names what is slow
    # A step that takes longer than `factor` times the median and than `least_seconds` ends the run
    # with status 1, the stacks of all threads in the log. factor 0: no step does.
    config.watchdog.factor = 20.0
    config.watchdog.least_seconds = 300.0  # a tenth of it waiting for one batch is told
    # A process whose own part of a step (input, handing over) takes so many times the others'
    # median is named in the log. 0: none is.
    config.watchdog.slow = 1.5
    config.watchdog.window = 100  # steps whose medians are compared

    config.sample = Settings()  # sampling while training, and the defaults of mdt_jax.sample
    config.sample.every = 5_000  # steps between grids of EMA samples; 0: none
    config.sample.num_samples = 16  # samples in a grid
    # sampler, steps, cfg_scale and the other options of a sampler: see diffusion/options.py.
    for name, option in SAMPLER_OPTIONS.items():
        # A reference keeps its type while it is None, for flags that set it again.
        reference = config_dict.FieldReference(option.config, field_type=option.kind)
        plain = isinstance(option.kind, type) and not option.none
        config.sample[name] = option.config if plain else reference

    config.eval_every = 0  # steps between judgements of EMA samples (and at the end); 0: none
    config.eval = Settings()  # how samples are judged
    config.eval.num_samples = 5_000  # classes in turn; published FIDs are of 50,000
    config.eval.batch_size = 256  # samples at a time, over all devices
    config.eval.seed = 0  # seed of the noise, the same at every judgement
    # The sampler's options; None: config.sample's value.
    for name, option in SAMPLER_OPTIONS.items():
        config.eval[name] = config_dict.placeholder(option.kind)
    # The network whose features are compared: "inception", or "classifier", a small one trained on
    # the training images (labelled, up to 64 pixels). "auto": inception if its weights are given,
    # else the classifier if it can be trained.
    config.eval.evaluator = "auto"
    config.eval.inception = ""  # weights of the FID Inception-v3: a folder or a file
    # npz in ADM's layout, or a folder; "" with the classifier: the training images
    config.eval.reference = ""
    # Decoder of latents, for judging and for grids: "ema" (published numbers'), "mse", "sdxl",
    # "sd3", "flux", "dc-ae-f32", "dc-ae-f64", or a path.
    config.eval.vae = ""
    return config.lock()


# The authors' recipes by family: MDT's and DiT's, for families without one of their own, has AdamW
# without weight decay, plain MSE and a fixed mask ratio; MDTv2's has Adan, clipped to norm 1,
# min-SNR weights and a mask ratio drawn per step.
DEFAULT_RECIPE: dict[str, dict[str, Any]] = {
    "optimizer": {"name": "adamw", "learning_rate": 1e-4, "clip_norm": None},
    "diffusion": {"min_snr": None},
    "masking": {"ratio_span": 0.0},
}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "MDTv2": {
        "optimizer": {"name": "adan", "learning_rate": 3e-4, "clip_norm": 1.0},
        "diffusion": {"min_snr": 5.0},
        "masking": {"ratio_span": 0.2},
    },
}


def apply_recipe(config: ConfigDict) -> ConfigDict:
    """Sets optimiser, loss weighting and masking to those of the authors' runs of the family."""
    family = config.model.name.partition("-")[0]
    for section, values in RECIPES.get(family, DEFAULT_RECIPE).items():
        config[section].update(values)
    return config


def parse_argument(argument: str, **defaults: str) -> dict[str, str]:
    """The argument of a config file, "MODEL,KEY=VALUE" with each part optional, by key.

    Args:
      argument: the text after the file's name and a colon, such as "MDTv2-XL/2,vae=sdxl".
      **defaults: the keys that there are, with their defaults; "model" is the part without a key.

    Raises:
      ValueError: a key that is not among them, or one that is given twice.
    """
    given: dict[str, str] = {}
    for part in filter(None, argument.split(",")):
        key, value = part.split("=", 1) if "=" in part else ("model", part)
        if key not in defaults or key in given:
            problem = "is given twice" if key in given else "is unknown"
            raise ValueError(
                f"the config's argument {argument!r}: {key} {problem}; it is MODEL,"
                + ",".join(f"{name}={name.upper()}" for name in defaults if name != "model")
            )
        given[key] = value
    return defaults | given


def config_beside(file: str, name: str) -> Callable[..., ConfigDict]:
    """The `get_config` of another config in a config's folder, to build on, wherever that is.

    Args:
      file: the config's `__file__`.
      name: the other's name, without ending.
    """
    return runpy.run_path(str(Path(file).with_name(f"{name}.py")))["get_config"]


def apply_autoencoder(config: ConfigDict, name: str, image_size: int) -> ConfigDict:
    """Sets the model's inputs to the latents of a published autoencoder.

    Other latents than Stable Diffusion's are guided on all channels, and `eval.vae` decodes them.
    A stride of 32 or more leaves so few latents that each is a token, as in the paper that has it
    (Chen et al. 2025, https://arxiv.org/abs/2410.10733).

    Args:
      config: is changed.
      name: a key of `AUTOENCODERS`.
      image_size: side of the images in pixels.

    Raises:
      ValueError: an unknown name, or images that it does not divide into latents.
    """
    if name not in AUTOENCODERS:
        raise ValueError(f"vae={name} is unknown; known: {', '.join(AUTOENCODERS)}")
    space = AUTOENCODERS[name]
    if image_size % space.stride:
        raise ValueError(f"vae={name} takes multiples of {space.stride} pixels, not {image_size}")
    config.model.update(input_size=image_size // space.stride, in_channels=space.channels)
    if dataclasses.replace(space, autoencoder="") != STABLE_DIFFUSION:
        config.sample.guided_channels = None
        config.eval.vae = name
    if space.stride >= 32:
        config.model.patch_size = 1
    return config


def with_classes(config: ConfigDict, class_names: Sequence[str]) -> ConfigDict:
    """A copy of the config with as many classes as there are names.

    Without names the model becomes unconditional, without label dropout and guidance.
    """
    config = config.copy_and_resolve_references()
    config.model.num_classes = len(class_names)
    if not class_names:
        config.label_dropout = 0.0
        config.sample.cfg_scale = 1.0
    return config


def has_decoder(config: ConfigDict) -> bool:
    """Whether the blocks of a config's model end in a decoder, as MDT's and MDTv2's do."""
    family = config.model.name.partition("-")[0]
    return family not in FAMILIES or hasattr(family_class(family), "decoder_depth")


def has_masked_pass(config: ConfigDict) -> bool:
    """Whether a config's model has MDT's masked pass."""
    family = config.model.name.partition("-")[0]
    return family not in FAMILIES or family_class(family).supports_masking


def create_network(config: ConfigDict) -> LatentTransformer:
    """The network of a config; raises ValueError for settings that do not fit each other."""
    settings = {k: v for k, v in config.model.items() if v is not None}
    name, dtype = settings.pop("name"), settings.pop("dtype")
    if not has_decoder(config):
        settings.pop("decoder_depth", None)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype {dtype!r} is unknown; known: auto, bfloat16, float32")
    learned = config.diffusion.variance == "learned_range"
    # Without label dropout a null class would not be trained.
    null = config.label_dropout > 0
    settings |= {"dtype": jnp.dtype(dtype), "learn_variance": learned, "null_class": null}
    try:
        return create_model(name, **settings)
    except ValueError as error:
        raise ValueError(f"model.name {name!r}: {error}") from error


def create_diffusion(config: ConfigDict) -> GaussianDiffusion:
    """The diffusion process of a config, as it is trained."""
    d = config.diffusion
    return GaussianDiffusion(
        NoiseSchedule.create(d.schedule, d.num_timesteps),
        prediction=d.prediction,
        variance=d.variance,
        loss=d.loss,
        min_snr=d.min_snr,
    )


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON values (tuples become lists)."""
    return json.loads(config.to_json())


def from_json(values: dict[str, Any]) -> ConfigDict:
    """The config that `to_json` gave; keys that are newer than it have their defaults."""
    config = default_config()
    with config.unlocked():
        config.update(values)
    return config
