"""Checkpoints come back bit for bit or say what is wrong; a kill loses one save at most."""

import contextlib
import errno
import functools
import logging as std_logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from jobs import xla_flags
from orbax.checkpoint._src.metadata.checkpoint import _MetadataStoreImpl

from mdt_jax.checkpoints import (
    CheckpointError,
    Checkpoints,
    SaveError,
    listing,
    read_meta,
    restore_item,
)
from mdt_jax.checkpoints.lock import WorkdirInUse, WorkdirLock


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState


def make_state(seed: int = 0) -> State:
    """A few thousand arbitrary bits, NaNs and denormals among them, and a real optimizer state."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (32, 33), dtype=np.uint32)
    params = {
        "kernel": jnp.asarray(bits.view(np.float32)),
        "blocks": {"bias": jnp.asarray(bits[0].astype(np.uint16).view(jnp.bfloat16))},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(jnp.int32(seed), params, optimizer.init(params))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(workdir: Path, steps, **settings) -> None:
    """Step n holds `make_state(n)`, EMA parameters, and itself in its meta."""
    store = Checkpoints(workdir, **settings)
    for step in steps:
        state = make_state(step)
        store.save(step, {"state": state, "ema": state.params}, {"step": step})
    store.close()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("two_steps")
    save_steps(workdir, [1, 2])
    return workdir


@pytest.fixture
def workdir(two_steps, tmp_path) -> Path:
    """A run with steps 1 and 2, a fresh copy."""
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run"


def start_python(code: str, *args, devices: int = 1) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(devices),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> None:
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), errors


def largest_file(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.smoke
def test_state_and_meta_come_back_bit_for_bit(tmp_path):
    state = make_state()
    meta = {"loss": 0.1 + 0.2, "tiny": 5e-324, "huge": 1.7976931348623157e308, "seed": 2**63}
    store = Checkpoints(tmp_path)
    store.save(7, {"state": state, "ema": state.params}, meta)
    step, items, restored_meta = store.restore(
        {"state": abstract(state), "ema": abstract(state.params)}
    )
    store.close()
    assert step == 7
    assert_same_bits(items["state"], state)
    assert_same_bits(items["ema"], state.params)
    assert restored_meta == meta


def test_what_was_saved_may_be_donated_and_changed_at_once(tmp_path):
    store = Checkpoints(tmp_path)
    overwrite = jax.jit(lambda x: -x, donate_argnums=0)
    overwrite(jnp.zeros((1024, 1024))).block_until_ready()
    array, on_host, meta = jnp.ones((1024, 1024)), np.ones(1024), {"losses": [1.0]}
    store.save(1, {"state": {"device": array, "host": on_host}}, meta)
    overwrite(array).block_until_ready()
    on_host[:] = 2
    meta["losses"].append(2.0)
    store.close()
    restored = restore_item(tmp_path, "state")
    assert (restored["device"] == 1).all() and (restored["host"] == 1).all()
    assert read_meta(tmp_path) == (1, {"losses": [1.0]})


@pytest.mark.smoke
def test_restores_onto_another_mesh(tmp_path):
    code = """
        import sys, jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from mdt_jax.checkpoints import Checkpoints
        values = np.arange(64, dtype=np.float32).reshape(8, 8)
        old = jax.make_mesh((4, 2), ("data", "tensor"))
        store = Checkpoints(sys.argv[1])
        w = jax.device_put(values, NamedSharding(old, P("data", "tensor")))
        store.save(1, {"x": {"w": w}}, {})
        for n, spec in ((8, P(None, "data")), (2, P("data")), (1, P())):
            mesh = jax.sharding.Mesh(np.array(jax.devices()[:n]), ("data",))
            target = NamedSharding(mesh, spec)
            w = jax.ShapeDtypeStruct((8, 8), np.float32, sharding=target)
            w = store.restore({"x": {"w": w}})[1]["x"]["w"]
            assert w.sharding == target, w.sharding
            assert np.array_equal(w, values), w
        store.close()
        """
    finish(start_python(code, tmp_path, devices=8))


def test_saving_compiles_nothing(tmp_path):
    code = """
        import sys, jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from mdt_jax.checkpoints import Checkpoints
        mesh = jax.make_mesh((4, 2), ("data", "tensor"))
        specs = P("data", "tensor"), P("tensor"), P()
        tree = [jax.device_put(np.ones((8, 8)), NamedSharding(mesh, spec)) for spec in specs]
        store = Checkpoints(sys.argv[1])
        compiled = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, duration, **_: compiled.append(event) if "/compile/" in event else None
        )
        store.save(1, {"tree": tree}, {})
        store.close()
        assert not compiled, compiled
        jax.jit(lambda x: x + 1)(tree[0])
        assert compiled, "the listener hears nothing"
        """
    finish(start_python(code, tmp_path, devices=8))


def test_two_processes_share_a_checkpoint(tmp_path):
    code = """
        import os, sys, jax, numpy as np
        workdir, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
        jax.distributed.initialize(f"localhost:{port}", 2, process)
        from jax.sharding import NamedSharding, PartitionSpec as P
        from mdt_jax.checkpoints import Checkpoints
        values = np.arange(64.0, dtype=np.float32).reshape(8, 8)
        sharding = NamedSharding(jax.make_mesh((4,), ("data",)), P("data"))
        w = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
        store = Checkpoints(workdir)
        compiled = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, duration, **_: compiled.append(event) if "/compile/" in event else None
        )
        for step in 1, 2:
            store.save(step, {"x": {"w": w}}, {"step": step})
        store.wait()
        assert not compiled, compiled
        store.close()
        if process == 0:
            os.unlink(f"{workdir}/checkpoints/2/x/manifest.ocdbt")
        store = Checkpoints(workdir)
        abstract = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)}
        step, items, meta = store.restore({"x": abstract})
        assert (step, meta) == (1, {"step": 1}), step
        for shard in items["x"]["w"].addressable_shards:
            assert np.array_equal(shard.data, values[shard.index])
        store.close()
        """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    finish(*(start_python(code, tmp_path, port, i, devices=2) for i in range(2)))
    assert restore_item(tmp_path, "x")["w"].shape == (8, 8)


def remove_manifest(step: Path) -> str:
    (step / "manifest.json").unlink()
    return "interrupted"


def spoil_manifest(step: Path) -> str:
    (step / "manifest.json").write_text("{")
    return "manifest.json cannot be read"


def flip_bit_of_largest(step: Path) -> str:
    path = largest_file(step / "state")
    flip_bit(path)
    return f"file {path.relative_to(step)}: checksum differs"


def flip_bit_of_meta(step: Path) -> str:
    flip_bit(step / "meta" / "metadata")
    return "file meta/metadata: checksum differs"


def truncate(step: Path) -> str:
    path = largest_file(step / "state")
    size = path.stat().st_size
    os.truncate(path, size - 1)
    return f"file {path.relative_to(step)} has {size - 1} bytes, expected {size}"


def remove_file(step: Path) -> str:
    path = largest_file(step / "ema")
    path.unlink()
    return f"file {path.relative_to(step)} is missing"


def add_file(step: Path) -> str:
    (step / "state" / "stray").touch()
    return "file state/stray is in no manifest"


@pytest.mark.parametrize(
    "damage",
    [
        remove_manifest,
        spoil_manifest,
        flip_bit_of_largest,
        flip_bit_of_meta,
        truncate,
        remove_file,
        add_file,
    ],
)
def test_a_damaged_step_is_named_and_the_one_before_it_used(workdir, caplog, damage):
    newest = workdir / "checkpoints" / "2"
    complaint = damage(newest)
    store = Checkpoints(workdir)
    step, items, meta = store.restore({"state": abstract(make_state())})
    store.close()
    assert (step, meta) == (1, {"step": 1})
    assert_same_bits(items["state"], make_state(1))
    assert str(newest) in caplog.text and complaint in caplog.text
    assert not newest.exists()


def test_a_damaged_step_is_moved_aside_and_can_be_saved_again(workdir):
    flip_bit_of_largest(workdir / "checkpoints" / "2")
    store = Checkpoints(workdir)
    store.restore({})
    assert (workdir / "checkpoints" / "damaged-2" / "manifest.json").exists()
    store.save(2, {"state": make_state(2)}, {})
    store.close()
    assert read_meta(workdir)[0] == 2


def test_a_damaged_step_that_was_asked_for_is_an_error(workdir):
    complaint = flip_bit_of_largest(workdir / "checkpoints" / "1")
    store = Checkpoints(workdir)
    with pytest.raises(CheckpointError, match=complaint):
        store.restore({}, step=1)
    assert store.restore({})[0] == 2
    store.close()


def test_with_no_sound_step_left_every_start_fails(workdir):
    for step in "12":
        flip_bit_of_largest(workdir / "checkpoints" / step)
    for _ in range(2):
        store = Checkpoints(workdir)
        with pytest.raises(CheckpointError, match=str(workdir)):
            store.restore({})
        assert store.latest_step() == 1
        store.close()


def test_an_empty_store_says_so(tmp_path):
    store = Checkpoints(tmp_path)
    assert store.latest_step() is None
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        store.restore({})
    store.close()


def test_keeps_the_newest_and_every_kth(tmp_path):
    save_steps(tmp_path, range(1, 9), keep_last=2, keep_every=3)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "6", "7", "8"]


def test_a_step_is_saved_once(workdir):
    store = Checkpoints(workdir)
    for step in 1, 2:
        with pytest.raises(CheckpointError, match=f"step {step} cannot be saved"):
            store.save(step, {"state": make_state()}, {})
    store.close()
    assert_same_bits(
        restore_item(workdir, "ema", abstract(make_state().params)), make_state(2).params
    )


def test_meta_that_is_not_json_fails_in_the_call(tmp_path):
    store = Checkpoints(tmp_path)
    with pytest.raises(TypeError, match="float32"):
        store.save(1, {"state": make_state()}, {"loss": np.float32(1)})
    store.close()


def test_another_models_state_is_refused_with_the_arrays_named(workdir):
    other = make_state()
    other.params["kernel"] = jnp.zeros((32, 34))
    store = Checkpoints(workdir)
    with pytest.raises(
        CheckpointError, match=r"params/kernel is saved as \(32, 33\), .*\(32, 34\)"
    ):
        store.restore({"state": abstract(other)})
    assert store.latest_step() == 2
    store.close()


def test_an_item_is_read_alone(workdir):
    flip_bit(largest_file(workdir / "checkpoints" / "2" / "state"))
    ema = restore_item(workdir, "ema")
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(ema))
    assert_same_bits(ema, make_state(2).params)
    assert_same_bits(restore_item(workdir, "ema", step=1), make_state(1).params)


def test_a_damaged_item_is_an_error(workdir):
    path = largest_file(workdir / "checkpoints" / "2" / "ema")
    flip_bit(path)
    with pytest.raises(CheckpointError, match=f"{path.name}: checksum differs"):
        restore_item(workdir, "ema")


def test_readers_change_nothing(workdir):
    checkpoints = workdir / "checkpoints"
    flip_bit_of_largest(checkpoints / "2")
    shutil.copytree(checkpoints / "1", checkpoints / "3")
    (checkpoints / "3" / "manifest.json").unlink()
    shutil.copytree(checkpoints / "1", checkpoints / "4.orbax-checkpoint-tmp")
    before = sorted(workdir.rglob("*"))
    assert read_meta(workdir) == (2, {"step": 2})
    restore_item(workdir, "ema")
    with pytest.raises(CheckpointError):
        restore_item(workdir, "state")
    with pytest.raises(CheckpointError, match="no checkpoint of step 3 .*: \\[1, 2\\]"):
        read_meta(workdir, step=3)
    assert sorted(workdir.rglob("*")) == before


def test_opening_removes_what_interrupted_saves_left(workdir):
    checkpoints = workdir / "checkpoints"
    shutil.copytree(checkpoints / "1", checkpoints / "4.orbax-checkpoint-tmp")
    remove_manifest(checkpoints / "2")
    Checkpoints(workdir).close()
    assert os.listdir(checkpoints) == ["1"]


@pytest.mark.parametrize("culprit", ["orbax", "orbax, whose metadata come late", "seal"])
def test_a_failed_background_save_is_reported_and_can_be_repeated(tmp_path, monkeypatch, culprit):
    def fail(*_, **__):
        raise OSError("disk is full")

    store = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        if culprit.startswith("orbax"):
            patch.setattr("orbax.checkpoint.JsonCheckpointHandler.finalize", fail)
        else:
            patch.setattr("hashlib.file_digest", fail)
        if "late" in culprit:
            update = _MetadataStoreImpl.update
            patch.setattr(
                _MetadataStoreImpl,
                "update",
                lambda *args, **more: (time.sleep(1.0), update(*args, **more)),
            )
        store.save(1, {"state": make_state()}, {})
        with pytest.raises(CheckpointError, match=f"{tmp_path}.*/1 failed.*disk is full"):
            store.wait()
        store.save(1, {"state": make_state()}, {})
        with pytest.raises(CheckpointError, match="disk is full"):
            store.save(2, {"state": make_state()}, {})
    assert store.latest_step() is None
    store.save(1, {"state": make_state()}, {})
    store.close()
    assert read_meta(tmp_path) == (1, {})


@contextlib.contextmanager
def full_disk(size=4096):
    """Writing a file beyond `size` bytes fails, as it does on a disk without space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_fails_a_save_and_leaves_those_before_it_whole(workdir):
    store = Checkpoints(workdir)
    rows = {"x": jnp.asarray(np.random.default_rng(0).random((256, 256)))}
    with full_disk(), pytest.raises(SaveError, match="/3 failed.*File too large"):
        store.save(3, {"state": rows}, {})
        store.wait()
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2"]
    assert store.restore({"state": abstract(make_state())})[0] == 2
    store.save(3, {"state": rows}, {})
    store.close()
    assert read_meta(workdir)[0] == 3


