"""The command that samples from a run, as the commands that made the run suggest it."""

from __future__ import annotations

import shlex
from pathlib import Path

from mdt_jax.models.latent_space import LatentSpace
from mdt_jax.weights.descriptions import PIXEL_CHANNELS


def sampling_command(
    workdir: str | Path,
    output: str | Path,
    channels: int,
    latents: LatentSpace | None,
    vae: str = "",
) -> str:
    """The command that samples from a workdir, latents with a decoder of theirs.

    Args:
      workdir: the run.
      output: where the samples go.
      channels: the model's; those of `PIXEL_CHANNELS` are pictures without a decoder.
      latents: the latents it was trained on; None for pixels, or where it is not known.
      vae: the decoder that the run's own settings name, if they do.
    """
    words = ["python", "-m", "mdt_jax.sample", "--workdir", str(workdir), "--output", str(output)]
    if latents is not None or channels not in PIXEL_CHANNELS:
        words += ["--vae", vae or (latents.autoencoder if latents else "") or "ema"]
    return shlex.join(words)
