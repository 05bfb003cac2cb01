"""The evaluate command: from files, folders and runs to a table and JSON; refusals in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_extractor
import numpy as np
import pytest
from absl import flags
from fake_extractor import random_images
from jobs import xla_flags
from PIL import Image
from test_sample import save_run

from mdt_jax import checkpoints
from mdt_jax.evaluate import command
from mdt_jax.evaluate.flags import define_flags
from mdt_jax.evaluation import extractors

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def inception(monkeypatch):
    """A fake in place of Inception, of 8 × 8 images where the weights are called so."""

    def load(source, batch_size):
        return fake_extractor.create(size=8 if source == "8" else 4, batch_size=batch_size)

    monkeypatch.setattr(extractors, "load_inception", load)


@pytest.fixture
def files(tmp_path):
    """A reference and samples, labelled."""
    paths = {name: str(tmp_path / f"{name}.npz") for name in ("reference", "samples")}
    np.savez(paths["reference"], arr_0=random_images(60, 0), arr_1=np.arange(60) % 3)
    np.savez(paths["samples"], arr_0=random_images(40, 1), arr_1=np.arange(40) % 3)
    return paths | {"inception": "4"}


def parse(**settings):
    found = flags.FlagValues()
    define_flags(found)
    found(["evaluate", *(f"--{name}={value}" for name, value in settings.items())])
    return found


def test_files_become_a_table_and_json(files, tmp_path, capsys):
    output = tmp_path / "reports" / "report.json"
    command.evaluate_samples(parse(**files, output=output, split_size=20, feature_batch_size=9))
    printed = capsys.readouterr()
    for text in ("FID", "Inception Score", "lowest precision within the class", str(output)):
        assert text in printed.out
    assert "image/s" in printed.err and "precision, recall" in printed.err
    found = json.loads(output.read_text())
    assert found["metrics"]["fid"] > 0 and found["missing"] == {}
    assert found["about"]["samples"]["images"] == 40
    assert found["about"]["extractor_digest"] == fake_extractor.create().digest
    assert found["about"]["split_size"] == 20 and "jax" in found["about"]["versions"]
    assert sorted(found["classes"]) == ["0", "1", "2"]


def test_a_run_is_sampled_first(tmp_path, capsys):
    workdir, reference = tmp_path / "run", tmp_path / "reference.npz"
    save_run(workdir)
    np.savez(reference, arr_0=random_images(20, 0, size=8, channels=1))
    settings = {"reference": reference, "inception": "8", "num_samples": 6, "steps": 2, "seed": 3}
    found = command.evaluate_samples(parse(samples=workdir, **settings))
    made = workdir / "evaluation" / "step0000007_num_samples-6_seed-3_steps-2.npz"
    assert found["about"]["samples"]["name"] == str(made)
    with np.load(made) as arrays:
        assert arrays["arr_0"].shape == (6, 8, 8, 1)
        np.testing.assert_array_equal(arrays["arr_1"], [0, 1, 2, 3, 0, 1])
    again = command.evaluate_samples(parse(workdir=workdir, **settings))
    assert again["metrics"] == found["metrics"]


def test_fifty_thousand_samples_are_made_by_default(tmp_path, monkeypatch):
    """And latents are decoded with the autoencoder that published numbers used."""
    seen = {}
    monkeypatch.setattr(command.sample_command, "generate", lambda f, mesh: seen.update(f=f))
    # What the file holds, which is not there, is asked of the weights.
    monkeypatch.setattr(command, "_samples_latents", lambda f, workdir: workdir is None)
    made = command.make_samples(parse(checkpoint="mdt_xl2_v2_ckpt.pt", cfg_scale=1.5), None)
    assert made == Path("mdt_xl2_v2_ckpt_cfg_scale-1.5.npz")
    assert (seen["f"].num_samples, seen["f"].vae, seen["f"].cfg_scale) == (50_000, "ema", 1.5)
    save_run(tmp_path)
    command.make_samples(parse(workdir=tmp_path), str(tmp_path))
    assert seen["f"].vae is None and seen["f"].workdir == str(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reference": None}, "^--reference is missing$"),
        ({"inception": None}, "^--inception is missing$"),
        ({"samples": None}, "^give one of --samples, --workdir, a run, and --checkpoint$"),
        ({"workdir": "run"}, "^give one of --samples, --workdir"),
        ({"cfg_scale": 2}, "^--cfg_scale is a setting of sampling, and --samples .* no run's"),
        ({"output": "."}, "^--output . is a folder; name a .json file$"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(files, changed, message):
    given = {name: value for name, value in (files | changed).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        command.evaluate_samples(parse(**given))


def test_the_command_ends_in_one_line_on_missing_weights(files, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mdt_jax.evaluate", f"--reference={files['reference']}",
         f"--samples={files['samples']}", f"--inception={tmp_path / 'none'}"],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": xla_flags(1)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert str(tmp_path / "none") in line and "pt_inception-2015-12-05-6726825d.pth" in line
    assert done.stderr.strip().splitlines()[-1] == line


# What is given is opened before Inception runs on any of it


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def relabel(path: Path) -> None:
    np.savez(path, arr_0=random_images(40, 1), arr_1=np.zeros(39, int))


WRONG_SAMPLES = {
    "not there": (lambda path: path.unlink(), "samples.npz: no such file"),
    "cut off": (truncate, "samples.npz: cannot be read as npz"),
    "text": (lambda path: path.write_text("<html>"), "samples.npz: cannot be read as npz"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "it is no file"),
    "a folder of nothing": (lambda path: (path.unlink(), path.mkdir()), "holds no images"),
    "latents": (lambda p: np.savez(p, arr_0=np.zeros((9, 4, 4, 4), "f4")), "latents of 4 channels"),
    "none": (lambda p: np.savez(p, arr_0=np.zeros((0, 4, 4, 3), "u1")), r"shape \(0, 4, 4, 3\)"),
    "of another size": (
        lambda path: np.savez(path, arr_0=random_images(40, 1, size=8)),
        "samples.npz holds images of 8 × 8 pixels, .*reference.npz of 4 × 4",
    ),
    "of other labels": (relabel, "arr_1 is int64 .39,., which is not a label for each"),
    "of other names": (lambda path: np.savez(path, images=random_images(9, 1)), "no arr_0; it hol"),
}


@pytest.fixture
def no_features(monkeypatch):
    def extract(self, images):
        raise AssertionError("features of images were computed")

    monkeypatch.setattr(extractors.NetworkExtractor, "extract", extract)


@pytest.mark.parametrize("wrong", WRONG_SAMPLES)
def test_wrong_samples_are_refused_before_the_reference_is_looked_at(files, wrong, no_features):
    change, message = WRONG_SAMPLES[wrong]
    change(Path(files["samples"]))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        command.evaluate_samples(parse(**files))
    assert "\n" not in str(caught.value)


def singular(path: Path) -> None:
    np.savez(path, mu=np.zeros(12), sigma=-np.eye(12))


WRONG_REFERENCES = {
    "not there": (lambda path: path.unlink(), "--reference .*reference.npz: no such file or fold"),
    "of nothing": (lambda path: np.savez(path, x=np.zeros(3)), "holds neither images .* but x"),
    "of half a moment": (lambda path: np.savez(path, mu=np.zeros(3)), "holds neither .* but mu"),
    "of other moments": (
        lambda path: np.savez(path, mu=np.zeros(3), sigma=np.eye(4)),
        "reference.npz: mu, sigma: a mean of shape",
    ),
    "of text": (
        lambda path: np.savez(path, mu=np.array(["a"]), sigma=np.eye(1)),
        "reference.npz: mu, sigma: ",
    ),
    "of NaN": (
        lambda path: np.savez(path, mu=np.full(12, np.nan), sigma=np.eye(12)),
        "mu, sigma: mean or covariance hold numbers that are not finite",
    ),
    "of no covariance": (singular, "reference.npz: the covariance has the negative eigenvalue -1"),
    "of odd metadata": (
        lambda path: np.savez(path, mu=np.zeros(12), sigma=np.eye(12), metadata=np.array("[1]")),
        "reference.npz: its metadata cannot be read",
    ),
    "cut off": (truncate, "reference.npz: cannot be read as npz"),
}


@pytest.mark.parametrize("wrong", WRONG_REFERENCES)
def test_wrong_references_are_refused_before_any_features(files, wrong, no_features):
    change, message = WRONG_REFERENCES[wrong]
    change(Path(files["reference"]))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        command.evaluate_samples(parse(**files))
    assert "\n" not in str(caught.value)


def test_moments_of_another_extractor_are_refused_at_the_first_batch(files, monkeypatch):
    np.savez(files["reference"], arr_0=random_images(60, 0), mu=np.zeros(7), sigma=np.eye(7))
    seen = []
    extract = extractors.NetworkExtractor.extract
    monkeypatch.setattr(
        extractors.NetworkExtractor,
        "extract",
        lambda self, x: seen.append(len(x)) or extract(self, x),
    )
    with pytest.raises(ValueError, match="stored statistics of 7 features, fake has 12"):
        command.evaluate_samples(parse(**files, feature_batch_size=9))
    assert seen == [9]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"workdir": "gone"}, "gone"),
        ({"workdir": "run", "step": 8}, "8"),
        ({"workdir": "run", "ema_rate": 0.5}, "0.5"),
        ({"workdir": "run", "labels": "9"}, "label 9 is outside 0 to 3"),
        ({"workdir": "run", "vae": "gone.safetensors"}, "gone.safetensors"),
        ({"workdir": "run", "reference": "large.npz"}, "8 × 8 pixels, large.npz of 16 × 16"),
        ({"checkpoint": "gone.safetensors"}, "gone.safetensors is not there"),
        ({"checkpoint": "damaged.safetensors"}, "damaged.safetensors .* is truncated or not"),
    ],
)
def test_a_model_that_cannot_be_sampled_is_refused_first(
    tmp_path, monkeypatch, no_features, changed, message
):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run")
    np.savez("reference.npz", arr_0=random_images(20, 0, size=8, channels=1))
    np.savez("large.npz", arr_0=random_images(20, 0, size=16))
    Path("damaged.safetensors").write_bytes(b"x" * 100)
    settings = {"reference": "reference.npz", "inception": "8", "num_samples": 6, "steps": 2}
    with pytest.raises((ValueError, OSError, checkpoints.CheckpointError), match=message):
        command.evaluate_samples(parse(**(settings | changed)))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file/report.json", "file is a file; move it away, or give another --output"),
        ("locked/report.json", "locked cannot be written to: change its permissions"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_first(
    files, tmp_path, monkeypatch, no_features, output, message
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(os, "access", lambda place, mode: "locked" not in str(place))
    with pytest.raises(OSError, match=message):
        command.evaluate_samples(parse(**files, output=tmp_path / output))


def test_a_folder_of_pictures_beside_a_folder_is_advised_what_evaluate_can(tmp_path, files):
    for name in ("0.png", "grids/1.png"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "out" / name)
    with pytest.raises(
        ValueError, match="0.png beside sub-folders of images such as grids"
    ) as caught:
        command.evaluate_samples(parse(**(files | {"samples": str(tmp_path / "out")})))
    assert "data." not in str(caught.value)


@pytest.mark.parametrize("latents", [{}, {"latents": None}, {"latents": {"scale": 0.13025}}])
def test_converted_weights_of_latents_are_decoded(tmp_path, monkeypatch, latents):
    """Even where it is not known what they were trained on."""
    config = {"model": {"in_channels": 4}}
    meta = {"config": config, "weights": {}} | latents
    monkeypatch.setattr(command.checkpoints, "read_meta", lambda *_: (7, meta))
    assert command._samples_latents(parse(workdir=tmp_path), str(tmp_path))
    config["model"]["in_channels"] = 3
    assert command._samples_latents(parse(workdir=tmp_path), str(tmp_path)) == bool(
        latents.get("latents")
    )
