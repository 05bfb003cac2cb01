"""One training step as a pure function: both passes, the optimiser and the EMAs.

Every random draw of a step comes from `draw_randomness`, keyed by (seed, step, sample index) alone,
so that 1 device, 8 devices or 4 processes train the same model. Tests replace it to inject draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, Num, UInt8

from mdt_jax.data import ExampleKind
from mdt_jax.diffusion import GaussianDiffusion, timesteps
from mdt_jax.diffusion.seeds import key_of
from mdt_jax.models import LatentTransformer, Pass, masking
from mdt_jax.models.latent_space import STABLE_DIFFUSION, LatentSpace
from mdt_jax.parallel import sharding
from mdt_jax.training.optimizers import at_step

Params = dict[str, Any]
Metrics = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """Everything a run carries from step to step.

    Attributes:
      step: steps done, int32.
      params: float32 parameters.
      opt_state: the optimiser's state.
      ema: averages of the parameters by rate, "0.9999" and so on.
      loss_history: the loss-aware timestep sampler's state; None for the uniform sampler.

    The fields have no array types, since the leaves may also be shapes, shardings or names.
    """

    step: Any
    params: Params
    opt_state: optax.OptState
    ema: Any
    loss_history: Any


class Draws(NamedTuple):
    """The random numbers of one step, per sample: noises are standard normal, others in [0, 1)."""

    timestep: Float[Array, " batch"]
    full_noise: Float[Array, "batch h w c"]
    masked_noise: Float[Array, "batch h w c"]
    full_label_drop: Float[Array, " batch"]
    masked_label_drop: Float[Array, " batch"]
    mask: Float[Array, "batch n"]


DrawFn = Callable[[int, Array, tuple[int, ...], int], Draws]


def draw_randomness(
    seed: int,
    step: Int[Array, ""],
    shape: tuple[int, ...],
    num_tokens: int,
) -> Draws:
    """Draws the random numbers of a step; those of sample i depend on (seed, step, i) alone.

    The full and the masked pass share the timestep; each has its own noise and label dropout.

    Args:
      seed: the run's seed.
      step: steps done before.
      shape: (B, H, W, C) of the global batch.
      num_tokens: patch tokens of a sample.
    """
    key = jax.random.fold_in(key_of(seed, "seed"), step)

    def draw(i: Array) -> Draws:
        keys = jax.random.split(jax.random.fold_in(key, i), len(Draws._fields))
        return Draws(
            jax.random.uniform(keys[0]),
            jax.random.normal(keys[1], shape[1:]),
            jax.random.normal(keys[2], shape[1:]),
            jax.random.uniform(keys[3]),
            jax.random.uniform(keys[4]),
            jax.random.uniform(keys[5], (num_tokens,)),
        )

    return jax.vmap(draw)(jnp.arange(shape[0]))


def scale_pixels(pixels: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Pixels 0 ... 255 as float32 in [-1, 1]: bit for bit x / 127.5 - 1, as ADM scales on the host.

    XLA would replace the division by a product with the rounded 1 / 127.5, which differs in the
    last bit of most levels. 1 / 127.5 = 257/2¹⁵·(1 + 2⁻¹⁶ + ...): the first term's product with a
    level is exact, and the second's supplies the rest, whether or not XLA fuses the sum with it.
    """
    x = pixels.astype(jnp.float32)
    return x * (257 / 2**15) + x * (1 / 127.5 / 2**16) - 1


def draw_latents(
    seed: int,
    step: Int[Array, ""],
    posteriors: Float[Array, "batch h w moments"],
    space: LatentSpace = STABLE_DIFFUSION,
) -> Float[Array, "batch h w c"]:
    """Draws latents of encoded images, mean + std·noise, normalised.

    Args:
      seed: the run's seed.
      step: steps done before; sample i's noise depends on (seed, step, i) alone.
      posteriors: the autoencoder's outputs, the mean's channels before the standard deviation's.
      space: the numbers that they are normalised by.
    """
    mean, std = jnp.split(posteriors.astype(jnp.float32), 2, axis=-1)
    key = jax.random.fold_in(key_of(seed, "seed"), step)

    def draw(i: Array) -> Array:
        # With jax_threefry_partitionable, JAX's default, the key after those of `draw_randomness`.
        sample = jax.random.fold_in(jax.random.fold_in(key, i), len(Draws._fields))
        return jax.random.normal(sample, mean.shape[1:])

    return space.normalize(mean + std * jax.vmap(draw)(jnp.arange(len(mean))))


