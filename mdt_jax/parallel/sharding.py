"""The device mesh, and the table that maps parameters' logical axis names to its axes.

Mesh axes: `data` splits the batch, `fsdp` splits the batch and every large parameter, `tensor`
splits heads and hidden units. `jax.jit` divides the computation by these shardings.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mdt_jax.models import placement
from mdt_jax.models.placement import Axes, Placement

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
    """The mesh (data, fsdp, tensor) over the devices.

    Args:
      data: devices along this axis; -1 on one axis stands for all devices that are left.
      fsdp: devices along this axis.
      tensor: devices along this axis.
      devices: all devices of the job by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or an axis other than `data`
        would cross TPU slices; the message says which sizes would do.
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
        shape = " × ".join(f"mesh.{axis} {size}" for axis, size in sizes.items())
        fitting = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ValueError(
            f"{shape} does not fit {len(devices)} devices; the product of its axes must be "
            f"{len(devices)}, so each is one of {', '.join(map(str, fitting))}, or -1 for the rest"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    return Mesh(arrange_devices(tuple(sizes.values()), devices), MESH_AXES)


def arrange_devices(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of a mesh's shape, its neighbours near each other in the network.

    A slow network joins TPU slices, so only the first axis crosses them. GPUs are ordered by node,
    and any axis may cross nodes.

    Raises:
      ValueError: the slices differ in size, or their number does not divide the first axis.
    """
    # An axis of a torus is cut between two axes of the mesh only if nothing else fits.
    arrange = partial(mesh_utils.create_device_mesh, allow_split_physical_axes=True)
    is_tpu = devices[0].platform == "tpu"
    slices = Counter(getattr(device, "slice_index", 0) for device in devices if is_tpu)
    if len(slices) < 2:
        return arrange(shape, devices)
    per_slice = max(slices.values())
    if min(slices.values()) != per_slice:
        raise ValueError(f"the TPU slices have {sorted(slices.values())} devices, not all the same")
    data, *inner = shape
    if data % len(slices):
        fitting = [n for n in range(1, per_slice + 1) if per_slice % n == 0]
        raise ValueError(
            f"mesh.data {data} is not a multiple of the {len(slices)} TPU slices, which only it "
            f"can cross; mesh.fsdp × mesh.tensor is {np.prod(inner)}, and within a slice of "
            f"{per_slice} devices it can be {', '.join(map(str, fitting))}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // len(slices), *inner),
        (len(slices), 1, 1),
        devices,
        allow_split_physical_axes=True,
    )


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is cut into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """The parts of a global batch that this process holds, in order, and the number of all parts.

    A process's chips are a square of a TPU's torus, so their parts are not always consecutive.
    Processes of one tensor-parallel group hold, and so read, the same parts.

    Raises:
      ValueError: two processes share some of their parts, but not all.
    """
    shards, sharding_ = batch_shards(mesh), batch_sharding(mesh)
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding_.devices_indices_map((shards,)).items():
        held.setdefault(device.process_index, set()).add(rows.indices(shards)[0])
    mine = held[jax.process_index()]
    for process, theirs in held.items():
        if len(theirs) != len(mine) or (theirs & mine and theirs != mine):
            raise ValueError(
                f"process {jax.process_index()} holds the parts {sorted(mine)} of a batch, process "
                f"{process} {sorted(theirs)}: make mesh.tensor divide a process's devices or be a "
                "multiple of them"
            )
    parts = sorted(mine)
    # The fewest parts possible, so that each read is as large as possible.
    for size in range(len(parts), 1, -1):
        firsts = parts[::size]
        whole = [first + i for first in firsts for i in range(size)]
        if whole == parts and not any(n % size for n in (shards, *firsts)):
            return tuple(first // size for first in firsts), shards // size
    return tuple(parts), shards


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, boxed: Any) -> Any:
    """The shardings of an abstract tree's leaves by their logical axis names.

    Leaves without names are replicated.

    Raises:
      ValueError: a mesh axis does not divide a parameter's axis; the message names both.
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
    """The tree's ShapeDtypeStructs with their shardings, without logical axis names."""
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
    """Refuses, with ValueError, a mesh whose tensor axis would cut an attention head."""
    tensor = mesh.shape["tensor"]
    if num_heads % tensor:
        fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(
            f"mesh.tensor {tensor} does not divide the model's {num_heads} heads; "
            f"{', '.join(map(str, fitting))} would, or another model.num_heads"
        )


def shard_batch(mesh: Mesh, x: jax.Array, axis: int = 0) -> jax.Array:
    """Shards an array in a jitted function over its batch axis alone."""
    spec = PartitionSpec(*(None,) * axis, BATCH_AXES)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


@contextlib.contextmanager
def activations(mesh: Mesh) -> Iterator[None]:
    """A context for the body of a jitted function, in which models place their arrays on the mesh.

    Batches are divided over `data` and `fsdp`. Parameters are gathered over `fsdp`, but not over
    `tensor`: each of its devices computes with its own part.
    """
    rules = dict(RULES) | {"batch": BATCH_AXES, None: None}
    whole = rules | {axis: None for axis, to in RULES if to == "fsdp"}

    def spec(axes: Axes, rules: dict = rules) -> PartitionSpec:
        return PartitionSpec(*(rules[axis] for axis in axes))

    def partition(function: Callable, inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]):
        specs = {"in_specs": tuple(map(spec, inputs)), "out_specs": tuple(map(spec, outputs))}
        return jax.shard_map(function, mesh=mesh, check_vma=False, **specs)

    def lay_out(x: jax.Array, axes: Axes, rules: dict) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, rules)))

    def add_up(x: jax.Array, axes: Axes) -> jax.Array:
        cut = next((i for i, axis in enumerate(axes) if rules[axis] == "fsdp"), None)
        summed = {axis for axis in BATCH_AXES if mesh.shape[axis] > 1}

        def add(part: jax.Array) -> jax.Array:
            # Summed first over `fsdp`, which divides the parameter, so that only its parts travel
            # over `data`, which may cross slices or nodes. This is done by hand, since the TPU's
            # partitioner would sum whole gradients and then cut them: twice the bytes. Its compiler
            # still does so where fsdp is all of the mesh, and on v6e.
            part, remaining = part.squeeze(0), summed
            if cut is not None and "fsdp" in summed:
                part = jax.lax.psum_scatter(part, "fsdp", scatter_dimension=cut, tiled=True)
                remaining = summed - {"fsdp"}
            return jax.lax.psum(part, tuple(sorted(remaining))) if remaining else part

        parts = PartitionSpec(BATCH_AXES, *spec(axes, whole))
        added = jax.shard_map(add, mesh=mesh, in_specs=parts, out_specs=spec(axes), check_vma=False)
        return added(x)

    device = mesh.devices.flat[0]
    token = placement.current.set(
        Placement(
            batch=partial(shard_batch, mesh),
            gather=partial(lay_out, rules=whole),
            shard=partial(lay_out, rules=rules),
            add_up=add_up,
            platform="gpu" if is_gpu(device) else device.platform,
            cudnn_attention=has_cudnn_attention(device),
            batch_shards=batch_shards(mesh),
            merges=mesh.shape["tensor"] == 1,
            partition=partition,
        )
    )
    try:
        yield
    finally:
        placement.current.reset(token)


def is_gpu(device: Any) -> bool:
    """Whether a device is a GPU, be it one that only a compiler knows of."""
    return device.platform in ("gpu", "cuda")


def has_cudnn_attention(device: Any) -> bool:
    """Whether cuDNN's fused attention runs on a device: on GPUs since Ampere."""
    if not is_gpu(device):
        return False
    capability = str(getattr(device, "compute_capability", "8.0"))
    major = capability.partition(".")[0]
    return major.isdigit() and int(major) >= 8  # AMD's are words, such as gfx942


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Options of the compiler for a mesh's devices; None for its defaults.

    By default the TPU's compiler turns a product whose result is divided into a ring of small
    products, one for each device's part, that read their operands from copies. The whole product is
    faster, and the results of other kernels travel during it anyway. And it lets a product use 16
    MiB of a core's vector memory, where 24 allow larger tiles (docs/performance.md).
    """
    if mesh.devices.flat[0].platform != "tpu":
        return None
    return {
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        # A v4 core has 16 MiB; its compiler accepts the option and makes the same program.
        "xla_tpu_scoped_vmem_limit_kib": "24576",
    }


def bytes_per_device(abstract: Any) -> int:
    """The bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )
