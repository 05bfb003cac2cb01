"""Latent caches as the pipeline reads them, and that training on one is training on its images."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from fixtures import make_trainer, reference, start

from mdt_jax import data, sharding
from mdt_jax.data import latent_cache
from mdt_jax.latents import Autoencoder, _encode
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.train_step import draw_latents

COUNT = 11
DESCRIPTION = latent_cache.Description(
    source="pictures", num_images=COUNT, class_names=("cat", "dog", "emu"), image_size=8,
    vae="mse", vae_digest="0" * 64, scale=data.LATENT_SCALE, compute_dtype="float32",
    latent_shape=(4, 4, 2), dtype="float16", mirror=True, images_per_shard=4,
)  # fmt: skip


def records(description=DESCRIPTION) -> np.ndarray:
    """Image i's posterior is i everywhere, its mirror image's 100 + i."""
    rows = np.zeros((description.num_images, 2), description.record_type)
    numbers = np.arange(description.num_images)[:, None]
    rows["index"], rows["label"], rows["mirrored"][:, 1] = numbers, numbers % 3, 1
    rows["posterior"][:] = (numbers + [0, 100])[..., None, None, None]
    return rows[:, : 1 + description.mirror]


def write(folder: Path, description=DESCRIPTION) -> Path:
    latent_cache.begin(folder, description)
    rows = records(description)
    for shard in range(description.num_shards):
        images = description.shard_images(shard)
        shard_rows = rows[images.start : images.stop].reshape(-1)
        latent_cache.write_shard(folder, description, shard, [shard_rows[:3], shard_rows[3:]])
    assert latent_cache.finish(folder, description)
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
    mirrored = first_batch(data.arrays(pixels))["image"][:, 0, 0, 0] == 1
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
    with pytest.raises(ValueError, match=rf"^{shard}: record 2 is damaged; run the tools/encode"):
        source[5]


def test_a_folder_that_is_no_finished_cache_is_refused(copy, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for change, message in (
        (lambda: None, "empty: holds no manifest.json; data.path must name"),
        (lambda: (empty / "latents.npy").touch(), "holds latents.npy, which data.name 'npy' reads"),
        (
            lambda: (empty / "encoding.json").touch(),
            "is not finished; run the tools/encode_latents",
        ),
        (lambda: empty.rename(tmp_path / "gone"), "empty: no such folder; data.path must name one"),
    ):
        change()
        with pytest.raises(FileNotFoundError, match=message):
            data.latents_source(empty)
    damage_manifest(copy, version=0)
    with pytest.raises(ValueError, match="manifest.json: is of version 0, this program reads 1"):
        data.latents_source(copy)


def test_latents_of_another_scale_are_refused_naming_both(copy):
    damage_manifest(copy, scale=0.13025, vae="sdxl")
    with pytest.raises(ValueError, match=r"autoencoder sdxl, whose scale is 0.13025; .* by 0.1821"):
        data.latents_source(copy)


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
    return Autoencoder(module, params, data.LATENT_SCALE, 0.0, "small", mesh)


def encode_cache(pixels: np.ndarray, autoencoder: Autoencoder, folder: Path) -> data.Source:
    """The cache of images, and of their mirror images, as the tool makes it."""
    side = SIDE // autoencoder.module.downsampling
    description = dataclasses.replace(
        DESCRIPTION, num_images=len(pixels), dtype="float32", latent_shape=(side, side, 4),
        class_names=tuple("0123456789"), images_per_shard=6,
    )  # fmt: skip
    rows = np.zeros((len(pixels), 2), description.record_type)
    rows["label"] = (np.arange(len(pixels)) % 10)[:, None]
    for k, version in enumerate((pixels, pixels[:, :, ::-1])):
        moments = autoencoder.encode(data.to_unit_range(version), batch_size=len(pixels))
        rows["posterior"][:, k] = np.concatenate(moments, axis=-1)
    latent_cache.begin(folder, description)
    for shard in range(description.num_shards):
        images = description.shard_images(shard)
        part = rows[images.start : images.stop].reshape(-1)
        latent_cache.write_shard(folder, description, shard, [part])
    assert latent_cache.finish(folder, description)
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

    @jax.jit
    def on_posteriors(state, batch):
        return trainer.step(state, batch, num_kept=None)[1]

    @jax.jit
    def encoding_in_the_step(state, batch):
        zeros, ones = jnp.zeros(shape), jnp.ones(shape)
        noise = draw_latents(trainer.seed, state.step, jnp.concatenate([zeros, ones], axis=-1))
        mean, std = _encode(autoencoder.module, autoencoder.params, batch["image"])
        z = mean * data.LATENT_SCALE + std * noise
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
