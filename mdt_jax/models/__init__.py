"""The networks. `registry.create_model("MDTv2-XL/2")` builds one by name, or any size by keyword.

A new model is one file here and one line in `registry.FAMILIES`. Classes are imported when they are
first asked for (PEP 562), so that `mdt_jax.models.positions` and the registry's tables, which
converters need, cost no Flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mdt_jax.models.registry import FAMILIES, create_model, family_class, model_names

if TYPE_CHECKING:
    from mdt_jax.models.base import LatentTransformer, Pass
    from mdt_jax.models.dit import DiT
    from mdt_jax.models.mdt import MDT
    from mdt_jax.models.mdt_v2 import MDTv2

__all__ = ["DiT", "MDT", "MDTv2", "LatentTransformer", "Pass", "create_model", "model_names"]


def __getattr__(name: str) -> Any:
    if name in FAMILIES:
        return family_class(name)
    if name in ("LatentTransformer", "Pass"):
        return getattr(importlib.import_module("mdt_jax.models.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *FAMILIES, *__all__})
