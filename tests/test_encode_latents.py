"""The command that encodes images once, with a small random autoencoder: what it writes, and that
it goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mdt_jax import data
from mdt_jax.commands import latent_encoding as tool
from mdt_jax.convert.autoencoder import to_torch
from mdt_jax.convert.autoencoder_settings import settings_from_config
from mdt_jax.data.channel_sums import ChannelSums
from mdt_jax.data.source_flags import FLAGS_OF_KEYS
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.latent_space import STABLE_DIFFUSION_SCALE
from mdt_jax.parallel.command import one_line
from mdt_jax.weights import files as weight_files
from mdt_jax.weights.autoencoder import Autoencoder, encoder_digest

TOOL = Path(__file__).parents[1] / "tools" / "encode_latents.py"
CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
SIZE, COUNT = 8, 5


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    """A small random autoencoder as diffusers saves one."""
    folder = tmp_path_factory.mktemp("vae")
    settings = settings_from_config(CONFIG)
    module, rng = AutoencoderKL(**settings.module_settings()), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    file = folder / "diffusion_pytorch_model.safetensors"
    weight_files.write_weights(file, to_torch(params, settings))
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
    settings = {"image_size": SIZE, "batch_size": 2, "images_per_shard": 3} | changes
    assert tool.encode_latents(data.folder_source(images), autoencoder, output, **settings)
    return data.latents_source(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def encoded(images, autoencoder, tmp_path_factory) -> Path:
    """The five images in two shards, with their mirror images."""
    folder = tmp_path_factory.mktemp("encoded") / "latents"
    encode(images, autoencoder, folder)
    return folder


def test_records_are_the_posteriors_of_the_cropped_images_and_of_those_mirrored(
    images, autoencoder, encoded
):
    cache, source = data.latents_source(encoded), data.folder_source(images)
    assert len(cache) == COUNT and cache.image_shape == (4, 4, 4)
    assert cache.latents and cache.class_names == ("cat", "dog")
    for i in range(COUNT):
        crop = data.to_unit_range(data.center_crop(source[i]["image"], SIZE))
        for mirror, image in ((False, crop), (True, crop[:, ::-1])):
            expected = np.concatenate(autoencoder.encode(image[None]), axis=-1)[0]
            (posterior,), (label,) = cache.records.read_posteriors(
                np.array([i]), np.array([mirror])
            )
            np.testing.assert_allclose(posterior, expected, rtol=1e-4, atol=1e-5)
            assert label == source[i]["label"]


def test_the_manifest_says_what_the_latents_are_of(images, vae_folder, autoencoder, encoded):
    manifest = json.loads((encoded / "manifest.json").read_text())
    known = {
        "source": str(images), "num_images": COUNT, "class_names": ["cat", "dog"],
        "image_size": SIZE, "vae": str(vae_folder), "scale": STABLE_DIFFUSION_SCALE,
        "latent_shape": [4, 4, 4], "dtype": "float32", "mirror": True, "records": 2 * COUNT,
    }  # fmt: skip
    assert known.items() <= manifest.items()
    assert [shard["records"] for shard in manifest["shards"]] == [6, 4]
    files = {shard["file"]: (encoded / shard["file"]).read_bytes() for shard in manifest["shards"]}
    assert sorted(contents(encoded)) == sorted([*files, "manifest.json"])
    for shard in manifest["shards"]:
        content = files[shard["file"]]
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            shard["bytes"],
            shard["sha256"],
        )


def test_without_mirroring_and_in_float16(images, autoencoder, tmp_path):
    cache = encode(images, autoencoder, tmp_path / "latents", mirror=False, dtype="float16")
    posteriors, _ = cache.records.read_posteriors(np.arange(COUNT))
    assert posteriors.shape == (COUNT, 4, 4, 8) and posteriors.dtype == np.float16
    assert not cache.records.mirrored


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_channels_are_measured_in_the_pass_that_encodes_them(images, autoencoder, tmp_path, dtype):
    source = encode(images, autoencoder, tmp_path, normalize="channel", dtype=dtype)
    records = source.records
    both = [records.read_posteriors(np.arange(COUNT), np.full(COUNT, m))[0] for m in (False, True)]
    mean, std = np.split(np.concatenate(both).astype(np.float64), 2, axis=-1)
    spread = np.sqrt(mean.var(axis=(0, 1, 2)) + np.square(std).mean(axis=(0, 1, 2)))
    space = source.latent_space
    np.testing.assert_allclose(space.mean, mean.mean(axis=(0, 1, 2)), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(space.std, spread, rtol=1e-6)
    assert (space.autoencoder, space.digest) == (autoencoder.name, autoencoder.latents.digest)


def test_measuring_goes_on_where_it_was_interrupted(images, autoencoder, tmp_path):
    settings = {"normalize": "channel", "image_size": SIZE, "batch_size": 2, "images_per_shard": 2}
    pictures = data.folder_source(images)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tool.encode_latents(pictures, autoencoder, whole, **settings)
    for index in (2, 0):  # shards by different processes, in another order, one of them twice
        share = {"process_index": index, "process_count": 3}
        assert not tool.encode_latents(pictures, autoencoder, parts, **settings, **share)
    assert tool.encode_latents(pictures, autoencoder, parts, **settings)
    assert contents(parts) == contents(whole)
    shard = next(whole.glob("latents-00001*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert tool.encode_latents(pictures, autoencoder, whole, **settings)
    assert contents(parts) == contents(whole)
    with pytest.raises(ValueError, match="of normalize channel, not of normalize autoencoder; giv"):
        tool.encode_latents(pictures, autoencoder, whole, **settings | {"normalize": "autoencoder"})


def test_sums_of_parts_do_not_cancel():
    rng = np.random.default_rng(0)
    mean = 1e4 + rng.standard_normal((64, 3, 2)) * 1e-2
    posteriors = np.concatenate([mean, np.full_like(mean, 1e-2)], axis=-1)
    sums = ChannelSums(2)
    for part in np.array_split(posteriors, 7):
        sums.add(part)
    sums = ChannelSums.from_json(json.loads(json.dumps(sums.to_json())))
    expected = np.sqrt(mean.var(axis=(0, 1)) + 1e-4)
    np.testing.assert_allclose(sums.moments()[1], expected, rtol=1e-6)


def test_images_without_classes_give_latents_without_classes(images, autoencoder, tmp_path):
    assert encode(images / "cat", autoencoder, tmp_path / "latents").class_names == ()


def test_gray_images_are_encoded_as_rgb(autoencoder, tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 1), np.uint8)
    posteriors = []
    for name, pixels in (("gray", gray), ("rgb", gray.repeat(3, axis=3))):
        tool.encode_latents(data.arrays(pixels), autoencoder, tmp_path / name, image_size=SIZE)
        posteriors.append(data.latents_source(tmp_path / name)[0]["image"])
    np.testing.assert_array_equal(*posteriors)


def count_encoded(monkeypatch) -> list[int]:
    """Grows by the number of images, mirrored ones among them, at each batch encoded."""
    counts, posterior = [], tool._posterior

    def counting(autoencoder, images, batch_size):
        counts.append(len(images))
        return posterior(autoencoder, images, batch_size)

    monkeypatch.setattr(tool, "_posterior", counting)
    return counts


@pytest.mark.parametrize("finished", [True, False])
def test_only_a_damaged_shard_is_encoded_again(
    finished, images, autoencoder, encoded, tmp_path, monkeypatch
):
    folder, whole = tmp_path / "latents", contents(encoded)
    shutil.copytree(encoded, folder)
    manifest = json.loads(whole["manifest.json"])
    if not finished:  # as a run leaves it that was killed in the end
        for shard in manifest["shards"]:
            (folder / shard["file"]).with_suffix(".json").write_text(json.dumps(shard))
        (folder / "manifest.json").rename(folder / "encoding.json")
    torn = folder / manifest["shards"][1]["file"]
    torn.write_bytes(torn.read_bytes()[:-1] + b"!")
    counts = count_encoded(monkeypatch)
    encode(images, autoencoder, folder)
    assert sum(counts) == 4 and contents(folder) == whole
    encode(images, autoencoder, folder)
    assert sum(counts) == 4


def test_processes_encode_shards_of_their_own_and_the_last_ends_it(
    images, autoencoder, encoded, tmp_path
):
    folder, source = tmp_path / "latents", data.folder_source(images)
    settings = {"image_size": SIZE, "batch_size": 2, "images_per_shard": 3, "process_count": 2}
    done = [
        tool.encode_latents(source, autoencoder, folder, process_index=p, **settings)
        for p in range(2)
    ]
    assert done == [False, True] and contents(folder) == contents(encoded)


ENCODERS = """
import functools, importlib.util, os, random, signal, sys, time, types
import jax, numpy as np
from pathlib import Path
from mdt_jax import data
from mdt_jax.commands import latent_encoding as tool
from mdt_jax.models.latent_space import LatentSpace

