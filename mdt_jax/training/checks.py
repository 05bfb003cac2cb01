"""Checks before a run: its settings, its data, its processes, and the run that it continues."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from mdt_jax import config as config_lib
from mdt_jax import sampling
from mdt_jax.basics import ranges
from mdt_jax.basics.names import printable
from mdt_jax.data import Source, create_source
from mdt_jax.data.stream import CROPS, ON_BAD_IMAGE
from mdt_jax.diffusion.gaussian import LOSSES, PREDICTIONS, VARIANCES
from mdt_jax.diffusion.samplers import SAMPLERS
from mdt_jax.diffusion.schedules import BETAS
from mdt_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from mdt_jax.models.latent_space import LatentSpace, check_same_latents
from mdt_jax.parallel import sharding
from mdt_jax.parallel.devices import memory_bytes
from mdt_jax.parallel.distributed import check_agreement
from mdt_jax.training.wandb_log import project_of
from mdt_jax.weights.descriptions import latents_of_run


def data_record(source: Source, latents: LatentSpace | None) -> dict[str, Any]:
    """The part of a checkpoint's meta data that says which data the run was trained on.

    `check_data_unchanged` compares it when the run goes on.

    Args:
      source: the data.
      latents: the latents that they are; None for pixels.
    """
    return {
        "class_names": list(source.class_names),
        "num_examples": len(source),
        "latents": latents.to_json() if latents else None,
    }


def check_data_unchanged(meta: dict[str, Any], source: Source, workdir: Path) -> None:
    """Refuses, with ValueError, to go on with other classes or with other latents.

    Args:
      meta: meta data of the checkpoint to go on from, with `data_record` of its run; {} for a fresh
        run.
      source: the data now.
      workdir: the run's folder, for the message.
    """
    if not meta:  # a fresh run
        return
    way_out = "give the data it was trained on as data.path, or another --workdir"
    before, now = latents_of_run(meta), source.latent_space
    if before and now:
        check_same_latents(
            before, now, whose=f"the run {workdir}", other=source.name, way_out=way_out
        )
    kinds = {True: "latents", False: "pixels"}
    if "latents" in meta and "weights" not in meta and bool(before) != bool(now):
        raise ValueError(
            f"{source.name}: holds {kinds[bool(now)]}, and the run {workdir} was trained on "
            f"{kinds[bool(before)]}; {way_out}"
        )
    if "weights" in meta:  # converted weights, whose classes and examples are not known
        return
    names = zip_longest(meta["class_names"], source.class_names)
    for label, (before, now) in enumerate(names):
        if before != now:
            raise ValueError(
                f"{source.name}: class {label} is {now!r}, and was {before!r} when {workdir} was "
                f"trained; {way_out}"
            )
    if (count := meta.get("num_examples", len(source))) != len(source):
        logging.warning(
            "%s: %d examples, and %d when the run was last saved: the rest of this epoch is of "
            "another order",
            source.name,
            len(source),
            count,
        )


def check_processes_agree(config: ConfigDict, source: Source) -> None:
    """Refuses, with ValueError, processes of one job with different settings, classes or data.

    Each process may have its own `data.path`, `data.num_workers` and `data.read_ahead`.
    """
    settings = config_lib.to_json(config)
    for key in ("path", "num_workers", "read_ahead"):
        del settings["data"][key]
    names = {str(label): name for label, name in enumerate(source.class_names)}
    check_agreement({"config": settings, "class": names, "data": source.identity()})


def image_size(config: ConfigDict, source: Source) -> int | None:
    """The side in pixels that images are cropped to; None for latents, which are not cropped."""
    return None if source.latents else config.model.input_size


def with_classes_of_data(config: ConfigDict) -> ConfigDict:
    """The config with the data's number of classes where model.num_classes is -1."""
    if config.model.num_classes != -1:
        return config
    return config_lib.with_classes(config, create_source(config.data).class_names)


