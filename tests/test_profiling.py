"""Where a run's time goes: a trace of a few steps, and their times."""

import json
import types

import jax
import numpy as np
import pytest

from mdt_jax import config as config_lib
from mdt_jax.parallel import sharding
from mdt_jax.parallel.devices import device_memory
from mdt_jax.train import loop
from mdt_jax.training import clock
from mdt_jax.training.checks import check_settings
from mdt_jax.training.profiling import StepProfiler
from mdt_jax.training.run import Run

SCOPES = ("model", "loss", "optimizer", "ema")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A run of 6 steps whose steps 3 and 4 are traced; with what was compiled after the first."""
    folder = tmp_path_factory.mktemp("traced")
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 256, (20, 8, 8, 1)).astype(np.uint8))
    np.save(folder / "labels.npy", np.arange(20) % 4)
    config = config_lib.default_config()
    config.model.update(name="MDT", input_size=8, in_channels=1, num_classes=4, patch_size=4)
    config.model.update(hidden_size=8, depth=2, num_heads=2, decoder_depth=1)
    config_lib.apply_recipe(config)
    config.data.update(name="npy", path=str(folder))
    config.num_steps, config.batch_size, config.log_every = 6, 8, 3
    config.sample.update(every=0, guided_channels=None)
    config.profile_steps = (3, 4)
    compiled, steps, programs = [], [], {}
    compile_steps, add = Run.compile_steps, loop.StepLog.add

    def keep(run, source):
        programs.update(compile_steps(run, source))
        return programs

    def mark(log, step, *metrics):
        steps.append(step)
        add(log, step, *metrics)

    def listen(event, duration, fun_name="?", **_):
        if steps and "backend_compile" in event:
            compiled.append(fun_name)

    jax.config.update("jax_disable_most_optimizations", True)
    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "compile_steps", keep)
        patch.setattr(loop.StepLog, "add", mark)
        loop.train(config, folder / "run")
    jax.monitoring.unregister_event_duration_listener(listen)
    jax.config.update("jax_disable_most_optimizations", False)
    (program,) = programs.values()
    return types.SimpleNamespace(workdir=folder / "run", compiled=compiled, program=program)


def test_the_steps_asked_for_are_traced(traced):
    (trace,) = (traced.workdir / "profile").glob("plugins/profile/*/*.xplane.pb")
    content = trace.read_bytes()
    assert b"step_num" in content and b"train" in content


def test_a_trace_compiles_nothing(traced):
    assert traced.compiled == []


@pytest.mark.parametrize("scope", SCOPES)
def test_the_parts_of_a_step_have_names(traced, scope):
    assert f"{scope}/" in traced.program.as_text() or f"({scope})" in traced.program.as_text()


def test_every_line_has_the_times_of_steps_and_the_first_that_of_compiling(traced):
    lines = [json.loads(line) for line in (traced.workdir / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert 0 < line["step_seconds_p50"] <= line["step_seconds_p99"]
        assert 0 <= line["input_wait_seconds"] < 60
        assert "device_memory_bytes" not in line  # a CPU does not say
    assert lines[0]["compile_seconds"] > 0 and "compile_seconds" not in lines[1]


def test_without_steps_nothing_is_traced(tmp_path):
    profiler = StepProfiler(tmp_path)
    for step in range(1, 4):
        with profiler.step(step):
            pass
        assert not profiler.due(step)
    profiler.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_among_the_steps_writes_what_it_has(tmp_path):
    profiler = StepProfiler(tmp_path, (2, 9))
    with profiler.step(2):
        pass
    assert not profiler.due(2)
    profiler.close()
    assert len(list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.parametrize("steps", [(100,), (100, 100), (0, 5), (105, 100), (1, 2, 3)])
def test_profile_steps_that_are_not_two_ascending_steps_are_refused(steps):
    config = config_lib.default_config()
    config.profile_steps = steps
    with pytest.raises(ValueError, match=rf"profile_steps \({steps[0]}.*such as \(100, 105\)"):
        check_settings(config, sharding.create_mesh())


class Watch(clock.Stopwatch):
    seconds = 5.0  # moved by hand


def test_step_times_are_of_single_steps_and_leave_pauses_out():
    watch = Watch()
    times = clock.StepTimes(watch)
    for seconds, waited in ((1.0, 0.25), (3.0, 0.75), (2.0, 0.5)):
        with times.waiting():
            watch.seconds += waited
        watch.seconds += seconds - waited
        times.step()
    found = times.metrics()
    assert found["step_seconds_p50"] == 2.0
    assert found["step_seconds_p99"] == pytest.approx(2.98)
    assert found["input_wait_seconds"] == 0.5
    times.reset()
    assert times.metrics() == {}


def test_memory_is_that_of_the_first_device(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 7, "peak_bytes_in_use": 9})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert device_memory() == {"device_memory_bytes": 7, "device_memory_peak_bytes": 9}
