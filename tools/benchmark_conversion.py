"""Measures time and memory of converting full-size checkpoints to JAX and back, bit for bit.

    python tools/benchmark_conversion.py --output benchmarks/conversion.json

Makes state dicts of the authors' names and shapes with random weights, runs
`tools/convert_checkpoint.py` in child processes, samples their anonymous memory (RssAnon, what the
kernel cannot drop; Linux only), and compares the file that comes back with the one that went in. It
needs about three times the checkpoint's size of disk in --scratch.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from mdt_jax.basics.atomic import whole_file
from mdt_jax.basics.help_page import Page
from mdt_jax.convert.architecture import BUFFER, Architecture, state_dict_shapes
from mdt_jax.models.positions import relative_position_index
from mdt_jax.parallel.command import UserError, command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser
from mdt_jax.weights import files as weight_files

XL = {
    "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28,
    "num_heads": 16, "mlp_ratio": 4.0, "num_classes": 1000, "null_class": True,
    "learn_variance": True,
}  # fmt: skip
MODELS = {
    "MDTv2-XL/2": Architecture(family="MDTv2", decoder_depth=4, **XL),
    "MDT-XL/2": Architecture(family="MDT", decoder_depth=2, **XL),
    "DiT-XL/2": Architecture(family="DiT", decoder_depth=0, **XL),
}
CONVERT = Path(__file__).with_name("convert_checkpoint.py")


def random_weights(architecture: Architecture) -> dict[str, np.ndarray]:
    """A state dict of normally distributed weights, and the authors' buffers."""
    rng = np.random.default_rng(0)
    index = relative_position_index(architecture.grid_size).astype(np.int64)
    return {
        name: index if name.endswith(BUFFER) else rng.standard_normal(shape, np.float32)
        for name, shape in state_dict_shapes(architecture).items()
    }


def measure_conversion(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak anonymous bytes of a run of the converter.

    Raises:
      UserError: it fails.
    """
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, str(CONVERT), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while child.poll() is None:
            peak = max(peak, _anonymous_bytes(child.pid))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = child.communicate()
    watcher.join()
    if child.returncode:
        raise UserError(f"{' '.join(arguments)}: {errors.decode()[-500:]}")
    return time.perf_counter() - began, peak


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def same_bits(one: Path, other: Path) -> bool:
    """Whether two files hold the same arrays under the same names, in the same order."""
    a, b = weight_files.read_weights(one), weight_files.read_weights(other)
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


def benchmark_model(name: str, scratch: Path) -> list[dict]:
    """Converts random weights of a model both ways; one row for each direction."""
    source, workdir, back = scratch / "source.pt", scratch / "workdir", scratch / "back.pt"
    weight_files.write_weights(source, random_weights(MODELS[name]))
    size = source.stat().st_size
    commands = {
        "to-jax": ["--input", str(source), "--output", str(workdir)],
        "to-torch": ["--input", str(workdir), "--output", str(back)],
    }
    rows = []
    for command, arguments in commands.items():
        seconds, peak = measure_conversion([command, *arguments])
        rows.append(
            {
                "model": name,
                "command": command,
                "checkpoint_bytes": size,
                "seconds": round(seconds, 1),
                "peak_anonymous_bytes": peak,
                "memory_ratio": round(peak / size, 3),
            }
        )
    exact = same_bits(source, back)
    return [row | {"bit_exact": exact} for row in rows]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(
        page=Page("python tools/benchmark_conversion.py", "", "[OPTION ...]", __doc__)
    )
    parser.add_argument(
        "--models",
        nargs="*",
        choices=MODELS,
        default=["MDTv2-XL/2", "MDT-XL/2"],
        help="of which sizes checkpoints are converted",
    )
    parser.add_argument("--scratch", help="where files of some 10 GB may lie for a while")
    parser.add_argument("--output", help="where the JSON goes")
    args = parser.parse_args(argv)
    with command_ending(args):
        rows = []
        for name in args.models:
            with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
                rows += benchmark_model(name, Path(scratch))
        print(conversion_table(rows))
        if args.output:
            about = {
                "date": datetime.date.today().isoformat(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "command": "python tools/benchmark_conversion.py",
            }
            with whole_file(args.output) as file:
                file.write(json.dumps(about | {"rows": rows}, indent=2).encode() + b"\n")


def conversion_table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    header = ("model", "command", "checkpoint", "seconds", "peak memory", "of size", "bit-exact")
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += [
        f"| {row['model']} | {row['command']} | {row['checkpoint_bytes'] / 2**30:.2f} GiB | "
        f"{row['seconds']:.0f} | {row['peak_anonymous_bytes'] / 2**30:.2f} GiB | "
        f"{row['memory_ratio']:.2f} | {'yes' if row['bit_exact'] else 'NO'} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with ending_quietly():
        main()
