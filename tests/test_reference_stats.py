"""Making a reference: moments of all images, a choice of them, and what evaluation makes of it."""

import os
import subprocess
import sys
from pathlib import Path

import fake_extractor
import numpy as np
import pytest
from fake_extractor import random_images

from mdt_jax import data
from mdt_jax.evaluation import descriptions, evaluator
from mdt_jax.evaluation import reference as tool
from mdt_jax.evaluation.batches import ArrayImages
from mdt_jax.sampling import images

TOOL = Path(__file__).parents[1] / "tools" / "reference_stats.py"
COUNT = 50


@pytest.fixture(scope="module")
def source():
    """Images of another size than the reference's, of four classes."""
    pictures = random_images(COUNT, 0, size=9)
    return data.arrays(pictures, (np.arange(COUNT) % 4).astype(np.int64))


def make(source, path, **settings):
    settings = {"image_size": 4, "num_images": 20, "batch_size": 7} | settings
    tool.make_reference(source, fake_extractor.create(), path, **settings)
    with np.load(path) as arrays:
        return dict(arrays)


def cropped(source):
    return np.stack([data.center_crop(source[i]["image"], 4) for i in range(COUNT)])


def test_moments_are_of_all_images(source, tmp_path):
    found = make(source, tmp_path / "r.npz")
    features = fake_extractor.create().extract(cropped(source))
    for ending, part in (("", features.pool), ("_s", features.spatial)):
        part = part.astype("f8")
        np.testing.assert_allclose(found[f"mu{ending}"], part.mean(0), atol=1e-6)
        covariance = np.cov(part, rowvar=False)
        np.testing.assert_allclose(found[f"sigma{ending}"], covariance, rtol=1e-6, atol=1e-6)


def test_images_are_a_choice_with_their_labels(source, tmp_path):
    found = make(source, tmp_path / "r.npz")
    everything = [image.tobytes() for image in cropped(source)]
    chosen = [everything.index(image.tobytes()) for image in found["arr_0"]]
    assert len(set(chosen)) == 20 and chosen != sorted(chosen)
    np.testing.assert_array_equal(found["arr_1"], [i % 4 for i in chosen])
    again = make(source, tmp_path / "again.npz", batch_size=50)
    np.testing.assert_array_equal(again["arr_0"], found["arr_0"])
    other = make(source, tmp_path / "other.npz", seed=1)
    assert (other["arr_0"] != found["arr_0"]).any()


def test_fewer_images_can_be_asked_for(source, tmp_path):
    found = make(source, tmp_path / "r.npz", stats_images=30, num_images=100)
    assert len(found["arr_0"]) == len(found["arr_1"]) == 30
    features = fake_extractor.create().extract(found["arr_0"]).pool.astype("f8")
    np.testing.assert_allclose(found["mu"], features.mean(0), atol=1e-6)


def test_a_source_without_classes_gives_no_labels(tmp_path):
    found = make(data.arrays(random_images(8, 0)), tmp_path / "r.npz")
    assert "arr_1" not in found and len(found["arr_0"]) == 8


def test_evaluation_takes_it(source, tmp_path):
    path = tmp_path / "r.npz"
    make(source, path)
    extractor = fake_extractor.create()
    reference = descriptions.describe_reference(path, extractor)
    assert reference.stored and reference.count == 20
    samples = descriptions.describe_images(ArrayImages(cropped(source)), extractor)
    assert abs(evaluator.evaluate(reference, samples).metrics["fid"]) < 1e-9
    assert images.read_metadata(path)[descriptions.DIGEST_KEY] == extractor.digest
    with pytest.raises(ValueError, match="statistics are of weights"):
        descriptions.describe_reference(path, fake_extractor.create(seed=1))


def test_sources_that_do_not_fit_are_refused(source, tmp_path):
    latents = data.arrays(np.zeros((4, 4, 4, 8), np.float32))
    for given, settings, message in (
        (latents, {}, "^arrays: holds latents, and Inception sees images: give the source that"),
        (data.arrays(np.zeros((4, 4, 4, 2), np.uint8)), {}, "images of 2 channels"),
        (source, {"num_images": 0}, "^--num_images 0 is below 1; it takes a whole number"),
        (source, {"stats_images": 1}, "a covariance needs two images; there are 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make(given, tmp_path / "r.npz", **settings)
    assert not list(tmp_path.iterdir())


def test_the_command_ends_in_one_line_on_missing_weights(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOL), "--data_name=digits", "--image_size=8",
         f"--inception={tmp_path / 'none'}", f"--output={tmp_path / 'r.npz'}"],
        env=os.environ | {"PYTHONPATH": str(TOOL.parents[1])},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(f"error: no Inception weights at {tmp_path}")
    )
