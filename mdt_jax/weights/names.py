"""Which arrays of a training file are a network's, and what they are called there.

A training script keeps a network beside its average, its optimiser and its arguments, under names
of its own choice; wrappers (DistributedDataParallel, FSDP, torch.compile, Lightning) put theirs
into each array's name. The functions here find the networks in such a file, and take the wrappers
off. They know arrays by name and shape alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
from absl import logging

# Names under which training scripts keep an average of a model, best first; then the model itself.
AVERAGES = (
    *("ema", "model_ema", "ema_model", "ema_state_dict", "ema_model_state_dict"),
    *("model_ema_state_dict", "state_dict_ema", "params_ema", "ema_params", "generator_ema"),
    *("g_ema", "net_ema", "ema_net", "averaged_model", "average"),
)
MODELS = (
    *("model", "state_dict", "model_state_dict", "module", "net", "network", "generator"),
    *("params", "weights", "model_state", "denoiser", "transformer", "dit", "backbone"),
    *("online_model", "current_model_state"),
)
NESTS = (*AVERAGES, *MODELS)
# The numbers of steps done, in a file's own entries; among its arguments only names that no script
# gives to the number that was asked for.
STEPS = (
    *("train_steps", "global_step", "global_steps", "step", "steps", "iteration", "iterations"),
    *("iter", "iters", "it", "n_iter", "current_step", "cur_step", "num_updates"),
    *("num_steps", "trained_steps", "num_iters", "num_iterations"),
)
_STEPS_OF_ARGUMENTS = (
    *("train_steps", "global_step", "current_step", "cur_step", "trained_steps"),
)
ARGUMENTS = (
    *("args", "config", "cfg", "hparams", "hyper_parameters", "train_config", "opts"),
    *("train_args", "training_args", "opt_args", "model_args", "model_config"),
)
# A component of a name that a wrapper made: `_orig_mod`, `_fsdp_wrapped_module`, `_forward_module`.
_WRAPPER = re.compile(r"module|_\w*mod(ule)?")
_AVERAGE = re.compile(r"(?<![a-z])(ema|swa|average|averaged|shadow)(?![a-z])", re.IGNORECASE)
_AVERAGED_MODEL = "n_averaged"  # torch.optim.swa_utils.AveragedModel counts under this name
# Numbers that averages keep beside their weights.
_COUNTERS = (_AVERAGED_MODEL, "initted", "decay", "num_updates", "step")
# A name that each network known here has once.
_MARKS = (
    *("x_embedder.proj.weight", "pos_embed.proj.weight", "encoder.conv_in.weight"),
    *("decoder.conv_in.weight", "Conv2d_1a_3x3.conv.weight"),
)
_DEPTH = 4  # of dicts in dicts

Shapes = Mapping[str, tuple[int, ...]]


class SameName(ValueError):
    """Two arrays of one network have the same name once wrappers are taken off."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One network's arrays in a file.

    Attributes:
      place: the names above the network's own, joined by dots; "" for a network that is the file.
      names: the network's own names, each with the keys that lead to its array in the file.
      average: whether they are an average of the weights over steps.
      known: whether a name among them is one of a network known here.
    """

    place: str
    names: Mapping[str, tuple[str, ...]]
    average: bool
    known: bool

    def describe(self) -> str:
        """The part in words: where it is, and whether it is an average."""
        place = repr(self.place) if self.place else "the file itself"
        return f"{place} ({'EMA' if self.average else 'raw'} weights)"


def plain_types() -> list[Any]:
    """What PyTorch's restricted unpickler may build of a training file beside tensors.

    They are settings (a Namespace, paths) and numbers of NumPy's, such as a step or a best FID, by
    the names that NumPy 1 and 2 and Python's versions pickle them under. None runs code.
    """
    scalar = np.float64(0).__reduce__()[0]
    numbers = [np.dtype(kind) for kind in "?bBhHiIlLqQefd"]
    return [
        argparse.Namespace,
        *[(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")],
        *[(PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")],
        np.dtype,
        *{type(number) for number in numbers},
    ]


def plain_name(name: str) -> str:
    """A weight's name without the names of the wrappers it was saved in, wherever they are."""
    return ".".join(part for part in name.split(".") if not _WRAPPER.fullmatch(part)) or name


