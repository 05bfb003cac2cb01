"""Optimisers against PyTorch's own, and learning rates by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mdt_jax.training.optimizers import at_step, create_optimizer, learning_rate_schedule


@pytest.mark.torch
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_are_pytorchs(name, decay):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    reference = kind([theirs], lr=1e-2, weight_decay=decay)
    settings = {"name": name, "weight_decay": decay, "betas": None, "eps": 1e-8, "clip_norm": None}
    optimizer = create_optimizer(settings, learning_rate_schedule("constant", 1e-2, 10))
    ours = {"w": jnp.asarray(start)}
    state = optimizer.init(ours)
    for _ in range(5):
        gradient = rng.normal(size=start.shape).astype(np.float32)
        theirs.grad = torch.tensor(gradient)
        reference.step()
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours["w"], theirs.detach().numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.torch
def test_clipping_is_pytorchs():
    torch = pytest.importorskip("torch")
    gradient = np.array([3.0, 4.0], np.float32)
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    clipped, _ = optax.clip_by_global_norm(1.0).update(
        {"w": jnp.asarray(gradient)}, optax.EmptyState()
    )
    np.testing.assert_allclose(clipped["w"], weight.grad.numpy(), rtol=1e-5)


def test_a_frozen_parameter_never_moves():
    settings = {"name": "adamw", "weight_decay": 0.5, "betas": None, "eps": 1e-8, "clip_norm": 1.0}
    optimizer = create_optimizer(settings, learning_rate_schedule("constant", 0.1, 10), ("table",))
    params = {"table": jnp.ones(3), "w": jnp.ones(3)}
    updates, _ = optimizer.update(
        {"table": jnp.ones(3), "w": jnp.ones(3)}, optimizer.init(params), params
    )
    assert (updates["table"] == 0).all() and (updates["w"] != 0).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "constant"}, {0: 1.0, 99: 1.0}),
        ({"name": "constant", "warmup_steps": 10}, {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
        ({"name": "linear"}, {0: 1.0, 25: 0.75, 100: 0.0}),
        ({"name": "linear", "warmup_steps": 20}, {10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0}),
        ({"name": "cosine"}, {0: 1.0, 50: 0.5, 100: 0.0}),
        ({"name": "step", "boundaries": (40, 60)}, {39: 1.0, 41: 0.1, 61: 0.01}),
        ({"name": "step", "boundaries": (40,), "warmup_steps": 20}, {39: 1.0, 41: 0.1}),
    ],
)  # fmt: skip
def test_learning_rate_by_step(schedule, expected):
    rate = learning_rate_schedule(peak=1.0, num_steps=100, **schedule)
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6), step


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: learning_rate_schedule("cosin", 1.0, 10),
            "schedule.name 'cosin'.*constant, linear",
        ),
        (
            lambda: learning_rate_schedule("linear", 1.0, 10, warmup_steps=10),
            "warmup_steps 10 is .* the run's 10 .*; .* give --config.schedule.warmup_steps=0$",
        ),
        (
            lambda: create_optimizer(
                {"name": "lion", "weight_decay": 0.0, "betas": None}, optax.constant_schedule(1.0)
            ),
            "optimizer.name 'lion'.*adamw, adam, adan",
        ),
        (
            lambda: create_optimizer(
                {"name": "adan", "weight_decay": 0.0, "betas": (0.9, 0.99)},
                optax.constant_schedule(1.0),
            ),
            "'adan' takes 3",
        ),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["adam", "adamw", "adan"])
def test_clipping_and_decay_can_be_turned_on_for_a_saved_run(name):
    """The optimiser's state has one structure, whatever is idle, so a checkpoint still fits."""
    off = {"name": name, "weight_decay": 0.0, "betas": None, "eps": 1e-8, "clip_norm": None}
    schedule, params = learning_rate_schedule("constant", 0.1, 10), {"w": jnp.ones(3)}
    states = [
        create_optimizer(off | change, schedule).init(params)
        for change in ({}, {"clip_norm": 1.0}, {"weight_decay": 0.1})
    ]
    assert len({jax.tree.structure(state) for state in states}) == 1


@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_a_schedule_goes_on_from_a_step_while_moments_start_afresh(name):
    recipe = {"name": name, "weight_decay": 0.0, "betas": None, "eps": 1e-8, "clip_norm": None}
    schedule = learning_rate_schedule("linear", 1.0, 100)
    optimizer = create_optimizer(recipe, schedule)
    params = {"a": jnp.ones(3)}
    gradient = {"a": jnp.array([1.0, -2.0, 3.0])}
    fresh, _ = optimizer.update(gradient, optimizer.init(params), params)
    state = at_step(optimizer.init(params), jnp.int32(90))
    updates, state = optimizer.update(gradient, state, params)
    np.testing.assert_allclose(updates["a"], fresh["a"] * schedule(90), rtol=1e-5)
    again, _ = optimizer.update(gradient, state, params)
    slower = at_step(state, jnp.int32(0))
    expected, _ = optimizer.update(gradient, slower, params)
    np.testing.assert_allclose(again["a"], expected["a"] * schedule(91), rtol=1e-5)
