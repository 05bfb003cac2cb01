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

from mdt_jax.compilers import hlo
from mdt_jax.compilers.collectives import (
    Collective,
    collective_bytes,
    is_collective,
    replica_group,
    transfers,
    wire_bytes,
)
from mdt_jax.compilers.hlo import Computation, Instruction, Module
from mdt_jax.compilers.kernels import KernelKey, Work, instruction_work
from mdt_jax.compilers.topologies import Chip
from mdt_jax.sampling.sampler import SAMPLING_SCOPE

KINDS = ("dense", "attention", "reductions", "elementwise", "draws", "optimiser", "copies",
         "collectives")  # fmt: skip
CUBLAS = 'custom_call_target="__cublas'
_PRODUCTS = ("convolution", "dot")
_REDUCTIONS = ("reduce", "reduce-window", "sort")
_MOVES = frozenset((
    "parameter", "constant", "bitcast", "copy", "transpose", "reshape", "slice", "dynamic-slice",
    "dynamic-update-slice", "pad", "concatenate", "broadcast", "tuple", "get-tuple-element", "iota",
    "gather", "fusion", "convert", "copy-start", "copy-done", "slice-start", "slice-done",
))  # fmt: skip
_DRAWS = re.compile(r"threefry|random|erf_inv|shuffle|fold_in|rng")
# Instructions that take next to no time, or run on the scalar core, and so carry no cycles.
FREE = frozenset((
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-start", "copy-done",
    "partition-id", "replica-id", "after-all", "opt-barrier", "async-update", "async-done",
    "domain", "add-dependency", "slice-start", "slice-done", "recv", "recv-done", "send-done",
))  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape",
               "AssumeGatherIndicesInBound", "ConcatBitcast", "SliceToDynamic", "PinTensor",
               "annotate_device_placement", "MoveToHost", "MoveToDevice")  # fmt: skip
_SMALL = 4096  # an instruction without cycles whose result has fewer bytes is not reported


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
        for where, transfer in transfers(module, computation, one):
            # A transfer that runs beside other work is written again into each fusion that drives
            # it, always with the same chain. (The layers of an unrolled loop may share a channel.)
            chain = re.findall(r'(?:channel_id=|chain_id=")\d+', transfer.attributes)
            if len(chain) > 1 and tuple(chain) in chains:
                continue
            chains.add(tuple(chain))
            group, across = replica_group(transfer.attributes, chips_per_slice)
            # Slices send to each other through their hosts.
            across = across or (transfer.opcode == "send" and chips_per_slice is not None)
            size = collective_bytes(where, transfer)
            opcode = transfer.opcode.removesuffix("-start")
            total = moved[opcode, group, across]
            total[0] += times
            total[1] += times * size
            total[2] += times * wire_bytes(opcode, size, group)
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
    if is_collective(one):
        return "collectives"
    inside = [inner for _, inner in module.inside(one)] or [one]
    products = [inner for inner in inside if is_product(inner)]
    if not products and any(map(is_collective, inside)):
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


def is_product(one: Instruction) -> bool:
    """Whether an instruction is a matrix product, which a GPU's compiler may leave to cuBLAS."""
    return one.opcode in _PRODUCTS or (one.opcode == "custom-call" and CUBLAS in one.attributes)


def _lacks_estimate(one: Instruction) -> bool:
    """Whether the core does work here for which the compiler gives no cycles."""
    if one.opcode in FREE or is_collective(one) or one.opcode.endswith("-done"):
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
        dims = named_dims(one.attributes, "lhs_contracting_dims")
        return 2 * math.prod(out) * math.prod(left[d] for d in dims)
    lhs, rhs, result = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", one.attributes).groups()
    window = _window(one.attributes)
    macs = out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
    for d in sorted(label for label in result if label.isdigit()):
        size = {k: v[int(d)] for k, v in window.items() if int(d) < len(v)}
        macs *= _positions(left[lhs.index(d)], right[rhs.index(d)], out[result.index(d)], size)
    groups = re.search(r"batch_group_count=(\d+)", one.attributes)
    return 2 * macs // (int(groups[1]) if groups else 1)


def named_dims(attributes: str, name: str) -> list[int]:
    """The axes in an attribute such as lhs_contracting_dims={1}; none without it."""
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", attributes)
    return [int(d) for d in found[1].split(",") if d] if found else []


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
