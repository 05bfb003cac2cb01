"""Quality against cost of sampling: one run, many samplers, judged and timed by turns.

    python tools/quality_per_cost.py --workdir runs/digits --output benchmarks/quality_per_cost.json

Draws the same samples (classes in turn, noise by seed and index) with every method of `--methods`,
batch by batch in turn, so that other work of the machine falls on all of them alike. The distance
is the Fréchet distance in the features of the classifier that judged the run while it
trained, against the same training images, under the run's own settings of judging (`config.eval`):
for comparing samplers, never with published FIDs. Seconds are of sampling alone, compiled before.
The first method is the reference: a method is as good if the mean of its distances over the seeds
is no more than the reference's mean plus the reference's spread (the sample standard deviation over
the seeds), and its cost is its time over the reference's.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import checkpoints, sampling
from mdt_jax import config as config_lib
from mdt_jax.basics.atomic import check_writable, whole_file
from mdt_jax.commands.benchmarking import processor_name
from mdt_jax.diffusion.seeds import key_of
from mdt_jax.parallel import sharding
from mdt_jax.parallel.command import command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser
from mdt_jax.sampling import images
from mdt_jax.training import run_evaluation
from mdt_jax.training.judges import Judge

METHODS = (
    "ddpm:250", "ddim:20", "ddim:10", "heun:10", "heun:5", "dpm++:20", "dpm++:10", "dpm++:10,10",
    "dpm++sde:20",
)  # fmt: skip


@dataclasses.dataclass
class Row:
    """The results of one method of sampling.

    Attributes:
      sampler, steps: as `mdt_jax.sample` takes them.
      calls: calls of the model for each sample.
      compile_seconds: the time of compiling, before the first sample.
      distances, seconds: for each seed, the distance of all its samples and their time.
    """

    sampler: str
    steps: str
    calls: int
    compile_seconds: float
    distances: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean of the distances over the seeds."""
        return statistics.fmean(self.distances)

    @property
    def spread(self) -> float:
        """Sample standard deviation of the distances over the seeds, NaN if there is one seed."""
        return statistics.stdev(self.distances) if len(self.distances) > 1 else float("nan")

    def cost(self, reference: Row) -> float:
        """The method's time over the reference's, the median over the seeds."""
        pairs = zip(self.seconds, reference.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def is_as_good(self, reference: Row) -> bool:
        """Whether the mean distance is within the reference's spread of its mean, or below."""
        return self is reference or self.mean <= reference.mean + reference.spread


def model_calls(sampler: str, num_steps: int) -> int:
    """Calls of the model for one sample: Heun's steps take two, except for the last.

    Guidance does not count: it makes each call two rows.
    """
    return 2 * num_steps - 1 if sampler == "heun" else num_steps


def compile_methods(
    model: sampling.DiffusionModel,
    params: Any,
    methods: list[str],
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    batch_size: int,
) -> list[tuple[Row, sampling.CompiledSampler]]:
    """A compiled sampler for each "SAMPLER:STEPS", under the run's settings of judging.

    Raises:
      ValueError: a sampler or steps that are unknown.
    """
    compiled = []
    for method in methods:
        sampler, _, steps = method.partition(":")
        chosen = sampling.judging_options(config) | {"sampler": sampler, "steps": steps}
        options = sampling.resolve_options(model, **chosen)
        began = time.perf_counter()
        run = sampling.CompiledSampler(model, mesh, batch_size, options)
        run.warm_up(params)
        run(params, np.zeros(1, np.int32), jax.random.key(0))  # a first call does more than others
        seconds = time.perf_counter() - began
        calls = model_calls(sampler, run.num_steps)
        compiled.append((Row(sampler, str(options.steps), calls, round(seconds, 2)), run))
    return compiled


def compare_methods(
    workdir: Path,
    methods: list[str],
    num_samples: int,
    seeds: list[int],
    batch_size: int,
) -> Iterator[list[Row]]:
    """Yields the rows of all methods after each seed, with the results so far."""
    step, meta = checkpoints.read_meta(workdir)
    config = config_lib.from_json(meta["config"])
    judge = Judge(config, workdir / run_evaluation.CLASSIFIER_FILE)
    mesh = sharding.create_mesh()
    model, params = sampling.load(workdir, step=step, mesh=mesh)
    labels = sampling.resolve_labels(model, None, num_samples)
    size = sampling.global_batch_size(batch_size, num_samples, mesh)
    compiled = compile_methods(model, params, methods, config, mesh, size)
    for seed in seeds:
        drawn: list[list[np.ndarray]] = [[] for _ in compiled]
        seconds = [0.0 for _ in compiled]
        for turn, first in enumerate(range(0, num_samples, size)):
            # Each batch begins with another method, so that none always follows the same one.
            for k in np.roll(np.arange(len(compiled)), -turn).tolist():
                began = time.perf_counter()
                samples = compiled[k][1](params, labels[first : first + size], key_of(seed), first)
                seconds[k] += time.perf_counter() - began
                drawn[k].append(images.to_uint8(samples, first))
        for (row, _), batches, taken in zip(compiled, drawn, seconds, strict=True):
            row.distances.append(round(judge.distance(batches), 5))
            row.seconds.append(round(taken, 3))
        yield [row for row, _ in compiled]


def methods_table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    reference = rows[0]
    lines = [
        "| sampler | steps | model calls | distance | as good | seconds | of the first's time |",
        "|" + " --- |" * 7,
    ]
    for row in rows:
        lines.append(
            f"| {row.sampler} | {row.steps} | {row.calls} | {row.mean:.3f} ± {row.spread:.3f} | "
            f"{'yes' if row.is_as_good(reference) else 'no'} | "
            f"{statistics.median(row.seconds):.1f} | {row.cost(reference):.3f} |"
        )
    return "\n".join(lines)


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as JSON, with means, spreads and verdicts."""
    return [
        dataclasses.asdict(row)
        | {
            "mean_distance": round(row.mean, 5),
            "spread": round(row.spread, 5) if len(row.distances) > 1 else None,
            "as_good": row.is_as_good(rows[0]),
            "cost": round(row.cost(rows[0]), 5),
        }
        for row in rows
    ]


def device_name() -> str:
    """The name of the device that computed the samples."""
    device = jax.devices()[0]
    return processor_name() if device.platform == "cpu" else device.device_kind


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; `arguments` are its own, those of the process by default."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="the run")
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, help="SAMPLER:STEPS; --steps' forms"
    )
    parser.add_argument("--num_samples", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args(arguments)
    about = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "command": shlex.join(
            ["python", "tools/quality_per_cost.py", *(arguments or sys.argv[1:])]
        ),
        "num_samples": args.num_samples,
        "seeds": args.seeds,
        "batch_size": args.batch_size,
    }
    with command_ending(args):
        if args.output:
            check_writable(args.output)
        for rows in compare_methods(
            args.workdir, args.methods, args.num_samples, args.seeds, args.batch_size
        ):
            print(methods_table(rows), end="\n\n", flush=True)
            if args.output:
                about["load_average"] = [round(load, 1) for load in os.getloadavg()]
                text = json.dumps(about | {"rows": as_json(rows)}, indent=2)
                with whole_file(args.output) as file:
                    file.write(text.encode() + b"\n")


if __name__ == "__main__":
    with ending_quietly():
        main()
