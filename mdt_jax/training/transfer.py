"""Moving weights and whole runs: PyTorch files to a workdir, a workdir to PyTorch weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict

from mdt_jax import checkpoints
from mdt_jax import config as config_lib
from mdt_jax.basics import ranges
from mdt_jax.basics.atomic import is_full_disk, reason_of
from mdt_jax.checkpoints import Checkpoints
from mdt_jax.convert.architecture import BUFFER, parameter_shapes, state_dict_shapes
from mdt_jax.convert.optimizers import OptimizerMoments, moments_from_torch
from mdt_jax.convert.transformers import to_torch
from mdt_jax.convert.trees import LazyArray
from mdt_jax.training import metrics, optimizers
from mdt_jax.training.optimizers import learning_rate_of
from mdt_jax.training.step import TrainState
from mdt_jax.weights import descriptions, hub_folder, pretrained
from mdt_jax.weights import files as weight_files
from mdt_jax.weights.files import WeightsError
from mdt_jax.weights.pretrained import Pretrained

# Names under which training scripts keep an optimiser's state; Lightning's is a list of one.
_OPTIMIZERS = (
    "opt",
    "optimizer",
    "optimizer_state_dict",
    "optimizer_states",
    "optim",
    "optimizers",
)
_NOT_FINITE = "%s: %s holds NaN or infinite values; its samples are not finite"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def read_moments(source: str | Path, model: Pretrained) -> OptimizerMoments:
    """The optimiser's moments of a model's run, from a PyTorch file.

    Args:
      source: the authors' optNNNNNN.pt, or DiT's file, which holds weights and optimiser.
      model: the weights that the optimiser trained.

    Raises:
      WeightsError: the file holds no AdamW or Adan state of this model.
    """
    state = weight_files.read_object(source)
    for name in _OPTIMIZERS:
        if isinstance(state, dict) and name in state:
            state = state[name]
            break
    if isinstance(state, list) and len(state) == 1:
        (state,) = state
    try:
        return moments_from_torch(state, parameter_shapes(model.architecture), model.step)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a pickle may hold anything
        reason = error if isinstance(error, ValueError) else f"not an optimiser's state ({error!r})"
        raise WeightsError(f"{source}: {reason}") from error


def to_workdir(
    output: str | Path,
    model: Pretrained,
    *,
    ema: Pretrained | None = None,
    ema_rate: float = 0.9999,
    moments: OptimizerMoments | None = None,
    step: int | None = None,
) -> Path:
    """Writes a workdir that `mdt_jax.sample` and `mdt_jax.train` take as it is.

    Arrays keep the source's dtypes, and are written one at a time.

    Args:
      output: a folder that does not exist yet, or is empty.
      model: the weights; the raw ones if `ema` is given.
      ema: the average of the weights, of the same architecture.
      ema_rate: the rate of the average.
      moments: the optimiser's state; without it training starts with a fresh one.
      step: steps that the weights were trained for; the model's by default.

    Raises:
      WeightsError: the average is of another model, the folder is not empty, or it cannot be
        written.
    """
    if ema is not None and ema.architecture != model.architecture:
        raise WeightsError(f"{ema.source} is {_differences(ema, model)}; both must be of one run")
    step = model.step if step is None else step
    if step < 0:
        raise WeightsError(f"--step {step} is negative")
    if fault := ranges.range_of("--ema_rate").fault(ema_rate):
        raise WeightsError(f"--ema_rate {ema_rate} {fault}")
    config = model.config.copy_and_resolve_references()
    config.ema_rates = (ema_rate,)
    items = {f"ema_{ema_rate}": (ema or model).params}
    if moments is not None:
        _set_optimizer(config, moments)
        items["state"] = _train_state(model, config, moments, step)
    elif ema is not None:
        items["params"] = model.params
    dtypes = {} if ema is None else {"ema": dict(ema.dtypes)}
    meta = {
        "config": config_lib.to_json(config),
        "class_names": list(model.class_names),
        "latents": model.latents.to_json() if model.latents else None,
        "position": step * config.batch_size,
        "window": metrics.Window().state(),
        "weights": {
            "source": Path(model.source).name,
            "items": sorted(items),
            "same": ema is None,  # one set of weights stands for raw and average
            "dtypes": {"ema": dict(model.dtypes), "raw": dict(model.dtypes)} | dtypes,
        },
    }
    return _write_workdir(output, step, _warning_of(items, model.source), meta)


def export_ema(
    workdir: str | Path,
    output: str | Path,
    *,
    ema_rate: float | None = None,
    step: int | None = None,
    dtype: str | None = None,
) -> Path:
    """Writes a workdir with one average of a run's parameters and nothing else.

    Args:
      workdir: the run.
      output: a folder that does not exist yet, or is empty.
      ema_rate: rate of the average; the config's first by default.
      step: step of the checkpoint; the newest by default.
      dtype: a key of `DTYPES`; as saved by default.
    """
    step, meta = checkpoints.read_meta(workdir, step)
    config = config_lib.from_json(meta["config"])
    item = descriptions.average_item(workdir, config, ema_rate)
    config.ema_rates = (config.ema_rates[0] if ema_rate is None else ema_rate,)
    params = checkpoints.lazy_item(workdir, item, step=step)
    if dtype is not None:
        params = jax.tree.map(lambda leaf: LazyArray(lambda: _cast(leaf, DTYPES[dtype])), params)
    # A stack has one type. Where its layers had several, the meta data give them by name.
    kept = {} if dtype else meta.get("weights", {}).get("dtypes", {}).get("ema", {})
    weights = {"source": Path(workdir).name, "items": [item], "same": False}
    weights["dtypes"] = {"ema": kept}
    meta = meta | {"config": config_lib.to_json(config), "weights": weights}
    meta.pop("kept_tokens", None)  # whoever trains on has masking of its own
    return _write_workdir(output, step, _warning_of({item: params}, workdir), meta)


def to_state_dict(
    workdir: str | Path,
    *,
    params: str = "ema",
    ema_rate: float | None = None,
    step: int | None = None,
    dtype: str | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A checkpoint as the authors' `state_dict()`, for `load_state_dict(strict=True)`.

    Args:
      workdir: the run; or one set of weights, a file or a folder of the hub's.
      params: "ema" or "raw".
      ema_rate: rate of the average; the config's first by default.
      step: step of the checkpoint; the newest by default.
      dtype: a key of `DTYPES`; as saved by default, which for converted weights is the source's.

    Returns:
      Arrays by name, in the authors' order with their buffers, and metadata for a .safetensors
      file.

    Raises:
      CheckpointError: the workdir has no sound checkpoint.
      ValueError: the run does not keep this average, or raw parameters.
    """
    if hub_folder.is_one_set(workdir):
        model = _one_set(workdir, params, ema_rate, step)
        own: Any = model.dtypes
    else:
        step, meta = checkpoints.read_meta(workdir, step)
        config = config_lib.from_json(meta["config"])
        item, part = _find_item(workdir, config, meta, params, ema_rate)
        model = Pretrained(
            source=str(workdir),
            architecture=descriptions.architecture_of(config_lib.create_network(config)),
            config=config,
            params=checkpoints.lazy_item(workdir, item, part, step=step),
            step=step,
            class_names=tuple(meta.get("class_names", ())),
            latents=descriptions.latents_of_run(meta),
        )
        own = meta.get("weights", {}).get("dtypes", {}).get(params, {})
    architecture = model.architecture
    _warn_of_other_process(model.config)
    weights = to_torch(
        model.params,
        family=architecture.family,
        depth=architecture.depth,
        decoder_depth=architecture.decoder_depth,
        buffers=True,
    )
    ordered, bad = {}, False
    for name in state_dict_shapes(architecture):
        array = weights.pop(name)
        wanted = None if name.endswith(BUFFER) else dtype or own.get(name)
        ordered[name] = _cast(array, DTYPES.get(wanted, wanted)) if wanted else array
        if not bad and not pretrained.is_finite(ordered[name]):
            bad = True
            logging.warning(_NOT_FINITE, workdir, name)
    return ordered, descriptions.file_metadata(
        model.config, model.class_names, model.step, model.latents
    )


