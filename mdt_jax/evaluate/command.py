"""The command `python -m mdt_jax.evaluate`, from its flags to the report."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from mdt_jax import checkpoints
from mdt_jax.basics.atomic import check_writable, whole_file
from mdt_jax.basics.names import printable
from mdt_jax.evaluate.flags import EVALUATE_FLAGS, SAMPLING_FLAGS
from mdt_jax.evaluation import descriptions, evaluator, extractors
from mdt_jax.evaluation.batches import image_size, open_images, share
from mdt_jax.evaluation.descriptions import ImageSetDescription
from mdt_jax.parallel import sharding
from mdt_jax.parallel.command import command_ending, one_line
from mdt_jax.parallel.compilation_cache import use_compilation_cache
from mdt_jax.parallel.distributed import by_first_process, initialize_distributed, leave
from mdt_jax.parallel.host_memory import use_main_heap
from mdt_jax.sample import command as sample_command
from mdt_jax.sample import flags as sample_flags
from mdt_jax.weights import hub_folder, pretrained
from mdt_jax.weights.descriptions import PIXEL_CHANNELS, latents_of_run

# Flags that decide where and how fast samples are made, but not which.
_RUNNING = ("workdir", "checkpoint", "mesh_fsdp", "mesh_tensor", "vae_batch_size", "step")


def evaluate_samples(f: flags.FlagValues) -> dict[str, Any]:
    """Samples if asked to, evaluates, prints the table and writes --output; returns the JSON.

    Every process must call it; process 0 prints and writes.

    Raises:
      ValueError, OSError, CheckpointError: flags or files that a user can mend.
    """
    sample_flags.check_sample_flags(f)
    workdir = _check_flags(f)
    _check_output(f.output)
    # All that is given is opened before hours of work on any of it.
    _check_files(f, workdir)
    extractor = extractors.load_inception(f.inception, f.feature_batch_size)
    # The reference comes before hours of sampling: here errors in its images show.
    how = {"batch_size": f.feature_batch_size, "split_size": f.split_size, "progress": True}
    reference = descriptions.describe_reference(
        f.reference, extractor, recompute=f.recompute_reference, **how
    )
    place = make_samples(f, workdir) if _is_sampled(f, workdir) else f.samples
    samples = descriptions.describe_images(open_images(place), extractor, **how)
    return by_first_process(lambda: _finish(f, reference, samples))


def _is_sampled(f: flags.FlagValues, workdir: str | None) -> bool:
    """Whether the samples are made first."""
    return bool(workdir or f.checkpoint)


def _check_files(f: flags.FlagValues, workdir: str | None) -> None:
    """Opens the reference, and the samples or the model to sample, as far as headers go.

    Raises:
      ValueError, OSError, CheckpointError: one is not there or damaged, or they do not fit.
    """
    size = descriptions.check_reference(f.reference, recompute=f.recompute_reference)
    if _is_sampled(f, workdir):
        mesh = sharding.create_mesh(devices=jax.local_devices())
        found = sample_command.check_model(_sampling_flags(f, workdir), mesh)
        name = workdir or f.checkpoint
    else:
        samples = open_images(f.samples)
        share(samples.count, jax.process_index(), jax.process_count())
        name, found = samples.name, image_size(samples)
    if size:
        evaluator.check_sizes(str(f.reference), size, str(name), found)


def make_samples(f: flags.FlagValues, workdir: str | None) -> Path:
    """The npz that `mdt_jax.sample` makes from the sampling flags, or made before.

    Raises:
      ValueError, CheckpointError: as `sample.command.generate` does.
    """
    given = _sampling_flags(f, workdir)
    mesh = sharding.create_mesh(fsdp=f.mesh_fsdp, tensor=f.mesh_tensor)
    sample_command.generate(given, mesh)
    return sample_flags.output_files(given.output)[0]


def _sampling_flags(f: flags.FlagValues, workdir: str | None) -> flags.FlagValues:
    """The flags of `mdt_jax.sample` that make the samples."""
    given = flags.FlagValues()
    sample_flags.define_flags(given)
    given.mark_as_parsed()
    for _, name, _, _ in SAMPLING_FLAGS:
        setattr(given, name, getattr(f, name))
    given.workdir = workdir
    given.num_samples = f.num_samples or evaluator.PUBLISHED_SAMPLES
    if f.vae is None and _samples_latents(f, workdir):
        given.vae = "ema"
    given.output = str(_sample_stem(f, workdir))
    return given


def _samples_latents(f: flags.FlagValues, workdir: str | None) -> bool:
    """Whether the model's samples need a decoder."""
    if not workdir or hub_folder.is_one_set(workdir):
        sizes = ("decode_layers", "num_heads", "num_classes", "input_size")
        hints = {name: f[name].value for name in sizes}
        found = pretrained.read_pretrained(workdir or f.checkpoint, **hints)
        return found.latents is not None or found.architecture.in_channels not in PIXEL_CHANNELS
    _, meta = checkpoints.read_meta(workdir, f.step)
    # What converted weights were trained on may not be known.
    known = latents_of_run(meta) is not None
    return known or meta["config"]["model"]["in_channels"] not in PIXEL_CHANNELS


