"""Masked Diffusion Transformers (MDT, MDTv2) and DiT in JAX/Flax.

`load` a run's model, or PyTorch weights, and `sample` from it or `inpaint` with it; `Autoencoder`
turns latents into images; `create_model` builds a model by name. The commands are
`python -m mdt_jax.train` and `python -m mdt_jax.sample`.
"""

from mdt_jax.models import create_model, model_names
from mdt_jax.sampling.inpainting import inpaint
from mdt_jax.sampling.model import DiffusionModel, load
from mdt_jax.sampling.sampler import sample
from mdt_jax.weights.autoencoder import Autoencoder

__all__ = [
    "Autoencoder",
    "DiffusionModel",
    "create_model",
    "inpaint",
    "load",
    "model_names",
    "sample",
]