def model_inputs(
    examples: ExampleKind,
    seed: int,
    step: Int[Array, ""],
    images: Num[Array, "batch h w k"],
    space: LatentSpace = STABLE_DIFFUSION,
) -> Float[Array, "batch h w c"]:
    """The model's inputs of a step, made of a batch's images as their kind says.

    Pixels are scaled to [-1, 1]. From posteriors the step draws latents of its own, which are
    normalised by the numbers of `space`.

    Raises:
      ValueError: images are uint8 and not of the kind pixels, or the reverse.
    """
    if (images.dtype == jnp.uint8) != (examples is ExampleKind.PIXELS):
        raise ValueError(f"the step takes {examples.value}, the batch holds {images.dtype} images")
    if examples is ExampleKind.PIXELS:
        return scale_pixels(images)
    if examples is ExampleKind.POSTERIORS:
        return draw_latents(seed, step, images, space)
    return images


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """The training step and its parts; its methods are pure functions of their arguments.

    Attributes:
      model: the network.
      diffusion: the diffusion process and its losses.
      optimizer: an optax transformation.
      schedule: learning rate by step, for the metrics alone: the optimiser holds a copy.
      mesh: the device mesh.
      examples: the content of a batch's images, a source's `kind`. By default the model's inputs,
        which benchmarks and compilers give.
      latent_space: the numbers that latents drawn from posteriors are normalised by.
      ema_rates: decay of each average.
      label_dropout: probability of replacing a label by the null class, in each pass.
      accumulation_steps: microbatches of a step, whose mean gradient it takes.
      timestep_sampler: one of `timesteps.TIMESTEP_SAMPLERS`.
      seed: the seed of every draw.
      draw_fn: (seed, step, batch shape, number of tokens) → Draws.
    """

    model: LatentTransformer
    diffusion: GaussianDiffusion
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    examples: ExampleKind = ExampleKind.INPUTS
    latent_space: LatentSpace = STABLE_DIFFUSION
    ema_rates: tuple[int | float, ...] = (0.9999,)
    label_dropout: float = 0.1
    accumulation_steps: int = 1
    timestep_sampler: str = "uniform"
    seed: int = 0
    draw_fn: DrawFn = draw_randomness

    def init(self, key: Array) -> TrainState:
        """The state at step 0, its leaves labelled with logical axes (`nn.unbox` removes them)."""
        x = jnp.zeros((1, *self.model.image_shape))
        zero = jnp.zeros(1, jnp.int32)
        params = self.model.init(key, x, zero, zero)["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            # Copies, since the step donates its state, and a buffer can be donated only once.
            ema={str(rate): jax.tree.map(jnp.copy, params) for rate in self.ema_rates},
            loss_history=timesteps.init_history(self.timestep_sampler, self.diffusion.num_steps),
        )

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; allocates nothing."""
        return sharding.abstract_tree(self.mesh, jax.eval_shape(self.init, jax.random.key(0)))

    def create_state(self) -> TrainState:
        """The state at step 0, sharded."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        init = jax.jit(lambda key: nn.unbox(self.init(key)), out_shardings=shardings)
        return init(key_of(self.seed, "seed"))

    def create_parameters(self) -> Params:
        """The parameters at step 0, sharded: those of `create_state`."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state().params)
        init = jax.jit(lambda key: nn.unbox(self.init(key).params), out_shardings=shardings)
        return init(key_of(self.seed, "seed"))

    def start_from(self, params: Params, ema: Params | None = None, step: int = 0) -> TrainState:
        """The state of a run that starts with given parameters and a fresh optimiser, sharded.

        Args:
          params: parameters of the shapes and shardings of `abstract_state`.
          ema: the initial value of every average; the parameters by default.
          step: steps that the parameters were trained for; draws and the learning rate continue
            from there.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())

        def start(params: Params, ema: Params) -> TrainState:
            return TrainState(
                step=jnp.int32(step),
                params=params,
                opt_state=at_step(self.optimizer.init(params), jnp.int32(step)),
                ema={str(rate): jax.tree.map(jnp.copy, ema) for rate in self.ema_rates},
                loss_history=timesteps.init_history(
                    self.timestep_sampler, self.diffusion.num_steps
                ),
            )

        return jax.jit(start, out_shardings=shardings)(params, params if ema is None else ema)

    def jit_step(self, num_kept: int | None) -> Callable[[TrainState, dict], tuple]:
        """Jits `step` for a number of kept tokens, None for no masked pass; donates its state."""
        state = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        batch = sharding.batch_sharding(self.mesh)
        return jax.jit(
            partial(self.step, num_kept=num_kept),
            in_shardings=(state, {"image": batch, "label": batch}),
            out_shardings=(state, sharding.replicated(self.mesh)),
            donate_argnums=0,
            compiler_options=sharding.compiler_options(self.mesh),
        )

    def step(
        self, state: TrainState, batch: dict[str, Array], *, num_kept: int | None
    ) -> tuple[TrainState, Metrics]:
        """Takes one step on a global batch.

        Args:
          state: the state before.
          batch: {"image": (B, H, W, C), "label": (B,)}, the images of the kind `examples`.
          num_kept: tokens that the masked pass keeps; None for no masked pass.

        Returns:
          The state after the step, and its metrics, scalars by name.
        """
        with sharding.activations(self.mesh):
            images, labels = batch["image"], batch["label"]
            images = model_inputs(self.examples, self.seed, state.step, images, self.latent_space)
            images = sharding.shard_batch(self.mesh, images)
            draws = self.draw_fn(self.seed, state.step, images.shape, self.model.num_tokens)
            draws = jax.tree.map(partial(sharding.shard_batch, self.mesh), draws)
            t, weights = timesteps.draw_timesteps(
                state.loss_history, self.diffusion.num_steps, draws.timestep
            )
            grads, losses = self._gradients(
                state.params, (images, labels, t, weights, draws), num_kept
            )
            with jax.named_scope("optimizer"):
                updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
                params = optax.apply_updates(state.params, updates)
            with jax.named_scope("ema"):
                averages = {
                    rate: _update_ema(float(rate), ema, params, self.model.frozen)
                    for rate, ema in state.ema.items()
                }
            new_state = TrainState(
                step=state.step + 1,
                params=params,
                opt_state=opt_state,
                ema=averages,
                loss_history=timesteps.update_history(
                    state.loss_history, t, sum(pass_["loss"] for pass_ in losses.values())
                ),
            )
            metrics = _summarize(losses, t, weights, self.diffusion.num_steps)
            metrics["grad_norm"] = optax.tree.norm(grads)
            metrics["learning_rate"] = jnp.asarray(self.schedule(state.step), jnp.float32)
            return new_state, metrics

    def loss(
        self,
        params: Params,
        samples: tuple[Array, Array, Array, Array, Draws],
        num_kept: int | None,
    ) -> tuple[Float[Array, ""], dict[str, dict[str, Float[Array, " batch"]]]]:
        """The loss of a batch, mean(w·full) + mean(w·masked), and each pass's terms per sample.

        Both passes share the timesteps; each has its own noise and label dropout (MDT §3.4).

        Args:
          params: the parameters.
          samples: model inputs, labels, timesteps, weights w of the samples, and the draws.
          num_kept: tokens that the masked pass keeps; None for no masked pass.
        """
        images, labels, t, weights, draws = samples

        def create_pass(noise: Array, label_drop: Array, ids_keep: Array | None) -> Pass:
            dropped = jnp.where(label_drop < self.label_dropout, self.model.num_classes, labels)
            return Pass(*self.diffusion.training_input(images, t, noise), dropped, ids_keep)

        noises = {"full": draws.full_noise}
        passes = {"full": create_pass(draws.full_noise, draws.full_label_drop, None)}
        if num_kept is not None:
            ids_keep = masking.ids_to_keep(draws.mask, num_kept)
            noises["masked"] = draws.masked_noise
            passes["masked"] = create_pass(draws.masked_noise, draws.masked_label_drop, ids_keep)
        with jax.named_scope("model"):
            outputs = self.model.apply({"params": params}, tuple(passes.values()), method="run")
        with jax.named_scope("loss"):
            losses = {
                name: self.diffusion.training_terms(output, passes[name].x, images, t, noises[name])
                for name, output in zip(passes, outputs, strict=True)
            }
            total = sum(jnp.mean(weights * terms["loss"]) for terms in losses.values())
        return total, losses

    def _gradients(
        self, params: Params, samples: Any, num_kept: int | None
    ) -> tuple[Params, dict[str, dict[str, Array]]]:
        """The mean gradient over the microbatches, and each sample's loss terms in batch order."""
        gradient = jax.grad(self.loss, has_aux=True)
        n = self.accumulation_steps
        if n == 1:
            return gradient(params, samples, num_kept)

        # Microbatch k takes every n-th sample from k on, so that samples stay on their devices.
        def split(x: Array) -> Array:
            x = x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)
            return sharding.shard_batch(self.mesh, x, axis=1)

        def accumulate(total: Params, micro: Any) -> tuple[Params, Any]:
            grads, losses = gradient(params, micro, num_kept)
            return jax.tree.map(jnp.add, total, grads), losses

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, losses = jax.lax.scan(accumulate, zeros, jax.tree.map(split, samples))
        join = partial(jax.tree.map, lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]))
        return jax.tree.map(lambda g: g / n, total), join(losses)


