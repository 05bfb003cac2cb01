"""Precision and recall against the reference values, at any block, order and scale; twins."""

from pathlib import Path

import numpy as np
import pytest

from mdt_jax.evaluation import manifold


@pytest.fixture(scope="module")
def known():
    with np.load(Path(__file__).parent / "data" / "metrics.npz") as arrays:
        return dict(arrays)


def brute_force(reference, samples, k):
    """The definition, in float64, one pair at a time."""

    def distances(a, b):
        return ((a[:, None].astype("f8") - b[None].astype("f8")) ** 2).sum(-1)

    def radii(a):
        own = distances(a, a)
        np.fill_diagonal(own, np.inf)
        return np.sort(own, axis=1)[:, k - 1]

    across = distances(reference, samples)
    inside = (across <= radii(reference)[:, None]).any(0)
    return inside, (across <= radii(samples)[None]).any(1)


def test_precision_and_recall_equal_the_reference(known):
    found = manifold.compare_manifolds(known["reference"], known["generated"])
    np.testing.assert_allclose(found.precision, known["precision"], rtol=1e-6)
    np.testing.assert_allclose(found.recall, known["recall"], rtol=1e-6)


def test_counting_the_point_itself_would_be_noticed(known):
    found = manifold.compare_manifolds(known["reference"], known["generated"], k=2)
    assert abs(found.precision / known["precision"] - 1) > 1e-6
    assert abs(found.recall / known["recall"] - 1) > 1e-6


@pytest.mark.parametrize("block_rows", [7, 50, 4096])
def test_blocks_change_no_point(known, block_rows):
    reference, generated = known["reference"][:120], known["generated"][:90]
    found = manifold.compare_manifolds(reference, generated, block_rows=block_rows)
    inside, covered = brute_force(reference, generated, 3)
    np.testing.assert_array_equal(found.samples_inside, inside)
    np.testing.assert_array_equal(found.reference_inside, covered)


def test_order_changes_no_point(known):
    reference, generated = known["reference"], known["generated"]
    order = np.random.default_rng(0).permutation(len(generated))
    one = manifold.compare_manifolds(reference, generated)
    other = manifold.compare_manifolds(reference[::-1], generated[order], block_rows=64)
    np.testing.assert_array_equal(one.samples_inside[order], other.samples_inside)
    np.testing.assert_array_equal(one.reference_inside[::-1], other.reference_inside)


def test_distances_below_float32_rounding_are_told_apart():
    """Points of norm 1000 whose distances differ by less than float32 products resolve."""
    rng = np.random.default_rng(0)
    ends = np.array([[1000.0], [-1000.0]])
    reference = ends[np.arange(60) % 2] + rng.standard_normal((60, 3)) * 0.01
    generated = ends[np.arange(50) % 2] + rng.standard_normal((50, 3)) * 0.014
    found = manifold.compare_manifolds(reference, generated, block_rows=16)
    inside, covered = brute_force(reference, generated, 3)
    assert 0 < inside.mean() < 1
    np.testing.assert_array_equal(found.samples_inside, inside)
    np.testing.assert_array_equal(found.reference_inside, covered)


def test_images_that_are_all_the_same_lie_within_one_another():
    same = np.full((300, 8), 3.7, np.float32)
    found = manifold.compare_manifolds(same, same, block_rows=64)
    assert (found.precision, found.recall) == (1, 1)
    assert manifold.compare_manifolds(same, same + 1).precision == 0


def test_radii_are_distances_to_the_kth_other_point():
    line = np.array([[0.0], [1], [3], [7], [15]])
    np.testing.assert_allclose(manifold.squared_radii(line, 1), [1, 1, 4, 16, 64])
    np.testing.assert_allclose(manifold.squared_radii(line, 4, block_rows=2)[0], 225)


def test_precision_within_classes_asks_for_the_class():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0] * 4, [100.0] * 4])
    labels = np.arange(40) % 2
    reference = centres[labels] + rng.standard_normal((40, 4))
    samples = reference + 1e-3
    right = manifold.precision_within_classes(reference, labels, samples, labels)
    swapped = manifold.precision_within_classes(reference, labels, samples, 1 - labels)
    assert right == {0: 1.0, 1: 1.0} and swapped == {0: 0.0, 1: 0.0}
    inside = manifold.compare_manifolds(reference, samples).samples_inside
    assert manifold.precision_per_class(inside, 1 - labels) == {0: 1.0, 1: 1.0}


def test_classes_with_too_few_reference_images_are_left_out():
    labels = np.array([0] * 5 + [1] * 3)
    points = np.random.default_rng(0).standard_normal((8, 2))
    assert list(manifold.precision_within_classes(points, labels, points, labels)) == [0]


def test_progress_counts_every_pair():
    done = []
    points = np.random.default_rng(0).standard_normal((30, 2))
    manifold.compare_manifolds(points, points[:20], block_rows=8, progress=done.append)
    assert sum(done) == manifold.num_pairs(30, 20)


def test_too_few_points_and_other_features_are_refused():
    points = np.zeros((4, 2))
    with pytest.raises(ValueError, match="neighbour number 3 needs 4 images at least, there are 3"):
        manifold.compare_manifolds(points, points[:3])
    with pytest.raises(ValueError, match="2 features against 1"):
        manifold.compare_manifolds(points, points[:, :1])
