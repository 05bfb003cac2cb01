"""Writes the EMA weights of a run alone, without optimiser and raw parameters.

    python tools/export_params.py --input runs/mine --output runs/mine_ema --dtype bfloat16

The output is a workdir that `mdt_jax.sample` and `config.init_from` take, a small part of the run's
size. For a PyTorch file use `tools/convert_checkpoint.py to-torch`.
"""

from __future__ import annotations

import argparse
import sys

import jax
from absl import logging

from mdt_jax.checkpoints import CheckpointError
from mdt_jax.training import transfer


def main(argv: list[str] | None = None) -> None:
    """The command: one clear line and exit status 1 for what a user can mend."""
    parser = argparse.ArgumentParser(
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
    try:
        folder = transfer.export_ema(
            args.input, args.output, ema_rate=args.ema_rate, step=args.step, dtype=args.dtype
        )
    except (ValueError, OSError, CheckpointError) as error:
        if logging.level_debug():
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(folder)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing here computes
    main()
