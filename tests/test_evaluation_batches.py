"""Reading images to judge: every layout, in parts, and a clear line for each kind of bad input."""

import io
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fake_extractor import random_images
from PIL import Image

from mdt_jax.evaluation import batches


def save_npz(path, images, labels=None, compressed=False):
    arrays = {"arr_0": images} | ({} if labels is None else {"arr_1": labels})
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def save_folder(path, images):
    path.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(path / f"{index:06d}.png")
    return path


def everything(images, batch_size=4):
    return np.concatenate(list(images.read(0, images.count, batch_size)))


@pytest.fixture(scope="module")
def pictures():
    return random_images(11, 0)


@pytest.fixture(params=["npz", "compressed npz", "folder", "two npz", "folder of npz", "array"])
def opened(request, pictures, tmp_path):
    if request.param == "array":
        return batches.ArrayImages(pictures)
    if request.param == "folder":
        return batches.open_images(save_folder(tmp_path / "images", pictures))
    if request.param[-3:] == "npz" and "two" not in request.param and "of" not in request.param:
        compressed = "compressed" in request.param
        return batches.open_images(
            save_npz(tmp_path / "s.npz", pictures, np.arange(11), compressed)
        )
    parts = [
        save_npz(tmp_path / f"{k}.npz", part, np.arange(len(part)))
        for k, part in enumerate((pictures[:6], pictures[6:]))
    ]
    return batches.open_images(tmp_path if "folder" in request.param else ",".join(map(str, parts)))


def test_every_layout_gives_the_images_in_order(opened, pictures):
    assert opened.count == 11
    np.testing.assert_array_equal(everything(opened), pictures)
    assert max(len(batch) for batch in opened.read(0, 11, 4)) <= 4


def test_every_layout_gives_a_part_of_the_images(opened, pictures):
    found = np.concatenate(list(opened.read(5, 9, 3)))
    np.testing.assert_array_equal(found, pictures[5:9])


def test_labels_are_read(tmp_path, pictures):
    path = save_npz(tmp_path / "s.npz", pictures, np.arange(11))
    np.testing.assert_array_equal(batches.open_images(path).labels, np.arange(11))
    other = save_npz(tmp_path / "t.npz", pictures)
    assert batches.open_images(other).labels is None
    assert batches.open_images(f"{path},{other}").labels is None
    np.testing.assert_array_equal(
        batches.open_images(f"{path},{path}").labels, np.tile(np.arange(11), 2)
    )


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_is_never_in_memory_whole(tmp_path, compressed):
    images = np.zeros((400, 64, 64, 3), np.uint8)
    images[::7] = 200
    path = save_npz(tmp_path / "s.npz", images, compressed=compressed)
    opened = batches.open_images(path)
    tracemalloc.start()
    try:
        total = sum(int(batch.sum()) for batch in opened.read(0, opened.count, 8))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == int(images.sum(dtype=np.int64))
    assert peak < images.nbytes / 4


def test_shares_cover_all_images_once():
    shares = [batches.share(11, index, 3) for index in range(3)]
    assert [i for share in shares for i in share] == list(range(11))
    with pytest.raises(ValueError, match="^2 images cannot be shared by 3 processes"):
        batches.share(2, 0, 3)


def refused(place, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        everything(batches.open_images(place))
    assert "\n" not in str(caught.value)


def test_an_npz_without_images_is_refused(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, images=np.zeros(3), more=np.zeros(1))
    refused(path, rf"^{path}: no arr_0; it holds images, more\. ")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.linspace(-1, 1, 96, dtype="f4"),
            r"float32, .* values are -1 to 1; save 127.5·\(x \+ 1",
        ),
        (np.linspace(0, 1, 96, dtype="f8"), "float64, .* values are 0 to 1; save 255·x as uint8"),
        (np.linspace(0, 255, 96, dtype="f4"), "float32, .* values are 0 to 255; save uint8"),
        (np.arange(96, dtype=np.int64), "int64, images must be uint8 in 0 ... 255"),
    ],
)
def test_other_than_uint8_is_refused_with_what_it_seems_to_be(tmp_path, array, message):
    path = save_npz(tmp_path / "s.npz", array.reshape(2, 4, 4, 3))
    refused(path, rf"^{path}: arr_0 is .*{message}")


