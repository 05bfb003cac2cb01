"""Writes the EMA weights of a run alone, without optimiser and raw parameters.

    python tools/export_params.py --input runs/mine --output runs/mine_ema --dtype bfloat16

The output is a workdir that `mdt_jax.sample` and `config.init_from` take, a small part of the run's
size. For a PyTorch file use `tools/convert_checkpoint.py to-torch`.
"""

from __future__ import annotations

import argparse

import jax

from mdt_jax.parallel.command import command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser
from mdt_jax.training import transfer


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="the run's workdir")
    parser.add_argument("--output", required=True, help="a new folder")
    parser.add_argument(
        "--ema_rate", type=float, help="which average; the run's first if not given"
    )
    parser.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
    parser.add_argument("--dtype", choices=tuple(transfer.DTYPES), help="as saved if not given")
    args = parser.parse_args(argv)
    with command_ending(args):
        folder = transfer.export_ema(
            args.input, args.output, ema_rate=args.ema_rate, step=args.step, dtype=args.dtype
        )
        print(folder)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing here computes
    with ending_quietly():
        main()