class Slow:  # an autoencoder's stand-in, of which a forked process can have its own
    seconds = 0.002
    name, latents = "slow", LatentSpace(stride=2, autoencoder="slow", digest="0" * 64)
    module = types.SimpleNamespace(downsampling=2, latent_channels=4, dtype=np.float32)
    def encode(self, images, batch_size):
        time.sleep(self.seconds)
        mean = np.repeat(images[:, ::2, ::2, :1], 4, axis=-1)
        return mean, np.exp(mean)

pixels = np.random.default_rng(0).integers(0, 256, (240, 16, 16, 3), np.uint8)
source = data.arrays(pixels, np.arange(240) % 7)

def encode(folder, **processes):
    settings = {"image_size": 16, "batch_size": 4, "images_per_shard": 12}
    return tool.encode_latents(source, Slow(), folder, **settings, **processes)

def fork(folder, **processes):
    child = os.fork()
    if not child:
        try:
            status = int(encode(folder, **processes))
        except FileExistsError as error:
            print(error, flush=True)
            status = 2
        except BaseException:
            __import__("traceback").print_exc()
            status = 3
        finally:
            os._exit(status)
    return child

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

files = lambda folder: {file.name: file.read_bytes() for file in folder.iterdir()}
whole, folder = Path(sys.argv[1]) / "whole", Path(sys.argv[1]) / "killed"
began = time.perf_counter()
assert wait(fork(whole)) == 1
seconds = time.perf_counter() - began
random.seed(sys.argv[2])
print("seed", sys.argv[2])
"""

KILLED = """
kills = 0
while kills < 10:
    child = fork(folder)
    time.sleep(random.uniform(0, seconds / 4))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    kills += os.WIFSIGNALED(status)
    if (folder / "manifest.json").exists():  # too early: begin again from a torn shard on
        shard = random.choice(sorted(folder.glob("*.array_record")))
        os.truncate(shard, random.randrange(shard.stat().st_size))
    print(len(list(folder.glob("*.array_record"))), "shards")
