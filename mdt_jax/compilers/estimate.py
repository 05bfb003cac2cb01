"""A compiled program's work in numbers: cycles by kind, FLOPs, collectives with their bytes.

The kinds of instructions; the first one that applies counts:

    collectives  all-gather and its like, without a matrix product; most of them carry no cycles
    copies       instructions that only move data: copies, transposes, slices, updates, padding
    attention    all under a module `attn` but the products of `qkv` and `proj`: logits, bias,
                 softmax and the product with the values, and their gradients, or their kernel
    dense        matrix products (XLA's dot or convolution), with a transfer fused into them
    draws        random numbers
    optimiser    work outside the loss and its gradient: clipping, moments, parameters, averages
    reductions   norms, sums over the batch
    elementwise  the rest, and the kernels of norms and residuals with the sums in them
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from mdt_jax.compilers import hlo
from mdt_jax.compilers.hlo import Computation, Instruction, Module
from mdt_jax.compilers.kernels import KernelKey, Work, instruction_work
from mdt_jax.compilers.topologies import Chip
from mdt_jax.sampling.sampler import SAMPLING_SCOPE

KINDS = ("dense", "attention", "reductions", "elementwise", "draws", "optimiser", "copies",
         "collectives")  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast", "send")  # fmt: skip
_PRODUCTS = ("convolution", "dot")
_REDUCTIONS = ("reduce", "reduce-window", "sort")
_MOVES = frozenset((
    "parameter", "constant", "bitcast", "copy", "transpose", "reshape", "slice", "dynamic-slice",
    "dynamic-update-slice", "pad", "concatenate", "broadcast", "tuple", "get-tuple-element", "iota",
    "gather", "fusion", "convert", "copy-start", "copy-done", "slice-start", "slice-done",
))  # fmt: skip
_DRAWS = re.compile(r"threefry|random|erf_inv|shuffle|fold_in|rng")
# Instructions that take next to no time, or run on the scalar core, and so carry no cycles.
_FREE = frozenset((
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-start", "copy-done",
    "partition-id", "replica-id", "after-all", "opt-barrier", "async-update", "async-done",
    "domain", "add-dependency", "slice-start", "slice-done", "recv", "recv-done", "send-done",
))  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape",
               "AssumeGatherIndicesInBound", "ConcatBitcast", "SliceToDynamic", "PinTensor",
               "annotate_device_placement", "MoveToHost", "MoveToDevice")  # fmt: skip
_SMALL = 4096  # an instruction without cycles whose result has fewer bytes is not reported


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


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The work of a program on one chip.

    Attributes:
      cycles: the compiler's estimate for everything that is scheduled on the core.
      by_kind: the same cycles by kind, a key of `KINDS`.
      flops: the FLOPs of its matrix products, with recomputation and all turns of loops.
      collectives: the transfers by opcode and size of the group, the largest first.
      not_estimated: bytes written, by name, of instructions on the core without an estimate.
      loops_counted_once: the loops whose number of turns the text does not say.
    """

    cycles: int
    by_kind: dict[str, int]
    flops: int
    collectives: tuple[Collective, ...]
    not_estimated: dict[str, int]
    loops_counted_once: tuple[str, ...]

    def seconds(self, chip: Chip) -> float:
        """The time of the cycles at the chip's clock, in seconds."""
        return self.cycles / chip.clock

    def wire_seconds(self, chip: Chip) -> float:
        """Seconds that the collectives inside a slice take at least, if no work hides them."""
        inside = sum(c.wire_bytes for c in self.collectives if not c.across_slices)
        return inside / chip.ici_bandwidth


