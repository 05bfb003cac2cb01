"""The Gaussian diffusion process: noising, the meaning of a model's output, the training losses.

A model is a function (x, original timesteps) → output, channels last. Indices `i` count the steps
of the process, which may be respaced; `NoiseSchedule.timesteps` maps them to original timesteps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mdt_jax.diffusion.schedules import NoiseSchedule

ModelFn = Callable[[Array, Array], Array]

PREDICTIONS = ("epsilon", "x0", "velocity")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
LOSSES = ("mse", "rescaled_mse", "kl", "rescaled_kl")


class Prediction(NamedTuple):
    """A model's prediction at x_i, each part (B, H, W, C): p(x_{i−1} | x_i), and x̂_0 and ε̂."""

    mean: Array
    log_variance: Array
    x0: Array
    epsilon: Array


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """A noise schedule, the meaning of a model's output, and its training losses.

    Attributes:
      schedule: the tables, float64; they are cast to float32 once, where they are used.
      prediction: the meaning of the first C output channels: "epsilon", "x0" or "velocity"
        (v = √ᾱ·ε − √(1−ᾱ)·x_0, Salimans & Ho 2022).
      variance: "learned_range" (C more channels v; log-variance interpolated between the clipped
        posterior's and log β by (v+1)/2, Improved DDPM eq. 15), "fixed_small" (the posterior's) or
        "fixed_large" (β).
      loss: "mse" (plus the variational term when the variance is learned), "rescaled_mse" (that
        term times num_steps/1000), "kl" (the variational bound alone), "rescaled_kl" (times
        num_steps).
      min_snr: γ of min-SNR weighting of the MSE (Hang et al. 2023): min(SNR, γ)/SNR for epsilon,
        min(SNR, γ) for x0, min(SNR, γ)/(SNR + 1) for velocity. None for plain MSE.

    Raises:
      ValueError: an unknown prediction, variance or loss; the message lists the known ones.
    """

    schedule: NoiseSchedule
    prediction: str = "epsilon"
    variance: str = "learned_range"
    loss: str = "mse"
    min_snr: float | None = None

    def __post_init__(self):
        kinds = (("prediction", PREDICTIONS), ("variance", VARIANCES), ("loss", LOSSES))
        for field, known in kinds:
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field} {getattr(self, field)!r} is unknown; known: {', '.join(known)}"
                )

    @property
    def num_steps(self) -> int:
        """The number of steps of the process, respaced or not."""
        return self.schedule.num_steps

    def respaced(self, respacing: str | int) -> GaussianDiffusion:
        """The same process over fewer timesteps; `NoiseSchedule.respaced` lists the forms."""
        return dataclasses.replace(self, schedule=self.schedule.respaced(respacing))

    def add_noise(
        self, x0: Float[Array, "b h w c"], i: Int[Array, " b"], noise: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c"]:
        """Noises x_0 to index i: x_i = √ᾱ·x_0 + √(1−ᾱ)·ε (DDPM eq. 4)."""
        alpha_bar = self.schedule.alphas_cumprod
        return take(np.sqrt(alpha_bar), i, x0) * x0 + take(np.sqrt(1 - alpha_bar), i, x0) * noise

    def predict(
        self,
        model_fn: ModelFn,
        x: Float[Array, "b h w c"],
        i: Int[Array, " b"],
        clip: bool = False,
    ) -> Prediction:
        """Runs the model at x_i and interprets its output; `clip` bounds x̂_0 to [−1, 1]."""
        timesteps = jnp.asarray(self.schedule.timesteps, jnp.int32)[i]
        return self.interpret(model_fn(x, timesteps), x, i, clip)

    def interpret(
        self,
        output: Float[Array, "b h w out"],
        x: Float[Array, "b h w c"],
        i: Int[Array, " b"],
        clip: bool = False,
    ) -> Prediction:
        """Interprets a model's output at x_i (DDPM eq. 7 and 15, Improved DDPM eq. 15)."""
        value, log_variance = self._split(output.astype(jnp.float32), x, i)
        x0, epsilon = self._x0_and_epsilon(value, x, i)
        if clip:
            x0 = jnp.clip(x0, -1, 1)
            epsilon = self._epsilon_of(x, i, x0)
        return Prediction(self.posterior_mean(x0, x, i), log_variance, x0, epsilon)

    def posterior_mean(self, x0: Array, x: Array, i: Array) -> Float[Array, "b h w c"]:
        """The mean of q(x_{i−1} | x_i, x_0) (DDPM eq. 7)."""
        s = self.schedule
        return take(s.posterior_mean_coef1, i, x) * x0 + take(s.posterior_mean_coef2, i, x) * x

    def losses(
        self,
        model_fn: ModelFn,
        x0: Float[Array, "b h w c"],
        i: Int[Array, " b"],
        noise: Float[Array, "b h w c"],
    ) -> dict[str, Float[Array, " b"]]:
        """Runs the model on noised data and returns the training terms of each sample.

        They are "loss", and "mse" and "vb" if the loss has them.
        """
        x, t = self.training_input(x0, i, noise)
        return self.training_terms(model_fn(x, t), x, x0, i, noise)

    def training_input(
        self, x0: Float[Array, "b h w c"], i: Int[Array, " b"], noise: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c"], Int[Array, " b"]]:
        """The model's inputs in training: x_i, and the original timesteps of i."""
        return self.add_noise(x0, i, noise), jnp.asarray(self.schedule.timesteps, jnp.int32)[i]

    def training_terms(
        self,
        output: Float[Array, "b h w out"],
        x: Float[Array, "b h w c"],
        x0: Float[Array, "b h w c"],
        i: Int[Array, " b"],
        noise: Float[Array, "b h w c"],
    ) -> dict[str, Float[Array, " b"]]:
        """The training terms of `losses` from a model's output.

        Args:
          output: the model's output at x.
          x: the noised data, as `training_input` gives it.
          x0: the data.
          i: indices.
          noise: the noise in x.
        """
        output = output.astype(jnp.float32)
        self._check_channels(output, x)
        if self.loss in ("kl", "rescaled_kl"):
            bound = self.variational_term(self.interpret(output, x, i), x0, x, i)
            return {"loss": bound * (self.num_steps if self.loss == "rescaled_kl" else 1)}

        value = output[..., : x0.shape[-1]]
        target = {"epsilon": noise, "x0": x0, "velocity": self._velocity(x0, noise, i)}
        mse = self._mse_weight(i) * mean_flat((target[self.prediction] - value) ** 2)
        if self.variance != "learned_range":
            return {"mse": mse, "loss": mse}
        # The bound trains the variance alone: its gradient stops at the mean's channels.
        frozen = jnp.concatenate(
            [jax.lax.stop_gradient(value), output[..., x0.shape[-1] :]], axis=-1
        )
        bound = self.variational_term(self.interpret(frozen, x, i), x0, x, i)
        if self.loss == "rescaled_mse":
            bound = bound * (self.num_steps / 1000)
        return {"mse": mse, "vb": bound, "loss": mse + bound}

    def variational_term(
        self,
        predicted: Prediction,
        x0: Float[Array, "b h w c"],
        x: Float[Array, "b h w c"],
        i: Int[Array, " b"],
    ) -> Float[Array, " b"]:
        """The variational bound's term at index i, in bits per dimension (DDPM eq. 5).

        It is KL(q(x_{i−1} | x_i, x_0) ‖ p); at i = 0 it is the negative log-likelihood of
        discretised x_0.
        """
        # Both means contain the same multiple of x_i, which at large i hides their difference in
        # float32: it is computed without that multiple.
        difference = take(self.schedule.posterior_mean_coef1, i, x) * (x0 - predicted.x0)
        true_log_variance = take(self.schedule.posterior_log_variance_clipped, i, x)
        kl = normal_kl(difference, true_log_variance, predicted.log_variance)
        nll = -discretized_gaussian_log_likelihood(x0, predicted.mean, 0.5 * predicted.log_variance)
        return jnp.where(i == 0, mean_flat(nll), mean_flat(kl)) / np.log(2.0)

    def prior_term(self, x0: Float[Array, "b h w c"]) -> Float[Array, " b"]:
        """The bound's constant term, KL(q(x_T | x_0) ‖ N(0, 1)), in bits per dimension."""
        alpha_bar = self.schedule.alphas_cumprod[-1]
        mean = np.float32(np.sqrt(alpha_bar)) * x0
        log_variance = jnp.full_like(x0, np.log(1 - alpha_bar))
        return mean_flat(normal_kl(mean, log_variance, jnp.zeros_like(x0))) / np.log(2.0)

    def _check_channels(self, output: Array, x: Array) -> None:
        channels = x.shape[-1]
        expected = channels * (2 if self.variance == "learned_range" else 1)
        if output.shape[-1] != expected:
            raise ValueError(
                f"variance {self.variance!r} needs {expected} output channels for inputs of "
                f"{channels}; the model gave {output.shape[-1]}"
            )

    def _split(self, output: Array, x: Array, i: Array) -> tuple[Array, Array]:
        """The predicted quantity and the log-variance, each of x's shape."""
        s, channels = self.schedule, x.shape[-1]
        self._check_channels(output, x)
        if self.variance == "learned_range":
            fraction = (output[..., channels:] + 1) / 2
            low = take(s.posterior_log_variance_clipped, i, x)
            high = take(np.log(s.betas), i, x)
            return output[..., :channels], fraction * high + (1 - fraction) * low
        log_variance = s.posterior_log_variance_clipped
        if self.variance == "fixed_large":
            # Index 0 has the posterior's variance: β there would spoil the decoder's likelihood.
            log_variance = np.append(log_variance[0], np.log(s.betas[1:]))
        return output, jnp.broadcast_to(take(log_variance, i, x), x.shape)

    def _x0_and_epsilon(self, value: Array, x: Array, i: Array) -> tuple[Array, Array]:
        alpha_bar = self.schedule.alphas_cumprod
        alpha, sigma = take(np.sqrt(alpha_bar), i, x), take(np.sqrt(1 - alpha_bar), i, x)
        if self.prediction == "epsilon":
            scale = take(np.sqrt(1 / alpha_bar), i, x)
            ratio = take(np.sqrt(1 / alpha_bar - 1), i, x)
            return scale * x - ratio * value, value
        if self.prediction == "x0":
            return value, self._epsilon_of(x, i, value)
        return alpha * x - sigma * value, sigma * x + alpha * value

    def _epsilon_of(self, x: Array, i: Array, x0: Array) -> Array:
        alpha_bar = self.schedule.alphas_cumprod
        scale = take(np.sqrt(1 / alpha_bar), i, x)
        return (scale * x - x0) / take(np.sqrt(1 / alpha_bar - 1), i, x)

    def _velocity(self, x0: Array, noise: Array, i: Array) -> Array:
        alpha_bar = self.schedule.alphas_cumprod
        return take(np.sqrt(alpha_bar), i, x0) * noise - take(np.sqrt(1 - alpha_bar), i, x0) * x0

    def _mse_weight(self, i: Array) -> Array:
        if self.min_snr is None:
            return jnp.ones(i.shape, jnp.float32)
        snr = self.schedule.snr
        capped = np.minimum(snr, self.min_snr)
        divisor = {"epsilon": snr, "x0": np.ones_like(snr), "velocity": snr + 1}[self.prediction]
        return jnp.asarray(capped / divisor, jnp.float32)[i]


def take(
    table: np.ndarray, i: Int[Array, " b"], like: Float[Array, "b h w c"]
) -> Float[Array, "b 1 1 1"]:
    """A float64 table's entries at i, as float32 of a shape that broadcasts with `like`."""
    values = jnp.asarray(table, jnp.float32)[i]
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def mean_flat(x: Array) -> Float[Array, " b"]:
    """The mean over all axes but the first."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def normal_kl(mean_difference: Array, log_variance1: Array, log_variance2: Array) -> Array:
    """KL(N₁ ‖ N₂) of two diagonal normals from their means' difference, elementwise, in nats."""
    ratio = log_variance1 - log_variance2
    # exp(ratio) − 1 − ratio, which is about ratio²/2 where the variances are nearly equal.
    return 0.5 * (jnp.expm1(ratio) - ratio + mean_difference**2 * jnp.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
    """log p(x) in nats of uint8 levels x, rescaled to [−1, 1], under a normal cut into 255 bins.

    The CDF is its tanh approximation; the outermost bins extend to infinity (DDPM eq. 13).
    """

    def cdf(z: Array) -> Array:
        return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    centered, inverse_scale = x - mean, jnp.exp(-log_scale)
    upper = cdf(inverse_scale * (centered + 1 / 255))
    lower = cdf(inverse_scale * (centered - 1 / 255))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))
