"""The folder that a model is published as: config.json, model.safetensors, a card and a picture.

docs/hub.md has the format. `model.safetensors` has one set of weights under the authors' names;
`config.json` (`mdt_jax.weights.hub_config`) says what they are. A folder is read from the disk or
from a repository of the Hugging Face hub, `hf://OWNER/REPO[@REVISION]`, through the hub's cache.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mdt_jax.basics.places import open_file, read_text
from mdt_jax.convert.architecture import Architecture, UnknownWeights
from mdt_jax.models.latent_space import LatentSpace
from mdt_jax.weights import files as weight_files
from mdt_jax.weights import hub, hub_config
from mdt_jax.weights.errors import NoSuchFile, WeightsError
from mdt_jax.weights.hub_config import CONFIG

WEIGHTS, CARD, SAMPLES = "model.safetensors", "README.md", "samples.png"
FILES = (CONFIG, WEIGHTS, CARD, SAMPLES)

_REPOSITORY = re.compile(r"hf://([^/@]+)/([^/@]+)(?:@(.+))?")
# Revisions whose names have slashes, beside which a file could not be told: they are the hub's own.
_REVISION = re.compile(r"refs/(pr/\d+|convert/[^/]+)|[^/]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class HubFolder:
    """A folder that was opened: its config.json, read and checked, and where its weights are.

    Attributes:
      source: as it was asked for.
      weights: the local path of model.safetensors.
      described: the values of config.json.
      architecture: the network's sizes.
      config: a run's config with the model, process, recipe and sampler's options.
      class_names: names of the classes, empty if not known.
      latents: the latents it was trained on; None for pixels, or where it is not known.
    """

    source: str
    weights: Path
    described: Mapping[str, Any]
    architecture: Architecture
    config: ConfigDict
    class_names: tuple[str, ...]
    latents: LatentSpace | None

    @property
    def step(self) -> int:
        """Training steps behind the weights, 0 if not known."""
        return self.described["training"].get("step") or 0

    def hints(self) -> dict[str, int]:
        """Sizes that the weights do not show, as keywords of `pretrained.open_weights`."""
        a = self.architecture
        return a.hints() | {"num_heads": a.num_heads, "num_classes": a.num_classes}


def is_hub_folder(source: str | os.PathLike) -> bool:
    """Whether a source is meant as such a folder: `hf://OWNER/REPO[@REVISION]`, or one on the disk.

    A run's workdir is none, though it has a config.json, too.
    """
    text = os.fspath(source)
    if text.startswith("hf://"):
        return _repository(text) is not None
    if not os.path.isdir(text) or os.path.lexists(os.path.join(text, "checkpoints")):
        return False
    config = os.path.join(text, CONFIG)
    return os.path.lexists(os.path.join(text, WEIGHTS)) or _is_of_a_model(config)


def is_one_set(source: str | os.PathLike) -> bool:
    """Whether a source is one set of weights, a file or a folder of this kind, and not a run."""
    return (
        weight_files.is_weight_file(os.fspath(source))
        or os.path.isfile(source)
        or is_hub_folder(source)
    )


def read_folder(source: str | os.PathLike, read_file: Callable[..., Any]) -> Any:
    """The weights of a folder with what its config.json says of them.

    Args:
      source: the folder.
      read_file: `pretrained.read_pretrained`, for its file of weights.

    Returns:
      As `read_file` does.

    Raises:
      WeightsError, UnknownWeights: it is not of this format or of a later version, damaged, or its
        weights are not those that config.json describes; one line says which.
    """
    folder = open_folder(source)
    check_digest(folder)
    found = read_file(folder.weights, **folder.hints())
    for name, said in vars(folder.architecture).items():
        if (shown := getattr(found.architecture, name)) != said:
            raise UnknownWeights(
                f"{folder.source}: {CONFIG} says {name} {said}, and {WEIGHTS} shows {shown}; fetch "
                "the folder again"
            )
    return dataclasses.replace(
        found,
        source=folder.source,
        config=folder.config,
        step=folder.step,
        class_names=folder.class_names,
        latents=folder.latents,
    )


def open_folder(source: str | os.PathLike) -> HubFolder:
    """A folder's config.json, checked, and its file of weights, which is not read.

    Both files are of one revision of a repository, the one that this process saw first.

    Raises:
      WeightsError: as for `read_folder`.
    """
    text = os.fspath(source)
    remote = text.startswith("hf://")
    config_file = _fetch_config(text) if remote else Path(text) / CONFIG
    described = hub_config.read_config(text, config_file)
    # Only now: a repository of another format may hold large files.
    weights = _fetch_weights(text, config_file) if remote else Path(text) / WEIGHTS
    if not weights.is_file():
        raise WeightsError(f"{text} holds no file {WEIGHTS}; fetch the folder again, all of it")
    model = hub_config.parse(config_file, described)
    return HubFolder(text, weight_files.fetch(weights), described, *model)


def is_published(repo: str) -> bool:
    """Whether the newest revision of OWNER/REPO has a config.json of this format.

    Raises:
      WeightsError: the hub cannot be reached.
    """
    try:
        path = hub.fetch(f"hf://{repo}/{CONFIG}")
        return json.loads(read_text(path)).get("format") == hub_config.FORMAT
    except NoSuchFile:
        return False
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        return False


def weights_of(source: str | os.PathLike) -> Path:
    """The local path of the file of weights of a folder of the hub's, or of a file."""
    if is_hub_folder(source):
        return open_folder(source).weights
    return weight_files.fetch(os.fspath(source))


