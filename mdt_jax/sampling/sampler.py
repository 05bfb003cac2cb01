"""Sampling from a trained model, in Python: `load` a run or weights, `sample` images from them.

A sample's noise is keyed by (key, index of the sample) alone, so neither the batch size nor the
devices change it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from mdt_jax.basics import ranges
from mdt_jax.diffusion import guided, initial_state, run_steps
from mdt_jax.diffusion.options import SamplerOptions
from mdt_jax.diffusion.samplers import SamplerState
from mdt_jax.diffusion.seeds import key_of
from mdt_jax.parallel import sharding
from mdt_jax.parallel.host_memory import keep_memory
from mdt_jax.sampling import images
from mdt_jax.sampling.batch_size import fitting
from mdt_jax.sampling.model import DiffusionModel
from mdt_jax.sampling.options import check_options, resolve_labels, resolve_options
from mdt_jax.weights import pretrained

CHUNK_STEPS = 25  # steps between two moves of the progress bar
# The named scope of a sampler's steps in its program, by which `compilers.estimate` knows its work.
SAMPLING_SCOPE = "sampling_steps"
# tqdm's own bar, except that a batch half done counts as half its samples, and that the rate is
# always in samples a second.
_BAR = "{percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


def sample(
    model: DiffusionModel,
    params: dict[str, Any],
    *,
    labels: Any = None,
    num_samples: int | None = None,
    key: Any = 0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    **options: Any,
) -> Float[np.ndarray, "n h w c"]:
    """Samples, one for each label, in the range the model was trained on ([−1, 1] for images).

    Args:
      model, params: from `load`, or a model of your own and its parameters.
      labels: classes by number or name. Without any, classes in turn; none if unconditional.
      num_samples: how many, when labels are not given (16), or labels repeated to that many.
      key: PRNG key or seed; sample i's noise depends on it and i alone.
      batch_size: samples at a time, over all devices; rounded up to fill them. By default as many
        as their memory takes (`mdt_jax.sampling.batch_size`).
      mesh: devices to use; all by default, the batch split over them.
      progress: whether to show a progress bar.
      **options: how the sampler draws, such as `cfg_scale=2.0` or `sampler="ddim"`: fields of
        `SamplerOptions`, where each is described. One that is not given is the model's own
        (`DiffusionModel.defaults`). cfg_power None is a constant scale, guided_channels None all
        channels.

    Raises:
      TypeError: an unknown option.
      ValueError: labels, sampler, steps or channels that the model does not have, or no batch;
        samples with NaN or infinite values.
    """
    check_options(sample, options)
    chosen = resolve_labels(model, labels, num_samples)
    resolved = resolve_options(model, **options)
    mesh = sharding.create_mesh() if mesh is None else mesh
    return run_in_batches(
        lambda mesh, size: compile_sampler(model, mesh, size, resolved),
        params,
        len(chosen),
        lambda rows: (chosen[rows],),
        key=key,
        batch_size=resolve_batch_size(batch_size, model, params, mesh, resolved),
        mesh=mesh,
        progress=progress,
    )


def run_in_batches(
    compile_batch: Callable[[Mesh, int], CompiledBatch],
    params: Any,
    count: int,
    inputs: Callable[[Int[np.ndarray, " n"]], tuple[Any, ...]],
    *,
    key: Any,
    batch_size: int,
    mesh: Mesh,
    progress: bool,
) -> Float[np.ndarray, "n h w c"]:
    """Runs a compiled sampler over as many batches as `count` samples take.

    Args:
      compile_batch: (mesh, batch size) → the sampler.
      params: the network's, moved to the mesh if they are not there.
      count: how many samples.
      inputs: indices of a batch's samples → the sampler's arguments between parameters and key.
      key, batch_size, mesh, progress: as for `sample`.

    Raises:
      ValueError: a batch size below 1, or samples that are not finite.
    """
    size = global_batch_size(batch_size, count, mesh)
    run = compile_batch(mesh, size)
    made = []
    for first, rows in in_batches(run, params, count, inputs, key=key, progress=progress):
        check_samples(rows, first, params)
        made.append(rows)
    return np.concatenate(made)


def check_samples(samples: Float[np.ndarray, "n h w c"], first_index: int, params: Any) -> None:
    """Refuses samples with NaN or infinite values, with ValueError, and says what they come from.

    Args:
      samples: as they were drawn: images or latents.
      first_index: the index of the first of them.
      params: the network's, which are looked through for the cause.
    """
    if images.is_finite(samples).all():
        return
    if name := pretrained.first_not_finite(params):
        cause = (
            f"{name} of the weights holds NaN or infinite values; sample an earlier checkpoint, or "
            "other weights"
        )
        images.check_finite(samples, first_index, cause=cause)
    images.check_finite(samples, first_index)


def resolve_batch_size(
    batch_size: int | None,
    model: DiffusionModel,
    params: Any,
    mesh: Mesh,
    options: SamplerOptions,
) -> int:
    """The caller's batch size, or if that is None, one that fits the devices of the mesh."""
    if batch_size is not None:
        return batch_size
    return fitting(model.network, params, mesh, guided=options.cfg_scale != 1)


