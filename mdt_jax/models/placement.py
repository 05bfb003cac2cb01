"""How arrays lie on devices while a model computes: hooks, so that models need not know of meshes.

`mdt_jax.parallel.sharding.activations` puts a mesh's placement in force for the body of a
jitted function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from jax import Array

Axes = tuple[str | None, ...]  # logical names of an array's axes


def _same(x: Array, axes: Axes) -> Array:
    return x


@dataclasses.dataclass(frozen=True)
class Placement:
    """Identities by default: one device, or a compiler left to itself.

    Attributes:
      batch: lays an array (batch, ...) out by its batch alone.
      gather: a parameter, by its logical axes, as its layer computes with it: whole but for the
        axes that several devices compute with together.
      shard: the same array, or its gradient, as the state holds it.
      add_up: where batch_shards is above 1: a parameter's gradients of each part of the batch,
        (batch_shards, *shape), by the parameter's logical axes, to their sum as the state holds it.
      platform: the devices' platform: "tpu", "gpu", "cpu"; None where no mesh is in force.
      cudnn_attention: whether the devices are GPUs for which cuDNN has fused attention.
      batch_shards: into how many parts a batch is divided.
      merges: whether axes of one parameter can be merged: no device computes with a part of one.
      partition: (function, axes of its arguments, axes of its results) → the function run on each
        device's part of the arrays: for kernels that the compiler cannot divide itself. "batch" is
        an axis here.
    """

    batch: Callable[[Array], Array] = lambda x: x
    gather: Callable[[Array, Axes], Array] = _same
    shard: Callable[[Array, Axes], Array] = _same
    add_up: Callable[[Array, Axes], Array] = _same
    platform: str | None = None
    cudnn_attention: bool = False
    batch_shards: int = 1
    merges: bool = True
    partition: Callable[[Callable, tuple[Axes, ...], tuple[Axes, ...]], Callable] = (
        lambda function, inputs, outputs: function
    )


current: ContextVar[Placement] = ContextVar("placement", default=Placement())  # noqa: B039


def constrain_batch(x: Any) -> Any:
    """Shards activations (batch, ...) by batch alone, where a mesh is in force."""
    return current.get().batch(x)
