"""Moments, Fréchet distance and Inception Score against the reference values, and their twins."""

from pathlib import Path

import numpy as np
import pytest

from mdt_jax.evaluation.statistics import FeatureMoments, Gaussian, InceptionScore, frechet_distance

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def known():
    with np.load(Path(__file__).parent / "data" / "metrics.npz") as arrays:
        return dict(arrays)


def gaussian(rows):
    moments = FeatureMoments(rows.shape[1])
    moments.update(rows)
    return moments.gaussian()


def score(probabilities, split, batch=64, order=None):
    found = InceptionScore(len(probabilities), probabilities.shape[1], split)
    for first in order or range(0, len(probabilities), batch):
        found.update(first, probabilities[first : first + batch])
    return found.value()


def clouds(count=400, size=24, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, size)) @ rng.standard_normal((size, size))).astype("f4")


def test_frechet_distance_equals_the_reference(known):
    found = frechet_distance(gaussian(known["reference"]), gaussian(known["generated"]))
    np.testing.assert_allclose(found, known["fid"], rtol=TOLERANCE)


def test_a_biased_covariance_would_be_noticed(known):
    one, other = (
        Gaussian(x.mean(0), np.cov(x, rowvar=False, ddof=0))
        for x in (known["reference"].astype("f8"), known["generated"].astype("f8"))
    )
    assert abs(frechet_distance(one, other) / known["fid"] - 1) > TOLERANCE


def test_inception_score_equals_the_reference(known):
    split = int(known["inception_split"])
    for batch in (1, 64, 500):
        found = score(known["probabilities"], split, batch)
        np.testing.assert_allclose(found, known["inception_score"], rtol=TOLERANCE)


def test_a_dropped_last_split_would_be_noticed(known):
    split = int(known["inception_split"])
    whole = len(known["probabilities"]) // split * split
    assert whole < len(known["probabilities"])
    found = score(known["probabilities"][:whole], split)
    assert abs(found / known["inception_score"] - 1) > TOLERANCE


def test_a_probability_of_zero_counts_nothing():
    certain = np.eye(4)[np.arange(40) % 4]
    assert score(certain, 20) == pytest.approx(4, rel=1e-12)


def test_a_split_without_images_is_refused():
    with pytest.raises(ValueError, match="split 1 of the Inception Score has no images"):
        score(np.full((10, 2), 0.5), 5, 5, order=[0])


@pytest.mark.parametrize("count", [400, 10], ids=["full rank", "fewer rows than features"])
def test_distance_to_itself_is_nothing(count):
    one = gaussian(clouds(count) * 30)
    assert abs(frechet_distance(one, one)) < 1e-3 * 1e-3
    assert np.trace(one.covariance) > 1e3


def test_distance_of_two_gaussians_is_the_analytic_one():
    rng = np.random.default_rng(1)
    shift, scales = np.linspace(-1, 1, 8), np.linspace(0.5, 2, 8)
    one = rng.standard_normal((40_000, 8))
    other = rng.standard_normal((40_000, 8)) * scales + shift
    analytic = (shift**2).sum() + ((scales - 1) ** 2).sum()
    assert frechet_distance(gaussian(one), gaussian(other)) == pytest.approx(analytic, rel=0.02)


def test_singular_covariances_give_the_analytic_distance():
    flat, line = np.diag([4.0, 0, 9]), np.diag([1.0, 0, 0])
    found = frechet_distance(Gaussian(np.zeros(3), flat), Gaussian(np.ones(3), line))
    assert found == pytest.approx(3 + 13 + 1 - 2 * 2, rel=1e-12)


def test_means_far_from_zero_lose_no_digits():
    rows = clouds().astype("f8")
    near, far = gaussian(rows).covariance, gaussian(rows + 1e7).covariance
    np.testing.assert_allclose(far, near, rtol=1e-6, atol=1e-6)
    # The textbook's one pass does lose them, so the test can fail.
    one_pass = ((rows + 1e7).T @ (rows + 1e7)) / len(rows) - np.multiply.outer(
        (rows + 1e7).mean(0), (rows + 1e7).mean(0)
    )
    assert not np.allclose(one_pass, near, rtol=1e-2, atol=1e-2)


def test_moments_do_not_depend_on_how_rows_are_batched():
    rows = clouds(3000)
    whole = gaussian(rows)
    pieces = FeatureMoments(rows.shape[1])
    for first in range(0, len(rows), 7):
        pieces.update(rows[first : first + 7])
    np.testing.assert_array_equal(pieces.gaussian().mean, whole.mean)
    np.testing.assert_array_equal(pieces.gaussian().covariance, whole.covariance)


def test_merged_moments_are_those_of_all_rows():
    rows = clouds(3000)
    merged = FeatureMoments(rows.shape[1])
    for part in np.split(rows, [5, 1500, 1500]):
        other = FeatureMoments(rows.shape[1])
        other.update(part)
        merged.merge(FeatureMoments.from_state(*other.state()))
    assert merged.count == len(rows)
    covariance = np.cov(rows.astype("f8"), rowvar=False)
    np.testing.assert_allclose(merged.gaussian().covariance, covariance, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(merged.gaussian().mean, rows.astype("f8").mean(0), atol=1e-12)


def test_order_of_rows_changes_no_distance():
    rows, other = clouds(3000), gaussian(clouds(500, seed=3))
    shuffled = np.random.default_rng(0).permutation(rows)
    one, two = (frechet_distance(gaussian(x), other) for x in (rows, shuffled))
    assert one == pytest.approx(two, rel=1e-10)


def test_bad_statistics_are_refused():
    good = Gaussian(np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="not belong to one set"):
        Gaussian(np.zeros(3), np.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        Gaussian(np.full(3, np.nan), np.eye(3))
    with pytest.raises(ValueError, match="negative eigenvalue -1, .* no covariance"):
        frechet_distance(good, Gaussian(np.zeros(3), np.diag([1.0, 1, -1])))
    with pytest.raises(ValueError, match="means of 3 and 2 features"):
        frechet_distance(good, Gaussian(np.zeros(2), np.eye(2)))
    with pytest.raises(ValueError, match="needs two rows, 1 came"):
        gaussian(np.zeros((1, 3)))
