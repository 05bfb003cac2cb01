"""The settings of a run: every key with its default, the recipes, and what is refused at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from mdt_jax.diffusion import GaussianDiffusion, NoiseSchedule
from mdt_jax.models import LatentTransformer, create_model, masking

# What a run's parameters mean: changing one of these needs another workdir.
IDENTITY = (
    "seed", "init_from", "model", "diffusion", "masking", "label_dropout", "ema_rates", "data",
)  # fmt: skip
# Parts of those that only say how something is computed or read.
FREE = ("model.dtype", "model.kernels", "model.remat", "model.scan_unroll", "data.num_workers",
        "data.read_ahead", "data.path", "data.on_bad_image", "data.max_bad_fraction")  # fmt: skip


def default_config() -> ConfigDict:
    """Every setting of `mdt_jax.train`. An experiment changes some; an unknown key is an error."""
    # None until set. Each needs a placeholder of its own: a shared one is one value.
    integer, number = lambda: config_dict.placeholder(int), lambda: config_dict.placeholder(float)
    config = ConfigDict()
    config.seed = 0  # of parameters, data order and every draw of training
    config.num_steps = 400_000
    config.batch_size = 256  # global, over all devices and processes
    config.accumulation_steps = 1  # microbatches a step
    config.ema_rates = (0.9999,)  # the first is what is sampled and evaluated
    config.label_dropout = 0.1

    # Fine-tuning: weights to start from, a .pt or .safetensors file, hf://OWNER/REPO/FILE or a
    # workdir; classes, resolution and (v1) decoder depth may differ.
    config.init_from = ""

    config.model = ConfigDict()
    config.model.name = "MDTv2-XL/2"  # or a family ("MDT", "MDTv2", "DiT") with the sizes below
    config.model.input_size = 32  # side of the latents or images
    config.model.in_channels = 4
    config.model.num_classes = 1000  # 0: unconditional; -1: as many as the data have
    config.model.patch_size = integer()  # None: the name's
    config.model.hidden_size = integer()
    config.model.depth = integer()
    config.model.num_heads = integer()
    config.model.mlp_ratio = number()
    config.model.decoder_depth = integer()
    config.model.dtype = "auto"  # bfloat16 on TPU and GPU, float32 on CPU
    # "auto": "pallas" on TPU where it can be, else "plain"; "cudnn" on GPU, in bfloat16
    config.model.kernels = "auto"
    config.model.remat = "none"  # "dots", "full": less memory, more work
    config.model.scan_unroll = 1

    config.masking = ConfigDict()  # of MDT's masked pass; DiT has none
    config.masking.ratio = 0.3
    config.masking.ratio_span = 0.2  # drawn from [ratio, ratio + ratio_span) each step

    config.diffusion = ConfigDict()
    config.diffusion.schedule = "linear"
    config.diffusion.num_timesteps = 1000
    config.diffusion.prediction = "epsilon"
    config.diffusion.variance = "learned_range"
    config.diffusion.loss = "mse"
    config.diffusion.min_snr = number()  # γ of min-SNR weighting; None: plain MSE
    config.diffusion.timestep_sampler = "uniform"

    config.optimizer = ConfigDict()
    config.optimizer.name = "adan"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.0
    config.optimizer.betas = config_dict.placeholder(tuple)  # None: the optimiser's own
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = number()  # global norm; None: no clipping

    config.schedule = ConfigDict()  # of the learning rate
    config.schedule.name = "constant"
    config.schedule.warmup_steps = 0
    config.schedule.boundaries = ()  # "step": where the rate is multiplied by factor
    config.schedule.factor = 0.1

    config.mesh = ConfigDict()  # devices along each axis; -1: all that are left
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.data = ConfigDict()
    config.data.name = "digits"  # or "folder", "latents", "npy", "tfds:NAME"
    config.data.split = "train"
    config.data.path = (
        ""  # the folder: of images, latents, npy files, TFDS data sets or one of them
    )
    config.data.class_order = "string"  # or "numeric": how a folder's class names are sorted
    config.data.labels = "auto"  # of a folder; "file_names": CLASS_IMAGE.jpg; "none": no classes
    config.data.crop = "center"  # or "random": ADM's random crop
    config.data.flip = True
    config.data.on_bad_image = "error"  # "skip": the next readable image takes its place
    # Of the data set: the run stops when one process has met more bad images since it was started.
    config.data.max_bad_fraction = 0.01
    config.data.num_workers = 0
    config.data.read_ahead = 4

    config.log_every = 100
    config.profile_steps = ()  # (100, 105): a trace of these steps for XProf, in WORKDIR/profile
    config.checkpoint_every = 5_000
    config.keep_last = 3
    config.keep_every = integer()  # steps kept for ever are its multiples

    config.sample = ConfigDict()  # how this model is sampled, in training and by default after it
    config.sample.every = 5_000  # steps between grids of EMA samples; 0: none
    config.sample.num_samples = 16
    config.sample.sampler = "ddpm"
    config.sample.steps = 250
    config.sample.cfg_scale = 3.8
    config.sample.cfg_power = number()  # of the power-cosine scale; None: constant
    config.sample.cfg_power = 4.0
    config.sample.cfg_interval = ()  # (low, high), fractions of the process; (): all of it
    config.sample.guided_channels = integer()  # of the mean's; None: all
    config.sample.guided_channels = 3
    config.sample.clip = False  # x̂0 to [−1, 1]: for images, not latents

    config.eval_every = 0  # steps between judgements of EMA samples (and at the end); 0: none
    config.eval = ConfigDict()  # how; None: as config.sample has it
    config.eval.num_samples = 5_000  # classes in turn; published FIDs are of 50,000
    config.eval.batch_size = 256  # samples at a time, over all devices
    config.eval.seed = 0  # of the noise, the same at every judgement
    config.eval.sampler = config_dict.placeholder(str)
    config.eval.steps = integer()
    config.eval.cfg_scale = number()
    # "inception", or "classifier", a small one of the training images (labelled, up to 64 pixels);
    # "auto": inception where its weights are given, else the classifier where it can be.
    config.eval.evaluator = "auto"
    config.eval.inception = ""  # weights of the FID Inception-v3: a folder or a file
    config.eval.reference = ""  # npz in ADM's layout, or a folder; "", classifier: training images
    config.eval.vae = ""  # what decodes latents: "ema", as published numbers are, "mse", a path
    return config


def apply_recipe(config: ConfigDict) -> ConfigDict:
    """Sets the optimiser, loss weighting and masking that the authors trained a family with.

    MDT and DiT: AdamW without weight decay, lr 1e-4, plain MSE, a fixed mask ratio. MDTv2: Adan, lr
    3e-4, clipped to norm 1, min-SNR weights of 5, a mask ratio drawn per step.
    """
    if config.model.name.split("-")[0] == "MDTv2":
        config.optimizer.update(name="adan", learning_rate=3e-4, clip_norm=1.0)
        config.diffusion.min_snr = 5.0
        config.masking.ratio_span = 0.2
    else:
        config.optimizer.update(name="adamw", learning_rate=1e-4, clip_norm=None)
        config.diffusion.min_snr = None
        config.masking.ratio_span = 0.0
    return config


def with_classes(config: ConfigDict, class_names: Sequence[str]) -> ConfigDict:
    """The config with as many classes as there are names.

    Without any the model is unconditional, and has no label dropout.
    """
    config = config.copy_and_resolve_references()
    config.model.num_classes = len(class_names)
    if not class_names:
        config.label_dropout = 0.0
        config.sample.cfg_scale = 1.0
    return config


def create_network(config: ConfigDict) -> LatentTransformer:
    """The model of a config."""
    settings = {k: v for k, v in config.model.items() if v is not None}
    name, dtype = settings.pop("name"), settings.pop("dtype")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype {dtype!r} is unknown; known: auto, bfloat16, float32")
    learned = config.diffusion.variance == "learned_range"
    # Without label dropout a null class would be an untrained one.
    null = config.label_dropout > 0
    settings |= {"dtype": jnp.dtype(dtype), "learn_variance": learned, "null_class": null}
    return create_model(name, **settings)


def create_diffusion(config: ConfigDict) -> GaussianDiffusion:
    """The training process of a config."""
    d = config.diffusion
    return GaussianDiffusion(
        NoiseSchedule.create(d.schedule, d.num_timesteps),
        prediction=d.prediction,
        variance=d.variance,
        loss=d.loss,
        min_snr=d.min_snr,
    )


def kept_counts(
    config: ConfigDict, model: LatentTransformer
) -> tuple[tuple[int | None, ...], tuple[float, ...]]:
    """Numbers of kept tokens of the masked pass, and their probabilities; (None,) without one."""
    if not model.supports_masking:
        return (None,), (1.0,)
    return masking.kept_counts(model.num_tokens, config.masking.ratio, config.masking.ratio_span)


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())


def from_json(values: dict[str, Any]) -> ConfigDict:
    """A config from what `to_json` gave; keys newer than the run keep their defaults."""
    config = default_config()
    with config.unlocked():
        config.update(values)
    return config


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that decide what a run's parameters mean and differ, as "key: old, now new"."""

    def flatten(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {
            k: v for key, sub in value.items() for k, v in flatten(sub, f"{prefix}.{key}").items()
        }

    found = []
    for part in IDENTITY:
        before, now = flatten(old.get(part), part), flatten(new.get(part), part)
        for key in sorted(before.keys() | now.keys()):
            if key not in FREE and before.get(key) != now.get(key):
                found.append(f"{key}: {before.get(key)}, now {now.get(key)}")
    return found
