"""Latent caches as the pipeline reads them, and that training on one is training on its images."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from fixtures import make_trainer, reference, start

from mdt_jax import data
from mdt_jax.data import latent_cache, latent_writing
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.latent_space import STABLE_DIFFUSION_SCALE, LatentSpace
from mdt_jax.parallel import sharding
from mdt_jax.training.step import draw_latents
from mdt_jax.weights.autoencoder import Autoencoder, _encode

COUNT = 11
DESCRIPTION = latent_cache.CacheDescription(
    source="pictures", num_images=COUNT, class_names=("cat", "dog", "emu"), image_size=8,
    vae="mse", vae_digest="0" * 64, scale=STABLE_DIFFUSION_SCALE, compute_dtype="float32",
    latent_shape=(4, 4, 2), dtype="float16", mirror=True, images_per_shard=4,
)  # fmt: skip


def records(description=DESCRIPTION) -> np.ndarray:
    """Image i's posterior is i everywhere, its mirror image's 100 + i."""
    rows = np.zeros((description.num_images, 2), description.record_type)
    numbers = np.arange(description.num_images)[:, None]
    rows["index"], rows["label"], rows["mirrored"][:, 1] = numbers, numbers % 3, 1
    rows["posterior"][:] = (numbers + [0, 100])[..., None, None, None]
    return rows[:, : 1 + description.mirror]


def write(folder: Path, description=DESCRIPTION, rows: np.ndarray | None = None) -> Path:
    latent_writing.begin_cache(folder, description)
    rows = records(description) if rows is None else rows
    for shard in range(description.num_shards):
        images = description.shard_images(shard)
        shard_rows = rows[images.start : images.stop].reshape(-1)
        latent_writing.write_shard(folder, description, shard, [shard_rows[:3], shard_rows[3:]])
    assert latent_writing.finish_cache(folder, description)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("cache") / "latents")


@pytest.fixture
def copy(tmp_path) -> Path:
    return write(tmp_path / "latents")


def test_a_block_holds_the_images_asked_for_as_they_are_stored(folder):
    cache = data.latents_source(folder).records
    indices, mirror = np.array([10, 0, 7, 3, 4, 0]), np.array([1, 0, 0, 1, 0, 1], bool)
    posteriors, labels = cache.read_posteriors(indices, mirror)
    assert posteriors.dtype == np.float16 and posteriors.shape == (6, 4, 4, 4)
    assert posteriors[:, 0, 0, 0].tolist() == [110, 0, 7, 103, 4, 100]
    assert labels.tolist() == [1, 0, 1, 0, 1, 0] and labels.dtype == np.int32
    assert posteriors.flags.writeable


def test_a_block_of_a_source_is_its_examples_one_by_one(folder):
    source = data.latents_source(folder)
    assert len(source) == COUNT and source.class_names == ("cat", "dog", "emu")
    for index, example in zip([9, 2, 2], source.__getitems__([9, 2, 2]), strict=True):
        np.testing.assert_array_equal(example["image"], source[index]["image"])
        assert example["image"][0, 0, 0] == index and example["label"] == index % 3


def test_a_cache_travels_to_workers_as_its_path(folder):
    source = pickle.loads(pickle.dumps(data.latents_source(folder)))
    assert source[5]["image"][0, 0, 0] == 5 and len(pickle.dumps(source)) < 2000


def test_the_log_says_what_the_latents_are_of(folder):
    line = data.latents_source(folder).describe()
    assert "float16 latents of pictures at 8 pixels and of mirror images" in line
    assert "by the autoencoder mse" in line and "\n" not in line


def test_the_same_records_are_the_same_bytes(folder, copy):
    for file in folder.iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()


def test_a_configuration_names_a_cache(folder):
    config = ml_collections.ConfigDict({"name": "latents", "path": str(folder)})
    source = data.create_source(config)
    assert source.latents and source.image_shape == (4, 4, 2)


# The pipeline


def first_batch(source: data.Source, **changes) -> dict[str, np.ndarray]:
    settings = {"global_batch_size": COUNT, "process_index": 0, "process_count": 1, "seed": 0}
    with data.create_batches(source, **(settings | {"flip": True} | changes)) as batches:
        return next(batches)


def test_flipping_chooses_the_mirror_images_posterior(folder):
    batch, plain = (first_batch(data.latents_source(folder), flip=flip) for flip in (True, False))
    values = batch["image"][:, 0, 0, 0].astype(int)
    assert (values % 100).tolist() == plain["image"][:, 0, 0, 0].astype(int).tolist()
    assert sorted(values % 100) == list(range(COUNT)) and 1 < (values >= 100).sum() < COUNT - 1
    assert batch["label"].tolist() == (values % 100 % 3).tolist()


def test_an_example_is_mirrored_in_a_cache_when_it_would_be_among_images(folder):
    pixels = np.zeros((COUNT, 1, 2, 1), np.uint8)
    pixels[:, :, 1] = 255
    mirrored = first_batch(data.arrays(pixels))["image"][:, 0, 0, 0] > 0
    values = first_batch(data.latents_source(folder))["image"][:, 0, 0, 0]
    assert (values >= 100).tolist() == mirrored.tolist()


def test_without_mirror_images_flipping_mirrors_the_posterior(tmp_path):
    description = dataclasses.replace(DESCRIPTION, mirror=False)
    source = data.latents_source(write(tmp_path / "latents", description))
    slopes = np.broadcast_to(np.arange(4.0), (COUNT, 4, 4)).astype(np.float16)
    reader = source.records.read_posteriors
    source.records.read_posteriors = lambda indices, mirror: (
        np.repeat(slopes[:, :, :, None], 4, axis=-1) + 0 * reader(indices, mirror)[0],
        reader(indices, mirror)[1],
    )
    stream = data.ExampleStream(source, seed=0, flip=True)
    rows = stream.block(0, COUNT)["image"][:, 0, :, 0].tolist()
    assert {tuple(row) for row in rows} == {(0, 1, 2, 3), (3, 2, 1, 0)}


def test_batches_have_the_shape_and_type_that_is_told_beforehand(folder, tmp_path):
    pixels = np.zeros((COUNT, 4, 4, 3), np.uint8)
    posteriors = np.ones((COUNT, 4, 4, 4), np.float16)
    for source, size in (
        (data.latents_source(folder), None),
        (data.arrays(posteriors), None),
        (data.arrays(pixels), 2),
        (data.arrays(pixels), None),
    ):
        batch = first_batch(source, image_size=size)
        for name, spec in data.example_spec(source, size).items():
            assert batch[name].shape == (COUNT, *spec.shape) and batch[name].dtype == spec.dtype


def test_workers_read_a_cache_as_threads_do(folder):
    source = data.latents_source(folder)
    threads, workers = (first_batch(source, num_workers=workers) for workers in (0, 1))
    for name in threads:
        np.testing.assert_array_equal(threads[name], workers[name])


# What is refused


def damage_manifest(folder: Path, **changes) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def test_a_shard_cut_off_or_missing_is_named(copy):
    shard = copy / "latents-00001-of-00003.array_record"
    os.truncate(shard, 1000)
    with pytest.raises(ValueError, match=f"^{shard}: has 1,000 bytes, of .* in the manifest; run"):
        data.latents_source(copy)
    shard.unlink()
    with pytest.raises(ValueError, match=f"^{shard}: is missing, of .*{copy} again, which makes"):
        data.latents_source(copy)


def test_a_flipped_bit_is_noticed_when_it_is_read(copy):
    shard = copy / "latents-00001-of-00003.array_record"
    content = bytearray(shard.read_bytes())
    content[content.index(records()[5, 0].tobytes()) + 30] ^= 1
    shard.write_bytes(content)
    source = data.latents_source(copy)
    with pytest.raises(ValueError, match=rf"^{shard}: record 2 is damaged; run the mdt encode"):
        source[5]


def test_a_folder_that_is_no_finished_cache_is_refused(copy, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for change, message in (
        (lambda: None, "empty: holds no manifest.json; data.path must name"),
        (lambda: (empty / "latents.npy").touch(), "holds latents.npy, which data.name 'npy' reads"),
        (
            lambda: (empty / "encoding.json").touch(),
            "is not finished; run the mdt encode-latents",
        ),
        (lambda: empty.rename(tmp_path / "gone"), "empty: no such folder; data.path must name one"),
    ):
        change()
        with pytest.raises(FileNotFoundError, match=message):
            data.latents_source(empty)
    damage_manifest(copy, version=0)
    with pytest.raises(ValueError, match="manifest.json: is of version 0, this program reads 1"):
        data.latents_source(copy)


def test_a_record_of_another_image_is_named(tmp_path):
    for key, place, value, said in (
        ("index", (5, 0), 6, "image 6, label 2, and should be of image 5"),
        ("index", (5, 1), 4, "mirrored image 4, label 2, and should be of mirrored image 5"),
        ("mirrored", (5, 1), 0, "image 5, label 2, and should be of mirrored image 5"),
        ("label", (5, 0), 3, "image 5, label 3, and should be of image 5, label 0 to 2"),
    ):
        rows = records()
        rows[key][place] = value
        cache = data.latents_source(write(tmp_path / f"{key}{place[1]}", rows=rows)).records
        shard = cache.folder / "latents-00001-of-00003.array_record"
        message = f"^{shard}: record {2 + place[1]} says that it is of {said}.*; remove the file, "
        mirror = np.array([False, bool(place[1])])
        cache.read_posteriors(np.array([4, 5]), ~mirror)  # all but that one
        with pytest.raises(ValueError, match=message):
            cache.read_posteriors(np.array([4, 5]), mirror)


def test_images_that_were_left_out_change_which_record_is_whose(tmp_path):
    rows = records()
    latent_writing.begin_cache(tmp_path, DESCRIPTION)
    for shard, kept in enumerate(([0, 2, 3], [4, 7], [8, 9, 10])):
        latent_writing.write_shard(tmp_path, DESCRIPTION, shard, [rows[kept].reshape(-1)])
    assert latent_writing.finish_cache(tmp_path, DESCRIPTION)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [shard["left_out"] for shard in manifest["shards"]] == [[1], [5, 6], []]
    assert manifest["left_out"] == 3
    source = data.latents_source(tmp_path)
    found = [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]
    assert found == [0, 2, 3, 4, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds a list, not an object"),
        ("{", "is no JSON: Expecting property name"),
        ("{'shards': None}", "'NoneType' object is not iterable"),
        ("{'shards': [{'file': 'a'}]}", "lacks 'bytes'"),
        ("{'num_images': 99}", "3 shards, which are not those of its images"),
        ("{'images_per_shard': 0}", "division"),
        ("{'num_images': 10**11}", "3 shards, which are not those of its images"),
        ("{'num_images': 10**400}", "3 shards|Exceeds the limit"),
        ("{'latent_shape': [10**4, 10**4, 2]}", "records of .* bytes, more than its shards have"),
        ("{'latent_shape': [10**9] * 3}", "invalid|large|big|exceed"),
        ("{'latent_shape': [4, 4]}", r"latent_shape is \[4, 4\]"),
        ("{'class_names': 'cat'}", "class_names is cat"),
        ("{'class_names': [1, 2, 3]}", "class_names is"),
        ("{'mirror': 'no'}", "mirror is no"),
        ("{'shards': [{'file': 'a', 'bytes': '9', 'records': 1, 'sha256': ''}]}", "no entry of a"),
        ("[" * 10**5, "is no JSON: maximum recursion depth"),
        ("{'dtype': 'int8'}", "lacks 'int8'"),
        *(("-" + key, f"lacks '{key}'") for key in ("scale", "shards", "class_names", "mirror")),
    ],
)
def test_a_manifest_that_was_changed_is_refused_in_one_line(copy, content, said):
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    if content.startswith("{'"):
        content = json.dumps(manifest | eval(content))
    elif content.startswith("-"):
        del manifest[content[1:]]
        content = json.dumps(manifest)
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"^{file}: is damaged \(.*{said}.*\); restore") as error:
        data.latents_source(copy)
    assert "\n" not in str(error.value)


def test_a_manifest_from_before_sources_had_digests_is_read_and_gone_on_with(copy):
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    for part in (manifest, *manifest["shards"]):
        for key in ("source_digest", "left_out"):
            part.pop(key, None)
    file.write_text(json.dumps(manifest))
    assert len(data.latents_source(copy)) == COUNT
    latent_writing.begin_cache(copy, dataclasses.replace(DESCRIPTION, source_digest="12ab"))


# Several processes


HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "a") as file:
    fcntl.lockf(file, fcntl.LOCK_EX, 1, 1)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_shard_that_another_process_holds_is_refused_until_that_one_has_died(tmp_path):
    latent_writing.begin_cache(tmp_path, DESCRIPTION)
    shard = tmp_path / DESCRIPTION.shard_name(1)
    left, other = (tmp_path / f".{DESCRIPTION.shard_name(k)}.12ab.partial" for k in (1, 2))
    left.touch(), other.touch()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / latent_writing.CLAIMS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with (
            pytest.raises(FileExistsError, match=f"^{shard}: another process is to encode it"),
            latent_writing.claim_shards(tmp_path, DESCRIPTION, range(3)),
        ):
            pass
        with latent_writing.claim_shards(tmp_path, DESCRIPTION, [0]):
            pass
        assert left.exists() and (tmp_path / latent_writing.CLAIMS).exists()
        holder.kill()
    with latent_writing.claim_shards(tmp_path, DESCRIPTION, [1]):
        assert not left.exists() and other.exists()
    assert not (tmp_path / latent_writing.CLAIMS).exists()


def test_where_a_file_system_has_no_locks_nothing_is_claimed(copy, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(latent_writing.fcntl, "lockf", refuse)
    whole = {file.name: file.read_bytes() for file in copy.iterdir()}
    latent_writing.begin_cache(copy, DESCRIPTION)
    with latent_writing.claim_shards(copy, DESCRIPTION, range(3)):
        assert latent_writing.unfinished_shards(copy, DESCRIPTION, range(3)) == []
    assert latent_writing.finish_cache(copy, DESCRIPTION)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == whole


def test_a_manifest_is_set_aside_as_soon_as_a_shard_is_found_damaged(copy):
    whole = {file.name: file.read_bytes() for file in copy.iterdir()}
    shard = copy / DESCRIPTION.shard_name(1)
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert latent_writing.unfinished_shards(copy, DESCRIPTION, [0, 2]) == []
    assert data.latents_source(copy)
    assert latent_writing.unfinished_shards(copy, DESCRIPTION, [1]) == [1]
    with pytest.raises(FileNotFoundError, match="is not finished; run the mdt encode-latents"):
        data.latents_source(copy)
    assert not latent_writing.finish_cache(copy, DESCRIPTION)  # as another process would, meanwhile
    assert latent_writing.unfinished_shards(copy, DESCRIPTION, range(3)) == [1]
    latent_writing.write_shard(copy, DESCRIPTION, 1, [records()[4:8].reshape(-1)])
    assert latent_writing.finish_cache(copy, DESCRIPTION)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == whole


def test_a_folder_that_is_removed_meanwhile_is_noticed_at_the_next_shard(tmp_path):
    folder = tmp_path / "latents"
    latent_writing.begin_cache(folder, DESCRIPTION)
    latent_writing.write_shard(folder, DESCRIPTION, 1, [records()[4:8].reshape(-1)])
    shutil.rmtree(folder)
    with pytest.raises(
        OSError, match="was removed while its latents were encoded, .* begins again"
    ):
        latent_writing.write_shard(folder, DESCRIPTION, 0, [records()[:4].reshape(-1)])
    assert not folder.exists()


def test_the_room_that_is_needed_is_that_of_all_processes(tmp_path):
    latent_writing.begin_cache(tmp_path, DESCRIPTION)
    sizes = [DESCRIPTION.shard_bytes(shard) for shard in range(3)]
    assert latent_writing.bytes_to_come(tmp_path, DESCRIPTION, [0]) == sum(sizes)
    latent_writing.write_shard(tmp_path, DESCRIPTION, 1, [records()[4:8].reshape(-1)])
    assert latent_writing.bytes_to_come(tmp_path, DESCRIPTION, [0]) == sizes[0] + sizes[2]
    assert latent_writing.bytes_to_come(tmp_path, DESCRIPTION, [0, 1]) == sum(sizes)
    (tmp_path / f".{DESCRIPTION.shard_name(2)}.12ab.partial").write_bytes(b"x" * 100)
    assert latent_writing.bytes_to_come(tmp_path, DESCRIPTION, [0]) == sizes[0] + sizes[2] - 100


FEW_FILES = """
import os, resource, sys
import numpy as np
from mdt_jax import data

