"""What a file of weights says of itself beside its shapes, and whether that is a model known here.

Flow models (SiT, LightningDiT, REPA) have the shapes of a DiT and are of another process: sampled
by diffusion they give noise. Their training arguments say what they are, where those are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from mdt_jax.basics.places import read_text
from mdt_jax.convert.architecture import Architecture, UnknownWeights
from mdt_jax.convert.trees import Shape
from mdt_jax.models.registry import FAMILIES
from mdt_jax.weights.files import WeightFile

_LABELS = "y_embedder.embedding_table.weight"
# Settings that only flow models have; the first four are SiT's and LightningDiT's.
_FLOW = ("path_type", "transport", "interpolant", "interpolant_type", "flow_type")
_FLOW_SWITCHES = ("flow_matching", "use_flow_matching", "rectified_flow", "use_flow", "meanflow")
# Models and values of settings of any name that are of flows.
_FLOW_MODEL = re.compile(r"(?<![a-z])sit(?![a-z])|lightning[-_]?dit|flow", re.IGNORECASE)
_FLOW_VALUE = re.compile(
    r"(rectified|mean|re|c|ot|conditional)?[-_ ]?flow([-_ ]based)?|i?cfm|.*flow[-_ ]?match.*"
    r"|.*rectified[-_ ]?flow.*|(stochastic[-_ ])?interpolants?",
    re.IGNORECASE,
)
_VELOCITY_VALUE = re.compile(
    r"(predict[-_])?velocity|v[-_]?pred(iction)?|pred(ict)?[-_]v|edm2?", re.I
)
# Settings that name a place, an experiment or data rather than a process.
_NAMING = re.compile(r"data|dir|path$|file|(?<!class_)name$|project|tag|group|exp|entity|note")
_FLOW_FILE = re.compile(
    r"(?<![a-z])(sit|repa|edm)(?![a-z])|lightning[-_]?dit|(?<!work)(?<!over)(?<!tensor)flow",
    re.IGNORECASE,
)
_PREDICTION = (
    *("prediction", "prediction_type", "pred_type", "model_mean_type", "objective", "predict"),
    *("parameterization", "target", "pred"),
)
_OTHER_PREDICTIONS = (
    *("v", "velocity", "v_prediction", "v_pred", "pred_v", "vector", "flow", "flow_prediction"),
    *("x0", "x_0", "xstart", "x_start", "start_x", "pred_x0", "pred_xstart", "sample", "score"),
)
_PREDICTION_SWITCHES = (
    *("predict_v", "v_pred", "v_prediction", "predict_velocity"),
    *("predict_xstart", "pred_xstart", "predict_x0", "pred_x0"),
)
# Settings of the process, with what the authors' weights were trained with.
_PROCESS = {
    "noise_schedule": "linear",
    "beta_schedule": "linear",
    "diffusion_steps": 1000,
    "num_train_timesteps": 1000,
    "num_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
}
# Settings with which a script says of its weights what `_sign_of_flow` guesses.
_TELLING = ("model", *_PREDICTION, *_PREDICTION_SWITCHES, *_PROCESS, "learn_sigma")
_DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")


def hints(arguments: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Sizes that shapes do not show and training arguments say, as keywords of `identify`.

    Args:
      arguments: from `WeightFile.arguments`.
      shapes: every array's shape, under the authors' names.
    """
    found = {}
    classes, rows = arguments.get("num_classes"), shapes.get(_LABELS, (0,))[0]
    if _is_count(classes) and classes and rows - classes in (0, 1):
        found["num_classes"] = classes
    if _is_count(layers := arguments.get("decode_layer")):
        found["decode_layers"] = layers
    return found


def check(weights: WeightFile, architecture: Architecture) -> None:
    """Refuses weights that say they are of another process, and logs what else they say.

    Args:
      weights: the file.
      architecture: what its shapes show.

    Raises:
      UnknownWeights: a flow model, or another prediction or noise schedule than the authors'.
    """
    arguments = weights.arguments
    if said := _other_process(arguments):
        raise UnknownWeights(said)
    for said in _contradictions(arguments, architecture):
        logging.warning("%s: %s; taken as its shapes are", weights.path, said)
    untold = architecture.family == "DiT" and arguments.keys().isdisjoint(_TELLING)
    if untold and (sign := _sign_of_flow(weights)):
        logging.warning(
            "%s: %s; taken for a DiT that predicts noise; of a SiT, a flow model of the same "
            "shapes, the samples would be noise",
            weights.path,
            sign,
        )


def check_own(own: Mapping[str, Any], known: Architecture, architecture: Architecture) -> None:
    """Refuses a file whose own description and arrays differ.

    Args:
      own: the description.
      known: the architecture in it.
      architecture: what the arrays show.

    Raises:
      UnknownWeights: they differ, naming the first difference.
    """
    for name, said in vars(known).items():
        if (shown := getattr(architecture, name)) != said:
            raise UnknownWeights(
                f"its metadata say {name} {said}, its arrays {shown}; save the arrays again "
                "without the metadata"
            )
    size = own["config"].get("model", {}).get("input_size", known.input_size)
    if size != known.input_size:
        raise UnknownWeights(
            f"its metadata say input_size {known.input_size}, and {size} in their config; save the "
            "arrays again without the metadata"
        )


