"""TPU slices: their names as people type them, figures of their chips, devices to compile for."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from mdt_jax.compilers.hardware import GIB, Accelerator, Hardware, split_groups
from mdt_jax.parallel import sharding

# For libtpu: it shall not ask Google's metadata server, not stop another process that compiles, and
# not log at length that this machine has no TPU.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Chip(Accelerator):
    """One TPU chip: v4's and v5p's two cores together. Its name is the generation, such as "v5e".

    Attributes:
      ici_bandwidth: the bytes a second that the chip sends to all its neighbours together.
      mxu_macs: the multiply-adds in a cycle of all matrix units of all cores.
      cores: the number of TensorCores, which names such as v4-512 and v5p-32 count.
      dimensions: the number of dimensions of the torus.
      source: the page that has the figures.
    """

    ici_bandwidth: float
    mxu_macs: int
    cores: int
    dimensions: int
    source: str
    calibrated: ClassVar[tuple[float, float]] = (0.85, 1.0)

    @property
    def clock(self) -> float:
        """Cycles a second: the peak over the FLOPs that the matrix units do in one cycle."""
        return self.peak_flops / (2 * self.mxu_macs)


# Capacity, bandwidths and numbers of matrix units are from the pages' tables of "system
# architecture"; where versions of a page differ, the lower figure is here. The links' bandwidth is
# for one direction, half of a "bidirectional" figure; v4's page has none (6 links of 50 GB/s). The
# matrix units have 128 × 128 elements up to v5p, 256 × 256 in v6e. v6e's page has said both two and
# four units; two would need a clock of 3.5 GHz for the peak, and calibrate at 1.41.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 32 * GIB, 1200e9, 300e9, 2 * 4 * 128**2, 2, 3,
             "https://cloud.google.com/tpu/docs/v4"),
        Chip("v5e", "TPU v5 lite", 16 * GIB, 819e9, 200e9, 4 * 128**2, 1, 2,
             "https://cloud.google.com/tpu/docs/v5e"),
        Chip("v5p", "TPU v5", 95 * GIB, 2765e9, 600e9, 2 * 4 * 128**2, 2, 3,
             "https://cloud.google.com/tpu/docs/v5p"),
        Chip("v6e", "TPU v6 lite", 32 * GIB, 1600e9, 400e9, 4 * 256**2, 1, 2,
             "https://cloud.google.com/tpu/docs/v6e"),
    )
}  # fmt: skip
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6litepod": "v6e", "trillium": "v6e"}
# The grids of Cloud TPU's slices, by dimensions of the torus and number of chips.
_GRIDS = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
        512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology(Hardware):
    """Slices of one kind of chip.

    Attributes:
      chip: the kind of chip.
      grid: the number of chips along each dimension of a slice.
      num_slices: the number of such slices, joined by the data centre's network.
    """

    chip: Chip
    grid: tuple[int, ...]
    num_slices: int = 1
    unit: ClassVar[str] = "chip"
    group: ClassVar[str] = "slice"

    @property
    def chips_per_slice(self) -> int:
        """The number of chips in one slice."""
        return math.prod(self.grid)

    @property
    def name(self) -> str:
        """The name of one slice, such as "v5e:4x4"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.grid))}"

    def __str__(self) -> str:
        slices = f" x {self.num_slices} slices" if self.num_slices > 1 else ""
        return self.name + slices

    def create_mesh(self, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
        """As `Hardware` has it; only data crosses slices."""
        return create_topology_mesh(self, data, fsdp, tensor)


def parse_topology(name: str, num_slices: int | None = None) -> Topology:
    """The topology of a name.

    Args:
      name: "v5e:4x4", "v4:2x2x4" (grids of chips); "v4-512", "v5p-32" (TensorCores, two a chip);
        "v5litepod-16", "v5e-16", "v6e-16" (chips). Any may end in "x 4 slices".
      num_slices: the number of slices, instead of that ending.

    Raises:
      ValueError: an unknown generation, size or grid; the message lists the known ones.
    """
    text, num_slices = split_groups(name, "topology", "slice", num_slices)
    grid = re.fullmatch(r"([a-z]\w*):(\d+(?:x\d+)*)", text)
    count = re.fullmatch(r"([a-z]\w*)-(\d+)", text)
    if not grid and not count:
        raise ValueError(
            f"topology {name!r} is no name of a slice; such are v4-512, v5p-32, v5litepod-16, "
            "v6e-16, v5e:4x4, v5p:2x2x4 and v5e:16x16 x 4 slices"
        )
    generation = (grid or count)[1]
    chip = CHIPS.get(_ALIASES.get(generation, generation))
    if chip is None:
        raise ValueError(
            f"topology {name!r}: no TPU {generation} is known here; known: {', '.join(CHIPS)}"
        )
    sizes = grid[2] if grid else _grid_of(chip, name, int(count[2]))
    return Topology(chip, _check_grid(chip, name, sizes), num_slices)


def _grid_of(chip: Chip, name: str, number: int) -> str:
    """The grid of a slice, as text, by its number of cores (v4, v5p) or chips."""
    grids = _GRIDS[chip.dimensions]
    if number % chip.cores or number // chip.cores not in grids:
        known = ", ".join(f"{chip.name}-{chips * chip.cores}" for chips in grids)
        raise ValueError(
            f"topology {name!r} is no slice of {chip.name}; these are: {known}; or give its grid, "
            f"such as {chip.name}:{next(iter(grids.values()))}"
        )
    return grids[number // chip.cores]


def _check_grid(chip: Chip, name: str, sizes: str) -> tuple[int, ...]:
    grid = tuple(int(size) for size in sizes.split("x"))
    if len(grid) != chip.dimensions:
        raise ValueError(
            f"topology {name!r}: {chip.name} is a torus of {chip.dimensions} dimensions, so its "
            f"grid is such as {_GRIDS[chip.dimensions][16]}"
        )
    single = math.prod(grid) == 1
    if not single and (grid[0] % 2 or grid[1] % 2):
        raise ValueError(
            f"topology {name!r}: hosts hold 2 x 2 chips, so the two first sizes must be even"
        )
    return grid


def check_compiler() -> None:
    """Raises ValueError if the TPU's compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            'the TPU compiler, libtpu, is not installed: pip install "mdt_jax[tpu]" (no TPU needed)'
        )


def devices(topology: Topology) -> list[Any]:
    """The devices of a topology to compile for; no TPU is needed.

    Raises:
      ValueError: libtpu is missing, or does not know the topology.
    """
    check_compiler()
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # two cores as one device, as everywhere else
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    if topology.chips_per_slice == 1:
        options["chips_per_host_bounds"] = (1,) * 3
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"libtpu does not make the topology {topology}: {said}") from None
    if len(found) != topology.num_chips:
        raise ValueError(
            f"libtpu makes {len(found)} devices of {topology}, which has {topology.num_chips} chips"
        )
    return list(found)


def create_topology_mesh(
    topology: Topology, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """The training mesh (data, fsdp, tensor) over a topology; only data crosses slices.

    Raises:
      ValueError: sizes that do not multiply to the chips; an axis that would have to cross slices.
    """
    all_devices = devices(topology)
    n = topology.num_slices
    if n == 1:
        return sharding.create_mesh(data, fsdp, tensor, devices=all_devices)
    if data != -1 and data % n:
        raise ValueError(
            f"mesh.data {data} is not a multiple of the {n} slices, which only it can cross"
        )
    # Slice by slice along the data axis.
    size = topology.chips_per_slice
    within = [
        sharding.create_mesh(
            data if data == -1 else data // n,
            fsdp,
            tensor,
            devices=all_devices[k * size : (k + 1) * size],
        ).devices
        for k in range(n)
    ]
    return Mesh(np.concatenate(within), sharding.MESH_AXES)
