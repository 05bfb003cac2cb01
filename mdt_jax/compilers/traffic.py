"""Bytes that a GPU's kernel reads and writes in its memory, from the text of a compiled program.

Each array is read once and written once. Of an array that is only sliced or gathered from, the
parts count; of an update in place, the update. A fusion's inner results stay on the chip.
"""

from __future__ import annotations

import math
from collections import defaultdict

from mdt_jax.compilers.hlo import Computation, Instruction, Module

_PARTS = ("slice", "dynamic-slice", "gather")


def traffic(module: Module, computation: Computation, one: Instruction) -> int:
    """The bytes that a scheduled instruction reads and writes."""
    inner = module.computations.get(one.called("calls") or "")
    if one.opcode == "fusion" and inner is not None:
        return _fusion_traffic(inner)
    operands = [
        computation.by_name[n] for n in dict.fromkeys(one.operands) if n in computation.by_name
    ]
    if one.opcode in _PARTS:
        return 2 * one.bytes + sum(operand.bytes for operand in operands[1:])
    if one.opcode == "dynamic-update-slice":
        return 2 * operands[1].bytes
    return one.bytes + sum(operand.bytes for operand in operands)


def _fusion_traffic(inner: Computation) -> int:
    """The bytes of a fusion: what its results need of its parameters, and its results."""
    wanted: dict[str, int] = defaultdict(int)  # elements of each value that are needed
    written = 0
    root = inner.root
    for name in root.operands if root.opcode == "tuple" else (root.name,):
        written += _written(inner, inner.by_name[name], wanted)
    for one in reversed(inner.instructions):
        size = _elements(one)
        needed = min(wanted[one.name], size)
        if not needed or one.opcode in ("parameter", "tuple"):
            continue
        for place, name in enumerate(one.operands):
            if name in inner.by_name:
                operand = _elements(inner.by_name[name])
                wanted[name] += _needed(one, place, needed, size, operand)
    read = 0
    for one in inner.instructions:
        if one.opcode == "parameter" and (size := _elements(one)):
            read += one.bytes * min(wanted[one.name], size) // size
    return read + written


def _written(inner: Computation, result: Instruction, wanted: dict[str, int]) -> int:
    """The bytes written for one result, and what it needs, noted in `wanted`.

    An update of a parameter (dynamic-update-slice, scatter) is in place: the rest is not touched.
    """
    updates: list[Instruction] = []
    one = result
    while one.opcode in ("dynamic-update-slice", "scatter", "bitcast"):
        if one.opcode != "bitcast":
            updates.append(one)
        one = inner.by_name[one.operands[0]]
    if not updates or one.opcode != "parameter":
        wanted[result.name] += _elements(result)
        return result.bytes
    written = 0
    for update in updates:
        place = 1 if update.opcode == "dynamic-update-slice" else len(update.operands) - 1
        part = inner.by_name[update.operands[place]]
        for name in update.operands[1:]:
            wanted[name] += _elements(inner.by_name[name])
        written += part.bytes
        if update.opcode == "scatter":  # it adds to what is there
            wanted[one.name] += _elements(part)
    return written


def _needed(one: Instruction, place: int, needed: int, size: int, operand: int) -> int:
    """Elements of an operand that are read for so many elements of a result of `size`."""
    if one.opcode in _PARTS:
        return needed if place == 0 else operand
    if one.opcode == "dynamic-update-slice":
        return needed if place == 0 else operand
    if operand == size:
        return needed
    return math.ceil(operand * needed / size)


def _elements(one: Instruction) -> int:
    return sum(math.prod(shape) for _, shape in one.arrays)
