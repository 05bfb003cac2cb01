"""Sampling from a trained model, in Python: `load` a run or weights, `sample` images from them.

A sample's noise is keyed by (key, index of the sample) alone, so neither the batch size nor the
devices change it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Container, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from mdt_jax import checkpoints, pretrained, sharding, weight_files
from mdt_jax import config as config_lib
from mdt_jax.batch_size import fitting
from mdt_jax.diffusion import SAMPLERS, GaussianDiffusion, guided, run_steps, start
from mdt_jax.diffusion.samplers import FEW_STEPS, SamplerState, spaced
from mdt_jax.models import LatentTransformer

CHUNK_STEPS = 25  # steps between two moves of the progress bar
# Under a sample's key, the number of the draw of its label; those of noise count up from 0.
_LABEL = np.uint32(2**32 - 1)
_LABEL_BLOCK = 1024
# tqdm's own bar, but a batch that is half done is half its samples, always in samples a second.
_BAR = "{percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A network with the process it was trained for, and how it is sampled by default.

    Attributes:
      name: the model's name, such as "MDTv2-XL/2".
      network: the Flax module.
      diffusion: its training process.
      class_names: names of the classes, empty if it has none.
      step: training steps behind the parameters.
      defaults: `sample`'s arguments where the caller gives none: sampler, steps, cfg_scale,
        cfg_power, cfg_interval, guided_channels, clip.
    """

    name: str
    network: LatentTransformer
    diffusion: GaussianDiffusion
    class_names: tuple[str, ...] = ()
    step: int = 0
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Any, class_names: Sequence[str] = (), step: int = 0):
        """The model of a run's config."""
        keys = ("sampler", "steps", "cfg_scale", "cfg_power", "cfg_interval", "guided_channels",
                "clip")  # fmt: skip
        return cls(
            name=config.model.name,
            network=config_lib.create_network(config),
            diffusion=config_lib.create_diffusion(config),
            class_names=tuple(class_names),
            step=step,
            defaults={key: config.sample[key] for key in keys},
        )

    def label(self, name: str | int) -> int:
        """The class of a number or a name; ValueError lists the nearest names to an unknown one."""
        count = self.network.num_classes
        if name in self.class_names:
            return self.class_names.index(name)
        try:
            label = int(name)
        except ValueError:
            nearest = difflib.get_close_matches(str(name), self.class_names, n=3, cutoff=0.3)
            hint = f"; the nearest: {', '.join(nearest)}" if nearest else ""
            hint = hint or f"; classes are 0 to {count - 1}, {', '.join(self.class_names[:5])}, …"
            raise ValueError(f"no class is named {name!r}{hint}") from None
        if not 0 <= label < count:
            raise ValueError(f"label {label} is outside 0 to {count - 1}")
        return label