def check_digest(folder: HubFolder) -> None:
    """Refuses, with WeightsError, a file of weights whose bytes are not those that were written."""
    wanted, size = folder.described["weights"]["sha256"], folder.weights.stat().st_size
    if wanted != (found := sha256(folder.weights)):
        raise WeightsError(
            f"{folder.weights} ({size:,} bytes) is damaged: its SHA-256 is {found[:12]}…, and "
            f"{CONFIG} has {wanted[:12]}…; fetch the folder again"
        )


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits; read once while the file stays as it is."""
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=8)
def _sha256(path: Path, *state: int) -> str:
    opened: Any = open_file(path)
    with opened as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_config(folder: Path, described: Mapping[str, Any], dtype: str) -> None:
    """Writes config.json beside a model.safetensors that is there.

    Args:
      folder: where.
      described: from `hub_config.describe`.
      dtype: the type of the weights, in words.
    """
    weights = {"file": WEIGHTS, "dtype": dtype, "sha256": sha256(folder / WEIGHTS)}
    values = dict(described) | {"weights": weights}
    (folder / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _repository(source: str) -> tuple[str, str | None] | None:
    """OWNER/REPO and the revision of an address of a whole repository, None for others."""
    found = _REPOSITORY.fullmatch(source.rstrip("/"))
    if not found or (found[3] is not None and not _REVISION.fullmatch(found[3])):
        return None
    return f"{found[1]}/{found[2]}", found[3]


@functools.cache
def _fetch_config(source: str) -> Path:
    """The config.json of a repository; kept, so that a process sees one revision of it."""
    repo, revision = _repository(source)
    at = f"@{revision}" if revision else ""
    try:
        return hub.fetch(f"hf://{repo}{at}/{CONFIG}", whole=source)
    except NoSuchFile as error:
        raise WeightsError(
            f"{source} is no repository that mdt_jax wrote: it holds no {CONFIG}; name one of its "
            f"files of weights, hf://{repo}{at}/FILE"
        ) from error


def _fetch_weights(source: str, config_file: Path) -> Path:
    """The file of weights of the revision that a config.json is of."""
    repo, revision = _repository(source)
    commit = config_file.parent.name  # in the hub's cache: snapshots/COMMIT/config.json
    revision = commit if _COMMIT.fullmatch(commit) else revision
    try:
        at = f"@{revision}" if revision else ""
        return hub.fetch(f"hf://{repo}{at}/{WEIGHTS}", whole=source)
    except NoSuchFile as error:
        raise WeightsError(f"{source} holds no file {WEIGHTS}; its owner has to add it") from error


def _is_of_a_model(path: str) -> bool:
    """Whether a config.json is not the settings of a run, which are beside its checkpoints."""
    try:
        values = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and not {"num_steps", "ema_rates"} <= values.keys()
