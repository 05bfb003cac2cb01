"""Masked Diffusion Transformers (MDT, MDTv2) and DiT in JAX/Flax."""
