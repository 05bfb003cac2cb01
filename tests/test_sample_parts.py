"""Samples by the thousand: parts survive kills and are checked, and the join is streamed."""

import errno
import fcntl
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from jobs import xla_flags
from test_sample import save_run

import mdt_jax
from mdt_jax import sampling
from mdt_jax.checkpoints.lock import WorkdirInUse, WorkdirLock
from mdt_jax.parallel import sharding
from mdt_jax.parallel.distributed import by_first_process
from mdt_jax.sample import command as sample_command
from mdt_jax.sample import flags as sample_flags
from mdt_jax.sampling import images
from mdt_jax.sampling.parts import Parts, first_difference

ROOT = Path(__file__).parents[1]
SETTINGS = {"step": 7, "seed": 0, "batch_size": 4, "labels": [0, 1, 2]}
SHAPE, COUNT = (2, 3, 1), 10
SAMPLES = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE), np.uint8)
LABELS = np.arange(COUNT) % 3


def make_parts(folder, shape=SHAPE, **changes):
    return Parts(folder / "s.parts", SETTINGS | changes, shape, np.dtype(np.uint8))


def write_missing(parts, count=COUNT):
    """Writes what `begin` misses; the first indices of that."""
    done = parts.begin(count)
    todo = [first for first in range(0, count, 4) if first not in done]
    for first in todo:
        parts.write(first, SAMPLES[first : min(first + 4, count)])
    return todo


@pytest.fixture
def parts(tmp_path):
    parts = make_parts(tmp_path)
    write_missing(parts)
    return parts


# ---- Parts ---------------------------------------------------------------------------------------


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def damage_empty(path):
    path.write_bytes(b"")


def damage_swap(path):
    shutil.copy(path.with_name("00000000.bin"), path)


def damage_remove(path):
    path.unlink()


@pytest.mark.parametrize(
    "damage", [damage_flip, damage_cut, damage_empty, damage_swap, damage_remove]
)
def test_a_torn_part_is_found_and_made_again_and_no_other(parts, tmp_path, damage):
    damage(parts.folder / "00000004.bin")
    with pytest.raises(ValueError, match=r"00000004\.bin.*: run the same command again"):
        b"".join(parts.pieces(COUNT))
    again = make_parts(tmp_path)
    assert write_missing(again) == [4]
    np.testing.assert_array_equal(again.first_samples(COUNT), SAMPLES)


def test_a_whole_folder_is_found_whole(parts, tmp_path):
    assert make_parts(tmp_path).begin(COUNT) == [0, 4, 8]


@pytest.mark.parametrize(
    ("before", "after", "made"), [(6, 10, [4, 8]), (8, 10, [8]), (10, 6, []), (10, 8, [])]
)
def test_more_or_fewer_samples_keep_the_parts_that_serve(tmp_path, before, after, made):
    write_missing(make_parts(tmp_path), before)
    parts = make_parts(tmp_path)
    assert write_missing(parts, after) == made
    np.testing.assert_array_equal(parts.first_samples(after), SAMPLES[:after])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": 8, "seed": 1}, "made with step 7, not 8"),
        ({"seed": 1}, "made with seed 0, not 1"),
        ({"labels": [2]}, "made with labels 0,1,2, not 2"),
        ({"vae": "ema"}, "made with vae None, not ema"),
    ],
)
def test_other_settings_are_refused_by_the_first_that_differs(parts, tmp_path, changes, said):
    with pytest.raises(ValueError) as error:
        make_parts(tmp_path, **changes).begin(COUNT)
    assert f"s.parts: {said}; give what these parts were made with" in str(error.value)
    assert "or another --output, or remove them" in str(error.value)
    assert make_parts(tmp_path).begin(COUNT) == [0, 4, 8]


def test_other_settings_are_taken_where_there_is_nothing_to_lose(tmp_path):
    make_parts(tmp_path).begin(COUNT)
    write_missing(make_parts(tmp_path, seed=1))
    with pytest.raises(ValueError, match="made with seed 1, not 0"):
        make_parts(tmp_path).begin(COUNT)


def test_a_setting_that_is_there_no_more_is_a_difference():
    assert first_difference({"a": 1, "b": 2}, {"a": 1}) == "made with b 2, not None"
    assert first_difference({"a": 1}, {"a": 1}) is None


