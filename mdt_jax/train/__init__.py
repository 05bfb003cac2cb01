"""The command `python -m mdt_jax.train`; its text is in `__main__.py`.

In Python `train` starts or resumes a run, and `dry_run` describes one.
"""

from typing import TYPE_CHECKING

from mdt_jax.basics.lazy_names import lazy_names

if TYPE_CHECKING:
    from mdt_jax.train.command import dry_run
    from mdt_jax.train.loop import train

_HOMES = {"dry_run": "mdt_jax.train.command", "train": "mdt_jax.train.loop"}

__all__ = ["dry_run", "train"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