def check_diffusers(path: Path, settings: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Refuses diffusers' DiT whose config.json, or pipeline's scheduler, is of another model.

    Args:
      path: the file of weights.
      settings: its config.json, {} without one.
      shapes: every array's shape, under diffusers' names.

    Raises:
      UnknownWeights: they differ; names the setting.
    """
    kind = settings.get("_class_name", _DIFFUSERS_CLASSES[0])
    if kind not in _DIFFUSERS_CLASSES:
        raise UnknownWeights(f"config.json beside it is of a {kind}, and its names are of a DiT")
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    depth = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("transformer_blocks."))
    shown = {"num_layers": depth, "in_channels": channels, "patch_size": patch}
    heads, size = settings.get("num_attention_heads"), settings.get("attention_head_dim")
    if _is_count(heads) and _is_count(size):
        settings, shown = dict(settings) | {"width": heads * size}, shown | {"width": width}
    for key, value in shown.items():
        if settings.get(key, value) != value:
            raise UnknownWeights(
                f"config.json beside it says {key} {settings[key]}, it has {value}"
            )
    scheduler = path.parent.parent / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        try:
            arguments = dict(json.loads(read_text(scheduler)))
        except (ValueError, TypeError) as error:
            raise UnknownWeights(f"{scheduler} is not JSON settings: {error}") from error
        arguments["flow_matching"] = "Flow" in str(arguments.get("_class_name"))
        if said := _other_process(arguments):
            raise UnknownWeights(f"{said} ({scheduler})")


def _other_process(arguments: Mapping[str, Any]) -> str | None:
    """Why a model of these arguments is of another process than the authors', None if it is not."""
    texts = {key: value for key, value in arguments.items() if isinstance(value, str)}
    values = {key: value for key, value in texts.items() if not _NAMING.search(key)}
    flow = [key for key in _FLOW if key in arguments and not _is_off(arguments[key])]
    flow += [key for key in _FLOW_SWITCHES if _is_on(arguments.get(key))]
    flow += [key for key in ("model", "model_name") if _FLOW_MODEL.search(texts.get(key, ""))]
    flow += [key for key, value in values.items() if _FLOW_VALUE.fullmatch(value)]
    flow += [key for key, value in values.items() if "sampl" in key and value.lower() == "ode"]
    if flow:
        key = flow[0]
        said = key if arguments.get(key) is None else f"{key} {arguments[key]}"
        return (
            f"its training arguments say {said}: a flow model such as SiT, and diffusion, which "
            "is all that samples and trains here, would make noise of it"
        )
    for key in _PREDICTION:
        value = arguments.get(key)
        if str(value).lower().replace("-", "_") in _OTHER_PREDICTIONS:
            return _predicts(f"{key} {value}")
    for key in _PREDICTION_SWITCHES:
        if _is_on(arguments.get(key)):
            return _predicts(f"{key} {arguments[key]}")
    for key, text in values.items():
        if _VELOCITY_VALUE.fullmatch(text):
            return _predicts(f"{key} {text}")
    if _is_on(arguments.get("sigma_data")):
        return _predicts(f"sigma_data {arguments['sigma_data']}")
    for key, value in _PROCESS.items():
        found = arguments.get(key, value)
        if found is not None and not _is_same(found, value):
            return (
                f"its training arguments say {key} {found}; weights from PyTorch are sampled and "
                f"trained as the authors', {key} {value}"
            )
    return None


def _is_on(value: Any) -> bool:
    """Whether a switch is on, also as a number or a word; other kinds of values are none."""
    return isinstance(value, str | int | float) and bool(value) and not _is_off(value)


def _is_off(value: Any) -> bool:
    return value is False or str(value).lower() in ("false", "0", "0.0", "no", "off")


def _is_same(found: Any, value: Any) -> bool:
    try:
        return float(found) == float(value)
    except (TypeError, ValueError):
        return str(found) == str(value)


def _predicts(said: str) -> str:
    return (
        f"its training arguments say {said}; weights from PyTorch are sampled and trained as the "
        "authors', which predict the noise, and these would give noise"
    )


def _contradictions(arguments: Mapping[str, Any], a: Architecture) -> list[str]:
    """What arguments say that shapes do not show, in words."""
    said = []
    name, classes = arguments.get("model"), arguments.get("num_classes")
    known = isinstance(name, str) and re.match(rf"({'|'.join(FAMILIES)})-", name)
    if known and a.name not in (a.family, name):
        said.append(f"its training arguments say model {name}, its shapes are of {a.name}")
    if _is_count(classes) and classes != a.num_classes:
        said.append(
            f"its training arguments say num_classes {classes}, its label table has "
            f"{a.num_classes} classes"
        )
    size = arguments.get("image_size")
    if _is_count(size) and a.input_size not in (size, size // 8):
        said.append(
            f"its training arguments say image_size {size}, its positions are of {a.input_size} × "
            f"{a.input_size} latents"
        )
    if (schedule := arguments.get("schedule")) not in (None, "linear"):  # or the learning rate's
        said.append(f"its training arguments say schedule {schedule}, the authors' is linear")
    if isinstance(learns := arguments.get("learn_sigma"), bool) and learns != a.learn_variance:
        said.append(f"its training arguments say learn_sigma {learns}, its outputs differ")
    return said


def _sign_of_flow(weights: WeightFile) -> str | None:
    """What in a DiT's weights without arguments is as a SiT has it, None if nothing is."""
    kernel, bias = "final_layer.linear.weight", "final_layer.linear.bias"
    rows = weights.shapes[bias][0]
    _, channels, patch, _ = weights.shapes["x_embedder.proj.weight"]
    if found := _FLOW_FILE.search(weights.path.name):
        return f"its name says {found[0]}"
    if rows == patch * patch * channels:
        return "it has no outputs for a variance, and does not say how it was trained"
    # SiT leaves the outputs of the variance out of its loss: they stay as initialised.
    outputs = np.asarray(weights[kernel], np.float32).reshape(patch * patch, 2, channels, -1)
    if not outputs[:, 1].any() and outputs[:, 0].any():
        return "its outputs for a variance are 0, as they were initialised: they were not trained"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
