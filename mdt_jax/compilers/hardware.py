"""What TPU slices and nodes of GPUs have in common: chips, in groups that lie near each other."""

from __future__ import annotations

import abc
import dataclasses
import re
from typing import Any, ClassVar

from jax.sharding import Mesh

from mdt_jax.parallel.devices import peak_flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One TPU chip or one GPU: one JAX device.

    Attributes:
      name: the short name that people type, such as "v5e" or "h100".
      device_kind: JAX's name, the key of `peak_flops`.
      hbm_bytes: the capacity of its memory in bytes.
      hbm_bandwidth: the bandwidth of its memory in bytes a second.
      calibrated: the estimates are trusted where a lone product's share of the peak is in here.
    """

    name: str
    device_kind: str
    hbm_bytes: int
    hbm_bandwidth: float
    calibrated: ClassVar[tuple[float, float]]

    @property
    def peak_flops(self) -> float:
        """The peak of dense bfloat16 products in FLOP/s."""
        return peak_flops(self.device_kind, "bfloat16")

    @property
    def usable_bytes(self) -> int:
        """The bytes of its memory that a program can have at the most."""
        return self.hbm_bytes

    def is_calibrated(self, share: float | None) -> bool:
        """Whether a lone product's share of the peak shows that the estimates can be trusted."""
        low, high = self.calibrated
        return share is not None and low <= share <= high


class Hardware(abc.ABC):
    """Groups of one kind of chip: TPU slices, or nodes of GPUs.

    Attributes:
      unit: what one chip is called in a report.
      group: what one group is called in a report.
      chip: the kind of chip.
      num_slices: the number of groups.
    """

    unit: ClassVar[str]
    group: ClassVar[str]
    chip: Accelerator
    num_slices: int

    @property
    @abc.abstractmethod
    def chips_per_slice(self) -> int:
        """The number of chips in one group."""

    @property
    def num_chips(self) -> int:
        """The number of chips in all groups."""
        return self.chips_per_slice * self.num_slices

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """Options that make the compiler write what the estimates read; None for none."""
        return None

    @abc.abstractmethod
    def create_mesh(self, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
        """The training mesh (data, fsdp, tensor) over its chips, which need not be here.

        Raises:
          ValueError: the compiler is not installed, or the sizes do not fit the chips.
        """


def split_groups(name: str, what: str, group: str, count: int | None) -> tuple[str, int]:
    """Takes "x 4 nodes" off the end of a name.

    Args:
      name: such as "h100x8 x 4 nodes" or "v5e:16x16 x 4 slices".
      what: what has the name, for messages: "gpus" or "topology".
      group: "node" or "slice".
      count: the number of groups, instead of that ending.

    Returns:
      The rest of the name in lower case, and the number of groups, 1 where none is given.

    Raises:
      ValueError: two numbers that differ, or one below 1.
    """
    text = name.strip().lower().replace("×", "x")
    several = re.fullmatch(rf"(.*?)\s*x\s*(\d+)\s*{group}s?", text)
    if several:
        text, counted = several[1], int(several[2])
        if count not in (None, counted):
            raise ValueError(f"{what} {name!r} has {counted} {group}s, num_{group}s is {count}")
        count = counted
    count = 1 if count is None else count
    if count < 1:
        raise ValueError(f"{what} {name!r}: {count} {group}s are below 1")
    return text, count