def test_a_failed_save_of_many_arrays_leaves_no_folder_and_says_nothing_more(workdir, capfd):
    """Writes that are still under way when a save fails end after it, in TensorStore's threads."""
    store = Checkpoints(workdir)
    rng = np.random.default_rng(0)
    items = {
        f"item{i}": {f"x{k}": jnp.asarray(rng.random(5000)) for k in range(20)} for i in (1, 2)
    }
    with full_disk(), pytest.raises(SaveError, match="/3 failed: File too large; raise the limit"):
        store.save(3, items, {})
        store.wait()
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2"]
    store.close()
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("file", "heard"), [("orbax/checkpoint/x.py", 0), ("user/code.py", 1)])
def test_of_asyncios_messages_those_of_failed_writes_are_left_out(file, heard, tmp_path, caplog):
    Checkpoints(tmp_path).close()
    code = compile("def write():\n    raise ValueError('no room')", f"/lib/{file}", "exec")
    exec(code, names := {})
    try:
        names["write"]()
    except ValueError as error:
        said = "_GatheringFuture exception was never retrieved"
        std_logging.getLogger("asyncio").error(said, exc_info=error)
    assert len(caplog.records) == heard


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError(  # TensorStore's
                'RESOURCE_EXHAUSTED: Error writing "a/0": Failed to write 5 bytes to file 5: '
                "No space left on device [os_error_code='28']"
            ),
            "No space left on device: 1.00 GB are free of up to 4.00 GB that it takes, so 3.00 GB "
            "are missing; make room",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: 1.00 GB are"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded; make room in your"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; give a place that"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; step 2 is saved"),
        (RuntimeError('x: Error: "a/b": what it was [os_error_code=1]'), "what it was; step 2 is"),
    ],
)
def test_a_failed_save_says_in_one_line_what_is_missing_and_what_is_saved(
    error, said, workdir, monkeypatch
):
    store = Checkpoints(workdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**9))
    store._bytes = 4 * 10**9
    line = str(store._failed(3, error))
    store.close()
    assert line.startswith(f"saving {workdir}/checkpoints/3 failed: {said}")
    assert line.endswith("; step 2 is saved, from which the same command goes on")
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("with_lock", [True, False])
def test_a_workdir_that_goes_away_ends_the_run(with_lock, workdir):
    store = Checkpoints(workdir)
    shutil.rmtree(workdir)
    said = f"{workdir} was removed while this run trained; left of it: nothing"
    if not with_lock:  # something, such as a grid, was written since
        (workdir / "samples").mkdir(parents=True)
        said = said.replace("nothing", "samples")
    for call in (store.check_folder, lambda: store.save(3, {"state": {}}, {})):
        with pytest.raises(
            CheckpointError, match=f"{said}, and no checkpoint: start the run again"
        ):
            call()
    store.close()
    assert not (workdir / "checkpoints").exists()


