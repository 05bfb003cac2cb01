"""What `mdt compile-tpu` and `mdt compile-gpu` share: what is compiled, in what order.

The functions take the flags that `compilers.flags.define_flags` defines, as attributes.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mdt_jax.basics.atomic import whole_file
from mdt_jax.basics.places import read_text
from mdt_jax.compilers import advice, programs
from mdt_jax.compilers.hardware import GIB, Hardware
from mdt_jax.compilers.programs import Program, TrainingJob
from mdt_jax.compilers.report import CompileReport, create_report
from mdt_jax.config import apply_recipe, default_config


def compile_job(
    job: TrainingJob,
    arguments: Any,
    known: dict[int | None, Program] | None = None,
    kind: type[CompileReport] = CompileReport,
) -> CompileReport:
    """Compiles a job's programs and reports on them.

    Args:
      job: the run.
      arguments: the flags.
      known: the training steps that are compiled already, by number of kept tokens.
      kind: the kind of report.
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
        kind,
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
        fits = "fits" if program.fits else "does not fit"
        tried.append(f"{flags_}: {fits}, {size} a {job.topology.unit}")
        jax.clear_caches()
        if program.fits:
            return candidate, {count: program}, tried
    return job, {count: first}, tried


def compile_all(
    arguments: Any,
    topologies: Iterable[Hardware],
    config_of: Callable[[str, Hardware], ConfigDict],
    kind: type[CompileReport] = CompileReport,
) -> list[dict[str, Any]]:
    """Compiles --models for several slices or nodes, each pair with the first settings that fit.

    Prints the table and returns the reports as plain values. With --output they are written after
    each row, and the rows that are there already, of the same settings, are printed as they are.

    Args:
      arguments: the flags; `models` are names of models.
      topologies: the slices or nodes.
      config_of: the settings of a model on slices or nodes.
      kind: the kind of report.

    Raises:
      ValueError: an --output that is no such table.
    """
    topologies = list(topologies)
    known = read_rows(arguments.output)
    print(f"| {' | '.join(kind.table_header)} |")
    print("|" + " --- |" * len(kind.table_header))
    records = []
    for name in arguments.models:
        for topology in topologies:
            config = config_of(name, topology)
            asked = {
                "model": name,
                "topology": str(topology),
                "scan_unroll": config.model.scan_unroll,
                "kernels": config.model.kernels,
                "quick": arguments.quick,
            }
            record = next((row for row in known if _answers(row, asked, arguments.sampler)), None)
            if record is None:
                job, compiled, _ = find_fitting(TrainingJob(config, topology), arguments)
                report = compile_job(job, arguments, compiled, kind)
                record = report.as_json() | {"asked": asked, "versions": _versions()}
                record["table_row"] = report.table_row()
                # A row with a sampler takes the place of the one without.
                known = [row for row in known if row["asked"] != asked] + [record]
                _write_rows(arguments.output, known)
                jax.clear_caches()
            print(record["table_row"], flush=True)
            records.append(record)
    return records


def read_rows(path: str | None) -> list[dict[str, Any]]:
    """The rows in a file that `compile_all` wrote; none without a file.

    Raises:
      ValueError: the file holds something else.
    """
    if path is None or not Path(path).exists():
        return []
    try:
        rows = json.loads(read_text(path))["rows"]
        if all(row["asked"] and row["table_row"] for row in rows):
            return rows
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"--output {path!r} is no table of --all's; give a new file, or remove it")


def _write_rows(path: str | None, rows: list[dict[str, Any]]) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps({"rows": rows}, indent=1).encode() + b"\n")


def _answers(row: dict[str, Any], asked: dict[str, Any], sampler: bool) -> bool:
    has_sampler = any(program["name"] == "sampler" for program in row["programs"])
    return row["asked"] == asked and (has_sampler or not sampler or not row["fits"])


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("mdt-jax", "jax", "jaxlib")}


def imagenet_config(model: str, topology: Hardware, unroll: int) -> ConfigDict:
    """A family's recipe on ImageNet's latents, with the state in up to 16 shards."""
    config = default_config()
    config.model.update(name=model, scan_unroll=unroll)
    apply_recipe(config)
    config.num_steps = 2_000_000 if "XL" in model else 400_000
    config.mesh.fsdp = min(16, topology.chips_per_slice)
    return config


def report_on(
    arguments: Any, topology: Hardware, kind: type[CompileReport] = CompileReport
) -> dict[str, Any]:
    """Prints the report that the flags ask for, and returns it as plain values.

    Raises:
      ValueError: no --config.
    """
    if arguments.calibrate:
        share = programs.calibrate(topology)
        mark = "" if topology.chip.is_calibrated(share) else "  UNCALIBRATED"
        of = "nothing known" if share is None else f"{share:.3f}"
        print(f"{topology.chip.name}: a lone 8192³ product gets {of} of the peak{mark}")
        return {"chip": topology.chip.name, "calibration": share}
    if arguments.config is None:
        raise ValueError("--config is missing: such as configs/imagenet256.py:MDTv2-XL/2")
    job = TrainingJob(arguments.config, topology)
    known, tried = None, []
    if arguments.advise:
        job, known, tried = find_fitting(job, arguments)
    report = compile_job(job, arguments, known, kind)
    for line in tried:
        print(f"tried          {line}")
    print("\n".join(report.lines()))
    return report.as_json() | {"tried": tried}


def progress(line: str) -> None:
    """Prints a line on the progress to standard error."""
    print(f"… {line}", file=sys.stderr, flush=True)
