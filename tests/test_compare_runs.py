"""Runs beside published curves: what is said, what is not guessed, and the budget of a distance."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs.digits import get_config
from mdt_jax import checkpoints
from mdt_jax import config as config_lib
from mdt_jax.commands import compare_runs, error_budget
from mdt_jax.evaluation import published

INCEPTION = "inception-2015-12-05 0123456789ab"


def run(folder, points, evaluator=INCEPTION, samples=50_000.0, config=None):
    folder.mkdir()
    lines = [{"step": 5, "loss": 2.0}]
    for step, distance in points.items():
        line = {"step": step, "eval_fid": distance, "eval_samples": samples}
        lines.append(line | {"evaluator": evaluator})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 40, "eval')  # torn
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_published(model="MDTv2-S/2"):
    return {
        "model": {"name": model}, "batch_size": 256, "ema_rates": [0.9999],
        "sample": {"sampler": "ddpm", "steps": 250, "cfg_scale": 3.8},
        "eval": {"sampler": None, "steps": 250, "cfg_scale": 1.0},
    }  # fmt: skip


def test_published_curves_fall_and_name_their_paper():
    for name, found in published.CURVES.items():
        assert len(found.steps) == len(found.fids) and found.source.count("arxiv.org") == 1
        assert list(found.steps) == sorted(set(found.steps)), name
        assert list(found.fids) == sorted(found.fids, reverse=True), name


def test_a_run_is_read_off_between_its_judgements_at_the_published_step(tmp_path, capsys):
    folder = run(tmp_path / "a", {300_000: 50.0, 500_000: 32.0}, config=as_published())
    compare_runs.main([str(folder), "MDTv2-S/2"])
    said = capsys.readouterr().out
    # √(50 · 32) = 40 halfway between them; 39.5 a little later.
    assert "400,000          40        39.5        +1.3%  run: between two judgements" in said
    assert "no clean comparison" not in said and "arxiv.org/abs/2303.14389v2" in said
    assert "the reference's 39.5 of step 400,000: reached at step 405,637, 1.01 of" in said


def test_a_run_within_a_published_curve_is_compared_at_its_own_last_step(tmp_path):
    points = {1_000_000: 15.0, 3_000_000: 7.0}
    found = compare_runs.compare(
        compare_runs.run_curve(run(tmp_path / "a", points)),
        compare_runs.published_curve("MDT-XL/2"),
    )
    assert [(row.step, row.between) for row in found] == [
        (2_500_000, "run"), (3_000_000, "reference"),
    ]  # fmt: skip
    assert found[1].theirs == pytest.approx(np.sqrt(7.41 * 6.46))
    assert found[1].excess == pytest.approx(7.0 / np.sqrt(7.41 * 6.46) - 1)


@pytest.mark.parametrize(
    "points", [{100_000: 80.0}, {100_000: 80.0, 399_999: 41.0}, {500_000: 9.0}]
)
def test_nothing_is_guessed_beyond_the_ends(points, tmp_path, capsys):
    folder = run(tmp_path / "a", points)
    with pytest.raises(SystemExit) as ended:
        compare_runs.main([str(folder), "MDTv2-S/2"])
    said = str(ended.value.code) + capsys.readouterr().err
    assert "no step in common" in said and "MDTv2-S/2 at step 400,000 is known" in said


def test_what_was_made_or_judged_otherwise_is_listed(tmp_path):
    config = as_published("MDTv2-S/4")
    config["eval"]["cfg_scale"] = None
    folder = run(tmp_path / "a", {400_000: 30.0}, samples=5_000.0, config=config)
    ours = compare_runs.run_curve(folder)
    assert compare_runs.differences(ours, compare_runs.published_curve("MDTv2-S/2")) == [
        "model: MDTv2-S/4, reference MDTv2-S/2", "samples: 5000, reference 50000",
        "guidance: 3.8, reference 1.0",
    ]  # fmt: skip
    other = run(tmp_path / "b", {400_000: 30.0}, "classifier 1a", config=as_published())
    found = compare_runs.differences(compare_runs.run_curve(other), ours)
    assert found[0] == f"evaluator: classifier 1a, reference {INCEPTION}"
    nothing = compare_runs.run_curve(run(tmp_path / "c", {400_000: 30.0}))
    assert "batch: not known, reference 256" in compare_runs.differences(nothing, ours)


def test_two_runs_are_compared_and_arrival_is_told_apart(tmp_path):
    slow = compare_runs.run_curve(run(tmp_path / "slow", {100: 16.0, 200: 8.0}, "c 1"))
    fast = compare_runs.run_curve(run(tmp_path / "fast", {50: 10.0, 100: 8.0, 200: 4.0}, "c 1"))
    said = compare_runs.report(fast, slow)
    assert "-50.0%" in said and "8 of step 200: reached at step 100, 0.50 of the ref" in said
    assert "16 of step 100: reached by step 50 at the latest" in said
    assert "4 of step 200: reached not yet, at 8 so far" in compare_runs.report(slow, fast)


@pytest.mark.parametrize(
    ("points", "says"),
    [({}, "no judged samples"), ({10: "nan"}, "no judged samples"), (None, "no such file; give a")],
)
def test_a_run_without_judgements_is_refused_in_one_line(points, says, tmp_path):
    place = tmp_path / "a" if points is None else run(tmp_path / "a", points)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        compare_runs.run_curve(place)
    assert "\n" not in str(error.value)


def test_a_run_that_was_judged_in_two_ways_is_no_curve(tmp_path):
    folder = run(tmp_path / "a", {10: 5.0})
    line = {"step": 20, "eval_fid": 4.0, "eval_samples": 1_000.0, "evaluator": INCEPTION}
    (folder / "metrics.jsonl").write_text(
        (folder / "metrics.jsonl").read_text().partition('{"step": 40')[0] + json.dumps(line) + "\n"
    )
    with pytest.raises(ValueError, match="judged in several ways"):
        compare_runs.run_curve(folder)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the digits with random weights and two averages."""
    path = tmp_path_factory.mktemp("run")
    config = get_config()
    config.model.update(name="DiT", hidden_size=8, depth=1, num_heads=2, decoder_depth=None)
    config.ema_rates = (0.99, 0.9)
    config.eval.steps = 2
    network = config_lib.create_network(config)
    x, zero = jnp.zeros((1, *network.image_shape)), jnp.zeros(1, jnp.int32)
    params = nn.unbox(network.init(jax.random.key(0), x, zero, zero))["params"]
    # At initialisation the zero last layer hides guidance.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape, np.float32), params)
    other = jax.tree.map(lambda p: p * 0.9, params)
    store = checkpoints.Checkpoints(path)
    about = {"config": config_lib.to_json(config), "class_names": [str(k) for k in range(10)]}
    items = {"state": {"params": params}, "ema_0.99": params, "ema_0.9": other}
    store.save(1, items, about)
    store.close()
    return path


def test_a_budget_changes_one_choice_at_a_time(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(error_budget, "SAMPLERS", (("ddim", 3),))
    monkeypatch.setattr(error_budget, "SCALES", (2.0,))
    monkeypatch.setattr(error_budget, "SEEDS", (2,))
    output = tmp_path / "budget.json"
    arguments = ["--num_samples", "20", "--batch_size", "20", "--output", str(output)]
    compare_runs.main(["--error_budget", str(workdir), *arguments])
    written = json.loads(output.read_text())
    rows = [error_budget.Row(**row) for row in written["rows"]]
    assert [row.choice for row in rows] == [
        "", "reference", "reference", "samples", "samples", "seed", "EMA rate", "guidance",
        "sampler",
    ]  # fmt: skip
    assert {row.choice for row in rows[1:]} == set(error_budget.EXPECTED)
    # Every row differs from the base, by the choice that it names.
    assert all(abs(row.distance / rows[0].distance - 1) > 1e-9 for row in rows[1:])
    assert len({dataclasses.astuple(row) for row in rows}) == len(rows)
    text = capsys.readouterr().out
    assert f"|  | as judged | {rows[0].distance:.4f} |  |  |" in text
    assert written["num_samples"] == 20 and text.count("ADM's batch") == 1
