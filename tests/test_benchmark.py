"""tools/benchmark.py: it times a run's own programs; its arithmetic, output and refusals."""

import json
import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from fixtures import reference, relative_error

from configs import imagenet256
from mdt_jax.commands import benchmarking
from mdt_jax.commands.benchmarking import Workload, Workloads
from mdt_jax.compilers import estimate
from mdt_jax.compilers.gpu_estimate import GpuEstimate
from mdt_jax.compilers.programs import estimate_here
from mdt_jax.models import flops
from tools import benchmark

ROOT = Path(__file__).parents[1]
TINY = {
    "model.name": "MDTv2", "model.input_size": 8, "model.hidden_size": 32, "model.depth": 4,
    "model.num_heads": 2, "model.patch_size": 2, "model.decoder_depth": 2, "batch_size": 8,
    "sample.steps": 3, "model.num_classes": 10,
}  # fmt: skip


def tiny(**changes):
    config = imagenet256.get_config()
    config.update_from_flattened_dict(TINY | changes)
    return Workloads(config)


@pytest.fixture(scope="module")
def parts():
    # One block, which compiles in a moment.
    return tiny(**{"model.name": "DiT", "model.depth": 1, "model.decoder_depth": None})


def test_the_step_that_is_timed_keeps_the_count_nearest_to_the_runs_mean(parts):
    assert parts.num_kept is None
    parts = tiny()
    assert len(parts.run.kept_tokens.counts) > 1
    mean = float(np.dot(parts.run.kept_tokens.counts, parts.run.kept_tokens.probabilities))
    assert abs(parts.num_kept - mean) == min(abs(n - mean) for n in parts.run.kept_tokens.counts)


def test_a_forward_pass_and_a_sampling_run_have_the_work_that_the_formula_gives(parts):
    forward, sampling = parts.forward(), parts.sampling(4)
    macs = flops.forward_macs(parts.run.model)
    assert forward.model_flops == 2 * macs * 8 and forward.images == 8
    assert forward.call().shape == (8, 8, 8, 8)
    # Three guided steps: two passes each. Eight devices fill a batch of 4 up to 8.
    assert sampling.model_flops == 2 * macs * 8 * 3 * 2 and sampling.images == 8
    assert sampling.call().shape == (8, 8, 8, 4)


def test_a_row_is_of_the_median_and_gives_mfu_where_the_peak_is_known(parts, monkeypatch):
    workload = Workload("x", images=8, call=lambda: None, compile_seconds=1.5, model_flops=6e12)
    row = benchmarking.record(workload, [4.0, 2.0, 9.0], parts.run)
    assert (row["seconds"], row["images_per_second"], row["mfu"]) == (4.0, 2.0, None)
    assert row["model_flops_per_second"] == 1.5e12
    monkeypatch.setattr("mdt_jax.parallel.devices.peak_flops", lambda kind, dtype: 3e12)
    row = benchmarking.record(workload, [4.0, 2.0, 9.0], parts.run)
    assert row["mfu"] == pytest.approx(1.5e12 / (3e12 * jax.device_count()))


def test_on_a_gpu_that_is_known_what_was_measured_stands_beside_the_estimate(parts, monkeypatch):
    kinds = dict.fromkeys(estimate.KINDS, 0.0) | {"dense": 1.5, "collectives": 0.5}
    expected = GpuEstimate(kinds, kinds, {"elementwise": 2**30}, 1, (), {}, 0, ())
    memory = {"device_memory_peak_bytes": 3 * 2**30}
    monkeypatch.setattr(benchmarking, "device_memory", lambda: memory)
    work = Workload("step", 8, lambda: None, 1.0, 6e12, program_bytes=2**31, expected=expected)
    row = benchmarking.record(work, [4.0, 2.0, 2.5], parts.run)
    assert (row["floor_seconds"], row["estimated_seconds"]) == (1.5, 2.0)
    assert row["elementwise_bytes"] == 2**30
    (line,) = benchmarking.expectation_lines([row, {"name": "forward pass"}])
    assert line == (
        "step: measured 2,500.0 ms, estimated 2,000.0 ms (measured / estimated 1.25), "
        "floor 1,500.0 ms; memory at most 3.00 GiB so far, the program 2.00 GiB"
    )
    # Here are no such GPUs.
    assert estimate_here(None, parts.run.mesh) is None
    assert (
        benchmarking.expectation_lines(
            [benchmarking.record(Workload("x", 8, lambda: None, 1.0), [1.0], parts.run)]
        )
        == []
    )


@pytest.mark.parametrize(
    ("features", "xla_flags", "expected"),
    [
        ("sse4_2 avx avx2 fma avx512f avx512_bf16", "", "AVX512"),
        ("sse4_2 avx avx2 avx512f", "--xla_dump_to=x --xla_cpu_max_isa=AVX2", "AVX2"),
        ("sse4_2 avx avx2", "--xla_cpu_max_isa=AVX512_BF16", "AVX2"),
        ("sse4_2 avx avx2 avx512f", "--xla_cpu_max_isa=AVX2 --xla_cpu_max_isa=avx", "AVX"),
        ("asimd", "", None),
    ],
)
def test_the_instruction_set_is_the_processors_or_what_xla_is_held_to(
    features, xla_flags, expected
):
    found = benchmarking.instruction_set(features, {"XLA_FLAGS": xla_flags})
    assert found == expected


