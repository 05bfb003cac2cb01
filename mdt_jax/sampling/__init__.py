"""Sampling from a trained model: `load`, `sample`, and how both are made."""

from mdt_jax.diffusion.options import SAMPLER_OPTIONS, SamplerOptions
from mdt_jax.sampling.model import DiffusionModel, load
from mdt_jax.sampling.options import (
    check_options,
    class_numbers,
    draw_labels,
    judging_options,
    resolve_labels,
    resolve_options,
)
from mdt_jax.sampling.sampler import (
    CHUNK_STEPS,
    CompiledBatch,
    CompiledSampler,
    check_samples,
    compile_sampler,
    global_batch_size,
    in_batches,
    resolve_batch_size,
    run_in_batches,
    sample,
)

__all__ = [
    "CHUNK_STEPS",
    "SAMPLER_OPTIONS",
    "CompiledBatch",
    "CompiledSampler",
    "DiffusionModel",
    "SamplerOptions",
    "check_options",
    "check_samples",
    "compile_sampler",
    "draw_labels",
    "global_batch_size",
    "in_batches",
    "judging_options",
    "load",
    "resolve_batch_size",
    "class_numbers",
    "resolve_labels",
    "resolve_options",
    "run_in_batches",
    "sample",
]
