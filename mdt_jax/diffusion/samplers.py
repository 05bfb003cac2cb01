"""Samplers: one step of DDPM, DDIM and the DDIM encoder, and loops over them.

Jit a loop with its bounds traced, and one compiled program serves every chunk of steps: a progress
bar can move, and the result's bits cannot depend on where chunks end.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mdt_jax.diffusion.gaussian import GaussianDiffusion, ModelFn, take

# Standard normal noise of x's shape for the step at index i of the process.
NoiseFn = Callable[[Int[Array, ""]], Array]


def ddpm_step(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Float[Array, "b h w c"],
    i: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    *,
    clip: bool = False,
) -> Float[Array, "b h w c"]:
    """x_{i−1} from x_i, ancestral (DDPM algorithm 2); no noise at i = 0."""
    p = diffusion.predict(model_fn, x, i, clip)
    nonzero = (i != 0).astype(x.dtype).reshape(-1, 1, 1, 1)
    return p.mean + nonzero * jnp.exp(0.5 * p.log_variance) * noise


def ddim_step(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Float[Array, "b h w c"],
    i: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    *,
    eta: float = 0.0,
    clip: bool = False,
) -> Float[Array, "b h w c"]:
    """x_{i−1} from x_i (DDIM eq. 12 and 16); eta 0 is deterministic, 1 ancestral."""
    p = diffusion.predict(model_fn, x, i, clip)
    alpha_bar = diffusion.schedule.alphas_cumprod
    previous = diffusion.schedule.alphas_cumprod_prev
    sigma = eta * np.sqrt((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous))
    direction = np.sqrt(np.maximum(1 - previous - sigma**2, 0))
    mean = take(np.sqrt(previous), i, x) * p.x0 + take(direction, i, x) * p.epsilon
    # At i = 0 sigma is 0, since ᾱ before it is 1.
    return mean + take(sigma, i, x) * noise


def ddim_encode_step(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Float[Array, "b h w c"],
    i: Int[Array, " b"],
    *,
    clip: bool = False,
) -> Float[Array, "b h w c"]:
    """x at ᾱ_{i+1} from x taken at index i: DDIM's ODE run towards noise (DDIM §4.3)."""
    p = diffusion.predict(model_fn, x, i, clip)
    following = diffusion.schedule.alphas_cumprod_next
    return take(np.sqrt(following), i, x) * p.x0 + take(np.sqrt(1 - following), i, x) * p.epsilon


SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step}


def sample_steps(
    sampler: str,
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Float[Array, "b h w c"],
    noise_fn: NoiseFn,
    first: int | Int[Array, ""] = 0,
    last: int | Int[Array, ""] | None = None,
    **options: float | bool,
) -> Float[Array, "b h w c"]:
    """Runs steps `first` to `last` − 1 of a sampler, counted from pure noise; all by default.

    Args:
      sampler: a key of `SAMPLERS`.
      diffusion: the, respaced, process.
      model_fn: (x, original timesteps) → output.
      x: the state before step `first`; at 0, standard normal noise.
      noise_fn: index of the process → the step's noise.
      **options: `clip` of x̂_0 to [−1, 1], and DDIM's `eta`.

    Raises:
      ValueError: an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; known: {', '.join(SAMPLERS)}")

    def body(k: Array, x: Array) -> Array:
        i = diffusion.num_steps - 1 - k
        batch = jnp.full(x.shape[:1], i, jnp.int32)
        return SAMPLERS[sampler](diffusion, model_fn, x, batch, noise_fn(i), **options)

    return jax.lax.fori_loop(first, diffusion.num_steps if last is None else last, body, x)


def ddim_encode(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x0: Float[Array, "b h w c"],
    num_steps: int | None = None,
    *,
    clip: bool = False,
) -> Float[Array, "b h w c"]:
    """The latent that deterministic DDIM decodes to x0: encoder steps at indices 0, 1, ….

    All but the last index by default: the step from the last would go to ᾱ = 0, which no decoder
    step starts from.
    """

    def body(i: Array, x: Array) -> Array:
        return ddim_encode_step(
            diffusion, model_fn, x, jnp.full(x.shape[:1], i, jnp.int32), clip=clip
        )

    steps = diffusion.num_steps - 1 if num_steps is None else num_steps
    return jax.lax.fori_loop(0, steps, body, x0)
