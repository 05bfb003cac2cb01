"""Cycles of the Pallas kernels in a program, for which the compiler gives no estimate.

Each kernel is compiled alone, in a child process that makes the compiler write its schedule
(`mdt_jax.compilers.schedule`). A kernel takes the cycles of its schedule or those of its transfers,
the bytes it reads and writes over the bandwidth of the chip's memory, whichever are more.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.export
from jax.sharding import SingleDeviceSharding

from mdt_jax.compilers import hlo, schedule, topologies
from mdt_jax.compilers.topologies import Chip

TARGET = "tpu_custom_call"
ArrayType = tuple[str, tuple[int, ...]]  # element type as HLO writes it, shape
KernelKey = tuple[str, tuple[ArrayType, ...]]  # a kernel's name and results
_TYPES = {"float32": "f32", "bfloat16": "bf16", "int32": "s32", "float16": "f16"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program, for one device's shapes.

    Attributes:
      name: its name in the program.
      outputs: the types of its results, by which it is found in the program.
      grid: the sizes of its grid.
      parallel: for each dimension of the grid, whether cores may share it.
      bytes: the bytes that its blocks read and write, each array counted once at the most.
      flops: the FLOPs of its matrix products, in all turns of the grid.
      exported: the kernel alone, as a program.
    """

    name: str
    outputs: tuple[ArrayType, ...]
    grid: tuple[int, ...]
    parallel: tuple[bool, ...]
    bytes: int
    flops: int
    exported: jax.export.Exported

    @cached_property
    def program(self) -> bytes:
        """The kernel alone, serialised."""
        return bytes(self.exported.serialize())

    @property
    def key(self) -> KernelKey:
        """Name and results, which tell it from a program's other kernels."""
        return self.name, self.outputs

    def transfer_cycles(self, chip: Chip) -> int:
        """The cycles of its transfers at the memory's bandwidth."""
        return round(self.bytes / chip.hbm_bandwidth * chip.clock)

    def product_cycles(self, chip: Chip) -> int:
        """The cycles of its products at the matrix units' peak, as if their sides filled them."""
        return round(self.flops / (2 * chip.mxu_macs))

    def steps(self, cores: int) -> int:
        """Turns of the grid on one of a chip's cores."""
        shared = any(p and n % cores == 0 for p, n in zip(self.parallel, self.grid, strict=True))
        return math.prod(self.grid) // (cores if shared else 1)


@dataclasses.dataclass(frozen=True)
class Work:
    """A kernel's cycles and FLOPs on one chip."""

    cycles: int
    flops: int


def find_kernels(function: Any, arguments: Any) -> list[Kernel]:
    """The Pallas kernels of a jitted function, each once, for arguments of given shapes."""
    jaxpr = function.trace(*arguments).jaxpr.jaxpr
    found: dict[KernelKey, Kernel] = {}
    for equation in _pallas_calls(jaxpr):
        outputs = tuple(_array(v.aval) for v in equation.outvars)
        name = equation.params["name"]
        if (name, outputs) not in found:
            found[name, outputs] = _kernel(equation, name, outputs)
    return list(found.values())


