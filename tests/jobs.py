"""Jobs of several processes on this machine, as a cluster would start them."""

import importlib.metadata
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def xla_flags(devices: int) -> str:
    """Flags for so many CPU devices, and for a compiler that is done in half the time or less.

    That is XLA without its newer way of making fusions, which the tiny programs of the tests do
    not repay. Releases after 0.10 lack the switch, and end a process that is given it.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags += " --xla_cpu_use_fusion_emitters=false"
    return flags


def start_job(command: Sequence, processes: int, devices: int = 1, **environment: str) -> list:
    """Starts `processes` times the same command, as one job; returns the subprocess.Popen's.

    Each has `devices` CPU devices, and its output in one text, standard error included.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return [
        subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=os.environ | settings | {"JAX_PROCESS_ID": str(process)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]


def outcomes(job: Sequence[subprocess.Popen], timeout: float) -> list[tuple[int, str]]:
    """Every process's exit status and output; raises TimeoutExpired, and leaves none running."""
    try:
        texts = [process.communicate(timeout=timeout)[0] for process in job]
    finally:
        for process in job:
            process.kill()
            process.wait()
    return [(process.returncode, text) for process, text in zip(job, texts, strict=True)]


def finish(job: Sequence[subprocess.Popen], timeout: float = 600) -> None:
    """Waits for a job that should succeed; an AssertionError shows what failed ones printed."""
    failed = [text[-3000:] for status, text in outcomes(job, timeout) if status]
    assert not failed, "\n".join(failed)