assert wait(fork(folder)) == 1
assert files(folder) == files(whole), (sorted(files(folder)), sorted(files(whole)))
print("killed", kills, "times: the same", len(files(whole)), "files")
"""

SHARED = """
start = lambda index: fork(folder, process_index=index, process_count=3)
children = [start(index) for index in range(3)]
for _ in range(6):
    time.sleep(random.uniform(0, seconds / 6))
    index = random.randrange(3)
    os.kill(children[index], signal.SIGKILL)
    wait(children[index])
    children[index] = start(index)
ends = [wait(child) for child in children]
print("the manifest was written by", ends.count(1))
assert ends.count(1) >= 1 and set(ends) <= {0, 1}, ends
assert files(folder) == files(whole), (sorted(files(folder)), sorted(files(whole)))
print("shared: the same", len(files(whole)), "files")

folder, Slow.seconds = Path(sys.argv[1]) / "twins", 0.2
first = start(1)
while not (folder / "latents-00001-of-00020.json").exists():
    time.sleep(0.01)
print("the second ended with", wait(start(1)))
os.kill(first, signal.SIGKILL)
"""


def run_encoders(script: str, folder: Path) -> str:
    command = [sys.executable, "-c", ENCODERS + script, str(folder), str(time.time_ns())]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return done.stdout + done.stderr


def test_killed_ten_times_at_random_it_ends_with_the_same_bytes(tmp_path):
    assert "killed 10 times: the same 21 files" in (said := run_encoders(KILLED, tmp_path)), said


def test_processes_at_once_end_with_the_same_bytes_and_no_two_are_at_one_shard(tmp_path):
    said = run_encoders(SHARED, tmp_path)
    assert "shared: the same 21 files" in said, said
    shard = "latents-00001-of-00020.array_record: another process is to encode it, and is still"
    assert shard in said and "the second ended with 2" in said, said


def test_a_folder_of_other_things_is_left_alone(images, autoencoder, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds thesis.txt, which is no part of a latent cac"):
        encode(images, autoencoder, tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"precious"}


@pytest.fixture(scope="module")
def other(autoencoder) -> Autoencoder:
    """An autoencoder of the same shapes and other weights."""
    changed = jax.tree.map(lambda leaf: leaf + 1, autoencoder.params)
    digest = encoder_digest(changed)
    latents = dataclasses.replace(autoencoder.latents, autoencoder="other", digest=digest)
    return dataclasses.replace(autoencoder, params=changed, latents=latents)


def test_a_folder_of_another_autoencoder_size_or_source_is_refused_naming_both(
    images, autoencoder, other, encoded, tmp_path, vae_folder
):
    whole = contents(encoded)
    renamed = tmp_path / "renamed"
    shutil.copytree(images, renamed)
    (renamed / "cat" / "0.png").rename(renamed / "cat" / "10.png")
    for arguments, message in (
        ((images, other), rf"of the autoencoder {vae_folder} \(\w+\), not of the autoencoder oth"),
        (
            (images, autoencoder, {"image_size": 4}),
            "of image_size 8, not of image_size 4; give ano",
        ),
        ((images / "cat", autoencoder), rf"of source {images}, not of source {images}/cat; give"),
        ((renamed, autoencoder), rf"of source {images}, not of source {renamed}; give"),
        ((images, autoencoder, {"dtype": "float16"}), "of dtype float32, not of dtype float16"),
        ((images, autoencoder, {"mirror": False}), "of mirror True, not of mirror False"),
    ):
        *paths, changes = (*arguments, {})[:3]
        with pytest.raises(ValueError, match=message) as error:
            encode(*paths, encoded, **changes)
        assert "\n" not in str(error.value) and str(error.value).startswith(f"{encoded}: ")
    assert contents(encoded) == whole


def test_a_source_that_has_changed_is_refused_saying_how(images, autoencoder, tmp_path):
    source, folder = tmp_path / "images", tmp_path / "latents"
    shutil.copytree(images, source)
    encode(source, autoencoder, folder)
    whole = contents(folder)
    (source / "cat" / "0.png").rename(source / "cat" / "5.png")
    for message in (
        rf"^{folder}: holds latents of {source} as it was \(\w+\), not of what it holds now "
        r"\(\w+\): as many images of the same classes, but others, or in another order, or labell",
        rf"^{folder}: holds latents of 'dog' as class 1, not of 'emu' as class 1; give another",
        rf"^{folder}: holds latents of the 5 images that {source} held, not of the 6 now; give",
    ):
        with pytest.raises(ValueError, match=message):
            encode(source, autoencoder, folder)
        if (source / "dog").exists():
            (source / "dog").rename(source / "emu")
        else:
            (source / "emu").rename(source / "dog")
            shutil.copy(source / "cat" / "2.png", source / "cat" / "6.png")
    assert contents(folder) == whole


def test_images_that_were_moved_are_the_same_source(images, autoencoder, encoded, tmp_path):
    whole = contents(encoded)
    shutil.copytree(images, tmp_path / "moved")
    encode(tmp_path / "moved", autoencoder, encoded)
    assert contents(encoded) == whole


def test_another_name_of_the_same_encoder_goes_on(images, autoencoder, encoded):
    whole = contents(encoded)
    decoder = jax.tree.map(lambda leaf: leaf + 1, autoencoder.params["decoder"])
    params = autoencoder.params | {"decoder": decoder}
    assert encoder_digest(params) == autoencoder.latents.digest
    latents = dataclasses.replace(autoencoder.latents, autoencoder="ema")
    encode(images, dataclasses.replace(autoencoder, params=params, latents=latents), encoded)
    assert contents(encoded) == whole


@pytest.fixture
def one_bad(images, tmp_path) -> Path:
    """A folder of three images, the second of which is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, content in enumerate([None, b"no image", None]):
        file = images / "cat" / f"{i}.png"
        (folder / f"{i}.png").write_bytes(content or file.read_bytes())
    return folder