def _pallas_calls(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in _inner_jaxprs(equation):
                yield from _pallas_calls(inner)


def _inner_jaxprs(equation: Any) -> Iterator[Any]:
    """Yields the jaxprs inside an equation, such as a loop's body or a call's function."""
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(value):
            yield getattr(value, "jaxpr", value)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _array(aval: Any) -> ArrayType:
    return _TYPES.get(aval.dtype.name, aval.dtype.name), tuple(aval.shape)


def _kernel(equation: Any, name: str, outputs: tuple[ArrayType, ...]) -> Kernel:
    params = equation.params

    def alone(*arrays: Any) -> Any:
        return equation.primitive.bind(*arrays, **params)

    inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    exported = jax.export.export(jax.jit(alone), platforms=["tpu"])(*inputs)
    grid = tuple(params["grid_mapping"].grid)
    semantics = getattr(params["compiler_params"], "dimension_semantics", None) or ()
    parallel = tuple("parallel" in str(s).lower() for s in semantics) or (False,) * len(grid)
    size = sum(
        _transferred(block, math.prod(grid)) for block in params["grid_mapping"].block_mappings
    )
    flops = math.prod(grid) * _product_flops(params["jaxpr"])
    return Kernel(name, outputs, grid, parallel, size, flops, exported)


def _transferred(block: Any, steps: int) -> int:
    """Bytes of an array that the turns of a grid read or write: their blocks, no more than it has.

    A block that stays between turns is one transfer; an array that is only named, not read, none.
    """
    aval = block.transformed_block_aval
    if "any" in str(getattr(aval, "memory_space", "")).lower():
        return 0
    whole = hlo.array_bytes(*_array(block.array_aval))
    part = hlo.array_bytes(_array(block.array_aval)[0], tuple(aval.inner_aval.shape))
    return min(whole, steps * part)


def _product_flops(jaxpr: Any) -> int:
    """FLOPs of the products in a jaxpr and its inner ones; a loop's body counts once."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
        total += sum(_product_flops(inner) for inner in _inner_jaxprs(equation))
    return total


_texts: dict[tuple[str, bytes], str] = {}  # the schedules so far, by chip and program


def kernel_work(kernels: list[Kernel], chip: Chip) -> dict[KernelKey, Work]:
    """Compiles kernels for a chip and gives the work of each, by name and results.

    Raises:
      ValueError: the child process failed or wrote no schedule.
    """
    new = [kernel for kernel in kernels if (chip.name, kernel.program) not in _texts]
    for kernel, text in zip(new, _schedules(new, chip) if new else [], strict=True):
        _texts[chip.name, kernel.program] = text
    found = {}
    for kernel in kernels:
        text = _texts[chip.name, kernel.program]
        compute = schedule.cycles(text, kernel.grid, kernel.steps(chip.cores))
        cycles = max(compute, kernel.transfer_cycles(chip))
        found[kernel.key] = Work(cycles, kernel.flops)
    return found


def instruction_work(one: hlo.Instruction, known: dict[KernelKey, Work]) -> Work | None:
    """The work of an instruction that calls one of the known kernels, None for others."""
    if f'custom_call_target="{TARGET}"' not in one.attributes:
        return None
    names = one.op_name.split("/")
    return next(
        (w for (name, outputs), w in known.items() if name in names and outputs == one.arrays), None
    )


def _schedules(kernels: list[Kernel], chip: Chip) -> list[str]:
    """The compiler's final schedules of kernels, from a child process."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "dump"
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        environment = {
            **os.environ,
            "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip(),
            "JAX_PLATFORMS": "cpu",
            # A cached program would write no schedule.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        task = {
            "chip": chip.name,
            "dump": str(dump),
            "kernels": [base64.b64encode(kernel.program).decode() for kernel in kernels],
        }
        child = subprocess.run(
            [sys.executable, "-m", "mdt_jax.compilers.kernels"],
            input=json.dumps(task),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            said = child.stderr.strip().splitlines()
            raise ValueError(f"compiling the Pallas kernels alone failed: {' '.join(said[-3:])}")
        names = json.loads(child.stdout.splitlines()[-1])
        return [(Path(folder) / "dump" / name).read_text() for name in names]


def _compile_each(task: dict[str, Any]) -> list[str]:
    """Compiles kernels one by one, in the child; returns the names of their schedules' files."""
    chip = topologies.CHIPS[task["chip"]]
    small = topologies.Topology(chip, (2, 2) if chip.dimensions == 2 else (2, 2, 1))
    device = SingleDeviceSharding(topologies.devices(small)[0])
    dump, names = Path(task["dump"]), []
    seen: set[Path] = set()
    for program in task["kernels"]:
        exported = jax.export.deserialize(bytearray(base64.b64decode(program)))
        arguments = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=device)
            for aval in exported.in_avals
        ]
        jax.jit(exported.call).lower(*arguments).compile()
        # Beside its kernel a program holds moves of arguments at most, which are small.
        new = {path for path in dump.glob("*-final_bundles.txt") if "schedule" not in path.name}
        if not new - seen:
            sys.exit("this libtpu wrote no final_bundles of a kernel; update jax[tpu]")
        largest = max(new - seen, key=lambda path: path.stat().st_size)
        names.append(largest.name)
        seen |= new
    return names


if __name__ == "__main__":
    print(json.dumps(_compile_each(json.load(sys.stdin))))
