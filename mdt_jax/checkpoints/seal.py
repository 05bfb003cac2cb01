"""The seal of a checkpoint: a manifest of its files, their sizes and checksums.

A step without a manifest is an interrupted save and counts for nothing.
"""

import hashlib
import json
import os
from pathlib import Path

from mdt_jax.basics.atomic import whole_file
from mdt_jax.basics.places import open_file, read_bytes, refuse_url
from mdt_jax.parallel.command import UserError

SEAL_FILE = "manifest.json"
PART = "checksums.{}.json"  # One process's share of the manifest, until that is written.


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another model, or could not be written."""


class SaveError(CheckpointError):
    """A checkpoint could not be written, as on a full disk; those before it are whole."""


def checkpoint_root(workdir: str | Path) -> Path:
    """The folder of a run's checkpoints. Raises ValueError for a URL."""
    refuse_url(workdir, "workdir")
    return Path(workdir).absolute() / "checkpoints"


def sealed_steps(root: Path) -> list[int]:
    """The sealed steps in a folder of checkpoints, ascending."""
    names = (path.parent.name for path in root.glob(f"*/{SEAL_FILE}"))
    return sorted(int(name) for name in names if name.isdecimal())


def is_unsealed(path: Path) -> bool:
    """Whether a folder is a save in progress, or an interrupted one."""
    from orbax.checkpoint.utils import TMP_DIR_SUFFIX  # imports JAX, and errors are defined here

    step = path.name.isdecimal() and not (path / SEAL_FILE).exists()
    return step or TMP_DIR_SUFFIX in path.name


def choose_step(root: Path, steps: list[int], step: int | None) -> int:
    """`step`, or the newest of `steps` if it is None. Raises CheckpointError if it is not there."""
    if not steps or step not in (None, *steps):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        there = f"complete ones: {steps}" if steps else "nothing was saved there"
        missing = "" if root.is_dir() else ", a folder that does not exist"
        if root.is_file():
            missing = ", which is a file"
        elif root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
            missing = ", a folder that may not be read"
        raise CheckpointError(f"no {wanted} in {root}{missing}; {there}")
    return steps[-1] if step is None else step


def step_files(directory: Path) -> list[str]:
    """Relative names of the files of a step that its seal covers, sorted."""
    names_of_seal = (SEAL_FILE, PART.split("{")[0])
    # `atomic` writes .NAME.ID.tmp aside: another process may be writing its part just now.
    own = (*names_of_seal, *(f".{name}" for name in names_of_seal))
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if not name.startswith(own))


def fingerprint(path: Path) -> dict:
    """Size and digest of a file, as an entry of a manifest."""
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
        return {"bytes": file.tell(), "blake2b": digest}


def write_json(path: str | Path, value: dict) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def find_problems(
    directory: Path, item: str | None = None, share: slice | None = None
) -> list[str]:
    """Compares the files of a step with its manifest.

    Args:
      directory: the step's folder.
      item: the one item to compare; all of them by default.
      share: which of the files to read, in the order of their names; all by default. Names are
        compared for all files.

    Returns:
      The differences in words, none if the step is sound.
    """
    prefix = f"{item}/" if item else ""
    try:
        manifest = json.loads(read_bytes(directory / SEAL_FILE))["files"]
        expected = {
            name: (known["bytes"], known["blake2b"])
            for name, known in manifest.items()
            if name.startswith(prefix)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{SEAL_FILE} cannot be read: {error!r}"]
    found = {name for name in step_files(directory) if name.startswith(prefix)}
    problems = [f"file {name} is missing" for name in sorted(expected.keys() - found)]
    problems += [f"file {name} is in no manifest" for name in sorted(found - expected.keys())]
    for name in sorted(expected.keys() & found)[share or slice(None)]:
        size, digest = expected[name]
        try:
            actual = fingerprint(directory / name)
        except (OSError, ValueError) as error:
            problems.append(f"file {name} cannot be read: {error!r}")
            continue
        if actual["bytes"] != size:
            problems.append(f"file {name} has {actual['bytes']} bytes, expected {size}")
        elif actual["blake2b"] != digest:
            problems.append(f"file {name}: checksum differs")
    return problems


def verified_step(workdir: str | Path, step: int | None, item: str) -> Path:
    """The directory of a sealed step, the newest by default, after verifying one item of it.

    Raises:
      CheckpointError: there is no such step, or the item is damaged.
    """
    root = checkpoint_root(workdir)
    steps = sealed_steps(root)
    if step is not None and step not in steps and (root / str(step) / SEAL_FILE).exists():
        steps.append(step)  # a network file system may list an older state of the folder
    directory = root / str(choose_step(root, steps, step))
    if problems := find_problems(directory, item):
        damage = f"{item!r} of checkpoint {directory} is damaged: {'; '.join(problems)}"
        raise CheckpointError(f"{damage}; sealed steps: {steps}")
    return directory
