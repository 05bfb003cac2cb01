"""The report on a run compiled for a topology: a record in JSON, and lines for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mdt_jax.compilers import estimate
from mdt_jax.compilers.estimate import Estimate
from mdt_jax.compilers.programs import Memory, Program, TrainingJob
from mdt_jax.compilers.topologies import GIB, Topology
from mdt_jax.models import flops

CALIBRATED = (0.85, 1.0)  # estimates are trusted where a lone product's share of peak is in here
_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """A run's programs on a topology.

    Attributes:
      topology: the slices that the programs were compiled for.
      config: the run's settings.
      mesh: the sizes of the mesh's axes.
      steps: the training step for each number of kept tokens.
      probabilities: the share of training steps that each of them runs.
      sampler: the sampler's step, None if not asked for.
      step_flops: the model FLOPs of a step by formula, at the mean number of kept tokens.
      state_bytes: the bytes of parameters, optimiser and averages on one chip.
      calibration: a lone product's share of the peak by the same estimates, None if not asked for.
      sample_batch: the number of samples in a batch of the sampler.
      sampling_steps: the number of the sampler's steps in a run.
      advice: settings that would make the run fit, if it does not.
    """

    topology: Topology
    config: ConfigDict
    mesh: dict[str, int]
    steps: tuple[Program, ...]
    probabilities: tuple[float, ...]
    sampler: Program | None
    step_flops: float
    state_bytes: int
    calibration: float | None
    sample_batch: int = 0
    sampling_steps: int = 1
    advice: tuple[str, ...] = ()

    @property
    def programs(self) -> tuple[Program, ...]:
        """All programs: the training steps and the sampler's."""
        return self.steps + ((self.sampler,) if self.sampler else ())

    @property
    def fits(self) -> bool:
        """Whether every program fits the chip's HBM."""
        return all(program.fits for program in self.programs)

    @property
    def largest(self) -> Program:
        """The training step with the highest peak of memory; one that does not fit comes first."""
        return max(self.steps, key=lambda p: (not p.fits, p.memory.peak or 0))

    def mean(self, figure: Callable[[Estimate], float]) -> float | None:
        """The mean of a figure of the training steps by their probabilities.

        Args:
          figure: a function from an `Estimate` to the figure.

        Returns:
          The mean, None if a step does not fit.
        """
        if any(program.estimate is None for program in self.steps):
            return None
        values = [figure(program.estimate) for program in self.steps]
        return sum(p * v for p, v in zip(self.probabilities, values, strict=True))

    @property
    def step_seconds(self) -> float | None:
        """The time of a training step's work on the core, as the compiler expects it."""
        return self.mean(lambda e: e.seconds(self.topology.chip))

    @property
    def wire_seconds(self) -> float | None:
        """The time that a step's collectives add by bandwidth, if no work hides any of them."""
        return self.mean(lambda e: e.wire_seconds(self.topology.chip))

    def mfu(self, seconds: float) -> float:
        """The model FLOPs utilisation of steps that take so many seconds."""
        peak = self.topology.num_chips * self.topology.chip.peak_flops
        return self.step_flops / seconds / peak

    @property
    def calibrated(self) -> bool:
        """Whether a lone product shows that the estimates can be trusted."""
        return is_calibrated(self.calibration)

    def as_json(self) -> dict[str, Any]:
        """The whole report as plain values: bytes on one chip, times in seconds."""
        chip, c = self.topology.chip, self.config
        record: dict[str, Any] = {
            "model": c.model.name,
            "topology": str(self.topology),
            "chips": self.topology.num_chips,
            "mesh": self.mesh,
            "batch_size": c.batch_size,
            "accumulation_steps": c.accumulation_steps,
            "remat": c.model.remat,
            "scan_unroll": c.model.scan_unroll,
            "fits": self.fits,
            "hbm_bytes": chip.hbm_bytes,
            "state_bytes": self.state_bytes,
            "step_flops": self.step_flops,
            "calibration": self.calibration,
            "calibrated": self.calibrated,
            "programs": [
                _program_json(program, self.topology) | {"probability": probability}
                for program, probability in zip(
                    self.programs, (*self.probabilities, None), strict=False
                )
            ],
            "seconds_to_compile": sum(p.seconds_to_compile for p in self.programs),
            "advice": list(self.advice),
        }
        if (seconds := self.step_seconds) is not None:
            exposed = seconds + self.wire_seconds
            record |= {
                "step_seconds": seconds,
                "collective_seconds_if_exposed": self.wire_seconds,
                "mfu": self.mfu(seconds),
                "mfu_if_exposed": self.mfu(exposed),
                "compiler_flops": self.mean(lambda e: e.flops) * self.topology.num_chips,
                "share_of_cycles": self._shares(),
                "images_per_second": c.batch_size / seconds,
                "num_steps": c.num_steps,
                "days": seconds * c.num_steps / _DAY,
                "chip_hours": seconds * c.num_steps / 3600 * self.topology.num_chips,
                "estimate_is_whole": not any(
                    p.estimate.not_estimated or p.estimate.loops_counted_once for p in self.steps
                ),
            }
        if self.sampler and self.sampler.estimate:
            per_step = self.sampler.estimate.seconds(chip)
            record["sampler_step_seconds"] = per_step
            record["samples_per_second"] = self.sample_batch / (per_step * self.sampling_steps)
        return record

    def _shares(self) -> dict[str, float]:
        total = self.mean(lambda e: e.cycles)
        return {
            kind: self.mean(lambda e: e.by_kind[kind]) / total  # noqa: B023 - called at once
            for kind in estimate.KINDS
        }

    def lines(self) -> list[str]:
        """The report as lines for people."""
        t, c = self.topology, self.config
        mesh = " × ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        out = [
            f"model          {c.model.name}, {c.model.dtype}, remat {c.model.remat}",
            f"topology       {t}: {t.num_chips} chips of {t.chip.hbm_bytes / GIB:.0f} GiB, "
            f"{t.chip.peak_flops / 1e12:.0f} TFLOP/s, {t.chip.clock / 1e9:.2f} GHz",
            f"mesh           {mesh}",
            f"batch          {c.batch_size}, {c.batch_size // t.num_chips} a chip, in "
            f"{c.accumulation_steps} microbatch(es)",
            f"state          {self.state_bytes / GIB:.2f} GiB a chip",
            "",
            "HBM, GiB a chip      arguments  outputs  in place  temporaries   code   peak  of",
        ]
        out += [_memory_line(program, t) for program in self.programs]
        out += ["", *self._work_lines()] if self.step_seconds is not None else []
        for program in self.programs:
            out += _notes(program)
        out += _kernel_lines(self.largest, t) if self.step_seconds is not None else []
        out.append(f"compiled in    {sum(p.seconds_to_compile for p in self.programs):.0f} s")
        out.append(f"verdict        {'fits' if self.fits else 'does not fit'}")
        out += [f"               {line}" for line in self.advice]
        return out

    def _work_lines(self) -> list[str]:
        t, c, seconds, wire = self.topology, self.config, self.step_seconds, self.wire_seconds
        compiler = self.mean(lambda e: e.flops) * t.num_chips
        mark = "" if self.calibrated else "  UNCALIBRATED"
        lone = "not asked for" if self.calibration is None else f"{self.calibration:.2f}"
        out = [
            f"work           {self.step_flops / 1e12:,.1f} TFLOP a step by formula, "
            f"{compiler / 1e12:,.1f} in the compiled program's products",
            f"step           {1e3 * seconds:,.1f} ms by the compiler's cycles; collectives, if "
            f"nothing hid them, {1e3 * wire:,.1f} ms more",
            f"MFU            {self.mfu(seconds):.3f}, {self.mfu(seconds + wire):.3f} with them; "
            f"a lone product: {lone}{mark}",
            "cycles         "
            + ", ".join(f"{kind} {100 * share:.1f}%" for kind, share in self._shares().items()
                        if share >= 5e-4),
            f"to the end     {seconds * c.num_steps / _DAY:,.1f} days of {c.num_steps:,} steps, "
            f"{seconds * c.num_steps / 3600 * t.num_chips:,.0f} chip-hours, "
            f"{c.batch_size / seconds:,.0f} images/s",
        ]  # fmt: skip
        for one in self.largest.estimate.collectives:
            where = " across slices" if one.across_slices else ""
            out.append(
                f"collective     {one.opcode} of {one.group}{where}: {one.count:,} a step, "
                f"{one.bytes / 2**20:,.1f} MiB, {one.wire_bytes / 2**20:,.1f} MiB sent a chip"
            )
        if self.sampler and self.sampler.estimate:
            per_step = self.sampler.estimate.seconds(t.chip)
            rate = self.sample_batch / (per_step * self.sampling_steps)
            out.append(
                f"sampler        {1e3 * per_step:,.1f} ms a step of {self.sample_batch} samples, "
                f"{rate:,.1f} samples/s at {self.sampling_steps} steps"
            )
        return out


