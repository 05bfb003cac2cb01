"""Converts checkpoints between PyTorch and this project, both ways and bit for bit.

    mdt convert to-jax --input mdt_xl2_v2_ckpt.pt --output runs/mdt_xl2_v2
    mdt convert to-jax --output runs/mine \\
        --model model400000.pt --ema ema_0.9999_400000.pt --opt opt400000.pt
    mdt convert to-torch --input runs/mine --output mine.safetensors
    mdt convert inspect --input mdt_xl2_v2_ckpt.pt
    mdt convert to-jax --output inception --input pt_inception-2015-12-05-6726825d.pth

to-jax writes a workdir that `mdt_jax.sample` and `mdt_jax.train` take as it is; the architecture is
read off the shapes. to-torch writes a state dict that the authors' `load_state_dict(strict=True)`
accepts. An input is a .pt or .safetensors file, hf://OWNER/REPO/FILE, or a folder that
`mdt publish` wrote, also as hf://OWNER/REPO. The Inception-v3 of FID, also as
classify_image_graph_def.pb, becomes a folder for `mdt_jax.evaluate --inception`, and back.
"""

from __future__ import annotations

import argparse
import os

from mdt_jax.basics.help_page import Page
from mdt_jax.parallel.command import command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser

PAGE = Page(
    "mdt convert", "python -m mdt_jax.commands.convert_checkpoint", "COMMAND [OPTION ...]", __doc__
)
# What weights can be stored in: the keys of `training.transfer.DTYPES`.
DTYPES = ("float32", "float16", "bfloat16")
# Sizes that weights do not show, each a flag with its help.
HINTS = {
    "decode_layers": "decoder depth of an MDT v1; 2 if not given",
    "num_heads": "heads of a DiT of no known width",
    "num_classes": "settles whether the last row of the label table is a class",
    "input_size": "side of the latents of diffusers' DiT, where no config.json says it",
}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(page=PAGE)
    commands = parser.add_subparsers(
        title="Commands", dest="command", required=True, metavar="COMMAND"
    )
    into = _add(commands, "to-jax", "PyTorch files to a workdir")
    into.add_argument("--input", help="weights: .pt, .safetensors or hf://OWNER/REPO/FILE")
    into.add_argument("--model", help="modelNNNNNN.pt of a run of the authors'")
    into.add_argument("--ema", help="its ema_RATE_NNNNNN.pt")
    into.add_argument("--opt", help="its optNNNNNN.pt: AdamW's or Adan's moments")
    into.add_argument("--output", required=True, help="the workdir, a new folder")
    into.add_argument("--step", type=int, help="training steps; from the file's name if not given")
    into.add_argument("--ema_rate", type=float, help="from the file's name, else 0.9999")
    out = _add(commands, "to-torch", "a workdir, or an Inception's folder, to a PyTorch file")
    out.add_argument("--input", required=True, help="the workdir, or a published folder")
    out.add_argument("--output", required=True, help=".pt or .safetensors")
    out.add_argument("--params", choices=("ema", "raw"), default="ema", help="which weights")
    out.add_argument("--ema_rate", type=float, help="which average; the run's first if not given")
    out.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
    out.add_argument("--dtype", choices=DTYPES, help="as saved if not given")
    show = _add(commands, "inspect", "what a file of weights is")
    show.add_argument("--input", required=True, help=".pt, .safetensors or hf://OWNER/REPO/FILE")
    for command in (into, show):
        for hint, meaning in HINTS.items():
            command.add_argument(f"--{hint}", type=int, help=meaning)
    args = parser.parse_args(argv)
    with command_ending(args):
        from mdt_jax.commands import conversion  # imports JAX, which --help should not

        conversion.RUN[args.command](args)


def _add(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing here computes
    with ending_quietly():
        main()
