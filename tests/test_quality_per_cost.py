"""The comparison of samplers: its arithmetic, and a small one from end to end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs.digits import get_config
from mdt_jax import checkpoints
from mdt_jax import config as config_lib
from mdt_jax.data import create_source
from mdt_jax.training import run_evaluation
from tools import quality_per_cost
from tools.quality_per_cost import Row

REFERENCE = Row("ddpm", "250", 250, 1.0, distances=[1.0, 2.0, 3.0], seconds=[10.0, 20.0, 40.0])


@pytest.mark.parametrize(
    ("distances", "as_good"), [([3.0, 3.0, 3.0], True), ([3.1, 3.0, 3.0], False), ([0.0] * 3, True)]
)
def test_as_good_is_within_the_spread_of_the_references_mean_or_below(distances, as_good):
    row = Row("dpm++", "logsnr20", 20, 1.0, distances=distances, seconds=[1.0, 1.0, 1.0])
    assert (REFERENCE.mean, REFERENCE.spread) == (2.0, 1.0)
    assert row.is_as_good(REFERENCE) == as_good
    assert row.cost(REFERENCE) == 1 / 20
    said = quality_per_cost.methods_table([REFERENCE, row]).splitlines()
    assert said[2] == "| ddpm | 250 | 250 | 2.000 ± 1.000 | yes | 20.0 | 1.000 |"
    assert said[3].split(" | ")[-3:] == ["yes" if as_good else "no", "1.0", "0.050 |"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a tiny model of the digits that has learned nothing."""
    path = tmp_path_factory.mktemp("run")
    config = get_config()
    config.model.update(name="DiT", hidden_size=8, depth=1, num_heads=2, decoder_depth=None)
    network = config_lib.create_network(config)
    x, zero = jnp.zeros((1, *network.image_shape)), jnp.zeros(1, jnp.int32)
    params = nn.unbox(network.init(jax.random.key(0), x, zero, zero))["params"]
    store = checkpoints.Checkpoints(path)
    about = {"config": config_lib.to_json(config), "class_names": [str(k) for k in range(10)]}
    store.save(1, {"state": {"params": params}, "ema_0.99": params}, about)
    store.close()
    return path


def test_the_training_images_are_at_distance_0_of_themselves(workdir):
    config = get_config()
    judge = quality_per_cost.Judge(config, workdir / "eval_classifier.npy")
    real = run_evaluation.real_images(create_source(config.data), config).images
    assert abs(judge.distance([real[:700], real[700:]])) < 1e-6
    assert judge.distance([real[::2]]) < 1 < judge.distance([255 - real])


def test_every_method_draws_every_seed(workdir):
    methods = ["ddpm:6", "heun:3", "dpm++:5", "ddpm:6"]
    for number, rows in enumerate(
        quality_per_cost.compare_methods(workdir, methods, 20, [0, 1], 16), 1
    ):
        assert [len(row.distances) for row in rows] == [number] * 4
        assert [len(row.seconds) for row in rows] == [number] * 4
    assert [(row.sampler, row.steps, row.calls) for row in rows] == [
        ("ddpm", "6", 6), ("heun", "3", 5), ("dpm++", "logsnr5", 5), ("ddpm", "6", 6),
    ]  # fmt: skip
    assert rows[0].distances == rows[3].distances  # whatever was drawn between them
    assert len(set(rows[0].distances + rows[1].distances)) == 4
    assert all(np.isfinite(row.distances).all() and min(row.seconds) > 0 for row in rows)


def test_the_command_writes_json_and_says_in_a_line_what_is_wrong(workdir, tmp_path, capsys):
    output = tmp_path / "new" / "found.json"
    small = ["--num_samples=20", "--seeds=0", "--methods", "ddpm:2", "dpm++sde:2"]
    quality_per_cost.main([f"--workdir={workdir}", *small, f"--output={output}"])
    assert "| dpm++sde | logsnr2 | 2 |" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert [row["sampler"] for row in found["rows"]] == ["ddpm", "dpm++sde"]
    assert found["rows"][0]["spread"] is None and found["rows"][0]["cost"] == 1
    assert (found["num_samples"], found["seeds"]) == (20, [0])
    with pytest.raises(SystemExit, match="^error: no checkpoint in"):
        quality_per_cost.main([f"--workdir={tmp_path / 'nothing'}"])
