"""A compiled program's work in numbers: cycles by kind, FLOPs, collectives with their bytes.

Kinds, the first that applies:

    collectives  all-gather and its like, with no product; most of them carry no cycles
    copies       what only moves data: copies, transposes, slices, updates, padding, filling
    attention    under a module `attn`, but for the products of `qkv` and `proj`: logits, bias,
                 softmax and the product with the values, and their gradients, or their kernel
    dense        what holds a matrix product (XLA's dot or convolution), and a transfer beside it
    draws        random numbers
    optimiser    outside of the loss and its gradient: clipping, moments, parameters, averages
    reductions   what holds a reduction: norms, sums over the batch
    elementwise  the rest; the kernels of norms and residuals, sums included
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
from mdt_jax.compilers.kernels import Key, Work, of_instruction
from mdt_jax.compilers.topologies import Chip

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
# What takes no time to speak of, or runs on the scalar core, and so carries no cycles.
_FREE = frozenset((
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-start", "copy-done",
    "partition-id", "replica-id", "after-all", "opt-barrier", "async-update", "async-done",
    "domain", "add-dependency", "slice-start", "slice-done", "recv", "recv-done", "send-done",
))  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape",
               "AssumeGatherIndicesInBound", "ConcatBitcast", "SliceToDynamic", "PinTensor",
               "annotate_device_placement", "MoveToHost", "MoveToDevice")  # fmt: skip
_SMALL = 4096  # bytes of a result below which an instruction without cycles is not told of


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of transfer of a program, all its occurrences together.

    Attributes:
      opcode: such as "all-gather".
      group: chips that take part together, 0 where the text does not tell.
      count: how often it runs.
      bytes: one chip's data in all of them: of the whole array for a gather, of what goes in for
        the others.
      wire_bytes: what a chip has to send at least, in a ring.
      across_slices: whether it leaves a slice.
    """

    opcode: str
    group: int
    count: int
    bytes: int
    wire_bytes: int
    across_slices: bool = False


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a program takes on one chip.

    Attributes:
      cycles: the compiler's, of all that is scheduled on the core.
      by_kind: the same, by kind.
      flops: of its matrix products, recomputation and loops' turns counted.
      collectives: by opcode and size of the group, the largest first.
      not_estimated: what runs on the core, moves data and carries no cycles: name → bytes written.
      loops_counted_once: loops whose turns the text does not tell.
    """

    cycles: int
    by_kind: dict[str, int]
    flops: int
    collectives: tuple[Collective, ...]
    not_estimated: dict[str, int]
    loops_counted_once: tuple[str, ...]

    def seconds(self, chip: Chip) -> float:
        """The cycles over the clock."""
        return self.cycles / chip.clock

    def wire_seconds(self, chip: Chip) -> float:
        """What the collectives take at the least, were nothing of them hidden behind the work."""
        inside = sum(c.wire_bytes for c in self.collectives if not c.across_slices)
        return inside / chip.ici_bandwidth


def estimate(
    module: Module, chips_per_slice: int | None = None, kernels: dict[Key, Work] | None = None
) -> Estimate:
    """The program's numbers, of its optimised HLO.

    Args:
      module: from `hlo.parse`.
      chips_per_slice: to tell which collectives leave a slice; None: there is one slice.
      kernels: the work of its Pallas kernels, from `kernels.work`.
    """
    by_kind: dict[str, int] = dict.fromkeys(KINDS, 0)
    flops, moved = 0, defaultdict(lambda: [0, 0, 0])
    not_estimated: dict[str, int] = {}
    chains: set[tuple[str, ...]] = set()
    for computation, one, times in module.executed():
        for where, transfer in _transfers(module, computation, one):
            # One that runs beside other work is written again into each fusion that drives it, all
            # of one chain. (A channel alone may be shared by the layers of an unrolled loop.)
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
        if (work := of_instruction(one, kernels or {})) is not None:
            by_kind[kind_of(module, one)] += times * work.cycles
            flops += times * work.flops
        elif one.cycles is not None:
            by_kind[kind_of(module, one)] += times * one.cycles
        elif _lacks_estimate(one) and kind_of(module, one) != "collectives":
            label = _label(one)
            not_estimated[label] = not_estimated.get(label, 0) + times * one.bytes
    collectives = [
        Collective(opcode, group, *numbers, across_slices=across)
        for (opcode, group, across), numbers in moved.items()
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
    # Of a product with what follows it, the product's place decides.
    names = [inner.op_name for inner in products] or [one.op_name or inside[-1].op_name]
    if all(re.search(r"/attn(/|$)", name) for name in names):
        core = not any(re.search(r"/attn/(qkv|proj)(/|$)", name) for name in names)
        if core or not products:
            return "attention"
    if products:
        return "dense"
    if _DRAWS.search(names[0]):
        return "draws"
    inside_gradient = re.search(r"jvp\(|rematted|checkpoint|while", names[0])
    if names[0] and not inside_gradient and not _is_forward(names[0]):
        return "optimiser"
    reduces = {inner.opcode for inner in inside} & set(_REDUCTIONS)
    return "reductions" if reduces else "elementwise"


def _is_forward(name: str) -> bool:
    """Whether the path lies in a network's forward pass, as all of a sampler's does."""
    return bool(re.search(r"MDT|DiT|LatentTransformer|jit\(chunk\)", name))


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
    """Of the whole array for an all-gather, of what goes in for the others."""
    operands = [computation.by_name[name] for name in one.operands if name in computation.by_name]
    if not one.opcode.startswith("all-gather"):
        return sum(operand.bytes for operand in operands)
    if not one.opcode.endswith("-start"):
        return one.bytes
    # (what goes in, what comes out, …), the second part being the larger.
    return max(one.bytes - sum(operand.bytes for operand in operands), 0)


def _wire_bytes(opcode: str, size: int, group: int) -> int:
    """What a chip sends in a ring of `group` chips."""
    if opcode in ("collective-permute", "send") or group == 0:  # from one to another, or not told
        return size
    rounds = 2 if opcode == "all-reduce" else 1
    return round(size * rounds * (group - 1) / group)


def replica_group(attributes: str, chips_per_slice: int | None = None) -> tuple[int, bool]:
    """Chips of one group of a collective, and whether a group spans slices; 0 if not told."""

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
    """Groups along axes of a mesh: 'x'=4,'y'=2 and 'x', or a part of one: 'x':(1)2.

    The devices are in order, listed (0,2,1,3), or an iota that is reshaped and transposed.
    """
    sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", mesh)}
    count = math.prod(sizes.values())
    iota = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids or "")
    if iota:
        (chips,) = _iota_groups(1, count, iota[1], iota[2])
    else:
        chips = [int(i) for i in device_ids.split(",")] if device_ids else list(range(count))
    # Of an axis' part: how often what precedes it, and its own size; the rest follows.
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
    """Whether the core does something here of which the compiler gives no cycles."""
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
    """FLOPs of an instruction's matrix products, those inside of a fusion too."""
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
    window = {
        key: [int(n) for n in fields[key].split("x")]
        for key in ("stride", "lhs_dilate", "rhs_dilate")
        if key in fields
    }
    if "pad" in fields:
        window["pad"] = [int(pair.split("_")[0]) for pair in fields["pad"].split("x")]
    return window


def _positions(size: int, kernel: int, out: int, window: dict[str, int]) -> int:
    """Pairs (output, kernel element) of one dimension that meet an element of the input.

    The compiler writes batched products as convolutions whose dilated window meets one element in
    each place; counting every kernel element would count products that are never made.
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


def parse(
    text: str, chips_per_slice: int | None = None, kernels: dict[Key, Work] | None = None
) -> Estimate:
    """The numbers of `compiled.as_text()`."""
    return estimate(hlo.parse(text), chips_per_slice, kernels)