def test_checkpoints_that_go_away_are_told_and_saved_again(workdir, caplog):
    store = Checkpoints(workdir)
    store.check_folder()
    assert not caplog.records
    shutil.rmtree(workdir / "checkpoints" / "2")
    store.check_folder()
    assert "step 2 was removed while this run trains; steps left: 1; training" in caplog.text
    assert store.latest_step() == 1
    shutil.rmtree(workdir / "checkpoints")
    store.check_folder()
    assert "checkpoints: it was removed while this run trains; steps left: none" in caplog.text
    store.save(3, {"state": make_state().params}, {})
    store.close()
    assert read_meta(workdir)[0] == 3


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_that_goes_away_is_taken_again(replaced, workdir, caplog, monkeypatch):
    store = Checkpoints(workdir)
    (workdir / ".lock").unlink()
    if replaced:
        (workdir / ".lock").write_text("")
    store.check_folder()
    assert "its lock was removed while this run trains; locked again" in caplog.text
    assert f'"pid": {os.getpid()}' in (workdir / ".lock").read_text()
    store.check_folder()
    assert len(caplog.records) == 1

    def taken(*_, **__):
        raise WorkdirInUse(f"{workdir} is in use by process 7 on host")

    monkeypatch.setattr("mdt_jax.checkpoints.store.WorkdirLock", taken)
    (workdir / ".lock").unlink()
    with pytest.raises(CheckpointError, match="in use by process 7 on host; this run's lock there"):
        store.check_folder()
    store.close()


