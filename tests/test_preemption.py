"""A run that is asked to stop does so in order, on all its processes; one that fails ends them."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from jobs import ROOT, outcomes, start_job

from mdt_jax.checkpoints.lock import WorkdirInUse, WorkdirLock
from mdt_jax.parallel.preemption import Stop


def until_asked(stop, seconds=10.0):
    """Whether the run is asked to stop in time."""
    end = time.monotonic() + seconds
    while not stop.requested() and time.monotonic() < end:
        time.sleep(0.01)
    return stop.requested()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_a_run_to_stop(number, caplog):
    before = signal.getsignal(number)
    with caplog.at_level("INFO", logger="absl"), Stop() as stop:
        stop.ready()
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert until_asked(stop)
    assert f"stopping: {number.name}" in caplog.text
    assert signal.getsignal(number) == before


def test_the_time_limit_asks_a_run_to_stop(caplog):
    with caplog.at_level("INFO", logger="absl"), Stop(max_hours=0.2 / 3600) as stop:
        stop.ready()
        assert not stop.requested()
        assert until_asked(stop)
    assert "stopping: --max_hours 5.55556e-05" in caplog.text


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan")])
def test_a_time_limit_that_is_none_is_refused(hours):
    with pytest.raises(ValueError, match=f"^max_hours {hours} is outside .0, "):
        Stop(hours)


WORKER = """
import os, signal, sys, time
from absl import logging
logging.set_verbosity(logging.INFO)
from mdt_jax.parallel import distributed
from mdt_jax.parallel.preemption import Stop
scene = sys.argv[1]

def play():
    me = int(os.environ["JAX_PROCESS_ID"])
    if scene == "different":
        names = {"0": "cat", "1": ("dog", "cow")[me]}
        distributed.check_agreement({"seed": 0, "class": names})
    with Stop() as stop:
        if scene == "early" and me == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if scene == "early":
            time.sleep(60)  # as in a compilation
        stop.ready()
        for step in range(1000):
            time.sleep(0.01 * (1 + me))
            if step == 5 and me == 1 and scene in ("SIGTERM", "SIGUSR1"):
                os.kill(os.getpid(), getattr(signal, scene))
            if step == 5 and me == 1 and scene == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 5 and me == 1 and scene == "failure":
                raise OSError("image 17 cannot be read")
            if step % 50 == 0:
                distributed.gather_json("step", step)  # neither runs far ahead
            if stop.requested():
                print("stopped at", step, flush=True)
                return

with distributed.ending_together():
    distributed.initialize_distributed()
    play()
"""


def play(scene):
    """(exit status, output) of two processes, and the seconds they took after their start."""
    began = time.monotonic()
    found = outcomes(start_job([sys.executable, "-c", WORKER, scene], 2), timeout=120)
    return found, time.monotonic() - began


@pytest.fixture(scope="module", autouse=True)
def killed():
    """The outcome of a job whose process is killed, which takes half a minute beside the tests."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(play, "SIGKILL")


@pytest.mark.parametrize("scene", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_process_stops_all_at_the_same_step(scene):
    found, _ = play(scene)
    steps = {line for _, text in found for line in text.splitlines() if "stopped at" in line}
    assert [status for status, _ in found] == [0, 0] and len(steps) == 1, found


def test_a_signal_to_one_process_ends_all_before_the_first_step():
    found, seconds = play("early")
    assert [status for status, _ in found] == [0, 0] and seconds < 60, found
    assert all("stopping before the first step" in text for _, text in found)


@pytest.mark.parametrize("scene", ["failure", "different"])
def test_a_process_that_fails_ends_the_others_and_says_why(scene):
    found, seconds = play(scene)
    assert [status for status, _ in found] == [1, 1] and seconds < 60, found
    if scene == "failure":
        assert "process 1 of the job failed: OSError: image 17 cannot be read" in found[0][1]
    else:
        expected = 'class.1 is "cow" on process 1, "dog" on process 0'
        assert all(expected in text for _, text in found)


def test_a_process_that_is_killed_ends_the_others_which_say_that_it_is_gone(killed):
    found, seconds = killed.result()
    (status, said), (killed_status, _) = found
    assert killed_status == -signal.SIGKILL and status not in (None, 0) and seconds < 60, found
    assert "stopped sending heartbeats" in said or "lost another process of the job" in said


def test_a_folder_has_one_run_which_is_named_to_others(tmp_path):
    code = """
import sys, time
from pathlib import Path
from mdt_jax.checkpoints.lock import WorkdirLock
lock = WorkdirLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(WorkdirInUse, match=f"in use by process {holder.pid} on .*, since"):
            WorkdirLock(tmp_path, patience=0.1)
    finally:
        holder.kill()
        holder.communicate()
    WorkdirLock(tmp_path, patience=0.0).release()


def test_a_folder_that_cannot_be_locked_is_used_all_the_same(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    WorkdirLock(tmp_path).release()
    assert f"{tmp_path} cannot be locked" in caplog.text


def test_two_kills_of_two_processes_leave_the_final_bits_alone(tmp_path):
    """`tools/kill_test.py` kills more often: see the README."""
    command = [sys.executable, ROOT / "tools" / "kill_test.py", "--workdir", tmp_path / "kills"]
    command += ["--kills", "2", "--json", tmp_path / "outcome.json"]
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(Path(tmp_path / "outcome.json").read_text())
    assert [kill["signal"] for kill in outcome["kills"]] == ["SIGKILL", "SIGTERM"]
    assert outcome["kills"][0]["writing"]  # a checkpoint was