def estimate_program(
    text: str, chips_per_slice: int | None = None, kernels: dict[KernelKey, Work] | None = None
) -> Estimate:
    """The work of a compiled program.

    Args:
      text: its optimised HLO, from `compiled.as_text()`.
      chips_per_slice: the size of a slice, to find the collectives that leave it; None for a single
        slice.
      kernels: the work of its Pallas kernels, from `kernels.kernel_work`.

    Raises:
      ValueError: a text without an entry computation.
    """
    module = hlo.parse_module(text)
    by_kind: dict[str, int] = dict.fromkeys(KINDS, 0)
    flops = 0
    moved: dict[tuple[str, int, bool], list[int]] = defaultdict(lambda: [0, 0, 0])
    not_estimated: dict[str, int] = {}
    chains: set[tuple[str, ...]] = set()
    for computation, one, times in module.executed():
        for where, transfer in _transfers(module, computation, one):
            # A transfer that runs beside other work is written again into each fusion that drives
            # it, always with the same chain. (The layers of an unrolled loop may share a channel.)
            chain = re.findall(r'(?:channel_id=|chain_id=")\d+', transfer.attributes)
            if len(chain) > 1 and tuple(chain) in chains:
                continue
            chains.add(tuple(chain))
            group, across = replica_group(transfer.attributes, chips_per_slice)
            # Slices send to each other through their hosts.
            across = across or (transfer.opcode == "send" and chips_per_slice is not None)
            size = _collective_bytes(where, transfer)
            opcode = transfer.opcode.removesuffix("-start")
            total = moved[opcode, group, across]
            total[0] += times
            total[1] += times * size
            total[2] += times * _wire_bytes(opcode, size, group)
        flops += times * product_flops(module, computation, one)
        if (work := instruction_work(one, kernels or {})) is not None:
            by_kind[kind_of(module, one)] += times * work.cycles
            flops += times * work.flops
        elif one.cycles is not None:
            by_kind[kind_of(module, one)] += times * one.cycles
        elif _lacks_estimate(one) and kind_of(module, one) != "collectives":
            label = _label(one)
            not_estimated[label] = not_estimated.get(label, 0) + times * one.bytes
    collectives = [
        Collective(opcode, group, count, size, wire, across)
        for (opcode, group, across), (count, size, wire) in moved.items()
    ]
    return Estimate(
        cycles=sum(by_kind.values()),
        by_kind=by_kind,
        flops=flops,
        collectives=tuple(sorted(collectives, key=lambda c: -c.bytes)),
        not_estimated=dict(sorted(not_estimated.items(), key=lambda item: -item[1])),
        loops_counted_once=tuple(module.loops_of_unknown_length()),
    )


def kind_of(module: Module, one: Instruction) -> str:
    """The kind of work of an instruction, one of KINDS (see the module's docstring)."""
    if _is_collective(one):
        return "collectives"
    inside = [inner for _, inner in module.inside(one)] or [one]
    products = [inner for inner in inside if inner.opcode in _PRODUCTS]
    if not products and any(map(_is_collective, inside)):
        return "collectives"
    if not products and {inner.opcode for inner in inside} <= _MOVES:
        return "copies"
    # Where a product is fused with later instructions, the product's own name decides.
    names = [inner.op_name for inner in products] or [one.op_name or inside[-1].op_name]
    if all(re.search(r"/attn(/|$)", name) for name in names):
        core = not any(re.search(r"/attn/(qkv|proj)([./]|$)", name) for name in names)
        if core or not products:
            return "attention"
    if products:
        return "dense"
    if _DRAWS.search(names[0]):
        return "draws"
    in_gradient = re.search(r"jvp\(|rematted|checkpoint|while", names[0])
    if names[0] and not in_gradient and SAMPLING_SCOPE not in names[0]:
        return "optimiser"
    reduces = {inner.opcode for inner in inside} & set(_REDUCTIONS)
    return "reductions" if reduces else "elementwise"


def _is_collective(one: Instruction) -> bool:
    return one.opcode.removesuffix("-start") in COLLECTIVES


