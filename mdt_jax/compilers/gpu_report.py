"""The report on a run compiled for GPUs: a floor and an estimate of its time, kept apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from mdt_jax.compilers.estimate import KINDS
from mdt_jax.compilers.gpu_estimate import GpuEstimate
from mdt_jax.compilers.gpus import DEFAULT_SHARE
from mdt_jax.compilers.hardware import GIB
from mdt_jax.compilers.programs import Program
from mdt_jax.compilers.report import CompileReport, loop_notes

_UNCONFIRMED = "of the compiler's programs and of tables; no GPU has confirmed them"


@dataclasses.dataclass(frozen=True)
class GpuReport(CompileReport):
    """A run's programs on nodes of GPUs; what figures rest on is in `gpu_estimate`."""

    table_header: ClassVar[tuple[str, ...]] = (
        "model",
        "GPUs",
        "settings",
        "GiB a GPU",
        "floor, ms a step",
        "estimate, ms",
        "exposed transfers, ms",
        "elementwise, GiB",
        "MFU, estimated",
        "days",
        "GPU-hours",
    )

    @property
    def step_seconds(self) -> float | None:
        """The estimate of a training step's time."""
        return self.mean(lambda e: e.estimated_seconds)

    @property
    def floor_seconds(self) -> float | None:
        """The floor of a training step's time."""
        return self.mean(lambda e: e.floor_seconds)

    @property
    def wire_seconds(self) -> float | None:
        """The time that a step's collectives would take one after the other."""
        return self.mean(lambda e: e.collective_seconds)

    def program_seconds(self, program: Program) -> float:
        """The estimate of the time of one run of a program."""
        return program.estimate.estimated_seconds

    def as_json(self) -> dict[str, Any]:
        """As `CompileReport` has it."""
        return super().as_json() | {
            "kernels": self.config.model.kernels,
            "needs_memory_fraction": self._needs_memory_fraction(),
            "confirmed_by_a_gpu": False,
        }

    def _step_json(self) -> dict[str, Any]:
        seconds, floor = self.step_seconds, self.floor_seconds
        return {
            "floor_seconds": floor,
            "estimated_seconds": seconds,
            "mfu_at_floor": self.mfu(floor),
            "mfu_estimated": self.mfu(seconds),
            "exposed_collective_seconds": self._kinds("seconds_by_kind")["collectives"],
            "collective_seconds": self.wire_seconds,
            "floor_seconds_by_kind": self._kinds("floor_by_kind"),
            "estimated_seconds_by_kind": self._kinds("seconds_by_kind"),
            "elementwise_bytes": self._elementwise_bytes(),
            "elementwise_bytes_by_kind": self._kinds("elementwise_bytes"),
            "compiler_flops": self.mean(lambda e: e.flops) * self.topology.num_chips,
            **self._to_the_end(seconds),
        }

    def _kinds(self, attribute: str) -> dict[str, float]:
        """The mean over the training steps of an attribute that has kinds of work."""
        known = getattr(self.steps[0].estimate, attribute)
        return {
            kind: self.mean(lambda e, kind=kind: getattr(e, attribute)[kind])
            for kind in KINDS
            if kind in known
        }

    def _elementwise_bytes(self) -> float:
        return sum(self._kinds("elementwise_bytes").values())

    def _needs_memory_fraction(self) -> float | None:
        """The share of memory that JAX's allocator must get, if the default does not suffice."""
        needed = max((p.memory.peak or 0) / self.topology.chip.hbm_bytes for p in self.programs)
        return round(needed + 0.005, 2) if self.fits and needed > DEFAULT_SHARE else None

    def _topology_line(self) -> str:
        t = self.topology
        return (
            f"gpus           {t}: {t.num_chips} of {t.chip.hbm_bytes / GIB:.1f} GiB, "
            f"{t.chip.peak_flops / 1e12:.0f} TFLOP/s, {t.chip.hbm_bandwidth / 1e12:.2f} TB/s, "
            f"NVLink {t.chip.nvlink_bandwidth / 1e9:.0f} GB/s, "
            f"network {t.chip.node_bandwidth / 1e9:.0f} GB/s"
        )

    def _work_lines(self) -> list[str]:
        t, seconds, floor = self.topology, self.step_seconds, self.floor_seconds
        lone = "none in XLA's table" if self.calibration is None else f"{self.calibration:.2f}"
        mark = "" if self.calibrated else "  UNCALIBRATED"
        compiler = self.mean(lambda e: e.flops) * t.num_chips
        bytes_ = self._kinds("elementwise_bytes")
        most = self.largest.estimate
        out = [
            f"work           {self.step_flops / 1e12:,.1f} TFLOP a step by formula, "
            f"{compiler / 1e12:,.1f} in the compiled program's products",
            f"floor          {1e3 * floor:,.1f} ms a step, MFU {self.mfu(floor):.3f}: "
            f"{_times(self._kinds('floor_by_kind'), 'all transfers, if alone,')}",
            f"estimate       {1e3 * seconds:,.1f} ms a step, MFU {self.mfu(seconds):.3f}: "
            f"{_times(self._kinds('seconds_by_kind'), 'exposed transfers')}",
            f"lone product   {lone} of the peak{mark}; floor and estimate are {_UNCONFIRMED}",
            f"elementwise    {sum(bytes_.values()) / GIB:,.2f} GiB a GPU and step, in all but "
            "products, cuDNN and transfers: "
            + _listed((kind, f"{size / GIB:,.2f}") for kind, size in bytes_.items() if size),
            self._end_line(seconds),
            "kernels        "
            + _listed((name, f"{count:,}") for name, count in sorted(most.kernels.items()))
            + " a step",
        ]
        for one in most.collectives:
            where = " across nodes" if one.across_slices else ""
            out.append(
                f"collective     {one.opcode} of {one.group}{where}: {one.count:,} a step, "
                f"{one.overlapped:,} beside other work, {one.bytes / 2**20:,.1f} MiB, "
                f"{one.wire_bytes / 2**20:,.1f} MiB sent a GPU, {1e3 * one.seconds:,.2f} ms"
            )
        return out + self._sampler_lines()

    def _notes(self, program: Program) -> list[str]:
        e: GpuEstimate | None = program.estimate
        if e is None:
            return [f"refused        {program.name}: {program.failure}"]
        out = []
        if e.untabled_flops > 0.005 * e.flops:
            out.append(
                f"not in tables  {program.name}: {100 * e.untabled_flops / e.flops:.0f}% of its "
                "FLOPs, which are at the rate of the lone product"
            )
        return out + loop_notes(program)

    def _kernel_lines(self, program: Program) -> list[str]:
        out = []
        if any(name.startswith("cuDNN") for name in program.estimate.kernels):
            out.append(
                "not counted    cuDNN's workspace: the compiler does not build its graphs without "
                "a GPU"
            )
        if (share := self._needs_memory_fraction()) is not None:
            out.append(
                f"memory         more than the {DEFAULT_SHARE:.0%} of a card that JAX takes: run "
                f"with XLA_PYTHON_CLIENT_MEM_FRACTION={share}"
            )
        return out

    def _estimate_json(self, program: Program) -> dict[str, Any]:
        e: GpuEstimate = program.estimate
        return dataclasses.asdict(e) | {
            "floor_seconds": e.floor_seconds,
            "estimated_seconds": e.estimated_seconds,
            "collective_seconds": e.collective_seconds,
        }

    def _more_settings(self) -> list[str]:
        kernels = self.config.model.kernels
        return [f"kernels {kernels}"] if kernels != "auto" else []

    def _time_cells(self) -> list[str]:
        seconds = self.step_seconds
        end = self._to_the_end(seconds)
        mark = "" if self.calibrated else " (uncalibrated)"
        return [
            f"{1e3 * self.floor_seconds:.1f}",
            f"{1e3 * seconds:.1f}",
            f"{1e3 * self._kinds('seconds_by_kind')['collectives']:.1f}",
            f"{self._elementwise_bytes() / GIB:.1f}",
            f"{self.mfu(seconds):.2f}{mark}",
            f"{end['days']:.1f}",
            f"{end['chip_hours']:,.0f}",
        ]


def _listed(pairs: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs)


def _times(seconds: dict[str, float], collectives: str) -> str:
    """Milliseconds by kind; `collectives` says what those of the transfers are."""
    names = {"collectives": collectives}
    return _listed(
        (names.get(kind, kind), f"{1e3 * s:,.1f}") for kind, s in seconds.items() if s >= 5e-5
    )
