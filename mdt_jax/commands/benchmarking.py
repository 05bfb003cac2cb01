"""Times a run's programs on this machine, by turns if they are compared, and records it."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import sampling
from mdt_jax.compilers import gpus
from mdt_jax.compilers.gpu_estimate import GpuEstimate
from mdt_jax.compilers.hardware import GIB
from mdt_jax.compilers.programs import Memory, estimate_here
from mdt_jax.models import flops
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.latent_space import LatentSpace
from mdt_jax.parallel import sharding
from mdt_jax.parallel.devices import device_memory, mfu
from mdt_jax.parallel.host_memory import keep_memory
from mdt_jax.training.run import Run
from mdt_jax.weights.autoencoder import Autoencoder

# XLA's names of x86's vector instructions, the widest first, and Linux's names of the features.
# Further ones (AVX512_BF16, AMX) are for dtypes that a CPU does not compute in here.
_INSTRUCTION_SETS = {"AVX512": "avx512f", "AVX2": "avx2", "AVX": "avx", "SSE4_2": "sse4_2"}
VERSIONED = ("mdt-jax", "jax", "jaxlib", "flax", "numpy", "torch")


@dataclasses.dataclass(frozen=True)
class Workload:
    """A compiled program to be timed.

    Attributes:
      name: a name for people.
      images: the number of images that one call takes or makes.
      call: runs the program once and waits for the devices.
      compile_seconds: the time of tracing and compiling.
      model_flops: the FLOPs of one call by formula, None where there is no formula.
      program_bytes: a device's memory for the program and its arguments, as the compiler says;
        None if unknown.
      expected: what `tools/compile_gpu.py` would say of the program, None but of steps on GPUs.
    """

    name: str
    images: int
    call: Callable[[], Any]
    compile_seconds: float
    model_flops: float | None = None
    program_bytes: int | None = None
    expected: GpuEstimate | None = None


class Workloads:
    """The programs of a run, the same as `mdt_jax.train` and `mdt_jax.sample` run.

    Attributes:
      run: the training run.
      batch: random images and labels for its steps, on the devices.

    Raises:
      ValueError: settings that cannot work.
    """

    def __init__(self, config: ConfigDict):
        self.run = Run(config, "")
        self._size = config.batch_size
        rng = np.random.default_rng(0)
        model = self.run.model
        images = rng.standard_normal((self._size, *model.image_shape)).astype(np.float32)
        labels = rng.integers(0, max(model.num_classes, 1), self._size).astype(np.int32)
        self.batch = jax.device_put(
            {"image": images, "label": labels}, sharding.batch_sharding(self.run.mesh)
        )

    @property
    def num_kept(self) -> int | None:
        """The number of kept tokens nearest to a run's mean; None without a masked pass."""
        return self.run.kept_tokens.nearest_to_mean

    def compile_step(self, num_kept: int | None) -> tuple[Any, float, float]:
        """The compiled training step, the seconds of tracing it, and those of compiling it."""
        began = time.perf_counter()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.batch
        )
        lowered = self.run.trainer.jit_step(num_kept).lower(self.run.abstract, shapes)
        traced = time.perf_counter()
        # On a GPU the compiler also writes what it expects of the same program's times.
        nodes = gpus.nodes_of(list(self.run.mesh.devices.flat))
        compiled = lowered.compile(nodes and nodes.compiler_options)
        return compiled, traced - began, time.perf_counter() - traced

    def train_step(self) -> Workload:
        """A training step for `num_kept` tokens: full and masked pass, optimiser and EMA."""
        run, kept = self.run, self.num_kept
        compiled, tracing, compiling = self.compile_step(kept)
        memory = Memory.of(compiled)
        keep_memory(memory.temporaries)
        state = run.trainer.create_state()

        def call() -> None:
            nonlocal state
            state, values = compiled(state, self.batch)
            jax.block_until_ready((state, values))

        return Workload(
            "train step" if kept is None else f"train step, {kept} kept",
            self._size,
            call,
            tracing + compiling,
            flops.train_step_flops(run.model, self._size, kept),
            memory.peak,
            estimate_here(compiled, run.mesh),
        )

    def forward(self) -> Workload:
        """The network's full pass alone."""
        run = self.run
        batch = sharding.batch_sharding(run.mesh)

        def apply(params: Any, x: jax.Array, t: jax.Array, labels: jax.Array) -> Any:
            with sharding.activations(run.mesh):
                return run.model.apply({"params": params}, x, t, labels)

        params = run.trainer.create_parameters()
        t = jax.device_put(np.linspace(0, 999, self._size).astype(np.int32), batch)
        inputs = (params, self.batch["image"], t, self.batch["label"])
        began = time.perf_counter()
        shardings = (jax.tree.map(lambda p: p.sharding, params), batch, batch, batch)
        jitted = jax.jit(apply, in_shardings=shardings, out_shardings=batch)
        compiled = jitted.lower(*inputs).compile()
        seconds = time.perf_counter() - began
        memory = Memory.of(compiled)
        keep_memory(memory.temporaries)
        return Workload(
            "forward pass",
            self._size,
            lambda: jax.block_until_ready(compiled(*inputs)),
            seconds,
            2.0 * flops.forward_macs(run.model) * self._size,
            memory.peak,
        )

    def sampling(
        self,
        batch_size: int,
        steps: int | str | None = None,
        autoencoder: Autoencoder | None = None,
    ) -> Workload:
        """Sampling one batch from noise to latents, or to pixels with an autoencoder.

        Args:
          batch_size: the number of samples over all devices.
          steps: the sampler's steps; by default the config's, like its other options.
          autoencoder: decodes the latents, if given.
        """
        model = sampling.DiffusionModel.from_config(self.run.config)
        options = sampling.resolve_options(model, steps=steps)
        size = sampling.global_batch_size(batch_size, batch_size, self.run.mesh)
        params = self.run.trainer.create_parameters()
        labels = sampling.resolve_labels(model, None, size)

        began = time.perf_counter()
        sampler = sampling.CompiledSampler(model, self.run.mesh, size, options)
        sampler.warm_up(params)
        if autoencoder:
            autoencoder.decode(np.zeros(sampler.shape, np.float32), size)
        seconds = time.perf_counter() - began

        def call() -> np.ndarray:
            samples = sampler(params, labels, jax.random.key(0))
            return autoencoder.decode(samples, size) if autoencoder else samples

        what = f"{options.sampler}, {sampler.num_steps} steps, guidance {options.cfg_scale:g}"
        passes = (2 if options.cfg_scale != 1 else 1) * (2 if options.sampler == "heun" else 1)
        work = 2.0 * flops.forward_macs(model.network) * size * sampler.num_steps * passes
        return Workload(
            f"sampling, {what}{', decoded' if autoencoder else ''}",
            size,
            call,
            seconds,
            # The formula knows neither steps outside a guidance interval nor an autoencoder's work.
            None if options.cfg_interval or autoencoder else work,
        )


