"""Local checkpoints: each process's own shards, of the newest step that all of them hold whole."""

import json
import re
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jobs import outcomes, start_job
from test_watchdog import CONFIG

from mdt_jax.checkpoints import local as local_checkpoints
from mdt_jax.checkpoints.local import LocalCheckpoints
from mdt_jax.parallel import sharding


def placed(mesh):
    """A state of several types, split and replicated."""
    rng = np.random.default_rng(0)

    def place(array, *axes):
        where = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(array.shape, where, lambda part: array[part])

    return {
        "step": place(np.array(7, np.int32)),
        "params": {
            "kernel": place(rng.normal(size=(8, 3)).astype(np.float32), "fsdp"),
            "bias": place(rng.normal(size=5).astype(jnp.bfloat16)),
        },
        "empty": (),
    }


def abstract(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.sharding == other.sharding
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def state():
    return placed(sharding.create_mesh(data=2, fsdp=4))


@pytest.fixture
def local(tmp_path, state):
    """The checkpoints of steps 5, 10 and 15 of a run."""
    (tmp_path / "run").mkdir()
    found = LocalCheckpoints(tmp_path / "local", tmp_path / "run")
    for step in (5, 10, 15):
        found.save(step, times(step, state), {"position": 8 * step})
    found.wait()
    return found


def times(factor, state):
    return jax.tree.map(lambda leaf: leaf * factor, state)


def folder(local, step):
    return local._root / str(step)


def test_the_newest_comes_back_bit_for_bit_and_older_ones_go(local, state):
    assert local.newest(abstract(state), None) == 15
    found, meta = local.restore(15, abstract(state))
    assert_same(found, times(15, state))
    assert meta == local.read_meta(15) == {"position": 120}
    assert sorted(path.name for path in local._root.iterdir()) == ["10", "15"]


def test_a_part_that_several_devices_hold_is_kept_once(local, state):
    size = (folder(local, 15) / "arrays.bin").stat().st_size
    assert size <= sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 3 * 8


def damage(path):
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["arrays.bin", "index.json", "manifest.json"])
def test_a_damaged_step_is_told_and_the_one_before_it_taken(local, state, file, caplog):
    damage(folder(local, 15) / file)
    assert local.newest(abstract(state), None) == 10
    assert f"{folder(local, 15)} is damaged" in caplog.text and not folder(local, 15).exists()
    found, _ = local.restore(10, abstract(state))
    assert_same(found, times(10, state))


def test_an_interrupted_one_does_not_count(local, state):
    (folder(local, 15) / "manifest.json").unlink()
    assert local.newest(abstract(state), None) == 10


@pytest.mark.parametrize(("after", "newest"), [(None, 15), (14, 15), (15, None), (20, None)])
def test_a_shared_step_that_is_as_late_is_better(local, state, after, newest):
    assert local.newest(abstract(state), after) == newest


@pytest.mark.parametrize("mesh", [{"data": 4, "fsdp": 2}, {"data": 1, "fsdp": 8}])
def test_other_shards_than_those_of_today_do_not_count(local, mesh):
    """Halves in place of quarters, or eighths."""
    assert local.newest(abstract(placed(sharding.create_mesh(**mesh))), None) is None


def test_a_new_run_in_a_workdir_of_the_same_path_does_not_see_them(local, state, tmp_path):
    again = LocalCheckpoints(tmp_path / "local", tmp_path / "run")
    assert again.newest(abstract(state), None) == 15
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    other = LocalCheckpoints(tmp_path / "local", tmp_path / "run")
    assert other.newest(abstract(state), None) is None


def test_what_is_shared_is_removed_and_what_is_later_stays(local, tmp_path):
    local.remove(None)
    local.remove(10)
    assert [path.name for path in local._root.iterdir()] == ["15"]
    local.remove(15)
    assert not local._run.exists()
    local.close()


