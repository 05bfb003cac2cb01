"""The jitted step: equal to the authors' training, and to itself however it is spread."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures import FAMILIES, reference, relative_error

from mdt_jax import sharding
from mdt_jax.convert.transformers import to_torch
from mdt_jax.diffusion import GaussianDiffusion, NoiseSchedule
from mdt_jax.optimizers import create_optimizer, create_schedule
from mdt_jax.train_step import Draws, Trainer, TrainState, draw_randomness

RECIPES = {
    "mdt_v1": {"name": "adamw", "learning_rate": 1e-4, "clip_norm": None},
    "mdt_v2": {"name": "adan", "learning_rate": 3e-4, "clip_norm": 1.0},
    "dit": {"name": "adamw", "learning_rate": 1e-4, "clip_norm": None},
}


def make_trainer(name, mesh=None, model=None, **overrides):
    r = reference(name)
    recipe = RECIPES[name] | {"weight_decay": 0.0, "betas": None, "eps": 1e-8}
    schedule = create_schedule("constant", recipe["learning_rate"], 10)
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


def injected_draws(r):
    """The fixture's randomness of its three steps, in place of `draw_randomness`."""
    t = np.stack([r.arrays[f"train/{k}/t"] for k in range(3)])
    noise = np.stack([np.moveaxis(r.arrays[f"train/{k}/noise"], 1, -1) for k in range(3)])
    mask = (
        [r.arrays[f"train/{k}/mask_noise"] for k in range(3)] if r.masks else np.zeros((3, 3, 16))
    )
    keep_label = jnp.ones(3)

    def draw(seed, step, shape, num_tokens):
        uniform = jnp.asarray((t + 0.5) / 1000, jnp.float32)[step]
        n = jnp.asarray(noise)[step]
        return Draws(uniform, n, n, keep_label, keep_label, jnp.asarray(np.stack(mask))[step])

    return draw


def follow_the_authors(name, **overrides):
    """Three steps from the fixture's parameters; returns losses and the state."""
    r = reference(name)
    trainer = make_trainer(name, draw_fn=injected_draws(r), **overrides)
    state, losses = start(trainer, r.tree("param/")), []
    for k in range(3):
        kept = int(16 * (1 - float(r.arrays[f"train/{k}/mask_ratio"]))) if r.masks else None
        batch = {"image": r.nhwc(f"train/{k}/x"), "label": r["in/y"]}
        state, metrics = trainer.jit_step(kept)(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


def movement(name, params, prefix):
    """Our and the authors' movement from `param/`, as vectors without null-gradient weights."""
    r = reference(name)
    ours = to_torch(
        params,
        family=r.family,
        depth=r.settings["depth"],
        decoder_depth=r.settings.get("decode_layer", 0),
    )
    moved = ([], [])
    for weight, value in ours.items():
        if r.family == "DiT" and weight == "pos_embed":
            assert np.array_equal(value, r.arrays["param/pos_embed"])
            continue
        before = r.arrays[f"param/{weight}"].astype(np.float64)
        keep = np.ones(before.shape, bool)
        if weight.endswith("qkv.bias"):
            keep[len(keep) // 3 : 2 * len(keep) // 3] = False  # keys: softmax ignores their bias
        for into, after in zip(moved, (value, r.arrays[f"{prefix}{weight}"]), strict=True):
            into.append((after - before)[keep])
    return [np.concatenate(v) for v in moved]


@pytest.mark.smoke
@pytest.mark.parametrize("name", FAMILIES)
def test_three_steps_equal_the_authors(name):
    r = reference(name)
    losses, state = follow_the_authors(name)
    for k, loss in enumerate(losses):
        assert loss == pytest.approx(float(r.arrays[f"train/{k}/loss"]), rel=1e-5)
    assert relative_error(*movement(name, state.params, "train/param/")) < 1e-3
    assert relative_error(*movement(name, state.ema["0.9999"], "train/ema/")) < 1e-2


def with_recipe(name, **change):
    recipe = RECIPES[name] | {"weight_decay": 0.0, "betas": None, "eps": 1e-8} | change
    return create_optimizer(recipe, create_schedule("constant", recipe["learning_rate"], 10))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("mdt_v2", optax.chain(optax.clip_by_global_norm(1.0), optax.adan(3e-4))),
        ("mdt_v2", with_recipe("mdt_v2", clip_norm=None)),
        ("mdt_v1", with_recipe("mdt_v1", weight_decay=0.01)),
    ],
    ids=["optax.adan", "no clipping", "weight decay"],
)
def test_three_steps_tell_a_wrong_optimizer(name, optimizer):
    _, state = follow_the_authors(name, optimizer=optimizer)
    assert relative_error(*movement(name, state.params, "train/param/")) > 1e-3


