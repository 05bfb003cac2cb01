"""What the command `mdt convert` does: weights and runs between PyTorch and this project."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdt_jax.commands.convert_checkpoint import HINTS
from mdt_jax.convert import inception as convert_inception
from mdt_jax.convert.architecture import parameter_shapes
from mdt_jax.sampling.suggestion import sampling_command
from mdt_jax.training import transfer
from mdt_jax.weights import descriptions, hub_folder, inception, pretrained
from mdt_jax.weights import files as weight_files


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
    rate = model.config.ema_rates[0] if rate is None else rate
    folder = transfer.to_workdir(
        args.output, model, ema=ema, ema_rate=rate, moments=moments, step=args.step
    )
    updates = f", {moments.optimizer} after {moments.count} updates" if moments else ""
    print(f"{folder}: {model.architecture.name} at step {model.step}{updates}")
    channels = model.architecture.in_channels
    how = sampling_command(folder, "samples", channels, model.latents)
    print(f"to sample: {how}")


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
    hints, folder = {key: getattr(args, key) for key in HINTS}, None
    if hub_folder.is_hub_folder(args.input):
        pretrained.read_pretrained(args.input)  # refuses one that is damaged
        folder = hub_folder.open_folder(args.input)
        hints = folder.hints()
    source = folder.weights if folder else args.input
    weights, architecture = pretrained.open_weights(source, **hints)
    names = parameter_shapes(architecture)
    dtypes = sorted({weights.dtypes[name].name for name in names if name in weights})
    count = sum(math.prod(shape) for shape in names.values())
    print(f"file          {weights.path}" + (f", its {weights.nest!r}" if weights.nest else ""))
    print(f"model         {architecture.name}")
    for field, value in dataclasses.asdict(architecture).items():
        print(f"  {field:<15} {value}")
    print(f"parameters    {count:,} in {len(names)} arrays, {', '.join(dtypes)}")
    if folder:
        _print_described(folder.described)
    _print_arrays(weights.shapes, weights.dtypes)


def _print_described(described: Mapping[str, Any]) -> None:
    """What config.json of a published folder says beside the sizes."""
    for part in ("process", "sampling", "training"):
        print(part)
        for name, value in described[part].items():
            print(f"  {name:<15} {json.dumps(value, ensure_ascii=False)}")
    for part in ("latents", "class_names", "license"):
        print(f"{part:<13} {json.dumps(described[part], ensure_ascii=False)}")


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


# The command's own commands by name.
RUN = {"to-jax": run_to_jax, "to-torch": run_to_torch, "inspect": run_inspect}
