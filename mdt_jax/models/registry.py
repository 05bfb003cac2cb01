"""The published models: `create_model("MDTv2-XL/2")`, or a family and sizes by keyword.

A new model is one file in this package and one line in `FAMILIES`. The tables name modules, not
classes, so that reading them imports no Flax: `convert/` and `import mdt_jax` need only the names.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from mdt_jax.basics import ranges

if TYPE_CHECKING:
    import mdt_jax.models.base

FAMILIES = {
    # class: (its module in this package, the patch sizes the authors trained)
    "MDT": ("mdt", (2, 4, 8)),
    "MDTv2": ("mdt_v2", (2,)),
    "DiT": ("dit", (2, 4, 8)),
}
SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}


def model_names() -> list[str]:
    """Every published name, such as "MDTv2-XL/2"."""
    return [f"{f}-{s}/{p}" for f, (_, patches) in FAMILIES.items() for s in SIZES for p in patches]


def family_class(family: str) -> type[mdt_jax.models.base.LatentTransformer]:
    """The Flax module of a family, a key of `FAMILIES`; imports it."""
    name, _ = FAMILIES[family]
    return getattr(importlib.import_module(f"mdt_jax.models.{name}"), family)


def create_model(name: str, **overrides: Any) -> mdt_jax.models.base.LatentTransformer:
    """The module of a published name ("MDT-B/4"), or of a family ("MDTv2") and sizes by keyword.

    Args:
      name: one of `model_names()`, or a key of `FAMILIES`.
      **overrides: fields of the module, overriding the name's.

    Raises:
      ValueError: an unknown name (the nearest are listed), an unknown field, or sizes out of their
        ranges or that do not fit each other.
    """
    if name in FAMILIES:
        module, sizes = family_class(name), {}
    elif name in model_names():
        family, variant = name.split("-")
        size, patch = variant.split("/")
        module, sizes = family_class(family), {**SIZES[size], "patch_size": int(patch)}
    else:
        known = [*model_names(), *FAMILIES]
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        raise ValueError(f"unknown model {name!r}; the nearest: {', '.join(nearest)}")
    fields = {f for f in module.__dataclass_fields__ if f not in ("parent", "name")}
    unknown = sorted(set(overrides) - fields)
    if unknown:
        raise ValueError(
            f"{name} has no setting {unknown[0]!r}; it has {', '.join(sorted(fields))}"
        )
    ranges.check_sizes(overrides)
    return module(**{**sizes, **overrides})
