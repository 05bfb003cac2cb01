"""Masked Diffusion Transformers (MDT, MDTv2) and DiT in JAX/Flax.

`load` a run's model, or PyTorch weights, and `sample` from it or `inpaint` with it; `Autoencoder`
turns latents into images; `create_model` builds a model by name. `mdt` lists the commands, and so
does `python -m mdt_jax`.

Each name is imported when it is first asked for (PEP 562), so that `import mdt_jax`, and with it
`import mdt_jax.convert.transformers`, imports neither JAX nor Flax.
"""

import importlib
from typing import TYPE_CHECKING

from mdt_jax.basics.lazy_names import lazy_names

if TYPE_CHECKING:
    from mdt_jax.models.registry import create_model, model_names
    from mdt_jax.sampling.inpainting import inpaint
    from mdt_jax.sampling.model import DiffusionModel, load
    from mdt_jax.sampling.sampler import sample
    from mdt_jax.weights.autoencoder import Autoencoder

# The module that each name is imported from, as for type checkers above.
_HOMES = {
    "Autoencoder": "mdt_jax.weights.autoencoder",
    "DiffusionModel": "mdt_jax.sampling.model",
    "create_model": "mdt_jax.models.registry",
    "inpaint": "mdt_jax.sampling.inpainting",
    "load": "mdt_jax.sampling.model",
    "model_names": "mdt_jax.models.registry",
    "sample": "mdt_jax.sampling.sampler",
}

__version__ = "0.1.0"  # the only place: setup.cfg reads it from here

__all__ = [
    "Autoencoder",
    "DiffusionModel",
    "create_model",
    "inpaint",
    "load",
    "model_names",
    "sample",
]

# `mdt_jax.sample` is this function, and also the package of the command `python -m mdt_jax.sample`.
# Python binds a package's name in its parent at its first import and at no later one. So the
# command's package, which is empty, is imported here, before the name stands for the function.
importlib.import_module("mdt_jax.sample")
globals().pop("sample", None)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