def _transfers(
    module: Module, computation: Computation, one: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """The collectives of an instruction: itself, or those of a fusion.

    A reduce-scatter is written as an all-reduce and a slice in a fusion `all-reduce-scatter`.
    """
    if _is_collective(one):
        yield computation, one
    for where, inner in module.inside(one):
        if inner.opcode == "all-reduce" and where.name.startswith("all-reduce-scatter"):
            yield where, dataclasses.replace(inner, opcode="reduce-scatter")
        elif _is_collective(inner):
            yield where, inner


def _collective_bytes(computation: Computation, one: Instruction) -> int:
    """The bytes of an all-gather's whole array, of the operands for other collectives."""
    operands = [computation.by_name[name] for name in one.operands if name in computation.by_name]
    if not one.opcode.startswith("all-gather"):
        return sum(operand.bytes for operand in operands)
    if not one.opcode.endswith("-start"):
        return one.bytes
    # The result is a tuple (operands, whole array, …); the whole array is the rest.
    return max(one.bytes - sum(operand.bytes for operand in operands), 0)


def _wire_bytes(opcode: str, size: int, group: int) -> int:
    """Bytes that a chip sends in a ring of `group` chips."""
    if opcode in ("collective-permute", "send") or group == 0:  # from one to another, or unknown
        return size
    rounds = 2 if opcode == "all-reduce" else 1
    return round(size * rounds * (group - 1) / group)


def replica_group(attributes: str, chips_per_slice: int | None = None) -> tuple[int, bool]:
    """The chips in a group of a collective, 0 if unknown, and whether a group spans slices."""

    def spans(ids: list[int]) -> bool:
        return chips_per_slice is not None and len({i // chips_per_slice for i in ids}) > 1

    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes)
    if pairs:
        found = [
            [int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])
        ]
        return len({i for pair in found for i in pair}), any(map(spans, found))
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        ids = [
            [int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])
        ]
        return max(map(len, ids)), any(map(spans, ids))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        ids = _iota_groups(int(iota[1]), int(iota[2]), iota[3], iota[4])
        return int(iota[2]), any(map(spans, ids))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", attributes
    )
    if named:
        ids = _mesh_groups(*named.groups())
        return len(ids[0]), any(map(spans, ids))
    return 0, False


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


def _lacks_estimate(one: Instruction) -> bool:
    """Whether the core does work here for which the compiler gives no cycles."""
    if one.opcode in _FREE or _is_collective(one) or one.opcode.endswith("-done"):
        return False
    if one.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]+)"', one.attributes)
        return target is None or target[1] not in _FREE_CALLS
    return one.bytes >= _SMALL


def _label(one: Instruction) -> str:
    target = re.search(r'custom_call_target="([^"]+)"', one.attributes)
    return f"{one.opcode} {target[1]}" if target else one.opcode


def product_flops(module: Module, computation: Computation, one: Instruction) -> int:
    """FLOPs of an instruction's matrix products, with those inside a fusion."""
    pairs = [(computation, one), *module.inside(one)]
    return sum(_flops(where, inner) for where, inner in pairs if inner.opcode in _PRODUCTS)


def _flops(computation: Computation, one: Instruction) -> int:
    left, right = (computation.by_name[name].arrays[0][1] for name in one.operands[:2])
    out = one.arrays[0][1]
    if one.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        dims = [int(d) for d in contracted[1].split(",") if d] if contracted else []
        return 2 * math.prod(out) * math.prod(left[d] for d in dims)
    lhs, rhs, result = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", one.attributes).groups()
    window = _window(one.attributes)
    macs = out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
    for d in sorted(label for label in result if label.isdigit()):
        size = {k: v[int(d)] for k, v in window.items() if int(d) < len(v)}
        macs *= _positions(left[lhs.index(d)], right[rhs.index(d)], out[result.index(d)], size)
    groups = re.search(r"batch_group_count=(\d+)", one.attributes)
    return 2 * macs // (int(groups[1]) if groups else 1)


def _window(attributes: str) -> dict[str, list]:
    """A convolution's strides, dilations and low padding, by spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=", 1) for part in found[1].split()) if found else {}
    window: dict[str, list] = {
        key: [int(n) for n in fields[key].split("x")]
        for key in ("stride", "lhs_dilate", "rhs_dilate")
        if key in fields
    }
    if "pad" in fields:
        window["pad"] = [int(pair.split("_")[0]) for pair in fields["pad"].split("x")]
    return window


def _positions(size: int, kernel: int, out: int, window: dict[str, int]) -> int:
    """The number of pairs (output, kernel element) of one dimension that meet an input element.

    The compiler writes batched products as convolutions whose dilated window meets one input
    element at each place; counting every kernel element would count products that are never made.
    """
    stride, pad = window.get("stride", 1), window.get("pad", 0)
    base, spread = window.get("lhs_dilate", 1), window.get("rhs_dilate", 1)
    last, count = (size - 1) * base, 0
    for k in range(kernel):
        offset = k * spread - pad
        low, high = max(0, -(offset // stride)), (last - offset) // stride
        for o in range(low, min(high, out - 1) + 1):
            position = o * stride + offset
            count += 0 <= position <= last and position % base == 0
    return count
