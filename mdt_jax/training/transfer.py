"""Moving weights and whole runs: PyTorch files into a workdir, a workdir into a PyTorch file."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
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
from mdt_jax.checkpoints import Checkpoints
from mdt_jax.convert.architecture import BUFFER, parameter_shapes, state_dict_shapes
from mdt_jax.convert.optimizers import OptimizerMoments, moments_from_torch
from mdt_jax.convert.transformers import to_torch
from mdt_jax.convert.trees import LazyArray
from mdt_jax.training import metrics, optimizers
from mdt_jax.training.optimizers import schedule_of
from mdt_jax.training.step import TrainState
from mdt_jax.weights import files as weight_files
from mdt_jax.weights import pretrained
from mdt_jax.weights.files import WeightsError
from mdt_jax.weights.pretrained import Pretrained

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def read_moments(source: str | Path, model: Pretrained) -> OptimizerMoments:
    """The optimiser's state of a model's run, from an optNNNNNN.pt or DiT's file of everything.

    Raises:
      WeightsError: not an AdamW's or Adan's state of this model.
    """
    state = weight_files.read_object(source)
    if isinstance(state, dict) and "opt" in state:
        state = state["opt"]
    try:
        return moments_from_torch(state, parameter_shapes(model.architecture), model.step)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a pickle holds
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
      model: the weights; with `ema`, the raw ones.
      ema: their average, of the same architecture.
      ema_rate: its rate.
      moments: the optimiser's state; without it training starts with a fresh one.
      step: training steps behind the weights; the model's by default.

    Raises:
      WeightsError: the two are of different models, the folder holds something, or it cannot be
        written.
    """
    if ema is not None and ema.architecture != model.architecture:
        raise WeightsError(f"{ema.source} is {_differences(ema, model)}; both must be of one run")
    step = model.step if step is None else step
    if step < 0:
        raise WeightsError(f"--step {step} is negative")
    if not 0 <= ema_rate < 1:
        raise WeightsError(f"--ema_rate {ema_rate} is not in [0, 1)")
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
        "position": step * config.batch_size,
        "window": metrics.Window().state(),
        "weights": {
            "source": Path(model.source).name,
            "items": sorted(items),
            "same": ema is None,  # one set of weights stands for raw and average
            "dtypes": {"ema": dict(model.dtypes), "raw": dict(model.dtypes)} | dtypes,
        },
    }
    return _write_workdir(output, step, items, meta)


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
      workdir, step: the run, and which checkpoint; the newest by default.
      output: a folder that does not exist yet, or is empty.
      ema_rate: which average; the config's first by default.
      dtype: a key of `DTYPES`; as saved by default.
    """
    step, meta = checkpoints.read_meta(workdir, step)
    config = config_lib.from_json(meta["config"])
    item = pretrained.average_item(workdir, config, ema_rate)
    config.ema_rates = (config.ema_rates[0] if ema_rate is None else ema_rate,)
    params = checkpoints.lazy_item(workdir, item, step=step)
    if dtype is not None:
        params = jax.tree.map(lambda leaf: LazyArray(lambda: _cast(leaf, DTYPES[dtype])), params)
    # Where layers of several types were stacked, their own are known by name.
    kept = {} if dtype else meta.get("weights", {}).get("dtypes", {}).get("ema", {})
    weights = {"source": Path(workdir).name, "items": [item], "same": False}
    weights["dtypes"] = {"ema": kept}
    meta = meta | {"config": config_lib.to_json(config), "weights": weights}
    return _write_workdir(output, step, {item: params}, meta)


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
      workdir, step: the run, and which checkpoint; the newest by default.
      params: "ema" or "raw".
      ema_rate: which average; the config's first by default.
      dtype: a key of `DTYPES`; as saved by default, which for converted weights is the source's.

    Returns:
      Arrays by name, in the authors' order with their buffers, and metadata for a .safetensors
      file.

    Raises:
      CheckpointError: no sound checkpoint there.
      ValueError: an average or raw parameters that the run does not keep.
    """
    step, meta = checkpoints.read_meta(workdir, step)
    config = config_lib.from_json(meta["config"])
    _warn_of_other_process(config)
    architecture = pretrained.architecture_of(config_lib.create_network(config))
    item, part = _find_item(workdir, config, meta, params, ema_rate)
    weights = to_torch(
        checkpoints.lazy_item(workdir, item, part, step=step),
        family=architecture.family,
        depth=architecture.depth,
        decoder_depth=architecture.decoder_depth,
        buffers=True,
    )
    own = meta.get("weights", {}).get("dtypes", {}).get(params, {})
    ordered = {}
    for name in state_dict_shapes(architecture):
        array = weights.pop(name)
        wanted = None if name.endswith(BUFFER) else dtype or own.get(name)
        ordered[name] = _cast(array, DTYPES.get(wanted, wanted)) if wanted else array
    return ordered, pretrained.describe(config, meta.get("class_names", ()), step)


def _find_item(
    workdir: str | Path, config: ConfigDict, meta: dict[str, Any], params: str, rate: float | None
) -> tuple[str, str | None]:
    """The checkpoint item of the average or the raw parameters, and which part of it they are."""
    average = pretrained.average_item(workdir, config, rate)
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
    """The authors' code knows one process; weights of another would sample noise there."""
    authors = {"schedule": "linear", "num_timesteps": 1000, "prediction": "epsilon"}
    for key, value in authors.items():
        if config.diffusion[key] != value:
            logging.warning(
                "diffusion.%s is %s; the authors' code samples as with %s",
                key,
                config.diffusion[key],
                value,
            )


def _cast(array: Any, dtype: Any) -> np.ndarray:
    return np.asarray(array).astype(dtype, copy=False)


def _differences(one: Pretrained, other: Pretrained) -> str:
    ours, theirs = dataclasses.asdict(one.architecture), dataclasses.asdict(other.architecture)
    differing = [f"{key} {ours[key]}" for key in ours if ours[key] != theirs[key]]
    return f"of another model than {other.source} ({', '.join(differing)})"


def _set_optimizer(config: Any, moments: OptimizerMoments) -> None:
    """The optimiser that the moments are of, with its settings."""
    names = {"lr": "learning_rate", "max_grad_norm": "clip_norm"}
    config.optimizer.name = moments.optimizer
    for key, value in moments.settings.items():
        if key == "max_grad_norm" and not value:
            value = None
        config.optimizer[names.get(key, key)] = tuple(value) if key == "betas" else value


def _train_state(
    model: Pretrained, config: Any, moments: OptimizerMoments, step: int
) -> TrainState:
    """The training state with an optimiser's moments in their places."""
    network = config_lib.create_network(config)
    schedule = schedule_of(config)
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
    with _aside(Path(output)) as folder:
        with contextlib.closing(Checkpoints(folder, async_save=False)) as store:
            store.save(step, items, meta)
        (folder / "config.json").write_text(json.dumps(meta["config"], indent=2))
    return Path(output)


def check_new_folder(output: Path) -> None:
    """Raises WeightsError if there is anything at a path but an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WeightsError(f"--output {output} is there already; give a new folder, or remove it")


@contextlib.contextmanager
def _aside(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when all is written, and goes if it is not."""
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
        # TensorStore, whose errors are ValueErrors, names three files of its own before the reason.
        reason = " ".join(str(error).split()).rpartition('": ')[2].partition(" [os_error_code")[0]
        full = any(
            os.strerror(code) in reason for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        )
        hint = "; is the disk full?" if full else ""
        raise WeightsError(f"{output} could not be written: {reason}{hint}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
