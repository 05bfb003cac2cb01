"""Optimisers and learning-rate schedules by name: AdamW, Adam and the authors' Adan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

OPTIMIZERS = ("adamw", "adam", "adan")
# The form of each optimiser's state: a run goes on with another one of the same form alone.
MOMENTS = {"adamw": "adam", "adam": "adam", "adan": "adan"}
SCHEDULES = ("constant", "linear", "cosine", "step")


def learning_rate_schedule(
    name: str,
    peak: float,
    num_steps: int,
    *,
    warmup_steps: int = 0,
    boundaries: Sequence[int] = (),
    factor: float = 0.1,
) -> optax.Schedule:
    """The learning rate as a function of the step, after a linear warm-up from 0.

    Args:
      name: "constant"; "linear" to 0 at num_steps (the authors' annealing); "cosine" to 0 at
        num_steps; "step": times `factor` at each of `boundaries`.
      peak: the learning rate after the warm-up.
      num_steps: length of the run.
      warmup_steps: length of the warm-up.
      boundaries: steps of "step", counted from the start of the run.
      factor: see `name`.

    Returns:
      A function from the step, 0 at the start of the run, to the learning rate.

    Raises:
      ValueError: an unknown name, or a warm-up longer than the run.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule.name {name!r} is unknown; known: {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps < max(num_steps, 1):
        raise ValueError(
            f"schedule.warmup_steps {warmup_steps} is outside the run's {num_steps} (num_steps); "
            "in so short a run give --config.schedule.warmup_steps=0"
        )
    rest = num_steps - warmup_steps
    if name == "constant":
        after = optax.constant_schedule(peak)
    elif name == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif name == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    else:
        scales = {boundary - warmup_steps: factor for boundary in boundaries}
        after = optax.piecewise_constant_schedule(peak, scales)
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


class AdanState(NamedTuple):
    """Adan's state.

    Attributes:
      count: how often the moments were updated.
      step: the step at which the learning rate's schedule is.
      m: moving average of the gradients.
      v: moving average of the gradients' differences.
      n: moving average of the squared look-ahead.
      previous: the last gradient.
    """

    count: jax.Array
    step: jax.Array
    m: Any
    v: Any
    n: Any
    previous: Any


def adan(
    learning_rate: optax.Schedule,
    *,
    betas: Sequence[int | float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adan (Xie et al. 2022, arXiv:2208.06677, algorithm 1) as the authors' code computes it.

    With d = g − g_prev (0 at the first step): m ← b1·m + (1−b1)·g, v ← b2·v + (1−b2)·d,
    n ← b3·n + (1−b3)·(g + b2·d)², and
    θ ← (θ − lr·(m̂ + b2·v̂)/(√n̂ + eps)) / (1 + lr·weight_decay), hats for bias correction.

    `optax.adan` is another optimiser: it scales the difference by (1 − b2), the authors' code by
    b2. Clipping is a transformation of its own, applied before.
    """
    b1, b2, b3 = betas

    def init(params: optax.Params) -> AdanState:
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(4)]
        return AdanState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), *zeros)

    def update(
        grads: optax.Updates, state: AdanState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdanState]:
        first = state.count == 0
        difference = jax.tree.map(lambda g, p: jnp.where(first, 0.0, g - p), grads, state.previous)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, grads)
        v = jax.tree.map(lambda v, d: b2 * v + (1 - b2) * d, state.v, difference)
        n = jax.tree.map(
            lambda n, g, d: b3 * n + (1 - b3) * (g + b2 * d) ** 2, state.n, grads, difference
        )
        rate = learning_rate(state.step)
        count = state.count + 1
        c1, c2, c3 = (1 - jnp.float32(b) ** count for b in (b1, b2, b3))

        def step(m: jax.Array, v: jax.Array, n: jax.Array, theta: jax.Array) -> jax.Array:
            direction = (m / c1 + b2 * v / c2) / (jnp.sqrt(n) / jnp.sqrt(c3) + eps)
            if not weight_decay:
                return -rate * direction
            return (theta - rate * direction) / (1 + rate * weight_decay) - theta

        return jax.tree.map(step, m, v, n, params), AdanState(count, state.step + 1, m, v, n, grads)

    return optax.GradientTransformation(init, update)


def create_optimizer(
    settings: Mapping[str, Any], schedule: optax.Schedule, frozen: Sequence[str] = ()
) -> optax.GradientTransformation:
    """The optimiser of a run; it first clips the gradient to a global norm.

    Args:
      settings: `config.optimizer`: name, weight_decay, clip_norm (None for no clipping), betas
        (None for the optimiser's own) and eps.
      schedule: learning rate by step.
      frozen: top-level parameters that are neither updated nor decayed.

    Raises:
      ValueError: an unknown name or a wrong number of betas.
    """
    name, decay, betas = settings["name"], settings["weight_decay"], settings["betas"]
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name {name!r} is unknown; known: {', '.join(OPTIMIZERS)}")
    default_betas = (0.98, 0.92, 0.99) if name == "adan" else (0.9, 0.999)
    betas = tuple(betas or default_betas)
    if len(betas) != len(default_betas):
        raise ValueError(
            f"optimizer.betas {betas}: optimizer.name {name!r} takes {len(default_betas)}, such as "
            f"{default_betas}"
        )

    # The parts are always the same, so that a saved run can turn clipping or decay on.
    if name == "adan":
        transform = adan(schedule, betas=betas, eps=settings["eps"], weight_decay=decay)
    else:
        l2 = optax.add_decayed_weights(decay if name == "adam" else 0.0)  # a term of the gradient
        decoupled = optax.add_decayed_weights(decay if name == "adamw" else 0.0)
        adam = optax.scale_by_adam(*betas, eps=settings["eps"])
        transform = optax.chain(l2, adam, decoupled, optax.scale_by_learning_rate(schedule))
    clip = settings["clip_norm"]
    transform = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(), transform
    )
    return freeze(transform, frozen) if frozen else transform


def at_step(opt_state: optax.OptState, step: Any) -> optax.OptState:
    """An optimiser's state whose learning-rate schedule stands at a step; moments are kept.

    For weights taken from the middle of a run without its optimiser's state.
    """

    def move(state: Any) -> Any:
        if isinstance(state, AdanState):
            return state._replace(step=step)
        return (
            state._replace(count=step) if isinstance(state, optax.ScaleByScheduleState) else state
        )

    kinds = (AdanState, optax.ScaleByScheduleState)
    return jax.tree.map(move, opt_state, is_leaf=lambda state: isinstance(state, kinds))


def freeze(
    transform: optax.GradientTransformation, frozen: Sequence[str]
) -> optax.GradientTransformation:
    """The transformation with the updates of some top-level parameters set to zero."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = transform.update(grads, state, params)
        held = {name: jax.tree.map(jnp.zeros_like, updates[name]) for name in frozen}
        return {**updates, **held}, state

    return optax.GradientTransformation(transform.init, update)


def learning_rate_of(config: ConfigDict) -> optax.Schedule:
    """The learning rate of a run as a function of the step, 0 at its start."""
    s = config.schedule
    return learning_rate_schedule(
        s.name,
        config.optimizer.learning_rate,
        config.num_steps,
        warmup_steps=s.warmup_steps,
        boundaries=s.boundaries,
        factor=s.factor,
    )
