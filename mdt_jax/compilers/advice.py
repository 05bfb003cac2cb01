"""Settings that make a run fit a chip or GPU: what each does, and the order to try them in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ml_collections import ConfigDict

from mdt_jax.compilers.hardware import GIB
from mdt_jax.compilers.programs import Program, TrainingJob
from mdt_jax.parallel import sharding

MICROBATCHES = (2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Levers:
    """Settings that trade memory for work or communication; they change no result.

    Attributes:
      fsdp: the size of the mesh's fsdp axis.
      remat: the policy of rematerialisation, `config.model.remat`.
      accumulation_steps: the number of microbatches in a step.
    """

    fsdp: int
    remat: str
    accumulation_steps: int

    @classmethod
    def of(cls, job: TrainingJob) -> Levers:
        """The settings of a job."""
        c = job.config
        return cls(job.mesh.shape["fsdp"], c.model.remat, c.accumulation_steps)

    def apply(self, config: ConfigDict) -> ConfigDict:
        """The config with these settings; the data axis takes the other chips."""
        config = config.copy_and_resolve_references()
        config.mesh.update(data=-1, fsdp=self.fsdp)
        config.model.remat = self.remat
        config.accumulation_steps = self.accumulation_steps
        return config

    def changes(self, other: Levers) -> str:
        """The settings that differ from `other`'s, as flags of the command."""
        names = {"fsdp": "mesh.fsdp", "remat": "model.remat"}
        return " ".join(
            f"--config.{names.get(field.name, field.name)}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        )


def attempts(job: TrainingJob) -> Iterator[tuple[Levers, TrainingJob]]:
    """Yields settings that take less memory, with their jobs, those that cost least first.

    More shards come first, then recomputation, then microbatches.
    """
    levers = Levers.of(job)
    widest = widest_fsdp(job)
    if widest > levers.fsdp:
        levers = dataclasses.replace(levers, fsdp=widest)
        yield levers, TrainingJob(levers.apply(job.config), job.topology)
    for remat in ("dots", "full"):
        if levers.remat in ("none", "dots") and remat != levers.remat:
            levers = dataclasses.replace(levers, remat=remat)
            yield levers, TrainingJob(levers.apply(job.config), job.topology)
    for count in MICROBATCHES:
        if count > levers.accumulation_steps:
            levers = dataclasses.replace(levers, accumulation_steps=count)
            try:
                tried = TrainingJob(levers.apply(job.config), job.topology)
            except ValueError:  # the batch does not divide into so many parts
                return
            yield levers, tried


def widest_fsdp(job: TrainingJob) -> int:
    """The largest fsdp axis that divides both a slice's or node's chips and the model's width."""
    free = job.topology.chips_per_slice // job.mesh.shape["tensor"]
    width = job.trainer.model.hidden_size
    return max(n for n in range(1, free + 1) if free % n == 0 and width % n == 0)


def advice_lines(job: TrainingJob, refused: Program) -> list[str]:
    """Lines of advice for a program that does not fit, with figures that need no compilation."""
    chip, unit = job.topology.chip, job.topology.unit
    available = refused.memory.available or chip.usable_bytes
    lines = []
    widest = widest_fsdp(job)
    if widest > job.mesh.shape["fsdp"]:
        levers = dataclasses.replace(Levers.of(job), fsdp=widest)
        state = TrainingJob(levers.apply(job.config), job.topology).state_bytes
        lines.append(
            f"--config.mesh.fsdp={widest}: the state takes {state / GIB:.2f} GiB a {unit}, not "
            f"{job.state_bytes / GIB:.2f}, of {available / GIB:.2f}"
        )
    temporaries = refused.memory.temporaries
    if temporaries is not None and job.config.model.remat != "full":
        policy = "full" if job.config.model.remat == "dots" else "dots or full"
        lines.append(
            f"--config.model.remat={policy.split()[0]}: less of the {temporaries / GIB:.2f} GiB of "
            f"temporaries, for more work ({policy})"
        )
    n = 2 * job.config.accumulation_steps
    if job.config.batch_size % (n * job.topology.num_chips) == 0:
        lines.append(
            f"--config.accumulation_steps={n}: half of a microbatch's temporaries, the same step"
        )
    with sharding.activations(job.mesh):  # in which the step is traced
        kernels = job.trainer.model.chosen_kernels
    if unit == "GPU" and kernels == "plain":
        lines.append("--config.model.kernels=cudnn: attention's logits are not kept; in bfloat16")
    if chip.name == "v5e":
        lines.append("more chips, or v5p with 95 GiB each")
    return [*lines, "--advise compiles these in turn until one fits"]