def test_every_round_runs_all_calls_in_turn_forwards_and_backwards():
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "ab"}
    seconds = benchmarking.time_by_turns(calls, 3)
    assert "".join(ran) == "ab" + "aabb" + "bbaa" + "aabb"
    assert {name: len(of) for name, of in seconds.items()} == {"a": 3, "b": 3}
    ran.clear()
    benchmarking.time_by_turns({"a": calls["a"]}, 3)
    assert "".join(ran) == "a" + "aaa"


def test_of_two_calls_in_a_turn_the_second_counts(monkeypatch):
    now = 0.0

    def call(durations):
        nonlocal now
        now += next(durations)

    # Warmed up once; then each turn begins with a slow call.
    calls = {name: partial(call, iter([9.0, 5.0, 1.0, 5.0, 2.0])) for name in "ab"}
    monkeypatch.setattr(benchmarking.time, "perf_counter", lambda: now)
    assert benchmarking.time_by_turns(calls, 2) == {"a": [1.0, 2.0], "b": [1.0, 2.0]}


def test_a_ratio_is_the_median_of_those_within_rounds():
    # The second round fell into a busy moment of the machine, and its ratio is as good as others.
    assert benchmarking.median_ratio([2.0, 30.0, 3.0], [1.0, 10.0, 2.0]) == 2.0


def test_model_is_short_for_its_recipe():
    config = f"--config={benchmark.RECIPES}:MDT-B/4"
    assert benchmark.expand_model(["x", "--model", "MDT-B/4", "--compile"]) == [
        "x", config, "--compile",
    ]  # fmt: skip
    assert benchmark.expand_model(["--model=MDT-B/4"]) == [config]


def command(*arguments):
    settings = [f"--config.{key}={value}" for key, value in TINY.items()]
    return subprocess.run(
        [sys.executable, "tools/benchmark.py", "--model=MDTv2-S/2", *settings, *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_tool_prints_lines_of_json_then_a_table_and_writes_them(tmp_path):
    output = tmp_path / "sub" / "out.json"
    done = command("--parts=forward", "--repeats=2", f"--output={output}")
    assert done.returncode == 0, done.stderr
    about, row, *table = done.stdout.splitlines()
    assert json.loads(about)["versions"]["jax"] == jax.__version__
    assert json.loads(row)["name"] == "forward pass" and json.loads(row)["repeats"] == 2
    assert table[-1].startswith("| forward pass | 8 |")
    written = json.loads(output.read_text())
    assert written["rows"] == [json.loads(row)]
    assert written["command"].startswith("python tools/benchmark.py --model=MDTv2-S/2")
    assert {"date", "device", "processor", "cores"} <= written.keys()


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--parts=step,backward", "--parts 'backward' is unknown; known: step, forward"),
        ("--repeats=0", "--repeats 0 is below 1"),
        ("--config.model.name=MDTv2-Q/2", "unknown model 'MDTv2-Q/2'"),
    ],
)
def test_a_flag_that_cannot_work_ends_in_one_clear_line(flag, says):
    done = command(flag)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert says in line and "Traceback" not in done.stderr


@pytest.mark.torch
def test_the_pytorch_that_is_timed_equals_the_authors():
    torch = pytest.importorskip("torch")
    from test_torch_models import architecture, array, state

    from tools import benchmark_torch

    timed = benchmark_torch.Reference(architecture("mdt_v2"), "cpu", bfloat16=False, compiled=False)
    timed.model.load_state_dict(state("mdt_v2"), strict=True)
    out = timed.forward(*(array("mdt_v2", f"in/{k}") for k in "xty"))
    assert relative_error(out, reference("mdt_v2")["out/eval"]) < 1e-5

    before = [p.detach().clone() for p in timed.model.parameters()]
    loss = timed.step(array("mdt_v2", "in/x"), array("mdt_v2", "in/y"), num_kept=8)
    assert torch.isfinite(loss)
    moved = [not torch.equal(a, b) for a, b in zip(before, timed.model.parameters(), strict=True)]
    assert all(moved)


def test_first_steps_of_four_programs_and_of_one_are_timed_by_turns(monkeypatch, capsys):
    asked = []

    def pretend(workdir, cache, config, *arguments):
        assert not cache.exists() and config == "configs/fashion.py"
        (span,) = (a.rpartition("=")[2] for a in arguments if "ratio_span" in a)
        asked.append(span)
        return 12.0 if span == "0.2" else 10.0

    monkeypatch.setattr(benchmark, "seconds_to_first_step", pretend)
    four, one = benchmark.time_first_step(types.SimpleNamespace(repeats=3))
    assert asked == ["0.2", "0.0", "0.0", "0.2", "0.2", "0.0"]
    assert four["over_one_program"] == 1.2 and one["rounds"] == [10.0] * 3
    assert "| four programs over one, round by round | 1.20 |" in capsys.readouterr().out
