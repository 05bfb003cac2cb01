"""Two workdirs as an earlier version of the package left them, and what it made of them.

`tests/data/old_workdirs.tar.xz` holds a run interrupted at step 6 of 8 (`run`) and a run moved here
from PyTorch (`moved`); `tests/data/old_workdirs.npz` what commit 55dc9de restored from them, and
made of them when it went on. test_old_workdirs.py holds the present code to that. Both files are
made in a checkout of that commit, into which this file was copied:

    python tests/old_workdirs.py make tests/data
    python tests/old_workdirs.py continue tests/data arrays.npz

The second command goes on from workdirs that are there and writes the arrays elsewhere; `compare
tests/data/old_workdirs.npz arrays.npz` then prints how far two such files are from each other. The
first needs PyTorch, the others do not.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # as conftest.py does it, so that the programs are those of the tests
    import os

    from jobs import xla_flags

    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

import mdt_jax
from mdt_jax import config as config_lib
from mdt_jax.checkpoints import Checkpoints
from mdt_jax.train import train
from mdt_jax.training.run import Run

ROOT = Path(__file__).parents[1]
ARCHIVE, ARRAYS = "old_workdirs.tar.xz", "old_workdirs.npz"
NAMES = ("run", "moved")
SAVED = {"run": 6, "moved": 2}  # the steps of their checkpoints
MORE = 2  # steps after those


def unpack(data: Path, folder: Path) -> None:
    """Unpacks both workdirs into a folder."""
    with tarfile.open(data / ARCHIVE) as archive:
        archive.extractall(folder, filter="data")


def settings(workdir: Path) -> Any:
    """The config with which a workdir's run goes on: its own, and digits for the moved one."""
    config = config_lib.from_json(json.loads((workdir / "config.json").read_text()))
    if workdir.name == "moved":
        config.update(num_steps=SAVED["moved"] + MORE, batch_size=16, log_every=1)
        config.data.update(name="digits", flip=False)
        config.sample.every = 0
    return config


def restored(workdir: Path) -> dict[str, str]:
    """Type, shape and digest of every array that training restores, by its path in the state."""
    run = Run(settings(workdir), workdir)
    with Checkpoints(workdir) as store:
        state, _ = run.restore(store)
    return digests(leaves(state))


def exported(workdir: Path) -> dict[str, str]:
    """The same of the arrays that go back to PyTorch, by the authors' names."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        _convert("to-torch", "--input", str(workdir), "--output", str(file), "--params", "raw")
        return digests(load_file(file))


def samples(workdir: Path) -> np.ndarray:
    """Samples (8, 8, 8, 1) of the averaged parameters; the run's settings are in its config."""
    model, params = mdt_jax.load(workdir)
    own = {"steps": 4, "cfg_scale": 2.0, "clip": True} if workdir.name == "moved" else {}
    return mdt_jax.sample(model, params, num_samples=8, key=0, **own)


def go_on(workdir: Path) -> dict[str, np.ndarray]:
    """Trains MORE steps in a workdir.

    Returns:
      Loss and gradient norm of each step; the parameters and each average of them, as one vector
      each, without the biases of keys: their true gradient is zero, so that rounding errors alone
      decide which way an Adam-like optimiser moves them.
    """
    state = train(settings(workdir), workdir)
    assert int(state.step) == SAVED[workdir.name] + MORE
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    new = [line for line in lines if line["step"] > SAVED[workdir.name]]
    found = {name: np.array([line[name] for line in new]) for name in ("loss", "grad_norm")}
    for name, tree in {"params": state.params, **state.ema}.items():
        arrays = leaves(tree)
        for path in arrays:
            if path.endswith("qkv/bias"):  # (layers, 3, heads, head width), or without layers
                arrays[path] = np.delete(arrays[path], 1, axis=-3)
        found[name] = np.concatenate([arrays[path].ravel() for path in sorted(arrays)])
    return found


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree by their paths."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in found
    }


