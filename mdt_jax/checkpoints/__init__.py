"""Orbax checkpoints of a run: asynchronous, atomic, checksummed, sealed.

    WORKDIR/checkpoints/<step>/<item>/         one Orbax item per name, written by all processes
                               meta/           JSON: all that is not an array
                               manifest.json   the seal: every file, its size and BLAKE2b digest

Orbax lets a step appear by one rename, but restores flipped bits without noticing. So once it has
committed a step, the processes share the step's files and checksum them, and process 0 writes the
seal. A step without one is an interrupted save and counts for nothing. (`ocp.CheckpointManager` is
not used, because it deletes an old step when a new one is committed, before that one is sealed: a
run killed in between could have nothing left. It can read these checkpoints.)

Nothing here compiles while a run is saving: arrays are copied from device to host, and processes
meet at JAX's coordination service, not in a collective.
"""

from typing import TYPE_CHECKING

from mdt_jax.basics.lazy_names import lazy_names

if TYPE_CHECKING:
    from mdt_jax.checkpoints.items import lazy_item, read_meta, restore_item
    from mdt_jax.checkpoints.seal import CheckpointError, SaveError
    from mdt_jax.checkpoints.store import Checkpoints

_HOMES = {
    "CheckpointError": "mdt_jax.checkpoints.seal",
    "Checkpoints": "mdt_jax.checkpoints.store",
    "SaveError": "mdt_jax.checkpoints.seal",
    "lazy_item": "mdt_jax.checkpoints.items",
    "read_meta": "mdt_jax.checkpoints.items",
    "restore_item": "mdt_jax.checkpoints.items",
}

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "SaveError",
    "lazy_item",
    "read_meta",
    "restore_item",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
