"""A model from weights of any kind: a PyTorch file, hf://OWNER/REPO/FILE, or a run's workdir."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mdt_jax import checkpoints
from mdt_jax import config as config_lib
from mdt_jax.convert import diffusers_dit
from mdt_jax.convert.architecture import (
    BUFFER,
    Architecture,
    UnknownWeights,
    identify,
    parameter_shapes,
)
from mdt_jax.convert.transformers import from_torch
from mdt_jax.models.latent_space import LatentSpace
from mdt_jax.models.positions import sincos_position_table
from mdt_jax.weights import claims, hub_folder
from mdt_jax.weights import files as weight_files
from mdt_jax.weights.descriptions import (
    architecture_of,
    average_item,
    create_config,
    latents_of_file,
    latents_of_run,
    own_description,
    step_of,
)
from mdt_jax.weights.files import WeightFile


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights, with their network's architecture, and how it is trained and sampled.

    Attributes:
      source: where the weights come from, for messages.
      architecture: the network's sizes.
      config: a run's config with the family's recipe, or the run's own.
      params: parameter tree of `LazyArray`s in the source's dtypes.
      step: training steps behind the weights, 0 if not known.
      class_names: names of the classes, empty if not known.
      dtypes: each weight's type by the authors' name of it; empty if all have one type.
      latents: the latents it was trained on; None for pixels, or where it is not known.
    """

    source: str
    architecture: Architecture
    config: ConfigDict
    params: Any
    step: int = 0
    class_names: tuple[str, ...] = ()
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    latents: LatentSpace | None = None


def read_pretrained(source: str | Path, nest: str | None = None, **hints: int | None) -> Pretrained:
    """The weights of a source; each array is read when it is asked for.

    Args:
      source: a .pt or .safetensors file, hf://OWNER/REPO/FILE, a folder that is published
        (`hub_folder`) or its hf://OWNER/REPO, or a workdir (its first EMA).
      nest: which part of a training file to take, as for `files.read_weights`.
      **hints: sizes that a PyTorch file does not show, as for `open_weights`.

    Raises:
      WeightsError, UnknownWeights: a file that is not there, damaged or of no model known here.
      CheckpointError: a workdir without a sound checkpoint.
    """
    check_source(source)
    if hub_folder.is_hub_folder(source):
        return hub_folder.read_folder(source, read_pretrained)
    if not weight_files.is_weight_file(source) and not Path(source).is_file():
        return _read_workdir(source)
    weights, architecture = open_weights(source, nest, **hints)
    own = own_description(weights)
    try:
        params = parameter_tree(weights, architecture)
    except ValueError as error:
        raise UnknownWeights(f"{weights.path}: {error}") from error
    return Pretrained(
        source=str(source),
        architecture=architecture,
        config=config_lib.from_json(own["config"]) if own else create_config(architecture),
        params=params,
        step=own["step"] if own else _first(weights.step, step_of(str(source)), 0),
        class_names=tuple(own["class_names"]) if own else (),
        dtypes=_mixed_dtypes(weights, architecture),
        latents=latents_of_file(str(source), weights, own, architecture),
    )


def check_source(source: Any) -> None:
    """Refuses, with ValueError, what is no path or an empty one."""
    if not isinstance(source, str | os.PathLike) or not os.fspath(source).strip():
        raise ValueError(
            f"{source!r} is no path of weights; give a workdir, a .pt or .safetensors file, or "
            "hf://OWNER/REPO/FILE"
        )


def _read_workdir(workdir: str | Path) -> Pretrained:
    step, meta = checkpoints.read_meta(workdir)
    config = config_lib.from_json(meta["config"])
    return Pretrained(
        source=str(workdir),
        architecture=architecture_of(config_lib.create_network(config)),
        config=config,
        params=checkpoints.lazy_item(workdir, average_item(workdir, config), step=step),
        step=step,
        class_names=tuple(meta["class_names"]),
        latents=latents_of_run(meta),
    )