def test_a_workdir_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for workdir, said in (
        ("file", f"{tmp_path}/file is a file; move it away, or give another --workdir"),
        ("file/run", f"{tmp_path}/file is a file; move it away"),
        ("run", f"{tmp_path}/run/checkpoints is a file; move it away"),
        ("link", f"{tmp_path}/link is a symbolic link to {tmp_path}/gone, which is not there"),
        ("r" * 300, "File name too long"),
    ):
        with pytest.raises(OSError, match=f"checkpoints cannot be made: .*{said}"):
            Checkpoints(tmp_path / workdir)
    with pytest.raises(CheckpointError, match="checkpoints, which is a file; nothing was saved"):
        read_meta(tmp_path / "run")


def test_another_run_in_the_workdir_is_refused(workdir, monkeypatch):
    code = """
        import sys, time
        from mdt_jax.checkpoints import Checkpoints
        store = Checkpoints(sys.argv[1])
        print("opened", flush=True)
        time.sleep(100)
        """
    impatient = functools.partial(WorkdirLock, patience=0.0)
    monkeypatch.setattr("mdt_jax.checkpoints.store.WorkdirLock", impatient)
    other = start_python(code, workdir)
    try:
        assert other.stdout.readline() == "opened\n"
        with pytest.raises(CheckpointError, match=f"{workdir} is in use by process {other.pid} "):
            Checkpoints(workdir)
    finally:
        other.kill()
        other.communicate()
    Checkpoints(workdir).close()


