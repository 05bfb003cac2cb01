"""A floor and an estimate of a compiled program's time on a GPU. No GPU has confirmed either.

What each figure rests on:

    products    The floor is their FLOPs over the datasheet's peak. The estimate is what XLA's own
                model, whose tables were measured on Hopper cards, says of a lone product of the
                same (batch, M, N, K) from bfloat16 to bfloat16 (`LoneProducts`); where it says
                nothing, FLOPs at the rate of a lone 8192³ product. Its entries for float32 results,
                as of weights' gradients, are many times too long and are never read. Both are at
                least the product's bytes over the memory's bandwidth. Tiles are not tuned without a
                GPU, and on one the compiler may fuse other work with a product.
    attention   cuDNN's calls: the floor is the larger of FLOPs over the peak and bytes over the
                bandwidth, the estimate the sum of FLOPs at a lone product's rate and bytes over the
                bandwidth. Forward has two products of the logits' size, backward five.
    the rest    All other kernels, called elementwise in reports: bytes over the datasheet's
                bandwidth, in both. A kernel reads and writes each array once, and of a slice, a
                gather or an update in place only the part (`mdt_jax.compilers.traffic`).
    collectives The floor is the bytes that a GPU sends in a ring over the links' bandwidth, all of
                it beside other work. In the estimate one inside a node takes what XLA's table says,
                else bytes over bandwidth. It begins when it is scheduled and the one before it is
                over; what other work does not fill until it is waited for is exposed.

No time is added for starting kernels, and caches save nothing. Kinds are those of
`mdt_jax.compilers.estimate`. The estimator is frozen: a change to it is shown on the programs
before and after it, so that what an optimisation gains is not the estimator's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict

from mdt_jax.compilers import estimate, hlo
from mdt_jax.compilers.collectives import (
    Collective,
    collective_bytes,
    replica_group,
    replica_groups,
    transfers,
    wire_bytes,
)
from mdt_jax.compilers.estimate import CUBLAS, KINDS, kind_of, named_dims
from mdt_jax.compilers.gpus import Card, Nodes
from mdt_jax.compilers.hlo import Computation, Instruction, Module
from mdt_jax.compilers.traffic import traffic

Product = tuple[int, int, int, int]  # batch, M, N, K, with M at least N
LONE = (1, 8192, 8192, 8192)
_ATTENTION = 'custom_call_target="__cudnn$fmha'
_TABLE = re.compile(r'"exec_time_us":([\d.eE+-]+)[^{}]*"name":"sol"')
# Kernels that no work of an array's size, and so no kernel of the GPU, stands behind.
_FREE = estimate.FREE - {"copy-start"}


@dataclasses.dataclass(frozen=True)
class LoneProducts:
    """The time of products of bfloat16 alone, as XLA's table has it.

    Attributes:
      seconds: by (batch, M, N, K) with M at least N; shapes without an entry are missing.
      rate: FLOP/s of a lone 8192³ product; a share of 0.75 of the peak where it has no entry.
      calibration: that product's share of the peak, None where it has no entry.
    """

    seconds: dict[Product, float]
    rate: float
    calibration: float | None

    @classmethod
    def of(cls, card: Card, seconds: dict[Product, float]) -> LoneProducts:
        """The same with the rate that the lone product among them gives."""
        lone = seconds.get(LONE)
        share = None if lone is None else 2 * math.prod(LONE) / lone / card.peak_flops
        return cls(seconds, card.peak_flops * (0.75 if share is None else share), share)


@dataclasses.dataclass(frozen=True)
class GpuCollective(Collective):
    """All of a program's transfers of one kind, on GPUs.

    Attributes:
      overlapped: how many of them have other work between their start and their end.
      seconds: the time of all of them, one after the other.
    """

    overlapped: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class GpuEstimate:
    """The work of a program on one GPU, and its time: see the module.

    Attributes:
      floor_by_kind: the floor's seconds by kind, but for the collectives' all of them.
      seconds_by_kind: the estimate's seconds by kind; of the collectives, what is exposed.
      elementwise_bytes: bytes read and written, by kind, of all kernels but products, cuDNN's
        attention and collectives.
      flops: the FLOPs of its products, with those of cuDNN's attention.
      collectives: the transfers, the largest first.
      kernels: how often each kind of kernel is started in one run of the program.
      untabled_flops: the FLOPs of products for which XLA's table had no entry.
      loops_counted_once: the loops whose number of turns the text does not say.
    """

    floor_by_kind: dict[str, float]
    seconds_by_kind: dict[str, float]
    elementwise_bytes: dict[str, int]
    flops: int
    collectives: tuple[GpuCollective, ...]
    kernels: dict[str, int]
    untabled_flops: int
    loops_counted_once: tuple[str, ...]

    @property
    def floor_seconds(self) -> float:
        """The least time by arithmetic: work or transfers, whichever takes longer."""
        work = sum(s for kind, s in self.floor_by_kind.items() if kind != "collectives")
        return max(work, self.floor_by_kind["collectives"])

    @property
    def estimated_seconds(self) -> float:
        """The estimate's time: work, and what of the collectives is exposed."""
        return sum(self.seconds_by_kind.values())

    @property
    def collective_seconds(self) -> float:
        """The collectives' time one after the other, hidden or not."""
        return sum(one.seconds for one in self.collectives)