def is_average(name: str) -> bool:
    """Whether a name says that what is under it is an average of weights."""
    return bool(_AVERAGE.search(name))


def find_parts(tree: Mapping[Any, Any], keys: tuple[str, ...] = ()) -> list[Part]:
    """The networks in a tree of dicts, in its order.

    Args:
      tree: arrays (anything with a `shape`) by name, and dicts of such; other entries are left out.
      keys: the keys that lead to this tree.

    Raises:
      SameName: two arrays of one network have one name.
    """
    arrays = {k: v for k, v in tree.items() if isinstance(k, str) and hasattr(v, "shape")}
    found = list(_networks({k: tuple(v.shape) for k, v in arrays.items()}, keys))
    if len(keys) < _DEPTH:
        for key, below in tree.items():
            if isinstance(key, str) and isinstance(below, Mapping):
                found += find_parts(below, (*keys, key))
    return found


def choose_part(parts: list[Part], nest: str | None = None) -> Part | None:
    """The best of the parts of a file: a network known here, then an average, then by `NESTS`.

    Args:
      parts: from `find_parts`.
      nest: which is meant: "ema" any average, "model" any that is none, or a name in its place;
        None for any.

    Returns:
      None if there is none.

    Raises:
      ValueError: several are as good, and nothing says which is meant.
    """
    if nest is not None:
        wanted = {"ema": lambda part: part.average, "model": lambda part: not part.average}
        named = wanted.get(nest, lambda part: nest in part.place.split("."))
        parts = [part for part in parts if named(part)]
    ranked = sorted(parts, key=_rank)
    if not ranked:
        return None
    best, *others = ranked
    same = [part for part in others if _rank(part) == _rank(best)]
    if same:
        places = ", ".join(part.place for part in (best, *same))
        kind = "averages" if best.average else "networks"
        raise ValueError(f"holds several {kind}, {places}; save the one that is meant alone")
    return best


def take_part(tree: Mapping[Any, Any], nest: str | None, file: Path | None = None) -> Part | None:
    """The best of the parts of a file's tree; logs which it is, where there is a choice.

    Args:
      tree: as for `find_parts`.
      nest: as for `choose_part`.
      file: the file, for the log; None logs nothing.

    Raises:
      ValueError: as `find_parts` and `choose_part`.
    """
    parts = find_parts(tree)
    part = choose_part(parts, nest)
    if part is None or file is None:
        return part
    others = [other.describe() for other in parts if other is not part and other.known]
    if part.place or others:
        beside = f"; it also holds {', '.join(others)}" if others else ""
        logging.info("%s: taking %s%s", file, part.describe(), beside)
    empty = [key for key in tree if isinstance(key, str) and is_average(key)]
    if nest is None and empty and not part.average:
        said = "%s: its %r holds no weights by name; taking %s"
        if place := nameless_average(tree):
            said += f"; the average, {place}, is a list without names"
        logging.warning(said, file, empty[0].partition(".")[0], part.describe())
    return part


def nameless_average(tree: Mapping[Any, Any], above: str = "") -> str | None:
    """Where a tree holds an average as a list of arrays, as torch_ema's does; None if nowhere."""
    for key, value in tree.items():
        place = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping):
            if found := nameless_average(value, place):
                return found
        elif isinstance(value, list | tuple) and value and is_average(place.replace("_", ".")):
            arrays = [entry for entry in value if hasattr(entry, "shape")]
            if len(arrays) == len(value):
                return place
    return None


def describe(tree: Any) -> str:
    """What a file holds that is no weights by name, in words."""
    if not isinstance(tree, dict):
        return f"an object of type {type(tree).__name__}"
    if place := nameless_average(tree):
        return (
            f"its average, {place!r}, as a list of arrays without names, which could be any "
            "network's; copy it into the network, and save that one's state_dict()"
        )
    return f"a dict of {', '.join(map(repr, list(tree)[:5]))}" if tree else "an empty dict"


def read_step(tree: Mapping[Any, Any]) -> int | None:
    """The training steps that a file says were done; None if it does not say."""
    for key in STEPS:
        if (step := _count(tree.get(key))) is not None:
            return step
    arguments = read_arguments(tree)
    counts = (_count(arguments.get(key)) for key in _STEPS_OF_ARGUMENTS)
    return next((step for step in counts if step is not None), None)