def global_batch_size(batch_size: int, count: int, mesh: Mesh) -> int:
    """Samples in a batch over all devices: at most `count`, rounded up to fill the devices.

    Raises:
      ValueError: a batch size out of its range.
    """
    ranges.check("batch_size", batch_size)
    shards = sharding.batch_shards(mesh)
    return -(-min(batch_size, count) // shards) * shards


def in_batches(
    run: Any,
    params: Any,
    count: int,
    inputs: Callable[[Int[np.ndarray, " n"]], tuple[Any, ...]],
    *,
    key: Any,
    progress: bool,
    done: Container[int] = (),
) -> Iterator[tuple[int, Float[np.ndarray, "n h w c"]]]:
    """Yields batches as they are made: the index of the first sample, and the samples.

    Args:
      run: the compiled sampler.
      params: the network's, moved to its mesh if they are not there.
      count, inputs, key, progress: as for `run_in_batches`.
      done: first indices of the batches to leave out.
    """
    key = key_of(key)
    params = on_mesh(params, run.mesh)
    size = run.shape[0]
    batches = [(first, min(first + size, count)) for first in range(0, count, size)]
    there = sum(last - first for first, last in batches if first in done)
    with tqdm(
        total=count,
        initial=there,
        unit=" images",
        bar_format=_BAR,
        smoothing=0.05,
        disable=not progress or jax.process_index() > 0,
    ) as bar:
        for first, last in batches:
            if first in done:
                continue
            rows = np.arange(first, last)

            def advance(steps: int, share: float = len(rows) / run.num_steps) -> None:
                bar.update(steps * share)

            yield first, run(params, *inputs(rows), key, first, advance)


def on_mesh(params: Any, mesh: Mesh) -> Any:
    """Parameters on a mesh's devices: as they are if they are there, else a copy on each."""
    devices = set(mesh.devices.flat)
    there = all(
        isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices
        for leaf in jax.tree.leaves(params)
    )
    return params if there else jax.device_put(params, sharding.replicated(mesh))


class CompiledBatch:
    """The base of compiled samplers: noise, guidance, and moving batches to the devices and back.

    Attributes:
      diffusion: the respaced process.
      mesh: the devices.
      shape: (batch size, h, w, c), the shape of a batch.
      resamples: how often each step but the last is taken.
    """

    resamples = 1

    def __init__(self, model: DiffusionModel, mesh: Mesh, batch_size: int, options: SamplerOptions):
        self.diffusion = model.diffusion.respaced(options.steps)
        self.mesh = mesh
        self.shape = (batch_size, *model.network.image_shape)
        self._model, self._options = model, options

    @property
    def num_steps(self) -> int:
        """Steps of one run; the last one, to x₀, is taken once."""
        return (self.diffusion.num_steps - 1) * self.resamples + 1

    def timestep(self, done: int) -> int:
        """The timestep, of the training process, of a state after `done` of `num_steps` steps."""
        index = self.diffusion.num_steps - 1 - done // self.resamples
        return int(self.diffusion.schedule.timesteps[index])

    def _noise(self, keys: Array, *purpose: Int[Array, ""] | int) -> Array:
        """Standard normal samples, each from its key with the integers of `purpose` folded in."""

        def draw(key: Array) -> Array:
            for number in purpose:
                key = jax.random.fold_in(key, number)
            return jax.random.normal(key, self.shape[1:])

        return jax.vmap(draw)(keys)

    def _compile(
        self, chunk: Callable, *first_noise: int, initial: Callable[[Array], Any] = lambda x: x
    ) -> tuple[Callable, Callable]:
        """Jits the two parts of a run.

        Args:
          chunk: (params, state, keys, …) → the state some steps later; the state is donated.
          *first_noise: the purpose of the noise that a run starts from, as for `_noise`.
          initial: noise → the first state, whose arrays are sharded over the batch.

        Returns:
          (key, index of the first sample) → the samples' keys and the first state; and `chunk`.
        """

        def begin(key: Array, first: Array) -> tuple[Array, Any]:
            indices = first + jnp.arange(self.shape[0])
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
            return keys, initial(self._noise(keys, *first_noise))

        def steps(*arguments: Any) -> Any:
            with jax.named_scope(SAMPLING_SCOPE):
                return chunk(*arguments)

        batch, whole = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
        return (
            jax.jit(begin, in_shardings=(whole, whole), out_shardings=(batch, batch)),
            jax.jit(
                steps,
                out_shardings=batch,
                donate_argnums=1,
                compiler_options=sharding.compiler_options(self.mesh),
            ),
        )

    def _guided(self, apply: Callable, labels: Array) -> Callable:
        """(x, t) → the network's output under the options' guidance; apply takes (x, t, labels)."""
        return guided(
            apply,
            labels,
            self._model.network.num_classes,
            scale=self._options.cfg_scale,
            power=self._options.cfg_power,
            channels=self._options.guided_channels,
            interval=self._options.cfg_interval,
            num_train_timesteps=self._model.diffusion.schedule.num_train_timesteps,
        )

    def _step_settings(self) -> dict[str, Any]:
        """Keyword arguments of the sampler's step in `diffusion.samplers`."""
        eta = {"eta": self._options.eta} if self._options.sampler == "ddim" else {}
        return {"clip": self._options.clip} | eta

    def _place(self, rows: np.ndarray) -> Array:
        """Rows on their devices, zeros after them to a whole batch."""
        padding = [(0, self.shape[0] - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
        rows = np.pad(rows, padding)
        shard = sharding.batch_sharding(self.mesh)
        return jax.make_array_from_callback(rows.shape, shard, lambda index: rows[index])

    def _last_of(
        self, states: Iterator[tuple[int, Array]], count: int, advance: Callable[[int], Any]
    ) -> np.ndarray:
        """The first rows of the last state, on every process; `advance` is told of each."""
        before = 0
        for done, x in states:
            x.block_until_ready()
            advance(done - before)
            before = done
        return self._gather(x, count)

    def _gather(self, x: Array, count: int) -> np.ndarray:
        """The first rows of a batch, on every process."""
        if jax.process_count() > 1:
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)[:count]


class CompiledSampler(CompiledBatch):
    """A sampler for batches of one size, compiled once; `compile_sampler` makes and keeps them."""

    def __init__(self, model: DiffusionModel, mesh: Mesh, batch_size: int, options: SamplerOptions):
        super().__init__(model, mesh, batch_size, options)

        def chunk(
            params: Any,
            state: SamplerState,
            keys: Array,
            labels: Array,
            first: Array,
            last: Array,
        ) -> SamplerState:
            def apply(x: Array, t: Array, y: Array) -> Any:
                return model.network.apply({"params": params}, x, t, y)

            with sharding.activations(mesh):
                return run_steps(
                    options.sampler,
                    self.diffusion,
                    self._guided(apply, labels),
                    state,
                    lambda i: self._noise(keys, i),
                    first,
                    last,
                    **self._step_settings(),
                )

        self._chunk: Any  # jitted
        self._start, self._chunk = self._compile(chunk, self.num_steps, initial=initial_state)
        self._run: Callable = self._chunk

    def warm_up(self, params: Any) -> None:
        """Compiles all that a run needs, for parameters of exactly these dtypes and shardings."""
        key = jax.random.key(0)
        keys, state = self._start(key, np.int32(0))
        labels = self._place(np.zeros(self.shape[0], np.int32))
        step = np.int32(0)
        compiled = self._chunk.lower(params, state, keys, labels, step, step).compile()
        keep_memory(compiled.memory_analysis().temp_size_in_bytes)
        self._run = compiled
        if jax.process_count() > 1:
            multihost_utils.process_allgather(state.x, tiled=True)

    def __call__(
        self,
        params: Any,
        labels: Int[np.ndarray, " n"],
        key: Array,
        first_index: int = 0,
        advance: Callable[[int], Any] = lambda steps: None,
    ) -> Float[np.ndarray, "n h w c"]:
        """Samples for up to a batch of labels; the first has the noise of sample `first_index`.

        Args:
          params: the network's.
          labels: classes, at most a batch of them.
          key: PRNG key.
          first_index: index of the first sample under the key.
          advance: is told how many steps were taken since it was last called.
        """
        return self._last_of(self.states(params, labels, key, first_index), len(labels), advance)

    def states(
        self,
        params: Any,
        labels: Int[np.ndarray, " n"],
        key: Array,
        first_index: int = 0,
        pace: Callable[[], int] = lambda: CHUNK_STEPS,
    ) -> Iterator[tuple[int, Array]]:
        """The states that a call goes through, after every few steps, to their last, the samples.

        However the steps are divided, it is one compiled program that takes them, with the same
        bits. A caller that asks for no further state stops the devices there.

        Args:
          params, labels, key, first_index: as for a call.
          pace: is asked how many steps to take next.

        Yields:
          The number of steps taken, and the whole batch's x, which the next steps overwrite.
        """
        keys, state = self._start(key, np.int32(first_index))
        placed = self._place(labels.astype(np.int32))
        for first, last in chunks(0, self.num_steps, pace):
            state = self._run(params, state, keys, placed, np.int32(first), np.int32(last))
            yield last, state.x


def chunks(begin: int, end: int, pace: Callable[[], int]) -> Iterator[tuple[int, int]]:
    """The first step of each chunk from `begin` to `end`, and the step after its last."""
    while begin < end:
        last = min(begin + pace(), end)
        yield begin, last
        begin = last


@lru_cache(maxsize=8)
def compile_sampler(
    model: DiffusionModel, mesh: Mesh, batch_size: int, options: SamplerOptions
) -> CompiledSampler:
    """The sampler for these settings; the last eight are kept, compiled, for later calls."""
    return CompiledSampler(model, mesh, batch_size, options)
