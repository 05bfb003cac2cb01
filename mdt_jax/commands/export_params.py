"""Writes the EMA weights of a run alone, without optimiser and raw parameters.

    mdt export --input runs/mine --output runs/mine_ema --dtype bfloat16

The output is a workdir that `mdt_jax.sample` and `config.init_from` take, a small part of the run's
size. For a PyTorch file use `mdt convert to-torch`.
"""

from __future__ import annotations

import os

from mdt_jax.basics.help_page import Page
from mdt_jax.commands.convert_checkpoint import DTYPES
from mdt_jax.parallel.command import command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser

PAGE = Page(
    "mdt export",
    "python -m mdt_jax.commands.export_params",
    "--input RUN --output FOLDER [OPTION ...]",
    __doc__,
)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(page=PAGE)
    parser.add_argument("--input", required=True, help="the run's workdir")
    parser.add_argument("--output", required=True, help="a new folder")
    parser.add_argument(
        "--ema_rate", type=float, help="which average; the run's first if not given"
    )
    parser.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
    parser.add_argument("--dtype", choices=DTYPES, help="as saved if not given")
    args = parser.parse_args(argv)
    with command_ending(args):
        from mdt_jax.training import transfer  # imports JAX, which --help should not

        folder = transfer.export_ema(
            args.input, args.output, ema_rate=args.ema_rate, step=args.step, dtype=args.dtype
        )
        print(folder)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing here computes
    with ending_quietly():
        main()
