"""The study of learning speed: its arms, its arithmetic, and a small one from end to end."""

import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from test_idx import encode, write

from mdt_jax.evaluation.curves import distance_at, first_place
from mdt_jax.models.masking import NO_MASKED_PASS
from mdt_jax.parallel.command import UserError
from mdt_jax.training.run import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import learning_curves as curves  # noqa: E402
import learning_speed as tool  # noqa: E402


def curve(distances, flops=1e9, every=100):
    steps = tuple(every * (i + 1) for i in range(len(distances)))
    return curves.Curve(steps, tuple(distances), flops, {"0.999": distances[-1]})


def as_json(runs, **values):
    return json.loads(json.dumps({"runs": {k: vars(v) for k, v in runs.items()}} | values))


def test_a_distance_is_reached_where_its_logarithm_is_crossed():
    places, distances = [50, 100, 150, 200, 250], [8.0, 4.0, 2.0, 3.0, 1.0]
    assert first_place(places, distances, 4.0) == 100
    assert first_place(places, distances, np.sqrt(8.0)) == pytest.approx(125)
    assert first_place(places, distances, 9.0) == 50
    assert first_place(places, distances, 0.5) is None


def test_a_distance_between_two_points_is_read_off_and_none_beyond_the_ends():
    places, distances = [100, 200, 400], [8.0, 2.0, 1.0]
    assert distance_at(places, distances, 150) == pytest.approx(4.0)
    assert distance_at(places, distances, 300) == pytest.approx(np.sqrt(2.0))
    assert [distance_at(places, distances, p) for p in places] == pytest.approx(distances)
    assert distance_at(places, distances, 99) is distance_at(places, distances, 401) is None
    assert distance_at([], [], 1) is None and distance_at([5], [3.0], 5) == 3.0


def test_speed_ups_say_who_never_arrives():
    fast, slow = curve([4.0, 2.0]), curve([16.0, 8.0, 4.0, 2.0])
    assert curves.speed_up(fast, slow, 2.0) == (2.0, "")
    assert curves.speed_up(fast, curve([16.0, 8.0, 4.0]), 2.0) == (1.5, "≥")
    assert curves.speed_up(curve([16.0, 8.0]), slow, 2.0) == (2.0, "≤")


def test_speed_ups_are_of_pairs_of_seeds_on_each_axis():
    fast, slow = curve([4.0, 2.0], flops=4e9), curve([16.0, 8.0, 4.0, 2.0])
    short = curve([16.0, 8.0, 4.0])
    runs = {"MDTv2:0": fast, "MDTv2:1": fast, "DiT:0": slow, "DiT:1": short, "DiT:2": slow}
    results = curves.results_of(as_json(runs))
    pairs = curves.speed_ups(results, "MDTv2", "MDTv2")
    assert pairs == [(2.0, ""), (1.5, "≥")]
    said = curves.describe(pairs, 1.0)
    assert said == "≥ 1.75 (1.50 to 2.00), never reached by DiT in 1 of 2"
    assert curves.on_axis(results, "MDTv2", "flops") == 0.25
    assert "not faster" in curves.verdict(results)
    apart = curves.results_of(as_json({"MDTv2:0": fast, "DiT:1": slow}))
    assert curves.describe(curves.speed_ups(apart, "MDTv2", "DiT"), 1.0) == "no seed in common"


def test_a_report_of_some_of_the_runs_says_how_many_there_are(tmp_path):
    runs = {"DiT:0": curve([16.0, 8.0, 4.0, 2.0]), "MDTv2:0": curve([4.0, 2.0], flops=2e9)}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(as_json(runs, floor=0.25)))
    results = curves.results_of(curves.read_json(path))
    text = "\n".join(curves.report_lines(results))
    assert "2 of 19 runs are done: DiT 1 of 5, MDTv2 1 of 5, MDT 0 of 3, " in text
    assert "| MDTv2 | 1 of 5 | 2.000 | 2.0 |" in text and "held-out pictures | | 0.250" in text
    assert text.count("| MDTv2 | 2.00 (2.00 to 2.00) | 1.00 (1.00 to 1.00) |") == 2
    assert "Seconds have not been measured yet" in text
    plots = curves.draw_plots(results, tmp_path / "plots")
    assert [plot.stem for plot in plots] == ["learning_speed_steps", "learning_speed_flops"]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    nothing = curves.report_lines(curves.results_of({"runs": {}}))
    assert nothing[0].startswith("0 of 19 runs are done") and "No seed" in nothing[2]


def test_seconds_are_steps_times_what_a_step_took_by_turns():
    runs = {"DiT:0": curve([16.0, 8.0, 4.0, 2.0]), "MDTv2:0": curve([4.0, 2.0], flops=2e9)}
    timing = {"step_seconds": {"DiT": 0.1, "MDTv2": 0.4}, "rounds": 7, "device": "a processor"}
    results = curves.results_of(as_json(runs, timing=timing))
    assert results.axes == ["steps", "flops", "seconds"]
    text = "\n".join(curves.report_lines(results))
    assert "| 0.50 (0.50 to 0.50) |" in text and "7 rounds on a processor" in text