def random_autoencoder(mesh: jax.sharding.Mesh, dtype: Any) -> Autoencoder:
    """Stable Diffusion's autoencoder with random weights: as fast as the published one."""
    module = AutoencoderKL(dtype=dtype)
    side = module.downsampling
    images = jnp.zeros((1, side, side, module.in_channels))
    params = jax.jit(module.init, out_shardings=sharding.replicated(mesh))(
        jax.random.key(0), images
    )["params"]
    return Autoencoder(module, params, LatentSpace(autoencoder="random"), mesh)


def time_by_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Times calls by turns.

    Every round runs all calls, every other round in the opposite order, so that other work of the
    machine slows all of them alike: ratios within a round can be trusted even where times vary. If
    there are several calls, each runs twice in its turn and the second run counts. Its first run
    pays for what the other calls left behind (a virtual machine may hand idle memory back to its
    host), which is no cost of a step that follows a step.

    Args:
      calls: the calls by name.
      rounds: how often each is timed.
      warm_up: how often each is called before the first round.

    Returns:
      The seconds of each call in each round.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            if len(calls) > 1:
                calls[name]()
            began = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(others: list[float], ours: list[float]) -> float:
    """The median over rounds of the ratio other / ours; above 1 ours was faster."""
    return statistics.median(a / b for a, b in zip(others, ours, strict=True))