CONFIG = {
    "model": {"name": "MDT-S/2", "input_size": 32, "in_channels": 4, "num_classes": 10},
    "optimizer": {"name": "adamw"},
    "data": {"name": "npy", "path": "cats"},
    "batch_size": 256,
    "seed": 3,
    "num_steps": 1000,
}


def test_the_list_tells_what_is_sound_what_is_damaged_and_what_is_no_checkpoint(workdir, capsys):
    store = Checkpoints(workdir)
    store.save(10, {"state": make_state(10)}, {"config": CONFIG})
    store.close()
    root = workdir / "checkpoints"
    shutil.copytree(root / "1", root / "damaged-1")
    shutil.copytree(root / "1", root / "11.orbax-checkpoint-tmp")
    complaint = flip_bit_of_largest(root / "2")
    before = sorted(workdir.rglob("*"))
    entries = listing.list_checkpoints(workdir)
    said = {entry.name: entry.condition.partition(":")[0] for entry in entries}
    assert list(said.items()) == [
        ("1", "verified"),
        ("2", "DAMAGED"),
        ("10", "verified"),
        ("damaged-1", "set aside"),
        ("11.orbax-checkpoint-tmp", "unsealed"),
    ]
    assert [entry.name for entry in entries if entry.damaged] == ["2"]
    assert complaint in entries[1].condition
    assert not any(entry.damaged for entry in listing.list_checkpoints(workdir, False))
    size = sum(path.stat().st_size for path in (root / "10").rglob("*") if path.is_file())
    assert entries[2].size == size
    flags.FLAGS.mark_as_parsed()
    with pytest.raises(SystemExit, match="1"):
        listing.main(["", str(workdir)])
    table = capsys.readouterr().out
    assert f"{workdir}: MDT-S/2, 32×32×4, 10 classes; adamw, batch 256, seed 3; 1,000" in table
    assert sorted(workdir.rglob("*")) == before