def test_latents_are_refused_as_such(tmp_path):
    path = save_npz(tmp_path / "s.npz", np.zeros((2, 4, 4, 4), np.float32))
    refused(path, "these are latents of 4 channels; sample with --vae")


def test_other_shapes_and_orders_are_refused(tmp_path):
    path = save_npz(tmp_path / "s.npz", np.zeros((2, 3, 4, 4), np.uint8))
    refused(path, r"arr_0 has the shape \(2, 3, 4, 4\); .* channels last")
    path = save_npz(tmp_path / "f.npz", np.asfortranarray(random_images(2, 0)))
    refused(path, "Fortran order")
    path = save_npz(tmp_path / "l.npz", random_images(2, 0), np.arange(3))
    refused(path, r"arr_1 is int64 \(3,\), which is not a label for each of the 2 images")


def test_damaged_files_are_refused(tmp_path, pictures):
    good = save_npz(tmp_path / "s.npz", pictures).read_bytes()
    path = tmp_path / "damaged.npz"
    path.write_bytes(good[: len(good) // 2])
    refused(path, rf"^{path}: cannot be read as npz .*damaged")
    path.write_bytes(b"no zip at all")
    refused(path, rf"^{path}: cannot be read as npz")
    flipped = bytearray(good)
    flipped[300] ^= 255
    path.write_bytes(flipped)
    refused(path, rf"^{path}: cannot be read as npz \(Bad CRC-32")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, pictures)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-100])
    refused(path, "arr_0 ends 100 bytes early")


def test_missing_files_and_single_images_are_refused(tmp_path, pictures):
    refused(tmp_path / "none.npz", rf"^{tmp_path / 'none.npz'}: no such file; give an npz")
    folder = save_folder(tmp_path / "images", pictures[:1])
    refused(folder / "000000.png", "one image; give a folder of them, or an npz")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", rf"^{tmp_path / 'empty'}: holds no images")


def test_images_of_two_sizes_are_refused(tmp_path, pictures):
    folder = save_folder(tmp_path / "images", pictures)
    Image.fromarray(random_images(1, 0, size=5)[0]).save(folder / "000008.png")
    refused(folder, r"000008.png is 5 × 5 pixels, 000000.png is 4 × 4: all images must be of one")
    one = save_npz(tmp_path / "a.npz", pictures)
    other = save_npz(tmp_path / "b.npz", random_images(2, 0, size=5))
    message = rf"^{re.escape(str(other))} holds images of 5 × 5, .* of 4 × 4"
    refused(f"{one},{other}", message)


def npz_with_header(path: Path, shape: str, descr: str = "'|u1'", data: bytes = bytes(192)) -> Path:
    """An npz whose arr_0 says a shape of one's own."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
        archive.writestr("arr_0.npy", start + header + data)
    return path


@pytest.mark.parametrize(
    ("shape", "descr", "message"),
    [
        ("(-5, 4, 4, 3)", "'|u1'", r"its header says the shape \(-5, 4, 4, 3\)"),
        ("(4, 4, 4, -3)", "'|u1'", r"its header says the shape \(4, 4, 4, -3\)"),
        (f"({10**15}, 4, 4, 3)", "'|u1'", "arr_0 ends 4799.* bytes early"),
        (f"({2**64}, {2**64}, 4, 3)", "'|u1'", "arr_0 ends .* bytes early"),
        ("(3, 4, 4, 3)", "'|u1'", "arr_0 is 48 bytes too long"),
        ("(4.0, 4, 4, 3)", "'|u1'", "shape is not valid"),
        ("(4, 4, 4, 3)", "'|O'", "pickled Python objects"),
        ("(4, 4, 4, 3)", "'nothing'", "descr is not a valid dtype"),
        ("(((((", "'|u1'", "in arr_0"),
    ],
)
def test_a_header_that_says_what_is_not_there_is_refused(tmp_path, shape, descr, message):
    path = npz_with_header(tmp_path / "s.npz", shape, descr)
    refused(path, rf"^{path}: cannot be read as npz .*{message}")


def test_a_header_that_is_right_is_read(tmp_path):
    images = batches.open_images(npz_with_header(tmp_path / "s.npz", "(4, 4, 4, 3)"))
    assert images.count == 4 and batches.image_size(images) == (4, 4)
    assert sum(len(batch) for batch in images.read(0, 4, 3)) == 4
