"""The seal of a checkpoint: which of its files there should be, with what in them.

A step without a manifest is a save that was interrupted, and counts for nothing.
"""

import hashlib
import json
from pathlib import Path

import orbax.checkpoint as ocp

from mdt_jax.atomic import whole_file
from mdt_jax.parallel.command import UserError

MANIFEST = "manifest.json"
PART = "checksums.{}.json"  # One process's share of the manifest, until there is a manifest.


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another model, or could not be written."""


class SaveError(CheckpointError):
    """A checkpoint could not be written, the disk being full perhaps; those before it are whole."""


def checkpoint_root(workdir: str | Path) -> Path:
    """The folder of a run's checkpoints; ValueError for a URL."""
    if "://" in str(workdir):
        raise ValueError(f"workdir {workdir} is a URL: mount it (gcsfuse), and give the path")
    return Path(workdir).absolute() / "checkpoints"


def sealed_steps(root: Path) -> list[int]:
    """The steps that have a seal, ascending."""
    names = (path.parent.name for path in root.glob(f"*/{MANIFEST}"))
    return sorted(int(name) for name in names if name.isdecimal())


def is_unsealed(path: Path) -> bool:
    """Whether a folder is a save that is going on, or that was interrupted."""
    step = path.name.isdecimal() and not (path / MANIFEST).exists()
    return step or ocp.utils.TMP_DIR_SUFFIX in path.name


def choose_step(root: Path, steps: list[int], step: int | None) -> int:
    """`step`, or the newest of `steps` for None; CheckpointError if it is not there."""
    if not steps or step not in (None, *steps):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        there = f"complete ones: {steps}" if steps else "nothing was saved there"
        missing = "" if root.is_dir() else ", a folder that does not exist"
        raise CheckpointError(f"no {wanted} in {root}{missing}; {there}")
    return steps[-1] if step is None else step


def step_files(directory: Path) -> list[str]:
    """The files of a step that its seal covers, relative, sorted alike on every process."""
    own = (MANIFEST, PART.split("{")[0])
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if not name.startswith(own))


def fingerprint(path: Path) -> dict:
    """Size and digest of a file, as a manifest has them."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
        return {"bytes": file.tell(), "blake2b": digest}


def write_json(path: str | Path, value: dict) -> None:
    """All of it or nothing, whenever the machine stops."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def find_problems(
    directory: Path, item: str | None = None, share: slice | None = None
) -> list[str]:
    """What is wrong with a step, or with one item of it, in words; empty if nothing is.

    `share` limits which files are read, not which names are compared.
    """
    prefix = f"{item}/" if item else ""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())["files"]
        expected = {
            name: (known["bytes"], known["blake2b"])
            for name, known in manifest.items()
            if name.startswith(prefix)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read: {error!r}"]
    found = {name for name in step_files(directory) if name.startswith(prefix)}
    problems = [f"file {name} is missing" for name in sorted(expected.keys() - found)]
    problems += [f"file {name} is in no manifest" for name in sorted(found - expected.keys())]
    for name in sorted(expected.keys() & found)[share or slice(None)]:
        size, digest = expected[name]
        try:
            actual = fingerprint(directory / name)
        except OSError as error:
            problems.append(f"file {name} cannot be read: {error!r}")
            continue
        if actual["bytes"] != size:
            problems.append(f"file {name} has {actual['bytes']} bytes, expected {size}")
        elif actual["blake2b"] != digest:
            problems.append(f"file {name}: checksum differs")
    return problems


def verified_step(workdir: str | Path, step: int | None, item: str) -> Path:
    """The directory of a sealed step, `item` of which is sound."""
    root = checkpoint_root(workdir)
    steps = sealed_steps(root)
    if step is not None and step not in steps and (root / str(step) / MANIFEST).exists():
        steps.append(step)  # which an older listing of a network file system did not have
    directory = root / str(choose_step(root, steps, step))
    if problems := find_problems(directory, item):
        damage = f"{item!r} of checkpoint {directory} is damaged: {'; '.join(problems)}"
        raise CheckpointError(f"{damage}; sealed steps: {steps}")
    return directory
