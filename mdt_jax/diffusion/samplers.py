"""Samplers: one step of DDPM, DDIM, Heun, DPM-Solver++ and the DDIM encoder, and loops over them.

If a loop is jitted with traced bounds, one compiled program runs every chunk of steps: a progress
bar can move, and the result's bits do not depend on where chunks end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mdt_jax.diffusion.gaussian import GaussianDiffusion, ModelFn, take

# (index i of the process) → standard normal noise of x's shape for the step there
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
    """One ancestral step from x_i to x_{i−1} (DDPM algorithm 2); no noise at i = 0."""
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
    """One DDIM step from x_i to x_{i−1} (DDIM eq. 12, 16); eta 0 is deterministic, 1 ancestral."""
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
    """One step of DDIM's ODE towards noise, from x at index i to x at ᾱ_{i+1} (DDIM §4.3)."""
    p = diffusion.predict(model_fn, x, i, clip)
    following = diffusion.schedule.alphas_cumprod_next
    return take(np.sqrt(following), i, x) * p.x0 + take(np.sqrt(1 - following), i, x) * p.epsilon


def heun_step(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Float[Array, "b h w c"],
    i: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    *,
    clip: bool = False,
) -> Float[Array, "b h w c"]:
    """One step of Heun's method from x_i to x_{i−1} on the probability-flow ODE (EDM algorithm 1).

    It calls the model twice, and once where the step ends at x_0. Time is the angle φ with
    cos φ = √ᾱ: for constant x̂_0 and ε̂ a step δ turns x to cos δ·x + sin δ·v, with
    v = cos φ·ε̂ − sin φ·x̂_0 (Salimans & Ho 2022, appendix D). EDM's own time is tan φ, at most 80
    in its models; the squared cosine schedule begins at 2e4, where steps in tan φ would not move.
    Deterministic; all samples must be at one index.
    """
    del noise
    s = diffusion.schedule
    angle, angle_to = np.arccos(np.sqrt([s.alphas_cumprod, s.alphas_cumprod_prev]))
    cos, sin = (take(f(angle_to - angle), i, x) for f in (np.cos, np.sin))

    def velocity(x: Array, i: Array) -> Array:
        p = diffusion.predict(model_fn, x, i, clip)
        return take(np.cos(angle), i, x) * p.epsilon - take(np.sin(angle), i, x) * p.x0

    def correct(end: Array, v: Array) -> Array:
        # The velocity at the step's end, turned back to its beginning.
        following = cos * velocity(end, i - 1) + sin * end
        return cos * x + sin * (v + following) / 2

    v = velocity(x, i)
    return jax.lax.cond(i[0] > 0, correct, lambda end, v: end, cos * x + sin * v, v)


