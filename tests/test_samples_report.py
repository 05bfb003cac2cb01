"""The samples' report passes real images, and fails each way a model can cheat on its measure."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mdt_jax.evaluation import image_classifier, samples_report
from mdt_jax.evaluation.samples_report import RealImages

DIGITS = samples_report.KINDS["digits"]


def report(guided, labels, plain, labels_plain, *scans):
    return samples_report.report(DIGITS, guided, labels, plain, labels_plain, RealImages(*scans))


def report_table(result):
    return samples_report.report_table(DIGITS, result)


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
    assert samples_report.conclusion(DIGITS, result) == (
        "The samples do not pass: guided_accuracy is 0.500, required >= 0.90."
    )


def strokes(count, seed):
    """Gray 8 × 8 images with a bright row, column or diagonal: three classes, any place, noise."""
    rng = np.random.default_rng(seed)
    labels, places = np.arange(count) % 3, rng.integers(0, 8, count)
    images = rng.integers(0, 80, (count, 8, 8, 1))
    for image, label, place in zip(images, labels, places, strict=True):
        if label < 2:
            image[(place,) if label == 0 else (slice(None), place)] += 150
        else:
            image[np.arange(8), (np.arange(8) + place) % 8] += 150
    return images.astype(np.uint8), labels


def test_the_convolutional_classifier_learns_what_is_the_same_at_every_place():
    images, labels = strokes(1_536, 0)
    found = image_classifier.train_image_classifier(images, labels, 3, epochs=20)
    others, classes = strokes(600, 1)
    assert np.mean(found.read(others) == classes) > 0.95
    assert np.mean(found.read(others) == np.roll(classes, 1)) < 0.1
    np.testing.assert_array_equal(found.read(others[:, :, ::-1]), found.read(others))
    with pytest.raises(ValueError, match="of 6 × 8 pixels: this classifier takes sides"):
        image_classifier.train_image_classifier(images[:, :6], labels, 3)


def test_a_classifier_is_kept_in_a_file(tmp_path):
    images, labels = strokes(64, 0)
    found = image_classifier.load_or_train(tmp_path / "c.npz", images, labels, 3)
    again = image_classifier.load_or_train(tmp_path / "c.npz", images[:0], labels[:0], 3)
    np.testing.assert_array_equal(again.read(images), found.read(images))
    larger = np.tile(images, (1, 2, 2, 1))
    with pytest.raises(ValueError, match=r"images of \(16, 16, 1\); the classifier was trained"):
        found.read(larger)
    with pytest.raises(ValueError, match="c.npz: a classifier of other images; remove it"):
        image_classifier.load_or_train(tmp_path / "c.npz", larger, labels, 3)
    (tmp_path / "c.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="c.npz: no classifier .*; remove it to train another"):
        image_classifier.load_or_train(tmp_path / "c.npz", images, labels, 3)