def _one_set(
    source: str | Path, params: str, ema_rate: float | None, step: int | None
) -> Pretrained:
    """The weights of a file or a folder of the hub's, which has no choice of them."""
    if params != "ema" or ema_rate is not None or step is not None:
        raise WeightsError(
            f"{source} holds one set of weights; --params raw, --ema_rate and --step are a run's"
        )
    return pretrained.read_pretrained(source)


def _find_item(
    workdir: str | Path, config: ConfigDict, meta: dict[str, Any], params: str, rate: float | None
) -> tuple[str, str | None]:
    """The checkpoint item that holds the average or the raw parameters, and their part of it."""
    average = descriptions.average_item(workdir, config, rate)
    if params == "ema":
        return average, None
    converted = meta.get("weights", {"items": ["state"], "same": False})
    if "state" in converted["items"]:
        return "state", "params"
    if "params" in converted["items"]:
        return "params", None
    if converted["same"]:
        return average, None
    raise WeightsError(f"{workdir} holds an average alone, no raw parameters; give --params ema")


def _warn_of_other_process(config: ConfigDict) -> None:
    """Warns of another diffusion process than the authors' code has: it would sample noise."""
    authors = {"schedule": "linear", "num_timesteps": 1000, "prediction": "epsilon"}
    for key, value in authors.items():
        if config.diffusion[key] != value:
            logging.warning(
                "diffusion.%s is %s; the authors' code samples as with %s",
                key,
                config.diffusion[key],
                value,
            )


