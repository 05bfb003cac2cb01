"""PyTorch optimisers' states, of AdamW and the authors' Adan, as moments by weight name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdt_jax.convert.trees import Shape

# Our name of each moment → PyTorch's.
MOMENTS = {
    "adamw": {"mu": "exp_avg", "nu": "exp_avg_sq"},
    "adan": {"m": "exp_avg", "v": "exp_avg_diff", "n": "exp_avg_sq", "previous": "neg_pre_grad"},
}
# Adan's authors keep the negative of the last gradient; their earlier versions kept the gradient.
_EARLIER = "pre_grad"


@dataclasses.dataclass(frozen=True)
class OptimizerMoments:
    """The state of an optimiser.

    Attributes:
      optimizer: "adamw" or "adan".
      count: updates made.
      arrays: our name of a moment → its arrays by weight name.
      settings: learning rate, betas, eps and weight decay, where the file has them.
    """

    optimizer: str
    count: int
    arrays: dict[str, dict[str, np.ndarray]]
    settings: dict[str, Any]


def moments_from_torch(
    state_dict: Mapping[str, Any], parameters: Mapping[str, Shape], fallback_count: int = 0
) -> OptimizerMoments:
    """The moments in an optimiser's `state_dict()`, whose tensors were made arrays.

    Args:
      state_dict: {"state": {index: {...}}, "param_groups": [...]}.
      parameters: names and shapes in the order of the model's `parameters()`. One without a state,
        which never had a gradient, gets zeros.
      fallback_count: updates made, if the state does not say.

    Raises:
      ValueError: another optimiser's state, or one of another model.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("not an optimiser's state: it has no 'state' and 'param_groups'")
    states, groups = state_dict["state"], state_dict["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if len(indices) != len(parameters):
        raise ValueError(
            f"the optimiser's state is of {len(indices)} parameters, the model has "
            f"{len(parameters)}"
        )
    found = next((s for s in states.values() if s), None)
    if found is None:
        raise ValueError("the optimiser's state is empty: it was saved before the first update")
    optimizer = _which(found)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for moment, key in MOMENTS[optimizer].items():
        arrays[moment] = {
            name: _moment(states.get(index) or {}, key, name, shape)
            for index, (name, shape) in zip(indices, parameters.items(), strict=True)
        }
    group = groups[0]
    steps = {int(s["step"]) for s in states.values() if "step" in s}
    count = max(steps) if steps else int(group.get("step", fallback_count))
    kept = ("lr", "betas", "eps", "weight_decay", "max_grad_norm")
    settings = {k: _number(group[k]) for k in kept if k in group}
    return OptimizerMoments(optimizer, count, arrays, settings)


def _number(value: Any) -> Any:
    """A setting as a number; PyTorch's compiled optimisers keep their learning rate in a tensor."""
    return value.item() if isinstance(value, np.ndarray) else value


def _which(state: Mapping[str, Any]) -> str:
    keys = set(state) - {"step"}
    if {"exp_avg", "exp_avg_sq", "exp_avg_diff"} <= keys:
        return "adan"
    if keys == {"exp_avg", "exp_avg_sq"}:
        return "adamw"
    raise ValueError(f"the optimiser's state holds {', '.join(sorted(keys))}; known: AdamW, Adan")


def _moment(state: Mapping[str, Any], key: str, name: str, shape: Shape) -> np.ndarray:
    if not state:
        return np.zeros(shape, np.float32)
    negative = key == "neg_pre_grad"
    if negative and key not in state:
        key, negative = _EARLIER, False
    if key not in state:
        raise ValueError(f"the optimiser's state has no {key} for {name}")
    array = np.asarray(state[key])
    if array.shape != shape:
        raise ValueError(f"the optimiser's {key} of {name} has shape {array.shape}, not {shape}")
    return -array if negative else array
