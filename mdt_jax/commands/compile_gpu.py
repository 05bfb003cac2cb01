"""Compiles a run for GPUs that are not there: does it fit, what bounds it, how long might it take.

    mdt compile-gpu --config imagenet256:MDTv2-XL/2 --gpus h100x8 \\
        --config.mesh.fsdp=8 --config.model.scan_unroll=12 --quick --nosampler
    mdt compile-gpu --config imagenet256:MDTv2-XL/2 --gpus h100x8 \\
        --num_nodes 4 --config.batch_size=1024 --config.mesh.fsdp=8 --advise
    mdt compile-gpu --gpus h200 --calibrate
    mdt compile-gpu --all --quick --nosampler --output rows.json

The training step (one program for each number of kept tokens) and the sampler's are what
`mdt_jax.train` and `mdt_jax.sample` run; the compiler is the one in JAX's CUDA plugin
(pip install "mdt_jax[gpu-compiler]"). No data, no GPU and no driver are needed; that it finds no
driver is all that the plugin complains of. Compiling XL/2 takes minutes, --all hours; with --output
it goes on where it was left: rows that the file has are not compiled again.

--gpus takes a card and the number in a node: h100x8, h100 (one), a100x8, a100-40gbx8, h200x8,
b200x8, gb200x4; --num_nodes takes the number of such nodes.

The time is told twice: a floor (FLOPs over the peak, bytes over bandwidths, all transfers beside
other work) and an estimate (XLA's table for lone products, transfers as they are scheduled). The
module mdt_jax.compilers.gpu_estimate says what each part rests on; no GPU has confirmed any of it.
A lone 8192³ product stands beside the MFU; where it is not 0.70 to 0.95 of the peak the line says
UNCALIBRATED. "elementwise" is the bytes of everything but products, cuDNN's attention and
transfers. Memory is the compiler's, without cuDNN's workspace. A program fits if it takes no more
than 92% of a card; above 75% the report says how to let JAX take that much. The last line is the
whole report as JSON. Exit status: 0 if all was compiled, whether it fits or not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from mdt_jax.basics.help_page import Page
from mdt_jax.compilers.flags import define_flags as define_shared_flags
from mdt_jax.parallel.command import command_ending
from mdt_jax.parallel.flag_parsing import run_command
from mdt_jax.training.config_flag import CONFIG_OPTIONS, parse_config_flags

ALL_MODELS = ("MDTv2-S/2", "MDTv2-B/2", "MDTv2-L/2", "MDTv2-XL/2", "MDT-XL/2", "DiT-XL/2")
ALL_GPUS = ("h100x1", "h100x8", "h100x8 x 4 nodes", "h200x8", "a100x8")

PAGE = Page(
    "mdt compile-gpu",
    "python -m mdt_jax.commands.compile_gpu",
    "--config NAME --gpus h100x8 [OPTION ...]",
    __doc__,
    {
        "The run": (*CONFIG_OPTIONS, "gpus", "num_nodes"),
        "What is compiled": ("quick", "sampler", "sample_batch_size", "advise"),
        "The compiler itself": ("calibrate", "calibration"),
        "A table of many": ("all", "models", "all_gpus", "unroll", "kernels", "output"),
    },
)

# Each flag: absl's function that defines it, name, default, help.
FLAGS = (
    (flags.DEFINE_string, "gpus", None, "Such as h100x8: a card, and how many a node has."),
    (flags.DEFINE_integer, "num_nodes", None, "Nodes of that size, joined by the network."),
    (flags.DEFINE_bool, "all", False, "A table of models over several nodes."),
    (flags.DEFINE_integer, "unroll", 12, "scan_unroll of --all."),
    (flags.DEFINE_string, "kernels", "cudnn", "model.kernels of --all."),
    (flags.DEFINE_list, "models", list(ALL_MODELS), "The models of --all."),
    (flags.DEFINE_list, "all_gpus", list(ALL_GPUS), "The nodes of --all."),
)


def run_compilation(arguments: Any) -> Any:
    """Does what the flags ask for; returns the result, printed last as JSON, as plain values."""
    from mdt_jax.compilers import gpus  # which import JAX
    from mdt_jax.compilers.command import compile_all, imagenet_config, report_on
    from mdt_jax.compilers.gpu_report import GpuReport

    def config_of(model: str, nodes: Any) -> Any:
        """A model's recipe; on one GPU large models begin with microbatches of 32 images."""
        config = imagenet_config(model, nodes, arguments.unroll)
        config.model.kernels = arguments.kernels
        if nodes.num_chips == 1 and re.search(r"-X?L/", model):
            config.accumulation_steps = config.batch_size // 32
        return config

    gpus.check_compiler()
    if arguments.all:
        return compile_all(
            arguments,
            map(gpus.parse_gpus, arguments.all_gpus),
            config_of,
            GpuReport,
        )
    if not arguments.gpus:
        raise ValueError("--gpus is missing: such as h100x8, h100, a100x8, h200x8 or b200x8")
    return report_on(arguments, gpus.parse_gpus(arguments.gpus, arguments.num_nodes), GpuReport)


def define_flags(f: flags.FlagValues, argv: Sequence[str] | None = None) -> None:
    """The command's flags; `argv` is the command line, the process's by default."""
    define_shared_flags(f, FLAGS, argv)


def main(_: list[str]) -> None:
    """The command."""
    with command_ending(flags.FLAGS):
        print(json.dumps(run_compilation(flags.FLAGS)))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # it traces; the compiler for CUDA compiles
    # XLA logs after two minutes, as an error, that compiling is slow; a larger model takes longer.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    run_command(main, define_flags, PAGE, parse_config_flags)
