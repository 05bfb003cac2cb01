"""The command that encodes a folder of images once, with a small random autoencoder."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mdt_jax import data, weight_files
from mdt_jax.convert.autoencoder import settings_from_config, to_torch
from mdt_jax.latents import Autoencoder
from mdt_jax.models.autoencoder import AutoencoderKL

TOOL = Path(__file__).parents[1] / "tools" / "encode_latents.py"
CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
SIZE, COUNT = 8, 5


@functools.cache
def tool():
    spec = importlib.util.spec_from_file_location("encode_latents", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    """A small random autoencoder as diffusers saves one."""
    folder = tmp_path_factory.mktemp("vae")
    settings = settings_from_config(CONFIG)
    module, rng = AutoencoderKL(**settings.module_settings()), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    file = folder / "diffusion_pytorch_model.safetensors"
    weight_files.write(file, to_torch(params, settings))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def autoencoder(vae_folder) -> Autoencoder:
    return Autoencoder.load(vae_folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Five images larger than the crop, of two classes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(COUNT):
        file = folder / ("dog" if i % 2 else "cat") / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 14 + i, 3), np.uint8)).save(file)
    return folder


def encode(images: Path, autoencoder: Autoencoder, output: Path, **changes) -> data.Source:
    settings = {"image_size": SIZE, "batch_size": 2} | changes
    tool().encode_latents(data.folder_source(images), autoencoder, output, **settings)
    return data.npy_directory(output)


def test_rows_are_the_posteriors_of_the_cropped_images_and_then_mirrored(
    images, autoencoder, tmp_path
):
    encoded = encode(images, autoencoder, tmp_path / "latents")
    source = data.folder_source(images)
    assert len(encoded) == 2 * COUNT and encoded.image_shape == (4, 4, 4)
    assert encoded.latents and encoded.class_names == ("cat", "dog")
    for i in range(COUNT):
        crop = data.to_unit_range(data.center_crop(source[i]["image"], SIZE))
        for row, image in ((i, crop), (COUNT + i, crop[:, ::-1])):
            expected = np.concatenate(autoencoder.encode(image[None]), axis=-1)[0]
            np.testing.assert_allclose(encoded[row]["image"], expected, rtol=1e-4, atol=1e-5)
            assert encoded[row]["label"] == source[i]["label"]
    assert not (tmp_path / "latents.partial").exists()


def test_without_mirroring_and_in_float16(images, autoencoder, tmp_path):
    encode(images, autoencoder, tmp_path / "latents", mirror=False, dtype="float16")
    latents = np.load(tmp_path / "latents" / "latents.npy")
    assert latents.shape == (COUNT, 4, 4, 8) and latents.dtype == np.float16


def test_images_without_classes_give_latents_without_labels(images, autoencoder, tmp_path):
    encoded = encode(images / "cat", autoencoder, tmp_path / "latents")
    assert encoded.class_names == ()
    assert [file.name for file in (tmp_path / "latents").iterdir()] == ["latents.npy"]


def test_gray_images_are_encoded_as_rgb(autoencoder, tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 1), np.uint8)
    for name, pixels in (("gray", gray), ("rgb", gray.repeat(3, axis=3))):
        tool().encode_latents(data.arrays(pixels), autoencoder, tmp_path / name, image_size=SIZE)
    gray_latents, latents = (np.load(tmp_path / n / "latents.npy") for n in ("gray", "rgb"))
    np.testing.assert_array_equal(gray_latents, latents)


def test_an_output_that_is_there_is_not_overwritten(images, autoencoder, tmp_path):
    for name in ("latents", "other.partial"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match="/latents is there already; remove it, or give"):
        encode(images, autoencoder, tmp_path / "latents")
    with pytest.raises(FileExistsError, match="/other.partial is left from a run that ended; rem"):
        encode(images, autoencoder, tmp_path / "other")


def test_a_damaged_image_is_named_and_leaves_nothing(images, autoencoder, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "0.png").write_bytes((images / "cat" / "0.png").read_bytes())
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"^{folder}/1.png: cannot be decoded"):
        encode(folder, autoencoder, tmp_path / "latents", batch_size=1)
    assert [file.name for file in tmp_path.iterdir()] == ["images"]


def test_what_cannot_be_encoded_or_trained_on_is_refused(
    images, autoencoder, tmp_path, monkeypatch
):
    source = data.folder_source(images)
    rescaled = dataclasses.replace(autoencoder, scale=0.13025)
    latents = data.arrays(np.zeros((1, 4, 4, 8), np.float32))
    for case, message in (
        ((source, autoencoder, 9), r"^--image_size 9: .* multiples of 2; 8 would do$"),
        ((source, rescaled, SIZE), r"scale and shift are 0.13025 and 0.0, but .* by 0.18215"),
        ((latents, autoencoder, SIZE), r"^arrays: holds latents already; give a source of images$"),
    ):
        with pytest.raises(ValueError, match=message):
            tool().encode_latents(*case[:2], tmp_path / "latents", image_size=case[2])
    monkeypatch.setattr(tool().shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=rf"^{tmp_path}: 0.0 GB are free, the latents take"):
        encode(images, autoencoder, tmp_path / "latents")
    assert not list(tmp_path.iterdir())


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_the_command_encodes_a_folder(images, vae_folder, autoencoder, tmp_path):
    output = tmp_path / "latents"
    done = run(
        f"--data_path={images}", f"--vae={vae_folder}", f"--image_size={SIZE}",
        f"--output={output}", "--batch_size=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(output)
    encode(images, autoencoder, tmp_path / "again")
    ours = np.load(tmp_path / "again" / "latents.npy")
    np.testing.assert_allclose(np.load(output / "latents.npy"), ours, rtol=1e-4, atol=1e-5)


def test_the_command_ends_in_one_line_on_bad_input(tmp_path):
    done = run(f"--data_path={tmp_path}", f"--output={tmp_path / 'latents'}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}: holds no images")