def estimate_program(text: str, nodes: Nodes, lone: LoneProducts) -> GpuEstimate:
    """The work of a compiled program on each GPU of nodes.

    Args:
      text: its optimised HLO, compiled with `Nodes.compiler_options`.
      nodes: what it was compiled for.
      lone: times of lone products; those of `product_shapes` are looked up.

    Raises:
      ValueError: a text without an entry computation.
    """
    module = hlo.parse_module(text)
    tally = _Tally(module, nodes, lone)
    for computation, one, times in module.executed():
        tally.add(computation, one, times)
    return tally.result()


def product_shapes(text: str) -> set[Product]:
    """The shapes of a program's products, but those of cuDNN's attention."""
    module = hlo.parse_module(text)
    return {
        product_shape(where, inner)
        for computation, one, _ in module.executed()
        for where, inner in _products(module, computation, one)
    }


def table_seconds(text: str) -> dict[Product, float]:
    """XLA's table's seconds of a program's products whose operands and results are bfloat16."""
    module = hlo.parse_module(text)
    found = {}
    for computation, one, _ in module.executed():
        products = list(_products(module, computation, one))
        entry = _TABLE.search(one.attributes)
        if len(products) == 1 and entry:
            where, inner = products[0]
            arrays = [where.by_name[name].arrays[0] for name in inner.operands[:2]]
            if {kind for kind, _ in (*arrays, inner.arrays[0])} == {"bf16"}:
                found[product_shape(where, inner)] = float(entry[1]) / 1e6
    return found


def product_shape(computation: Computation, one: Instruction) -> Product:
    """(batch, M, N, K) of a product, the larger of M and N first."""
    left, right = (computation.by_name[name].arrays[0][1] for name in one.operands[:2])
    batch = _dims(one, "lhs_batch_dim")
    contracted, other = _dims(one, "lhs_contracting_dim"), _dims(one, "rhs_contracting_dim")
    shared = math.prod(left[d] for d in batch)
    inner = math.prod(left[d] for d in contracted)
    m = math.prod(left) // max(shared * inner, 1)
    taken = {*other, *_dims(one, "rhs_batch_dim")}
    n = math.prod(size for d, size in enumerate(right) if d not in taken)
    return shared, max(m, n), min(m, n), inner


def _dims(one: Instruction, name: str) -> list[int]:
    """The axes of a product, in HLO's own way or in that of a call of cuBLAS."""
    if one.opcode != "custom-call":
        return named_dims(one.attributes, f"{name}s")
    found = re.search(rf'"{name}ensions":\s*\[([^\]]*)\]', one.attributes)
    return [int(d) for d in re.findall(r"\d+", found[1])] if found else []


def _products(module: Module, computation: Computation, one: Instruction) -> list:
    """(computation, product) of an instruction: itself, or those in a fusion."""
    pairs = [(computation, one), *module.inside(one)]
    return [(where, p) for where, p in pairs if p.opcode == "dot" or _is_cublas(p)]


def _is_cublas(one: Instruction) -> bool:
    return one.opcode == "custom-call" and CUBLAS in one.attributes


