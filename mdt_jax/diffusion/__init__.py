"""The diffusion process: schedules, losses, samplers, guidance. It imports no model."""

from typing import TYPE_CHECKING

from mdt_jax.basics.lazy_names import lazy_names

if TYPE_CHECKING:
    from mdt_jax.diffusion.gaussian import GaussianDiffusion, ModelFn, Prediction
    from mdt_jax.diffusion.guidance import guided
    from mdt_jax.diffusion.likelihood import bits_per_dimension
    from mdt_jax.diffusion.samplers import (
        SAMPLERS,
        ddim_encode,
        initial_state,
        run_steps,
        sample_steps,
    )
    from mdt_jax.diffusion.schedules import NoiseSchedule

_HOMES = {
    "GaussianDiffusion": "mdt_jax.diffusion.gaussian",
    "ModelFn": "mdt_jax.diffusion.gaussian",
    "NoiseSchedule": "mdt_jax.diffusion.schedules",
    "Prediction": "mdt_jax.diffusion.gaussian",
    "SAMPLERS": "mdt_jax.diffusion.samplers",
    "bits_per_dimension": "mdt_jax.diffusion.likelihood",
    "ddim_encode": "mdt_jax.diffusion.samplers",
    "guided": "mdt_jax.diffusion.guidance",
    "initial_state": "mdt_jax.diffusion.samplers",
    "run_steps": "mdt_jax.diffusion.samplers",
    "sample_steps": "mdt_jax.diffusion.samplers",
}

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

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
