"""The training command: it survives being killed, compiles once, and refuses what cannot work."""

import contextlib
import dataclasses
import errno
import functools
import gc
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jobs import xla_flags

from mdt_jax import checkpoints, data, sampling
from mdt_jax.checkpoints import goodput
from mdt_jax.config import default_config, to_json
from mdt_jax.parallel import distributed, sharding
from mdt_jax.sampling import images
from mdt_jax.train import command as command_module
from mdt_jax.train import loop
from mdt_jax.training import checks, metrics, run_evaluation
from mdt_jax.training.actions import tolerate_full_disk
from mdt_jax.training.config_flag import parse_config_flags
from mdt_jax.training.step import draw_latents
from mdt_jax.training.step_log import NonFiniteLoss

ROOT = Path(__file__).parents[1]
TRAIN = [sys.executable, "-m", "mdt_jax.train"]
# `python -m mdt_jax.train` that kills itself SECONDS after the COUNT-th call of MODULE:CLASS.METHOD
# began, or returned.
KILLED_TRAIN = """
import importlib, os, runpy, signal, sys, threading
module, name, when, count, seconds = sys.argv[1:6]
owner_name, name = name.split(".")
owner = getattr(importlib.import_module(module), owner_name)
original, calls = getattr(owner, name), []

def kill_soon():
    calls.append(name)
    if len(calls) == int(count):
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
        threading.Timer(float(seconds), kill).start() if float(seconds) else kill()

def wrapped(*args, **kwargs):
    if when == "began":
        kill_soon()
    result = original(*args, **kwargs)
    if when == "returned":
        kill_soon()
    return result

setattr(owner, name, wrapped)
del sys.argv[1:6]
runpy.run_module("mdt_jax.train", run_name="__main__", alter_sys=True)
"""
CONFIG = """
from mdt_jax.config import apply_recipe, default_config

def get_config():
    config = default_config()
    config.model.update(name="MDT", input_size=8, in_channels=1, num_classes=4, patch_size=4)
    config.model.update(hidden_size=8, depth=2, num_heads=2, decoder_depth=1)
    apply_recipe(config)
    config.data.update(name="npy", path={data!r})
    config.num_steps, config.batch_size = 20, 8
    config.sample.update(every=0, guided_channels=None)
    return config
"""


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """XLA without its expensive passes, which the tiny models here do not repay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for the commands
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    """A config file of a model of 4 tokens, and its data: 20 images of noise."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 256, (20, 8, 8, 1)).astype(np.uint8))
    np.save(folder / "labels.npy", np.arange(20) % 4)
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(data=str(folder)))
    return path


def run_command(command, **environment):
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def sealed_steps(workdir):
    return sorted(int(path.parent.name) for path in workdir.glob("checkpoints/*/manifest.json"))


def bits(workdir, items):
    """Every array of a run's newest checkpoint, by path."""
    trees = {name: checkpoints.restore_item(workdir, name) for name in items}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}