def test_a_damaged_image_is_named(one_bad, autoencoder, tmp_path):
    message = f"^{one_bad}/1.png: cannot be decoded.* Or give --on_bad_image=skip, which leaves it"
    with pytest.raises(data.BadImage, match=message):
        encode(one_bad, autoencoder, tmp_path / "latents")
    with pytest.raises(FileNotFoundError, match="latents: is not finished; run the mdt encode-"):
        data.latents_source(tmp_path / "latents")


def test_a_damaged_image_can_be_left_out(one_bad, autoencoder, tmp_path):
    skip = {"on_bad_image": "skip", "max_bad_fraction": 0.4}
    cache = encode(one_bad, autoencoder, tmp_path / "latents", **skip)
    whole = data.folder_source(one_bad)
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert len(cache) == 2 and manifest["left_out"] == 1
    assert manifest["shards"][0]["left_out"] == [1]
    assert tool.summary(tmp_path / "latents").endswith(
        "latents of 2 images in 1 files; left out, as they could not be used, 1"
    )
    for i, image in enumerate([0, 2]):
        crop = data.to_unit_range(data.center_crop(whole[image]["image"], SIZE))
        expected = np.concatenate(autoencoder.encode(crop[None]), axis=-1)[0]
        np.testing.assert_allclose(cache[i]["image"], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match="1 of 3 images cannot be used, more than max_bad_fraction"
    ):
        encode(one_bad, autoencoder, tmp_path / "again", on_bad_image="skip")


