"""Classifier-free guidance: a constant scale, or MDT's power-cosine scale over the process."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdt_jax.diffusion.gaussian import ModelFn

# (x, t, labels) → output
LabelledModelFn = Callable[[Array, Array, Array], Array]


def power_cosine_scale(
    scale: float, power: float, t: Int[Array, " b"], num_train_timesteps: int
) -> Float[Array, " b"]:
    """The guidance scale s(t) = 1 + (w − 1)·(1 − cos(π·(1 − t/T)^α))/2 (MDT §4.1).

    A large power α guides late steps alone and keeps diversity (4 for FID); a small one guides all
    steps (0.01 for quality).

    Args:
      scale: w.
      power: α.
      t: original timesteps.
      num_train_timesteps: T.
    """
    remaining = 1 - t.astype(jnp.float32) / num_train_timesteps
    return 1 + (scale - 1) * (1 - jnp.cos(jnp.pi * remaining**power)) / 2


def combine(
    conditional: Float[Array, "b h w out"],
    unconditional: Float[Array, "b h w out"],
    scale: float | Float[Array, " b"],
    channels: int,
) -> Float[Array, "b h w out"]:
    """The guided output: its first `channels` are null + s·(cond − null).

    The other channels, the variance's among them, are the conditional output's.
    """
    scale = jnp.reshape(jnp.asarray(scale, jnp.float32), (-1, 1, 1, 1))
    cond, null = conditional[..., :channels], unconditional[..., :channels]
    return jnp.concatenate([null + scale * (cond - null), conditional[..., channels:]], axis=-1)


def guided(
    model_fn: LabelledModelFn,
    labels: Int[Array, " b"],
    null_label: int,
    *,
    scale: float,
    power: float | None = None,
    channels: int,
    interval: tuple[float, float] | None = None,
    num_train_timesteps: int = 1000,
) -> ModelFn:
    """A model function (x, t) → output with classifier-free guidance for given labels.

    The conditional and the null pass run as one batch of 2B with a sample's two rows side by side,
    so that a batch sharded over devices stays in place. At scale 1 the null pass is not run.

    Args:
      model_fn: (x, t, labels) → output, channels last.
      labels: classes of the batch.
      null_label: the null class.
      scale: guidance scale w; 1 is unguided.
      power: α of the power-cosine scale; None keeps the scale constant.
      channels: how many of the output's first channels are guided: all of the mean's, or 3 of
        latents' 4, as for the published MDT numbers.
      interval: the guided part of the process in fractions of T, low ≤ t/T < high
        (Kynkäänniemi et al., arXiv:2404.07724); all samples must be at one t, and outside of it the
        null pass is not run. None guides the whole process.
      num_train_timesteps: T of the training process.
    """

    def plain(x: Array, t: Array) -> Array:
        return model_fn(x, t, labels)

    def both(x: Array, t: Array) -> Array:
        pairs = jnp.stack([labels, jnp.full_like(labels, null_label)], axis=1).reshape(-1)
        out = model_fn(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2, axis=0), pairs)
        out = out.reshape(-1, 2, *out.shape[1:])
        s = scale if power is None else power_cosine_scale(scale, power, t, num_train_timesteps)
        return combine(out[:, 0], out[:, 1], s, channels)

    def within(x: Array, t: Array) -> Array:
        low, high = (fraction * num_train_timesteps for fraction in interval)
        return jax.lax.cond((low <= t[0]) & (t[0] < high), both, plain, x, t)

    if scale == 1:
        return plain
    return both if interval is None else within