def check_data(config: ConfigDict, source: Source) -> None:
    """Refuses, with ValueError, data whose shape or classes do not fit the model.

    Data of fewer classes than the model's are told of: fine-tuning may mean that, a wrong data.path
    does not.
    """
    size, channels = config.model.input_size, config.model.in_channels
    wanted, given = (size, size, channels), tuple(source.image_shape)
    # Images are cropped to size, latents are not.
    if given != wanted if source.latents else given[-1] != channels:
        halved = source.latents and given[:-1] == wanted[:-1] and 2 * given[-1] == channels
        raise ValueError(
            f"data.name {config.data.name!r} gives {given}, the model takes {wanted}: "
            "set model.input_size and model.in_channels"
            + f"; or are its {channels} channels a latent's mean alone? Standard deviations must "
            "follow them, zeros if they are not known" * halved
        )
    classes, found = config.model.num_classes, len(source.class_names)
    if 0 < found < classes:
        logging.warning(
            "%s: the data have %d class(es), model.num_classes is %d: the other %d will not be "
            "trained; if that is not meant, set model.num_classes to %d, or data.path to all the "
            "data",
            *(printable(source.name), found, classes, classes - found, found),
        )
    if classes and found > classes:
        raise ValueError(f"the data have {found} classes, model.num_classes is {classes}")
    if classes and not found:
        raise ValueError(
            f"the data have no labels ({source.note or source.name}); model.num_classes is "
            f"{classes}, 0 would do, or data.labels 'file_names'"
        )


def check_memory(abstract: Any, mesh: jax.sharding.Mesh) -> None:
    """Refuses, with ValueError, a state that is larger than the devices' memory.

    Args:
      abstract: its shapes and shardings.
      mesh: the devices.
    """
    needed = sharding.bytes_per_device(abstract)
    known = [memory_bytes(device) for device in mesh.local_devices]
    room = min((size for size in known if size), default=None)
    if room is not None and needed > room:
        raise ValueError(
            f"the state (parameters, optimiser, EMA) takes {needed / 2**30:,.1f} GiB a device, "
            f"which has {room / 2**30:,.1f} GiB: take a smaller model, or more devices in mesh.fsdp"
        )


DIFFUSION_CHOICES = {
    "schedule": tuple(BETAS),
    "prediction": PREDICTIONS,
    "variance": VARIANCES,
    "loss": LOSSES,
    "timestep_sampler": TIMESTEP_SAMPLERS,
}
EVALUATORS = ("auto", "inception", "classifier")


def check_sampling(config: ConfigDict) -> None:
    """Refuses, with ValueError, options of `config.sample` that the model does not have."""
    try:
        sampling.resolve_options(sampling.DiffusionModel.from_config(config))
    except ValueError as error:
        raise ValueError(f"sample.{error}") from error


def check_schedule(config: ConfigDict) -> None:
    """Refuses, with ValueError, steps of the learning rate that the schedule can never take."""
    s = config.schedule
    if s.name == "step" and not s.boundaries:
        raise ValueError(
            "schedule.name 'step' has no schedule.boundaries, the steps at which the rate falls; "
            "give them, such as (100000, 125000), or schedule.name 'constant'"
        )
    if s.name == "step" and s.boundaries[0] < s.warmup_steps:
        raise ValueError(
            f"schedule.boundaries {tuple(s.boundaries)} begin before the end of the warm-up, "
            f"schedule.warmup_steps {s.warmup_steps}; set the first to {s.warmup_steps} or more"
        )


def check_settings(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Refuses, with ValueError, settings out of range, unknown choices and batches that do not fit.

    The message names the key and says which values would do. The ranges are `basics.ranges`'.
    """
    ranges.check_config(config)
    choices = {"crop": CROPS, "on_bad_image": ON_BAD_IMAGE}
    for key, known in choices.items():
        if config.data[key] not in known:
            raise ValueError(
                f"data.{key} {config.data[key]!r} is unknown; known: {', '.join(known)}"
            )
    for key, known in DIFFUSION_CHOICES.items():
        if config.diffusion[key] not in known:
            raise ValueError(
                f"diffusion.{key} {config.diffusion[key]!r} is unknown; known: {', '.join(known)}"
            )
    check_schedule(config)
    project_of(config)
    if config.sample.sampler not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sample.sampler {config.sample.sampler!r} is unknown; known: {known}")
    if config.eval.evaluator not in EVALUATORS:
        known = ", ".join(EVALUATORS)
        raise ValueError(f"eval.evaluator {config.eval.evaluator!r} is unknown; known: {known}")
    needed = {"pallas": "tpu", "cudnn": "gpu"}.get(config.model.kernels)
    if needed not in (None, platform := mesh.devices.flat[0].platform):
        raise ValueError(
            f"model.kernels {config.model.kernels!r} needs a {needed.upper()}, these devices are "
            f"{platform.upper()}s; 'auto' takes any"
        )
    shards = sharding.batch_shards(mesh)
    unit = shards * config.accumulation_steps
    if config.batch_size % unit:
        below, above = config.batch_size // unit * unit, -(-config.batch_size // unit) * unit
        fitting = " or ".join(str(size) for size in (below, above) if size)
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of {unit} = mesh.data × mesh.fsdp "
            f"({shards}) × accumulation_steps ({config.accumulation_steps}); {fitting} would be"
        )
