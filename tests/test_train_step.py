"""The jitted step equals the authors' training; its draws are keyed by seed, step and sample."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures import FAMILIES, RECIPES, make_trainer, reference, relative_error, start

from mdt_jax.convert.transformers import to_torch
from mdt_jax.training.optimizers import create_optimizer, learning_rate_schedule
from mdt_jax.training.step import Draws, draw_randomness


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


def kept_tokens(r):
    """How many tokens each of the three steps kept, None without a masked pass."""
    if not r.masks:
        return [None] * 3
    return [int(16 * (1 - float(r.arrays[f"train/{k}/mask_ratio"]))) for k in range(3)]


def follow_the_authors(name):
    """Three steps from the fixture's parameters; returns losses and the state."""
    r = reference(name)
    trainer = make_trainer(name, draw_fn=injected_draws(r))
    steps = {n: trainer.jit_step(n) for n in set(kept_tokens(r))}
    state, losses = start(trainer, r.tree("param/")), []
    for k, n in enumerate(kept_tokens(r)):
        batch = {"image": r.nhwc(f"train/{k}/x"), "label": r["in/y"]}
        state, metrics = steps[n](state, batch)
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
    return create_optimizer(recipe, learning_rate_schedule("constant", recipe["learning_rate"], 10))


@pytest.mark.parametrize(
    ("optimizer", "wrong"),
    [
        (with_recipe("mdt_v1"), False),
        (with_recipe("mdt_v1", weight_decay=0.01), True),
        (with_recipe("mdt_v1", betas=(0.9, 0.99)), True),
        (with_recipe("mdt_v2"), True),
    ],
    ids=["theirs", "weight decay", "betas", "Adan"],
)
def test_the_movement_tells_a_wrong_optimizer(optimizer, wrong):
    """The twin of the test above: gradients as they are, another optimiser behind them."""
    r = reference("mdt_v1")
    params, state = r.tree("param/"), optimizer.init(r.tree("param/"))
    for k in range(3):
        updates, state = optimizer.update(authors_gradient(k, params), state, params)
        params = optax.apply_updates(params, updates)
    error = relative_error(*movement("mdt_v1", params, "train/param/"))
    assert (error > 1e-3) == wrong


@functools.cache
def gradient_fn():
    r = reference("mdt_v1")
    trainer = make_trainer("mdt_v1", draw_fn=injected_draws(r))

    def gradient(params, images, step):
        draws = trainer.draw_fn(0, step, images.shape, 16)
        t = (draws.timestep * 1000).astype(jnp.int32)
        samples = (images, r["in/y"], t, jnp.ones(3), draws)
        return jax.grad(trainer.loss, has_aux=True)(params, samples, 11)[0]

    return jax.jit(gradient)


def authors_gradient(k, params):
    """The gradient of the fixture's step k at any parameters."""
    return gradient_fn()(params, reference("mdt_v1").nhwc(f"train/{k}/x"), jnp.int32(k))


def test_adan_and_its_clipping_are_the_authors():
    """Two steps of the formulas of their code in NumPy, on gradients above and below norm 1."""
    rng = np.random.default_rng(0)
    theta = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    ours = jax.tree.map(jnp.float32, theta)
    optimizer = with_recipe("mdt_v2", weight_decay=0.02)
    state = optimizer.init(ours)
    m = v = n = dict.fromkeys(theta, 0.0)
    previous, (b1, b2, b3) = None, (0.98, 0.92, 0.99)
    for k, scale in enumerate((3.0, 0.1, 5.0), start=1):
        g = {name: scale * rng.normal(size=x.shape) for name, x in theta.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, g), state, ours)
        ours = optax.apply_updates(ours, updates)
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        g = {name: x * min(1.0, 1.0 / (norm + 1e-8)) for name, x in g.items()}
        d = {name: x - (previous or g)[name] for name, x in g.items()}
        m = {x: b1 * m[x] + (1 - b1) * g[x] for x in g}
        v = {x: b2 * v[x] + (1 - b2) * d[x] for x in g}
        n = {x: b3 * n[x] + (1 - b3) * (g[x] + b2 * d[x]) ** 2 for x in g}
        for x in g:
            step = (m[x] / (1 - b1**k) + b2 * v[x] / (1 - b2**k)) / (
                np.sqrt(n[x]) / np.sqrt(1 - b3**k) + 1e-8
            )
            theta[x] = (theta[x] - 3e-4 * step) / (1 + 3e-4 * 0.02)
        previous = g
    for x in theta:
        np.testing.assert_allclose(ours[x], theta[x], rtol=1e-5)


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

    def outputs(self, variables, passes, method):
        seen.extend(one.labels.tolist() for one in passes)
        return (jnp.zeros((4, 8, 8, 8)),) * len(passes)

    monkeypatch.setattr(type(trainer.model), "apply", outputs)
    noise, drop = jnp.zeros((4, 8, 8, 4)), jnp.array([0.0, 0.49, 0.5, 0.9])
    draws = Draws(jnp.zeros(4), noise, noise, drop, drop[::-1], jnp.zeros((4, 16)))
    samples = (noise, jnp.arange(4), jnp.zeros(4, jnp.int32), jnp.ones(4), draws)
    trainer.loss(r.tree("param/"), samples, 8)
    assert seen == [[10, 10, 2, 3], [0, 1, 10, 10]]