def digests(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Type, shape and BLAKE2b digest of arrays."""
    return {
        name: f"{a.dtype} {a.shape} {hashlib.blake2b(a.tobytes(), digest_size=16).hexdigest()}"
        for name, a in sorted(arrays.items())
    }


def _convert(*arguments: str) -> None:
    """Runs tools/convert_checkpoint.py, which is there in either commit, in this process."""
    with mock.patch.object(sys, "argv", ["convert_checkpoint", *arguments]):
        runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"), run_name="__main__")


# ---- Making the files, with the code of commit 55dc9de -------------------------------------------


def make(data: Path) -> None:
    """Writes both files."""
    time.time_ns = lambda: 0  # Orbax writes the date into its files
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _make_run(place / "run")
        _make_moved(place / "moved", place)
        with tarfile.open(data / ARCHIVE, "w:xz", preset=9) as archive:
            for name in NAMES:
                archive.add(place / name, name, filter=_without_traces)
    continue_all(data, data / ARRAYS)


def _without_traces(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """An archive's entry without dates and owners; no TensorBoard events, whose names have both."""
    if Path(entry.name).name in ("tensorboard", ".lock"):
        return None
    entry.mtime = entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _make_run(workdir: Path) -> None:
    """A small MDTv2 on the digits, as a kill between its checkpoints of steps 6 and 8 leaves it."""
    config = config_lib.default_config()
    config.model.update(
        name="MDTv2", input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=4,
        depth=4, num_heads=2, mlp_ratio=2.0, decoder_depth=2, dtype="float32",
    )  # fmt: skip
    config_lib.apply_recipe(config)
    config.masking.ratio_span = 0.0  # one number of kept tokens, one program
    config.diffusion.update(schedule="squared_cosine", prediction="velocity")
    # Large steps away from the zeros of the initialisation, then small ones: in those a rounding
    # error of a gradient moves no weight by 1e-6.
    config.optimizer.learning_rate = 0.05
    config.schedule.update(name="step", warmup_steps=2, boundaries=(5,), factor=0.01)
    config.data.update(name="digits", flip=False)
    config.sample.update(every=0, steps=4, cfg_scale=2.0, cfg_power=None, guided_channels=None)
    config.sample.clip = True
    config.update(num_steps=SAVED["run"] + MORE, batch_size=16, ema_rates=(0.9, 0.99))
    config.update(log_every=1, checkpoint_every=SAVED["run"], keep_last=5)
    train(config, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(config.num_steps))


def _make_moved(workdir: Path, place: Path) -> None:
    """An MDT v1 after two updates by PyTorch, moved here with its average and AdamW's moments."""
    import torch
    import torch_models

    from mdt_jax.convert.architecture import Architecture

    model = torch_models.build(
        Architecture(
            family="MDT", input_size=8, patch_size=2, in_channels=1, hidden_size=4, depth=4,
            num_heads=2, decoder_depth=2, mlp_ratio=2.0, num_classes=10, null_class=True,
            learn_variance=True,
        )
    )  # fmt: skip
    ema, optimizer = torch_models.ema_of(model), torch_models.create_optimizer(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(SAVED["moved"]):
        x = torch.randn(2, 1, 8, 8, generator=generator)
        loss = model(x, torch.tensor([1, 500]), torch.tensor([0, 10])).square().mean()
        torch_models.update(model, ema, optimizer, loss, rate=0.9)
    torch_models.save_run(place, model, ema, optimizer, SAVED["moved"], rate=0.9)
    names = {"--model": "model000002", "--ema": "ema_0.9_000002", "--opt": "opt000002"}
    files = [part for flag, name in names.items() for part in (flag, str(place / f"{name}.pt"))]
    _convert("to-jax", *files, "--output", str(workdir))


def continue_all(data: Path, output: Path) -> None:
    """Writes what this code restores from the stored workdirs, samples, and makes going on."""
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        unpack(data, Path(folder))
        for name in NAMES:
            workdir = Path(folder) / name
            arrays[f"{name}/restored"] = np.array(json.dumps(restored(workdir)))
            arrays[f"{name}/samples"] = samples(workdir)
            arrays[f"{name}/exported"] = np.array(json.dumps(exported(workdir)))
            for part, array in go_on(workdir).items():
                arrays[f"{name}/after/{part}"] = array
    np.savez_compressed(output, **arrays)


def compare(one: Path, other: Path) -> None:
    """Prints the largest difference of each kind of array in two files of `continue_all`."""
    a, b = dict(np.load(one)), dict(np.load(other))
    assert set(a) == set(b), set(a) ^ set(b)
    for name in sorted(a):
        if a[name].dtype.kind == "U":
            print(f"{name}: {'equal' if a[name] == b[name] else 'DIFFERENT'}")
        elif a[name].tobytes() != b[name].tobytes():
            print(f"{name}: differs by {np.abs(a[name] - b[name]).max():.2g}")
    same = sum(a[name].tobytes() == b[name].tobytes() for name in a)
    print(f"{same} of {len(a)} arrays have equal bits")


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    functions = {"make": make, "continue": continue_all, "compare": compare}
    functions[command](*map(Path, paths))
