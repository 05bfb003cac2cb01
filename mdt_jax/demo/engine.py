"""The demo's engine: a loaded model that draws, paints and predicts, and tells how far it is.

It yields `Update`s and does a chunk of steps between two of them. So whoever stops asking for more
stops the devices.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from mdt_jax import sampling
from mdt_jax.demo.requests import HiddenRequest, PaintRequest, SampleRequest, Surroundings
from mdt_jax.diffusion.seeds import key_of
from mdt_jax.models.masking import ids_to_keep
from mdt_jax.parallel import sharding
from mdt_jax.sample.painting import to_latents
from mdt_jax.sampling import images, inpainting
from mdt_jax.sampling.sampler import on_mesh

VAE_BATCH_SIZE = 16  # as the command has it, so that the bits are the command's
_GREY = 127  # hidden tokens
_PREDICTED = 4  # samples whose x̂_0 is predicted at a time


@dataclasses.dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
      pixels: uint8 (h, w, c).
      png: the contents of its file, which say what made it.
      name: the file's name.
      caption: a few words on it.
    """

    pixels: UInt8[np.ndarray, "h w c"]
    png: bytes
    name: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Update:
    """How far a request is.

    Attributes:
      done, total: steps.
      note: a few words on what is being done.
      previews: the pictures as they look by now; None to keep those before.
      result: the finished pictures, which end the request.
    """

    done: int
    total: int
    note: str
    previews: tuple[UInt8[np.ndarray, "h w c"], ...] | None = None
    result: tuple[Picture, ...] | None = None


