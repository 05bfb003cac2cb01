"""Sampling from a trained model: `load`, `sample`, and how both are made."""

from typing import TYPE_CHECKING

from mdt_jax.basics.lazy_names import lazy_names

if TYPE_CHECKING:
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

_HOMES = {
    "CHUNK_STEPS": "mdt_jax.sampling.sampler",
    "CompiledBatch": "mdt_jax.sampling.sampler",
    "CompiledSampler": "mdt_jax.sampling.sampler",
    "DiffusionModel": "mdt_jax.sampling.model",
    "SAMPLER_OPTIONS": "mdt_jax.diffusion.options",
    "SamplerOptions": "mdt_jax.diffusion.options",
    "check_options": "mdt_jax.sampling.options",
    "check_samples": "mdt_jax.sampling.sampler",
    "class_numbers": "mdt_jax.sampling.options",
    "compile_sampler": "mdt_jax.sampling.sampler",
    "draw_labels": "mdt_jax.sampling.options",
    "global_batch_size": "mdt_jax.sampling.sampler",
    "in_batches": "mdt_jax.sampling.sampler",
    "judging_options": "mdt_jax.sampling.options",
    "load": "mdt_jax.sampling.model",
    "resolve_batch_size": "mdt_jax.sampling.sampler",
    "resolve_labels": "mdt_jax.sampling.options",
    "resolve_options": "mdt_jax.sampling.options",
    "run_in_batches": "mdt_jax.sampling.sampler",
    "sample": "mdt_jax.sampling.sampler",
}

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

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
