"""Compiles a run for TPUs that are not there: does it fit, how long will it take, what bounds it.

    mdt compile-tpu --config imagenet256:MDTv2-XL/2 --topology v5e:4x4 \\
        --config.mesh.fsdp=16 --config.model.remat=dots
    mdt compile-tpu --config imagenet256:MDT-XL/2 --topology v4-512 --advise
    mdt compile-tpu --topology v5p-32 --calibrate
    mdt compile-tpu --all

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
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from absl import flags

from mdt_jax.basics.help_page import Page
from mdt_jax.compilers.flags import define_flags as define_shared_flags
from mdt_jax.parallel.command import command_ending
from mdt_jax.parallel.flag_parsing import run_command
from mdt_jax.training.config_flag import CONFIG_OPTIONS, parse_config_flags

ALL_MODELS = ("MDTv2-S/2", "MDTv2-B/2", "MDTv2-L/2", "MDTv2-XL/2")
ALL_TOPOLOGIES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4", "v4:2x2x4")

PAGE = Page(
    "mdt compile-tpu",
    "python -m mdt_jax.commands.compile_tpu",
    "--config NAME --topology v5e:4x4 [OPTION ...]",
    __doc__,
    {
        "The run": (*CONFIG_OPTIONS, "topology", "num_slices"),
        "What is compiled": ("quick", "sampler", "sample_batch_size", "advise"),
        "The compiler itself": ("calibrate", "calibration"),
        "A table of many": ("all", "models", "topologies", "unroll", "output"),
    },
)

# Each flag: absl's function that defines it, name, default, help.
FLAGS = (
    (flags.DEFINE_string, "topology", None, "Such as v4-512, v5litepod-16, v5p:2x2x4."),
    (flags.DEFINE_integer, "num_slices", None, "Slices of that size, joined by the network."),
    (flags.DEFINE_bool, "all", False, "A table of the MDTv2 models over four kinds of chip."),
    (flags.DEFINE_integer, "unroll", 12, "scan_unroll of --all; 1 compiles much faster."),
    (flags.DEFINE_list, "models", list(ALL_MODELS), "The models of --all."),
    (flags.DEFINE_list, "topologies", list(ALL_TOPOLOGIES), "The topologies of --all."),
)


def run_compilation(arguments: Any) -> Any:
    """Does what the flags ask for; returns the result, printed last as JSON, as plain values."""
    from mdt_jax.compilers import topologies  # which import JAX
    from mdt_jax.compilers.command import compile_all, imagenet_config, report_on

    topologies.check_compiler()
    if arguments.all:
        config_of = partial(imagenet_config, unroll=arguments.unroll)
        return compile_all(
            arguments, map(topologies.parse_topology, arguments.topologies), config_of
        )
    if not arguments.topology:
        raise ValueError("--topology is missing: such as v4-512, v5litepod-16, v5p:2x2x4")
    return report_on(arguments, topologies.parse_topology(arguments.topology, arguments.num_slices))


def define_flags(f: flags.FlagValues, argv: Sequence[str] | None = None) -> None:
    """The command's flags; `argv` is the command line, the process's by default."""
    define_shared_flags(f, FLAGS, argv)


def main(_: list[str]) -> None:
    """The command."""
    with command_ending(flags.FLAGS):
        print(json.dumps(run_compilation(flags.FLAGS)))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # it traces; the TPU's compiler compiles
    # XLA logs after two minutes, as an error, that compiling is slow; a larger model takes longer.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    run_command(main, define_flags, PAGE, parse_config_flags)
