"""Timesteps are drawn uniformly, or by their losses exactly as Improved DDPM's resampler does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion import timesteps

NUM_STEPS, HISTORY, UNIFORM_SHARE = 6, 10, 0.001


class Resampler:
    """Improved DDPM's loss-second-moment rule, one loss at a time, in float64."""

    def __init__(self):
        self.losses = [[] for _ in range(NUM_STEPS)]

    def update(self, t, losses):
        for step, loss in zip(t, losses, strict=True):
            self.losses[step] = (self.losses[step] + [loss])[-HISTORY:]

    def probabilities(self):
        if any(len(losses) < HISTORY for losses in self.losses):
            return np.full(NUM_STEPS, 1 / NUM_STEPS)
        weights = np.sqrt(np.mean(np.square(self.losses), axis=1))
        return weights / weights.sum() * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / NUM_STEPS


def filled_history(seed=0):
    """A full history whose losses differ a lot between timesteps."""
    rng = np.random.default_rng(seed)
    losses = rng.random((NUM_STEPS, HISTORY)) * np.geomspace(0.1, 10, NUM_STEPS)[:, None]
    return timesteps.LossHistory(
        jnp.asarray(losses, jnp.float32), jnp.full(NUM_STEPS, HISTORY, jnp.int32)
    )


def stratified(count):
    """`count` evenly spread numbers of (0, 1): expectations over them are integrals."""
    return (jnp.arange(count) + 0.5) / count


def test_a_draw_without_history_is_uniform():
    t, weights = timesteps.draw_timesteps(None, 1000, stratified(50_000))
    assert np.array_equal(np.bincount(t, minlength=1000), np.full(1000, 50))
    assert np.array_equal(weights, np.ones(50_000))


def test_the_largest_uniform_is_a_timestep_too():
    largest = jnp.array([np.nextafter(np.float32(1), np.float32(0))])
    for history in (None, filled_history()):
        t, _ = timesteps.draw_timesteps(history, NUM_STEPS, largest)
        assert t[0] == NUM_STEPS - 1


def test_a_random_draw_is_uniform_until_every_history_is_full():
    history = filled_history()
    one_short = history._replace(counts=history.counts.at[2].set(HISTORY - 1))
    t, weights = timesteps.draw_timesteps(
        one_short, NUM_STEPS, jax.random.uniform(jax.random.key(0), (6000,))
    )
    frequencies = np.bincount(t, minlength=NUM_STEPS) / len(t)
    sigma = np.sqrt(1 / NUM_STEPS * (1 - 1 / NUM_STEPS) / len(t))
    assert np.abs(frequencies - 1 / NUM_STEPS).max() < 4 * sigma
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


@pytest.mark.parametrize(("batch", "num_batches"), [(1, 150), (7, 40), (64, 5), (200, 3)])
def test_loss_aware_draws_equal_improved_ddpms(batch, num_batches):
    """Batches repeat timesteps; the largest hold more losses of each than a history does."""
    rng = np.random.default_rng(batch)
    history, reference = timesteps.init_history("loss_second_moment", NUM_STEPS), Resampler()
    update = jax.jit(timesteps.update_history)
    was_full = []
    for _ in range(num_batches):
        t = rng.integers(0, NUM_STEPS, batch)
        losses = (rng.random(batch) * (1 + t)).astype(np.float32)
        history = update(history, jnp.asarray(t), jnp.asarray(losses))
        reference.update(t, losses)

        assert np.array_equal(history.counts, [len(of) for of in reference.losses])
        for ours, theirs in zip(np.asarray(history.losses), reference.losses, strict=True):
            assert np.array_equal(ours[: len(theirs)], theirs)
        expected = reference.probabilities()
        np.testing.assert_allclose(timesteps.probabilities(history, NUM_STEPS), expected, rtol=1e-5)
        drawn, weights = timesteps.draw_timesteps(history, NUM_STEPS, stratified(64))
        np.testing.assert_allclose(weights, 1 / (NUM_STEPS * expected[drawn]), rtol=1e-5)
        was_full.append(bool((history.counts == HISTORY).all()))
    assert was_full[-1]
    assert batch == 200 or not was_full[0]


def test_loss_aware_draws_come_as_often_as_their_probability_says():
    history = filled_history()
    t, _ = timesteps.draw_timesteps(history, NUM_STEPS, stratified(100_000))
    frequencies = np.bincount(t, minlength=NUM_STEPS) / len(t)
    p = np.asarray(timesteps.probabilities(history, NUM_STEPS))
    assert p.max() / p.min() > 50
    np.testing.assert_allclose(frequencies, p, atol=3e-5)


def test_weights_undo_the_bias_of_the_draw():
    f = np.linspace(-1, 1, NUM_STEPS)
    t, weights = timesteps.draw_timesteps(filled_history(), NUM_STEPS, stratified(100_000))
    assert np.mean(weights * f[t]) == pytest.approx(f.mean(), abs=1e-3)
    assert abs(np.mean(f[t]) - f.mean()) > 0.5


def test_zero_losses_leave_the_draw_uniform():
    history = filled_history()._replace(losses=jnp.zeros((NUM_STEPS, HISTORY)))
    _, weights = timesteps.draw_timesteps(history, NUM_STEPS, stratified(100))
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


def test_the_uniform_sampler_has_no_state_and_unknown_ones_are_refused():
    assert timesteps.init_history("uniform", 10) is None
    assert timesteps.update_history(None, jnp.zeros(2, jnp.int32), jnp.ones(2)) is None
    with pytest.raises(ValueError, match="'importance' is unknown; known: uniform, loss_second"):
        timesteps.init_history("importance", 10)
