"""Names of a package that are imported when they are first asked for (PEP 562).

A command's flags, and so its `--help`, come from packages whose other modules import JAX, Grain or
Orbax, which takes seconds. With this they wait until one of their names is used.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Args:
      package: the package's `__name__`.
      homes: the module of each name that it hands on. Type checkers do not see them: the package
        imports the same names under TYPE_CHECKING.
    """
    names = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        names[name] = getattr(importlib.import_module(homes[name]), name)
        return names[name]

    return get, lambda: sorted({*names, *homes})
