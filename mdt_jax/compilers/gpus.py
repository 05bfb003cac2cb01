"""GPUs to compile for: the cards' figures, names of nodes, devices that need not be here."""

from __future__ import annotations

import ctypes.util
import dataclasses
import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mdt_jax.compilers.hardware import Accelerator, Hardware, split_groups
from mdt_jax.parallel import sharding

# JAX's allocator takes this share of a card's memory by default, and a program cannot have more.
DEFAULT_SHARE = 0.75
# The most that XLA_PYTHON_CLIENT_MEM_FRACTION can usefully be: CUDA, NCCL and cuDNN need the rest.
LARGEST_SHARE = 0.92
_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
_INSTALL = 'pip install "mdt_jax[gpu-compiler]" (no GPU needed)'


@dataclasses.dataclass(frozen=True)
class Card(Accelerator):
    """One GPU. Its name is such as "h100".

    Attributes:
      nvlink_bandwidth: the bytes a second that it sends to the others of its node, one direction.
      node_bandwidth: the bytes a second that it sends to other nodes, one direction.
      largest_node: the number of GPUs in the usual node.
      capability: the CUDA compute capability, such as (9, 0).
      cores: the number of streaming multiprocessors.
      lanes: the number of float32 units in each of them.
      clock_ghz: their highest clock.
      shared_bytes: shared memory of each of them; a block can have 1 KiB less.
      l2_bytes: the level-2 cache.
      in_tables: whether XLA's cost model has tables of the card.
    """

    nvlink_bandwidth: float
    node_bandwidth: float
    largest_node: int
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock_ghz: float
    shared_bytes: int
    l2_bytes: int
    in_tables: bool = True
    # A large product on cuBLAS gets 70 to 80% of a datasheet's peak; above 95% a table is wrong.
    calibrated: ClassVar[tuple[float, float]] = (0.70, 0.95)

    @property
    def usable_bytes(self) -> int:
        """The bytes that a program can have, where XLA_PYTHON_CLIENT_MEM_FRACTION is raised."""
        return round(LARGEST_SHARE * self.hbm_bytes)

    @property
    def target_config(self) -> str:
        """What the compiler is told of the card: XLA's GpuTargetConfigProto as text.

        The versions are of the CUDA toolkit that JAX is built with and the oldest cuDNN that it
        takes for attention with a bias.
        """
        major, minor = self.capability
        features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        facts = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "threads_per_core_limit": 2048,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "registers_per_core_limit": 65_536,
            "registers_per_block_limit": 65_536,
            "shared_memory_per_block": 49_152,
            "shared_memory_per_block_optin": self.shared_bytes - 1024,
            "shared_memory_per_core": self.shared_bytes,
            "core_count": self.cores,
            "fpus_per_core": self.lanes,
            "clock_rate_ghz": self.clock_ghz,
            "memory_bandwidth": round(self.hbm_bandwidth),
            "device_memory_size": self.hbm_bytes,
            "l2_cache_size": self.l2_bytes,
            "device_address_bits": 64,
        }
        texts = {
            "name": self.device_kind,
            "driver_version": "13.0.0",
            "runtime_version": "12.8.0",
            "compile_time_toolkit_version": "12.8.0",
            "dnn_version": "9.10.0",
        }
        lines = [f"  {key}: {value}" for key, value in facts.items()]
        lines += [f'  {key}: "{value}"' for key, value in texts.items()]
        capability = f"major: {major} minor: {minor} feature_extension: {features}"
        lines += [f"  cuda_compute_capability {{ {capability} }}"]
        lines += ["  device_interconnect_info { active_links: 18 }"] if major >= 9 else []
        return "\n".join(
            ("gpu_device_info {", *lines, "}", 'platform_name: "CUDA"',
             "dnn_version_info { major: 9 minor: 10 patch: 0 }",
             f'device_description_str: "{self.device_kind}"')
        )  # fmt: skip


