"""Times a run's start, twice: with no compiled program kept on disk, and with all of them.

    python tools/start_time.py configs/digits.py --config.batch_size=64

Each start is a new process that trains one step in a new workdir; arguments that are not the tool's
go to `mdt_jax.train`. Both starts share one cache of compiled programs, new and empty, or the one
that `--cache` names. With `--processes` a start is a job of several processes on this machine's
CPU, of `--num_devices` devices each.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdt_jax.basics.help_page import Page
from mdt_jax.parallel.command import UserError, command_ending, ending_quietly
from mdt_jax.parallel.compilation_cache import VARIABLE
from mdt_jax.parallel.flag_parsing import ArgumentParser
from mdt_jax.training.metrics import METRICS_FILE, read_lines

_PROGRAMS = re.compile(r"(\d+) programs were compiled, (\d+) read")


def start(command: Sequence[str], processes: int, devices: int, cache: str) -> list[str]:
    """Starts a command as a job; returns what each process printed.

    Raises:
      UserError: a process failed.
    """
    environment = os.environ | {VARIABLE: cache}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        given = os.environ.get("XLA_FLAGS", "")
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{given} --xla_force_host_platform_device_count={devices}",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    job = [
        subprocess.Popen(
            command,
            env=environment | ({"JAX_PROCESS_ID": str(process)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]
    said = [process.communicate()[0] for process in job]
    for process, text in zip(job, said, strict=True):
        if process.returncode:
            said_last = text.strip().rpartition("\n")[2]
            raise UserError(f"a start ended with {process.returncode}: {said_last}")
    return said


def measure(arguments: argparse.Namespace, settings: Sequence[str], cache: str) -> dict[str, Any]:
    """One start: its seconds, and the programs compiled and read by all processes together."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "mdt_jax.train", "--config", arguments.config, *settings]
        command += ["--config.num_steps=1", "--config.log_every=1", "--workdir", workdir]
        command += ["--config.schedule.warmup_steps=0"]  # longer than the run
        said = start(command, arguments.processes, arguments.num_devices, cache)
        line = read_lines(Path(workdir) / METRICS_FILE)[0]
    found = [list(map(int, match.groups())) for match in map(_PROGRAMS.search, said) if match]
    return {
        "first step": line["first_step_seconds"],
        "compiling": line["compile_seconds"],
        "compiled": sum(compiled for compiled, _ in found),
        "read": sum(read for _, read in found),
    }


def parse_start_flags(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The tool's flags, and those of the training command."""
    parser = ArgumentParser(
        page=Page("python tools/start_time.py", "", "CONFIG [OPTION ...]", __doc__)
    )
    parser.add_argument("config", help="The config file.")
    parser.add_argument("--cache", default="", help="A folder of compiled programs to use.")
    parser.add_argument("--processes", type=int, default=1, help="Processes of the job.")
    text = "Devices of each of several processes."
    parser.add_argument("--num_devices", type=int, default=1, help=text)
    argv = sys.argv[1:] if argv is None else argv
    settings = [argument for argument in argv if argument.startswith("--config.")]
    return parser.parse_args([a for a in argv if a not in settings]), settings


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments, settings = parse_start_flags(argv)
    with command_ending(arguments), tempfile.TemporaryDirectory() as empty:
        print("| start | first step after | compiling | programs compiled | read |")
        print("| --- | --- | --- | --- | --- |")
        for name in ("first", "second"):
            row = measure(arguments, settings, arguments.cache or empty)
            print(
                f"| {name} | {row['first step']:.1f} s | {row['compiling']:.1f} s | "
                f"{row['compiled']} | {row['read']} |",
                flush=True,
            )


if __name__ == "__main__":
    with ending_quietly():
        main()
