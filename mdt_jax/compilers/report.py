"""The report on a run compiled for TPU slices: a record in JSON, and lines for people.

The parts that a report on GPUs has too are methods of their own (`mdt_jax.compilers.gpu_report`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

from ml_collections import ConfigDict

from mdt_jax.compilers import estimate
from mdt_jax.compilers.estimate import Estimate
from mdt_jax.compilers.hardware import GIB, Hardware
from mdt_jax.compilers.programs import Memory, Program, TrainingJob
from mdt_jax.models import flops

DAY = 86_400


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """A run's programs on slices, or on nodes.

    Attributes:
      topology: the slices or nodes that the programs were compiled for.
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

    topology: Hardware
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
    table_header: ClassVar[tuple[str, ...]] = (
        "model",
        "chips",
        "settings",
        "GiB a chip",
        "ms a step + transfers",
        "MFU",
        "lone product",
        "days",
        "chip-hours",
    )

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

    def mean(self, figure: Callable[[Any], float]) -> float | None:
        """The mean of a figure of the training steps by their probabilities.

        Args:
          figure: a function from a program's estimate to the figure.

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
        return self.topology.chip.is_calibrated(self.calibration)

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
                self._program_json(program) | {"probability": probability}
                for program, probability in zip(
                    self.programs, (*self.probabilities, None), strict=False
                )
            ],
            "seconds_to_compile": sum(p.seconds_to_compile for p in self.programs),
            "advice": list(self.advice),
        }
        if self.step_seconds is not None:
            record |= self._step_json()
        if self.sampler and self.sampler.estimate:
            per_step = self.program_seconds(self.sampler)
            record["sampler_step_seconds"] = per_step
            record["samples_per_second"] = self.sample_batch / (per_step * self.sampling_steps)
        return record

    def program_seconds(self, program: Program) -> float:
        """The time of one run of a program, as the compiler expects it."""
        return program.estimate.seconds(self.topology.chip)

    def _step_json(self) -> dict[str, Any]:
        """The figures of a step's time, where every step fits."""
        seconds = self.step_seconds
        return {
            "step_seconds": seconds,
            "collective_seconds_if_exposed": self.wire_seconds,
            "mfu": self.mfu(seconds),
            "mfu_if_exposed": self.mfu(seconds + self.wire_seconds),
            "compiler_flops": self.mean(lambda e: e.flops) * self.topology.num_chips,
            "share_of_cycles": self._shares(),
            **self._to_the_end(seconds),
            "estimate_is_whole": not any(
                p.estimate.not_estimated or p.estimate.loops_counted_once for p in self.steps
            ),
        }

    def _to_the_end(self, seconds: float) -> dict[str, Any]:
        c = self.config
        return {
            "images_per_second": c.batch_size / seconds,
            "num_steps": c.num_steps,
            "days": seconds * c.num_steps / DAY,
            "chip_hours": seconds * c.num_steps / 3600 * self.topology.num_chips,
        }

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
            self._topology_line(),
            f"mesh           {mesh}",
            f"batch          {c.batch_size}, {c.batch_size // t.num_chips} a {t.unit}, in "
            f"{c.accumulation_steps} microbatch(es)",
            f"state          {self.state_bytes / GIB:.2f} GiB a {t.unit}",
            "",
            f"HBM, GiB a {t.unit:<10}arguments  outputs  in place  temporaries   code   peak  of",
        ]
        out += [_memory_line(program, t) for program in self.programs]
        out += ["", *self._work_lines()] if self.step_seconds is not None else []
        for program in self.programs:
            out += self._notes(program)
        out += self._kernel_lines(self.largest) if self.step_seconds is not None else []
        out.append(f"compiled in    {sum(p.seconds_to_compile for p in self.programs):.0f} s")
        out.append(f"verdict        {'fits' if self.fits else 'does not fit'}")
        out += [f"               {line}" for line in self.advice]
        return out

    def table_row(self) -> str:
        """The report as a line of a table in Markdown, whose columns are `table_header`."""
        c, t, peak = self.config, self.topology, self.largest.memory.peak
        settings = [f"fsdp {self.mesh['fsdp']}", f"scan_unroll {c.model.scan_unroll}"]
        settings += [f"remat {c.model.remat}"] if c.model.remat != "none" else []
        settings += self._more_settings()
        settings += [f"{c.accumulation_steps} microbatches"] if c.accumulation_steps > 1 else []
        cells = [c.model.name, str(t), ", ".join(settings)]
        cells.append(f"{(peak or 0) / GIB:.1f} of {t.chip.hbm_bytes / GIB:.0f}")
        timed = self.step_seconds is not None and self.fits
        cells += self._time_cells() if timed else ["does not fit"]
        cells += [""] * (len(self.table_header) - len(cells))
        return f"| {' | '.join(cells)} |"

    def _more_settings(self) -> list[str]:
        return []

    def _time_cells(self) -> list[str]:
        seconds = self.step_seconds
        end = self._to_the_end(seconds)
        mark = "" if self.calibrated else " (uncalibrated)"
        return [
            f"{1e3 * seconds:.0f} + {1e3 * self.wire_seconds:.0f}",
            f"{self.mfu(seconds):.2f}{mark}",
            f"{self.calibration:.2f}" if self.calibration else "",
            f"{end['days']:.1f}",
            f"{end['chip_hours']:,.0f}",
        ]

    def _topology_line(self) -> str:
        t = self.topology
        return (
            f"topology       {t}: {t.num_chips} chips of {t.chip.hbm_bytes / GIB:.0f} GiB, "
            f"{t.chip.peak_flops / 1e12:.0f} TFLOP/s, {t.chip.clock / 1e9:.2f} GHz"
        )

    def _work_lines(self) -> list[str]:
        """Lines on a step's time, on its collectives, and on the sampler."""
        t, seconds, wire = self.topology, self.step_seconds, self.wire_seconds
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
            self._end_line(seconds),
        ]  # fmt: skip
        for one in self.largest.estimate.collectives:
            where = " across slices" if one.across_slices else ""
            out.append(
                f"collective     {one.opcode} of {one.group}{where}: {one.count:,} a step, "
                f"{one.bytes / 2**20:,.1f} MiB, {one.wire_bytes / 2**20:,.1f} MiB sent a chip"
            )
        return out + self._sampler_lines()

    def _end_line(self, seconds: float) -> str:
        end = self._to_the_end(seconds)
        return (
            f"to the end     {end['days']:,.1f} days of {end['num_steps']:,} steps, "
            f"{end['chip_hours']:,.0f} {self.topology.unit}-hours, "
            f"{end['images_per_second']:,.0f} images/s"
        )

    def _sampler_lines(self) -> list[str]:
        if not (self.sampler and self.sampler.estimate):
            return []
        per_step = self.program_seconds(self.sampler)
        rate = self.sample_batch / (per_step * self.sampling_steps)
        return [
            f"sampler        {1e3 * per_step:,.1f} ms a step of {self.sample_batch} samples, "
            f"{rate:,.1f} samples/s at {self.sampling_steps} steps"
        ]

    def _notes(self, program: Program) -> list[str]:
        """Lines on what the estimates of a program lack."""
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
        return out + loop_notes(program)

    def _kernel_lines(self, program: Program) -> list[str]:
        """Lines on a program's Pallas kernels, each beside the lower bounds of its cycles."""
        chip = self.topology.chip
        return [
            f"kernel         {kernel.name} -> {kind}[{','.join(map(str, shape))}]: "
            f"{work.cycles:,} cycles; its transfers {kernel.transfer_cycles(chip):,}, "
            f"products at the peak {kernel.product_cycles(chip):,}"
            for kernel, work in program.kernels
            for kind, shape in kernel.outputs[:1]
        ]

    def _program_json(self, program: Program) -> dict[str, Any]:
        record: dict[str, Any] = {
            "name": program.name,
            "fits": program.fits,
            "memory": dataclasses.asdict(program.memory),
            "seconds_to_compile": program.seconds_to_compile,
        }
        if program.failure:
            record["failure"] = program.failure
        return record if program.estimate is None else record | self._estimate_json(program)

    def _estimate_json(self, program: Program) -> dict[str, Any]:
        """A program's estimate as plain values."""
        e: Estimate = program.estimate
        chip = self.topology.chip
        return {
            "cycles": e.cycles,
            "cycles_by_kind": e.by_kind,
            "seconds": e.seconds(chip),
            "flops_per_chip": e.flops,
            "collectives": [dataclasses.asdict(one) for one in e.collectives],
            "not_estimated_bytes": e.not_estimated,
            "loops_counted_once": list(e.loops_counted_once),
            "kernels": [
                {
                    "name": kernel.name,
                    "output": kernel.outputs[0],
                    "cycles": work.cycles,
                    "transfer_cycles": kernel.transfer_cycles(chip),
                    "product_cycles": kernel.product_cycles(chip),
                }
                for kernel, work in program.kernels
            ],
        }


def create_report(
    job: TrainingJob,
    steps: tuple[Program, ...],
    probabilities: tuple[float, ...],
    kind: type[CompileReport] = CompileReport,
    **more: Any,
) -> CompileReport:
    """The report of a kind on a job's programs; `more` are the other attributes of the report."""
    return kind(
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


def _memory_line(program: Program, topology: Hardware) -> str:
    m: Memory = program.memory
    limit = topology.chip.hbm_bytes if m.available is None else m.available
    return (
        f"  {program.name:<18} {_gib(m.arguments):>9} {_gib(m.outputs):>8} {_gib(m.aliased):>9} "
        f"{_gib(m.temporaries):>12} {_gib(m.code):>6} {_gib(m.peak):>6}  {_gib(limit)}"
    )


def loop_notes(program: Program) -> list[str]:
    """A line on the loops of a step whose turns the program's text does not tell."""
    if not program.estimate.loops_counted_once or program.name == "sampler":
        return []
    loops = ", ".join(program.estimate.loops_counted_once)
    return [f"counted once   {program.name}: loops of unknown length {loops}"]
