"""Compiles a run's own step and its sampler's for chips that are not there, and measures them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax import config as config_lib
from mdt_jax import sampling
from mdt_jax.compilers import estimate, gpu_estimate, gpus, kernels
from mdt_jax.compilers.estimate import Estimate
from mdt_jax.compilers.gpu_estimate import GpuEstimate, LoneProducts
from mdt_jax.compilers.gpus import Card, Nodes
from mdt_jax.compilers.hardware import Hardware
from mdt_jax.compilers.kernels import Kernel, Work
from mdt_jax.compilers.topologies import Topology
from mdt_jax.parallel import sharding
from mdt_jax.training.run import create_trainer
from mdt_jax.training.step import Trainer

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = r"([\d.]+)([KMGT]?)B?"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one chip or GPU; None where a failed compilation does not tell.

    Attributes:
      arguments: the program's arguments: the state and the batch, or parameters and samples.
      outputs: the results, those in the place of arguments included.
      aliased: the part of the results that takes the place of arguments.
      temporaries: the buffers that exist only while the program runs.
      code: the program itself.
      peak: the most that all of them take at once.
      available: the memory that the compiler may use, told by a failed compilation alone.
    """

    arguments: int | None = None
    outputs: int | None = None
    aliased: int | None = None
    temporaries: int | None = None
    code: int | None = None
    peak: int | None = None
    available: int | None = None

    @classmethod
    def of(cls, compiled: Any) -> Memory:
        """The memory of a compiled program, from its `memory_analysis`."""
        m = compiled.memory_analysis()
        parts = {
            "arguments": m.argument_size_in_bytes,
            "outputs": m.output_size_in_bytes,
            "aliased": m.alias_size_in_bytes,
            "temporaries": m.temp_size_in_bytes,
            "code": m.generated_code_size_in_bytes,
        }
        return cls(**parts, peak=sum(parts.values()) - 2 * parts["aliased"])

    @classmethod
    def of_failure(cls, message: str, arguments: int) -> Memory:
        """The memory in the compiler's message about a program that does not fit.

        Args:
          message: the compiler's error.
          arguments: the size of the program's arguments, known without compiling.
        """

        def amount(*patterns: str) -> int | None:
            for pattern in patterns:
                if found := re.search(pattern, message):
                    return round(float(found[1]) * _UNITS[found[2]])
            return None

        temporaries = amount(
            rf"HLO temporaries \({_AMOUNT}\)", rf"HLO temp\s+{_AMOUNT}", rf"program\s+{_AMOUNT}"
        )
        used = amount(rf"Used {_AMOUNT} of")
        return cls(
            arguments=arguments,
            temporaries=temporaries,
            peak=arguments + (temporaries or 0) if used is None else used,
            available=amount(
                rf"available HBM \({_AMOUNT}\)", rf"Used [\d.]+[KMGT]?B? of {_AMOUNT}"
            ),
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that was compiled, or that the compiler refused for lack of memory.

    Attributes:
      name: a name for people, such as "step, 144 kept".
      fits: whether the compiler accepted it and it fits the chip's memory.
      memory: the HBM that it takes.
      estimate: its work, None if the compiler refused it.
      seconds_to_compile: the time of its compilation on this machine.
      failure: the compiler's message, if it refused the program.
      kernels: its Pallas kernels, each with its work.
    """

    name: str
    fits: bool
    memory: Memory
    estimate: Estimate | GpuEstimate | None
    seconds_to_compile: float
    failure: str = ""
    kernels: tuple[tuple[Kernel, Work], ...] = ()


def compile_program(name: str, function: Any, arguments: Any, topology: Hardware) -> Program:
    """Compiles a jitted function for slices or nodes and estimates its memory and work.

    Args:
      name: the program's name, for people.
      function: the jitted function.
      arguments: its arguments as trees of jax.ShapeDtypeStruct with shardings.
      topology: the slices or nodes that the shardings are made of.
    """
    lowered = function.lower(*arguments)
    began = time.perf_counter()
    try:
        compiled = lowered.compile(topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(str(error)):
            raise
        seconds = time.perf_counter() - began
        failure = " ".join(str(error).split("\n\n")[0].split())
        memory = Memory.of_failure(str(error), sharding.bytes_per_device(arguments))
        return Program(name, False, memory, None, seconds, failure)
    seconds = time.perf_counter() - began
    memory = Memory.of(compiled)
    fits = memory.peak <= topology.chip.usable_bytes
    if isinstance(topology, Nodes):
        work: Any = _gpu_estimate(compiled.as_text(), topology)
        return Program(name, fits, memory, work, seconds)
    several = topology.chips_per_slice if topology.num_slices > 1 else None
    found = kernels.find_kernels(function, arguments)
    known = kernels.kernel_work(found, topology.chip)
    work = estimate.estimate_program(compiled.as_text(), several, known)
    each = tuple((kernel, known[kernel.key]) for kernel in found)
    return Program(name, fits, memory, work, seconds, kernels=each)


def _gpu_estimate(text: str, nodes: Nodes) -> GpuEstimate:
    lone = lone_products(nodes.chip, gpu_estimate.product_shapes(text))
    return gpu_estimate.estimate_program(text, nodes, lone)


def estimate_here(compiled: Any, mesh: Mesh) -> GpuEstimate | None:
    """The estimate of a program for the GPUs of a mesh that are here, to set beside what it takes.

    Args:
      compiled: the program, compiled with the nodes' `compiler_options`, which `gpus.nodes_of` has.
      mesh: its devices.

    Returns:
      None if they are no GPUs whose figures are known.
    """
    nodes = gpus.nodes_of(list(mesh.devices.flat))
    if nodes is None:
        return None
    try:
        return _gpu_estimate(compiled.as_text(), nodes)
    except (ValueError, jax.errors.JaxRuntimeError) as error:  # a measurement goes on without it
        logging.warning("no estimate of the program: %s", " ".join(str(error).split()))
        return None


_lone: dict[str, dict[gpu_estimate.Product, float | None]] = {}  # seconds so far, by card


def lone_products(card: Card, shapes: Iterable[gpu_estimate.Product] = ()) -> LoneProducts:
    """Asks the compiler for the times of products of bfloat16 alone.

    Args:
      card: the GPU.
      shapes: their (batch, M, N, K); that of the rate is added.
    """
    known, one = _lone.setdefault(card.name, {}), Nodes(card, 1)
    new = [shape for shape in sorted({*shapes, gpu_estimate.LONE}) if shape not in known]
    if new and card.in_tables:
        whole = sharding.replicated(one.create_mesh())

        def products(*operands: jax.Array) -> list[jax.Array]:
            pairs = zip(operands[::2], operands[1::2], strict=True)
            return [jnp.matmul(left, right) for left, right in pairs]

        arguments = []
        for batch, m, n, k in new:
            stack = () if batch == 1 else (batch,)
            for sides in ((m, k), (k, n)):
                side = jax.ShapeDtypeStruct((*stack, *sides), jnp.bfloat16, sharding=whole)
                arguments.append(side)
        lowered = jax.jit(products, out_shardings=whole).lower(*arguments)
        text = lowered.compile(one.compiler_options).as_text()
        known |= dict.fromkeys(new) | gpu_estimate.table_seconds(text)
    return LoneProducts.of(card, {k: v for k, v in known.items() if v is not None})


def is_out_of_memory(message: str) -> bool:
    """Whether a compiler's error says that HBM does not suffice."""
    return "RESOURCE_EXHAUSTED" in message and "hbm" in message.lower()


class TrainingJob:
    """A run on slices or nodes: its trainer, and the programs to compile.

    Args:
      config: the run's settings; `model.dtype` "auto" is bfloat16, as on a TPU or GPU.
      topology: the slices or nodes to compile for.

    Raises:
      ValueError: settings that cannot work, before anything is compiled.
    """

    def __init__(self, config: ConfigDict, topology: Hardware):
        self.config = on_accelerator(config)
        self.topology = topology
        if isinstance(topology, Nodes):
            gpus.check_compiler(self.config.model.kernels)
        self.mesh: Mesh = topology.create_mesh(**self.config.mesh)
        self.trainer: Trainer = create_trainer(self.config, self.mesh)
        self.kept_tokens = self.trainer.model.kept_tokens(**self.config.masking)
        self.abstract = self.trainer.abstract_state()

    @property
    def sampling_steps(self) -> int:
        """The number of the sampler's steps in one run."""
        return self.trainer.diffusion.respaced(self.config.sample.steps).num_steps

    @property
    def state_bytes(self) -> int:
        """Bytes of parameters, optimiser and averages on one chip."""
        return sharding.bytes_per_device(self.abstract)

    def compile_step(self, num_kept: int | None) -> Program:
        """Compiles the training step for a number of kept tokens, None without a masked pass."""
        c, image = self.config, self.trainer.model.image_shape
        batch = sharding.batch_sharding(self.mesh)
        arguments = {
            "image": jax.ShapeDtypeStruct((c.batch_size, *image), np.float32, sharding=batch),
            "label": jax.ShapeDtypeStruct((c.batch_size,), np.int32, sharding=batch),
        }
        name = "step" if num_kept is None else f"step, {num_kept} kept"
        step = self.trainer.jit_step(num_kept)
        return compile_program(name, step, (self.abstract, arguments), self.topology)

    def compile_sampler(self, batch_size: int) -> Program:
        """Compiles the sampler's loop, with the config's guidance; its work is that of one step."""
        model = sampling.DiffusionModel.from_config(self.config)
        options = sampling.resolve_options(model)
        sampler = sampling.CompiledSampler(model, self.mesh, batch_size, options)
        batch, whole = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        keys, state = jax.eval_shape(sampler._start, key, step)
        labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        state, keys, labels = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch),
            (state, keys, labels),
        )
        arguments = (self.abstract.params, state, keys, labels, step, step)
        return compile_program("sampler", sampler._chunk, arguments, self.topology)


def on_accelerator(config: ConfigDict) -> ConfigDict:
    """The config as a TPU or a GPU would resolve it, whatever this machine's backend is."""
    config = config.copy_and_resolve_references()
    if config.model.num_classes == -1:
        config = config_lib.with_classes(config, ())
    if config.model.dtype == "auto":
        config.model.dtype = "bfloat16"
    return config


def calibrate(topology: Hardware, size: int = 8192) -> float | None:
    """The share of the chip's peak that a lone size³ bfloat16 product gets by these estimates.

    Estimates can be trusted where it is in `chip.calibrated`. On a GPU the size is always 8192, and
    None says that XLA's table lacks the card.
    """
    chip = topology.chip
    if isinstance(topology, Nodes):
        return lone_products(topology.chip).calibration
    small = Topology(chip, (2,) * 2 if chip.dimensions == 2 else (2, 2, 1))
    whole = sharding.replicated(small.create_mesh())
    operand = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=whole)
    product = jax.jit(jnp.matmul, out_shardings=whole)
    program = compile_program("calibration", product, (operand, operand), small)
    return 2 * size**3 / chip.peak_flops / program.estimate.seconds(chip)
