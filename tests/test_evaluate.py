"""The evaluate command: from files, folders and runs to a table and JSON; refusals in one line."""

import importlib
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
from test_sample import save_run

from mdt_jax.evaluation import extractors

command = importlib.import_module("mdt_jax.evaluate")
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
    command.define_flags(found)
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
