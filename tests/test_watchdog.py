"""A run that hangs ends, with the stacks of all processes, and what holds it up is named."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from jobs import ROOT, outcomes, start_job

from mdt_jax.config import default_config
from mdt_jax.data import reading
from mdt_jax.training import watchdog

# Steps that take 20 ms, and meet at the end of each; process LATE does what SCENE says at step 8.
WORKER = """
import os, sys, time
from mdt_jax.config import default_config
from mdt_jax.data import reading
from mdt_jax.parallel import distributed
from mdt_jax.training.watchdog import Watchdog

def play(scene, late):
    settings = default_config().watchdog
    settings.update(least_seconds=5.0, window=4)
    me = int(os.environ.get("JAX_PROCESS_ID", "0"))
    dog = Watchdog(settings)
    for step in range(1, 10_000):
        with dog.part("input"), reading.noting("folder /data", lambda: "/data/cat/17.png"):
            time.sleep(3600 if (scene, step, me) == ("input", 8, late) else 0.02)
        with dog.part("dispatch"):
            pass
        if step == 8:
            print("at step 8", flush=True)
        with dog.part("wait"):
            distributed.gather_json("step", step)
        dog.ended(step)

with distributed.ending_together():
    distributed.initialize_distributed()
    play(sys.argv[1], int(sys.argv[2]))
"""


def test_a_process_whose_input_hangs_is_named_with_its_file_and_all_end_with_their_stacks():
    job = start_job([sys.executable, "-c", WORKER, "input", "1"], 2)
    found = outcomes(job, timeout=400)
    assert [status for status, _ in found] == [1, 1], found
    for _, text in found:
        assert re.search(r"error: .*step 8 has not ended within \d+\.\d s: process 1 \(", text)
        assert "process 1" in text and "did not arrive, and waits for its input" in text
        assert "being read: folder /data: /data/cat/17.png, for" in text
        assert "in play\n" in text and "MainThread" in text  # the stacks
    assert re.search(r"step 8 has waited \d\.\d s for its input; .*17\.png", found[1][1])


@pytest.mark.parametrize("stopped", [0])
def test_the_process_that_keeps_the_service_is_named_when_it_is_stopped(stopped):
    job = start_job([sys.executable, "-c", WORKER, "stop", "0"], 2)
    lines = Lines(job[stopped])
    lines.until("at step 8", 400)
    os.kill(job[stopped].pid, signal.SIGSTOP)
    try:
        ((status, text),) = outcomes([job[1]], timeout=400)
    finally:
        os.kill(job[stopped].pid, signal.SIGCONT)
    assert status == 1 and "process 0 (" in text and "does not answer" in text, text
    assert "in play\n" in text
    assert job[stopped].wait(400) != 0


class Lines:
    """The output of a process, read in a thread."""

    def __init__(self, process):
        self.text, self._process = "", process
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for line in self._process.stdout:
            self.text += line

    def until(self, pattern, seconds):
        """Waits until the output holds a pattern."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end and self._process.poll() is None, self.text[-3000:]
            time.sleep(0.05)

    def whole(self, seconds):
        """The exit status, and all output."""
        status = self._process.wait(seconds)
        self._thread.join(10)
        return status, self.text


# `python -m mdt_jax.train` whose process 1 takes long to read.
SLOW_TRAIN = """
import os, runpy, time
if os.environ["JAX_PROCESS_ID"] == "1":
    from mdt_jax.data.stream import ExampleStream
    block = ExampleStream.block

    def slow_block(*arguments):
        time.sleep(0.4)  # by four threads
        return block(*arguments)

    ExampleStream.block = slow_block
runpy.run_module("mdt_jax.train", run_name="__main__", alter_sys=True)
"""
CONFIG = """
from mdt_jax.config import apply_recipe, default_config

def get_config():
    config = default_config()
    config.model.update(name="DiT", input_size=8, in_channels=1, num_classes=4, patch_size=4)
    config.model.update(hidden_size=8, depth=1, num_heads=2)
    apply_recipe(config)
    config.data.update(name="npy", path={data!r})
    config.num_steps, config.batch_size, config.log_every = 100_000, 8, 100_000
    config.checkpoint_every = 100_000
    config.sample.update(every=0, guided_channels=None)
    config.watchdog.update(least_seconds=5.0, window=10)
    return config
"""


