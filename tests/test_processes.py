"""1 process of 8 devices, 2 of 4 and 4 of 2 train the same, and go on with each other's runs."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jobs import finish, start_job

from mdt_jax import checkpoints
from mdt_jax.checkpoints import Checkpoints
from mdt_jax.config import to_json
from mdt_jax.parallel import sharding
from mdt_jax.train import loop
from mdt_jax.training import metrics
from mdt_jax.training.run import Run
from mdt_jax.training.step import Trainer

CONFIG = """
from mdt_jax.config import apply_recipe, default_config

def get_config():
    config = default_config()
    config.model.update(name="MDT", input_size=8, in_channels=1, num_classes=4, patch_size=4)
    config.model.update(hidden_size=8, depth=2, num_heads=2, decoder_depth=1, dtype="float32")
    apply_recipe(config)
    config.optimizer.update(name="adan", learning_rate=1e-3)
    config.data.update(name="npy", path={data!r})
    config.mesh.fsdp = 2
    config.num_steps, config.batch_size, config.log_every = 10, 16, 1
    config.checkpoint_every, config.keep_last = 5, 5
    config.sample.update(every=0, guided_channels=None)
    return config
"""
# Trains in each WORKDIR after CONFIG, compiling once; FAULT:WORKDIR trains with a fault.
WORKER = """
import gc, sys
gc.disable()  # a tenth of the time, all of it for what is still used
sys.path.insert(0, "tests")
from mdt_jax.parallel.distributed import ending_together, initialize_distributed
with ending_together():
    initialize_distributed()
    import test_processes
    for run in sys.argv[2:]:
        fault, _, workdir = run.rpartition(":")
        test_processes.train_in(sys.argv[1], workdir, fault)
"""
STEPS, FAULTY_STEPS = range(1, 11), range(1, 4)
_compiled = {}  # by fault: `train_in` is called several times by one process


def load_config(path):
    spec = importlib.util.spec_from_file_location("experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def train_in(config_path, workdir, fault=""):
    """Trains in `workdir` through the command's own path, checking every bit that it restores."""
    restore, compile_steps = Run.restore, Run.compile_steps
    parts, loss = sharding.batch_parts, Trainer.loss

    def checked_restore(run, store, *rest):
        state, meta = restore(run, store, *rest)
        saved = checkpoints.restore_item(run.workdir, "state", step=int(state.step))
        arrays, expected = by_path(state.replace(ema={})), by_path(saved)
        assert arrays.keys() == expected.keys()
        for path, array in arrays.items():
            for shard in array.addressable_shards:
                here = np.asarray(shard.data)
                assert here.tobytes() == expected[path][shard.index].tobytes(), path
        return state, meta

    def compile_once(run, source):
        program = "gradient" if fault == "gradient" else ""
        if program not in _compiled:
            _compiled[program] = compile_steps(run, source)
        return _compiled[program]

    def loss_without_the_last_processes(trainer, params, samples, num_kept):
        images, labels, t, weights, draws = samples
        kept = np.arange(len(weights)) < len(weights) * (1 - 1 / jax.process_count())
        return loss(trainer, params, (images, labels, t, weights * kept, draws), num_kept)

    config = load_config(config_path)
    if fault:
        config.num_steps = FAULTY_STEPS[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "restore", checked_restore)
        patch.setattr(Run, "compile_steps", compile_once)
        if fault == "shard":
            patch.setattr(sharding, "batch_parts", lambda mesh: ((0,), parts(mesh)[1]))
        if fault == "gradient":
            patch.setattr(Trainer, "loss", loss_without_the_last_processes)
        loop.train(config, workdir)


def logged(workdir):
    """{step: (loss, gradient norm)} of a run."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def assert_trained_alike(workdir, other, steps=STEPS):
    actual, expected = ([logged(w)[step] for step in steps] for w in (workdir, other))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def save_random_state(config, workdir):
    """Step 0 of a run, no parameter of which is what it is initialised with: gates open."""
    run = Run(config, workdir)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jax.device_put(0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    params, ema = (jax.tree.map(draw, run.abstract.params) for _ in range(2))
    meta = {
        "config": to_json(config),
        "class_names": [str(n) for n in range(4)],
        "num_examples": 40,
        "position": 0,
        "window": metrics.Window().state(),
    }
    with Checkpoints(workdir) as store:
        run.save(store, run.trainer.start_from(params, ema), 0, meta)


def half(workdir, copy):
    """The run as it was at step 5."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "10")
    return copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of 10 steps by name: a count of processes, one resuming another, or a fault."""
    folder: Path = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8))
    np.save(folder / "labels.npy", np.arange(40) % 4)
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(data=str(folder)))
    save_random_state(load_config(path), folder / "start")

    def job(processes, *runs):
        command = [sys.executable, "-c", WORKER, path, *runs]
        finish(start_job(command, processes, 8 // processes, JAX_DISABLE_MOST_OPTIMIZATIONS="1"))

    for name in ("1", "2", "4", "shard", "gradient"):
        shutil.copytree(folder / "start", folder / name)
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        train_in(path, folder / "1")
        faults = [f"{fault}:{folder / fault}" for fault in ("shard", "gradient")]
        job(2, folder / "2", half(folder / "1", folder / "2 after 1"), *faults)
        job(4, folder / "4", half(folder / "2", folder / "4 after 2"))
        train_in(path, half(folder / "4", folder / "1 after 4"))
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        _compiled.clear()
    return folder


@pytest.mark.parametrize("processes", ["2", "4"])
def test_any_number_of_processes_trains_the_same(runs, processes):
    assert_trained_alike(runs / processes, runs / "1")


@pytest.mark.parametrize("name", ["2 after 1", "4 after 2", "1 after 4"])
def test_any_number_of_processes_goes_on_with_anothers_run(runs, name):
    assert_trained_alike(runs / name, runs / "1")


@pytest.mark.parametrize("fault", ["shard", "gradient"])
def test_a_process_whose_part_is_lost_is_noticed(runs, fault):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_trained_alike(runs / fault, runs / "1", FAULTY_STEPS)


def test_the_first_loss_does_not_tell_of_a_lost_gradient(runs):
    """So the test above sees the lost gradient, and not the loss of other samples."""
    assert logged(runs / "gradient")[1][0] == pytest.approx(logged(runs / "1")[1][0], rel=1e-5)