def is_calibrated(share: float | None) -> bool:
    """Whether a lone product's share of the peak shows that the estimates can be trusted."""
    low, high = CALIBRATED
    return share is not None and low <= share <= high


def create_report(job: TrainingJob, steps: tuple[Program, ...], probabilities: tuple[float, ...],
                  **more: Any) -> CompileReport:  # fmt: skip
    """The report on a job's programs; `more` are the other attributes of `CompileReport`."""
    return CompileReport(
        topology=job.topology,
        config=job.config,
        mesh=dict(job.mesh.shape),
        steps=steps,
        probabilities=probabilities,
        step_flops=step_flops(job),
        state_bytes=job.state_bytes,
        sampling_steps=job.sampling_steps,
        **more,
    )


def step_flops(job: TrainingJob) -> float:
    """The model FLOPs of a training step by formula, averaged over the numbers of kept tokens."""
    size, model = job.config.batch_size, job.trainer.model
    return math.fsum(
        probability * flops.train_step_flops(model, size, None if count is None else float(count))
        for count, probability in job.kept_tokens.programs.items()
    )


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f}"


def _memory_line(program: Program, topology: Topology) -> str:
    m: Memory = program.memory
    limit = topology.chip.hbm_bytes if m.available is None else m.available
    return (
        f"  {program.name:<18} {_gib(m.arguments):>9} {_gib(m.outputs):>8} {_gib(m.aliased):>9} "
        f"{_gib(m.temporaries):>12} {_gib(m.code):>6} {_gib(m.peak):>6}  {_gib(limit)}"
    )


