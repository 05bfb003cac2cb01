"""Sampling from a trained model: `load`, `sample`, and how both are made."""

from mdt_jax.sampling.model import DiffusionModel, load
from mdt_jax.sampling.options import (
    SamplerOptions,
    draw_labels,
    resolve_classes,
    resolve_labels,
    resolve_options,
)
from mdt_jax.sampling.sampler import (
    CHUNK_STEPS,
    CompiledBatch,
    CompiledSampler,
    compile_sampler,
    global_batch_size,
    in_batches,
    resolve_batch_size,
    run_in_batches,
    sample,
)

__all__ = [
    "CHUNK_STEPS",
    "CompiledBatch",
    "CompiledSampler",
    "DiffusionModel",
    "SamplerOptions",
    "compile_sampler",
    "draw_labels",
    "global_batch_size",
    "in_batches",
    "load",
    "resolve_batch_size",
    "resolve_classes",
    "resolve_labels",
    "resolve_options",
    "run_in_batches",
    "sample",
]