# ---- One model, however it is spread -----------------------------------------------------------

NUM_STEPS, BATCH = 5, 16


def randomised(model):
    """Parameters with every tensor random: zero gates and last layers hide every error."""
    x, zero = jnp.zeros((1, *model.image_shape)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, zero, zero)["params"]
    from flax import linen as nn

    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.1), jnp.float32), nn.unbox(shapes)
    )


def run(mesh_shape, fault=None, **settings):
    """Losses and per-tensor gradient norms of five steps on a mesh of that shape."""
    devices = jax.devices()[: int(np.prod(mesh_shape))]
    mesh = sharding.create_mesh(*mesh_shape, devices=devices)
    model = reference("mdt_v2").model(scan_unroll=settings.pop("scan_unroll", 1))
    trainer = make_trainer("mdt_v2", mesh=mesh, model=model, **settings)
    seen = []

    def record(grads, state, params=None):
        norms = {
            jax.tree_util.keystr(path): jnp.linalg.norm(g)
            for path, g in jax.tree_util.tree_leaves_with_path(grads)
        }
        return optax.tree.scale(-1e-2, grads), norms

    probe = optax.GradientTransformation(
        lambda params: {
            jax.tree_util.keystr(path): jnp.zeros(())
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        },
        record,
    )
    trainer = dataclasses.replace(trainer, optimizer=probe)
    if fault:
        trainer = fault(trainer)
    state = start(trainer, randomised(model))
    step = trainer.jit_step(9)
    rng = np.random.default_rng(1)
    for _ in range(NUM_STEPS):
        batch = {
            "image": rng.normal(size=(BATCH, 8, 8, 4)).astype(np.float32),
            "label": rng.integers(0, 10, BATCH).astype(np.int32),
        }
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        state, metrics = step(state, batch)
        seen.append({"loss": metrics["loss"], **state.opt_state})
    return jax.tree.map(lambda *xs: np.array(xs, np.float64), *seen)


@pytest.fixture(scope="module")
def single():
    return run((1, 1, 1))


def largest_difference(a, b):
    scale = max(np.abs(v).max() for k, v in b.items() if k != "loss")

    def difference(k):
        # A gradient that is zero in exact arithmetic is rounding noise beside the others.
        floor = 1e-6 * scale if k != "loss" else 0.0
        return np.max(np.abs(a[k] - b[k]) / np.maximum(np.abs(b[k]), floor))

    return max(difference(k) for k in b)


@pytest.mark.parametrize(
    ("mesh_shape", "settings"),
    [
        ((2, 1, 1), {}),
        ((4, 1, 1), {}),
        ((8, 1, 1), {}),
        ((1, 8, 1), {}),
        ((1, 4, 1), {"scan_unroll": 2}),
        ((1, 1, 4), {}),
        ((2, 2, 2), {"accumulation_steps": 2}),
        ((1, 2, 4), {"scan_unroll": 2}),
        ((1, 1, 1), {"scan_unroll": 2}),
        ((1, 1, 1), {"accumulation_steps": 2}),
        ((2, 1, 1), {"accumulation_steps": 4}),
    ],
)
def test_every_mesh_trains_the_same_model(single, mesh_shape, settings):
    assert largest_difference(run(mesh_shape, **settings), single) < 1e-5