def _update_ema(rate: float, ema: Params, params: Params, frozen: tuple[str, ...]) -> Params:
    """The averages after a step, rate·average + (1 − rate)·value; frozen parameters keep theirs."""

    # A step moves an average by a few units in the last place, so rounding matters. Compilers fuse
    # the first product with the sum and round the second: it is rate·average, which the authors'
    # code rounds as well.
    def average(a: Array, value: Array) -> Array:
        return (1 - rate) * value + rate * a

    return {
        name: ema[name] if name in frozen else jax.tree.map(average, ema[name], params[name])
        for name in ema
    }


def _summarize(
    losses: dict[str, dict[str, Array]], t: Array, weights: Array, num_steps: int
) -> Metrics:
    """Metrics of a step: weighted means of each pass's terms, and of its loss by quartile of t.

    A quartile of the timesteps in which no sample fell is NaN.
    """
    metrics = {"loss": sum(jnp.mean(weights * terms["loss"]) for terms in losses.values())}
    quartile = 4 * t // num_steps
    for name, terms in losses.items():
        metrics |= {f"{name}_{term}": jnp.mean(weights * v) for term, v in terms.items()}
        for q in range(4):
            inside = (quartile == q).astype(jnp.float32)
            mean = jnp.sum(inside * weights * terms["loss"]) / inside.sum()
            metrics[f"{name}_loss_q{q}"] = mean
    return metrics
