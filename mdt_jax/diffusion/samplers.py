"""Samplers: one step of DDPM, DDIM, Heun, DPM-Solver++ and the DDIM encoder, and loops over them.

Jit a loop with its bounds traced, and one compiled program serves every chunk of steps: a progress
bar can move, and the result's bits cannot depend on where chunks end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


def heun_step(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Float[Array, "b h w c"],
    i: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    *,
    clip: bool = False,
) -> Float[Array, "b h w c"]:
    """x_{i−1} from x_i by Heun's method on the probability-flow ODE (EDM algorithm 1).

    Two model calls, one where the step ends at x_0. Time is the angle φ with cos φ = √ᾱ: while x̂_0
    and ε̂ stay what they are, a step δ turns x to cos δ·x + sin δ·v, v = cos φ·ε̂ − sin φ·x̂_0
    (Salimans & Ho 2022, appendix D). EDM's own time is tan φ, up to 80 in its models; the squared
    cosine schedule begins at 2e4, and steps from there would go nowhere. Deterministic; all
    samples are at one index.
    """
    del noise
    s = diffusion.schedule
    angle, angle_to = np.arccos(np.sqrt([s.alphas_cumprod, s.alphas_cumprod_prev]))
    cos, sin = (take(f(angle_to - angle), i, x) for f in (np.cos, np.sin))

    def velocity(x: Array, i: Array) -> Array:
        p = diffusion.predict(model_fn, x, i, clip)
        return take(np.cos(angle), i, x) * p.epsilon - take(np.sin(angle), i, x) * p.x0

    def correct(end: Array, v: Array) -> Array:
        # The velocity there, turned back to where the step begins.
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
    """x_{i−1} and x̂_0 from x_i and the step before's x̂_0: DPM-Solver++(2M) (arXiv:2211.01095).

    One model call. Second order in h, the step in λ = log √(ᾱ/(1−ᾱ)) (algorithm 2; its SDE form is
    the paper's eq. 19 with the same midpoint); first order at the first step, which has nothing
    before it, and at the last, whose h is infinite: DDIM's, with eta 0, or 1 if stochastic.
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
    """h_i/(2·h_{i+1}) of each index, 0 at both ends."""
    alpha_bar = diffusion.schedule.alphas_cumprod
    h = -np.diff(0.5 * np.log(alpha_bar / (1 - alpha_bar)))  # of the steps from 1, 2, … to the last
    inner = h[:-1] / (2 * h[1:])
    return np.pad(inner, 1) if diffusion.num_steps > 1 else np.zeros(1)


class SamplerState(NamedTuple):
    """What a sampler carries from step to step.

    Attributes:
      x: (B, H, W, C), x_i.
      x0: the last x̂_0 of samplers that look back, zeros for others.
    """

    x: Array
    x0: Array


def initial_state(x: Float[Array, "b h w c"]) -> SamplerState:
    """The state before the first step, x being pure noise."""
    return SamplerState(x, jnp.zeros_like(x))


# x_{i−1} from x_i alone.
SINGLE_STEP = {"ddpm": ddpm_step, "ddim": ddim_step, "heun": heun_step}
# Whether noise is added.
DPM_SOLVERS = {"dpm++": False, "dpm++sde": True}
SAMPLERS = (*SINGLE_STEP, *DPM_SOLVERS)
# Steps of those that need few, where nobody says how many.
FEW_STEPS = {"heun": 10, "dpm++": 20, "dpm++sde": 20}


def spaced(sampler: str, steps: int | str) -> int | str:
    """The respacing that a sampler's plain count of steps stands for; other forms as they are.

    DPM-Solver++'s error is in log(SNR), so its steps are even in that. Evenly spaced timesteps end
    with a step several times as long as the one before, which extrapolates as many times too far:
    20 of them err more than DDIM's.
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
      diffusion: the, respaced, process.
      model_fn: (x, original timesteps) → output.
      state: before step `first`; `initial_state(noise)` at 0.
      noise_fn: index of the process → the step's noise.
      **options: `clip` of x̂_0 to [−1, 1], and DDIM's `eta`.

    Raises:
      ValueError: an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; known: {', '.join(SAMPLERS)}")

    def body(k: Array, state: SamplerState) -> SamplerState:
        i = diffusion.num_steps - 1 - k
        batch = jnp.full(state.x.shape[:1], i, jnp.int32)
        common = {"i": batch, "noise": noise_fn(i), **options}
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
    **options: float | bool,
) -> Float[Array, "b h w c"]:
    """Samples from pure noise x: all of `run_steps`."""
    return run_steps(sampler, diffusion, model_fn, initial_state(x), noise_fn, **options).x


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