def _sample_stem(f: flags.FlagValues, workdir: str | None) -> Path:
    """The path of the samples, without ending; named by step and flags, so that none collide."""
    named = [name for _, name, _, _ in SAMPLING_FLAGS if f[name].present and name not in _RUNNING]
    settings = "".join(f"_{name}-{_plain(f[name].value)}" for name in sorted(named))
    if workdir and not hub_folder.is_one_set(workdir):
        step, _ = checkpoints.read_meta(workdir, f.step)
        return Path(workdir) / "evaluation" / f"step{step:07d}{settings}"
    beside = Path(f.output).parent if f.output else Path()
    place = Path(workdir or f.checkpoint)
    name = place.name if hub_folder.is_hub_folder(workdir or f.checkpoint) else place.stem
    return beside / f"{_plain(name)}{settings}"


def _plain(value: Any) -> str:
    """A flag's value as part of a file's name."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9_.,+-]+", "-", text)


def _check_flags(f: flags.FlagValues) -> str | None:
    """The workdir to sample, if any. Raises ValueError for flags that do not go together."""
    for name in ("reference", "inception"):
        if not getattr(f, name):
            raise ValueError(f"--{name} is missing")
    is_run = bool(f.samples) and (Path(f.samples) / "checkpoints").is_dir()
    if sum(map(bool, (f.samples, f.workdir, f.checkpoint))) != 1:
        raise ValueError("give one of --samples, --workdir, a run, and --checkpoint")
    if f.samples and not is_run:
        for _, name, _, _ in SAMPLING_FLAGS:
            if f[name].present:
                raise ValueError(
                    f"--{name} is a setting of sampling, and --samples {f.samples} is no run's "
                    "workdir: its samples are there already"
                )
    return f.samples if is_run else f.workdir


def _check_output(output: str | None) -> None:
    if output:
        if Path(output).is_dir():
            raise ValueError(f"--output {output} is a folder; name a .json file")
        check_writable(output)


def _finish(
    f: flags.FlagValues, reference: ImageSetDescription, samples: ImageSetDescription
) -> dict[str, Any]:
    report = evaluator.evaluate(reference, samples, k=f.neighbours, progress=True)
    settings = {name: getattr(f, name) for _, name, _, _ in (*EVALUATE_FLAGS, *SAMPLING_FLAGS)}
    found = report.as_json()
    found["about"] = found["about"] | {"split_size": f.split_size, "flags": settings}
    found["about"] |= {"versions": _versions(), "date": datetime.date.today().isoformat()}
    names = printable(f"{samples.name} against {reference.name}")
    print(f"{samples.count:,} samples of {names}\n")
    print("\n".join(map(printable, report.table().split("\n"))))
    if f.output:
        text = json.dumps(found, indent=2, allow_nan=False)
        with whole_file(f.output) as file:
            file.write(text.encode() + b"\n")
        print(f"\n{printable(f.output)}")
    return found


def _versions() -> dict[str, str]:
    return {
        "mdt_jax": importlib.metadata.version("mdt-jax"),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "device": jax.devices()[0].device_kind,
    }


def main(_: list[str]) -> None:
    """The command."""
    f = flags.FLAGS
    keys = sample_command.FLAGS_OF_KEYS
    with command_ending(f, message=functools.partial(one_line, flags_of_keys=keys)):
        initialize_distributed()
        use_main_heap()
        use_compilation_cache()
        evaluate_samples(f)
    if jax.process_count() > 1:
        leave()
