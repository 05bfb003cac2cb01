"""The config.json of a published model: what its weights are, how they are sampled and trained.

docs/hub.md has the format. What a reader would compute otherwise is refused where it is not known;
what only tells of the training is passed over. No path of the machine that wrote it is in it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import mdt_jax
from mdt_jax import config as config_lib
from mdt_jax.basics import ranges
from mdt_jax.basics.names import printable
from mdt_jax.basics.places import read_text
from mdt_jax.convert.architecture import Architecture
from mdt_jax.diffusion.options import SAMPLER_OPTIONS
from mdt_jax.diffusion.samplers import SAMPLERS
from mdt_jax.models.latent_space import AUTOENCODERS, LatentSpace
from mdt_jax.weights.errors import WeightsError

CONFIG = "config.json"
FORMAT = "mdt_jax"  # what it calls the format
VERSION = 1  # of the format; a reader refuses a later one
NO_LICENSE = "unknown"  # as the hub spells that none is stated

_PROCESS = ("schedule", "num_timesteps", "prediction", "variance")
_SETTINGS = (
    *("seed", "batch_size", "accumulation_steps", "label_dropout"),
    *("masking", "optimizer", "schedule"),
)
_DIFFUSION_SETTINGS = ("loss", "min_snr", "timestep_sampler")
_DATA = ("name", "split", "class_order", "labels", "crop", "flip")
_KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
# The types that values of `Architecture`'s fields may have in JSON.
_FIELDS: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)
}  # fmt: skip
_AGAIN = "fetch the folder again"


def describe(
    config: ConfigDict,
    architecture: Architecture,
    *,
    step: int = 0,
    class_names: Sequence[str] = (),
    latents: LatentSpace | None = None,
    license: str = NO_LICENSE,
    num_examples: int | None = None,
    is_run: bool = True,
) -> dict[str, Any]:
    """The values of config.json, but for its "weights"; `docs/hub.md` says what they mean.

    Args:
      config: the run's, or that of weights from elsewhere.
      architecture: the network's sizes.
      step: training steps behind the weights, 0 if not known.
      class_names: names of the classes.
      latents: the latents it was trained on; None for pixels, or where it is not known.
      license: by the hub's name of it.
      num_examples: of the training data; None if not known.
      is_run: whether the config is that with which the weights were trained, rather than the
        authors' recipe for weights from elsewhere.
    """
    values = config_lib.to_json(config)
    training: dict[str, Any] = {"step": step, "ema_rate": values["ema_rates"][0]}
    training |= {"data": None, "init_from": None, "settings": None}
    if is_run:
        data = {key: values["data"][key] for key in _DATA}
        settings = {key: values[key] for key in _SETTINGS}
        settings["diffusion"] = {key: values["diffusion"][key] for key in _DIFFUSION_SETTINGS}
        training["data"] = data | {"num_examples": num_examples}
        training["init_from"] = _public(values["init_from"]) or None
        training["settings"] = settings
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "mdt_jax_version": mdt_jax.__version__,
        "model": architecture.name,
        "architecture": dataclasses.asdict(architecture),
        "process": {key: values["diffusion"][key] for key in _PROCESS},
        "sampling": {name: values["sample"][name] for name in SAMPLER_OPTIONS},
        "compute_dtype": values["model"]["dtype"],
        "class_names": list(class_names),
        "latents": _public_latents(latents),
        "license": license,
        "training": training,
    }


def config_of(described: Mapping[str, Any]) -> ConfigDict:
    """The config that a reader makes of `describe`'s values."""
    return _config(described, _architecture(described))