class MissingShard(Trainer):
    """Leaves the samples of one shard of eight out of the gradient."""

    def loss(self, params, samples, num_kept):
        images, labels, t, weights, draws = samples
        weights = weights.at[-BATCH // 8 :].set(0.0)
        return super().loss(params, (images, labels, t, weights, draws), num_kept)


class NoBias(Trainer):
    """Runs the model with its relative-position bias dropped."""

    def loss(self, params, samples, num_kept):
        params = jax.tree_util.tree_map_with_path(
            lambda path, p: 0 * p if "relative_bias" in jax.tree_util.keystr(path) else p, params
        )
        return super().loss(params, samples, num_kept)


@pytest.mark.parametrize("broken", [MissingShard, NoBias])
def test_a_fault_of_one_mesh_is_seen(single, broken):
    def fault(trainer):
        fields = {f.name: getattr(trainer, f.name) for f in dataclasses.fields(trainer)}
        return broken(**fields)

    assert largest_difference(run((8, 1, 1), fault=fault), single) > 1e-3


def test_parameters_and_moments_are_really_sharded():
    mesh = sharding.create_mesh(1, 4, 2)
    abstract = make_trainer("mdt_v2", mesh=mesh).abstract_state()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    assert sharding.bytes_per_device(abstract) < whole / 5
    qkv = abstract.opt_state[1].m["in_blocks"]["layers"]["attn"]["qkv"]["kernel"]
    assert tuple(qkv.sharding.spec) == (None, "fsdp", None, "tensor", None)


# ---- Draws -------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_the_batch_they_are_drawn_in():
    whole = draw_randomness(3, jnp.int32(7), (8, 4, 4, 2), 16)
    half = draw_randomness(3, jnp.int32(7), (4, 4, 4, 2), 16)
    assert all(np.array_equal(a[:4], b) for a, b in zip(whole, half, strict=True))


def test_draws_differ_by_seed_step_sample_and_purpose():
    a = draw_randomness(3, jnp.int32(7), (8, 4, 4, 2), 16)
    others = [draw_randomness(3, jnp.int32(8), (8, 4, 4, 2), 16)]
    others += [draw_randomness(4, jnp.int32(7), (8, 4, 4, 2), 16)]
    for other in others:
        assert all(not np.array_equal(x, y) for x, y in zip(a, other, strict=True))
    assert not np.array_equal(a.full_noise, a.masked_noise)
    assert not np.array_equal(a.full_label_drop, a.masked_label_drop)
    assert len(np.unique(np.asarray(a.timestep))) == 8


def test_draws_have_their_distributions():
    d = draw_randomness(0, jnp.int32(0), (4000, 2, 2, 1), 4)
    for normal in (d.full_noise, d.masked_noise):
        assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    for uniform in (d.timestep, d.full_label_drop, d.masked_label_drop, d.mask):
        assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02


def test_labels_are_dropped_at_the_rate_of_each_pass(monkeypatch):
    r = reference("dit")
    trainer = make_trainer("dit", label_dropout=0.5)
    seen = []
    monkeypatch.setattr(
        type(trainer.model),
        "apply",
        lambda self, v, x, t, y: seen.append(y) or jnp.zeros((4, 8, 8, 8)),
    )
    draws = Draws(*[jnp.zeros((4,))] * 6)._replace(
        full_noise=jnp.zeros((4, 8, 8, 4)), full_label_drop=jnp.array([0.0, 0.49, 0.5, 0.9])
    )
    samples = (jnp.zeros((4, 8, 8, 4)), jnp.arange(4), jnp.zeros(4, jnp.int32), jnp.ones(4), draws)
    trainer.loss(r.tree("param/"), samples, None)
    assert seen[0].tolist() == [10, 10, 2, 3]


# ---- Meshes that cannot work -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, 1), "data 3 .* does not fit 8 devices.*1, 2, 4, 8"),
        ((-1, -1, 1), "mesh.data and mesh.fsdp are both -1"),
        ((0, 1, 1), "mesh.data 0"),
        ((2, 2, 1), "must be 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.create_mesh(*shape)


def test_a_tensor_axis_that_cuts_a_head_is_refused():
    with pytest.raises(
        ValueError, match="mesh.tensor 8 does not divide the model's 4 heads; 1, 2, 4"
    ):
        sharding.check_heads(sharding.create_mesh(1, 1, 8), 4)


def test_an_axis_that_does_not_divide_a_parameter_is_named():
    model = reference("mdt_v2").model(hidden_size=36, num_heads=4)
    trainer = make_trainer("mdt_v2", mesh=sharding.create_mesh(1, 8, 1), model=model)
    with pytest.raises(ValueError, match=r"mesh.fsdp 8 does not divide an axis of 36 of .*"):
        trainer.abstract_state()
