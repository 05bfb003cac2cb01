"""The command `python -m mdt_jax.train`; its text is in `__main__.py`.

In Python `train` starts or resumes a run, and `dry_run` describes one.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdt_jax.train.command import dry_run
    from mdt_jax.train.loop import train

# The module that each name is imported from when it is first asked for: `--help` needs neither.
_HOMES = {"dry_run": "mdt_jax.train.command", "train": "mdt_jax.train.loop"}

__all__ = ["dry_run", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
