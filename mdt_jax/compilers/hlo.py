"""Reads optimised HLO text: which instructions run, how often, and the cycles estimated for each.

The TPU compiler writes `estimated_cycles` into the `backend_config` of the instructions that it
schedules on the core. A fusion's figure covers the whole fusion; the instructions inside must not
be added to it. Transfers that run beside the core (collectives, `copy-start`) have no figure.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

# Bits of an element by its type; other types (tokens, opaque) hold no data.
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
         "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
         "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3b11fnuz": 8}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CYCLES = re.compile(r'"estimated_cycles":"?(-?\d+)')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_NAME = re.compile(r"%([\w.\-]+)")
_MAX_TRIPS = 1_000_000
_WRAP = {"s8": (8, True), "u8": (8, False), "s16": (16, True), "u16": (16, False),
         "s32": (32, True), "u32": (32, False), "s64": (64, True), "u64": (64, False)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name, without the percent sign.
      opcode: its operation, such as "fusion".
      type: the type of its result, as written.
      operands: the names of its operands, in the same computation.
      attributes: the text after the operands.
      literal: the text in the parentheses, such as a constant's value or a parameter's number.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    literal: str
    is_root: bool

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of its cycles, None where there is none."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """JAX's path of the operation through transformations and scopes; may be empty."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def arrays(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(element type, shape) of the result's arrays: one, unless it is a tuple."""
        return tuple(
            (kind, tuple(int(size) for size in sizes.split(",") if size))
            for kind, sizes in _ARRAY.findall(_without_layouts(self.type))
        )

    @property
    def bytes(self) -> int:
        """The size of the result in bytes, without padding."""
        return sum(array_bytes(kind, shape) for kind, shape in self.arrays)

    def called(self, attribute: str) -> str | None:
        """The name of the computation in an attribute (`calls`, `body`, …), None without it."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> tuple[str, ...]:
        """The names of a conditional's computations."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return tuple(_NAME.findall(found[1]))
        pair = (self.called("true_computation"), self.called("false_computation"))
        return tuple(name for name in pair if name)


def array_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array, without the padding of its layout."""
    return math.prod(shape) * _BITS.get(kind, 0) // 8


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program: its instructions in the order of their schedule."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by their names."""
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @cached_property
    def parameters(self) -> dict[str, int]:
        """The parameters' numbers by their names."""
        return {i.name: int(i.literal) for i in self.instructions if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the name of the entry."""

    computations: dict[str, Computation]
    entry: str

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Yields every scheduled instruction with its computation and how often it runs.

        A loop's body runs as often as the text tells, and counts once where it does not tell. The
        longest branch of a conditional counts. Instructions inside fusions and reducers are left
        out.
        """
        yield from self._executed(self.computations[self.entry], 1, {})

    def _executed(
        self, computation: Computation, times: int, elements: _Elements
    ) -> Iterator[tuple[Computation, Instruction, int]]:
        frame = _Frame(self, computation, elements)
        for one in computation.instructions:
            if one.opcode == "while":
                turns = frame.trip_count(one)
                body = self.computations[one.called("body")]
                inside = frame.unchanged(one, body)
                yield from self._executed(body, times * (1 if turns is None else turns), inside)
            elif one.opcode == "conditional":
                longest = max(one.branches, key=self._cycles, default=None)
                if longest:
                    yield from self._executed(self.computations[longest], times, {})
            elif one.opcode in ("call", "async-start"):
                name = one.called("to_apply") or one.called("calls")
                if name and one.cycles is None:
                    yield from self._executed(self.computations[name], times, {})
                else:
                    yield computation, one, times
            else:
                yield computation, one, times

    def _cycles(self, name: str) -> int:
        inside = self._executed(self.computations[name], 1, {})
        return sum((one.cycles or 0) * times for _, one, times in inside)

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Yields the instructions of a fusion and of the fusions in it; none for others."""
        name = instruction.called("calls")
        if instruction.opcode != "fusion" or name not in self.computations:
            return
        for one in self.computations[name].instructions:
            yield self.computations[name], one
            yield from self.inside(one)

    def loops_of_unknown_length(self) -> list[str]:
        """The names of the loops whose number of turns the text does not tell."""
        return sorted(self._unknown(self.computations[self.entry], {}))

    def _unknown(self, computation: Computation, elements: _Elements) -> Iterator[str]:
        frame = _Frame(self, computation, elements)
        for one in computation.instructions:
            if one.opcode == "while":
                body = self.computations[one.called("body")]
                if frame.trip_count(one) is None:
                    yield one.name
                yield from self._unknown(body, frame.unchanged(one, body))


class _Frame:
    """The integer values in a computation, as far as its text and its caller's tell them.

    Attributes:
      elements: the known elements of the parameter, where that is a tuple.
      arguments: the value of each parameter, where they are scalars; None if unknown.
    """

    def __init__(
        self,
        module: Module,
        computation: Computation,
        elements: _Elements,
        arguments: tuple[int | None, ...] = (),
    ):
        self.module, self.computation = module, computation
        self.elements, self.arguments = elements, arguments
        self._known: dict[str, int | None] = {}

    def value(self, name: str) -> int | None:
        """The value of an integer scalar, None if unknown."""
        if name not in self._known:
            self._known[name] = None  # a value that depends on itself is not known
            self._known[name] = self._evaluate(self.computation.by_name[name])
        return self._known[name]

    def _evaluate(self, one: Instruction) -> int | None:
        if one.opcode == "constant":
            literal = {"true": "1", "false": "0"}.get(one.literal.strip(), one.literal.strip())
            return int(literal) if re.fullmatch(r"-?\d+", literal) else None
        if one.opcode == "parameter":
            number = int(one.literal)
            return self.arguments[number] if number < len(self.arguments) else None
        if one.opcode == "get-tuple-element":
            return self._element(one.operands[0], int(re.search(r"index=(\d+)", one.attributes)[1]))
        if one.opcode == "fusion":
            inner = self.module.computations[one.called("calls")]
            values = tuple(self._argument(name) for name in one.operands)
            return _Frame(self.module, inner, {}, values).value(inner.root.name)
        operands = [self._argument(name) for name in one.operands]
        if one.opcode not in _INTEGER_OPS or None in operands or not operands:
            return None
        direction = re.search(r"direction=(\w+)", one.attributes)
        result = _INTEGER_OPS[one.opcode](operands, direction[1] if direction else "")
        kind = one.arrays[0][0] if one.arrays else ""
        return _wrap(result, kind)

    def _argument(self, name: str) -> int | None:
        one = self.computation.by_name.get(name)
        if one is None or len(one.arrays) != 1 or math.prod(one.arrays[0][1]) != 1:
            return None
        return self.value(name)

    def _element(self, name: str, index: int) -> int | None:
        """The value of a tuple's element, None if unknown."""
        one = self.computation.by_name[name]
        if one.opcode == "parameter":
            return self.elements.get(index)
        if one.opcode == "tuple":
            return self._argument(one.operands[index])
        if one.opcode == "while":  # an element that the loop does not change
            body = self.module.computations[one.called("body")]
            return self.unchanged(one, body).get(index)
        return None

    def unchanged(self, loop: Instruction, body: Computation) -> _Elements:
        """The elements of a loop's state that no turn changes."""
        if body.root.opcode != "tuple":
            return {}
        return {
            index: self._element(loop.operands[0], index)
            for index, name in enumerate(body.root.operands)
            if _passed_on(body, name, index)
        }

    def trip_count(self, loop: Instruction) -> int | None:
        """The turns of a loop, found by computing the integers that its condition depends on.

        None where the text lacks one of them, as for a loop whose bounds are arguments.
        """
        stated = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if stated:
            return int(stated[1])
        condition = self.module.computations[loop.called("condition")]
        body = self.module.computations[loop.called("body")]
        if body.root.opcode != "tuple":
            return None
        invariant = self.unchanged(loop, body)
        state: dict[int, int | None] = {}
        needed = self._reads(condition, condition.root.name)
        while needed - state.keys():
            index = min(needed - state.keys())
            state[index] = self._element(loop.operands[0], index)
            if index not in invariant:
                needed |= self._reads(body, body.root.operands[index])
        if None in state.values():
            return None
        for turn in range(_MAX_TRIPS):
            going = _Frame(self.module, condition, state).value(condition.root.name)
            if going is None:
                return None
            if not going:
                return turn
            frame = _Frame(self.module, body, state)
            state = {
                index: value if index in invariant else frame.value(body.root.operands[index])
                for index, value in state.items()
            }
        return None

    def _reads(self, computation: Computation, name: str) -> set[int]:
        """The elements of the loop's state that a value depends on."""
        seen, stack, found = set(), [name], set()
        while stack:
            one = computation.by_name[stack.pop()]
            if one.name in seen:
                continue
            seen.add(one.name)
            if one.opcode == "get-tuple-element" and one.operands[0] in computation.parameters:
                found.add(int(re.search(r"index=(\d+)", one.attributes)[1]))
            else:
                stack += one.operands
        return found


def _passed_on(body: Computation, name: str, index: int) -> bool:
    """Whether a turn returns an element of its state unchanged."""
    one = body.by_name[name]
    while one.opcode in ("copy", "bitcast"):
        one = body.by_name[one.operands[0]]
    at = re.search(r"index=(\d+)", one.attributes)
    return (
        one.opcode == "get-tuple-element"
        and one.operands[0] in body.parameters
        and at is not None
        and int(at[1]) == index
    )


_Elements = dict[int, int | None]


def _compare(operands: list[int], direction: str) -> int:
    a, b = operands
    return int(
        {"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "EQ": a == b, "NE": a != b}[
            direction
        ]
    )


_INTEGER_OPS = {
    "add": lambda v, _: v[0] + v[1],
    "subtract": lambda v, _: v[0] - v[1],
    "multiply": lambda v, _: v[0] * v[1],
    "maximum": lambda v, _: max(v),
    "minimum": lambda v, _: min(v),
    "and": lambda v, _: v[0] & v[1],
    "or": lambda v, _: v[0] | v[1],
    "clamp": lambda v, _: min(max(v[1], v[0]), v[2]),
    "select": lambda v, _: v[1] if v[0] else v[2],
    "compare": _compare,
    "copy": lambda v, _: v[0],
    "bitcast": lambda v, _: v[0],
    "convert": lambda v, _: v[0],
    "reshape": lambda v, _: v[0],
}


def _wrap(value: int, kind: str) -> int:
    """An integer as its type holds it."""
    if kind not in _WRAP:
        return value
    bits, signed = _WRAP[kind]
    value %= 1 << bits
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def parse_module(text: str) -> Module:
    """Reads the text of a compiled program, `compiled.as_text()`.

    Raises:
      ValueError: a text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = None
    name: str | None = None
    lines: list[Instruction] = []
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(lines))
            name = None
        elif " = " in line:
            lines.append(_parse_instruction(line))
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it is not a compiled program's HLO")
    return Module(computations, entry)


def _parse_instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    is_root = left.startswith("ROOT ")
    end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    kind, rest = right[:end], right[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop - 1]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=rest[:start],
        type=kind,
        operands=tuple(_NAME.findall(inside)),
        attributes=rest[stop:],
        literal=inside,
        is_root=is_root,
    )


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    raise ValueError(f"unbalanced parentheses in the HLO line {text[:80]!r}")


def _without_layouts(kind: str) -> str:
    return re.sub(r"\{[^{}]*\}", "", kind)