cache = data.latents_source(sys.argv[1]).records
open_files = lambda: len(os.listdir("/proc/self/fd"))
limit = open_files() + 14
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
before, images = open_files(), np.arange(40).repeat(2)
cache = data.latents_source(sys.argv[1]).records
for _ in range(2):
    posteriors, _ = cache.read_posteriors(images)
    assert posteriors[:, 0, 0, 0].tolist() == images.tolist()
print("open", open_files() - before <= limit // 2)
others = [open(os.devnull) for _ in range(limit - open_files() - 1)]  # but for one shard
assert cache.read_posteriors(images)[0][:, 0, 0, 0].tolist() == images.tolist()
cache = data.latents_source(sys.argv[1]).records
others.append(open(os.devnull))
while True:
    try:
        others.append(open(os.devnull))
    except OSError:
        break
try:
    cache.read_posteriors(images)
except OSError as error:
    print(error)
"""


def test_more_shards_are_read_than_files_may_be_open(tmp_path):
    description = dataclasses.replace(DESCRIPTION, num_images=40, images_per_shard=1)
    write(tmp_path / "latents", description)
    command = [sys.executable, "-c", FEW_FILES, str(tmp_path / "latents")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    first, error = done.stdout.splitlines() or [done.stderr, ""]
    assert first == "open True", done.stdout + done.stderr
    assert "this process has too many files open; allow more with `ulimit -n`, now" in error
    assert "latents-00000-of-00040" in error


def test_a_cache_says_what_its_latents_are(copy):
    assert data.latents_source(copy).latent_space == LatentSpace(
        channels=2, stride=2, autoencoder="mse", digest="0" * 64
    )
    damage_manifest(copy, scale=0.13025, shift=0.5, vae="sdxl", version=2)
    space = data.latents_source(copy).latent_space
    assert (space.scale, space.shift, space.autoencoder) == (0.13025, 0.5, "sdxl")


def test_a_channel_that_is_the_same_everywhere_cannot_be_normalised(tmp_path):
    description = dataclasses.replace(DESCRIPTION, normalize="channel")
    rows = records(description)
    rows["posterior"][..., 1::2] = 0  # the mean and the spread of channel 1
    with pytest.raises(ValueError, match="channel 1 of the latents has the standard deviation 0"):
        write(tmp_path / "latents", description, rows)


def test_a_cache_begun_before_there_were_shifts_goes_on(tmp_path):
    folder = tmp_path / "latents"
    latent_writing.begin_cache(folder, DESCRIPTION)
    file = folder / latent_cache.ENCODING
    begun = json.loads(file.read_text())
    for key in latent_cache.description_defaults().keys() - {"source_digest"}:
        del begun[key]
    file.write_text(json.dumps(begun))
    assert data.latents_source(write(folder)).latent_space == DESCRIPTION.latent_space


def test_npy_latents_are_stable_diffusions_unless_a_file_says_more(tmp_path):
    np.save(tmp_path / "latents.npy", np.zeros((2, 4, 4, 8), np.float32))
    assert data.npy_directory(tmp_path).latent_space == LatentSpace(stride=0)
    (tmp_path / "latents.json").write_text('{"scale": 0.5, "stride": 16}')
    assert data.npy_directory(tmp_path).latent_space == LatentSpace(stride=16, scale=0.5)
    for text, message in (
        ("[1]", "latents.json"),
        ("{", "latents.json"),
        ('{"scale": -1}', "scale is -1.0; it must be a number above 0; mend it, or remove it"),
        ('{"channels": 16}', "describes latents of 16 channels, beside latents of 4 channels"),
    ):
        (tmp_path / "latents.json").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            data.npy_directory(tmp_path)
        assert "\n" not in str(error.value)


def test_settings_that_latents_have_no_use_for_are_refused(folder, tmp_path):
    np.save(tmp_path / "latents.npy", np.ones((2, 4, 4, 4), np.float16))
    for config, message in (
        ({"name": "latents", "crop": "random"}, f"data.crop is 'random', but {folder} holds laten"),
        ({"name": "npy", "crop": "random"}, "data.crop is 'random', but .* when they were encoded"),
        ({"name": "latents", "labels": "none"}, "data.labels is 'none', but data.name 'latents' h"),
        ({"name": "digits", "class_order": "numeric"}, "data.class_order is 'numeric', but data.n"),
    ):
        path = str(folder if config["name"] == "latents" else tmp_path)
        with pytest.raises(ValueError, match=f"^{message}"):
            data.create_source(ml_collections.ConfigDict({"path": path} | config))


def test_a_folder_below_the_users_home_is_found(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    np.save(copy.parent / "images.npy", np.zeros((1, 2, 2, 3), np.uint8))
    assert data.latents_source("~/latents").name == str(copy)
    assert data.npy_directory("~").name == str(copy.parent)


# What tells sources apart


def test_the_identity_of_a_cache_is_that_of_its_bytes_and_encoder(folder, copy, tmp_path):
    identity = data.latents_source(folder).identity()
    assert data.latents_source(copy).identity() == identity  # of another place
    assert identity["examples"] == "11" and identity["classes"].startswith("3 (")
    assert identity["autoencoder"] == "0" * 16
    rows = records()
    rows["posterior"][0, 0, 0, 0, 0] += 1
    other = data.latents_source(write(tmp_path / "other", rows=rows)).identity()
    assert {key for key in identity if identity[key] != other[key]} == {"records"}


def test_the_identity_of_arrays_is_that_of_images_labels_and_names(tmp_path):
    pixels, labels = np.zeros((4, 2, 2, 3), np.uint8), np.array([0, 1, 1, 0])
    identity = data.arrays(pixels, labels, ("a", "b")).identity()
    others = {
        "records": data.arrays(pixels, 1 - labels, ("a", "b")),
        "classes": data.arrays(pixels, labels, ("b", "a")),
    }
    for key, source in others.items():
        changed = {name for name, value in source.identity().items() if value != identity[name]}
        assert changed == {key}
    assert data.arrays(pixels + 1, labels).identity()["records"] != identity["records"]
    np.save(tmp_path / "images.npy", pixels), np.save(tmp_path / "labels.npy", labels)
    assert data.npy_directory(tmp_path).identity()["records"] == identity["records"]
    assert max(map(len, identity.values())) <= 24


# Training on a cache, and on the images with the encoder in the step

BATCH, SIDE = 8, 16


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    """Small and random, of posteriors as wide as their means."""
    module = AutoencoderKL(block_widths=(8, 8), layers_per_block=1, norm_groups=4)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes["params"]
    )
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    return Autoencoder(module, params, LatentSpace(autoencoder="small"), mesh)


def encode_cache(pixels: np.ndarray, autoencoder: Autoencoder, folder: Path) -> data.Source:
    """The cache of images, and of their mirror images, as the tool makes it."""
    side = SIDE // autoencoder.module.downsampling
    description = dataclasses.replace(
        DESCRIPTION, num_images=len(pixels), dtype="float32", latent_shape=(side, side, 4),
        class_names=tuple("0123456789"), images_per_shard=6,
    )  # fmt: skip
    rows = np.zeros((len(pixels), 2), description.record_type)
    rows["index"] = np.arange(len(pixels))[:, None]
    rows["label"], rows["mirrored"][:, 1] = rows["index"] % 10, 1
    for k, version in enumerate((pixels, pixels[:, :, ::-1])):
        moments = autoencoder.encode(data.to_unit_range(version), batch_size=len(pixels))
        rows["posterior"][:, k] = np.concatenate(moments, axis=-1)
    latent_writing.begin_cache(folder, description)
    for shard in range(description.num_shards):
        images = description.shard_images(shard)
        part = rows[images.start : images.stop].reshape(-1)
        latent_writing.write_shard(folder, description, shard, [part])
    assert latent_writing.finish_cache(folder, description)
    return data.latents_source(folder)


def test_training_on_latents_is_training_on_images_encoded_in_the_step(autoencoder, tmp_path):
    r = reference("dit")
    trainer = make_trainer("dit")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, SIDE, SIDE, 3), np.uint8)
    images = data.arrays(pixels, np.arange(20) % 10)
    latents = encode_cache(pixels, autoencoder, tmp_path / "latents")
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32), r.tree("param/")
    )
    shape = (BATCH, *trainer.model.image_shape)

    of_posteriors = make_trainer("dit", examples=latents.kind)

    @jax.jit
    def on_posteriors(state, batch):
        return of_posteriors.step(state, batch, num_kept=None)[1]

    @jax.jit
    def encoding_in_the_step(state, batch):
        zeros, ones = jnp.zeros(shape), jnp.ones(shape)
        noise = draw_latents(trainer.seed, state.step, jnp.concatenate([zeros, ones], axis=-1))
        pixels = batch["image"]
        if pixels.dtype == jnp.uint8:
            pixels = pixels / 127.5 - 1
        mean, std = _encode(autoencoder.module, autoencoder.params, pixels)
        z = mean * STABLE_DIFFUSION_SCALE + std * noise
        return trainer.step(state, batch | {"image": z}, num_kept=None)[1]

    settings = {"global_batch_size": BATCH, "seed": 5, "process_index": 0, "process_count": 1}
    with (
        data.create_batches(images, flip=True, **settings) as pictures,
        data.create_batches(latents, flip=True, **settings) as posteriors,
    ):
        for step in range(3):
            state = start(trainer, params).replace(step=jnp.int32(step))
            expected = encoding_in_the_step(state, next(pictures))
            got = on_posteriors(state, next(posteriors))
            for name in ("loss", "grad_norm"):
                np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)