def test_a_disk_that_is_full_is_told_and_keeps_the_step_before(local, state, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_checkpoints, "write_json", full)
    local.save(20, state, {})
    local.wait()
    assert "no local checkpoint of step 20" in caplog.text and "training goes on" in caplog.text
    assert local.newest(abstract(state), None) == 15


# Two processes save steps 5, 10 and 15, of which process 1 then damages the last two.
WORKER = """
import sys
sys.path.insert(0, "tests")
from mdt_jax.parallel.distributed import ending_together, gather_json, initialize_distributed
with ending_together():
    initialize_distributed()
    import jax
    import test_local_checkpoints as test
    from mdt_jax.parallel import sharding
    state = test.placed(sharding.create_mesh(data=1, fsdp=2))
    local = test.LocalCheckpoints(sys.argv[1], sys.argv[2])
    for step in (5, 10, 15):
        local.save(step, state, {"step": step})
    local.wait()
    for damaged in (15, 10, None):
        newest = local.newest(test.abstract(state), None)
        print("newest", newest)
        if newest:
            found, meta = local.restore(newest, test.abstract(state))
            assert meta["step"] == newest
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
                for shard, wanted in zip(one.addressable_shards, other.addressable_shards):
                    assert (test.np.asarray(shard.data) == test.np.asarray(wanted.data)).all()
        if damaged and jax.process_index() == 1:
            test.damage(test.folder(local, damaged) / "arrays.bin")
        gather_json("damaged", damaged)
"""


def test_processes_agree_on_the_newest_that_all_hold_whole(tmp_path):
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", WORKER, tmp_path / "local", tmp_path / "run"]
    for status, text in outcomes(start_job(command, 2), timeout=400):
        assert status == 0, text
        said = [line for line in text.splitlines() if line.startswith("newest")]
        assert said == ["newest 15", "newest 10", "newest None"], text


def train_until(folder, step):
    """Trains in two processes until a step is logged, and kills both; the last step logged."""
    command = [sys.executable, "-m", "mdt_jax.train", "--config", folder / "tiny.py"]
    command += ["--workdir", folder / "run", f"--config.checkpoint.local_dir={folder / 'local'}"]
    command += ["--config.checkpoint.local_every=5", "--config.log_every=1"]
    job = start_job(command, 2, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    end = time.monotonic() + 500
    try:
        while (done := last_step(folder / "run" / "metrics.jsonl")) < step:
            assert time.monotonic() < end and job[0].poll() is None, job[0].stdout.read()[-3000:]
            time.sleep(0.05)
    finally:
        for process in job:
            process.kill()
        said = [process.communicate()[0] for process in job]
    return done, said


def last_step(path):
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def test_a_job_that_is_killed_loses_five_steps_at_most_or_ten_with_a_damaged_shard(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (20, 8, 8, 1)).astype(np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(20) % 4)
    (tmp_path / "tiny.py").write_text(CONFIG.format(data=str(tmp_path)))
    done, _ = train_until(tmp_path, 17)
    held = [
        {int(seal.parent.name) for seal in tmp_path.glob(f"local/*/*/{process}/*/manifest.json")}
        for process in range(2)
    ]
    newest = max(held[0] & held[1])
    # The step before the one that was being saved is whole.
    assert done - newest <= 5 and not list(tmp_path.glob("run/checkpoints/*"))
    (path,) = tmp_path.glob(f"local/*/*/1/{newest}/arrays.bin")
    damage(path)
    shutil.copy(tmp_path / "run" / "metrics.jsonl", tmp_path / "before.jsonl")
    _, (first, second) = train_until(tmp_path, done + 1)
    assert "arrays.bin: checksum differs; it is removed" in second
    assert re.search(rf"resuming .* from step {newest - 5}\b", first), first
    before, after = (read(tmp_path / name) for name in ("before.jsonl", "run/metrics.jsonl"))
    steps = sorted(before.keys() & after.keys())
    assert steps[-1] >= newest and [before[s] for s in steps] == [after[s] for s in steps]


def read(path):
    """{step: loss} of a metrics file whose last line may be cut."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {line["step"]: line["loss"] for line in lines}