def test_what_cannot_be_encoded_or_trained_on_is_refused(
    images, autoencoder, tmp_path, monkeypatch
):
    source, output = data.folder_source(images), tmp_path / "latents"
    latents = data.arrays(np.zeros((1, 4, 4, 8), np.float32))
    for case, message in (
        ((source, autoencoder, 9), r"^--image_size 9: .* multiples of 2; 8 would do$"),
        ((latents, autoencoder, SIZE), r"^arrays: holds latents already; give a source of images$"),
    ):
        with pytest.raises(ValueError, match=message):
            tool.encode_latents(*case[:2], output, image_size=case[2])
    with pytest.raises(ValueError, match=r"^--max_bad_fraction 5\.0 is outside 0 to 1$"):
        encode(images, autoencoder, output, max_bad_fraction=5.0)
    assert not output.exists()
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(
        ValueError, match=rf"^{output}: 0.0 GB are free, the latents still to be wr"
    ):
        encode(images, autoencoder, output)


def test_an_error_names_the_commands_own_flags_and_keeps_its_notes():
    error = ValueError("data.path DIR/data.path: not there; set data.labels or data.class_order")
    error.add_note("in the\nfirst of them")
    assert one_line(error, FLAGS_OF_KEYS) == (
        "--data_path DIR/data.path: not there; set --labels or --class_order in the first of them"
    )


