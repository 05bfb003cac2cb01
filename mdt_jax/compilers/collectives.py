"""The transfers between a program's devices: which, how many bytes, between which devices."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from mdt_jax.compilers.hlo import Computation, Instruction, Module

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast", "send")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """All of a program's transfers of one kind.

    Attributes:
      opcode: the operation, such as "all-gather".
      group: the number of chips that exchange data with each other, 0 where the text does not say.
      count: how often such a transfer runs.
      bytes: one chip's data in all of them: the whole array of a gather, the operands of others.
      wire_bytes: the fewest bytes that a chip sends for them, in a ring.
      across_slices: whether they leave a slice.
    """

    opcode: str
    group: int
    count: int
    bytes: int
    wire_bytes: int
    across_slices: bool = False


def is_collective(one: Instruction) -> bool:
    """Whether an instruction is a transfer, or the start of one."""
    return one.opcode.removesuffix("-start") in COLLECTIVES


def transfers(
    module: Module, computation: Computation, one: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """The collectives of an instruction: itself, or those of a fusion.

    A reduce-scatter is written as an all-reduce and a slice in a fusion `all-reduce-scatter`.
    """
    if is_collective(one):
        yield computation, one
    for where, inner in module.inside(one):
        if inner.opcode == "all-reduce" and where.name.startswith("all-reduce-scatter"):
            yield where, dataclasses.replace(inner, opcode="reduce-scatter")
        elif is_collective(inner):
            yield where, inner


def collective_bytes(computation: Computation, one: Instruction) -> int:
    """The bytes of an all-gather's whole array, of the operands for other collectives."""
    operands = [computation.by_name[name] for name in one.operands if name in computation.by_name]
    if not one.opcode.startswith("all-gather"):
        return sum(operand.bytes for operand in operands)
    if not one.opcode.endswith("-start"):
        return one.bytes
    # The result is a tuple (operands, whole array, …); the whole array is the rest.
    return max(one.bytes - sum(operand.bytes for operand in operands), 0)


def wire_bytes(opcode: str, size: int, group: int) -> int:
    """Bytes that a chip sends in a ring of `group` chips."""
    if opcode in ("collective-permute", "send") or group == 0:  # from one to another, or unknown
        return size
    rounds = 2 if opcode == "all-reduce" else 1
    return round(size * rounds * (group - 1) / group)


def replica_group(attributes: str, chips_per_slice: int | None = None) -> tuple[int, bool]:
    """The chips in a group of a collective, 0 if unknown, and whether a group spans slices."""

    def spans(ids: list[int]) -> bool:
        return chips_per_slice is not None and len({i // chips_per_slice for i in ids}) > 1

    groups = replica_groups(attributes)
    across = any(map(spans, groups))
    if "source_target_pairs=" in attributes:
        return len({i for pair in groups for i in pair}), across
    return max(map(len, groups), default=0), across


def replica_groups(attributes: str) -> list[list[int]]:
    """The groups of chips that exchange data with each other; none where the text does not say."""
    listed = re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return [[int(i) for i in group.split(",")] for group in groups]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        return _iota_groups(int(iota[1]), int(iota[2]), iota[3], iota[4])
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", attributes
    )
    return _mesh_groups(*named.groups()) if named else []


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> list[list[int]]:
    """The groups along axes of a mesh.

    Args:
      mesh: the axes and their sizes, such as 'x'=4,'y'=2.
      device_ids: the order of the devices, listed (0,2,1,3) or as an iota that is reshaped and
        transposed; None for their own order.
      axes: the axes of a group, such as 'x', or a part of one, such as 'x':(1)2.
    """
    sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", mesh)}
    count = math.prod(sizes.values())
    iota = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids or "")
    if iota:
        (chips,) = _iota_groups(1, count, iota[1], iota[2])
    else:
        chips = [int(i) for i in device_ids.split(",")] if device_ids else list(range(count))
    # A part of an axis: the product of the sizes before it, and its own size.
    parts = {
        k: (int(before or 1), int(size or sizes[k]))
        for k, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    shape: list[int] = []
    along: list[int] = []
    for k, size in sizes.items():
        before, part = parts.get(k, (size, 1))
        along += [len(shape) + 1] if k in parts else []
        shape += [before, part, size // (before * part)]
    others = [i for i in range(len(shape)) if i not in along]
    group = math.prod(shape[i] for i in along)
    return np.reshape(chips, shape).transpose(*others, *along).reshape(-1, group).tolist()


def _iota_groups(count: int, size: int, shape: str, order: str | None) -> list[list[int]]:
    """Groups written as an iota that is reshaped and transposed."""
    ids = np.arange(count * size).reshape([int(n) for n in shape.split(",")])
    if order:
        ids = ids.transpose([int(n) for n in order.split(",")])
    return ids.reshape(count, size).tolist()