def load(
    path: str | Path,
    *,
    ema_rate: float | None = None,
    step: int | None = None,
    mesh: Mesh | None = None,
    decode_layers: int | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> tuple[DiffusionModel, dict[str, Any]]:
    """A model and its EMA parameters, in their shards if a mesh has an fsdp or tensor axis.

    Args:
      path: a run's workdir, or PyTorch weights: a .pt or .safetensors file, or
        hf://OWNER/REPO/FILE ("hf://shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt").
      ema_rate: which average of a run; the config's first by default.
      step: which checkpoint of a run; the newest by default.
      mesh: devices to load onto; all of them, each with a whole copy, by default.
      decode_layers, num_heads, num_classes, input_size: what PyTorch weights do not show, None for
        what is usual: an MDT v1's decoder depth, a DiT's heads, how many rows of the label table
        are classes, and the side of the latents of diffusers' DiT.

    Raises:
      checkpoints.CheckpointError: no checkpoint there, or a damaged one.
      ValueError: an average the run does not keep; PyTorch weights that cannot be read, are damaged
        or of another kind of model.
    """
    mesh = sharding.create_mesh() if mesh is None else mesh
    if weight_files.is_weight_file(path) or Path(path).is_file():
        if ema_rate is not None or step is not None:
            raise ValueError(f"ema_rate and step are a run's; {path} is one set of weights")
        found = pretrained.read(
            path,
            decode_layers=decode_layers,
            num_heads=num_heads,
            num_classes=num_classes,
            input_size=input_size,
        )
        model = DiffusionModel.from_config(found.config, found.class_names, found.step)
        abstract = sharding.abstract_parameters(mesh, model.network)
        return model, pretrained.place(found.params, abstract)
    step, meta = checkpoints.read_meta(path, step)
    config = config_lib.from_json(meta["config"])
    item = pretrained.average_item(path, config, ema_rate)
    model = DiffusionModel.from_config(config, meta["class_names"], step)
    abstract = sharding.abstract_parameters(mesh, model.network)
    return model, checkpoints.restore_item(path, item, abstract, step=step)


def sample(
    model: DiffusionModel,
    params: dict[str, Any],
    *,
    labels: Sequence[int | str] | np.ndarray | Array | None = None,
    num_samples: int | None = None,
    key: Array | int | np.integer = 0,
    cfg_scale: float | None = None,
    cfg_power: float | None | str = "default",
    cfg_interval: Sequence[float | int] | None = None,
    guided_channels: int | None | str = "default",
    sampler: str | None = None,
    steps: int | str | None = None,
    eta: float = 0.0,
    clip: bool | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "n h w c"]:
    """Samples, one for each label, in the range the model was trained on ([−1, 1] for images).

    What is None or "default" is the model's own (`DiffusionModel.defaults`).

    Args:
      model, params: from `load`, or a model of your own and its parameters.
      labels: classes by number or name. Without any, classes in turn; none if unconditional.
      num_samples: how many, when labels are not given (16), or labels repeated to that many.
      key: PRNG key or seed; sample i's noise depends on it and i alone.
      cfg_scale: guidance scale, 1 for none; always 1 if unconditional.
      cfg_power: exponent of the power-cosine scale, None for a constant scale.
      cfg_interval: (low, high), the fractions of the process that are guided, low ≤ t/T < high;
        (0, 1) for all of it. Outside, a step costs half.
      guided_channels: how many channels of the mean are guided, None for all.
      sampler: "ddpm", "ddim", "heun" (two model calls a step), "dpm++" (DPM-Solver++(2M)) or
        "dpm++sde".
      steps: a count of steps, spaced as the sampler wants (`diffusion.samplers.spaced`), or any
        respacing ("10,15,20", "ddim50", "logsnr20"). Of another sampler than the model's own that
        needs few: `diffusion.samplers.FEW_STEPS`.
      eta: DDIM's, 0 deterministic to 1 ancestral.
      clip: whether x̂0 is clipped to [−1, 1].
      batch_size: samples at a time, over all devices; rounded up to fill them. By default as many
        as their memory takes (`mdt_jax.batch_size`).
      mesh: devices to use; all by default, the batch split over them.
      progress: whether to show a progress bar.

    Raises:
      ValueError: labels, sampler, steps or channels that the model does not have, or no batch.
    """
    chosen = resolve_labels(model, labels, num_samples)
    options = resolve_options(
        model, cfg_scale, cfg_power, cfg_interval, guided_channels, sampler, steps, eta, clip
    )
    mesh = sharding.create_mesh() if mesh is None else mesh
    return run_in_batches(
        lambda mesh, size: compile_sampler(model, mesh, size, options),
        params,
        len(chosen),
        lambda rows: (chosen[rows],),
        key=key,
        batch_size=resolve_batch_size(batch_size, model, params, mesh, options),
        mesh=mesh,
        progress=progress,
    )


def run_in_batches(
    compile_batch: Callable[[Mesh, int], CompiledBatch],
    params: Any,
    count: int,
    inputs: Callable[[Int[np.ndarray, " n"]], tuple[Any, ...]],
    *,
    key: Array | int | np.integer,
    batch_size: int,
    mesh: Mesh,
    progress: bool,
) -> Float[np.ndarray, "n h w c"]:
    """Runs a compiled sampler over as many batches as `count` samples take.

    Args:
      compile_batch: the sampler of a mesh and a batch size.
      params: the network's, moved to the mesh if they are not there.
      count: of samples.
      inputs: indices of a batch's samples → the sampler's arguments between parameters and key.
      key, batch_size, mesh, progress: as `sample` has them.

    Raises:
      ValueError: a batch size below 1.
    """
    size = global_batch_size(batch_size, count, mesh)
    run = compile_batch(mesh, size)
    batches = in_batches(run, params, count, inputs, key=key, progress=progress)
    return np.concatenate([rows for _, rows in batches])


def resolve_batch_size(
    batch_size: int | None,
    model: DiffusionModel,
    params: Any,
    mesh: Mesh,
    options: SamplerOptions,
) -> int:
    """The caller's batch size, or one that fits the devices of the mesh."""
    if batch_size is not None:
        return batch_size
    return fitting(model.network, params, mesh, guided=options.cfg_scale != 1)


def global_batch_size(batch_size: int, count: int, mesh: Mesh) -> int:
    """Samples in a batch over all devices: no more than there are to make, rounded up to fill them.

    Raises:
      ValueError: a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1")
    shards = sharding.batch_shards(mesh)
    return -(-min(batch_size, count) // shards) * shards


def in_batches(
    run: CompiledBatch,
    params: Any,
    count: int,
    inputs: Callable[[Int[np.ndarray, " n"]], tuple[Any, ...]],
    *,
    key: Array | int | np.integer,
    progress: bool,
    done: Container[int] = (),
) -> Iterator[tuple[int, Float[np.ndarray, "n h w c"]]]:
    """Batches of samples as they are made, each after the index of its first.

    Args:
      run: the compiled sampler.
      params: the network's, moved to its mesh if they are not there.
      count, inputs, key, progress: as `run_in_batches` has them.
      done: first indices of batches to leave out.
    """
    key = jax.random.key(int(key)) if isinstance(key, (int, np.integer)) else key
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


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """What a compiled sampler is specialised to."""

    sampler: str
    steps: int | str
    cfg_scale: float
    cfg_power: float | None
    cfg_interval: tuple[float, float] | None
    guided_channels: int
    eta: float
    clip: bool


class CompiledBatch:
    """What samplers of batches of one size share: their noise, and how rows come and go.

    Attributes:
      diffusion: the respaced process.
      mesh: the devices.
      shape: (batch size, h, w, c) of a batch.
    """

    def __init__(self, model: DiffusionModel, mesh: Mesh, batch_size: int, options: SamplerOptions):
        self.diffusion = model.diffusion.respaced(options.steps)
        self.mesh = mesh
        self.shape = (batch_size, *model.network.image_shape)
        self._model, self._options = model, options

    @property
    def num_steps(self) -> int:
        """Steps of one run."""
        return self.diffusion.num_steps

    def _noise(self, keys: Array, *purpose: Int[Array, ""] | int) -> Array:
        """Standard normal rows, each from its own key and a path of integers."""

        def draw(key: Array) -> Array:
            for number in purpose:
                key = jax.random.fold_in(key, number)
            return jax.random.normal(key, self.shape[1:])

        return jax.vmap(draw)(keys)

    def _compile(
        self, chunk: Callable, *first_noise: int, initial: Callable[[Array], Any] = lambda x: x
    ) -> tuple[Callable, Callable]:
        """Jitted: a batch's keys and first state, of the noise that is named, and its steps.

        Args:
          chunk: (params, state, keys, …) → the state some steps on, in place of the first.
          first_noise: path of the first state's noise.
          initial: the first state of that noise, rows of samples throughout.
        """

        def begin(key: Array, first: Array) -> tuple[Array, Any]:
            indices = first + jnp.arange(self.shape[0])
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
            return keys, initial(self._noise(keys, *first_noise))

        batch, whole = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
        return (
            jax.jit(begin, in_shardings=(whole, whole), out_shardings=(batch, batch)),
            jax.jit(
                chunk,
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
        """Keywords of the options' step in `diffusion.samplers`."""
        eta = {"eta": self._options.eta} if self._options.sampler == "ddim" else {}
        return {"clip": self._options.clip} | eta

    def _place(self, rows: np.ndarray) -> Array:
        """Rows on their devices, zeros after them to a whole batch."""
        padding = [(0, self.shape[0] - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
        rows = np.pad(rows, padding)
        shard = sharding.batch_sharding(self.mesh)
        return jax.make_array_from_callback(rows.shape, shard, lambda index: rows[index])

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
            def apply(x: Array, t: Array, y: Array) -> Array:
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

        self._start, self._chunk = self._compile(chunk, self.num_steps, initial=start)
        self._run: Callable = self._chunk

    def warm_up(self, params: Any) -> None:
        """Compiles all that a run needs, for parameters of just these dtypes and shardings."""
        key = jax.random.key(0)
        keys, state = self._start(key, np.int32(0))
        labels = self._place(np.zeros(self.shape[0], np.int32))
        step = np.int32(0)
        self._run = self._chunk.lower(params, state, keys, labels, step, step).compile()
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
        """Samples for up to a batch of labels, the first being sample `first_index` of the key."""
        keys, state = self._start(key, np.int32(first_index))
        placed = self._place(labels.astype(np.int32))
        for first in range(0, self.num_steps, CHUNK_STEPS):
            last = min(first + CHUNK_STEPS, self.num_steps)
            state = self._run(params, state, keys, placed, np.int32(first), np.int32(last))
            state.x.block_until_ready()
            advance(last - first)
        return self._gather(state.x, len(labels))


@lru_cache(maxsize=8)
def compile_sampler(
    model: DiffusionModel, mesh: Mesh, batch_size: int, options: SamplerOptions
) -> CompiledSampler:
    """The sampler for these settings, kept for the next call."""
    return CompiledSampler(model, mesh, batch_size, options)


def resolve_options(
    model: DiffusionModel,
    cfg_scale: float | None = None,
    cfg_power: float | None | str = "default",
    cfg_interval: Sequence[float | int] | None = None,
    guided_channels: int | None | str = "default",
    sampler: str | None = None,
    steps: int | str | None = None,
    eta: float = 0.0,
    clip: bool | None = None,
) -> SamplerOptions:
    """The caller's settings over the model's own; refuses those that cannot be."""
    given = {"cfg_scale": cfg_scale, "sampler": sampler, "steps": steps, "clip": clip}
    fallback = {"cfg_scale": 1.0, "sampler": "ddpm", "steps": 250, "clip": False} | model.defaults
    if sampler != fallback["sampler"]:  # the model's number of steps is its own sampler's
        fallback["steps"] = FEW_STEPS.get(sampler, fallback["steps"])
    chosen = {k: fallback[k] if v is None else v for k, v in given.items()}
    power = model.defaults.get("cfg_power") if cfg_power == "default" else cfg_power
    channels = (
        model.defaults.get("guided_channels") if guided_channels == "default" else guided_channels
    )
    interval = cfg_interval or model.defaults.get("cfg_interval") or (0.0, 1.0)
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"cfg_interval {tuple(interval)} is not (low, high), 0 <= low < high <= 1")
    if chosen["sampler"] not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sampler {chosen['sampler']!r} is unknown; known: {known}")
    chosen["steps"] = spaced(chosen["sampler"], chosen["steps"])
    model.diffusion.respaced(chosen["steps"])  # refuses steps that the process does not have
    available = model.network.in_channels
    channels = available if channels is None else channels
    if not 1 <= channels <= available:
        raise ValueError(
            f"guided_channels {channels} is outside 1 to {available}; None guides all of them"
        )
    if model.network.num_classes == 0:
        chosen["cfg_scale"] = 1.0
    elif chosen["cfg_scale"] != 1 and not model.network.null_class:
        raise ValueError(f"cfg_scale {chosen['cfg_scale']}: the model has no null class; 1 works")
    return SamplerOptions(
        **{**chosen, "cfg_scale": float(chosen["cfg_scale"])},
        cfg_power=power,
        cfg_interval=None if tuple(interval) == (0, 1) else tuple(map(float, interval)),
        guided_channels=channels,
        eta=eta,
    )


def resolve_labels(
    model: DiffusionModel, labels: Any = None, num_samples: int | None = None
) -> Int[np.ndarray, " n"]:
    """Labels as numbers, repeated or in turn to `num_samples`; zeros if unconditional."""
    given = labels is not None and len(labels) > 0
    classes = resolve_classes(model, labels)
    return np.resize(classes, _count(num_samples, len(classes) if given else 16))


def draw_labels(
    model: DiffusionModel,
    labels: Any = None,
    num_samples: int | None = None,
    key: Array | int | np.integer = 0,
) -> Int[np.ndarray, " n"]:
    """`resolve_labels`, but each is drawn of the classes uniformly, by (key, index) alone."""
    given = labels is not None and len(labels) > 0
    classes = resolve_classes(model, labels)
    count = _count(num_samples, len(classes) if given else 16)
    key = jax.random.key(int(key)) if isinstance(key, (int, np.integer)) else key
    # In blocks of one size, so that it compiles once.
    blocks = range(0, count, _LABEL_BLOCK)
    drawn = [np.asarray(_draw(key, np.int32(first), np.int32(len(classes)))) for first in blocks]
    return classes[np.concatenate(drawn)[:count]]


@jax.jit
def _draw(key: Array, first: Array, num_classes: Array) -> Array:
    """Uniform integers below `num_classes` of the `_LABEL_BLOCK` samples from `first` on."""

    def draw(index: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, index), _LABEL)
        return jax.random.randint(own, (), 0, num_classes)

    return jax.vmap(draw)(first + jnp.arange(_LABEL_BLOCK))


def resolve_classes(model: DiffusionModel, labels: Any = None) -> Int[np.ndarray, " n"]:
    """The classes that labels name, as numbers: all of them without any, 0 if unconditional.

    Raises:
      ValueError: a class that the model does not have.
    """
    count = model.network.num_classes
    if labels is None or not len(labels):
        return np.arange(max(count, 1), dtype=np.int32)
    if count == 0:
        raise ValueError("the model is unconditional; it takes no labels")
    return np.array([model.label(name) for name in np.asarray(labels).tolist()], np.int32)


def _count(num_samples: int | None, default: int) -> int:
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples {num_samples} is below 1")
    return num_samples or default
