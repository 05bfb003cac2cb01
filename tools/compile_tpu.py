"""Compiles a run for TPUs that are not there: does it fit, how long will it take, what bounds it.

    python tools/compile_tpu.py --config configs/imagenet256.py:MDTv2-XL/2 --topology v5e:4x4 \\
        --config.mesh.fsdp=16 --config.model.remat=dots
    python tools/compile_tpu.py --config configs/imagenet256.py:MDT-XL/2 --topology v4-512 --advise
    python tools/compile_tpu.py --topology v5p-32 --calibrate
    python tools/compile_tpu.py --all

The training step (one program for each number of kept tokens) and the sampler's are what
`mdt_jax.train` and `mdt_jax.sample` run; the compiler, libtpu (pip install "mdt_jax[tpu]"), is the
TPU's own. No data and no TPU are needed. Compiling XL/2 takes minutes and some gigabytes of memory,
up to 12 GB if its layers are unrolled; --all takes hours.

--topology takes v4-512 and v5p-32 (TensorCores, two a chip), v5litepod-16 and v6e-16 (chips), and
grids (v5e:4x4, v5p:2x2x4), each also "x 4 slices". The time is the compiler's own expectation: its
estimated cycles over the clock, with every turn of a loop counted. It has no estimate for transfers
between chips; their time, bytes over the links' bandwidth, is printed beside it, as if no work hid
them. Beside each MFU is the share of the peak that a lone 8192³ product gets by the same
arithmetic; where that is not 0.85 to 1 the line says UNCALIBRATED. The last line is the whole
report as JSON. Exit status: 0 if all was compiled, whether it fits or not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from mdt_jax.compilers import advice, programs, topologies
from mdt_jax.compilers.programs import Program, TrainingJob
from mdt_jax.compilers.report import CompileReport, create_report, is_calibrated
from mdt_jax.compilers.topologies import GIB, Topology
from mdt_jax.config import apply_recipe, default_config
from mdt_jax.parallel.command import command_ending, ending_quietly
from mdt_jax.training.config_flag import define_config_flag, parse_config_flags

ALL_MODELS = ("MDTv2-S/2", "MDTv2-B/2", "MDTv2-L/2", "MDTv2-XL/2")
ALL_TOPOLOGIES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4", "v4:2x2x4")


def compile_job(
    job: TrainingJob, arguments: Any, known: dict[int | None, Program] | None = None
) -> CompileReport:
    """Compiles a job's programs and reports on them.

    Args:
      job: the run.
      arguments: the flags.
      known: the training steps that are compiled already, by number of kept tokens.
    """
    known = dict(known or {})
    chances = chosen_counts(job, arguments.quick)
    counts = sorted(chances, key=lambda n: -(n or 0))  # the largest first: it may not fit
    steps: list[Program] = []
    for count in counts:
        if count not in known:
            progress(f"compiling the step{f' that keeps {count} tokens' if count else ''}")
            known[count] = job.compile_step(count)
        steps.append(known[count])
        if not steps[-1].fits:
            break
    size = arguments.sample_batch_size or job.config.batch_size
    sampler = None
    if arguments.sampler and all(step.fits for step in steps):
        progress("compiling the sampler")
        sampler = job.compile_sampler(size)
    progress("compiling a lone product")
    calibration = programs.calibrate(job.topology) if arguments.calibration else None
    told: list[str] = []
    refused = next((p for p in (*steps, sampler) if p is not None and not p.fits), None)
    if refused is not None:
        told = advice.advice_lines(job, refused)
    return create_report(
        job,
        tuple(steps),
        tuple(chances[n] for n in counts[: len(steps)]),
        sampler=sampler,
        calibration=calibration,
        sample_batch=size,
        advice=tuple(told),
    )


def chosen_counts(job: TrainingJob, quick: bool) -> dict[int | None, float]:
    """The numbers of kept tokens to compile for, and how often each runs.

    `quick` takes only the one nearest to the mean from above, which stands for all of them.
    """
    kept = job.kept_tokens
    if not quick or kept.mean is None:
        return kept.programs
    return {min(n for n in kept.counts if n >= kept.mean): 1.0}


def find_fitting(
    job: TrainingJob, arguments: Any
) -> tuple[TrainingJob, dict[int | None, Program], list[str]]:
    """The job, or the first with other settings, whose largest step fits.

    With --quick the one step that stands for all is tried, not the largest of a run.

    Returns:
      The job that fits, or else the given job; its compiled step by number of kept tokens; and a
      line on each attempt.
    """
    before, tried = advice.Levers.of(job), []
    count = max(chosen_counts(job, arguments.quick), key=lambda n: n or 0)
    first: Program | None = None
    candidates = [(before, job)]
    for levers, candidate in (*candidates, *advice.attempts(job)):
        progress(f"trying {levers.changes(before) or 'the settings as they are'}")
        program = candidate.compile_step(count)
        first = first or program
        peak = program.memory.peak
        size = "?" if peak is None else f"{peak / GIB:.2f} GiB"
        flags_ = levers.changes(before) or "as given"
        tried.append(f"{flags_}: {'fits' if program.fits else 'does not fit'}, {size} a chip")
        jax.clear_caches()
        if program.fits:
            return candidate, {count: program}, tried
    return job, {count: first}, tried


def markdown_row(report: CompileReport) -> str:
    """A report as a line of the table of `--all`."""
    c, peak = report.config, report.largest.memory.peak
    settings = [f"fsdp {report.mesh['fsdp']}", f"scan_unroll {c.model.scan_unroll}"]
    settings += [f"remat {c.model.remat}"] if c.model.remat != "none" else []
    settings += [f"{c.accumulation_steps} microbatches"] if c.accumulation_steps > 1 else []
    of = report.topology.chip.hbm_bytes / GIB
    cells = [c.model.name, str(report.topology), ", ".join(settings)]
    cells.append(f"{(peak or 0) / GIB:.1f} of {of:.0f}")
    seconds = report.step_seconds
    if seconds is None:
        cells += ["does not fit", "", "", "", ""]
    else:
        mark = "" if report.calibrated else " (uncalibrated)"
        cells += [
            f"{1e3 * seconds:.0f} + {1e3 * report.wire_seconds:.0f}",
            f"{report.mfu(seconds):.2f}{mark}",
            f"{report.calibration:.2f}" if report.calibration else "",
            f"{seconds * c.num_steps / 86_400:.1f}",
            f"{seconds * c.num_steps / 3600 * report.topology.num_chips:,.0f}",
        ]
    return f"| {' | '.join(cells)} |"


def compile_all(arguments: Any) -> list[dict[str, Any]]:
    """Compiles --models for --topologies, each pair with the first settings that fit.

    Prints the table and returns the reports as plain values.
    """
    print("| model | chips | settings | GiB a chip | ms a step + transfers | MFU | lone product "
          "| days | chip-hours |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    records = []
    for name in arguments.models:
        for topology in map(topologies.parse_topology, arguments.topologies):
            config = imagenet_config(name, topology, arguments.unroll)
            job, known, _ = find_fitting(TrainingJob(config, topology), arguments)
            report = compile_job(job, arguments, known)
            print(markdown_row(report), flush=True)
            records.append(report.as_json())
            jax.clear_caches()
    return records


def imagenet_config(model: str, topology: Topology, unroll: int) -> ConfigDict:
    """A family's recipe on ImageNet's latents, with the state in up to 16 shards."""
    config = default_config()
    config.model.update(name=model, scan_unroll=unroll)
    apply_recipe(config)
    config.num_steps = 2_000_000 if "XL" in model else 400_000
    config.mesh.fsdp = min(16, topology.chips_per_slice)
    return config


def progress(line: str) -> None:
    """Prints a line on the progress to standard error."""
    print(f"… {line}", file=sys.stderr, flush=True)


def run_compilation(arguments: Any) -> Any:
    """Does what the flags ask for; returns the result, printed last as JSON, as plain values."""
    topologies.check_compiler()
    if arguments.all:
        return compile_all(arguments)
    if not arguments.topology:
        raise ValueError("--topology is missing: such as v4-512, v5litepod-16, v5p:2x2x4")
    topology = topologies.parse_topology(arguments.topology, arguments.num_slices)
    if arguments.calibrate:
        share = programs.calibrate(topology)
        mark = "" if is_calibrated(share) else "  UNCALIBRATED"
        print(f"{topology.chip.name}: a lone 8192³ product gets {share:.3f} of the peak{mark}")
        return {"chip": topology.chip.name, "calibration": share}
    if arguments.config is None:
        raise ValueError("--config is missing: such as configs/imagenet256.py:MDTv2-XL/2")
    job = TrainingJob(arguments.config, topology)
    known, tried = None, []
    if arguments.advise:
        job, known, tried = find_fitting(job, arguments)
    report = compile_job(job, arguments, known)
    for line in tried:
        print(f"tried          {line}")
    print("\n".join(report.lines()))
    return report.as_json() | {"tried": tried}


def main(_: list[str]) -> None:
    """The command."""
    with command_ending(flags.FLAGS):
        print(json.dumps(run_compilation(flags.FLAGS)))


def define_flags(f: flags.FlagValues, argv: Sequence[str] | None = None) -> None:
    """The command's flags; `argv` is the command line, the process's by default."""
    define_config_flag(f, argv)
    flags.DEFINE_string("topology", None, "Such as v4-512, v5litepod-16, v5p:2x2x4.", flag_values=f)
    flags.DEFINE_integer(
        "num_slices", None, "Slices of that size, joined by the network.", flag_values=f
    )
    flags.DEFINE_bool(
        "advise", False, "Try other settings until one fits, and report on that.", flag_values=f
    )
    flags.DEFINE_bool(
        "quick", False, "Compile one number of kept tokens for all of them.", flag_values=f
    )
    flags.DEFINE_bool("sampler", True, "Compile the sampler too.", flag_values=f)
    flags.DEFINE_integer(
        "sample_batch_size", None, "Samples at a time; config.batch_size if none.", flag_values=f
    )
    flags.DEFINE_bool("calibration", True, "Set a lone product beside the MFU.", flag_values=f)
    flags.DEFINE_bool(
        "calibrate", False, "Compile only a lone product; needs no --config.", flag_values=f
    )
    flags.DEFINE_bool(
        "all", False, "A table of the MDTv2 models over four kinds of chip.", flag_values=f
    )
    flags.DEFINE_integer(
        "unroll", 12, "scan_unroll of --all; 1 compiles much faster.", flag_values=f
    )
    flags.DEFINE_list("models", list(ALL_MODELS), "The models of --all.", flag_values=f)
    flags.DEFINE_list("topologies", list(ALL_TOPOLOGIES), "The topologies of --all.", flag_values=f)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # it traces; the TPU's compiler compiles
    define_flags(flags.FLAGS)
    with ending_quietly():
        app.run(main, flags_parser=parse_config_flags)