def test_a_report_takes_the_place_of_the_one_before_in_a_document(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{curves.BEGIN}\nold\n{curves.END}\nafter\n")
    for _ in range(2):
        curves.write_section(page, ["new"], [tmp_path / "docs" / "learning_speed_steps.png"])
    shown = "![Distance by steps](docs/learning_speed_steps.png)"
    assert page.read_text() == (f"before\n{curves.BEGIN}\nnew\n\n{shown}\n{curves.END}\nafter\n")
    page.write_text("nothing")
    with pytest.raises(ValueError, match="page.md: has no part between"):
        curves.write_section(page, ["new"])


@pytest.mark.parametrize("text", ["", "[]", '{"runs": {"GAN:0": {}}}', '{"runs": {"DiT:0": 3}}'])
def test_another_file_is_no_results(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no results of this study") as error:
        curves.read_json(path)
    assert "\n" not in str(error.value)


def test_seeds_of_all_arms_go_in_turn():
    planned = curves.planned_runs()
    assert len(planned) == 19 and planned[:6] == [(arm, 0) for arm in curves.ARMS] + [("DiT", 1)]
    assert curves.planned_runs(["MDTv2 without masking:2"]) == [("MDTv2 without masking", 2)]
    for text in ("MDTv2", "MDTv2:x", "GAN:0"):
        with pytest.raises(ValueError, match="is not ARM:SEED, such as MDTv2:0; arms are DiT, "):
            curves.planned_runs([text])


def test_arms_differ_in_what_they_say_alone():
    configs = {arm: tool.study_config(arm, 3, {}).to_dict() for arm in curves.ARMS}
    assert {c["seed"] for c in configs.values()} == {3}
    best, bare = configs["MDTv2"], configs["MDTv2 without masking"]
    assert best["masking"].pop("masked_pass") and not bare["masking"].pop("masked_pass")
    assert best == bare
    plain, tuned = configs["DiT"], configs["DiT with MDTv2's recipe"]
    for path in curves._MDTV2_RECIPE:
        section, key = path.split(".")
        assert tuned[section].pop(key) == best[section][key] != plain[section].pop(key)
    assert plain == tuned


def test_a_model_can_be_trained_without_its_masked_pass():
    config = tool.study_config("MDTv2 without masking", 0, {})
    assert Run(config, "").kept_tokens is NO_MASKED_PASS
    assert len(Run(tool.study_config("MDTv2", 0, {}), "").kept_tokens.counts) == 4


@pytest.fixture
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_a_small_study_goes_on_where_it_was_stopped(tmp_path, quick_compilation, capsys):
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        pictures = rng.integers(0, 256, (40, 28, 28))
        write(data / f"{split}-images-idx3-ubyte.gz", encode(pictures))
        write(data / f"{split}-labels-idx1-ubyte.gz", encode(np.arange(40) % 10))
    changes = {
        "data.path": str(data), "model.hidden_size": 8, "model.depth": 2, "model.num_heads": 2,
        "model.patch_size": 8, "num_steps": 2, "batch_size": 8, "eval_every": 1, "eval.steps": 2,
        "eval.num_samples": 16, "eval.batch_size": 16, "schedule.warmup_steps": 0,
    }  # fmt: skip
    output = tmp_path / "results.json"
    runs = [("DiT", 0), ("DiT with MDTv2's recipe", 0)]
    with pytest.MonkeyPatch.context() as patch:  # a run that is asked to stop
        patch.setattr(tool, "train", lambda *_: types.SimpleNamespace(step=1))
        with pytest.raises(UserError, match="was stopped at step 1 of 2; the same command goes on"):
            tool.run_study(tmp_path / "runs", output, runs, changes)
    assert not output.exists()
    # The second run is made elsewhere, with the results and the judge but no folder of runs.
    for folder, stop in (("runs", 1), ("elsewhere", 2)):
        tool.run_study(tmp_path / folder, output, runs[:stop], changes)
    assert [f.name for f in (tmp_path / "elsewhere").iterdir()] == ["DiT_with_MDTv2_s_recipe-0"]
    with pytest.raises(ValueError, match="holds runs of num_steps 2, now 3; give another --outp"):
        tool.run_study(tmp_path / "runs", output, runs, changes | {"num_steps": 3})
    files = [*tmp_path.rglob("eval_classifier.npy"), tmp_path / "results_judge.npy"]
    assert len(files) == 3 and len({file.read_bytes() for file in files}) == 1
    results = curves.results_of(curves.read_json(output))
    found = results.curves
    assert [c[0].steps for c in found.values()] == [(1, 2)] * 2 and results.floor > 0
    assert all(set(c[0].final) == {"0.999", "0.995"} for c in found.values())
    assert found["DiT"][0].distances[0] != found["DiT"][0].distances[1]
    assert capsys.readouterr().out.count("distance") == 2
    tool.main(["--report", str(output)])
    assert "| DiT with MDTv2's recipe | 1 of 3 |" in capsys.readouterr().out
    judge = tmp_path / "results_judge.npy"
    np.save(judge, np.load(judge) + 1)
    with pytest.raises(UserError, match="another classifier than the one that judged"):
        tool.run_study(tmp_path / "runs", output, [("MDT", 0)], changes)


def test_steps_of_all_arms_are_timed_into_the_results(tmp_path, monkeypatch):
    class Quick:
        def __init__(self, config):
            assert config.seed == 0

        def train_step(self):
            return types.SimpleNamespace(call=lambda: None)

    monkeypatch.setattr(tool, "Workloads", Quick)
    output = tmp_path / "results.json"
    assert set(tool.time_steps(output, rounds=3)) == set(curves.ARMS)
    timing = curves.read_json(output)["timing"]
    assert timing["rounds"] == 3 and set(timing["step_seconds"]) == set(curves.ARMS)
