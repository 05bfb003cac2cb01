"""Masked Diffusion Transformers (MDT, MDTv2) and DiT in JAX/Flax.

`load` a run's model and `sample` from it; `create_model` builds one by name. The commands are
`python -m mdt_jax.train` and `python -m mdt_jax.sample`.
"""

from mdt_jax.models import create_model, model_names
from mdt_jax.sampling import DiffusionModel, load, sample

__all__ = ["DiffusionModel", "create_model", "load", "model_names", "sample"]
