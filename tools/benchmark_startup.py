"""Measures how long `--help` of every command takes, and `import mdt_jax`, each in a new process.

    python tools/benchmark_startup.py --output benchmarks/startup.json

Each is started --repeats times, by turns with the others, after a first time that does not count.
Exit status 1 if a median is above its limit: 2 seconds for help, 1 for the import.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from mdt_jax.basics.atomic import whole_file
from mdt_jax.basics.help_page import Page
from mdt_jax.commands.table import modules
from mdt_jax.parallel.command import UserError, command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser

ROOT = Path(__file__).parents[1]
# The tools that are commands of this project alone.
TOOLS = ("benchmark", "benchmark_conversion", "benchmark_evaluation", "kill_test",
         "learning_speed", "quality_per_cost")  # fmt: skip
HELP_SECONDS, IMPORT_SECONDS = 2.0, 1.0


def programs() -> dict[str, tuple[list[str], float]]:
    """What is started, by name: Python's arguments, and the limit of the median in seconds."""
    found = {"import mdt_jax": (["-c", "import mdt_jax"], IMPORT_SECONDS)}
    found["mdt"] = (["-m", "mdt_jax"], HELP_SECONDS)
    for name in modules():
        found[f"mdt {name} --help"] = (["-m", "mdt_jax", name, "--help"], HELP_SECONDS)
    for name in TOOLS:
        path = f"tools/{name}.py"
        if (ROOT / path).exists():
            found[f"python {path} --help"] = ([path, "--help"], HELP_SECONDS)
    return found


def measure(repeats: int) -> list[dict]:
    """A row for each program: its median, least and largest seconds, and its limit.

    Raises:
      UserError: a program failed.
    """
    started = programs()
    seconds: dict[str, list[float]] = {name: [] for name in started}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    for turn in range(repeats + 1):
        for name, (arguments, _) in started.items():
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True
            )
            if done.returncode:
                raise UserError(f"{name} ended with status {done.returncode}")
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return [
        {
            "name": name,
            "seconds": round(statistics.median(found), 3),
            "seconds_min": round(min(found), 3),
            "seconds_max": round(max(found), 3),
            "limit": started[name][1],
        }
        for name, found in seconds.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(
        page=Page("python tools/benchmark_startup.py", "", "[OPTION ...]", __doc__)
    )
    parser.add_argument("--repeats", type=int, default=5, help="starts of each that count")
    parser.add_argument("--output", help="where the JSON goes")
    args: argparse.Namespace = parser.parse_args(argv)
    with command_ending(args):
        rows = measure(args.repeats)
        print("| | median | least | largest |\n| --- | --- | --- | --- |")
        for row in rows:
            times = (row["seconds"], row["seconds_min"], row["seconds_max"])
            print(f"| `{row['name']}` | {' | '.join(f'{t:.2f} s' for t in times)} |")
        if args.output:
            about = {
                "date": datetime.date.today().isoformat(),
                "command": "python tools/benchmark_startup.py",
                "python": platform.python_version(),
                "cores": os.cpu_count(),
                "load_average": [round(load, 1) for load in os.getloadavg()],
            }
            with whole_file(args.output) as file:
                file.write(json.dumps(about | {"rows": rows}, indent=2).encode() + b"\n")
        slow = [row["name"] for row in rows if row["seconds"] > row["limit"]]
        if slow:
            raise UserError(f"slower than allowed: {', '.join(slow)}")


if __name__ == "__main__":
    with ending_quietly():
        main()
