"""Drawing the timesteps of training: uniformly, or by each timestep's recent losses.

The loss-aware draw is Improved DDPM's (§3.3): a timestep's probability is proportional to √E[loss²]
over its last losses; it is uniform until every timestep has a full history. The history is a pytree
in the train state; the uniform draw has none.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TIMESTEP_SAMPLERS = ("uniform", "loss_second_moment")
HISTORY_LENGTH = 10
UNIFORM_SHARE = 0.001  # share of the probability that is uniform, so that each timestep is drawn


class LossHistory(NamedTuple):
    """The last losses of each timestep, oldest first, and their number."""

    losses: Float[Array, "steps history"]
    counts: Int[Array, " steps"]


def init_history(sampler: str, num_steps: int) -> LossHistory | None:
    """The history of a timestep sampler at the start: empty, or None for the uniform one.

    Args:
      sampler: one of `TIMESTEP_SAMPLERS`.
      num_steps: the number of timesteps.

    Raises:
      ValueError: an unknown sampler.
    """
    if sampler not in TIMESTEP_SAMPLERS:
        known = ", ".join(TIMESTEP_SAMPLERS)
        raise ValueError(f"timestep sampler {sampler!r} is unknown; known: {known}")
    if sampler == "uniform":
        return None
    return LossHistory(
        jnp.zeros((num_steps, HISTORY_LENGTH), jnp.float32), jnp.zeros(num_steps, jnp.int32)
    )


def probabilities(history: LossHistory | None, num_steps: int) -> Float[Array, " steps"]:
    """The probability of drawing each timestep; uniform for a history of None."""
    uniform = jnp.full(num_steps, 1 / num_steps, jnp.float32)
    if history is None:
        return uniform
    moments = jnp.sqrt(jnp.mean(history.losses**2, axis=1))
    total = moments.sum()
    aware = moments / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    aware = (1 - UNIFORM_SHARE) * aware + UNIFORM_SHARE / num_steps
    ready = (history.counts == HISTORY_LENGTH).all() & (total > 0)
    return jnp.where(ready, aware, uniform)


def draw_timesteps(
    history: LossHistory | None, num_steps: int, uniforms: Float[Array, " batch"]
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """Timesteps from U(0, 1) draws by inversion, and their losses' weights 1/(T·p).

    The weights make the mean loss unbiased.
    """
    if history is None:
        t = jnp.minimum((uniforms * num_steps).astype(jnp.int32), num_steps - 1)
        return t, jnp.ones(uniforms.shape, jnp.float32)
    p = probabilities(history, num_steps)
    cumulative = jnp.cumsum(p)
    t = jnp.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
    t = jnp.minimum(t, num_steps - 1).astype(jnp.int32)
    return t, 1 / (num_steps * p[t])


def update_history(
    history: LossHistory | None, t: Int[Array, " batch"], losses: Float[Array, " batch"]
) -> LossHistory | None:
    """Appends a batch's losses in sample order; only the last HISTORY_LENGTH of each are kept."""
    if history is None:
        return None
    num_steps = history.counts.shape[0]
    # A sample's loss follows its timestep's old losses and those of earlier samples of the batch.
    earlier = jnp.tril(t[:, None] == t[None, :], k=-1).sum(axis=1)
    arrivals = jnp.zeros(num_steps, jnp.int32).at[t].add(1)
    overflow = jnp.maximum(history.counts + arrivals - HISTORY_LENGTH, 0)

    slots = jnp.arange(HISTORY_LENGTH)
    source = slots[None, :] + overflow[:, None]
    shifted = jnp.take_along_axis(history.losses, jnp.minimum(source, HISTORY_LENGTH - 1), axis=1)
    kept = jnp.where(source < history.counts[:, None], shifted, 0.0)
    position = history.counts[t] + earlier - overflow[t]
    position = jnp.where(position >= 0, position, HISTORY_LENGTH)  # out of bounds: dropped
    losses = kept.at[t, position].set(losses.astype(jnp.float32), mode="drop")
    return LossHistory(losses, jnp.minimum(history.counts + arrivals, HISTORY_LENGTH))
