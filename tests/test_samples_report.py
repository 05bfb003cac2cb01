"""The digits report passes real scans, and fails each way a model can cheat on its own measure."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mdt_jax.digits_report import report, report_table


@pytest.fixture(scope="module")
def scans():
    """Training images and labels, then held-out images and labels."""
    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)[..., None]
    is_heldout = np.arange(len(images)) % 6 == 5
    return (
        *(images[~is_heldout], data.target[~is_heldout]),
        *(images[is_heldout], data.target[is_heldout]),
    )


def class_means(images, labels):
    return np.stack([images[labels == label].mean(axis=0) for label in range(10)]).astype(np.uint8)


def test_real_scans_pass_as_samples(scans):
    _, _, heldout, labels = scans
    result = report(heldout, labels, heldout, labels, *scans)
    print(report_table(result))
    assert result["failed"] == []
    assert result["guided_accuracy"] == result["plain_accuracy"] == result["classifier_accuracy"]
    assert result["distance_ratio"] == 1


def test_the_classifier_reads_97_percent_of_the_heldout_scans(scans):
    _, _, heldout, labels = scans
    assert report(heldout, labels, heldout, labels, *scans)["classifier_accuracy"] >= 0.97


def test_samples_of_another_class_than_asked_fail(scans):
    _, _, heldout, labels = scans
    shuffled = np.random.default_rng(0).permutation(labels)
    result = report(heldout, shuffled, heldout, labels, *scans)
    print(report_table(result))
    assert result["failed"] == ["guided_accuracy"] and result["guided_accuracy"] < 0.2


def test_class_means_fail(scans):
    train, train_labels, heldout, labels = scans
    means = class_means(train, train_labels)[labels]
    result = report(heldout, labels, means, labels, *scans)
    print(report_table(result))
    assert result["failed"] == ["variance_ratio"] and result["variance_ratio"] < 1e-9


def test_samples_that_vary_too_much_fail(scans):
    train, train_labels, heldout, labels = scans
    means = class_means(train, train_labels)[labels].astype(int)
    spread = np.clip(means + 1.5 * (heldout - means), 0, 255).astype(np.uint8)
    result = report(heldout, labels, spread, labels, *scans)
    assert result["failed"] == ["variance_ratio"] and result["variance_ratio"] > 1.3


def test_copies_of_training_scans_fail(scans):
    train, train_labels, heldout, labels = scans
    chosen = np.random.default_rng(0).permutation(len(train))[:500]
    result = report(heldout, labels, train[chosen], train_labels[chosen], *scans)
    print(report_table(result))
    assert result["failed"] == ["distance_ratio"] and result["distance_ratio"] == 0


def test_a_class_without_two_samples_is_named(scans):
    _, _, heldout, labels = scans
    others = labels != 7
    with pytest.raises(ValueError, match="class 7 has 0 of the samples"):
        report(heldout, labels, heldout[others], labels[others], *scans)


def test_the_table_shows_value_requirement_and_verdict():
    result = {
        "classifier_accuracy": 0.98,
        "guided_accuracy": 0.5,
        "plain_accuracy": 0.4,
        "variance_ratio": 1.0,
        "distance_ratio": 0.9,
        "failed": ["guided_accuracy"],
    }
    rows = [row.split() for row in report_table(result).splitlines()]
    assert rows[2][-4:] == ["0.500", ">=", "0.90", "FAIL"]
    assert rows[3][-2:] == ["for", "0.400"]
    assert rows[4][-5:] == ["1.000", "0.70", "to", "1.30", "pass"]
