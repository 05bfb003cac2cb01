"""What is known of a model beside its arrays: its architecture, config, latents, steps and names.

A run's checkpoint says it in its meta data, our own files of weights in their metadata, the
authors' by their names.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mdt_jax import config as config_lib
from mdt_jax.convert.architecture import Architecture
from mdt_jax.models import LatentTransformer
from mdt_jax.models.latent_space import STABLE_DIFFUSION, LatentSpace
from mdt_jax.weights.files import WeightFile, WeightsError

PIXEL_CHANNELS = (1, 3)  # of models of images; any other number is of latents
METADATA = "mdt_jax"  # the metadata key under which our .safetensors files describe themselves
# Files that the authors of MDT and DiT published, all for Stable Diffusion's latents.
_PUBLISHED = re.compile(
    r"hf://(shgao/MDT|facebook/DiT).*|(.*/)?(mdt_xl2_v\d+_ckpt|DiT-XL-2-\d+(x\d+)?)\.\w+"
)
# How a family's published weights are sampled, where that is not as `config.sample` has it.
_FAMILY_GUIDANCE: dict[str, dict[str, float | None]] = {
    "DiT": {"cfg_scale": 1.5, "cfg_power": None}
}


def latents_of_run(meta: Mapping[str, Any]) -> LatentSpace | None:
    """The latents that a checkpoint's run was trained on; None for pixels, or if it is not known.

    Runs from before this was kept were trained on latents of Stable Diffusion's scale. What
    converted weights were trained on is not known, unless their file said it.

    Args:
      meta: the checkpoint's meta data.

    Raises:
      ValueError: meta data that are damaged.
    """
    if "latents" in meta:
        return LatentSpace.from_json(meta["latents"]) if meta["latents"] else None
    channels = meta["config"]["model"]["in_channels"]
    if (channels in PIXEL_CHANNELS or "weights" in meta) and not meta.get("autoencoder"):
        return None
    return LatentSpace(channels=channels, stride=0, digest=meta.get("autoencoder") or "")


def latents_of_file(
    source: str, weights: WeightFile, own: Mapping[str, Any] | None, architecture: Architecture
) -> LatentSpace | None:
    """The latents of a file of weights: as it says, or those of the authors' by its name."""
    if own and "latents" in own:
        try:
            return LatentSpace.from_json(own["latents"]) if own["latents"] else None
        except ValueError as error:
            raise WeightsError(f"{weights.path}: {error}, in its metadata") from error
    published = (
        _PUBLISHED.fullmatch(source) and architecture.in_channels == STABLE_DIFFUSION.channels
    )
    return STABLE_DIFFUSION if published else None


def file_metadata(
    config: ConfigDict,
    class_names: Sequence[str],
    step: int,
    latents: LatentSpace | None = None,
) -> dict[str, str]:
    """The metadata with which a .safetensors file of ours describes itself to `read_pretrained`."""
    architecture = architecture_of(config_lib.create_network(config))
    described = {
        "architecture": dataclasses.asdict(architecture),
        "config": config_lib.to_json(config),
        "class_names": list(class_names),
        "step": step,
        "latents": latents.to_json() if latents else None,
    }
    return {"format": "pt", METADATA: json.dumps(described)}


def own_description(weights: WeightFile) -> dict[str, Any] | None:
    """The description that `file_metadata` made, None in a file of others."""
    if METADATA not in weights.metadata:
        return None
    try:
        described = json.loads(weights.metadata[METADATA])
        Architecture(**described["architecture"])
        config_lib.from_json(described["config"])
        described["step"], described["class_names"] = (
            int(described["step"]),
            [str(name) for name in described["class_names"]],
        )
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(
            f"{weights.path}: its metadata {METADATA!r} cannot be read ({error!r}); save the "
            "arrays again without it"
        ) from error
    return described


def average_item(workdir: str | Path, config: ConfigDict, ema_rate: float | None = None) -> str:
    """The checkpoint item of an average of a run's parameters, its first by default.

    Raises:
      ValueError: an average that the run does not keep.
    """
    rate = config.ema_rates[0] if ema_rate is None else ema_rate
    if rate not in config.ema_rates:
        kept = ", ".join(map(str, config.ema_rates))
        raise ValueError(f"{workdir} keeps no average of rate {rate}; it keeps {kept}")
    return f"ema_{rate}"


def step_of(name: str) -> int | None:
    """The training steps in a file name of the authors' or DiT's, None if there are none.

    modelNNNNNN.pt, ema_RATE_NNNNNN.pt, optNNNNNN.pt, NNNNNNN.pt
    """
    found = re.search(r"(?:model|opt|ema_[\d.]+_|^)(\d+)\.\w+$", Path(name).name)
    return int(found[1]) if found else None


def ema_rate_of(name: str) -> float | None:
    """The rate in a file name ema_RATE_NNNNNN.pt, None if there is none."""
    found = re.search(r"ema_(0\.\d+)_\d+\.\w+$", Path(name).name)
    return float(found[1]) if found else None


def architecture_of(model: LatentTransformer) -> Architecture:
    """The architecture of a module."""
    names = [field.name for field in dataclasses.fields(Architecture) if field.name != "family"]
    sizes: dict[str, Any] = {name: getattr(model, name, 0) for name in names}
    # The one row of an unconditional model's label table is its null row, whatever it was told.
    sizes["null_class"] = model.null_class or model.num_classes == 0
    return Architecture(family=type(model).__name__, **sizes)


def create_config(architecture: Architecture) -> ConfigDict:
    """A run's config for an architecture, with the authors' recipe and settings of sampling."""
    a = architecture
    config = config_lib.default_config()
    if a.name == a.family:
        sizes = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")
        config.model.update({size: getattr(a, size) for size in sizes})
    config.model.update(
        name=a.name,
        input_size=a.input_size,
        in_channels=a.in_channels,
        num_classes=a.num_classes,
    )
    if "decoder_depth" in a.settings():
        config.model.decoder_depth = a.decoder_depth
    config_lib.apply_recipe(config)
    config.label_dropout = 0.1 if a.null_class else 0.0
    config.diffusion.variance = "learned_range" if a.learn_variance else "fixed_large"
    config.data.name = "latents"
    config.sample.every = 0
    config.sample.update(_FAMILY_GUIDANCE.get(a.family, {}))
    if a.in_channels in PIXEL_CHANNELS:
        config.sample.update(clip=True, guided_channels=None)
    if not a.num_classes or not a.null_class:
        config.sample.cfg_scale = 1.0
    return config