def record(workload: Workload, seconds: list[float], run: Run) -> dict[str, Any]:
    """A workload's times, throughput and share of the devices' peak (None where unknown)."""
    median = statistics.median(seconds)
    work = workload.model_flops
    used = None
    if work is not None:
        dtype = np.dtype(run.model.dtype).name
        kind = run.mesh.devices.flat[0].device_kind
        used = mfu(work, median, run.mesh.size, kind, dtype)
    return {
        "name": workload.name,
        "images": workload.images,
        "seconds": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "repeats": len(seconds),
        "images_per_second": workload.images / median,
        "model_flops": work,
        "model_flops_per_second": work and work / median,
        "mfu": used,
        "compile_seconds": workload.compile_seconds,
        "program_bytes": workload.program_bytes,
        **device_memory(),
        **_expectation(workload.expected),
    }


def _expectation(expected: GpuEstimate | None) -> dict[str, float]:
    if expected is None:
        return {}
    return {
        "floor_seconds": expected.floor_seconds,
        "estimated_seconds": expected.estimated_seconds,
        "elementwise_bytes": sum(expected.elementwise_bytes.values()),
    }


def expectation_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What was measured beside what the compiled program lets expect, of each row that has both."""
    lines = []
    for row in rows:
        if "estimated_seconds" not in row:
            continue
        estimate, floor = row["estimated_seconds"], row["floor_seconds"]
        line = (
            f"{row['name']}: measured {1e3 * row['seconds']:,.1f} ms, estimated "
            f"{1e3 * estimate:,.1f} ms (measured / estimated {row['seconds'] / estimate:.2f}), "
            f"floor {1e3 * floor:,.1f} ms"
        )
        peak, program = row.get("device_memory_peak_bytes"), row["program_bytes"]
        if peak is not None and program is not None:
            line += (
                f"; memory at most {peak / GIB:.2f} GiB so far, the program {program / GIB:.2f} GiB"
            )
        lines.append(line)
    return lines


def describe_machine() -> dict[str, Any]:
    """The date, devices, processor, versions and load of this machine, for a record."""
    devices = jax.devices()
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "processor": processor_name(),
        "instruction_set": instruction_set(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": versions,
    }


def processor_name() -> str:
    """The processor's name as Linux knows it, else its architecture."""
    return _cpuinfo("model name") or platform.machine()


def instruction_set(
    flags: str | None = None, environment: Mapping[str, str] = os.environ
) -> str | None:
    """The widest vector instructions in XLA's CPU programs here, by XLA's name; None if unknown.

    Those of the processor, or fewer if --xla_cpu_max_isa in XLA_FLAGS says so.

    Args:
      flags: the processor's features as Linux names them; this one's by default.
      environment: the environment variables.
    """
    features = (_cpuinfo("flags") if flags is None else flags).split()
    known = [name for name, feature in _INSTRUCTION_SETS.items() if feature in features]
    asked = re.findall(r"--xla_cpu_max_isa=(\w+)", environment.get("XLA_FLAGS", ""))
    names = list(_INSTRUCTION_SETS)
    if asked and (most := asked[-1].upper()) in names:
        known = [name for name in known if names.index(name) >= names.index(most)]
    return next(iter(known), None)


def _cpuinfo(field: str) -> str:
    """The first value of a field of /proc/cpuinfo; "" if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith(field)), "")


def results_table(rows: list[dict[str, Any]]) -> str:
    """The results of `record` as a table in Markdown."""
    header = ("", "images", "median", "images/s", "TFLOP/s", "MFU", "compile", "memory")
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        rate, used, size = row["model_flops_per_second"], row["mfu"], row["program_bytes"]
        cells = (
            row["name"],
            f"{row['images']:,}",
            f"{row['seconds']:.3g} s",
            f"{row['images_per_second']:,.3g}",
            "" if rate is None else f"{rate / 1e12:,.3g}",
            "" if used is None else f"{used:.1%}",
            f"{row['compile_seconds']:.0f} s",
            "" if size is None else f"{size / 2**30:.2f} GiB",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