def parse(
    path: Path, described: Mapping[str, Any]
) -> tuple[Architecture, ConfigDict, tuple[str, ...], LatentSpace | None]:
    """The architecture, a run's config, the classes' names and the latents of a config.json.

    Args:
      path: the file, for messages.
      described: from `read_config`.

    Raises:
      WeightsError: values that cannot be, or do not go together; one line names the first.
    """
    try:
        architecture = _architecture(described)
        config = _config(described, architecture)
        latents = described["latents"]
        latents = None if latents is None else LatentSpace.from_json(latents)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = printable(" ".join(str(error).split()))
        raise WeightsError(f"{path}: {said}; {_AGAIN}") from error
    names, classes = tuple(described["class_names"]), architecture.num_classes
    if names and len(names) != classes:
        raise WeightsError(
            f"{path}: class_names has {len(names)} names, and the model {classes} classes; {_AGAIN}"
        )
    if latents and latents.channels != architecture.in_channels:
        raise WeightsError(
            f"{path}: latents.channels is {latents.channels}, and architecture.in_channels "
            f"{architecture.in_channels}; {_AGAIN}"
        )
    return architecture, config, names, latents


def _public(place: str) -> str:
    """A place as others may read it: the address of a repository, or a file's or folder's name."""
    return place if place.startswith("hf://") else Path(place).name


def _public_latents(latents: LatentSpace | None) -> dict[str, Any] | None:
    if latents is None:
        return None
    known = latents.autoencoder in AUTOENCODERS
    name = latents.autoencoder if known else _public(latents.autoencoder)
    return dataclasses.replace(latents, autoencoder=name).to_json()


