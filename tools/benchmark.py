"""Times the training step, the forward pass, sampling runs and the latency of one image.

    python tools/benchmark.py --model MDTv2-XL/2 --output benchmarks/h200.json
    python tools/benchmark.py --model MDTv2-S/2 --config.batch_size=16 --reference_torch
    python tools/benchmark.py --model MDTv2-XL/2 --compile
    python tools/benchmark.py --first_step --output benchmarks/first_step.json

--model NAME is short for --config configs/imagenet256.py:NAME; --config.KEY=VALUE changes a
setting, as for `mdt_jax.train`, and the programs are the ones it and `mdt_jax.sample` run: bfloat16
on a GPU or TPU, float32 on a CPU, unless --config.model.dtype says otherwise; on all devices,
unless --device names others. --parts chooses among step, forward, sample and latency (batch 1; 10,
20 and 50 steps, decoded; random autoencoder weights unless --vae gives them). Compiling is timed
apart. FLOPs are the model's, by formula, without recomputation; MFU is their share of the devices'
published peak. On GPUs that `tools/compile_gpu.py` knows, the step's measured time and memory stand
beside that tool's estimate of the same program.
processor_seconds and new_pages are this process's use of all cores, and the pages of memory that it
touched anew, in a call on average, the one that warms up included.

--reference_torch times a PyTorch model of the same sizes (`benchmark_torch.py`), eager and
compiled, beside ours by turns in one process, on as many threads, and prints the median of the
ratios within each round: above 1, ours is faster. --compile times compiling the training step for
eight host devices, and the first step of the digits run with no cache and with a warm one.
--first_step times the first step of a run whose masked pass keeps one of four numbers of tokens
beside one that keeps a single number, by turns, each with no cache: configs/fashion.py, without
sampling and judging, whose programs are the same in both.

Prints a line of JSON for each result, then a table.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from mdt_jax.basics.atomic import whole_file
from mdt_jax.basics.help_page import Page
from mdt_jax.commands import benchmarking
from mdt_jax.commands.benchmarking import Workload, Workloads
from mdt_jax.parallel.command import UserError, command_ending
from mdt_jax.parallel.flag_parsing import run_command
from mdt_jax.parallel.host_memory import use_main_heap
from mdt_jax.training import metrics
from mdt_jax.training.config_flag import CONFIG_OPTIONS, define_config_flag, parse_config_flags
from mdt_jax.weights import descriptions
from mdt_jax.weights.autoencoder import Autoencoder

PAGE = Page(
    "python tools/benchmark.py",
    "",
    "--model NAME [OPTION ...]",
    __doc__,
    {
        "What is timed": (
            ("--model NAME", "Such as MDTv2-XL/2: short for --config imagenet256:NAME."),
            *CONFIG_OPTIONS,
            "parts",
            "sample_batch_size",
            "vae",
            "compile",
        ),
        "How": ("device", "repeats", "reference_torch", "output"),
    },
)
ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "configs" / "imagenet256.py"
PARTS = ("step", "forward", "sample", "latency")
LATENCY_STEPS = (10, 20, 50)
DEVICES = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
FIRST_STEP_SECONDS = 600  # a run is given up after this time


def workloads(f: flags.FlagValues) -> Iterator[tuple[Workloads, Workload]]:
    """Yields the workloads that the flags ask for, each compiled when it is asked for.

    So only one of them is in memory at a time.
    """
    parts = Workloads(f.config)
    dtype = parts.run.model.dtype
    if "step" in f.parts:
        yield parts, parts.train_step()
    if "forward" in f.parts:
        yield parts, parts.forward()
    if "sample" in f.parts:
        yield parts, parts.sampling(f.sample_batch_size or f.config.batch_size)
    if "latency" in f.parts:
        mesh = parts.run.mesh
        decoder = None
        if f.config.model.in_channels not in (1, 3):
            decoder = (
                Autoencoder.load(f.vae, mesh, dtype)
                if f.vae
                else benchmarking.random_autoencoder(mesh, dtype)
            )
        for steps in LATENCY_STEPS:
            yield parts, parts.sampling(1, steps, decoder)


def time_alone(f: flags.FlagValues) -> list[dict[str, Any]]:
    """Times each workload by itself; prints a line of JSON for each, then a table."""
    rows = []
    for parts, workload in workloads(f):
        before = resource.getrusage(resource.RUSAGE_SELF)
        (seconds,) = benchmarking.time_by_turns({"": workload.call}, f.repeats, warm_up=1).values()
        after = resource.getrusage(resource.RUSAGE_SELF)
        row = benchmarking.record(workload, seconds, parts.run)
        calls = f.repeats + 1
        used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
        row["processor_seconds"] = used / calls
        row["new_pages"] = (after.ru_minflt - before.ru_minflt) / calls
        rows.append(row)
        print(json.dumps(rows[-1]), flush=True)
    print("\n".join([benchmarking.results_table(rows), *benchmarking.expectation_lines(rows)]))
    return rows


def time_beside_torch(f: flags.FlagValues) -> list[dict[str, Any]]:
    """Times the training step and the forward pass by turns with PyTorch's."""
    import benchmark_torch
    import torch

    if f.repeats < 7:
        raise ValueError(f"--repeats {f.repeats}: a comparison wants at least 7 rounds")
    parts = Workloads(f.config)
    model, batch = parts.run.model, parts.batch
    device = {"gpu": "cuda", "cpu": "cpu"}.get(jax.default_backend())
    if device is None:
        raise ValueError(f"--reference_torch: no PyTorch for {jax.default_backend()} here")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    images = torch.tensor(np.moveaxis(np.asarray(batch["image"]), -1, 1), device=device)
    labels = torch.tensor(np.asarray(batch["label"]), device=device).long()
    t = torch.linspace(0, 999, len(labels), device=device).long()
    kept = parts.num_kept

    rows = []
    for part in (name for name in PARTS[:2] if name in f.parts):
        ours = parts.train_step() if part == "step" else parts.forward()
        calls, first = {"ours": ours.call}, {"ours": ours.compile_seconds}
        for kind in ("eager", "compiled"):
            reference = benchmark_torch.Reference(
                descriptions.architecture_of(model),
                device,
                np.dtype(model.dtype).name == "bfloat16",
                compiled=kind == "compiled",
            )

            def call(reference: Any = reference, part: str = part) -> None:
                if part == "step":
                    reference.step(images, labels, kept)
                else:
                    reference.forward(images, t, labels)
                reference.synchronize()

            began = time.perf_counter()
            call()
            first[kind] = time.perf_counter() - began
            calls[kind] = call
        seconds = benchmarking.time_by_turns(calls, f.repeats)
        row = benchmarking.record(ours, seconds["ours"], parts.run)
        row["first_call_seconds"] = first
        for kind in ("eager", "compiled"):
            row[f"torch_{kind}_seconds"] = statistics.median(seconds[kind])
            row[f"torch_{kind}_over_ours"] = benchmarking.median_ratio(
                seconds[kind], seconds["ours"]
            )
        row["rounds"] = seconds
        print(json.dumps(row), flush=True)
        rows.append(row)
    print("| | images | ours | PyTorch eager | PyTorch compiled | eager / ours | compiled / ours |")
    print("|" + " --- |" * 7)
    for row in rows:
        print(
            f"| {row['name']} | {row['images']} | {row['seconds']:.3g} s | "
            f"{row['torch_eager_seconds']:.3g} s | {row['torch_compiled_seconds']:.3g} s | "
            f"{row['torch_eager_over_ours']:.2f} | {row['torch_compiled_over_ours']:.2f} |"
        )
    return rows