def test_what_is_no_folder_of_parts_is_left_alone(tmp_path):
    (tmp_path / "s.parts").mkdir()
    (tmp_path / "s.parts" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt and no manifest\.json"):
        make_parts(tmp_path).begin(COUNT)
    make_parts(tmp_path).remove()
    assert (tmp_path / "s.parts" / "thesis.txt").exists()


def test_a_manifest_that_cannot_be_read_is_refused(parts, tmp_path):
    (parts.folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: cannot be read \(.*\); remove"):
        make_parts(tmp_path).begin(COUNT)


def test_only_one_s_own_parts_are_removed(parts, tmp_path):
    make_parts(tmp_path, seed=1).remove()
    assert make_parts(tmp_path).begin(COUNT) == [0, 4, 8]
    (parts.folder / "notes.txt").write_text("mine")
    parts.remove()
    assert [path.name for path in parts.folder.iterdir()] == ["notes.txt"]


def test_what_a_kill_left_half_written_is_removed(parts, tmp_path):
    for name in ("00000008.bin.123.tmp", "s.npz.tmp.123.tmp"):
        (parts.folder / name).write_bytes(b"half")
    make_parts(tmp_path).begin(COUNT)
    names = {path.name for path in parts.folder.iterdir()}
    assert names == {"00000000.bin", "00000004.bin", "00000008.bin", "manifest.json"}


def fail_full(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    parts = make_parts(tmp_path)
    parts.begin(COUNT)
    parts.write(0, SAMPLES[:4])
    parts.write(4, SAMPLES[4:8])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_full)
        for write in (
            lambda: parts.write(8, SAMPLES[8:]),
            lambda: parts.join(tmp_path / "s.npz", LABELS[:8], {}),
        ):
            with pytest.raises(OSError, match="the disk is full; 2 parts of 4 samples are kept"):
                write()
    assert not (tmp_path / "s.npz").exists()
    assert write_missing(make_parts(tmp_path)) == [8]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_latents_that_are_not_finite_are_made_again(value, tmp_path, caplog):
    """A version before this one wrote them."""
    parts = Parts(tmp_path / "s.parts", SETTINGS, SHAPE, np.dtype("<f4"))
    parts.begin(COUNT)
    for first in (0, 4, 8):
        rows = SAMPLES[first : first + 4].astype(np.float32)
        rows[-1, -1, -1] = value if first == 4 else 0
        parts.write(first, rows)
    assert parts.begin(COUNT) == [0, 8]
    assert "00000004.bin holds NaN or infinite values: it is made again" in caplog.text


def test_a_folder_that_is_removed_meanwhile_is_noticed_at_the_next_part(tmp_path):
    parts = make_parts(tmp_path)
    with parts.held():
        parts.begin(COUNT)
        parts.write(0, SAMPLES[:4])
        shutil.rmtree(parts.folder)
        with pytest.raises(
            OSError, match="removed while its samples were drawn, .* draws them again"
        ):
            parts.write(4, SAMPLES[4:8])
    assert not parts.folder.exists()


def test_a_folder_of_parts_that_cannot_be_made_is_named(tmp_path):
    parts = make_parts(tmp_path)
    parts.folder.write_text("")
    said = "is a file; move it away, or give another --output"
    with pytest.raises(OSError, match=said), parts.held():
        pass


def test_a_disk_too_small_is_found_before_the_work(tmp_path, monkeypatch):
    needed = COUNT * 6 * 2  # in parts, and joined
    for free, fits in ((needed, True), (needed - 1, False)):
        usage = shutil._ntuple_diskusage(10**9, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if fits:
            assert make_parts(tmp_path).begin(COUNT) == []
            continue
        with pytest.raises(OSError, match=r"GB are free, .* make room, or give --output"):
            make_parts(tmp_path).begin(COUNT)


# ---- The join ------------------------------------------------------------------------------------


def test_a_join_has_what_np_savez_would_write(parts, tmp_path):
    said = {"model": "x"}
    parts.join(tmp_path / "s.npz", LABELS, {"metadata": said})
    settings, metadata = (np.array(json.dumps(text)) for text in (SETTINGS, said))
    np.savez(
        tmp_path / "theirs.npz", arr_0=SAMPLES, arr_1=LABELS, metadata=metadata, settings=settings
    )
    assert (tmp_path / "s.npz").read_bytes() == (tmp_path / "theirs.npz").read_bytes()
    assert images.read_metadata(tmp_path / "s.npz") == said


def test_a_join_is_known_by_its_settings_and_count(parts, tmp_path):
    path = tmp_path / "s.npz"
    assert not parts.is_joined(path, COUNT)
    parts.join(path, LABELS, {})
    assert parts.is_joined(path, COUNT) and not parts.is_joined(path, COUNT - 1)
    assert not make_parts(tmp_path, seed=1).is_joined(path, COUNT)
    path.write_bytes(path.read_bytes()[:-100])
    assert not parts.is_joined(path, COUNT)
    np.savez(path, SAMPLES)
    assert not parts.is_joined(path, COUNT)


def test_a_join_over_a_damaged_part_writes_nothing(parts, tmp_path):
    damage_flip(parts.folder / "00000008.bin")
    with pytest.raises(ValueError, match=r"00000008\.bin is damaged"):
        parts.join(tmp_path / "s.npz", LABELS, {})
    assert not (tmp_path / "s.npz").exists()


def test_memory_for_a_join_does_not_grow_with_the_samples(tmp_path):
    """64 MiB in two parts, through pieces of 4."""
    parts = make_parts(tmp_path, shape=(2**11, 2**12, 1))
    parts.begin(8)
    for first in (0, 4):
        parts.write(first, np.full((4, *parts.shape), first, np.uint8))
    tracemalloc.start()
    parts.join(tmp_path / "s.npz", np.zeros(8, np.int64), {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "s.npz").stat().st_size > 2**26
    assert peak < 2**24


# ---- Labels --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    save_run(path)
    return path


@pytest.fixture(scope="module")
def loaded(workdir):
    return mdt_jax.load(workdir)


def test_drawn_labels_are_of_seed_and_index_alone(loaded):
    model, _ = loaded
    many = sampling.draw_labels(model, None, 1000, key=3)
    np.testing.assert_array_equal(sampling.draw_labels(model, None, 137, key=3), many[:137])
    np.testing.assert_array_equal(sampling.draw_labels(model, None, 1000, jax.random.key(3)), many)
    assert (sampling.draw_labels(model, None, 1000, key=4) != many).mean() > 0.6


def test_drawn_labels_are_uniform(loaded):
    """χ² with 3 degrees of freedom is below 16.3 in 999 cases of 1,000."""
    model, _ = loaded
    for key in range(3):
        counts = np.bincount(sampling.draw_labels(model, None, 20_000, key=key), minlength=4)
        assert np.sum((counts - 5000) ** 2 / 5000) < 16.3


def test_drawn_labels_are_of_the_classes_given(loaded):
    model, _ = loaded
    drawn = sampling.draw_labels(model, ["dog", "0"], 100)
    assert set(drawn.tolist()) == {0, 2} and len(sampling.draw_labels(model, ["dog", "0"])) == 2
    with pytest.raises(ValueError, match="label 4 is outside 0 to 3"):
        sampling.draw_labels(model, [4], 10)


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture
def command(workdir, loaded, tmp_path, monkeypatch):
    """The command on the tiny run, loaded (and so compiled) once; the npz's arrays."""
    monkeypatch.setattr(sampling, "load", lambda *_, **__: loaded)
    made = []
    write = Parts.write
    monkeypatch.setattr(Parts, "write", lambda self, i, x: (made.append(i), write(self, i, x))[1])

    def run(*arguments, output="out"):
        values = flags.FlagValues()
        sample_flags.define_flags(values)
        own = (f"--workdir={workdir}", f"--output={tmp_path / output}", "--steps=2")
        values(["sample", *own, "--batch_size=8", *arguments])
        made.clear()
        npz, png = sample_command.generate(values, sharding.create_mesh())
        assert png.exists()
        with np.load(npz) as arrays:
            return dict(arrays)

    run.made, run.folder = made, tmp_path
    return run


def test_a_finished_run_leaves_two_files_and_is_not_repeated(command):
    first = command("--num_samples=20")
    assert command.made == [0, 8, 16]
    assert sorted(path.name for path in command.folder.iterdir()) == ["out.npz", "out.png"]
    again = command("--num_samples=20")
    assert command.made == []
    np.testing.assert_array_equal(again["arr_0"], first["arr_0"])
    command("--num_samples=20", "--seed=1")
    assert command.made == [0, 8, 16]


def test_num_samples_can_be_raised_where_parts_are_kept(command):
    command("--num_samples=12", "--keep_parts", output="kept")
    raised = command("--num_samples=20", output="kept")
    assert command.made == [8, 16]
    at_once = command("--num_samples=20", output="at_once")
    for name in ("arr_0", "arr_1"):
        np.testing.assert_array_equal(raised[name], at_once[name])
    assert not (command.folder / "kept.parts").exists()


def test_parts_of_other_settings_name_the_flag(command):
    command("--num_samples=12", "--keep_parts")
    for flag, said in (
        ("--seed=1", "seed 0, not 1"),
        ("--steps=3", "steps 2, not 3"),
        ("--ema_rate=0.99", "ema_rate 0.9, not 0.99"),
        ("--label_order=random", "label_order in_turn, not random"),
        ("--labels=dog", "labels 0,1,2,3, not 2"),
        ("--batch_size=16", "batch_size 8, not 16"),
    ):
        with pytest.raises(ValueError, match=f"made with {said}"):
            command("--num_samples=12", flag)
    command("--num_samples=12", "--ema_rate=0.9")  # the average that it is by default
    assert command.made == []


def test_other_weights_are_refused(command, workdir, tmp_path):
    command("--num_samples=12", "--keep_parts")
    shutil.copytree(workdir, tmp_path / "other")
    seal = tmp_path / "other" / "checkpoints" / "7" / "manifest.json"
    command("--num_samples=12", f"--workdir={tmp_path / 'other'}")  # a copy is no other run
    command("--num_samples=12", "--seed=1", "--keep_parts", output="b")
    seal.write_bytes(seal.read_bytes() + b" ")
    with pytest.raises(ValueError, match="made with weights "):
        command("--num_samples=12", "--seed=1", f"--workdir={tmp_path / 'other'}", output="b")


def test_drawn_labels_go_with_their_samples(command, loaded):
    drawn = command("--num_samples=20", "--label_order=random", "--seed=3")
    labels = sampling.draw_labels(loaded[0], None, 20, key=3)
    np.testing.assert_array_equal(drawn["arr_1"], labels)
    given = command("--num_samples=20", f"--labels={','.join(map(str, labels))}", "--seed=3")
    np.testing.assert_array_equal(drawn["arr_0"], given["arr_0"])


def test_a_grid_shows_and_tells_of_the_first_hundred(command):
    arrays = command("--num_samples=120")
    said = images.read_metadata(command.folder / "out.png")
    assert said["labels"] == ",".join(str(i % 4) for i in range(100))
    assert "labels" not in json.loads(str(arrays["metadata"]))
    assert (arrays["arr_0"].shape, arrays["arr_1"].dtype) == ((120, 8, 8, 1), np.int64)
    grid = images.image_grid(arrays["arr_0"][:100])
    with images.Image.open(command.folder / "out.png") as image:
        np.testing.assert_array_equal(np.asarray(image), grid)


def test_drawing_labels_and_painting_do_not_go_together(command):
    with pytest.raises(ValueError, match="--label_order random and --inpaint do not go together"):
        command("--inpaint=a.png", "--mask=b.png", "--label_order=random")


def test_an_output_on_a_bucket_is_refused(command):
    with pytest.raises(
        ValueError, match="--output gs://bucket/out is a URL: mount the .* .gcsfuse"
    ):
        command("--output=gs://bucket/out")


HOLD = """
import sys, time
import numpy as np
from mdt_jax.sampling.parts import Parts
with Parts(sys.argv[1], {"batch_size": 4}, (2, 2, 1), np.dtype(np.uint8)).held():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_command_on_an_output_is_refused_and_told_of_the_first(command, monkeypatch):
    impatient = functools.partial(WorkdirLock, patience=0.0)
    monkeypatch.setattr("mdt_jax.sampling.parts.WorkdirLock", impatient)
    folder = command.folder / "out.parts"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        said = f"{folder} is in use by process {holder.pid} on .*; .* another --output"
        with pytest.raises(ValueError, match=said):
            command()
    finally:
        holder.kill()
        holder.communicate()
    command()
    assert sorted(path.name for path in command.folder.iterdir()) == ["out.npz", "out.png"]


def test_a_lock_whose_folder_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """As when the command that was waited for joins its parts and removes their folder."""
    lock = fcntl.lockf

    def lock_too_late(file, operation):
        (tmp_path / ".lock").unlink()
        lock(file, operation)

    monkeypatch.setattr("fcntl.lockf", lock_too_late)
    with pytest.raises(WorkdirInUse, match=f"{tmp_path} was removed by the run that had it"):
        WorkdirLock(tmp_path)


# ---- Kills and processes -------------------------------------------------------------------------


def start(workdir, output, cache):
    """The real command, 2,000 digits in 125 parts, on one device."""
    return subprocess.Popen(
        [sys.executable, "-m", "mdt_jax.sample", f"--workdir={workdir}", f"--output={output}"]
        + ["--num_samples=2000", "--batch_size=16", "--steps=4", "--label_order=random"],
        cwd=ROOT,
        env=os.environ
        | {
            "XLA_FLAGS": xla_flags(1),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_after(process, folder, count):
    """Kills a run when `count` more parts are there, or somewhat later."""
    wanted = len(list(folder.glob("*.bin"))) + count
    while len(list(folder.glob("*.bin"))) < wanted:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.01))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_run_killed_five_times_ends_with_the_same_bits(workdir, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for output in (whole, killed):
        for _ in range(5 if output is killed else 0):
            process = start(workdir, output, tmp_path / "cache")
            kill_after(process, Path(f"{output}.parts"), random.randint(1, 15))
        last = start(workdir, output, tmp_path / "cache")
        _, errors = last.communicate(timeout=120)
        assert last.returncode == 0, errors
    for ending in (".npz", ".png"):
        assert Path(f"{killed}{ending}").read_bytes() == Path(f"{whole}{ending}").read_bytes()
    with np.load(f"{killed}.npz") as arrays:
        assert arrays["arr_0"].shape == (2000, 8, 8, 1)
        assert len({image.tobytes() for image in arrays["arr_0"]}) > 1900
    assert {path.name for path in tmp_path.iterdir()} == {
        "killed.npz", "killed.png", "whole.npz", "whole.png", "cache",
    }  # fmt: skip


PROCESS = """
    import sys
    import jax
    from absl import flags

    process, port, *arguments = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    from mdt_jax.parallel import sharding
    from mdt_jax.sample.command import generate
    from mdt_jax.sample.flags import define_flags

    def run(*more):
        values = flags.FlagValues()
        define_flags(values)
        values(["sample", *arguments, *more])
        return generate(values, sharding.create_mesh())

    try:
        run("--seed=9")
    except ValueError as error:
        print("refused:", error)
    print("written:", len(run()))
"""


def test_two_processes_go_on_with_what_one_began(workdir, tmp_path):
    output, settings = tmp_path / "out", ["--num_samples=20", "--batch_size=8", "--steps=2"]
    own = [f"--workdir={workdir}", f"--output={output}", *settings]
    values = flags.FlagValues()
    sample_flags.define_flags(values)
    values(["sample", *own, "--keep_parts"])
    mesh = sharding.create_mesh(devices=jax.devices()[:2])
    npz, _ = sample_command.generate(values, mesh)
    with np.load(npz) as arrays:
        expected = arrays["arr_0"]
    npz.unlink()
    damage_flip(tmp_path / "out.parts" / "00000008.bin")

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), str(index), str(port), *own],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": xla_flags(1)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (said, errors) in enumerate(told):
        assert "made with seed 0, not 9; give what these parts" in said, errors
        assert f"written: {2 - 2 * index}" in said, errors
    assert "00000008.bin is damaged" in told[0][1]
    with np.load(npz) as arrays:
        # Truncation to 8 bits may turn a difference of 1e-5 into one level.
        assert np.abs(arrays["arr_0"].astype(int) - expected).max() <= 1
        np.testing.assert_array_equal(arrays["arr_0"][:8], expected[:8])


def test_a_failure_of_process_0_is_every_process_s(monkeypatch):
    """Seen from process 1, to which process 0's message is gathered."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    wait = lambda **_: None  # noqa: E731
    monkeypatch.setattr(
        "mdt_jax.parallel.distributed.multihost.get_barrier_sync_fn", lambda **_: wait
    )
    said = [{"error": "the disk is full"}, {}]
    monkeypatch.setattr("mdt_jax.parallel.distributed.gather_json", lambda *_: said)
    with pytest.raises(ValueError, match="the disk is full"):
        by_first_process(lambda: pytest.fail("not process 1's work"))