def _warning_of(items: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The same items, whose arrays that hold NaN are told in the log when they are made."""
    told = []

    def checked(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, LazyArray):
            return leaf

        def load() -> np.ndarray:
            array = np.asarray(leaf)
            if not told and not pretrained.is_finite(array):
                told.append(path)
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                logging.warning(_NOT_FINITE, source, name)
            return array

        return LazyArray(load)

    return jax.tree_util.tree_map_with_path(checked, items)


def _cast(array: Any, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # `_NOT_FINITE` tells it
        return np.asarray(array).astype(dtype, copy=False)


def _differences(one: Pretrained, other: Pretrained) -> str:
    ours, theirs = dataclasses.asdict(one.architecture), dataclasses.asdict(other.architecture)
    differing = [f"{key} {ours[key]}" for key in ours if ours[key] != theirs[key]]
    return f"of another model than {other.source} ({', '.join(differing)})"


def _set_optimizer(config: Any, moments: OptimizerMoments) -> None:
    """Sets a config's optimiser to the one that the moments are of, with its settings."""
    names = {"lr": "learning_rate", "max_grad_norm": "clip_norm"}
    config.optimizer.name = moments.optimizer
    for key, value in moments.settings.items():
        if key == "max_grad_norm" and not value:
            value = None
        config.optimizer[names.get(key, key)] = tuple(value) if key == "betas" else value


def _train_state(
    model: Pretrained, config: Any, moments: OptimizerMoments, step: int
) -> TrainState:
    """The training state of a model with an optimiser's moments, without averages."""
    network = config_lib.create_network(config)
    schedule = learning_rate_of(config)
    optimizer = optimizers.create_optimizer(dict(config.optimizer), schedule, network.frozen)
    trees = {
        moment: pretrained.parameter_tree(arrays, model.architecture)
        for moment, arrays in moments.arrays.items()
    }
    placeholder = jax.tree.map(lambda _: np.float32(0), model.params)
    opt_state = optax.tree.set(
        jax.eval_shape(optimizer.init, placeholder), count=np.int32(moments.count), **trees
    )
    opt_state = optimizers.at_step(opt_state, np.int32(step))
    return TrainState(
        step=np.int32(step), params=model.params, opt_state=opt_state, ema={}, loss_history=None
    )


def _write_workdir(output: str | Path, step: int, items: Any, meta: dict[str, Any]) -> Path:
    with aside(Path(output)) as folder:
        with contextlib.closing(Checkpoints(folder, async_save=False)) as store:
            store.save(step, items, meta)
        (folder / "config.json").write_text(json.dumps(meta["config"], indent=2))
    return Path(output)


def check_new_folder(output: Path) -> None:
    """Raises WeightsError if a path exists, unless it is an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WeightsError(f"--output {output} is there already; give a new folder, or remove it")


@contextlib.contextmanager
def aside(output: Path) -> Iterator[Path]:
    """A folder beside `output`, renamed to it once all is written, and removed after an error."""
    check_new_folder(output)
    folder = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield folder
        if output.exists():
            output.rmdir()
        folder.rename(output)
    except WeightsError:
        raise
    except (OSError, ValueError, checkpoints.CheckpointError) as error:
        reason, _ = reason_of(error)
        hint = "; is the disk full?" if is_full_disk(error) else ""
        raise WeightsError(f"{output} could not be written: {reason}{hint}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