def test_a_slow_process_is_named_and_one_that_is_stopped_ends_the_job(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (20, 8, 8, 1)).astype(np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(20) % 4)
    (tmp_path / "tiny.py").write_text(CONFIG.format(data=str(tmp_path)))
    command = [sys.executable, "-c", SLOW_TRAIN, "--config", tmp_path / "tiny.py"]
    command += ["--workdir", tmp_path / "run"]
    job = start_job(command, 2, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    try:
        first, second = map(Lines, job)
        first.until(r"process 1 \(.*\) is slow: its own part of a step takes .*images\.npy", 500)
        os.kill(job[1].pid, signal.SIGSTOP)
        began = time.monotonic()
        status, text = first.whole(400)
        seconds = time.monotonic() - began
        os.kill(job[1].pid, signal.SIGCONT)
        assert second.whole(400)[0] not in (0, None)
    finally:
        for process in job:
            process.kill()
            process.wait()
    assert status == 1 and seconds < 5 + 60, (status, seconds, text[-3000:])
    assert re.search(r"has not ended within .* process 1 \(.*\) did not answer: stopped", text)
    assert "step_log.py" in text  # the stacks


def run_alone(scene):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    code = WORKER.replace("10_000", "12")
    return subprocess.run(
        [sys.executable, "-c", code, scene, "0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_a_process_alone_ends_too_and_says_what_it_waits_for():
    done = run_alone("input")
    assert done.returncode == 1
    said = r"error: step 8 has not ended within .* s: this process waits for its input, for "
    said += r"\d+\.\d s; being read: folder /data: /data/cat/17\.png"
    assert re.search(said, done.stderr)
    assert "in play\n" in done.stderr


def report(begun=8, part="wait", seconds=6.0, reads="", **medians):
    usual = {"step": 0.5, "input": 0.0, "dispatch": 0.01, "wait": 0.49}
    told = {"begun": begun, "done": begun - 1, "part": part, "seconds": seconds, "reads": reads}
    return told | {"medians": usual | medians}


NAMES = ["process 0 (a)", "process 1 (b)", "process 2 (c)"]


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ({0: report(), 2: report()}, "process 1 (b) did not answer: stopped, or cut off"),
        ({0: report(), 1: report(), 2: report()}, "all processes have begun step 8 and wait for"),
        (
            {0: report(), 1: report(7, "input", 6.0, "x.png"), 2: report(9)},
            "process 1 (b) did not arrive, and waits for its input, for 6.0 s; being read: x.png",
        ),
        (
            {0: report(7, "other"), 1: report(), 2: report()},
            "process 0 (a) did not arrive, and is between two steps, for 6.0 s",
        ),
        (  # all at once, as where a file system is gone
            {p: report(7, "input") for p in range(3)},
            "process 0 (a) did not arrive, and waits for its input, for 6.0 s; being read: nothing "
            "and process 1 (b)",
        ),
        (
            {p: report(8, "dispatch") for p in range(3)},
            "all processes have begun step 8 and wait for",
        ),
    ],
)  # fmt: skip
def test_who_did_not_arrive_is_told(reports, said):
    assert watchdog.blame(reports, NAMES).startswith(said)


def test_a_process_is_slow_by_its_own_part_where_that_matters_to_the_step():
    slow = report(input=0.3, wait=0.2, reads="images.npy")
    found = watchdog.slow({0: report(), 1: slow, 2: report()}, 1.5)
    assert list(found) == [1]
    assert "takes 0.31 s, 0.01 s elsewhere (input 0.3 s" in found[1] and "images.npy" in found[1]
    # Ten times the others', and a fiftieth of the step.
    assert watchdog.slow({0: report(dispatch=0.001), 1: report(dispatch=0.01)}, 1.5) == {}
    assert watchdog.slow({0: report(input=0.3), 1: report(input=0.25)}, 1.5) == {}


def settings(**changes):
    found = default_config().watchdog
    found.update(changes)
    return found


def test_the_limit_is_of_the_median_step_and_pauses_are_no_part_of_it(monkeypatch):
    clock = [0.0]
    dog = watchdog.Watchdog(settings())
    dog.close()
    dog._began = dog._since = 0.0
    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    assert dog.limit() == 300
    for step, seconds in enumerate((20.0, 30.0, 400.0), start=1):
        with dog.paused():
            clock[0] += 1000
        with dog.part("input"):
            clock[0] += 5
        clock[0] += seconds - 5
        dog.ended(step)
    assert dog.limit() == 20 * 30
    assert dog.medians() == {"step": 30.0, "input": 5.0, "dispatch": 0.0, "wait": 0.0}


def test_work_between_two_steps_may_take_any_time(monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda dog, waited: ended.append(waited))
    few = settings(least_seconds=0.4)  # less than a config may have
    dog = watchdog.Watchdog(few)
    with dog.paused():
        time.sleep(1.5)
    assert not ended
    dog.close()
    dog = watchdog.Watchdog(settings(factor=0.0, least_seconds=0.2))
    time.sleep(0.6)
    dog.close()
    assert not ended
    dog = watchdog.Watchdog(settings(least_seconds=0.2))
    time.sleep(0.6)
    dog.close()
    assert ended


def test_what_is_read_for_longest_is_told_and_the_deepest_first():
    assert reading.longest() == ""
    with reading.noting("latents", lambda: "examples 0 to 7", waits=True):
        assert reading.longest().startswith("latents: examples 0 to 7, for 0.0 s")
        with reading.noting("folder /data", lambda: "/data/a.png"):
            assert reading.longest().startswith("folder /data: /data/a.png")
            reading.at("{}: record {}".format, "shard", 3)
            assert reading.longest().startswith("folder /data: shard: record 3")
        assert "examples 0 to 7" in reading.longest()
    assert reading.longest() == ""
    reading.at(str, "outside of any run")
    assert reading.longest() == ""
