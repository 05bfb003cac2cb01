"""Measures time and memory of evaluation's arithmetic on random, correlated features.

    python tools/benchmark_evaluation.py --output benchmarks/evaluation.json

It measures moments and Fréchet distance of 50,000 × 2048 features, and precision and recall against
10,000 and 50,000 reference features. Memory is anonymous memory (RssAnon; Linux only) at its peak,
the features of both sets included. Images and the network are not measured: their time depends on
the device.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mdt_jax.basics.atomic import whole_file
from mdt_jax.basics.help_page import Page
from mdt_jax.evaluation import manifold
from mdt_jax.evaluation.statistics import FeatureMoments, Gaussian, frechet_distance
from mdt_jax.parallel.command import command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser


def random_features(count: int, size: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """(count, size) float32 normal numbers, mixed so that variances fall off as 1/rank."""
    mixing = np.random.default_rng(0).standard_normal((size, size), np.float32)
    mixing *= np.arange(1, size + 1, dtype=np.float32)[:, None] ** -0.5
    rng = np.random.default_rng(seed)
    found = np.empty((count, size), np.float32)
    for first in range(0, count, 4096):
        rows = found[first : first + 4096]
        rows[:] = rng.standard_normal(rows.shape, np.float32) @ mixing + np.float32(shift)
    return found


@contextlib.contextmanager
def measured(rows: list[dict], **what: str | int) -> Iterator[dict]:
    """Adds a row with the seconds and the peak of anonymous bytes of the work in its context.

    Args:
      rows: the rows so far.
      **what: the row's other columns.
    """
    row, done, peak = dict(what), threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, worked = time.perf_counter(), time.process_time()
    try:
        yield row
    finally:
        row["seconds"] = round(time.perf_counter() - began, 1)
        row["cpu_seconds"] = round(time.process_time() - worked, 1)
        done.set()
        watcher.join()
    row["peak_anonymous_bytes"] = max(peak, _anonymous_bytes())
    rows.append(row)
    values = ", ".join(f"{key} {value}" for key, value in row.items())
    print(values, flush=True)


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def moments(features: np.ndarray) -> Gaussian:
    """Mean and covariance of features that are given in batches, as images come."""
    found = FeatureMoments(features.shape[1])
    for first in range(0, len(features), 64):
        found.update(features[first : first + 64])
    return found.gaussian()


def benchmark_metrics(samples: int, references: list[int], size: int) -> list[dict]:
    """Measures each part of evaluation; one row for each.

    Args:
      samples: number of samples.
      references: numbers of reference images, of which precision and recall take each in turn.
      size: number of features.
    """
    rows: list[dict] = []
    generated = random_features(samples, size, seed=1, shift=0.01)
    reference = random_features(max(references), size, seed=2)
    with measured(rows, part="moments", samples=samples, features=size):
        ours = moments(generated)
    theirs = moments(reference)
    with measured(rows, part="Fréchet distance", samples=samples, features=size) as row:
        row["value"] = round(frechet_distance(theirs, ours), 4)
    for count in references:
        known = reference[:count]
        with measured(
            rows, part="precision and recall", samples=samples, reference=count, features=size
        ) as row:
            found = manifold.compare_manifolds(known, generated)
            row["value"] = [found.precision, found.recall]
    return rows


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = next((line for line in lines if line.startswith("model name")), "")
    return found.partition(": ")[2] or platform.machine()


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(
        page=Page("python tools/benchmark_evaluation.py", "", "[OPTION ...]", __doc__)
    )
    parser.add_argument("--samples", type=int, default=50_000, help="how many samples there are")
    parser.add_argument(
        "--references",
        type=int,
        nargs="*",
        default=[10_000, 50_000],
        help="how many reference images, each measured",
    )
    parser.add_argument("--features", type=int, default=2048, help="numbers an image")
    parser.add_argument("--output", help="where the JSON goes")
    args = parser.parse_args(argv)
    with command_ending(args):
        rows = benchmark_metrics(args.samples, args.references, args.features)
        print(
            "| part | samples | reference | seconds | CPU seconds | peak memory |\n|" + " --- |" * 6
        )
        for row in rows:
            reference = f"{row['reference']:,}" if "reference" in row else ""
            print(
                f"| {row['part']} | {row['samples']:,} | {reference} | {row['seconds']:.0f} | "
                f"{row['cpu_seconds']:.0f} | "
                f"{row['peak_anonymous_bytes'] / 2**30:.2f} GiB |"
            )
        if args.output:
            about = {
                "date": datetime.date.today().isoformat(),
                "device": _processor(),
                "cores": os.cpu_count(),
                "load_average": [round(load, 1) for load in os.getloadavg()],
                "python": platform.python_version(),
                "numpy": np.__version__,
                "command": "python tools/benchmark_evaluation.py",
            }
            with whole_file(args.output) as file:
                file.write(json.dumps(about | {"rows": rows}, indent=2).encode() + b"\n")


if __name__ == "__main__":
    with ending_quietly():
        main()
