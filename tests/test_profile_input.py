"""tools/profile_input.py: what it compares with, what it refuses, and what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdt_jax import data
from mdt_jax.commands import input_rates, profile_input


def write_images(folder, count: int):
    """PNG files of as many classes, 12 x 9 pixels whose red is their place in the list."""
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
        pixels[..., 0] = i
        (folder / f"{i:02}").mkdir(parents=True)
        Image.fromarray(pixels).save(folder / f"{i:02}" / "0.png")
    return folder


@pytest.mark.parametrize(
    "flag", ["examples", "processes", "rounds", "batch_size", "seconds", "read_ahead", "mfu"]
)
def test_zero_is_refused_in_one_line_before_anything_is_made(flag):
    with pytest.raises(SystemExit) as end:
        profile_input.main([f"--{flag}", "0"])
    said = str(end.value.code)
    assert re.match(rf"error: --{flag} 0(\.0)? is (below 1; it takes|outside \(0, )", said), said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "2", "-1"], "--workers [2, -1] holds -1, which is below 0; it takes whole"),
        (["--crop", "middle"], "--crop is 'middle'; known are 'center', 'random'"),
        (["--device", "abacus"], "--device 'abacus': its peak is not known; give --images_per_s"),
        (["--data_name", "folder", "--labels", "all"], "data.labels is 'all'; known are"),
        (["--data_name", "folder", "--data_path", "gone"], "gone: no such folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(flags, message, tmp_path):
    if flags[:1] == ["--data_name"] and "--data_path" not in flags:
        flags = [*flags, "--data_path", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        profile_input.main(flags)
    assert end.value.code.startswith(f"error: {message}") and "\n" not in end.value.code


def test_pillow_reads_the_files_in_the_order_in_which_the_pipeline_does(tmp_path):
    source = data.folder_source(write_images(tmp_path, 12))
    stream = data.ExampleStream(source, input_rates.SEED, image_size=8)
    labels = [int(example["label"]) for example in map(stream.__getitem__, range(12))]
    files = input_rates.image_files(source)
    assert files == [str(tmp_path / f"{label:02}" / "0.png") for label in labels]
    assert files != sorted(files)


def test_pillow_alone_gives_the_pipelines_pixels(tmp_path):
    source = data.folder_source(write_images(tmp_path, 2))
    file = input_rates.image_files(source)[0]
    image = source[int(Path(file).parent.name)]["image"]
    for size in (4, 8, 16):
        np.testing.assert_array_equal(
            input_rates.pillow_crop(file, size), data.center_crop(image, size)
        )
        theirs, ours = (np.random.default_rng(size) for _ in range(2))
        np.testing.assert_array_equal(
            input_rates.pillow_crop(file, size, theirs), data.random_crop(image, size, ours)
        )


def test_the_rate_that_the_default_model_needs_is_known_without_a_flag():
    rate, why = input_rates.needed_rate(profile_input.parse_arguments([]))
    assert round(rate) == 303 and why == "MDTv2-XL/2 on 1 x NVIDIA H200 at 40% MFU"
    shared = profile_input.parse_arguments(["--images_per_second", "90", "--processes", "3"])
    assert input_rates.needed_rate(shared) == (
        30,
        "--images_per_second 90, shared by 3 processes",
    )


def test_a_folder_is_measured_as_the_config_would_read_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(input_rates, "spawned", input_rates.ThreadPoolExecutor)
    profile_input.main(
        [
            "--data_name",
            "folder",
            "--data_path",
            str(write_images(tmp_path, 12)),
            "--labels",
            "none",
            "--crop",
            "random",
            "--image_size",
            "8",
            "--batch_size",
            "4",
            "--workers",
            "0",
            "--seconds",
            "0.05",
            "--rounds",
            "2",
        ]  # fmt: skip
    )
    *lines, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)["images"]
    assert len(result["rounds"]) == 2 and min(result["examples_per_second"].values()) > 0
    assert result["of_pillow"].keys() == {"0 workers"}
    assert any(line.startswith("the model needs") and "303" in line for line in lines)
