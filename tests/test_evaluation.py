"""Descriptions and reports: the same whatever the batch, devices, processes and order; refusals."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import fake_extractor
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_extractor import random_images
from jobs import xla_flags

from mdt_jax.evaluation import evaluator, extractors, manifold, statistics
from mdt_jax.evaluation.batches import ArrayImages
from mdt_jax.evaluation.descriptions import DIGEST_KEY, describe_images, describe_reference
from mdt_jax.evaluation.evaluator import EVALUATION_METRICS
from mdt_jax.models.inception import InceptionV3

ROOT = Path(__file__).parents[1]
NUM_SAMPLES, SPLIT = 150, 40


@pytest.fixture(scope="module")
def extractor():
    return fake_extractor.create()


def labels(count):
    return np.arange(count) % 3


def sample_images(count=NUM_SAMPLES):
    return ArrayImages((random_images(count, 1) * 0.9).astype(np.uint8), labels(count), "samples")


@pytest.fixture(scope="module")
def reference(extractor):
    return describe_images(ArrayImages(random_images(200, 0), labels(200), "ref"), extractor)


@pytest.fixture(scope="module")
def report(reference, extractor):
    return evaluator.evaluate(reference, described(extractor))


def described(extractor, images=None, batch_size=64):
    return describe_images(
        images or sample_images(), extractor, batch_size=batch_size, split_size=SPLIT
    )


def assert_same(found, known):
    assert found.keys() == known.keys()
    for name, value in known.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_all_metrics_are_there_and_right(report, reference, extractor):
    assert set(report.metrics) == {name for name, *_ in EVALUATION_METRICS} and not report.missing
    features = extractor.extract(sample_images().images)
    known = extractor.extract(random_images(200, 0))
    for name, part in (("fid", "pool"), ("sfid", "spatial")):
        one, other = (
            statistics.Gaussian(x.mean(0), np.cov(x, rowvar=False))
            for x in (getattr(f, part).astype("f8") for f in (known, features))
        )
        expected = statistics.frechet_distance(one, other)
        np.testing.assert_allclose(report.metrics[name], expected, rtol=1e-6)
    found = manifold.compare_manifolds(known.pool, features.pool)
    assert report.metrics["precision"] == found.precision
    assert report.metrics["recall"] == found.recall
    assert report.classes[0]["samples"] == 50
    per_class = [value["precision"] for value in report.classes.values()]
    assert report.metrics["precision_per_class"] == pytest.approx(np.mean(per_class))
    assert len(report.power["decibels"]) == 2


@pytest.mark.parametrize(("read", "network"), [(7, 3), (150, 64), (1, 16)])
def test_batch_sizes_change_nothing(report, reference, read, network):
    extractor = fake_extractor.create(batch_size=network)
    found = evaluator.evaluate(reference, described(extractor, batch_size=read))
    assert_same(found.metrics, report.metrics)


def test_the_number_of_devices_changes_nothing(report, reference):
    extractor = fake_extractor.create(devices=jax.devices())
    assert len(jax.devices()) == 8
    found = evaluator.evaluate(reference, described(extractor))
    assert_same(found.metrics, report.metrics)


def test_order_changes_nothing_but_the_splits_of_inception_score(report, reference, extractor):
    given = sample_images()
    order = np.random.default_rng(0).permutation(given.count)
    shuffled = ArrayImages(given.images[order], given.labels[order])
    found = dict(evaluator.evaluate(reference, described(extractor, shuffled)).metrics)
    expected = dict(report.metrics)
    assert found.pop("inception_score") != expected.pop("inception_score")
    assert_same(found, expected)


def test_a_set_is_at_no_distance_from_itself(reference):
    metrics = evaluator.evaluate(reference, reference).metrics
    assert abs(metrics["fid"]) < 1e-3 and abs(metrics["sfid"]) < 1e-3
    assert metrics["precision"] == metrics["recall"] == 1
    assert metrics["spectrum_distance_db"] == 0


PROCESS = """
import json, sys
import jax
from mdt_jax.parallel.distributed import initialize_distributed, leave
initialize_distributed()
sys.path.insert(0, {tests!r})
import fake_extractor
from mdt_jax.evaluation import batches, evaluator
from mdt_jax.evaluation.descriptions import describe_images, describe_reference
extractor = fake_extractor.create(devices=jax.local_devices())
settings = dict(batch_size=16, split_size={split})
reference = describe_reference({reference!r}, extractor, **settings)
samples = describe_images(batches.open_images({samples!r}), extractor, **settings)
print("metrics", json.dumps(evaluator.evaluate(reference, samples).metrics), flush=True)
leave()
"""


def test_two_processes_find_what_one_finds(tmp_path, report):
    reference, samples = (tmp_path / name for name in ("reference.npz", "samples.npz"))
    np.savez(reference, arr_0=random_images(200, 0), arr_1=labels(200))
    given = sample_images()
    np.savez_compressed(samples, arr_0=given.images, arr_1=given.labels)
    script = PROCESS.format(
        tests=str(ROOT / "tests"), split=SPLIT, reference=str(reference), samples=str(samples)
    )
    port = 20_000 + os.getpid() % 20_000
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(2),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for child in children:
        out, errors = child.communicate(timeout=240)
        assert child.returncode == 0, errors[-2000:]
        line = next(line for line in out.splitlines() if line.startswith("metrics "))
        assert_same(json.loads(line.removeprefix("metrics ")), report.metrics)


def test_stored_statistics_take_the_place_of_the_images(tmp_path, extractor, reference, report):
    path = tmp_path / "reference.npz"
    pool, spatial = reference.pool, reference.spatial
    moved = pool.mean + 1
    stored = {"mu": moved, "sigma": pool.covariance}
    stored |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    np.savez(path, arr_0=random_images(200, 0), **stored)
    found = describe_reference(path, extractor)
    np.testing.assert_array_equal(found.pool.mean, moved)
    assert found.stored and len(found.features) == 200
    recomputed = describe_reference(path, extractor, recompute=True)
    np.testing.assert_allclose(recomputed.pool.mean, pool.mean, rtol=1e-12)
    np.savez(path, **stored)
    alone = evaluator.evaluate(describe_reference(path, extractor), described(extractor))
    assert set(alone.metrics) == {"fid", "sfid", "inception_score"}
    assert alone.missing["precision"] == f"{path} holds no images (arr_0)"
    assert alone.missing["spectrum_distance_db"] == alone.missing["recall"]


def test_statistics_of_other_weights_are_refused(tmp_path, extractor, reference):
    path = tmp_path / "reference.npz"
    stored = {"mu": reference.pool.mean, "sigma": reference.pool.covariance}
    stored["metadata"] = np.array(json.dumps({DIGEST_KEY: "abc"}))
    np.savez(path, arr_0=random_images(200, 0), **stored)
    with pytest.raises(ValueError, match="statistics are of weights abc, .*recompute_reference"):
        describe_reference(path, extractor)
    describe_reference(path, extractor, recompute=True)
    with pytest.raises(ValueError, match="use one extractor for both"):
        evaluator.evaluate(reference, described(fake_extractor.create(seed=1)))


def test_statistics_of_other_features_are_refused(tmp_path, extractor):
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=random_images(20, 0), mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match="stored statistics of 7 features, fake has 12"):
        describe_reference(path, extractor)


def test_what_cannot_be_computed_is_said(extractor, reference):
    bare = fake_extractor.create(parts=("pool",))
    pair = [
        describe_images(ArrayImages(random_images(n, n), name=f"{n} images"), bare)
        for n in (20, 3, 1)
    ]
    few = evaluator.evaluate(pair[0], pair[1])
    assert set(few.metrics) == {"fid", "spectrum_distance_db", "high_frequencies_db"}
    assert few.missing["precision"] == "k = 3 needs 4 images, 3 images holds 3"
    assert few.missing["sfid"] == "fake has no spatial features"
    assert few.missing["inception_score"] == "fake gives no class probabilities"
    one = evaluator.evaluate(pair[0], pair[2])
    assert one.missing["fid"] == "a covariance needs 2 samples"
    unlabelled = evaluator.evaluate(pair[0], pair[0])
    assert unlabelled.missing["precision_per_class"] == "20 images holds no labels (arr_1)"
    for found in (few, one, unlabelled):
        assert set(found.metrics) | set(found.missing) == {n for n, *_ in EVALUATION_METRICS}
        assert all(text in found.table() for text in found.missing.values())


def test_fewer_samples_than_features_are_warned_of(extractor, reference):
    few = evaluator.evaluate(reference, described(extractor, sample_images(12)))
    assert any(
        text.startswith("12 samples for 12 features: their covariance is singular")
        for text in few.warnings
    )
    enough = evaluator.evaluate(reference, described(extractor, sample_images(13)))
    assert not any("singular" in text for text in enough.warnings)
    assert any("published FIDs are of 50,000" in text for text in enough.warnings)


def test_images_of_another_size_are_refused(reference):
    larger = fake_extractor.create(size=5)
    other = describe_images(ArrayImages(random_images(9, 0, size=5), name="large"), larger)
    with pytest.raises(ValueError, match="^large holds images of 5 × 5 pixels, ref of 4 × 4"):
        evaluator.evaluate(reference, dataclasses.replace(other, digest=reference.digest))


def test_features_that_are_not_finite_are_refused(extractor):
    class Broken:
        name, digest = "broken", "0"

        def extract(self, images):
            found = extractor.extract(images)
            found.pool[5] = np.nan
            return found

    with pytest.raises(ValueError, match="^samples: image 5 has features that are not finite"):
        described(Broken())


def test_images_of_zeros_and_ones_are_refused(extractor):
    binary = ArrayImages(random_images(8, 0) % 2, name="binary")
    with pytest.raises(ValueError, match="^binary: the first 8 images hold only 0 and 1"):
        described(extractor, binary)


def test_gray_images_are_seen_as_rgb(extractor):
    gray = random_images(8, 0, channels=1)
    one, other = (described(extractor, ArrayImages(x)) for x in (gray, gray.repeat(3, axis=3)))
    np.testing.assert_array_equal(one.features, other.features)
    np.testing.assert_allclose(one.power, other.power, rtol=1e-4)


def test_the_digest_is_of_names_shapes_and_numbers():
    tree = {"a": np.arange(6.0), "b": np.zeros(2)}
    others = (
        {"a": np.arange(6.0) + 1e-6, "b": np.zeros(2)},
        {"c": np.arange(6.0), "b": np.zeros(2)},
        {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(2)},
    )
    assert len({extractors.digest(t) for t in (tree, *others)}) == 4
    assert extractors.digest(tree) == extractors.digest(jax.tree.map(np.float32, tree))


def test_inception_features_are_flattened_and_without_bias():
    class Outputs:
        pool_3 = jnp.ones((2, 8))
        spatial = jnp.arange(2.0 * 3 * 3 * 7).reshape(2, 3, 3, 7)
        logits_unbiased = jnp.array([[0.0, 1], [2, 0]])

    class Network(InceptionV3):
        def apply(self, variables, images):
            return Outputs()

    images = jnp.zeros((2, 4, 4, 3), jnp.uint8)
    _, spatial, p = extractors.inception_features(Network(), {}, images)
    np.testing.assert_array_equal(spatial, Outputs.spatial.reshape(2, 63))
    np.testing.assert_allclose(p[:, 1], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(2))], rtol=1e-5)


def test_bad_numbers_are_refused(extractor, reference):
    with pytest.raises(ValueError, match="--batch_size 0 is below 1"):
        fake_extractor.create(batch_size=0)
    with pytest.raises(ValueError, match="--batch_size 0 is below 1"):
        described(extractor, batch_size=0)
    with pytest.raises(ValueError, match="--split_size 0 is below 1"):
        describe_images(sample_images(), extractor, split_size=0)
    with pytest.raises(ValueError, match="--neighbours 0 is below 1"):
        evaluator.evaluate(reference, reference, k=0)