def open_weights(
    source: str | Path,
    nest: str | None = None,
    *,
    decode_layers: int | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> tuple[WeightFile, Architecture]:
    """A file's weights under the authors' names, and the architecture read off them.

    Args:
      source, nest: as for `read_pretrained`.
      decode_layers: an MDT v1's decoder depth, 2 if None.
      num_heads: heads of a DiT; by the known widths if None.
      num_classes: settles whether the last row of the label table is a class (`identify`).
      input_size: side of the latents of diffusers' DiT, which does not store its positions; by
        config.json if None, or else 32.

    Raises:
      WeightsError, UnknownWeights: as for `read_pretrained`.
    """
    weights = weight_files.read_weights(source, nest)
    try:
        if diffusers_dit.MARK in weights:
            beside = weight_files.json_beside(source, weights.path)
            diffusers_dit.check_shapes(weights.shapes, diffusers_dit.depth(weights))
            claims.check_diffusers(weights.path, beside, weights.shapes)
            size = _number(beside, "sample_size", input_size)
            if size is None:
                logging.info("%s: no config.json beside it; taken to be of 32 × 32 latents", source)
            weights = _from_diffusers(weights, size or 32)
            num_heads = _number(beside, "num_attention_heads", num_heads)
        own = own_description(weights)
        if own:  # our own file says what shapes do not
            known = Architecture(**own["architecture"])
            decode_layers, num_heads = known.decoder_depth or None, known.num_heads
            num_classes = known.num_classes
        else:
            said = claims.hints(weights.arguments, weights.shapes)
            num_classes = _first(num_classes, said.get("num_classes"))
            decode_layers = _first(decode_layers, said.get("decode_layers"))
        architecture = identify(
            weights.shapes,
            decode_layers=2 if decode_layers is None else decode_layers,
            num_heads=num_heads,
            num_classes=num_classes,
        )
        if own:
            claims.check_own(own, known, architecture)
        else:
            claims.check(weights, architecture)
    except UnknownWeights as error:
        raise UnknownWeights(f"{weights.path}: {error}") from error
    for name, dtype in weights.dtypes.items():
        if dtype.kind in "iub" and not name.endswith(BUFFER):
            raise UnknownWeights(f"{weights.path}: {name} holds {dtype.name}, not floats")
    return weights, architecture


def _number(settings: Mapping[str, Any], key: str, given: int | None) -> int | None:
    """A number from a config.json, or the caller's where it has none."""
    value = settings.get(key)
    if value is None:
        return given
    if not isinstance(value, int) or value < 1:
        raise UnknownWeights(f"config.json beside it has {key} {value!r}, not a positive number")
    return value


def first_not_finite(params: Any) -> str | None:
    """The path of the first array of a tree that holds NaN or infinite values, None without one.

    Of arrays on several processes it looks at this one's part.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        parts = [part.data for part in getattr(leaf, "addressable_shards", ())] or [leaf]
        if not all(is_finite(np.asarray(part)) for part in parts):
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def is_finite(array: np.ndarray) -> bool:
    """Whether an array holds neither NaN nor infinite values."""
    return array.dtype.kind in "iub" or bool(np.isfinite(array).all())


def parameter_tree(weights: Mapping[str, np.ndarray], architecture: Architecture) -> Any:
    """The authors' weights as this project's tree of `LazyArray`s."""
    a = architecture
    return from_torch(
        weights,
        family=a.family,
        depth=a.depth,
        num_heads=a.num_heads,
        decoder_depth=a.decoder_depth,
        lazy=True,
    )


def _mixed_dtypes(weights: WeightFile, architecture: Architecture) -> dict[str, str]:
    """Types by name, empty if all are the same.

    Stacked layers have one type, so that those of a mixed file are known from here alone.
    """
    names = [name for name in parameter_shapes(architecture) if name in weights]
    dtypes = {name: weights.dtypes[name].name for name in names}
    return dtypes if len(set(dtypes.values())) > 1 else {}


def _first(*values: int | None) -> int | None:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def place_parameters(params: Any, abstract: Any) -> Any:
    """Puts arrays on devices one at a time, in the dtypes and shardings of `abstract`.

    Raises:
      ValueError: the two trees differ in structure or shapes, or a number is beyond the dtype.
    """

    def put(path: Any, array: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        given = np.asarray(array)
        with np.errstate(over="ignore"):
            array = given.astype(like.dtype, copy=False)
        if (
            given.dtype.itemsize > array.dtype.itemsize
            and not is_finite(array)
            and is_finite(given)
        ):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name} of the weights holds {np.abs(given).max():g} in {given.dtype}, beyond "
                f"what {array.dtype} can hold; give other weights"
            )
        if array.shape != like.shape:
            raise ValueError(f"an array of shape {array.shape} where the model has {like.shape}")
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])

    return jax.tree_util.tree_map_with_path(put, params, abstract)


def _from_diffusers(weights: WeightFile, input_size: int) -> WeightFile:
    """diffusers' DiT under DiT's own names, with the position table, which is not stored."""
    depth = diffusers_dit.depth(weights)
    sources = diffusers_dit.sources(depth)
    copies = diffusers_dit.copies(depth)
    for first, others in copies.items():
        for other in others:
            if not np.array_equal(weights[first], weights[other]):
                raise UnknownWeights(f"{other} differs from {first}; a DiT has one embedder")
    width, _, patch, _ = weights.shapes["pos_embed.proj.weight"]
    table = sincos_position_table(width, input_size // patch)[None].astype(
        weights.dtypes["pos_embed.proj.weight"]
    )

    def load(name: str) -> np.ndarray:
        if name == "pos_embed":
            return table
        parts = [weights[part] for part in sources[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    shapes = {"pos_embed": table.shape}
    for name, parts in sources.items():
        rows, *rest = weights.shapes[parts[0]]
        shapes[name] = (rows * len(parts), *rest)
    dtypes = {name: weights.dtypes[parts[0]] for name, parts in sources.items()}
    dtypes["pos_embed"] = table.dtype
    return WeightFile(
        weights.path,
        shapes,
        dtypes,
        load,
        nest=weights.nest,
        step=weights.step,
        arguments=weights.arguments,
    )
