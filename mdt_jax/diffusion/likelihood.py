"""The variational bound of data under a diffusion model, in bits per dimension."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mdt_jax.diffusion.gaussian import GaussianDiffusion, ModelFn, mean_flat
from mdt_jax.diffusion.samplers import NoiseFn


def bits_per_dimension(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x0: Float[Array, "b h w c"],
    noise_fn: NoiseFn,
    *,
    clip: bool = True,
) -> dict[str, Float[Array, "b *steps"]]:
    """The variational bound on −log₂ p(x0) per dimension (DDPM eq. 5); one model call a step.

    Args:
      diffusion: the process, respaced or not.
      model_fn: (x, original timesteps) → output.
      x0: data in [−1, 1], 256 levels.
      noise_fn: index of the process → standard normal noise of x0's shape.
      clip: whether x̂_0 is clipped to [−1, 1].

    Returns:
      "total" and "prior" (b,); and (b, num_steps), from high index to low: "vb", the bound's terms,
      and "x0_mse" and "epsilon_mse", the errors of the predictions.
    """

    def term(_: None, i: Array) -> tuple[None, dict[str, Array]]:
        index = jnp.full(x0.shape[:1], i, jnp.int32)
        noise = noise_fn(i)
        x = diffusion.add_noise(x0, index, noise)
        predicted = diffusion.predict(model_fn, x, index, clip)
        return None, {
            "vb": diffusion.variational_term(predicted, x0, x, index),
            "x0_mse": mean_flat((predicted.x0 - x0) ** 2),
            "epsilon_mse": mean_flat((predicted.epsilon - noise) ** 2),
        }

    _, terms = jax.lax.scan(term, None, jnp.arange(diffusion.num_steps)[::-1])
    terms = {name: values.T for name, values in terms.items()}
    prior = diffusion.prior_term(x0)
    return {"total": terms["vb"].sum(axis=1) + prior, "prior": prior, **terms}
