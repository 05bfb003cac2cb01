"""The device mesh, and the one table that maps logical axis names to its axes.

Mesh axes: `data` splits the batch, `fsdp` splits the batch and every large parameter, `tensor`
splits heads and hidden units. `jax.jit` with these shardings does the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mdt_jax.models import layers

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
RULES = (
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("modulation", "tensor"),
    ("layers", None),
)


def create_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh (data, fsdp, tensor) over the devices, -1 on one axis standing for the rest.

    Raises:
      ValueError: sizes that do not multiply to the number of devices, saying what would.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    free = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"mesh.{axis} {size} is neither positive nor -1")
    if len(free) > 1:
        raise ValueError(
            f"mesh.{free[0]} and mesh.{free[1]} are both -1; one axis can take the rest"
        )
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(devices) % fixed or (not free and fixed != len(devices)):
        shape = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
        fitting = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ValueError(
            f"mesh {shape} does not fit {len(devices)} devices; the product of its axes must be "
            f"{len(devices)}, so each is one of {', '.join(map(str, fitting))}, or -1 for the rest"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes.values())
    return Mesh(mesh_utils.create_device_mesh(shape, devices), MESH_AXES)


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which block of a global batch's rows this process holds, and how many blocks there are.

    Processes of one tensor-parallel group hold, and so read, the same block.

    Raises:
      ValueError: a mesh whose processes do not hold contiguous blocks of one size.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    ranges = {rows.indices(batch_size)[:2] for (rows,) in held}
    first, size = min(start for start, _ in ranges), sum(stop - start for start, stop in ranges)
    contiguous = max(stop for _, stop in ranges) - first == size
    if not contiguous or first % size or batch_size % size:
        raise ValueError(
            f"process {jax.process_index()} holds the rows {sorted(ranges)} of a batch of "
            f"{batch_size}, not one block: make mesh.tensor divide a process's devices or be a "
            "multiple of them"
        )
    return first // size, batch_size // size


def replicated(mesh: Mesh) -> NamedSharding:
    """Arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, boxed: Any) -> Any:
    """Shardings of an abstract tree whose leaves carry logical axis names; others are replicated.

    Raises:
      ValueError: a mesh axis that does not divide a parameter's, naming both.
    """
    specs = nn.get_partition_spec(boxed)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)

    def check(path: tuple, leaf: Any, sharding: NamedSharding) -> None:
        for size, axes in zip(leaf.shape, sharding.spec, strict=False):
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                if size % mesh.shape[axis]:
                    raise ValueError(
                        f"mesh.{axis} {mesh.shape[axis]} does not divide an axis of {size} of "
                        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.shape}"
                    )

    jax.tree_util.tree_map_with_path(check, nn.unbox(boxed), shardings)
    return shardings


def abstract_tree(mesh: Mesh, boxed: Any) -> Any:
    """The tree's ShapeDtypeStructs with their shardings, logical axis names taken off."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        nn.unbox(boxed),
        tree_shardings(mesh, boxed),
    )


def abstract_parameters(mesh: Mesh, model: Any) -> Any:
    """Shapes, dtypes and shardings of a model's parameters; allocates nothing."""
    x = jax.ShapeDtypeStruct((1, *model.image_shape), np.float32)
    i = jax.ShapeDtypeStruct((1,), np.int32)
    return abstract_tree(mesh, jax.eval_shape(model.init, jax.random.key(0), x, i, i)["params"])


def check_heads(mesh: Mesh, num_heads: int) -> None:
    """Refuses, with ValueError, a tensor axis that would cut through an attention head."""
    tensor = mesh.shape["tensor"]
    if num_heads % tensor:
        fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(
            f"mesh.tensor {tensor} does not divide the model's {num_heads} heads; "
            f"{', '.join(map(str, fitting))} would"
        )


def constrain_batch(mesh: Mesh, x: jax.Array, axis: int = 0) -> jax.Array:
    """Shards an array inside a jitted function by its batch axis, the others whole."""
    spec = PartitionSpec(*(None,) * axis, BATCH_AXES)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


@contextlib.contextmanager
def activations(mesh: Mesh) -> Iterator[None]:
    """Puts the models' activation constraints into force; for the body of a jitted function."""
    token = layers.activation_constraint.set(partial(constrain_batch, mesh))
    try:
        yield
    finally:
        layers.activation_constraint.reset(token)


def bytes_per_device(abstract: Any) -> int:
    """Bytes that one device holds of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )
