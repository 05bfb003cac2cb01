"""Judging a run: the small classifier's measures, refused settings, no effect of batch or mesh."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import config as config_lib
from mdt_jax import data, sampling
from mdt_jax.evaluation import classifier
from mdt_jax.evaluation.batches import ArrayImages
from mdt_jax.evaluation.descriptions import describe_images
from mdt_jax.evaluation.evaluator import evaluate
from mdt_jax.parallel import sharding
from mdt_jax.training import resumption, run_evaluation
from mdt_jax.training.run import Run
from mdt_jax.training.step import TrainState

CLASSES = 10


def scans(split):
    source = data.digits(split)
    examples = [source[index] for index in range(len(source))]
    labels = np.array([int(example["label"]) for example in examples])
    return np.stack([example["image"] for example in examples]), labels


@functools.cache
def trained():
    images, labels = scans("train")
    judge = classifier.train_classifier(images, labels, CLASSES)
    return judge, describe_images(ArrayImages(images, labels), judge)


def measure(images, labels=None):
    judge, reference = trained()
    return evaluate(reference, describe_images(ArrayImages(images, labels), judge)).metrics


def test_the_classifier_reads_scans_that_it_has_not_seen():
    images, labels = scans("heldout")
    read = trained()[0].extract(images).probabilities.argmax(axis=1)
    assert np.mean(read == labels) > 0.95


def test_heldout_scans_are_near_the_training_scans_and_worse_sets_are_not():
    images, labels = scans("heldout")
    rng = np.random.default_rng(0)
    heldout = measure(images, labels)
    noisy = measure(np.clip(images + rng.normal(0, 40, images.shape), 0, 255).astype(np.uint8))
    half = measure(images[labels < 5])  # five of the ten classes
    one = measure(images[labels == 3])
    noise = measure(rng.integers(0, 256, images.shape).astype(np.uint8))
    distances = [found["fid"] for found in (heldout, noisy, half, one, noise)]
    print(distances)
    assert distances == sorted(distances)
    assert heldout["fid"] < 1.5 and noisy["fid"] > 3 * heldout["fid"] and half["fid"] > 10
    assert heldout["inception_score"] > 8 > half["inception_score"] > one["inception_score"]
    assert heldout["precision"] > 0.85 and heldout["recall"] > 0.85
    assert one["recall"] < 0.3  # the samples are right, but of one class
    assert noise["precision"] == noise["recall"] == 0


def test_the_digest_says_which_training_images_it_was():
    images, labels = scans("train")
    few = images[:200], labels[:200]
    one = classifier.train_classifier(*few, CLASSES)
    assert one.digest == classifier.train_classifier(*few, CLASSES).digest
    assert one.digest != classifier.train_classifier(images[1:201], labels[1:201], CLASSES).digest


def test_features_do_not_depend_on_the_batch():
    images, _ = scans("heldout")
    judge, _ = trained()
    whole = judge.extract(images[:7])
    rows = [judge.extract(images[i : i + 1]) for i in range(7)]
    np.testing.assert_array_equal(whole.pool, np.concatenate([row.pool for row in rows]))


@pytest.mark.parametrize("present", [(0, 1), (0, 2), (1, 2, 3)])
def test_classes_without_images_have_no_probability(present):
    images, labels = scans("train")
    chosen = np.isin(labels, present)
    judge = classifier.train_classifier(images[chosen][:200], labels[chosen][:200], CLASSES)
    probabilities = judge.extract(images[chosen][200:300]).probabilities
    assert probabilities.shape[1] == CLASSES
    np.testing.assert_allclose(probabilities[:, present].sum(axis=1), 1, rtol=1e-6)
    assert np.mean(probabilities.argmax(axis=1) == labels[chosen][200:300]) > 0.9


def test_one_class_is_none_to_learn():
    images, _ = scans("heldout")
    with pytest.raises(ValueError, match="images of 1 class: a classifier needs at least two"):
        classifier.train_classifier(images, np.zeros(len(images), int), CLASSES)


def test_a_run_keeps_its_classifier(tmp_path, monkeypatch):
    images, labels = scans("heldout")
    path = tmp_path / "run" / "classifier.npy"
    first = classifier.load_or_train(path, images, labels, CLASSES)
    monkeypatch.setattr(classifier, "train_classifier", None)
    again = classifier.load_or_train(path, images, labels, CLASSES)
    assert again.digest == first.digest
    with pytest.raises(ValueError, match="classifier.npy: a classifier of .*; remove it"):
        classifier.load_or_train(path, images, labels, CLASSES + 1)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read .*; remove it"):
        classifier.load_or_train(path, images, labels, CLASSES)


def digits_config(**settings):
    config = config_lib.default_config()
    config.model.update(name="DiT", input_size=8, in_channels=1, num_classes=10, patch_size=4)
    config.model.update(hidden_size=8, depth=1, num_heads=2)
    config_lib.apply_recipe(config)
    config.batch_size, config.num_steps, config.eval_every = 8, 10, 5
    config.diffusion.update(schedule="squared_cosine", prediction="velocity")
    config.sample.update(every=0, guided_channels=None, steps=4, cfg_scale=1.0)
    config.eval.num_samples = 13
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in settings.items()})
    return config


class Drawn:
    """In the place of the compiled sampler: rows that depend on the index of the sample alone."""

    num_steps, mesh = 1, None

    def __init__(self, model, mesh, batch_size, options):
        self.mesh, self.shape = mesh, (batch_size, *model.network.image_shape)

    def warm_up(self, params):
        pass

    def __call__(self, params, labels, key, first, advance=None):
        rows = np.arange(first, first + len(labels))
        draws = [np.random.default_rng(i).uniform(-1, 1, self.shape[1:]) for i in rows]
        return np.stack(draws).astype(np.float32)


def judge(config, folder, monkeypatch, drawn=Drawn, should_stop=lambda: False):
    monkeypatch.setattr(sampling, "CompiledSampler", drawn)
    run = Run(config, folder)
    evaluator = run_evaluation.RunEvaluator(run, data.create_source(config.data))
    evaluator.compile()
    placed = jax.device_put(np.zeros(1), sharding.replicated(run.mesh))
    ema = {run.rates[0]: {"w": placed}}
    state = TrainState(jnp.int32(5), params={}, opt_state=(), ema=ema, loss_history=None)
    return evaluator.judge(state, should_stop)


def test_samples_are_the_same_whatever_the_batch_and_the_mesh(tmp_path, monkeypatch):
    found = [
        judge(digits_config(**settings), tmp_path, monkeypatch)
        for settings in (
            {"eval__batch_size": 8},
            {"eval__batch_size": 64, "mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2},
        )
    ]
    assert "of 13 samples by classifier" in found[0].describe()
    for one in found:
        assert one.metrics.pop("eval_seconds") > 0
    assert found[0] == found[1]
    assert found[0].metrics["eval_samples"] == 13


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_numbers_are_not_judged(value, tmp_path, monkeypatch, caplog):
    class Bad(Drawn):
        def __call__(self, *arguments):
            rows = super().__call__(*arguments)
            rows[0, 0] = value
            rows.flags.writeable = False  # as arrays from a device are
            return rows

    found = judge(digits_config(eval__batch_size=8), tmp_path, monkeypatch, Bad)
    assert np.isnan(found.metrics["eval_fid"]) and "eval_precision" not in found.metrics
    assert "2 samples hold NaN" in caplog.text  # one in each batch


def test_a_judgement_stops_between_batches_when_asked_to(tmp_path, monkeypatch):
    asked = []

    def should_stop():
        asked.append(True)
        return len(asked) == 2

    config = digits_config(eval__batch_size=8, eval__num_samples=64)
    assert judge(config, tmp_path, monkeypatch, should_stop=should_stop) is None
    assert len(asked) == 2


def test_a_reference_takes_the_place_of_the_training_images(tmp_path, monkeypatch):
    images, labels = scans("heldout")
    np.savez(tmp_path / "heldout.npz", arr_0=images[:40], arr_1=labels[:40])
    given = str(tmp_path / "heldout.npz")
    default, other = (
        judge(digits_config(eval__reference=reference), tmp_path, monkeypatch)
        for reference in ("", given)
    )
    assert default.evaluator == other.evaluator
    assert default.metrics["eval_fid"] != other.metrics["eval_fid"]


def test_when_a_run_is_judged():
    config = digits_config(num_steps=12)
    assert [s for s in range(1, 13) if run_evaluation.judgement_is_due(config, s)] == [5, 10, 12]
    config.eval_every = 0
    assert not any(run_evaluation.judgement_is_due(config, s) for s in range(1, 13))


@pytest.mark.parametrize(
    ("lines", "step", "owed"),
    [
        ([], 5, True),
        ([{"step": 5, "loss": 1.0}], 5, True),
        ([{"step": 5, "eval_fid": 1.0}], 5, False),
        ([{"step": 5, "eval_fid": 1.0}], 10, True),
        ([], 7, False),  # not due
        ([], 0, False),
        ([], 15, False),  # a longer run's
    ],
)
def test_what_a_resumed_run_owes(lines, step, owed, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_evaluation.judgement_is_owed(digits_config(), tmp_path, step) == owed


def latents(_):
    posteriors = np.zeros((4, 8, 8, 8), np.float32)
    return data.arrays(posteriors, np.arange(4) % 2, ("cat", "dog"))


def unlabelled(_):
    return data.arrays(np.zeros((4, 8, 8, 1), np.uint8))


WEIGHTS = "weights.safetensors"
REFUSED = {  # settings, source (the config's by default), what is said
    "a period": ({"eval_every": -1}, None, "eval_every -1 is below 0"),
    "one sample": ({"eval__num_samples": 1}, None, "eval.num_samples 1 is below 2"),
    "no batch": ({"eval__batch_size": 0}, None, "eval.batch_size 0 is below 1"),
    "an evaluator": (
        {"eval__evaluator": "clip"},
        None,
        "eval.evaluator 'clip' is unknown; known: auto, inception, classifier",
    ),
    "a sampler": ({"eval__sampler": "euler"}, None, "eval.sampler 'euler' is unknown"),
    "steps": ({"eval__steps": 2000}, None, "eval.steps .*2000"),
    "no weights": ({"eval__evaluator": "inception"}, None, "eval.inception is missing: .*https"),
    "weights that are not there": (
        {"eval__inception": "nowhere"},
        None,
        "no Inception weights at nowhere",
    ),
    "no reference": ({"eval__inception": WEIGHTS}, None, "eval.reference is missing"),
    "a reference that is not there": (
        {"eval__reference": "nowhere.npz"},
        None,
        "eval.reference nowhere.npz: no such file",
    ),
    "a reference of another size": (
        {"eval__reference": "large.npz"},
        None,
        "large.npz: images of 16 × 16 pixels, the samples are of 8 × 8; .*--image_size 8",
    ),
    "a reference of nothing": (
        {"eval__reference": "else.npz"},
        None,
        r"else.npz: holds neither images \(arr_0\) nor statistics .*, but x",
    ),
    "latents without a decoder": (
        {"eval__inception": WEIGHTS, "model__in_channels": 4},
        latents,
        "eval.vae is missing: samples are latents",
    ),
    "a classifier of latents": (
        {"eval__evaluator": "classifier", "model__in_channels": 4},
        latents,
        "eval.evaluator 'classifier': the data are latents",
    ),
    "a classifier without classes": (
        {"eval__evaluator": "classifier"},
        unlabelled,
        "eval.evaluator 'classifier': the data have no classes",
    ),
    "neither": ({}, unlabelled, "eval.inception is missing"),
    "a decoder of pixels": ({"eval__vae": "ema"}, None, "eval.vae is 'ema', but .* are pixels"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_judged_is_refused_in_one_line(what, tmp_path, monkeypatch):
    settings, source, message = REFUSED[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"")
    np.savez("large.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    np.savez("else.npz", x=np.zeros(3))
    config = digits_config(**settings)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Run(config, "")
        run_evaluation.check_evaluation(config, (source or data.create_source)(config.data))
    assert "\n" not in str(error.value)


def test_a_run_that_is_not_judged_needs_none_of_it():
    config = digits_config(eval_every=0, eval__evaluator="inception")
    run_evaluation.check_evaluation(config, unlabelled(None))


def test_settings_of_the_evaluation_may_change_between_resumptions():
    before, now = digits_config(), digits_config(eval__num_samples=50, eval_every=7)
    found = resumption.changes(before, now)
    told = {change.key for change in found if change.kind != resumption.FREE}
    assert told == {"eval.num_samples"}
    resumption.check_changes(found, Path("runs/x"))