def read_config(source: str, path: Path) -> dict[str, Any]:
    """The values of a config.json whose format, version and types are right.

    Args:
      source: the folder as it was asked for, for messages.
      path: the file, which need not be there.

    Raises:
      WeightsError: it is of another format, of a later version, or damaged.
    """
    way_out = "give a folder that tools/push_to_hub.py wrote, or a file of weights"
    if not path.exists():
        raise WeightsError(
            f"{source} is no folder that mdt_jax wrote: it holds no {CONFIG}; {way_out}"
        )
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise WeightsError(f"{path} is not JSON: {said}; {_AGAIN}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        kind = values.get("_class_name") if isinstance(values, dict) else None
        of = f"it is of a {kind} of diffusers'" if kind else f'it does not say "format": "{FORMAT}"'
        raise WeightsError(f"{path} is not of a folder that mdt_jax wrote: {of}; {way_out}")
    version = values.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise WeightsError(f"{path}: format_version {version!r} is no whole number from 1 on")
    if version > VERSION:
        raise WeightsError(
            f"{path} is of version {version} of the format, and mdt_jax {mdt_jax.__version__} "
            f"reads versions up to {VERSION}; install a newer mdt_jax"
        )
    _check_kinds(path, values)
    return values


def _check_kinds(path: Path, values: Mapping[str, Any]) -> None:
    """Refuses a config.json that lacks a value, or has one of a wrong kind."""
    parts: dict[str, type] = {
        "architecture": dict,
        "process": dict,
        "sampling": dict,
        "class_names": list,
    }
    parts |= {"license": str, "training": dict, "weights": dict, "compute_dtype": str}
    wanted: dict[str, type] = parts | {"weights.sha256": str, "training.step": int}
    for name, kind in wanted.items():
        value: Any = values
        for key in name.split("."):
            if key not in value:
                raise WeightsError(f"{path}: {name} is missing; {_AGAIN}")
            value = value[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise WeightsError(f"{path}: {name} is {_short(value)}, not {_KINDS[kind]}; {_AGAIN}")
    if "latents" not in values:
        raise WeightsError(f"{path}: latents is missing; {_AGAIN}")
    if not all(isinstance(name, str) for name in values["class_names"]):
        raise WeightsError(f"{path}: class_names holds what is no text; {_AGAIN}")
    if fault := ranges.range_of("--step").fault(values["training"]["step"]):
        raise WeightsError(f"{path}: training.step {fault}; {_AGAIN}")


def _short(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= 40 else f"{text[:40]}…"


def _architecture(described: Mapping[str, Any]) -> Architecture:
    sizes = dict(described["architecture"])
    for field in dataclasses.fields(Architecture):
        if field.name not in sizes:
            raise ValueError(f"architecture.{field.name} is missing")
        value = sizes[field.name]
        kinds = _FIELDS[str(field.type)]
        if not isinstance(value, kinds) or (isinstance(value, bool) and field.type != "bool"):
            raise ValueError(
                f"architecture.{field.name} is {_short(value)}, which is no {field.type}"
            )
    if unknown := sizes.keys() - {field.name for field in dataclasses.fields(Architecture)}:
        raise ValueError(f"architecture.{min(unknown)} is unknown to this version of mdt_jax")
    return Architecture(**sizes | {"mlp_ratio": float(sizes["mlp_ratio"])})


def _config(described: Mapping[str, Any], a: Architecture) -> ConfigDict:
    """A run's config of what a config.json says; raises ValueError or TypeError where it cannot."""
    config = config_lib.default_config()
    sizes = a.settings()
    null = sizes.pop("null_class")
    learned = sizes.pop("learn_variance")
    config.model.update(sizes | {"name": a.family, "dtype": described["compute_dtype"]})
    if a.name != a.family:  # the name says the sizes
        own = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")
        config.model.update(dict.fromkeys(own) | {"name": a.name})
    config_lib.apply_recipe(config)
    config.label_dropout = 0.1 if null else 0.0
    config.ema_rates = (described["training"].get("ema_rate") or config.ema_rates[0],)
    config.sample.every = 0
    if missing := [name for name in _PROCESS if name not in described["process"]]:
        raise ValueError(f"process.{missing[0]} is missing")
    _update(config, "diffusion", _known(described["process"], "process", _PROCESS))
    # An option that a folder lacks is younger than it, and has its default.
    _update(config, "sample", _known(described["sampling"], "sampling", tuple(SAMPLER_OPTIONS)))
    data = described["training"].get("data") or {}
    is_pixels = described["latents"] is None and a.in_channels in (1, 3)
    config.data.name = "folder" if is_pixels else "latents"
    _update(config, "data", {key: data[key] for key in _DATA if key in data})
    settings = described["training"].get("settings") or {}
    for key in _SETTINGS:
        if isinstance(settings.get(key), dict):
            _update(config, key, settings[key])
        elif key in settings:
            config[key] = settings[key]
    _update(config, "diffusion", settings.get("diffusion") or {})
    ranges.check_config(config)
    if config.sample.sampler not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sampling.sampler {config.sample.sampler!r} is unknown; known: {known}")
    if learned != (config.diffusion.variance == "learned_range"):
        raise ValueError(
            f"process.variance is {config.diffusion.variance!r}, and architecture.learn_variance "
            f"{learned}, which do not go together"
        )
    if null != (config.label_dropout > 0) and a.num_classes:
        raise ValueError(
            f"training.settings.label_dropout is {config.label_dropout}, and "
            f"architecture.null_class {null}, which do not go together"
        )
    config_lib.create_network(config)
    config_lib.create_diffusion(config)
    return config


def _known(values: Mapping[str, Any], part: str, names: Sequence[str]) -> dict[str, Any]:
    """The values of a part of config.json, all of which are known."""
    if unknown := sorted(values.keys() - set(names)):
        raise ValueError(f"{part}.{unknown[0]} is unknown to this version of mdt_jax")
    return dict(values)


def _update(config: ConfigDict, section: str, values: Mapping[str, Any]) -> None:
    """Sets the values of a section of a config that it has, each of its own type."""
    for key, value in values.items():
        if key not in config[section]:
            continue  # a setting of training that is newer, or gone
        value = tuple(value) if isinstance(value, list) else value
        try:
            config[section][key] = value
        except TypeError as error:
            kind = config[section].get_type(key)
            wanted = getattr(kind, "__name__", str(kind))
            raise ValueError(f"{section}.{key} is {_short(value)}, which is no {wanted}") from error