def test_the_command_lists_a_sound_run(two_steps):
    done = subprocess.run(
        [sys.executable, "-m", "mdt_jax.checkpoints", str(two_steps)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("verified") == 2 and "settings unknown" in done.stdout


def test_a_folder_without_a_run_has_no_list(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no run"):
        listing.list_checkpoints(tmp_path)


def test_a_killed_run_loses_at_most_the_save_in_progress(tmp_path):
    code = """
        import sys, numpy as np
        from mdt_jax.checkpoints import Checkpoints
        store = Checkpoints(sys.argv[1], keep_last=1)
        step = store.latest_step() or 0
        while True:
            step += 1
            store.save(step, {"state": {"x": np.full(2**20, step)}}, {"step": step})
            print(step, flush=True)
        """
    rng = np.random.default_rng(int(time.time()))
    for _ in range(3):
        process = start_python(code, tmp_path)
        for _ in range(3):
            returned = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        for line in process.communicate()[0].splitlines():
            returned = int(line)
        store = Checkpoints(tmp_path, keep_last=1)
        abstract_state = {
            "x": jax.ShapeDtypeStruct((2**20,), np.int32, sharding=jnp.zeros(1).sharding)
        }
        step, items, meta = store.restore({"state": abstract_state})
        store.close()
        assert step >= returned - 1
        assert meta == {"step": step}
        assert (np.asarray(items["state"]["x"]) == step).all()


def test_orbax_is_quiet_below_debug_verbosity(tmp_path, caplog):
    with caplog.at_level("INFO", logger="absl"):
        save_steps(tmp_path, [1])
    assert not caplog.records
    with caplog.at_level("DEBUG", logger="absl"):
        save_steps(tmp_path, [2])
    assert any(record.levelname == "INFO" for record in caplog.records)
