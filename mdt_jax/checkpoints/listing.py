"""The tables of a run's checkpoints and time, which `python -m mdt_jax.checkpoints` prints."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from mdt_jax.checkpoints import goodput
from mdt_jax.checkpoints.items import read_meta
from mdt_jax.checkpoints.seal import CheckpointError, checkpoint_root, find_problems, is_unsealed
from mdt_jax.parallel.command import command_ending


class Entry(NamedTuple):
    """One folder of WORKDIR/checkpoints.

    Attributes:
      name: the folder's name, for a checkpoint its step.
      size: bytes of its files.
      saved: when it was sealed or, if unsealed, last changed; seconds since 1970.
      condition: its condition in a few words.
      damaged: whether it is a sealed checkpoint with a file that differs.
    """

    name: str
    size: int
    saved: float
    condition: str
    damaged: bool = False


def list_checkpoints(workdir: str | Path, verify: bool = True) -> list[Entry]:
    """The checkpoints of a run, ascending, then folders that are no checkpoint (any more).

    Raises:
      CheckpointError: there is no folder of checkpoints.
    """
    root = checkpoint_root(workdir)
    if not root.is_dir():
        raise CheckpointError(f"{root} is no folder: {workdir} holds no run")
    folders = [path for path in root.iterdir() if path.is_dir()]
    folders.sort(key=lambda path: (not path.name.isdecimal(), len(path.name), path.name))
    return [_entry(folder, verify) for folder in folders]


def _entry(folder: Path, verify: bool) -> Entry:
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    saved = max((path.stat().st_mtime for path in files), default=folder.stat().st_mtime)
    if not folder.name.isdecimal() and not is_unsealed(folder):
        return Entry(folder.name, size, saved, "set aside: damaged when a run was resumed")
    if is_unsealed(folder):
        return Entry(folder.name, size, saved, "unsealed: being saved, or interrupted")
    if not verify:
        return Entry(folder.name, size, saved, "sealed, not verified")
    if problems := find_problems(folder):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Entry(folder.name, size, saved, f"DAMAGED: {problems[0]}{more}", True)
    return Entry(folder.name, size, saved, "verified")


def describe_run(config: dict[str, Any]) -> str:
    """One line about a run: its model, optimiser and data."""
    model, data = config["model"], config["data"]
    return (
        f"{model['name']}, {model['input_size']}×{model['input_size']}×{model['in_channels']}, "
        f"{model['num_classes']} classes; {config['optimizer']['name']}, batch "
        f"{config['batch_size']}, seed {config['seed']}; {config['num_steps']:,} steps on "
        f"{data['name']}{' ' + data['path'] if data['path'] else ''}"
    )


def checkpoint_table(workdir: str | Path, entries: list[Entry]) -> str:
    """The entries as a table, under a line about the run."""
    try:
        heading = describe_run(read_meta(workdir)[1]["config"])
    except (CheckpointError, KeyError) as error:
        heading = f"settings unknown: {error}"
    rows = [
        (
            entry.name,
            f"{entry.size / 2**20:,.1f} MiB",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.saved)),
            entry.condition,
        )
        for entry in entries
    ]
    width = max((len(row[0]) for row in rows), default=0)
    lines = [f"{name:>{width}}  {size:>13}  {saved}  {said}" for name, size, saved, said in rows]
    return "\n".join([f"{workdir}: {heading}", *(lines or ["no checkpoint yet"])])


def main(arguments: list[str], verify: bool = True) -> None:
    """The command."""
    with command_ending():
        if len(arguments) != 2:
            raise ValueError("give one workdir: mdt checkpoints WORKDIR")
        entries = list_checkpoints(arguments[1], verify)
        print(checkpoint_table(arguments[1], entries))
        if (record := goodput.read_record(arguments[1])) is not None:
            print(goodput.table(record))
    sys.exit(1 if any(entry.damaged for entry in entries) else 0)
