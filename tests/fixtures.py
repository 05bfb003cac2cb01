"""The authors' reference arrays (tests/data), as this project's models and parameter trees."""

from __future__ import annotations

import ast
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.convert.transformers import from_torch
from mdt_jax.diffusion import GaussianDiffusion, NoiseSchedule
from mdt_jax.models import LatentTransformer, create_model
from mdt_jax.parallel import sharding
from mdt_jax.training.optimizers import create_optimizer, learning_rate_schedule
from mdt_jax.training.step import Trainer, TrainState, scale_pixels

DATA = Path(__file__).parent / "data"
FAMILIES = {"mdt_v1": "MDT", "mdt_v2": "MDTv2", "dit": "DiT"}


@dataclasses.dataclass(frozen=True)
class Reference:
    """One of the authors' tiny models: settings, weights, inputs and what came of them."""

    family: str
    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __getitem__(self, key: str) -> jax.Array:
        return jnp.asarray(self.arrays[key])

    @property
    def masks(self) -> bool:
        return self.family != "DiT"

    def model(self, **overrides: Any) -> LatentTransformer:
        s = self.settings
        sizes = {k: s[k] for k in ("input_size", "patch_size", "in_channels", "hidden_size")}
        sizes |= {k: s[k] for k in ("depth", "num_heads", "num_classes")}
        if self.masks:
            sizes["decoder_depth"] = s["decode_layer"]
        return create_model(self.family, **(sizes | overrides))

    def tree(self, prefix: str) -> dict[str, Any]:
        """The arrays under a prefix ("param/", "grad/", …) as our parameter tree."""
        weights = {
            k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)
        }
        tree = from_torch(
            weights,
            family=self.family,
            depth=self.settings["depth"],
            num_heads=self.settings["num_heads"],
            decoder_depth=self.settings.get("decode_layer", 0),
        )
        return jax.tree.map(jnp.asarray, tree)

    def nhwc(self, key: str) -> jax.Array:
        """An NCHW array in this project's NHWC."""
        return jnp.asarray(np.moveaxis(self.arrays[key], -3, -1))


@functools.cache
def reference(name: str) -> Reference:
    """The fixture of "mdt_v1", "mdt_v2" or "dit"."""
    with np.load(DATA / f"{name}_tiny.npz") as file:
        arrays = dict(file)
    return Reference(FAMILIES[name], ast.literal_eval(str(arrays["config"])), arrays)


def relative_error(a: Any, b: Any) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# How the authors trained each fixture.
RECIPES = {
    "mdt_v1": {"name": "adamw", "learning_rate": 1e-4, "clip_norm": None},
    "mdt_v2": {"name": "adan", "learning_rate": 3e-4, "clip_norm": 1.0},
    "dit": {"name": "adamw", "learning_rate": 1e-4, "clip_norm": None},
}


def make_trainer(name, mesh=None, model=None, **overrides):
    """A trainer with a fixture's model and recipe, on one device by default."""
    r = reference(name)
    recipe = RECIPES[name] | {"weight_decay": 0.0, "betas": None, "eps": 1e-8}
    schedule = learning_rate_schedule("constant", recipe["learning_rate"], 10)
    model = model or r.model()
    return Trainer(
        **{
            "model": model,
            "diffusion": GaussianDiffusion(
                NoiseSchedule.create(), min_snr=5.0 if name == "mdt_v2" else None
            ),
            "optimizer": create_optimizer(recipe, schedule, model.frozen),
            "schedule": schedule,
            "mesh": mesh or sharding.create_mesh(devices=jax.devices()[:1]),
            "label_dropout": 0.1,
            **overrides,
        }
    )


def start(trainer, params):
    """The state at step 0 with given parameters, in the trainer's shards."""
    fresh = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=trainer.optimizer.init(params),
        ema={str(rate): params for rate in trainer.ema_rates},
        loss_history=None,
    )
    return jax.tree.map(
        lambda x, like: jax.device_put(np.array(x), like.sharding), fresh, trainer.abstract_state()
    )


def on_pixels(steps):
    """Compiled steps that were made for float32 images, for a run whose source has bytes."""

    def adapt(step):
        def run(state, batch):
            return step(state, batch | {"image": scale_pixels(batch["image"])})

        return run

    return {count: adapt(step) for count, step in steps.items()}


def drawn_autoencoder(shapes: Any) -> Any:
    """Parameters of an autoencoder, every one drawn, norms, biases and statistics too.

    The first convolutions' are so small that the norms after them see squares near their epsilon.

    Args:
      shapes: a tree of `jax.ShapeDtypeStruct`, as `module.init` gives it.
    """
    generator = np.random.default_rng(1)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = generator.standard_normal(leaf.shape).astype(np.float32)
        noise *= 1e-3 if path[-2].key == "conv_in" else 1
        if path[-1].key == "kernel":
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        if path[-1].key == "var":
            return np.float32(0.1) + noise**2
        return np.float32(0.1) * noise + np.float32(path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(draw, shapes)
