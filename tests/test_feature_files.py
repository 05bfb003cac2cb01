"""fast-DiT's features: read as posteriors without spread, from which the step makes them again."""

from __future__ import annotations

import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mdt_jax import data
from mdt_jax.data.missing import MissingData
from mdt_jax.models.latent_space import STABLE_DIFFUSION_SCALE
from mdt_jax.training.step import draw_latents

COUNT, SHAPE = 12, (4, 8, 8)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve features as `extract_features.py` writes them, and what their labels are."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        x = rng.normal(size=(1, *SHAPE)).astype(np.float32)
        save(tmp_path / "imagenet256_features" / f"{i}.npy", x)
        save(tmp_path / "imagenet256_labels" / f"{i}.npy", np.array([i % 3]))
    return tmp_path


def stored(folder: Path, i: int) -> np.ndarray:
    """Feature i, channels last."""
    return np.moveaxis(np.load(folder / "imagenet256_features" / f"{i}.npy")[0], 0, -1)


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """How many float32 numbers lie between two arrays, at most."""
    lines = [np.where((i := x.view(np.int32)) < 0, np.int32(-(2**31)) - i, i) for x in (a, b)]
    return int(np.abs(lines[0].astype(np.int64) - lines[1]).max())


def test_features_are_a_source_of_posteriors_in_the_order_of_their_numbers(folder):
    source = data.create_source(ConfigDict({"name": "npy", "path": str(folder)}))
    assert source.kind is data.ExampleKind.POSTERIORS and source.image_shape == (8, 8, 4)
    assert len(source) == COUNT and source.class_names == ("0", "1", "2")
    assert "fast-DiT's features" in source.describe()
    for i in range(COUNT):  # 10.npy after 9.npy
        example = source[i]
        assert example["label"] == i % 3 and example["image"].dtype == np.float32
        np.testing.assert_array_equal(
            example["image"][..., :4], stored(folder, i) / np.float32(STABLE_DIFFUSION_SCALE)
        )
        assert not example["image"][..., 4:].any()


def test_a_step_makes_the_features_again_within_one_unit_in_the_last_place(folder):
    source = data.npy_directory(folder)
    posteriors = jnp.asarray(np.stack([source[i]["image"] for i in range(COUNT)]))
    made = np.asarray(jax.jit(draw_latents, static_argnums=0)(0, jnp.int32(3), posteriors))
    assert ulps(made, np.stack([stored(folder, i) for i in range(COUNT)])) <= 1


def test_dividing_by_the_scale_and_multiplying_moves_any_number_by_one_unit_at_most():
    scale = np.float32(STABLE_DIFFUSION_SCALE)
    mantissas = np.arange(2**23, 2**24, dtype=np.float32)  # every float32 but for its exponent
    assert ulps(mantissas / scale * scale, mantissas) == 1


def test_flipping_mirrors_half_of_the_latents_and_not_flipping_none(folder):
    source = data.npy_directory(folder)
    plain, flipped = (data.ExampleStream(source, 1, flip=f).block(0, COUNT) for f in (False, True))
    np.testing.assert_array_equal(plain["label"], flipped["label"])
    mirrored = 0
    for one, other in zip(plain["image"], flipped["image"], strict=True):
        same = np.array_equal(one, other)
        assert same or np.array_equal(one[:, ::-1], other)
        mirrored += not same
    assert 2 < mirrored < COUNT - 2


def test_they_travel_to_workers_have_names_and_an_identity(folder):
    (folder / "class_names.txt").write_text("a\nb\nc\nd\n")
    source = data.npy_directory(folder)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[7]["image"], source[7]["image"])
    assert source.class_names == tuple("abcd")
    identity = source.identity()
    assert identity["records"] and identity == again.identity()
    save(folder / "imagenet256_labels" / "0.npy", np.array([1]))
    assert data.npy_directory(folder).identity()["records"] != identity["records"]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_names_sizes_and_types_will_do(tmp_path, dtype):
    x = np.random.default_rng(0).normal(size=(1, 4, 64, 64)).astype(dtype)
    save(tmp_path / "imagenet512_features" / "3.npy", x)
    save(tmp_path / "imagenet512_labels" / "3.npy", np.int64(5))
    source = data.npy_directory(tmp_path)
    assert source.image_shape == (64, 64, 4) and source[0]["label"] == 5


def change(name: str, array):
    def apply(folder: Path) -> None:
        file = folder / name
        if array is None:
            file.unlink()
        elif isinstance(array, bytes):
            file.write_bytes(array)
        else:
            np.save(file, array)

    return apply


F, L = "imagenet256_features", "imagenet256_labels"
WRONG = {
    "no label": (change(f"{L}/4.npy", None), f"{F}/4.npy: has no {L}/4.npy beside it"),
    "no latent": (change(f"{F}/4.npy", None), f"{L}/4.npy: has no {F}/4.npy beside it"),
    "two labels": (change(f"{L}/4.npy", np.zeros(2, int)), "4.npy: holds int64"),
    "a negative label": (change(f"{L}/4.npy", np.array([-1])), "4.npy: holds int64"),
    "a label of float": (change(f"{L}/4.npy", np.array([1.0])), "4.npy: holds float64"),
    "a huge label": (change(f"{L}/4.npy", np.array([2**40])), "label 1099511627776; without"),
    "a label that is cut off": (change(f"{L}/4.npy", b"\x93NUMPY\x01\x00v"), "4.npy: is damaged"),
    "a folder of latents": (change(f"{F}/0.npy", np.zeros((4, 8, 8), "f4")), r"shape \(4, 8, 8\)"),
    "several a file": (change(f"{F}/0.npy", np.zeros((2, 4, 8, 8), "f4")), r"shape \(2, 4, 8, 8"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_features_that_do_not_fit_are_refused_when_they_are_opened(folder, wrong):
    apply, message = WRONG[wrong]
    apply(folder)
    with pytest.raises(ValueError, match=message) as caught:
        data.npy_directory(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not isinstance(caught.value, MissingData)


NAN = np.full((1, *SHAPE), np.nan, np.float32)
UNREADABLE = {
    "of another shape": (np.zeros((1, 4, 4, 4), "f4"), r"4.npy: holds float32 \(1, 4, 4, 4\)"),
    "of integers": (np.zeros((1, *SHAPE), int), "4.npy: holds int64"),
    "cut off": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", "4.npy: is damaged"),
    "objects": (np.array([None]), "4.npy: is damaged .*pickled Python objects"),
    "NaN": (NAN, "4.npy: the mean of its latent is nan in row 0, column 0, channel 0"),
}


@pytest.mark.parametrize("wrong", UNREADABLE)
def test_a_latent_that_cannot_be_used_is_named_when_it_is_read(folder, wrong):
    array, message = UNREADABLE[wrong]
    change(f"{F}/4.npy", array)(folder)
    stream = data.ExampleStream(data.npy_directory(folder), 0)
    with pytest.raises(ValueError, match=message):
        stream.block(0, COUNT)


def test_features_without_labels_or_of_two_kinds_are_not_guessed(folder):
    (folder / L).rename(folder / "labels")
    with pytest.raises(
        MissingData, match="or with fast-DiT's imagenet256_features and imagenet256"
    ):
        data.npy_directory(folder)
    (folder / "labels").rename(folder / L)
    for kind in ("features", "labels"):
        (folder / f"other_{kind}").mkdir()
    with pytest.raises(ValueError, match="holds imagenet256_features, other_features; keep one"):
        data.npy_directory(folder)
