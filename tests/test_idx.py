"""IDX files against their header, and Fashion-MNIST made of them."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import fashion
from mdt_jax import config as config_lib
from mdt_jax import data
from mdt_jax.data import idx

CODES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}


def encode(array: np.ndarray, dtype: str = "u1") -> bytes:
    """An IDX file, written down from the format's description."""
    head = bytes([0, 0, CODES[dtype], array.ndim])
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(dtype).tobytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("name", ["plain", "packed.gz"])
def test_an_array_comes_back_in_every_type(tmp_path, dtype, name):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    found = idx.read_idx(write(tmp_path / name, encode(array, dtype)))
    assert found.dtype.isnative and found.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, array)


GOOD = encode(np.arange(12).reshape(3, 4))
DAMAGED = {
    "nothing": (b"", "is no IDX file: it starts with b''"),
    "another file": (b"\x89PNG\r\n", "is no IDX file"),
    "an unknown type": (b"\0\0\x07" + GOOD[3:], "is no IDX file"),
    "no axes": (b"\0\0\x08\0", "is no IDX file"),
    "cut off in its header": (GOOD[:9], "cut off in its header of 2 axes"),
    "cut off": (GOOD[:-1], "says 3 × 4 of uint8, 12 bytes, and it holds only 11|too small to hold"),
    "too long": (GOOD + b"\0", "12 bytes, and it holds more"),
    "a huge header": (
        b"\0\0\x08\3" + struct.pack(">3I", *[2**32 - 1] * 3),
        "which the file is too small to hold",
    ),
}


@pytest.mark.parametrize("name", ["file", "file.gz"])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named_in_one_line(tmp_path, case, name):
    content, message = DAMAGED[case]
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        idx.read_idx(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_damaged_gzip_is_named(tmp_path):
    packed = gzip.compress(encode(np.arange(4000).reshape(2, 2000)))
    for k, content in enumerate((packed[:-9], packed[:-8] + bytes(4) + packed[-4:])):
        path = tmp_path / f"{k}.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is cut off or damaged") as error:
            idx.read_idx(path)
        assert "\n" not in str(error.value)


def test_a_gzip_bomb_is_refused_after_what_its_header_says(tmp_path):
    bomb = encode(np.zeros((10, 28, 28))) + bytes(1 << 28)
    path = write(tmp_path / "bomb.gz", bomb)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="7,840 bytes, and it holds more"):
        idx.read_idx(path)


def save_fashion(folder: Path, count: int = 20, **changes: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    parts = {
        "images-idx3": rng.integers(0, 256, (count, 28, 28)),
        "labels-idx1": np.arange(count) % 10,
    }
    for what, array in (parts | changes).items():
        for split in ("train", "t10k"):
            write(folder / f"{split}-{what}-ubyte.gz", encode(array))
    return folder


def test_a_configuration_names_fashion_mnist(tmp_path):
    save_fashion(tmp_path)
    settings = {"name": "fashion_mnist", "path": str(tmp_path), "split": "test"}
    source = data.create_source(ConfigDict(settings))
    images = idx.read_idx(tmp_path / "t10k-images-idx3-ubyte.gz")
    example = source[13]
    assert source.image_shape == (32, 32, 1) and source.class_names[3] == "Dress"
    assert int(example["label"]) == 3 and source.name == "fashion_mnist/test"
    np.testing.assert_array_equal(example["image"][2:30, 2:30, 0], images[13])
    assert example["image"].sum() == images[13].sum()  # a black border


WRONG = {
    "swapped": (
        {"images-idx3": np.arange(20) % 10, "labels-idx1": np.zeros((20, 28, 28))},
        "holds 20 of uint8, not images of 28 × 28 bytes; are images and labels swapped",
    ),
    "another size": ({"images-idx3": np.zeros((20, 32, 32))}, "holds 20 × 32 × 32 of uint8, not"),
    "fewer labels": ({"labels-idx1": np.zeros(19)}, "not a label for each of the 20 images"),
    "a label too large": (
        {"labels-idx1": np.array([0] * 7 + [10] + [0] * 12)},
        "label 10 of image 7; there are ten classes",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_not_fashion_mnists_are_named(tmp_path, case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        idx.fashion_mnist(save_fashion(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_missing_file_says_both_ways_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist") as error:
        idx.fashion_mnist(tmp_path)
    assert "https://github.com/zalandoresearch/fashion-mnist" in str(error.value)
    with pytest.raises(ValueError, match="data.split is 'heldout'; fashion_mnist has 'train' or"):
        idx.fashion_mnist(tmp_path, "heldout")


@pytest.mark.parametrize("model", ["MDTv2", "MDT", "DiT"])
@pytest.mark.parametrize("patch", [4, 2])
def test_the_config_has_64_or_256_tokens_and_one_size(model, patch):
    config = fashion.get_config(model)
    config.model.patch_size = patch
    network = config_lib.create_network(config)
    assert network.num_tokens == (32 // patch) ** 2
    assert (network.hidden_size, network.depth) == (96, 6)
    assert math.isclose(config.optimizer.learning_rate, 1e-3)
