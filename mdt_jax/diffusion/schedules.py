"""Noise schedules: betas, respacing, and the tables of a Gaussian process, in float64 NumPy."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from mdt_jax.basics import ranges


def linear_betas(num_timesteps: int) -> np.ndarray:
    """Ho et al.'s linear betas in float64, 1e-4 to 0.02 for 1000 steps, rescaled for others."""
    scale = 1000 / num_timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)


def squared_cosine_betas(num_timesteps: int, max_beta: float = 0.999) -> np.ndarray:
    """Nichol & Dhariwal's betas in float64, of ᾱ(u) = cos²((u + 0.008)/1.008·π/2), capped."""
    u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


# Fewest timesteps of the linear schedule: its last beta is 20 over their number.
FEWEST_LINEAR = 21
BETAS = {"linear": linear_betas, "squared_cosine": squared_cosine_betas}


def respace(num_timesteps: int, respacing: str | int) -> np.ndarray:
    """The original timesteps that a shorter process keeps, ascending int64.

    Args:
      num_timesteps: T of the training process.
      respacing: a count ("250"); n counts for n equal sections of the process, of which the first
        T mod n are one step longer ("10,15,20"); or "ddimN", the first integer stride that gives
        exactly N.

    Raises:
      ValueError: another form, more steps than a section has, or no integer stride gives N.
    """
    spec = str(respacing)
    try:
        if not spec.isascii():  # other scripts' digits, which `int` reads
            raise ValueError("another form")
        if spec.startswith("ddim"):
            count = int(spec.removeprefix("ddim"))
            for stride in range(1, num_timesteps):
                if len(range(0, num_timesteps, stride)) == count:
                    return np.arange(0, num_timesteps, stride)
            raise ValueError(
                f"respacing {spec!r}: no integer stride over {num_timesteps} gives {count}"
            )
        counts = [int(c) for c in spec.split(",")]
    except ValueError as error:
        if "respacing" in str(error):
            raise
        raise ValueError(
            f"respacing {spec!r} is not a count, counts by section (10,15,20), ddimN or logsnrN"
        ) from None
    base, extra = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = base + (section < extra)
        if not 1 <= count <= size:
            raise ValueError(
                f"respacing {spec!r} asks for {count} of the {size} steps of section "
                f"{section + 1}; 1 to {size} would do"
            )
        spacing = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            # A running sum and Python's rounding to even, as in ADM: others keep other timesteps.
            kept.append(start + round(position))
            position += spacing
        start += size
    return np.unique(np.asarray(kept, np.int64))


def respace_by_snr(snr: np.ndarray, respacing: str) -> np.ndarray:
    """The timesteps nearest to N values evenly spaced in log(SNR), both ends included.

    If two values have the same nearest timestep, as near t = 0, the later one takes the next.

    Args:
      snr: ᾱ/(1 − ᾱ) of every timestep.
      respacing: "logsnrN".

    Raises:
      ValueError: N is not a number from 2 to the number of timesteps.
    """
    number = respacing.removeprefix("logsnr")
    if not (number.isascii() and number.isdecimal() and 2 <= int(number) <= len(snr)):
        raise ValueError(
            f"respacing {respacing!r} is not logsnrN with N from 2 to {len(snr)}, as in logsnr20"
        )
    log_snr = np.log(snr)
    wanted = np.linspace(log_snr[0], log_snr[-1], int(number))
    nearest = np.abs(log_snr[:, None] - wanted).argmin(axis=0)
    rank = np.arange(len(wanted))
    # Timesteps increase if kept − rank does not decrease: this is the lowest such sequence that is
    # at least `nearest`, bounded so that the rest still fits below the last timestep.
    kept = np.maximum.accumulate(nearest - rank) + rank
    return np.minimum(kept, len(snr) - len(wanted) + rank)


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The tables of a Gaussian process, all float64 of shape (num_steps,) unless said otherwise.

    Attributes:
      betas: β_i.
      timesteps: the original timestep of each index, which is the model's input; int64.
      num_train_timesteps: T of the original process.
    """

    betas: np.ndarray
    timesteps: np.ndarray
    num_train_timesteps: int

    @classmethod
    def create(cls, name: str = "linear", num_timesteps: int = 1000) -> NoiseSchedule:
        """The schedule of a name.

        Args:
          name: a key of `BETAS`.
          num_timesteps: T.

        Raises:
          ValueError: another name, or so few timesteps that one would destroy everything.
        """
        if name not in BETAS:
            raise ValueError(f"noise schedule {name!r} is unknown; known: {', '.join(BETAS)}")
        ranges.check("diffusion.num_timesteps", num_timesteps, "num_timesteps")
        betas = BETAS[name](num_timesteps)
        if betas.max() >= 1:
            raise ValueError(
                f"num_timesteps {num_timesteps} is too few for the schedule {name!r}, whose last "
                f"beta would be {betas.max():g}; from {FEWEST_LINEAR} on it is below 1"
            )
        return cls(betas, np.arange(num_timesteps), num_timesteps)

    def respaced(self, respacing: str | int) -> NoiseSchedule:
        """The process over fewer of its steps, with β_i = 1 − ᾱ_i/ᾱ_prev.

        Args:
          respacing: a form of `respace`, or "logsnrN": N steps evenly spaced in log(SNR), for
            solvers whose error depends on that.

        Raises:
          ValueError: an unknown form, or one that does not fit this process.
        """
        if str(respacing).startswith("logsnr"):
            kept = respace_by_snr(self.snr, str(respacing))
        else:
            kept = respace(self.num_steps, respacing)
        alpha_bars = self.alphas_cumprod[kept]
        betas = 1 - alpha_bars / np.append(1.0, alpha_bars[:-1])
        return NoiseSchedule(betas, self.timesteps[kept], self.num_train_timesteps)

    @property
    def num_steps(self) -> int:
        """The number of steps of this process, respaced or not."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ_i, the product of 1 − β up to index i."""
        return np.cumprod(1 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """ᾱ_{i−1}, 1 before the first."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas_cumprod_next(self) -> np.ndarray:
        """ᾱ_{i+1}, 0 after the last."""
        return np.append(self.alphas_cumprod[1:], 0.0)

    @cached_property
    def snr(self) -> np.ndarray:
        """The signal-to-noise ratio ᾱ_i/(1 − ᾱ_i)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """The variance of q(x_{i−1} | x_i, x_0) (DDPM eq. 7)."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """log of `posterior_variance`, index 0 with index 1's variance, since its own is 0."""
        second = min(1, self.num_steps - 1)
        return np.log(np.append(self.posterior_variance[second], self.posterior_variance[1:]))

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        """The weight of x_0 in the posterior mean (DDPM eq. 7)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        """The weight of x_i in the posterior mean (DDPM eq. 7)."""
        return (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)