# Memory, clocks and units are what the cards tell of themselves, as published with XLA
# (xla/backends/gpu/target_config/specs of openxla/xla). NVLink and network are half of the
# "bidirectional" figures of NVIDIA's datasheets of the cards and of DGX A100, H100, H200 and B200,
# whose nodes have one network card of 200 (A100) or 400 Gbit/s a GPU. Nodes of GB200 hold 4 GPUs,
# and NVLink joins the nodes of a rack.
CARDS = {
    card.name: card
    for card in (
        Card("a100", "NVIDIA A100-SXM4-80GB", 85_100_068_864, 2039.04e9, 300e9, 25e9, 8,
             (8, 0), 108, 64, 1.41, 167_936, 40 * 2**20, in_tables=False),
        Card("a100-40gb", "NVIDIA A100-SXM4-40GB", 42_331_013_120, 1555.2e9, 300e9, 25e9, 8,
             (8, 0), 108, 64, 1.41, 167_936, 40 * 2**20, in_tables=False),
        Card("h100", "NVIDIA H100 80GB HBM3", 84_942_979_072, 3352.32e9, 450e9, 50e9, 8,
             (9, 0), 132, 128, 1.98, 233_472, 50 * 2**20),
        Card("h200", "NVIDIA H200", 151_397_597_184, 4800e9, 450e9, 50e9, 8,
             (9, 0), 132, 128, 1.98, 233_472, 50 * 2**20),
        Card("b200", "NVIDIA B200", 191_514_411_008, 7672.32e9, 900e9, 50e9, 8,
             (10, 0), 148, 128, 1.965, 233_472, 132_644_864),
        Card("gb200", "NVIDIA GB200", 197_897_748_480, 7928.064e9, 900e9, 900e9, 4,
             (10, 0), 152, 128, 2.062, 233_472, 135_528_448, in_tables=False),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Nodes(Hardware):
    """Nodes of one kind of GPU.

    Attributes:
      chip: the kind of GPU.
      gpus_per_node: the number of GPUs in a node, joined by NVLink.
      num_slices: the number of nodes, joined by a network.
    """

    chip: Card
    gpus_per_node: int
    num_slices: int = 1
    unit: ClassVar[str] = "GPU"
    group: ClassVar[str] = "node"

    @property
    def chips_per_slice(self) -> int:
        """The number of GPUs in a node."""
        return self.gpus_per_node

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """The compiler then writes what it expects of products' and collectives' times.

        It does so for cards of which it has tables, and refuses to compile for others.
        """
        return {"xla_gpu_collect_cost_model_stats": True} if self.chip.in_tables else None

    def __str__(self) -> str:
        nodes = f" x {self.num_slices} nodes" if self.num_slices > 1 else ""
        return f"{self.chip.name}x{self.gpus_per_node}{nodes}"

    def create_mesh(self, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
        """As `Hardware` has it, and as a run on such nodes lays it: inner axes inside a node."""
        return sharding.create_mesh(data, fsdp, tensor, devices=devices(self))

    def link_bandwidth(self, group: tuple[int, ...]) -> float:
        """The bytes a second that a GPU of a group can send in a ring through the group.

        Between nodes a ring uses the network cards of all the GPUs that the group has in a node.

        Args:
          group: the numbers of the GPUs that exchange data; node by node.
        """
        held = {gpu // self.gpus_per_node for gpu in group}
        if len(held) < 2:
            return self.chip.nvlink_bandwidth
        in_a_node = len(group) / len(held)
        return min(self.chip.nvlink_bandwidth, self.chip.node_bandwidth * in_a_node)


def parse_gpus(name: str, num_nodes: int | None = None) -> Nodes:
    """The nodes of a name.

    Args:
      name: a card and the number of them in a node, such as "h100x8"; "h100" is one. It may end in
        "x 4 nodes".
      num_nodes: the number of nodes, instead of that ending.

    Raises:
      ValueError: an unknown card, more GPUs than a node has, or no node.
    """
    text, num_nodes = split_groups(name, "gpus", "node", num_nodes)
    found = re.fullmatch(r"([a-z][a-z0-9-]*?)(?:\s*x\s*(\d+))?", text)
    card = CARDS.get(found[1]) if found else None
    if card is None:
        raise ValueError(
            f"gpus {name!r}: no such card is known here; known: {', '.join(CARDS)}, with the "
            "number in a node, such as h100x8"
        )
    count = int(found[2] or 1)
    if not 1 <= count <= card.largest_node:
        raise ValueError(
            f"gpus {name!r}: a node has 1 to {card.largest_node} of {card.name}; for more give "
            f"--num_nodes, such as --gpus={card.name}x{card.largest_node} --num_nodes=4"
        )
    return Nodes(card, count, num_nodes)


def nodes_of(devices: Sequence[Any]) -> Nodes | None:
    """The nodes that devices are the GPUs of; None where they are no cards that are known here.

    GPUs of one process are taken to be in one node. Processes with one GPU each, as under SLURM,
    fill nodes of the usual size.
    """
    card = next((c for c in CARDS.values() if c.device_kind == devices[0].device_kind), None)
    if card is None or not sharding.is_gpu(devices[0]):
        return None
    held = Counter(device.process_index for device in devices)
    size = max(held.values()) if max(held.values()) > 1 else min(len(devices), card.largest_node)
    return Nodes(card, size, max(1, len(devices) // size))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def check_compiler(kernels: str = "plain") -> None:
    """Raises ValueError if the compiler for CUDA, or what it needs for these kernels, is missing.

    Args:
      kernels: `model.kernels`; "cudnn", and "auto", which chooses it, need cuDNN's library to be
        traced.
    """
    if not any(map(_is_installed, _PLUGINS)):
        raise ValueError(f"the compiler for CUDA, JAX's CUDA plugin, is not installed: {_INSTALL}")
    found = _is_installed("nvidia.cudnn") or ctypes.util.find_library("cudnn")
    if kernels in ("auto", "cudnn") and not found:
        raise ValueError(
            f"model.kernels {kernels!r} needs cuDNN's library, which is not installed: {_INSTALL}; "
            "or --config.model.kernels=plain"
        )


def devices(nodes: Nodes) -> list[Any]:
    """The devices of nodes to compile for; no GPU and no driver is needed.

    Raises:
      ValueError: the plugin is missing, or refuses the nodes.
    """
    check_compiler()
    shape = f"1x{nodes.num_slices}x{nodes.gpus_per_node}"
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=nodes.chip.target_config, topology=shape
        ).devices
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"the CUDA plugin does not make the nodes {nodes}: {said}") from None
    if len(found) != nodes.num_chips:
        raise ValueError(
            f"the CUDA plugin makes {len(found)} devices of {nodes}, which has {nodes.num_chips}"
        )
    return list(found)
