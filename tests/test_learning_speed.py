"""The study of learning speed: its arms, its arithmetic, and a small one from end to end."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from test_idx import encode, write

from mdt_jax.models.masking import NO_MASKED_PASS
from mdt_jax.parallel.command import UserError
from mdt_jax.training.run import Run

TOOL = Path(__file__).parents[1] / "tools" / "learning_speed.py"
spec = importlib.util.spec_from_file_location("learning_speed", TOOL)
tool = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def curve(distances, seconds=1.0, flops=1e9, every=100):
    steps = tuple(every * (i + 1) for i in range(len(distances)))
    times = tuple(step * seconds for step in steps)
    return tool.Curve(steps, tuple(distances), times, flops, {"0.999": distances[-1]})


def test_a_distance_is_reached_where_its_logarithm_is_crossed():
    found = curve([8.0, 4.0, 2.0, 3.0, 1.0], seconds=0.5)
    assert found.reaches(4.0, "steps") == 200
    assert found.reaches(np.sqrt(8.0), "steps") == pytest.approx(250)
    assert found.reaches(9.0, "steps") == 100 and found.reaches(0.5, "steps") is None
    assert found.reaches(2.0, "seconds") == 150 and found.reaches(2.0, "flops") == 3e11


def test_speed_ups_are_of_pairs_of_seeds_and_say_who_never_arrives():
    fast, slow = curve([4.0, 2.0], flops=2e9), curve([16.0, 8.0, 4.0, 2.0])
    assert tool.speed_up(fast, slow, "steps") == (2.0, True)
    assert tool.speed_up(fast, slow, "flops") == (1.0, True)
    assert tool.speed_up(fast, curve([16.0, 8.0, 4.0]), "steps") == (1.5, False)
    ours, theirs = {0: fast, 1: fast}, {0: slow, 1: curve([16.0, 8.0, 4.0]), 2: slow}
    said = tool.describe_speed_up(ours, theirs, "steps")
    assert said == "1.75 (1.50 to 2.00), never reached by 1 of 2"
    assert tool.describe_speed_up({0: fast}, {1: slow}, "steps") == "no seed in common"


def test_a_report_has_both_ways_and_the_floor(tmp_path):
    runs = {"DiT:0": curve([16.0, 8.0, 4.0, 2.0]), "MDTv2:0": curve([4.0, 2.0], flops=2e9)}
    results = {"runs": {k: vars(v) for k, v in runs.items()}, "floor": 0.25}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    text = "\n".join(tool.report_lines(tool.read_results(path)))
    assert "| MDTv2 | 1 | 2.000 | 2.0 | 1.00 |" in text and "held-out pictures | | 0.250" in text
    assert "| MDTv2 | 2.00 (2.00 to 2.00) | 1.00 (1.00 to 1.00) | 2.00 (2.00 to 2.00) |" in text
    assert "| MDTv2 | 0.50 (0.50 to 0.50) |" in text
    plots = tool.draw_plots(results, tmp_path / "plots")
    assert [plot.name for plot in plots] == [f"learning_speed_{axis}.png" for axis in tool.AXES]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)


@pytest.mark.parametrize("text", ["", "[]", '{"runs": {"GAN:0": {}}}', '{"runs": {"DiT:0": 3}}'])
def test_another_file_is_no_results(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no results of this study") as error:
        tool.read_results(path)
    assert "\n" not in str(error.value)


def test_seeds_of_all_arms_go_in_turn():
    planned = tool.planned_runs(())
    assert len(planned) == 19 and planned[:6] == [(arm, 0) for arm in tool.ARMS] + [("DiT", 1)]
    assert tool.planned_runs(["MDTv2 without masking:2"]) == [("MDTv2 without masking", 2)]
    for text in ("MDTv2", "MDTv2:x", "GAN:0"):
        with pytest.raises(ValueError, match="is not ARM:SEED, such as MDTv2:0; arms are DiT, "):
            tool.planned_runs([text])


def test_arms_differ_in_what_they_say_alone():
    configs = {arm: tool.study_config(arm, 3, {}).to_dict() for arm in tool.ARMS}
    assert {c["seed"] for c in configs.values()} == {3}
    best, bare = configs["MDTv2"], configs["MDTv2 without masking"]
    assert best["masking"].pop("masked_pass") and not bare["masking"].pop("masked_pass")
    assert best == bare
    plain, tuned = configs["DiT"], configs["DiT with MDTv2's recipe"]
    for path in tool._MDTV2_RECIPE:
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
    for stop in (1, 2):
        tool.run_study(tmp_path / "runs", output, runs[:stop], changes)
    with pytest.raises(ValueError, match="holds runs of num_steps 2, now 3; give another --outp"):
        tool.run_study(tmp_path / "runs", output, runs, changes | {"num_steps": 3})
    assert len({f.read_bytes() for f in (tmp_path / "runs").rglob("eval_classifier.npy")}) == 1
    results = tool.read_results(output)
    curves = tool.curves_of(results)
    assert [c[0].steps for c in curves.values()] == [(1, 2)] * 2 and results["floor"] > 0
    assert all(set(c[0].final) == {"0.999", "0.99"} for c in curves.values())
    assert curves["DiT"][0].distances[0] != curves["DiT"][0].distances[1]
    assert capsys.readouterr().out.count("distance") == 2
    tool.main(["--report", str(output)])
    assert "| DiT with MDTv2's recipe | 1 |" in capsys.readouterr().out
