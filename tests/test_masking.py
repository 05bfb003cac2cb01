"""Kept tokens: how many, how often, which, and their way back into place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import reference

from mdt_jax.models import create_model
from mdt_jax.models.base import gather_kept, scatter_kept
from mdt_jax.models.masking import NO_MASKED_PASS, KeptTokens, ids_to_keep

NUM_DRAWS = 10_000


def reference_mean(num_tokens, low=0.3, high=0.5):
    """E[int(N·(1 − r))], r uniform, by the integral of the survival function."""
    kept = np.arange(1, num_tokens + 1)
    # int(N·(1 − r)) ≥ k just when r ≤ 1 − k/N.
    return np.clip((1 - kept / num_tokens - low) / (high - low), 0, 1).sum()


def test_the_reference_mean_is_the_authors_rule():
    ratios = 0.3 + 0.2 * (np.arange(1_000_000) + 0.5) / 1_000_000
    for num_tokens in (16, 64, 256):
        kept = (num_tokens * (1 - ratios)).astype(int)
        assert reference_mean(num_tokens) == pytest.approx(kept.mean(), abs=1e-3)


def kept_counts(num_tokens, ratio, span):
    kept = KeptTokens.of_ratio(num_tokens, ratio, span)
    return kept.counts, kept.probabilities


def test_256_tokens_keep_four_multiples_of_16():
    counts, probabilities = kept_counts(256, 0.3, 0.2)
    assert counts == (128, 144, 160, 176)
    assert probabilities == (0.25,) * 4
    assert np.dot(counts, probabilities) == 152


def reference_moments(num_tokens, low=0.3, high=0.5):
    """Mean and variance of int(N·(1 − r)), r uniform, by the integral of the survival function."""
    kept = np.arange(1, num_tokens + 1)
    survival = np.clip((1 - kept / num_tokens - low) / (high - low), 0, 1)
    mean = survival.sum()
    return mean, ((2 * kept - 1) * survival).sum() - mean**2


@pytest.mark.parametrize("num_tokens", [16, 25, 36, 49, 64, 81, 100, 121])
def test_few_tokens_keep_four_counts_with_the_references_mean_and_variance(num_tokens):
    counts, probabilities = kept_counts(num_tokens, 0.3, 0.2)
    assert len(counts) == 4 and min(probabilities) > 0
    assert counts[0] == num_tokens // 2 and counts[-1] >= 0.69 * num_tokens - 1
    mean, variance = reference_moments(num_tokens)
    found = np.dot(counts, probabilities)
    assert sum(probabilities) == pytest.approx(1)
    assert found == pytest.approx(mean)
    assert np.dot(np.square(counts), probabilities) - found**2 == pytest.approx(variance)


@pytest.mark.parametrize("num_tokens", [16, 49, 64, 100, 196, 225, 256, 1024])
def test_there_are_four_programs_at_the_most(num_tokens):
    counts, probabilities = kept_counts(num_tokens, 0.3, 0.2)
    assert 1 <= len(counts) <= 4
    mean, _ = reference_moments(num_tokens)
    assert abs(np.dot(counts, probabilities) / mean - 1) < 0.01


@pytest.mark.parametrize(
    ("ratio", "span"),
    [(0.1, 0.8), (0.5, 0.01), (0.0, 0.9), (0.35, 0.3), (0.05, 0.4), (0.25, 0.2), (0.75, 0.05)],
)
def test_any_range_of_ratios_has_four_counts_and_its_mean(ratio, span):
    for num_tokens in (16, 36, 64, 121):
        counts, probabilities = kept_counts(num_tokens, ratio, span)
        assert len(counts) <= 4 and min(probabilities) > 0
        mean, _ = reference_moments(num_tokens, ratio, ratio + span)
        # A few counts cannot reach a mean beyond their own ends.
        wanted = min(max(mean, counts[0]), counts[-1])
        assert np.dot(counts, probabilities) == pytest.approx(wanted, rel=1e-3)


def test_the_programs_come_in_the_order_of_their_use():
    kept = KeptTokens.of_ratio(64, 0.3, 0.2)
    for first in (0, 7):
        drawn = list(dict.fromkeys(kept.draw(3, step) for step in range(first, 500)))
        assert kept.in_order(3, first) == drawn and len(drawn) == 4
    assert KeptTokens((9, 5), (1.0, 0.0)).in_order(0, 0) == [9, 5]  # one that is never drawn
    assert NO_MASKED_PASS.in_order(0, 0) == [None]


@pytest.mark.parametrize("num_tokens", [16, 64])
def test_runs_of_before_keep_every_count_as_often_as_the_reference(num_tokens):
    kept = KeptTokens.of_ratio(num_tokens, 0.3, 0.2, at_most=None)
    counts, probabilities = kept.counts, kept.probabilities
    assert counts == tuple(range(num_tokens // 2, int(0.7 * num_tokens) + 1))
    assert sum(probabilities) == pytest.approx(1)
    assert np.dot(counts, probabilities) == pytest.approx(reference_mean(num_tokens))


@pytest.mark.parametrize("num_tokens", [128, 144, 196, 225, 256, 400, 1024, 4096])
def test_large_counts_suit_the_hardware_and_stay_near_the_reference(num_tokens):
    counts, probabilities = kept_counts(num_tokens, 0.3, 0.2)
    assert all(c % (16 if num_tokens >= 256 else 8) == 0 for c in counts)
    assert int(0.5 * num_tokens) <= counts[0] < counts[-1] <= 0.7 * num_tokens
    assert len(counts) <= 4
    assert sum(probabilities) == pytest.approx(1)
    mean = np.dot(counts, probabilities)
    assert abs(mean / reference_mean(num_tokens) - 1) < 0.02


@pytest.mark.parametrize("num_tokens", [16, 64, 256])
def test_drawn_counts_have_their_probabilities_and_the_reference_mean(num_tokens):
    counts, probabilities = kept_counts(num_tokens, 0.3, 0.2)
    kept = KeptTokens(counts, probabilities)
    draws = np.array([kept.draw(5, s) for s in range(NUM_DRAWS)])
    assert set(draws) <= set(counts)
    for count, p in zip(counts, probabilities, strict=True):
        sigma = np.sqrt(p * (1 - p) / NUM_DRAWS)
        assert abs((draws == count).mean() - p) < 4 * sigma, count
    assert abs(draws.mean() / reference_mean(num_tokens) - 1) < 0.01


def test_a_draw_is_a_function_of_seed_and_step_alone():
    kept = KeptTokens.of_ratio(256, 0.3, 0.2)

    def draws(seed, steps):
        return {s: kept.draw(seed, s) for s in steps}

    forwards = draws(0, range(100))
    np.random.default_rng(1).random()
    assert draws(0, reversed(range(100))) == forwards
    assert draws(1, range(100)) != forwards


@pytest.mark.parametrize(("num_tokens", "kept"), [(256, 179), (16, 11), (64, 44), (1024, 716)])
def test_a_fixed_ratio_keeps_one_count(num_tokens, kept):
    assert kept_counts(num_tokens, 0.3, 0.0) == ((kept,), (1.0,))
    assert KeptTokens((kept,), (1.0,)).draw(0, 0) == kept


def test_no_masked_pass_is_one_program():
    assert create_model("DiT-S/2").kept_tokens(0.3, 0.2) is NO_MASKED_PASS
    assert NO_MASKED_PASS.programs == {None: 1.0} and NO_MASKED_PASS.draw(0, 7) is None
    assert NO_MASKED_PASS.mean is None and str(NO_MASKED_PASS) == "no masked pass"


@pytest.mark.parametrize("name", ["mdt_v1", "mdt_v2"])
def test_kept_ids_equal_the_authors(name):
    r = reference(name)
    num_tokens = r.arrays["mask/noise"].shape[1]
    num_kept = int(num_tokens * (1 - float(r.arrays["mask/ratio"])))
    ids = ids_to_keep(r["mask/noise"], num_kept)
    assert np.array_equal(ids, r.arrays["mask/ids_keep"])
    _, masked = scatter_kept(jnp.zeros((*ids.shape, 1)), jnp.zeros(1), ids, num_tokens)
    assert np.array_equal(masked, r.arrays["mask/mask"].astype(bool))


def test_kept_tokens_return_to_their_places_and_the_mask_token_fills_the_rest():
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = jax.random.normal(keys[0], (3, 16, 5))
    filler = jax.random.normal(keys[1], (5,))
    ids = ids_to_keep(jax.random.uniform(keys[2], (3, 16)), 9)
    kept = gather_kept(tokens, ids)
    for b in range(3):
        assert np.array_equal(kept[b], np.asarray(tokens)[b, np.asarray(ids)[b]])

    full, masked = scatter_kept(kept, filler, ids, 16)
    for b in range(3):
        removed = np.setdiff1d(np.arange(16), ids[b])
        assert np.array_equal(np.flatnonzero(masked[b]), removed)
    assert np.array_equal(full, jnp.where(masked[..., None], filler, tokens))


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "span", "message"),
    [
        (256, 1.0, 0.0, r"masking\.ratio 1\.0 .*leaves \[0, 1\)"),
        (256, -0.1, 0.2, r"masking\.ratio -0\.1"),
        (256, 0.9, 0.2, r"masking\.ratio 0\.9 with masking\.ratio_span 0\.2"),
        (256, 0.3, -0.1, r"ratio_span -0\.1"),
        (4, 0.8, 0.0, "ratio up to 0.8 keeps none of 4"),
        (4, 0.7, 0.2, "keeps none of 4"),
        (64, 0.1, 0.89, "keeps none of 64"),
        (16, 0.5, 0.49, "keeps none of 16"),
    ],
)
@pytest.mark.filterwarnings("error")  # refused before anything is divided by 0
def test_ratios_that_keep_nothing_are_refused(num_tokens, ratio, span, message):
    with pytest.raises(ValueError, match=message):
        kept_counts(num_tokens, ratio, span)


@pytest.mark.filterwarnings("error")
def test_a_span_that_is_nothing_beside_a_token_is_none():
    for at_most in (None, 4):
        kept = KeptTokens.of_ratio(256, 0.3, 1e-12, at_most=at_most)
        assert (kept.counts, kept.probabilities) == ((179,), (1.0,))