def _notes(program: Program) -> list[str]:
    if program.failure:
        return [f"refused        {program.name}: {program.failure}"]
    if program.estimate is None:
        return []
    out = []
    if program.estimate.not_estimated:
        told = ", ".join(
            f"{name} ({size / 2**20:,.1f} MiB written)"
            for name, size in list(program.estimate.not_estimated.items())[:5]
        )
        out.append(f"not estimated  {program.name}: {told}")
    if program.estimate.loops_counted_once and program.name != "sampler":
        loops = ", ".join(program.estimate.loops_counted_once)
        out.append(f"counted once   {program.name}: loops of unknown length {loops}")
    return out


def _kernel_lines(program: Program, topology: Topology) -> list[str]:
    """Lines on a program's Pallas kernels, each beside the lower bounds of its cycles."""
    chip = topology.chip
    return [
        f"kernel         {kernel.name} -> {kind}[{','.join(map(str, shape))}]: {work.cycles:,} "
        f"cycles; its transfers {kernel.transfer_cycles(chip):,}, "
        f"products at the peak {kernel.product_cycles(chip):,}"
        for kernel, work in program.kernels
        for kind, shape in kernel.outputs[:1]
    ]


def _program_json(program: Program, topology: Topology) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": program.name,
        "fits": program.fits,
        "memory": dataclasses.asdict(program.memory),
        "seconds_to_compile": program.seconds_to_compile,
    }
    if program.failure:
        record["failure"] = program.failure
    if program.estimate is not None:
        e = program.estimate
        record |= {
            "cycles": e.cycles,
            "cycles_by_kind": e.by_kind,
            "seconds": e.seconds(topology.chip),
            "flops_per_chip": e.flops,
            "collectives": [dataclasses.asdict(one) for one in e.collectives],
            "not_estimated_bytes": e.not_estimated,
            "loops_counted_once": list(e.loops_counted_once),
            "kernels": [
                {
                    "name": kernel.name,
                    "output": kernel.outputs[0],
                    "cycles": work.cycles,
                    "transfer_cycles": kernel.transfer_cycles(topology.chip),
                    "product_cycles": kernel.product_cycles(topology.chip),
                }
                for kernel, work in program.kernels
            ],
        }
    return record