class Pace:
    """How many steps to take at a time: short of a tick, and in a few chunks at the least."""

    def __init__(self, total: int, tick: float = 0.3, least_chunks: int = 10):
        self._most = max(1, total // least_chunks)
        self._tick = tick
        self._steps, self._began = 0, 0.0
        self._spent = self._taken = 0.0

    def __call__(self) -> int:
        """The next chunk; called at its begin."""
        steps = 1 if not self._taken else int(self._tick * self._taken / max(self._spent, 1e-6))
        self._steps, self._began = min(max(steps, 1), self._most), time.monotonic()
        return self._steps

    def end(self) -> None:
        """Says that the chunk is done."""
        self._taken += self._steps
        self._spent += time.monotonic() - self._began


class Predictor:
    """x̂_0 of noisy samples by one pass of the network, full or masked.

    It takes a few samples at a time, whatever the batch, so that one program does for all of them.
    """

    def __init__(self, model: sampling.DiffusionModel, mesh: Mesh):
        network = model.network
        clip = bool(model.defaults.get("clip", False))
        shards = sharding.batch_shards(mesh)
        self._size = -(-_PREDICTED // shards) * shards

        def predict(params: Any, x: Array, t: Array, labels: Array, ids: Array | None) -> Array:
            def apply(x: Array, t: Array) -> Any:
                rows = () if ids is None else (jnp.broadcast_to(ids, (len(x), len(ids))),)
                return network.apply({"params": params}, x, t, labels, *rows)

            with sharding.activations(mesh):
                steps = jnp.full(x.shape[:1], t, jnp.int32)
                return model.diffusion.predict(apply, x, steps, clip).x0

        self._predict = jax.jit(predict, compiler_options=sharding.compiler_options(mesh))

    def __call__(
        self,
        params: Any,
        x: Float[np.ndarray, "n h w c"],
        timestep: int,
        labels: Int[np.ndarray, " n"],
        ids_keep: Int[np.ndarray, " kept"] | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """x̂_0 of samples.

        Args:
          params: the network's.
          x: samples at the noise of `timestep`.
          timestep: of the training process.
          labels: their classes.
          ids_keep: the tokens that a masked pass sees; None for the full pass.
        """
        guesses = []
        for first in range(0, len(x), self._size):
            rows, own = x[first : first + self._size], labels[first : first + self._size]
            padding = self._size - len(rows)
            rows = np.pad(rows, [(0, padding), (0, 0), (0, 0), (0, 0)])
            own = np.pad(own.astype(np.int32), (0, padding))
            guess = self._predict(params, rows, np.int32(timestep), own, ids_keep)
            guesses.append(np.asarray(guess)[: self._size - padding])
        return np.concatenate(guesses)


class Engine:
    """A model on its devices, and what the page asks of it. One thread at a time uses it.

    Attributes:
      around: the model, its autoencoder, and the limits.
      about: what every picture's metadata say beside its own settings.
    """

    def __init__(self, around: Surroundings, params: Any, mesh: Mesh, about: dict[str, Any]):
        self.around, self.about = around, about
        self._mesh = mesh
        self._params = on_mesh(params, mesh)
        self._predict = Predictor(around.model, mesh)
        # Beside `compile_sampler`'s own last eight: those that were made first stay.
        self._programs: dict[Any, Any] = {}

    def warm_up(self, requests: Sequence[Any], told: Callable[[str], Any] = lambda text: None):
        """Does requests once, so that all programs of their kind are compiled.

        Args:
          requests: those that a page asks for without a change to its controls.
          told: is told how far it is.
        """
        for done, request in enumerate(requests):
            told(f"compiling: {done} of {len(requests)} kinds of request are ready")
            for _ in self.updates(request, warming=True):
                pass

    def updates(self, request: Any, warming: bool = False) -> Iterator[Update]:
        """Does a request.

        Args:
          request: a `SampleRequest`, `PaintRequest` or `HiddenRequest`.
          warming: whether one step is enough, whose pictures nobody sees.

        Raises:
          ValueError: what it asks for cannot be, or samples that are not finite.
        """
        if isinstance(request, SampleRequest):
            return self._sample(request, warming)
        if isinstance(request, PaintRequest):
            return self._paint(request, warming)
        return self._show_hidden(request)

    def _sample(self, request: SampleRequest, warming: bool) -> Iterator[Update]:
        model, options, labels = self.around.model, request.options, request.labels
        size = self._batch_size(len(labels), options)
        made = []
        key = ("sample", size, options)
        if key not in self._programs:
            yield Update(0, 1, "compiling for these settings")
            run = sampling.compile_sampler(model, self._mesh, size, options)
            run.warm_up(self._params)
            self._keep(key, run)
        run = self._programs[key]
        noise = key_of(request.seed)
        for first in range(0, len(labels), size):
            rows = labels[first : first + size]
            states = lambda pace, f=first, r=rows: run.states(self._params, r, noise, f, pace)  # noqa: E731
            yield from self._follow(states, run, rows, made, len(labels), warming)
        if warming:
            return
        samples = np.concatenate(made)
        sampling.check_samples(samples, 0, self._params)
        pixels = images.to_uint8(self._decode(samples, size))
        settings = vars(options) | {"num_samples": len(labels)}
        yield self._result(pixels, labels, request.seed, settings)

    def _paint(self, request: PaintRequest, warming: bool) -> Iterator[Update]:
        model, autoencoder = self.around.model, self.around.autoencoder
        image = inpainting.to_unit_range(request.image)
        given, unknown = image, request.mask
        if autoencoder:
            given, unknown = to_latents(autoencoder, image, request.mask, VAE_BATCH_SIZE)
        task = inpainting.prepare_task(
            model,
            given,
            unknown,
            labels=list(request.labels) or None,
            num_samples=request.count,
            **request.settings,
        )
        labels = task.labels
        size = self._batch_size(len(labels), task.options)
        kept = len(task.ids_keep) if task.masked_share else None
        key = ("paint", size, task.options, task.resamples, kept)
        if key not in self._programs:
            yield Update(0, 1, "compiling for these settings")
            inpainter = inpainting.compile_inpainter(
                model, self._mesh, size, task.options, task.resamples
            )
            self._keep(key, inpainter)
        run, made, noise = self._programs[key], [], key_of(request.seed)
        for first in range(0, len(labels), size):
            rows = np.arange(first, min(first + size, len(labels)))
            states = lambda pace, f=first, r=rows: run.states(self._params, task, r, noise, f, pace)  # noqa: E731
            yield from self._follow(states, run, labels[rows], made, len(labels), warming)
            made[-1] = run.joined(made[-1], task, rows)
        if warming:
            return
        painted = np.concatenate(made)
        sampling.check_samples(painted, 0, self._params)
        if autoencoder:
            decoded = autoencoder.decode(painted, VAE_BATCH_SIZE)
            painted = np.where(request.mask[..., None], decoded, image)
        settings = vars(task.options) | {
            "num_samples": len(labels),
            "resamples": task.resamples,
            "masked_share": task.masked_share,
        }
        yield self._result(images.to_uint8(painted), labels, request.seed, settings)

    def _follow(
        self,
        states: Callable[[Pace], Iterator[tuple[int, Array]]],
        run: sampling.CompiledBatch,
        labels: Int[np.ndarray, " n"],
        made: list[np.ndarray],
        count: int,
        warming: bool,
    ) -> Iterator[Update]:
        """Takes one batch's steps, and appends its last state to `made`.

        Previews take a fifth of the time at most.
        """
        before = sum(map(len, made))
        total = run.num_steps * -(-count // run.shape[0])
        begun = run.num_steps * (before // run.shape[0])
        pace = Pace(run.num_steps)
        next_preview = 0.0
        x: Any = None
        for done, x in states(pace):
            x.block_until_ready()
            pace.end()
            previews = None
            if done < run.num_steps and time.monotonic() >= next_preview:
                began = time.monotonic()
                shown = self._preview(x, run.timestep(done), labels)
                blank = np.full_like(shown[0], 255)
                previews = (*[blank] * before, *shown, *[blank] * (count - before - len(shown)))
                next_preview = time.monotonic() + 4 * (time.monotonic() - began)
            yield Update(begun + done, total, "denoising", previews)
            if warming:
                break
        made.append(np.asarray(x)[: len(labels)])

    def _preview(
        self, x: Array, timestep: int, labels: Int[np.ndarray, " n"]
    ) -> tuple[UInt8[np.ndarray, "h w c"], ...]:
        """What the model takes a batch of noisy samples for, as pictures."""
        guess = self._predict(self._params, np.asarray(x)[: len(labels)], timestep, labels)
        return tuple(self._pictures(guess, len(x)))

    def _show_hidden(self, request: HiddenRequest) -> Iterator[Update]:
        model, autoencoder = self.around.model, self.around.autoencoder
        network = model.network
        yield Update(0, 2, "hiding tokens")
        image = inpainting.to_unit_range(request.image)
        given = image[None]
        if autoencoder:
            given = autoencoder.latents.normalize(autoencoder.encode(given, VAE_BATCH_SIZE)[0])
        noise_key, ids_key = jax.random.split(key_of(request.seed))
        steps = jnp.full(1, request.timestep, jnp.int32)
        noise = jax.random.normal(noise_key, given.shape)
        x = np.asarray(model.diffusion.add_noise(jnp.asarray(given), steps, noise))
        drawn = jax.random.uniform(ids_key, (1, network.num_tokens))
        ids = np.sort(np.asarray(ids_to_keep(drawn, request.kept))[0])

        label, guesses = np.array([request.label]), []
        for done, kept in enumerate((ids, None), start=1):
            guess = self._predict(self._params, x, request.timestep, label, kept)
            images.check_finite(guess)
            guesses.append(self._pictures(guess, 1)[0])
            yield Update(done, 2, "predicting")

        hidden = np.ones(network.num_tokens, bool)
        hidden[ids] = False
        patch = network.patch_size * (autoencoder.module.downsampling if autoencoder else 1)
        grid = hidden.reshape(network.grid_size, network.grid_size)
        pixels = repeat(grid, "h w -> (h a) (w b) 1", a=patch, b=patch)
        seen = np.where(pixels, np.uint8(_GREY), self._pictures(x, 1)[0])
        errors = [self._error(guess, request.image, pixels) for guess in guesses]
        said = f"{hidden.sum()} of {network.num_tokens} tokens hidden"
        shown = (
            ("given", request.image, "The picture, as the model's size has it", None),
            ("seen", seen, f"What the encoder sees, noise added: {said}", None),
            ("masked", guesses[0], f"The masked pass's picture of it; {errors[0]}", request),
            ("full", guesses[1], f"The full pass's, which sees all tokens; {errors[1]}", request),
        )
        settings = {"timestep": request.timestep, "kept_tokens": request.kept}
        yield Update(
            2,
            2,
            "done",
            result=tuple(
                Picture(pixels, self._png(pixels, made, settings), f"{name}.png", caption)
                for name, pixels, caption, made in shown
            ),
        )

    @staticmethod
    def _error(guess: np.ndarray, image: np.ndarray, hidden: np.ndarray) -> str:
        """The root mean square error at hidden pixels, in words."""
        at = np.broadcast_to(hidden, image.shape)
        difference = guess[at].astype(np.float32) - image[at].astype(np.float32)
        return f"error where hidden {np.sqrt(np.square(difference).mean()):.0f} of 255"

    def _png(self, pixels: np.ndarray, made: HiddenRequest | None, settings: dict) -> bytes:
        if made is None:
            return images.encode_png(pixels, {"Content": "a picture that was given"})
        about = self.about | settings | {"seed": made.seed, "labels": [made.label]}
        return images.encode_png(pixels, images.provenance(**about))

    def _result(
        self,
        pixels: UInt8[np.ndarray, "n h w c"],
        labels: Int[np.ndarray, " n"],
        seed: int,
        settings: dict[str, Any],
    ) -> Update:
        made = []
        for index, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
            about = self.about | settings | {"seed": seed, "labels": [int(label)], "index": index}
            caption, name = self.class_name(int(label)), f"seed{seed}_{index}.png"
            png = images.encode_png(picture, images.provenance(**about))
            made.append(Picture(picture, png, name, f"{caption}, seed {seed}, number {index}"))
        return Update(1, 1, "done", result=tuple(made))

    def class_name(self, label: int) -> str:
        """A class in words: its name, or number."""
        names, count = self.around.model.class_names, self.around.model.network.num_classes
        if label >= count or count == 0:
            return "no class"
        return names[label] if names else f"class {label}"

    def _decode(self, samples: np.ndarray, size: int) -> np.ndarray:
        """Samples as images in [−1, 1]; `size` is that of their batches."""
        if self.around.autoencoder is None:
            return samples
        batches = [
            self.around.autoencoder.decode_batch(
                samples[first : first + size], size, VAE_BATCH_SIZE
            )
            for first in range(0, len(samples), size)
        ]
        return np.concatenate(batches)

    def _pictures(self, samples: np.ndarray, size: int) -> UInt8[np.ndarray, "n h w c"]:
        """Samples on their way, whatever they hold, as pictures."""
        return images.to_uint8(np.nan_to_num(self._decode(np.nan_to_num(samples), size)))

    def _batch_size(self, count: int, options: sampling.SamplerOptions) -> int:
        """The batch size of `mdt_jax.sample` without one, so that the bits are the same."""
        model, mesh = self.around.model, self._mesh
        fitting = sampling.resolve_batch_size(None, model, self._params, mesh, options)
        return sampling.global_batch_size(fitting, count, mesh)

    def _keep(self, key: Any, program: Any) -> None:
        """Keeps a program; of those made after the first ones, the 16 latest."""
        self._programs[key] = program
        if len(self._programs) > 48:
            del self._programs[list(self._programs)[32]]
