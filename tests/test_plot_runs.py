"""Plots of runs: the points are the runs', and what cannot be plotted is said in one line."""

import json

import pytest
from PIL import Image

from mdt_jax.commands import plot_runs


def run(folder, model="DiT", batch_size=8, evaluator="classifier 1a", values=(9.0, 4.0, 1.0)):
    folder.mkdir()
    config = {"model": {"name": model}, "batch_size": batch_size}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": 5, "loss": 2.0, "train_seconds": 0.5}]
    for number, value in enumerate(values, start=1):
        line = {"step": 10 * number, "eval_fid": value, "eval_samples": 50.0}
        lines.append(line | {"train_seconds": 1.5 * number, "evaluator": evaluator})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 40, "eval')  # torn
    return folder


@pytest.mark.parametrize(
    ("x", "expected"),
    [("steps", [10, 20, 30]), ("seconds", [1.5, 3.0, 4.5]), ("images", [80, 160, 240])],
)
def test_points_are_the_runs(x, expected, tmp_path):
    folder = run(tmp_path / "a")
    for place in (folder, folder / "metrics.jsonl"):
        curve = plot_runs.read_curve(place, "eval_fid", x)
        assert (curve.label, curve.x, curve.y) == ("DiT", expected, [9.0, 4.0, 1.0])
        assert curve.judges == {("classifier 1a", 50)}


def test_metrics_of_the_training_loop_are_plotted_too(tmp_path):
    curve = plot_runs.read_curve(run(tmp_path / "a"), "loss", "seconds")
    assert (curve.x, curve.y, curve.judges) == ([0.5], [2.0], frozenset())


def test_values_that_are_not_finite_are_left_out(tmp_path):
    folder = run(tmp_path / "a", values=("nan", 4.0, "inf"))
    assert plot_runs.read_curve(folder, "eval_fid", "steps").x == [20]


def test_the_command_writes_one_png_of_all_runs(tmp_path, capsys):
    runs = [run(tmp_path / "mdt", "MDTv2"), run(tmp_path / "dit")]
    output = tmp_path / "out" / "plot.png"
    plot_runs.main([*map(str, runs), "--x", "seconds", "--log", "y", "--output", str(output)])
    shown = capsys.readouterr()
    assert "MDTv2: 3 points, the last 1" in shown.out and "DiT: 3 points" in shown.out
    assert not shown.err
    with Image.open(output) as picture:
        assert picture.format == "PNG" and picture.width > 800


def test_runs_of_one_model_are_told_apart(tmp_path):
    places = [str(run(tmp_path / name)) for name in "ab"]
    curves = [plot_runs.read_curve(place, "eval_fid", "steps") for place in places]
    labels = [curve.label for curve in plot_runs.named(curves, places, [])]
    assert labels == [f"DiT ({place})" for place in places]
    assert [c.label for c in plot_runs.named(curves, places, ["x", "y"])] == ["x", "y"]


def test_runs_judged_by_different_evaluators_are_plotted_with_a_warning(tmp_path, capsys):
    runs = [run(tmp_path / "a"), run(tmp_path / "b", evaluator="classifier 2b")]
    plot_runs.main([*map(str, runs), "--output", str(tmp_path / "plot.png")])
    assert "not comparable: judged by different evaluators" in capsys.readouterr().err
    assert (tmp_path / "plot.png").exists()


REFUSED = {
    "no file": (["nowhere"], "nowhere: no such file; give a run's workdir or its metrics.jsonl"),
    "no metric": (
        ["a", "--metric", "eval_sfid"],
        "no eval_sfid; it has eval_fid, eval_samples, loss, train_seconds; config.eval_every",
    ),
    "nothing finite": (["c"], "no value of eval_fid is finite"),
    "labels": (["a", "--labels", "x,y"], "--labels has 2 names for 1 runs"),
    "a logarithm of 0": (["b", "--log", "y"], "--log y: values on y are not all above 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_plotted_is_said_in_one_line(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (
        run(tmp_path / "a"),
        run(tmp_path / "b", values=(1.0, 0.0)),
        run(tmp_path / "c", values=("nan",)),
    )
    arguments, message = REFUSED[what]
    with pytest.raises(SystemExit) as error:
        plot_runs.main([*arguments, "--output", "plot.png"])
    said = str(error.value)
    assert said.startswith("error: ") and message in said and "\n" not in said
    assert not (tmp_path / "plot.png").exists()


def test_images_need_the_batch_size(tmp_path):
    folder = run(tmp_path / "a")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json beside it, whose batch_size --x images"):
        plot_runs.read_curve(folder, "eval_fid", "images")
    assert plot_runs.read_curve(folder, "eval_fid", "steps").label == str(folder)