def read_arguments(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """The training script's settings in a file, by name, in lower case with underscores.

    Settings in groups come under their own names, and each group's name has None. Text that lies
    beside the weights themselves is taken for a setting, too.
    """
    found: dict[str, Any] = {}

    def take(settings: Any, depth: int) -> None:
        entries = settings if isinstance(settings, Mapping) else vars(settings)
        for key, value in entries.items():
            name = str(key).lower().replace("-", "_")
            group = isinstance(value, Mapping) or hasattr(value, "__dict__")
            if group and not hasattr(value, "shape"):
                found.setdefault(name, None)
                if depth:
                    take(value, depth - 1)
            else:
                found[name] = value

    take({key: value for key, value in tree.items() if isinstance(value, str)}, 0)
    for key in ARGUMENTS:
        settings = tree.get(key)
        if isinstance(settings, Mapping) or hasattr(settings, "__dict__"):
            take(settings, _DEPTH)
    return found


def _networks(shapes: Shapes, keys: tuple[str, ...]) -> Iterator[Part]:
    """The networks among arrays that lie in one dict."""
    plain: dict[str, str] = {}
    for name, shape in shapes.items():
        own = plain_name(name)
        if math.prod(shape) == 1 and own.rpartition(".")[2] in _COUNTERS:
            continue
        if (other := plain.setdefault(own, name)) != name:
            raise SameName(f"holds both {other} and {name}, two weights of one name")
    above = [part for key in keys for part in key.split(".")]
    counted = {plain_name(name) for name in shapes}
    marked = _roots(plain)
    # Other dicts of arrays, such as an optimiser's state, are no networks.
    if not marked and (not plain or not all(part in NESTS for part in above)):
        return
    for root in marked or [_shared_root(plain)]:
        others = [r for r in marked if len(r) > len(root)]
        names = {
            name.removeprefix(root): (*keys, own)
            for name, own in plain.items()
            if name.startswith(root) and not name.startswith(tuple(others))
        }
        place = ".".join([*above, *root.split(".")[:-1]])
        average = f"{root}{_AVERAGED_MODEL}" in counted or is_average(place)
        yield Part(place, names, average, bool(marked))
        for head, flat in _without_dots(names, plain, root):
            place = ".".join([*above, head])
            yield Part(place, {k: (*keys, own) for k, own in flat.items()}, True, True)


def _roots(plain: Mapping[str, str]) -> list[str]:
    """What stands before the names of each network known here, such as "" or "model."."""
    for mark in _MARKS:
        roots = [name.removesuffix(mark) for name in plain if name.endswith(mark)]
        if roots := [root for root in roots if not root or root.endswith(".")]:
            return roots
    return []


def _shared_root(plain: Mapping[str, str]) -> str:
    """The names of `NESTS` before the names of a network that is not known, if all share them."""
    root = ""
    while True:
        heads = {name.removeprefix(root).partition(".")[0] for name in plain}
        if len(heads) != 1 or not heads <= set(NESTS) or f"{root}{min(heads)}" in plain:
            return root
        root += heads.pop() + "."


def _without_dots(
    names: Mapping[str, Any], plain: Mapping[str, str], root: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """The averages that Lightning's LitEma keeps beside a network, under names without dots."""
    above = root.split(".")[:-1]
    for cut in range(1, len(above) + 1):
        head, below = ".".join(above[:cut]) + "_ema", "".join(above[cut:])
        flat = {name: f"{head}.{below}{name.replace('.', '')}" for name in names}
        if all(name in plain for name in flat.values()):
            yield head, {name: plain[other] for name, other in flat.items()}


def _rank(part: Part) -> tuple[Any, ...]:
    """What sorts parts, the best first."""
    above = part.place.lower().split(".") if part.place else []
    order = [NESTS.index(name) if name in NESTS else len(NESTS) for name in above]
    # A network that is not known is rather under a name than the loose arrays beside that.
    return not part.known, not part.average, not part.known and not above, order


def _count(value: Any) -> int | None:
    """A number of steps; None for anything else."""
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (2,))) == 1:
        value = value.item()
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if math.isfinite(value) and value >= 0 and value == int(value) else None
