"""Converts checkpoints between PyTorch and this project, both ways and bit for bit.

    python tools/convert_checkpoint.py to-jax --input mdt_xl2_v2_ckpt.pt --output runs/mdt_xl2_v2
    python tools/convert_checkpoint.py to-jax --output runs/mine \\
        --model model400000.pt --ema ema_0.9999_400000.pt --opt opt400000.pt
    python tools/convert_checkpoint.py to-torch --input runs/mine --output mine.safetensors
    python tools/convert_checkpoint.py inspect --input mdt_xl2_v2_ckpt.pt
    python tools/convert_checkpoint.py to-jax --output inception \\
        --input pt_inception-2015-12-05-6726825d.pth

to-jax writes a workdir that `mdt_jax.sample` and `mdt_jax.train` take as it is; the architecture is
read off the shapes. to-torch writes a state dict that the authors' `load_state_dict(strict=True)`
accepts. An input is a .pt or .safetensors file or hf://OWNER/REPO/FILE. The Inception-v3 of FID,
also as classify_image_graph_def.pb, becomes a folder for `mdt_jax.evaluate --inception`, and back.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from mdt_jax.convert import inception as convert_inception
from mdt_jax.convert.architecture import parameter_shapes
from mdt_jax.parallel.command import command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser
from mdt_jax.training import transfer
from mdt_jax.weights import descriptions, inception, pretrained
from mdt_jax.weights import files as weight_files

# Sizes that weights do not show, each a flag with its help.
HINTS = {
    "decode_layers": "decoder depth of an MDT v1; 2 if not given",
    "num_heads": "heads of a DiT of no known width",
    "num_classes": "settles whether the last row of the label table is a class",
    "input_size": "side of the latents of diffusers' DiT, where no config.json says it",
}


def run_to_jax(args: argparse.Namespace) -> None:
    """Writes a workdir from PyTorch files."""
    main = args.input or args.model
    if bool(args.input) == bool(args.model) or (args.input and (args.ema or args.opt)):
        raise ValueError("give --input X, or --model M with --ema E and --opt O of the same run")
    if args.input and inception.holds_inception(args.input):
        _inception_to_jax(args.input, Path(args.output))
        return
    shown = {key: getattr(args, key) for key in HINTS}
    # DiT's training files keep model, average and optimiser in one: each flag takes its own part.
    model = pretrained.read_pretrained(main, nest=_part(args.model, "model"), **shown)
    ema = (
        pretrained.read_pretrained(args.ema, nest=_part(args.ema, "ema"), **shown)
        if args.ema
        else None
    )
    if args.step is not None:
        model = dataclasses.replace(model, step=args.step)
    moments = transfer.read_moments(args.opt, model) if args.opt else None
    rate = descriptions.ema_rate_of(args.ema or main) if args.ema_rate is None else args.ema_rate
    rate = 0.9999 if rate is None else rate
    folder = transfer.to_workdir(
        args.output, model, ema=ema, ema_rate=rate, moments=moments, step=args.step
    )
    updates = f", {moments.optimizer} after {moments.count} updates" if moments else ""
    print(f"{folder}: {model.architecture.name} at step {model.step}{updates}")
    print(f"to sample: python -m mdt_jax.sample --workdir {folder} --output samples")


def _inception_to_jax(source: str, output: Path) -> None:
    params = inception.read_parameters(source)
    transfer.check_new_folder(output)
    file = inception.save_parameters(output, params, source)
    print(f"{file}: the Inception-v3 of FID, {file.stat().st_size / 2**20:,.1f} MiB")
    print(f"to evaluate: python -m mdt_jax.evaluate --inception {output} ...")


def _part(path: str | None, part: str) -> str | None:
    """`part` if a file holds several parts under their names, None if it holds weights alone."""
    return part if path is not None and weight_files.has_part(path, part) else None


def run_to_torch(args: argparse.Namespace) -> None:
    """Writes a PyTorch file from a workdir."""
    weight_files.check_ending(args.output)
    if inception.holds_inception(args.input):
        arrays = convert_inception.to_torch(inception.read_parameters(args.input))
        weight_files.write_weights(args.output, arrays)
        print(f"{args.output}: {len(arrays)} arrays of the Inception-v3 of FID")
        return
    arrays, metadata = transfer.to_state_dict(
        args.input,
        params=args.params,
        ema_rate=args.ema_rate,
        step=args.step,
        dtype=args.dtype,
    )
    weight_files.write_weights(args.output, arrays, metadata)
    size = sum(array.nbytes for array in arrays.values()) / 2**20
    print(f"{args.output}: {len(arrays)} arrays, {size:,.1f} MiB, {args.params} parameters")


def run_inspect(args: argparse.Namespace) -> None:
    """Prints the model that a file of weights is of, and its arrays."""
    if inception.holds_inception(args.input):
        _inspect_inception(args.input)
        return
    weights, architecture = pretrained.open_weights(
        args.input, **{key: getattr(args, key) for key in HINTS}
    )
    names = parameter_shapes(architecture)
    dtypes = sorted({weights.dtypes[name].name for name in names if name in weights})
    count = sum(math.prod(shape) for shape in names.values())
    print(f"file          {weights.path}" + (f", its {weights.nest!r}" if weights.nest else ""))
    print(f"model         {architecture.name}")
    for field, value in dataclasses.asdict(architecture).items():
        print(f"  {field:<15} {value}")
    print(f"parameters    {count:,} in {len(names)} arrays, {', '.join(dtypes)}")
    _print_arrays(weights.shapes, weights.dtypes)


def _inspect_inception(source: str) -> None:
    path, arrays = inception.open_arrays(source)
    inception.read_parameters(source)  # refuses a file that lacks some
    shapes = convert_inception.state_dict_shapes()
    print(f"file          {path}")
    print("model         Inception-v3 of 2015, of FID")
    count = sum(math.prod(shape) for shape in shapes.values())
    print(f"parameters    {count:,} in {len(shapes)} arrays, float32")
    dtypes = {name: array.dtype for name, array in arrays.items()}
    _print_arrays({name: array.shape for name, array in arrays.items()}, dtypes)


def _print_arrays(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype]) -> None:
    width = max(map(len, shapes))
    for name, shape in shapes.items():
        print(f"{name:<{width}}  {dtypes[name].name:<8}  {' × '.join(map(str, shape))}")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    into = commands.add_parser("to-jax", help="PyTorch files to a workdir")
    into.set_defaults(run=run_to_jax)
    into.add_argument("--input", help="weights: .pt, .safetensors or hf://OWNER/REPO/FILE")
    into.add_argument("--model", help="modelNNNNNN.pt of a run of the authors'")
    into.add_argument("--ema", help="its ema_RATE_NNNNNN.pt")
    into.add_argument("--opt", help="its optNNNNNN.pt: AdamW's or Adan's moments")
    into.add_argument("--output", required=True, help="the workdir, a new folder")
    into.add_argument("--step", type=int, help="training steps; from the file's name if not given")
    into.add_argument("--ema_rate", type=float, help="from the file's name, else 0.9999")
    out = commands.add_parser(
        "to-torch", help="a workdir, or an Inception's folder, to a PyTorch file"
    )
    out.set_defaults(run=run_to_torch)
    out.add_argument("--input", required=True, help="the workdir")
    out.add_argument("--output", required=True, help=".pt or .safetensors")
    out.add_argument("--params", choices=("ema", "raw"), default="ema")
    out.add_argument("--ema_rate", type=float, help="which average; the run's first if not given")
    out.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
    out.add_argument("--dtype", choices=tuple(transfer.DTYPES), help="as saved if not given")
    show = commands.add_parser("inspect", help="what a file of weights is")
    show.set_defaults(run=run_inspect)
    show.add_argument("--input", required=True, help=".pt, .safetensors or hf://OWNER/REPO/FILE")
    for command in (into, show):
        for hint, meaning in HINTS.items():
            command.add_argument(f"--{hint}", type=int, help=meaning)
    args = parser.parse_args(argv)
    with command_ending(args):
        args.run(args)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing here computes
    with ending_quietly():
        main()
