"""Samples from a run: `python -m mdt_jax.sample --workdir runs/digits --num_samples 64 --output s`.

Writes a PNG grid and an .npz in ADM's layout (`arr_0` uint8 NHWC images, `arr_1` labels), both
saying what made them. `import mdt_jax; mdt_jax.sample(...)` does the same in Python.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from mdt_jax import images, sampling, sharding
from mdt_jax.checkpoints import CheckpointError
from mdt_jax.distributed import initialize_distributed


def write(
    model: sampling.DiffusionModel,
    samples: np.ndarray,
    labels: np.ndarray,
    output: str | Path,
    **settings: Any,
) -> list[Path]:
    """Writes OUTPUT.npz, and OUTPUT.png where samples are images; returns the files written.

    Latents (neither 1 nor 3 channels) are written as they are, float32 `arr_0`: they need their
    autoencoder's decoder before they are pictures.
    """
    metadata = images.provenance(
        model=model.name, step=model.step, labels=labels.tolist(), **settings
    )
    pixels = samples.shape[-1] in (1, 3)
    stem = str(output).removesuffix(".png").removesuffix(".npz")
    written = [Path(f"{stem}.npz")]
    images.save_npz(written[0], images.to_uint8(samples) if pixels else samples, labels, metadata)
    if pixels:
        written.append(Path(f"{stem}.png"))
        images.save_png(written[1], images.image_grid(images.to_uint8(samples)), metadata)
    return written


def main(_: list[str]) -> None:
    """The command: one clear line and exit status 1 for what a user can mend."""
    f = flags.FLAGS
    try:
        initialize_distributed()
        mesh = sharding.create_mesh(fsdp=f.mesh_fsdp, tensor=f.mesh_tensor)
        model, params = sampling.load(f.workdir, ema_rate=f.ema_rate, step=f.step, mesh=mesh)
        labels = sampling.resolve_labels(model, f.labels or None, f.num_samples)
        given = {"cfg_power": f.cfg_power, "guided_channels": f.guided_channels}
        options = sampling.resolve_options(
            model,
            cfg_scale=f.cfg_scale,
            sampler=f.sampler,
            steps=f.steps,
            eta=f.eta,
            clip=f.clip,
            **{k: v for k, v in given.items() if v is not None},
        )
        # Before the work: an output that cannot be written would lose it.
        Path(f.output).parent.mkdir(parents=True, exist_ok=True)
        samples = sampling.sample(
            model,
            params,
            labels=labels if model.network.num_classes else None,
            num_samples=len(labels),
            key=f.seed,
            batch_size=f.batch_size,
            mesh=mesh,
            progress=True,
            **vars(options),
        )
        if jax.process_index() == 0:
            settings = vars(options) | {"seed": f.seed, "ema_rate": f.ema_rate}
            for path in write(model, samples, labels, f.output, **settings):
                print(path)
    except (ValueError, OSError, CheckpointError) as error:
        if logging.level_debug():
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")


class _CallableModule(types.ModuleType):
    """Keeps `mdt_jax.sample(...)` the function when this module of the same name is imported."""

    def __call__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return sampling.sample(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The run to sample from.", required=True)
    flags.DEFINE_string("output", "samples", "Where to: OUTPUT.npz and OUTPUT.png.")
    flags.DEFINE_integer("num_samples", None, "How many; labels are repeated to that many.")
    flags.DEFINE_list("labels", [], "Classes by number or name; all in turn by default.")
    flags.DEFINE_integer("seed", 0, "Of the noise; sample i depends on it and i alone.")
    flags.DEFINE_float("cfg_scale", None, "Guidance scale, 1 for none; the run's by default.")
    flags.DEFINE_float("cfg_power", None, "Exponent of the power-cosine scale; 0: constant.")
    flags.DEFINE_integer("guided_channels", None, "Channels that are guided; the run's.")
    flags.DEFINE_string("steps", None, "Steps, or a respacing (ddim50, 10,15,20); the run's.")
    flags.DEFINE_enum("sampler", None, ["ddpm", "ddim"], "The run's by default.")
    flags.DEFINE_bool("clip", None, "Whether x0 is clipped to [-1, 1]; the run's by default.")
    flags.DEFINE_float("eta", 0.0, "DDIM's: 0 deterministic, 1 ancestral.")
    flags.DEFINE_float("ema_rate", None, "Which average; the run's first by default.")
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
    flags.DEFINE_integer("mesh_fsdp", 1, "Devices that share one copy of the parameters.")
    flags.DEFINE_integer("mesh_tensor", 1, "Devices that share each head and hidden layer.")
    flags.DEFINE_integer("batch_size", 256, "Samples at a time, over all devices.")
    app.run(main)