def start(*arguments: str | Path, before: Sequence[str] = ()) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    command = [sys.executable, *before, str(TOOL), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def test_the_command_encodes_a_folder(images, vae_folder, encoded, tmp_path):
    command = start(
        f"--data_path={images}", f"--vae={vae_folder}", f"--image_size={SIZE}",
        f"--output={tmp_path}/latents", "--batch_size=8",
    )  # fmt: skip
    said, log = command.communicate(timeout=300)
    assert command.returncode == 0, log
    assert said == (
        f"{tmp_path}/latents: latents of 5 images in 1 files; left out, as they could not be used, "
        "0\n"
    )
    assert "5/5" in log
    for i in range(COUNT):
        ours, known = (
            data.latents_source(folder)[i]["image"] for folder in (tmp_path / "latents", encoded)
        )
        np.testing.assert_allclose(ours, known, rtol=1e-4, atol=1e-5)


# Runs the tool, to which a signal comes when its second shard is there, on however busy a machine.
INTERRUPTED = """
import os, runpy, signal, sys

replace, done = os.replace, []

def counted(aside, path):
    replace(aside, path)
    if os.path.basename(path).startswith("latents-") and path.endswith(".json"):
        done.append(path)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGINT)

# A shell's background job ignores the signal, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.replace, sys.argv = counted, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_commands_at_once_one_of_them_interrupted_make_what_one_makes(
    autoencoder, vae_folder, tmp_path
):
    images, rng = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(images / f"{i}.png")
    encode(images, autoencoder, tmp_path / "one", batch_size=2, images_per_shard=2)

    def process(index: int, *before: str) -> subprocess.Popen:
        return start(
            f"--data_path={images}", f"--vae={vae_folder}", f"--image_size={SIZE}",
            f"--output={tmp_path}/two", "--batch_size=2", "--images_per_shard=2",
            f"--process_index={index}", "--process_count=2", before=before,
        )  # fmt: skip

    first, second = process(0), process(1, "-c", INTERRUPTED)
    _, log = second.communicate(timeout=300)
    assert second.returncode == 130, log
    assert log.splitlines()[-1].startswith("interrupted; the same command goes on from the last")
    assert "Traceback" not in log
    said, log = first.communicate(timeout=300)
    assert said == f"{tmp_path}/two: other processes have not finished yet\n", log
    assert 12 <= len(list((tmp_path / "two").glob("latents-*.json"))) < 20
    again = process(1)
    said, log = again.communicate(timeout=300)
    assert said.startswith(f"{tmp_path}/two: latents of 40 images in 20 files; left out"), log
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_the_command_ends_in_one_line_on_bad_input(tmp_path):
    command = start(f"--data_path={tmp_path}", f"--output={tmp_path / 'latents'}")
    _, log = command.communicate(timeout=300)
    assert command.returncode == 1
    assert log.strip().splitlines()[-1].startswith(f"error: {tmp_path}: holds no images")


# Latents that nothing could be trained on


def with_nan(autoencoder: Autoencoder) -> Autoencoder:
    nan = jax.tree.map(lambda leaf: leaf * np.nan, autoencoder.params)
    return dataclasses.replace(autoencoder, params=nan)


def overflowing(autoencoder: Autoencoder) -> Autoencoder:
    """An encoder whose means are beyond float16 alone."""
    params = dict(autoencoder.params)
    params["quant"] = jax.tree.map(lambda leaf: leaf * 0 + 1e7, params["quant"])
    return dataclasses.replace(autoencoder, params=params)


@pytest.mark.parametrize(
    ("change", "dtype", "value"), [(with_nan, "float32", "nan"), (overflowing, "float16", "inf")]
)
def test_an_encoder_that_gives_no_numbers_is_refused_naming_the_image(
    images, autoencoder, tmp_path, change, dtype, value
):
    with pytest.raises(ValueError, match="cat/0.png, encoded by") as caught:
        encode(images, change(autoencoder), tmp_path / "latents", dtype=dtype)
    said = str(caught.value)
    assert f" stored in {dtype}: the mean of its latent is {value} in row 0, column 0," in said
    assert f"{images}/cat/0.png" in said and "look whether the autoencoder's file is whole" in said
    assert "\n" not in said
    assert not list((tmp_path / "latents").glob("latents-*"))


def test_pictures_of_a_folder_with_pipes_and_links_around_are_encoded_once(
    images, autoencoder, tmp_path
):
    shutil.copytree(images, tmp_path / "images")
    os.mkfifo(tmp_path / "images" / "cat" / "pipe.png")
    (tmp_path / "images" / "cat" / "up").symlink_to("..")
    assert len(encode(tmp_path / "images", autoencoder, tmp_path / "latents")) == COUNT


def test_a_source_whose_path_is_no_utf8_is_encoded(images, autoencoder, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(images, folder)
    source = encode(folder, autoencoder, tmp_path / "latents")
    assert source.records.description.source == str(folder) and source.describe().isprintable()
