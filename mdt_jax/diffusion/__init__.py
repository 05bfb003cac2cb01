"""The diffusion process: schedules, losses, samplers, guidance. It imports no model."""

from mdt_jax.diffusion.gaussian import GaussianDiffusion, ModelFn, Prediction
from mdt_jax.diffusion.guidance import guided
from mdt_jax.diffusion.likelihood import bits_per_dimension
from mdt_jax.diffusion.samplers import SAMPLERS, ddim_encode, initial_state, run_steps, sample_steps
from mdt_jax.diffusion.schedules import NoiseSchedule

__all__ = [
    "SAMPLERS",
    "GaussianDiffusion",
    "ModelFn",
    "NoiseSchedule",
    "Prediction",
    "bits_per_dimension",
    "ddim_encode",
    "guided",
    "run_steps",
    "sample_steps",
    "initial_state",
]