def logged(workdir):
    """The lines of metrics.jsonl, without what the clock decides."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in metrics.CLOCK} for line in lines]


def test_a_run_killed_anywhere_ends_with_the_bits_of_one_that_was_not(tiny_config, tmp_path):
    # Windows of 3 steps between log lines, so that checkpoints fall inside them.
    flags = ["--config", tiny_config, "--config.log_every=3", "--config.checkpoint_every=5"]
    flags += ["--config.optimizer.name=adan", "--config.ema_rates=(0.9, 0.99)"]
    flags += ["--config.diffusion.timestep_sampler=loss_second_moment", "--config.mesh.fsdp=2"]
    # Few timesteps, so that the losses seen decide which are drawn before the run ends.
    flags += ["--config.diffusion.schedule=squared_cosine", "--config.diffusion.num_timesteps=4"]
    flags += ["--config.sample.steps=4"]
    flags += ["--config.schedule.name=cosine", "--config.optimizer.learning_rate=1e-2"]
    flags += ["--config.eval_every=10", "--config.eval.num_samples=8", "--config.eval.steps=2"]
    environment = {
        "XLA_FLAGS": xla_flags(2),
        # Restarts are fast, and the killed run's programs are the other's.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    whole, killed, wall = tmp_path / "whole", tmp_path / "killed", []
    reference = run_command([*TRAIN, *flags, "--workdir", whole], **environment)
    assert reference.returncode == 0, reference.stderr

    def kill(method, when, count, seconds):
        """Starts the run, kills it, and returns its newest checkpoint."""
        driver = [sys.executable, "-c", KILLED_TRAIN, *method.split(":"), when, count, seconds]
        began = time.monotonic()
        done = run_command([*driver, *flags, "--workdir", killed], **environment)
        wall.append(time.monotonic() - began)
        assert done.returncode == -signal.SIGKILL, done.stderr
        return max(sealed_steps(killed), default=None)

    rng = random.Random()
    save, restore = (f"mdt_jax.checkpoints:Checkpoints.{name}" for name in ("save", "restore"))
    moments = [  # and what may be the newest checkpoint after each
        (("mdt_jax.training.metrics:Window.add", "began", rng.randint(1, 4), 0), [None]),
        ((save, "returned", 2, rng.uniform(0, 0.02)), [5, 10]),  # in the midst of it
        ((restore, "began", 1, rng.uniform(0, 0.02)), [5, 10]),
    ]
    for moment, newest in moments:
        assert kill(*moment) in newest, moments

    began = time.monotonic()
    last = run_command([*TRAIN, *flags, "--workdir", killed], **environment)
    wall.append(time.monotonic() - began)
    assert last.returncode == 0, last.stderr
    # Whatever it needs was compiled by the starts before, and kept.
    assert "; 0 programs were compiled, " in last.stderr
    record = goodput.read_record(killed)
    assert record["starts"] == 4 and record["seconds"]["lost"] > 0
    # A process takes a while to end after its last word, on a busy machine a long one.
    assert 0.7 * sum(wall) < sum(record["seconds"].values()) < sum(wall)
    assert logged(killed) == logged(whole), moments
    assert [line["step"] for line in logged(whole)] == [3, 6, 9, 10, 12, 15, 18, 20, 20]
    assert [line["step"] for line in logged(whole) if "eval_fid" in line] == [10, 20]
    items = ["state", "ema_0.9", "ema_0.99"]
    expected, found = bits(whole, items), bits(killed, items)
    different = [name for name in expected if expected[name] != found[name]]
    assert expected.keys() == found.keys() and not different, moments
    assert any("loss_history" in name for name in expected)


def load_config(path):
    """The config of `--config PATH` or `--config PATH:ARGUMENT`."""
    path, *argument = str(path).split(":")
    spec = importlib.util.spec_from_file_location("experiment", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def changed(config, **settings):
    """A copy of a config with other settings, "model__depth" for model.depth."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict({k.replace("__", "."): v for k, v in settings.items()})
    return copy


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """A run of 12 steps in this process, with two counts of kept tokens, grids and judgements.

    Its attributes: config, workdir; steps, what `Run.compile_steps` gave; compiled, what was being
    compiled after the first step.
    """
    config = changed(load_config(tiny_config), model__patch_size=2, masking__ratio_span=0.06)
    config.num_steps, config.log_every, config.checkpoint_every = 12, 4, 4
    config.sample.update(every=6, steps=2, num_samples=8)
    config.eval_every, config.eval.num_samples, config.eval.batch_size = 6, 12, 8
    workdir, steps = tmp_path_factory.mktemp("finished"), {}
    compile_steps = loop.Run.compile_steps

    def keep_steps(run, source):
        steps.update(compile_steps(run, source))
        return steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "compile_steps", keep_steps)
        compiled = compiled_after_first_step(patch, config, workdir)
    return types.SimpleNamespace(config=config, workdir=workdir, steps=steps, compiled=compiled)


def compiled_after_first_step(patch, config, workdir):
    """Trains, and returns what was compiled when the first step had been handed over."""
    heard, first_step = [], []
    add = loop.StepLog.add

    def mark(log, step, *metrics):
        first_step.append(step)
        add(log, step, *metrics)

    def listen(event, duration, fun_name="?", **_):
        if first_step and "backend_compile" in event:
            heard.append(fun_name)

    patch.setattr(loop.StepLog, "add", mark)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        loop.train(config, workdir)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return heard


def test_nothing_compiles_after_the_first_step(finished):
    assert len(finished.steps) == 2
    run = loop.Run(finished.config, "")
    assert {run.kept(step) for step in range(12)} == set(finished.steps)  # both were used
    assert finished.compiled == []