def attention_flops(one: Instruction) -> int:
    """FLOPs of a call of cuDNN's attention, forward or backward; 0 for other instructions."""
    if _ATTENTION not in one.attributes:
        return 0
    logits = re.search(
        r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', one.attributes
    )
    sizes = [int(size) for size in re.findall(r"\d+", logits[1])]
    # The first result, of the shape of the queries in both: (batch, heads, tokens, width).
    width = one.arrays[0][1]
    products = 5 if _is_backward(one) else 2
    return products * 2 * math.prod(sizes) * (math.prod(width) // math.prod(sizes[:3]))


def _is_backward(one: Instruction) -> bool:
    return bool(re.search(r'custom_call_target="[^"]*Backward"', one.attributes))


class _Tally:
    """Sums over a program's instructions, in the order of their schedule.

    Two clocks run, of work and of transfers. Both count a loop's body with all of its turns, so
    that what is exposed in one turn counts as often as it turns.
    """

    def __init__(self, module: Module, nodes: Nodes, lone: LoneProducts):
        self.module, self.nodes, self.lone = module, nodes, lone
        self.floor = dict.fromkeys(KINDS, 0.0)
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.bytes = dict.fromkeys((k for k in KINDS if k != "collectives"), 0)
        self.kernels: Counter[str] = Counter()
        self.flops = self.untabled = 0
        self.moved: dict[tuple[str, int, bool], list] = defaultdict(lambda: [0, 0, 0, 0, 0.0])
        self.clock = self.link_free = 0.0
        # (seconds of work before, end, key, times) of the transfers that are under way
        self.under_way: dict[tuple[str, str], tuple[float, float, tuple, int]] = {}

    def add(self, computation: Computation, one: Instruction, times: int) -> None:
        """Adds an instruction that runs so many times."""
        if one.opcode.endswith("-done"):
            for name in one.operands:
                self._end((computation.name, name))
            return
        moves = list(transfers(self.module, computation, one))
        if moves:
            for where, transfer in moves:
                self._begin(where, transfer, times)
            if not one.opcode.endswith("-start"):
                for where, transfer in moves:
                    self._end((where.name, transfer.name))
            return
        if one.opcode in _FREE or not one.bytes:
            return
        self._work(computation, one, times)

    def _work(self, computation: Computation, one: Instruction, times: int) -> None:
        card = self.nodes.chip
        size = traffic(self.module, computation, one)
        by_memory = size / card.hbm_bandwidth
        kind = kind_of(self.module, one)
        products = _products(self.module, computation, one)
        if flops := attention_flops(one):
            self.kernels[f"cuDNN attention {'backward' if _is_backward(one) else 'forward'}"] += (
                times
            )
            floor = max(flops / card.peak_flops, by_memory)
            seconds = flops / self.lone.rate + by_memory
        elif products:
            self.kernels["cuBLAS" if _is_cublas(one) else "product by Triton"] += times
            flops = sum(2 * math.prod(product_shape(*pair)) for pair in products)
            floor = max(flops / card.peak_flops, by_memory)
            seconds = max(sum(self._product_seconds(*pair, times) for pair in products), by_memory)
        else:
            self.kernels["elementwise"] += times
            self.bytes[kind] += times * size
            floor = seconds = by_memory
        self.flops += times * flops
        self.floor[kind] += times * floor
        self.seconds[kind] += times * seconds
        self.clock += times * seconds

    def _product_seconds(self, computation: Computation, one: Instruction, times: int) -> float:
        shape = product_shape(computation, one)
        if shape in self.lone.seconds:
            return self.lone.seconds[shape]
        flops = 2 * math.prod(shape)
        self.untabled += times * flops
        return flops / self.lone.rate

    def _begin(self, computation: Computation, one: Instruction, times: int) -> None:
        group, across = replica_group(one.attributes, self.nodes.chips_per_slice)
        opcode = one.opcode.removesuffix("-start")
        size = collective_bytes(computation, one)
        wire = wire_bytes(opcode, size, group)
        groups = replica_groups(one.attributes) or [[0]]
        by_link = wire / min(self.nodes.link_bandwidth(tuple(ids)) for ids in groups)
        entry = _TABLE.search(one.attributes)
        seconds = float(entry[1]) / 1e6 if entry and not across else by_link
        key = (opcode, group, across)
        for i, value in enumerate((1, size, wire)):
            self.moved[key][i] += times * value
        self.moved[key][4] += times * seconds
        self.floor["collectives"] += times * by_link
        end = max(self.clock, self.link_free) + times * seconds
        self.link_free = end
        work = sum(self.seconds.values()) - self.seconds["collectives"]
        self.under_way[computation.name, one.name] = (work, end, key, times)

    def _end(self, name: tuple[str, str]) -> None:
        begun = self.under_way.pop(name, None)
        if begun is None:  # a copy or a compute kernel that ends
            return
        work, end, key, times = begun
        if sum(self.seconds.values()) - self.seconds["collectives"] > work:
            self.moved[key][3] += times
        exposed = max(0.0, end - self.clock)
        self.seconds["collectives"] += exposed
        self.clock += exposed

    def result(self) -> GpuEstimate:
        """The sums."""
        return GpuEstimate(
            floor_by_kind=self.floor,
            seconds_by_kind=self.seconds,
            elementwise_bytes=self.bytes,
            flops=self.flops,
            collectives=tuple(
                sorted(
                    (
                        GpuCollective(*key[:2], count, size, wire, key[2], overlapped, seconds)
                        for key, (count, size, wire, overlapped, seconds) in self.moved.items()
                    ),
                    key=lambda c: -c.bytes,
                )
            ),
            kernels=dict(self.kernels),
            untabled_flops=self.untabled,
            loops_counted_once=tuple(self.module.loops_of_unknown_length()),
        )