def dpm_solver_step(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Float[Array, "b h w c"],
    previous_x0: Float[Array, "b h w c"],
    i: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    *,
    stochastic: bool = False,
    clip: bool = False,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """One step of DPM-Solver++(2M) from x_i to x_{i−1} (arXiv:2211.01095); also returns x̂_0.

    One model call. The step is of second order in h, its length in λ = log √(ᾱ/(1−ᾱ)) (algorithm
    2; the SDE form is the paper's eq. 19 with the same midpoint). The first step has none before
    it, and the last one's h is infinite: both are of first order, as DDIM's with eta 0, or 1 if
    stochastic.

    Args:
      diffusion: the process, respaced or not.
      model_fn: (x, original timesteps) → output.
      x: x_i.
      previous_x0: x̂_0 of the step before; not used at the first step.
      i: indices.
      noise: standard normal noise, for the SDE form.
      stochastic: whether the step is the SDE form's.
      clip: whether x̂_0 is clipped to [−1, 1].
    """
    x0 = diffusion.predict(model_fn, x, i, clip).x0
    extrapolated = x0 + take(_midpoint_weights(diffusion), i, x) * (x0 - previous_x0)

    s = diffusion.schedule
    alpha, sigma = np.sqrt(s.alphas_cumprod), np.sqrt(1 - s.alphas_cumprod)
    alpha_to, sigma_to = np.sqrt(s.alphas_cumprod_prev), np.sqrt(1 - s.alphas_cumprod_prev)
    decay = alpha * sigma_to / (sigma * alpha_to)  # e^{−h}, 0 at i = 0
    power = 2 if stochastic else 1
    mean = take(sigma_to / sigma * decay ** (power - 1), i, x) * x
    mean += take(alpha_to * (1 - decay**power), i, x) * extrapolated
    if stochastic:
        mean += take(sigma_to * np.sqrt(1 - decay**2), i, x) * noise
    return mean, x0


def _midpoint_weights(diffusion: GaussianDiffusion) -> np.ndarray:
    """The weights h_i/(2·h_{i+1}) of DPM-Solver++'s extrapolation by index, 0 at both ends."""
    alpha_bar = diffusion.schedule.alphas_cumprod
    h = -np.diff(0.5 * np.log(alpha_bar / (1 - alpha_bar)))  # steps from index 1, 2, … to the last
    inner = h[:-1] / (2 * h[1:])
    return np.pad(inner, 1) if diffusion.num_steps > 1 else np.zeros(1)


class SamplerState(NamedTuple):
    """A sampler's state between two steps.

    Attributes:
      x: (B, H, W, C), x_i.
      x0: x̂_0 of the step before, for samplers that use it; zeros for others.
    """

    x: Array
    x0: Array


def initial_state(x: Float[Array, "b h w c"]) -> SamplerState:
    """The sampler's state before the first step, from pure noise x."""
    return SamplerState(x, jnp.zeros_like(x))


# Samplers whose step needs x_i alone.
SINGLE_STEP = {"ddpm": ddpm_step, "ddim": ddim_step, "heun": heun_step}
# DPM-Solver++ by name, and whether it is stochastic.
DPM_SOLVERS = {"dpm++": False, "dpm++sde": True}
SAMPLERS = (*SINGLE_STEP, *DPM_SOLVERS)
# Default numbers of steps of the samplers that need few.
FEW_STEPS = {"heun": 10, "dpm++": 20, "dpm++sde": 20}


def spaced(sampler: str, steps: int | str) -> int | str:
    """The respacing of a sampler for a number of steps; other forms of `steps` are kept.

    DPM-Solver++'s error depends on the step in log(SNR), so its steps are evenly spaced in that.
    Evenly spaced timesteps would end with a step several times as long as the one before it, which
    extrapolates too far by that factor: 20 of them have larger errors than DDIM's.
    """
    counted = str(steps).isdecimal() and int(steps) > 1
    return f"logsnr{steps}" if sampler in DPM_SOLVERS and counted else steps


def run_steps(
    sampler: str,
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    state: SamplerState,
    noise_fn: NoiseFn,
    first: int | Int[Array, ""] = 0,
    last: int | Int[Array, ""] | None = None,
    **options: float | bool,
) -> SamplerState:
    """Runs steps `first` to `last` − 1 of a sampler, counted from pure noise; all by default.

    Args:
      sampler: one of `SAMPLERS`.
      diffusion: the process, respaced or not.
      model_fn: (x, original timesteps) → output.
      state: the state before step `first`; `initial_state(noise)` for 0.
      noise_fn: index of the process → the step's noise.
      first: the first step.
      last: the step after the last one; None for the end of the process.
      **options: `clip`, whether x̂_0 is clipped to [−1, 1], and DDIM's `eta`.

    Raises:
      ValueError: an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; known: {', '.join(SAMPLERS)}")

    def body(k: Array, state: SamplerState) -> SamplerState:
        i = diffusion.num_steps - 1 - k
        batch = jnp.full(state.x.shape[:1], i, jnp.int32)
        common: dict[str, Any] = {"i": batch, "noise": noise_fn(i), **options}
        if sampler in SINGLE_STEP:
            x = SINGLE_STEP[sampler](diffusion, model_fn, state.x, **common)
            return SamplerState(x, state.x0)
        stochastic = DPM_SOLVERS[sampler]
        return SamplerState(
            *dpm_solver_step(diffusion, model_fn, *state, stochastic=stochastic, **common)
        )

    return jax.lax.fori_loop(first, diffusion.num_steps if last is None else last, body, state)


def sample_steps(
    sampler: str,
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Float[Array, "b h w c"],
    noise_fn: NoiseFn,
    **options: Any,
) -> Float[Array, "b h w c"]:
    """Samples from pure noise x, by all steps of `run_steps`."""
    return run_steps(sampler, diffusion, model_fn, initial_state(x), noise_fn, **options).x


def ddim_encode(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x0: Float[Array, "b h w c"],
    num_steps: int | None = None,
    *,
    clip: bool = False,
) -> Float[Array, "b h w c"]:
    """Encodes x0 to the noise from which deterministic DDIM decodes it, by `num_steps` steps.

    By default it takes a step at each index but the last: that step would lead to ᾱ = 0, from which
    no decoder step starts.
    """

    def body(i: Array, x: Array) -> Array:
        return ddim_encode_step(
            diffusion, model_fn, x, jnp.full(x.shape[:1], i, jnp.int32), clip=clip
        )

    steps = diffusion.num_steps - 1 if num_steps is None else num_steps
    return jax.lax.fori_loop(0, steps, body, x0)