def test_what_is_not_compiled_before_the_first_step_is_heard(finished, tmp_path, monkeypatch):
    def compile_only_first(run, _):
        first, second = run.kept_tokens.counts
        trainer = dataclasses.replace(run.trainer, examples=data.ExampleKind.PIXELS)
        return {first: finished.steps[first], second: trainer.jit_step(second)}

    def warm_up_when_used(sampler, params):
        if isinstance(params["pos_embed"], jax.Array):
            warm_up(sampler, params)

    warm_up = sampling.CompiledSampler.warm_up
    monkeypatch.setattr(loop.Run, "compile_steps", compile_only_first)
    monkeypatch.setattr(sampling.CompiledSampler, "warm_up", warm_up_when_used)
    config = changed(finished.config, num_steps=6, eval_every=0)
    run = loop.Run(config, "")
    counts = run.kept_tokens.counts
    assert run.kept(0) == counts[0] and counts[1] in map(run.kept, range(6))
    heard = compiled_after_first_step(monkeypatch, config, tmp_path)
    assert len(heard) >= 2, heard  # the step of the other count, and the sampler


@pytest.mark.smoke
def test_metrics_hold_the_losses_and_the_speed(finished):
    lines = [json.loads(line) for line in (finished.workdir / "metrics.jsonl").open()]
    lines = [line for line in lines if "eval_fid" not in line]
    assert [line["step"] for line in lines] == [4, 8, 12]
    quartiles = [f"{name}_loss_q{q}" for name in ("full", "masked") for q in range(4)]
    promised = ["loss", "full_loss", "masked_loss", *quartiles, "grad_norm", "learning_rate"]
    promised += ["seconds_per_step", "images_per_second", "train_seconds"]
    for line in lines:
        assert set(promised) <= line.keys()
        assert line["loss"] == pytest.approx(line["full_loss"] + line["masked_loss"], rel=1e-5)
        speed = finished.config.batch_size / line["seconds_per_step"]
        assert line["images_per_second"] == pytest.approx(speed)
        assert "mfu" not in line  # no peak is known for CPUs
    events = list((finished.workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert events and b"masked_loss" in events[0].read_bytes()


def test_judgements_are_lines_that_say_by_what_and_of_how_many(finished):
    lines = [json.loads(line) for line in (finished.workdir / "metrics.jsonl").open()]
    found = [line for line in lines if "eval_fid" in line]
    assert [line["step"] for line in found] == [6, 12]
    digests = {line["evaluator"] for line in found}
    assert len(digests) == 1 and digests.pop().startswith("classifier ")
    for line in found:
        assert line["eval_samples"] == 12 and line["eval_fid"] > 0
        assert {"eval_inception_score", "eval_precision", "eval_recall"} <= line.keys()
    seconds = [line["train_seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    # Both were written before another step: the clock stood still while samples were judged.
    assert lines[-1]["step"] == lines[-2]["step"] == 12
    assert lines[-1]["train_seconds"] - lines[-2]["train_seconds"] < lines[-1]["eval_seconds"]


class Judge(run_evaluation.RunEvaluator):
    """In the place of `RunEvaluator`; is asked to stop at the steps in `stopped`, once each."""

    stopped: list = []

    def __init__(self, run, source):
        pass

    def compile(self):
        pass

    def judge(self, state, should_stop):
        if (step := int(state.step)) in self.stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            until(should_stop)
            return self.stopped.remove(step)
        return run_evaluation.Judgement(
            {"eval_fid": 1 / step, "eval_samples": 8.0, "eval_seconds": 0.0}, "judge"
        )


def test_a_judgement_that_was_cut_short_is_made_up_for_when_the_run_goes_on(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: finished.steps)
    monkeypatch.setattr(loop, "RunEvaluator", Judge)
    config = changed(finished.config, sample__every=0, checkpoint_every=20)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    loop.train(config, whole)
    monkeypatch.setattr(Judge, "stopped", [6, 12])
    for reached, judged in ((6, []), (12, [6]), (12, [6, 12])):
        assert int(loop.train(config, stopped).step) == reached
        assert sorted(metrics.steps_with(stopped / "metrics.jsonl", "eval_fid")) == judged
    assert logged(stopped) == logged(whole)
    before = files(stopped)
    loop.train(config, stopped)
    assert files(stopped) == before


def test_grids_say_what_made_them(finished):
    grids = sorted((finished.workdir / "samples").iterdir())
    assert [path.name for path in grids] == ["00000006.png", "00000012.png"]
    said = images.read_metadata(grids[-1])
    assert "synthetic" in said["Content"]
    assert said["step"] == "12" and said["labels"] == "0,1,2,3,0,1,2,3"


def files(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_resuming_a_finished_run_says_so_and_changes_nothing(finished, caplog):
    before = files(finished.workdir)
    with caplog.at_level("INFO", logger="absl"):
        state = loop.train(finished.config, finished.workdir)
    assert int(state.step) == 12
    assert f"{finished.workdir} is trained already: step 12 of 12" in caplog.text
    assert files(finished.workdir) == before


@pytest.mark.smoke
def test_a_finished_run_goes_on_with_more_steps(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished.workdir, tmp_path / "longer")
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: finished.steps)
    state = loop.train(
        changed(finished.config, num_steps=15, sample__every=0, eval_every=0), workdir
    )
    assert int(state.step) == 15
    before, after = logged(finished.workdir), logged(workdir)
    assert after[:-1] == before and after[-1]["step"] == 15
    step, meta = checkpoints.read_meta(workdir)
    assert step == 15 and meta["position"] == 15 * finished.config.batch_size


def test_a_run_goes_on_with_other_settings_that_are_told_or_allowed(
    finished, tmp_path, monkeypatch, caplog
):
    workdir = shutil.copytree(finished.workdir, tmp_path / "other")
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: finished.steps)
    quiet = changed(finished.config, sample__every=0, eval_every=0)
    other = changed(quiet, num_steps=13, optimizer__weight_decay=0.1, data__flip=False)
    with pytest.raises(ValueError, match=r"\(data.flip: True, now False\); .*=data.flip$"):
        loop.train(other, workdir)
    for config, said in (
        (other, "data.flip False (was True), num_steps 13 (was 12), optimizer.weight_decay 0.1"),
        (changed(other, num_steps=14), "num_steps 14 (was 13). If"),
    ):
        caplog.clear()
        loop.train(config, workdir, allowed_changes=["data.flip"])
        told = [r.getMessage() for r in caplog.records if "other settings" in r.getMessage()]
        assert len(told) == 1 and said in told[0]
    step, meta = checkpoints.read_meta(workdir)
    assert (step, meta["config"]["data"]["flip"], meta["position"]) == (14, False, 14 * 8)


def test_a_loss_that_is_not_finite_stops_the_run(finished, tmp_path, monkeypatch):
    """Poison at step 6: checkpoints are due at 4 and 8; the loss of 6 is seen one step late."""

    def poisoned(step_fn):
        def step(state, batch):
            factor = np.float32(np.nan if int(state.step) == 5 else 1)
            params = jax.tree.map(lambda leaf: leaf * factor, state.params)
            return step_fn(state.replace(params=params), batch)

        return step

    steps = {count: poisoned(step) for count, step in finished.steps.items()}
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: steps)
    config = changed(finished.config, sample__every=0, eval_every=0)
    with pytest.raises(NonFiniteLoss) as error:
        loop.train(config, tmp_path)
    assert "loss is nan at step 6; step 4 is saved" in str(error.value)
    assert sealed_steps(tmp_path) == [4]

    # A checkpoint due at the very step whose loss is not finite is not written either.
    with pytest.raises(NonFiniteLoss, match="at step 6; step 4 is saved"):
        loop.train(changed(config, checkpoint_every=2), tmp_path)
    assert sealed_steps(tmp_path) == [4]


def before_step(monkeypatch, actions):
    """Calls what `actions` has for a step once its metrics are there, and waits a moment."""
    add = loop.StepLog.add

    def act(log, step, *metrics):
        if step in actions:
            actions[step]()
            time.sleep(1)
        add(log, step, *metrics)

    monkeypatch.setattr(loop.StepLog, "add", act)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(
    number, finished, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: finished.steps)
    config = changed(finished.config, sample__every=0, eval_every=0)
    with caplog.at_level("INFO", logger="absl"), monkeypatch.context() as patch:
        before_step(patch, {5: lambda: os.kill(os.getpid(), number)})
        state = loop.train(config, tmp_path)
    assert int(state.step) == 5 and sealed_steps(tmp_path) == [4, 5]
    assert "stopped at step 5, saved; the same command resumes" in caplog.text
    loop.train(config, tmp_path)
    items = ["state", *(f"ema_{rate}" for rate in config.ema_rates)]
    assert bits(tmp_path, items) == bits(finished.workdir, items)
    assert logged(tmp_path) == [line for line in logged(finished.workdir) if "loss" in line]


def test_a_time_limit_ends_the_command_with_a_checkpoint_and_status_0(
    finished, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: finished.steps)
    late = []
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * len(late))
    monkeypatch.setattr("mdt_jax.parallel.preemption.time", clock)
    actions = dict.fromkeys([6, 7, 8], lambda: None)  # it looks at the clock once a second
    before_step(monkeypatch, actions | {5: lambda: late.append("an hour")})
    config = changed(finished.config, sample__every=0, eval_every=0)
    with caplog.at_level("INFO", logger="absl"):
        command(monkeypatch, config, tmp_path, max_hours=1.0)
    step = sealed_steps(tmp_path)[-1]
    assert 5 <= step <= 9 and "stopping: --max_hours 1" in caplog.text
    assert f"stopped at step {step}, saved; the same command resumes" in caplog.text


def test_the_account_of_wall_time_adds_up_over_five_resumptions(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: finished.steps)
    config = changed(finished.config, sample__every=0, eval_every=0, checkpoint_every=3)
    wall = 0.0

    def fail():
        raise ZeroDivisionError

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    # Failures at 2, 8 and 10 lose the steps after 0, 6 and 9.
    for step, action in {2: fail, 5: stop, 8: fail, 7: stop, 10: fail, 12: lambda: None}.items():
        with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            before_step(patch, {step: action})
            if action is fail:
                stack.enter_context(pytest.raises(ZeroDivisionError))
            began = time.monotonic()
            loop.train(config, tmp_path)
        wall += time.monotonic() - began
    record = goodput.read_record(tmp_path)
    assert record["starts"] == 6 and record["step"] == 12
    assert sum(record["seconds"].values()) == pytest.approx(wall, rel=0.01)
    assert all(record["seconds"][kind] > 0 for kind in ("lost", "steps", "input", "checkpoint"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    walls = [line["wall_seconds"] for line in lines]
    assert walls == sorted(walls) and 0.9 * wall < walls[-1] < wall
    for line in lines:
        kinds = [line[f"wall_{kind}"] for kind in goodput.KINDS]
        assert sum(kinds) == pytest.approx(line["wall_seconds"])
        assert line["goodput"] == pytest.approx(line["wall_steps"] / line["wall_seconds"])


def until(condition, seconds=60):
    """Waits for what happens in the background."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def file_size_limit():
    """Sets the size beyond which no file can be written, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    time.sleep(1)  # for writes that are still going to fail, lest the next test hears of them
    gc.collect()


@pytest.mark.parametrize(("processes", "ends"), [(1, False), (2, True)])
def test_a_full_disk_ends_only_a_job_of_several_processes(processes, ends, monkeypatch, caplog):
    """Those that could write their part wait for the one that could not."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with contextlib.ExitStack() as stack:
        if ends:
            stack.enter_context(pytest.raises(checkpoints.SaveError, match="no space left"))
        with tolerate_full_disk():
            raise checkpoints.SaveError("no space left")
    assert ("training goes on" in caplog.text) != ends


# TensorStore's other writes then report to an event loop that is closed.
disk_may_be_full = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@disk_may_be_full
def test_a_run_outlives_a_full_disk(finished, tmp_path, monkeypatch, caplog, file_size_limit):
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: finished.steps)
    config = changed(finished.config, sample__every=0, eval_every=0)
    actions = {4: lambda: file_size_limit(2**14), 7: file_size_limit}
    actions |= dict.fromkeys([5, 6], lambda: None)  # the save fails meanwhile
    before_step(monkeypatch, actions)
    loop.train(config, tmp_path)
    assert sealed_steps(tmp_path) == [8, 12]
    assert "checkpoints/4 failed" in caplog.text and "training goes on" in caplog.text
    items = ["state"]
    assert bits(tmp_path, items) == bits(finished.workdir, items)


@disk_may_be_full
def test_a_run_whose_last_checkpoint_finds_no_room_fails_and_keeps_the_others(
    finished, tmp_path, monkeypatch, file_size_limit
):
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: finished.steps)
    config = changed(finished.config, sample__every=0, eval_every=0)

    def fill_the_disk():
        until(lambda: sealed_steps(tmp_path) == [4, 8])
        file_size_limit(2**14)

    before_step(monkeypatch, {11: fill_the_disk})
    with pytest.raises(checkpoints.SaveError, match="checkpoints/12 failed.*File too large"):
        loop.train(config, tmp_path)
    assert sealed_steps(tmp_path) == [4, 8]


def test_a_workdir_that_is_removed_while_its_run_trains_ends_it_at_the_next_line(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: finished.steps)
    config = changed(finished.config, sample__every=0, eval_every=0)
    steps = []

    def remove():
        steps.append(9)
        until(lambda: sealed_steps(tmp_path / "run") == [4, 8])
        shutil.rmtree(tmp_path / "run")

    before_step(monkeypatch, {9: remove})
    with pytest.raises(checkpoints.CheckpointError, match="run was removed while this run trained"):
        loop.train(config, tmp_path / "run")
    assert steps == [9] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_grid_that_finds_no_room_ends_only_a_job_of_several_processes(
    processes, monkeypatch, caplog
):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    error = OSError(errno.ENOSPC, "No space left on device", "samples/0.png")
    with contextlib.ExitStack() as stack:
        if processes > 1:
            stack.enter_context(pytest.raises(OSError, match="No space"))
        stack.enter_context(tolerate_full_disk())
        raise error
    said = "samples/0.png: No space left on device; make room"
    assert (said in caplog.text) == (processes == 1)
    with pytest.raises(OSError, match="other"), tolerate_full_disk():
        raise OSError(errno.EIO, "other")


@disk_may_be_full  # by the tests before
@pytest.mark.parametrize(
    ("workdir", "way_out"),
    [
        ("gs://bucket/run", "mount the bucket .gcsfuse"),
        ("s3://bucket/run", "mount-s3 cannot append to a file, .*; give a folder of a shared"),
    ],
)
def test_a_workdir_on_a_bucket_is_refused(workdir, way_out, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"workdir {workdir} is a URL: {way_out}"):
        loop.train(finished.config, workdir)
    assert not list(tmp_path.iterdir())


def test_the_command_ends_at_a_loss_that_is_not_finite(finished, tmp_path, monkeypatch):
    def diverged(state, batch):
        state, values = finished.steps[loop.Run(finished.config, "").kept(0)](state, batch)
        return state, values | {"grad_norm": np.float32(np.inf)}

    steps = dict.fromkeys(finished.steps, diverged)
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: steps)
    with pytest.raises(SystemExit, match="^error: grad_norm is inf at step 1; there is no checkpo"):
        command(monkeypatch, changed(finished.config, sample__every=0, eval_every=0), tmp_path)


KEPT = {  # tokens: (input_size, patch_size)
    16: (8, 2),
    256: (32, 2),
}


@pytest.mark.parametrize("tokens", KEPT)
def test_a_run_draws_the_references_numbers_of_kept_tokens(tiny_config, tokens):
    size, patch = KEPT[tokens]
    config = changed(load_config(tiny_config), model__input_size=size, model__patch_size=patch)
    run = loop.Run(changed(config, masking__ratio_span=0.2), "")
    drawn = np.array([run.kept(step) for step in range(10_000)])
    for count, p in zip(run.kept_tokens.counts, run.kept_tokens.probabilities, strict=True):
        sigma = np.sqrt(p * (1 - p) / len(drawn))
        assert abs(np.mean(drawn == count) - p) < 4 * sigma, count
    assert set(drawn) <= set(run.kept_tokens.counts)
    ratios = np.random.default_rng(0).uniform(0.3, 0.5, 100_000)
    reference = np.floor(tokens * (1 - ratios)).mean()
    assert drawn.mean() == pytest.approx(reference, rel=0.01)


REFUSED = {
    "a batch that the mesh cuts": ({"batch_size": 12}, r"batch_size 12 .*; 8 or 16 would be"),
    "a patch that does not fit": ({"model__patch_size": 3}, r"patch_size 3|input_size 8"),
    "heads cut by tensor": ({"mesh__tensor": 4}, r"mesh.tensor 4 .* 2 heads; 1, 2 would"),
    "an optimizer": ({"optimizer__name": "lion"}, r"optimizer.name 'lion' .*adamw, adam, adan"),
    "a schedule": ({"schedule__name": "sine"}, r"schedule.name 'sine' .*constant, linear"),
    "a noise schedule": ({"diffusion__schedule": "sine"}, r"schedule 'sine' .*known: linear"),
    "a timestep sampler": (
        {"diffusion__timestep_sampler": "sobol"},
        r"diffusion.timestep_sampler 'sobol' .*uniform",
    ),
    "a sampler": ({"sample__sampler": "euler"}, r"sample.sampler 'euler' .*ddpm, ddim"),
    "a dtype": ({"model__dtype": "float8"}, r"model.dtype 'float8' .*bfloat16, float32"),
    "a model": ({"model__name": "MTD"}, r"unknown model 'MTD'; the nearest: .*MDT"),
    "a long warm-up": ({"schedule__warmup_steps": 20}, r"warmup_steps 20 .* the run's 20"),
    "more classes": ({"model__num_classes": 3}, r"4 classes, model.num_classes is 3"),
    "other images": ({"model__in_channels": 3}, r"\(8, 8, 1\), the model takes \(8, 8, 3\)"),
    "no steps": ({"num_steps": 0}, r"num_steps 0 is below 1"),
    "channels to guide": ({"sample__guided_channels": 3}, r"guided_channels 3 .*None guides all"),
    "sampling steps": ({"sample__steps": 2000}, r"2000"),
    "no averages": ({"ema_rates": ()}, r"ema_rates is empty"),
    "no mask ratio": ({"masking__ratio": 0.95}, r"masking.ratio 0.95|keeps none of 4 tokens"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(what, tiny_config, tmp_path):
    settings, message = REFUSED[what]
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=message) as error:
        loop.train(changed(load_config(tiny_config), **settings), workdir)
    assert "\n" not in str(error.value)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "seed: 0, now 1"),
        ({"model__depth": 4}, "model.depth: 2, now 4"),
        ({"ema_rates": (0.9999, 0.99)}, "ema_rates: (0.9999,), now (0.9999, 0.99)"),
        ({"data__flip": False}, "data.flip: True, now False"),
    ],
)
def test_the_workdir_of_another_run_is_refused(settings, message, finished):
    before = files(finished.workdir)
    with pytest.raises(ValueError, match="another --workdir") as error:
        loop.train(changed(finished.config, **settings), finished.workdir)
    assert message in str(error.value) and str(finished.workdir) in str(error.value)
    assert files(finished.workdir) == before


def test_the_command_refuses_an_unknown_key_in_one_line(tiny_config, tmp_path):
    flags = ["--config", tiny_config, "--workdir", tmp_path / "run", "--config.batchsize=3"]
    done = run_command([*TRAIN, *flags])
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "batchsize" in done.stderr and "batch_size" in done.stderr
    assert not (tmp_path / "run").exists()


def command(monkeypatch, config, workdir=None, dry_run=False, max_hours=None, compile_only=False):
    """The command's main, with its flags parsed."""

    class Parsed(types.SimpleNamespace):
        def __getitem__(self, name):
            return types.SimpleNamespace(override_values={})

    parsed = Parsed(
        config=config,
        workdir=workdir,
        dry_run=dry_run,
        max_hours=max_hours,
        allow_changes=[],
        compile_only=compile_only,
    )
    monkeypatch.setattr(command_module, "flags", types.SimpleNamespace(FLAGS=parsed))
    command_module.main([])


def test_a_config_that_is_not_there_is_named_with_those_that_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=r"--config configs/digit\.py is not there; .* digits:x\?"):
        parse_config_flags(["train", "--config", "configs/digit.py:x", "--workdir", "w"])


def test_a_config_that_is_a_url_is_named_as_it_was_given():
    for flags in (["--config=https://x.y/c.py:A"], ["--config", "https://x.y/c.py:A"]):
        with pytest.raises(SystemExit, match=r"--config https://x\.y/c\.py:A is a URL: download"):
            parse_config_flags(["train", *flags])


def test_the_command_wants_a_workdir(tiny_config):
    done = run_command([*TRAIN, "--config", tiny_config])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --workdir is missing")


def test_a_dry_run_shows_the_run_and_touches_nothing(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, load_config(tiny_config), tmp_path / "run", dry_run=True)
    shown = capsys.readouterr().out
    for part in ("trainable parameters", "MiB a device", "20 examples", "2.5 steps an epoch"):
        assert part in shown
    assert not list(tmp_path.iterdir())


CONFIGS = {  # and its trainable parameters
    "digits.py": None,
    "digits_inpainting.py": None,
    "fashion.py": None,
    "finetune_folder.py": None,
    "ffhq256.py": None,
    "imagenet256.py:MDTv2-XL/2": 742_263_904,
    "imagenet256_step_decay.py": 742_263_904,
    "imagenet512.py": 745_429_088,
    "lsun_bedroom256.py": None,
}


def test_every_config_is_tested():
    assert {name.split(":")[0] for name in CONFIGS} == {p.name for p in ROOT.glob("configs/*.py")}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_can_be_trained_and_says_how(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    config = load_config(f"configs/{name}")
    assert to_json(config).keys() == to_json(default_config()).keys()
    command(monkeypatch, config, dry_run=True)
    shown = capsys.readouterr().out
    if CONFIGS[name]:
        assert f"{CONFIGS[name]:,} trainable parameters" in shown
    if config.data.name == "latents":
        assert "not there" in shown and "data.path" in shown, shown
    path = f"configs/{name.split(':')[0]}"
    assert f"python -m mdt_jax.train --config {path}" in (ROOT / path).read_text()


def test_a_run_on_latents_draws_them_from_its_posteriors(tiny_config):
    run = loop.Run(load_config(tiny_config), "")
    rng = np.random.default_rng(0)
    posteriors = rng.normal(size=(8, 8, 8, 2)).astype(np.float32)
    labels = np.arange(8, dtype=np.int32) % 4
    latents = np.asarray(
        draw_latents(run.config.seed, jax.numpy.int32(0), jax.numpy.asarray(posteriors))
    )
    source = data.arrays(posteriors, labels, tuple("abcd"))
    losses = []
    for steps, given in ((run.compile_steps(source), posteriors), (run.compile_steps(), latents)):
        batch = {"image": given, "label": labels}
        batch = jax.device_put(batch, sharding.batch_sharding(run.mesh))
        losses.append(float(steps[run.kept(0)](run.trainer.create_state(), batch)[1]["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_going_on_with_other_classes_or_another_autoencoder_is_refused(caplog):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    source = data.arrays(images, np.arange(4) % 2, ("cat", "dog"))
    meta = {"class_names": ["cat", "dog"], "num_examples": 4, "latents": None}
    check = functools.partial(checks.check_data_unchanged, source=source, workdir=Path("run"))
    check(meta)
    check({})  # a fresh run
    check(
        {"weights": {}, "latents": None, "class_names": []}
    )  # converted, of data that nobody knows
    assert not caplog.records
    for names, said in ((["cat", "fox"], "class 1 is 'dog', and was 'fox'"),
                        (["cat"], "class 1 is 'dog', and was None")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            check(meta | {"class_names": names})
    check(meta | {"num_examples": 5})
    assert "4 examples, and 5 when the run was last saved" in caplog.text


def test_utilisation_is_logged_where_the_peak_is_known(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("mdt_jax.parallel.devices.peak_flops", lambda device_kind, dtype: 1e12)
    run = loop.Run(finished.config, tmp_path)
    log = loop.StepLog(run, 3, checkpoints.Checkpoints(tmp_path))
    log.add(4, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4})
    log.settle()
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    expected = run.step_flops() / line["seconds_per_step"] / (run.mesh.size * 1e12)
    assert line["mfu"] == pytest.approx(expected)


COORDINATES = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "0",
}
EXPLICIT = {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 0}
ENVIRONMENTS = {
    "a workstation": ({}, None),
    "SLURM, one task": ({"SLURM_NTASKS": "1"}, None),
    "SLURM": ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a[1-8]"}, {}),
    "SLURM, without srun": ({"SLURM_NTASKS": "8"}, None),
    "Open MPI": ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
    "a TPU slice of one host": ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    "a TPU slice": ({"TPU_WORKER_HOSTNAMES": "host0,host1"}, {}),
    "several TPU slices": ({"MEGASCALE_COORDINATOR_ADDRESS": "host0"}, {}),
    "JAX's own variables": (COORDINATES, EXPLICIT),
    "JAX's own, one process": (COORDINATES | {"JAX_NUM_PROCESSES": "1"}, None),
    "empty variables": ({"SLURM_NTASKS": "", "TPU_WORKER_HOSTNAMES": ""}, None),
}


@pytest.mark.parametrize("where", ENVIRONMENTS)
def test_processes_are_joined_where_there_are_several(where, monkeypatch):
    environment, expected = ENVIRONMENTS[where]
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    distributed.initialize_distributed(environment)
    joined = [] if expected is None else [{**expected, "heartbeat_timeout_seconds": 30}]
    assert calls == joined
    assert distributed.is_cluster(environment) == bool(joined)


@pytest.mark.parametrize("missing", ["JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"])
def test_half_a_cluster_is_refused(missing):
    environment = {k: v for k, v in COORDINATES.items() if k != missing}
    with pytest.raises(ValueError, match=f"JAX_NUM_PROCESSES is set, {missing} is not"):
        distributed.initialize_distributed(environment)