def time_compilation(f: flags.FlagValues) -> list[dict[str, Any]]:
    """Times compiling the training step for this process's devices, and the digits' first step."""
    parts = Workloads(f.config)
    _, tracing, compiling = parts.compile_step(parts.num_kept)
    rows = [
        {
            "name": f"compile the train step of {f.config.model.name}",
            "devices": parts.run.mesh.size,
            "tracing_seconds": tracing,
            "seconds": tracing + compiling,
        }
    ]
    print(json.dumps(rows[0]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("no", "warm"):
            seconds = seconds_to_first_step(Path(folder) / kind, Path(folder) / "cache")
            rows.append({"name": f"first step of the digits, {kind} cache", "seconds": seconds})
            print(json.dumps(rows[-1]), flush=True)
    print("| | seconds |\n| --- | --- |")
    for row in rows:
        print(f"| {row['name']} | {row['seconds']:.1f} |")
    return rows


def time_first_step(f: flags.FlagValues) -> list[dict[str, Any]]:
    """Times the first step of a run of four programs and of one, by turns, nothing cached."""
    spans = {"four programs": 0.2, "one program": 0.0}
    taken: dict[str, list[float]] = {name: [] for name in spans}
    for turn in range(f.repeats):
        for name in list(spans)[:: -1 if turn % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                seconds = seconds_to_first_step(
                    Path(folder) / "run",
                    Path(folder) / "cache",
                    "configs/fashion.py",
                    f"--config.masking.ratio_span={spans[name]}",
                    "--config.eval_every=0",
                    "--config.sample.every=0",
                )
            taken[name].append(seconds)
            print(json.dumps({"name": name, "seconds": seconds}), flush=True)
    ratio = benchmarking.median_ratio(*taken.values())
    rows: list[dict[str, Any]] = [
        {"name": f"first step, {name}", "seconds": statistics.median(times), "rounds": times}
        for name, times in taken.items()
    ]
    rows[0]["over_one_program"] = ratio
    print("| | seconds |\n| --- | --- |")
    for row in rows:
        print(f"| {row['name']} | {row['seconds']:.1f} |")
    print(f"| four programs over one, round by round | {ratio:.2f} |")
    return rows


def seconds_to_first_step(
    workdir: Path, cache: Path, config: str = "configs/digits.py", *arguments: str
) -> float:
    """Starts `mdt_jax.train`, waits for its first step's metrics, then ends it.

    Args:
      workdir: the run's folder.
      cache: the folder of compiled programs.
      config: the config's file.
      *arguments: further ones of the command.

    Returns:
      The seconds from the start to the metrics.

    Raises:
      RuntimeError: training failed, or took more than `FIRST_STEP_SECONDS`.
    """
    command = [sys.executable, "-m", "mdt_jax.train", "--config", config]
    command += ["--workdir", str(workdir), "--config.log_every=1", *arguments]
    flags_ = [w for w in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in w]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "XLA_FLAGS": " ".join(flags_),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    began = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        while time.perf_counter() - began < FIRST_STEP_SECONDS and child.poll() is None:
            if metrics.steps_with(workdir / metrics.METRICS_FILE, "loss"):
                return time.perf_counter() - began
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate()
    raise UserError(f"{' '.join(command)} made no step: {errors.decode()[-500:]}")


def expand_model(argv: list[str]) -> list[str]:
    """The arguments with `--model NAME` replaced by the --config that it is short for."""
    words, expanded = iter(argv), []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--model":
            word = f"--config={RECIPES}:{value if equals else next(words, '')}"
        expanded.append(word)
    return expanded


def run_benchmark(f: flags.FlagValues) -> list[dict[str, Any]]:
    """Does the measurements that the flags ask for, and writes them to --output."""
    unknown = sorted(set(f.parts) - set(PARTS))
    if unknown:
        raise ValueError(f"--parts {unknown[0]!r} is unknown; known: {', '.join(PARTS)}")
    if f.config is None and not f.first_step:
        raise ValueError("--model is missing: such as MDTv2-XL/2")
    about = benchmarking.describe_machine()
    if f.reference_torch:
        import torch

        about["torch_instruction_set"] = torch.backends.cpu.get_cpu_capability()
    print(json.dumps(about), flush=True)
    alone = time_compilation if f.compile else time_first_step if f.first_step else time_alone
    rows = time_beside_torch(f) if f.reference_torch else alone(f)
    if f.output:
        Path(f.output).parent.mkdir(parents=True, exist_ok=True)
        if not f.first_step:
            about["model"], about["dtype"] = f.config.model.name, f.config.model.dtype
        about["command"] = " ".join(["python tools/benchmark.py", *sys.argv[1:]])
        with whole_file(f.output) as file:
            file.write(json.dumps(about | {"rows": rows}, indent=2).encode() + b"\n")
    return rows


def main(_: list[str]) -> None:
    """The command."""
    # A RuntimeError is JAX's, such as of a device that is not there.
    with command_ending(flags.FLAGS, also=(RuntimeError,)):
        set_up(flags.FLAGS)
        run_benchmark(flags.FLAGS)


def set_up(f: flags.FlagValues) -> None:
    """Sets up JAX before it looks for its devices; no program comes from the compilation cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    if f.device:
        jax.config.update("jax_platforms", DEVICES[f.device])
    if f.reference_torch:
        # Both frameworks share the device's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if f.compile:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    use_main_heap()


def define_flags(f: flags.FlagValues, argv: Sequence[str] | None = None) -> None:
    """The command's flags; `argv` is the command line, the process's by default."""
    define_config_flag(f, argv)
    flags.DEFINE_enum(
        "device", None, list(DEVICES), "What to run on; JAX's choice by default.", flag_values=f
    )
    flags.DEFINE_list("parts", list(PARTS), "What to time.", flag_values=f)
    flags.DEFINE_integer(
        "repeats", 7, "How often each is timed, warm-up calls apart.", flag_values=f
    )
    flags.DEFINE_integer(
        "sample_batch_size", None, "Samples at a time; config.batch_size if none.", flag_values=f
    )
    flags.DEFINE_string(
        "vae", None, "Weights of the autoencoder; random ones by default.", flag_values=f
    )
    flags.DEFINE_bool(
        "reference_torch", False, "Time PyTorch beside step and forward.", flag_values=f
    )
    flags.DEFINE_bool("compile", False, "Time compilation instead.", flag_values=f)
    text = "Time the first step of runs of four programs and of one instead."
    flags.DEFINE_bool("first_step", False, text, flag_values=f)
    flags.DEFINE_string("output", None, "Where the JSON goes; nowhere by default.", flag_values=f)


if __name__ == "__main__":
    run_command(main, define_flags, PAGE, lambda argv: parse_config_flags(expand_model(argv)))
