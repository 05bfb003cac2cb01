"""The command that prepares data sets for TFDS, each read back and compared with Pillow's pixels.

All comparisons are exact: reader and test decode the same bytes with the same Pillow.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from absl import logging
from PIL import Image

from mdt_jax import data
from mdt_jax.checkpoints import read_meta
from mdt_jax.commands import prepare_dataset as tool
from mdt_jax.config import apply_recipe, default_config
from mdt_jax.data import prepare
from mdt_jax.data.decoding import decode_image
from mdt_jax.train import loop


@functools.cache
def tiles() -> list[np.ndarray]:
    """scikit-learn's two photographs, cut into tiles of 40 x 56 pixels."""
    from sklearn.datasets import load_sample_images

    corners = [(y, x) for y in range(0, 400, 40) for x in range(0, 616, 56)]
    photographs = load_sample_images().images
    return [photo[y : y + 40, x : x + 56] for y, x in corners for photo in photographs]


def encode(picture: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(file, kind, **options)
    return file.getvalue()


def cmyk_jpeg() -> bytes:
    return encode(Image.fromarray(tiles()[9]).convert("CMYK"))


def pack(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, contents in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    return file.getvalue()


@functools.cache
def synsets() -> dict[str, dict[str, bytes]]:
    """Three classes, not in the order of their names, with ImageNet's two kinds of odd images."""
    return {
        "n02000000": {f"n02000000_{i}.JPEG": encode(tiles()[i]) for i in range(3)},
        "n01000000": {
            "n01000000_7.JPEG": encode(tiles()[7]),
            "n01000000_8.JPEG": encode(tiles()[8], "PNG"),
            "n01000000_9.JPEG": cmyk_jpeg(),
        },
        "n03000000": {"n03000000_1.JPEG": encode(Image.fromarray(tiles()[4]).convert("L"))},
    }


def write_imagenet(folder: Path) -> Path:
    path = folder / "train.tar"
    path.write_bytes(pack({f"{name}.tar": pack(images) for name, images in synsets().items()}))
    return path


def write_folder(folder: Path) -> Path:
    for name, count in (("cat", 2), ("dog", 3)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.jpg").write_bytes(encode(tiles()[5 * len(name) + i + count]))
    return folder


def write_lmdb(folder: Path, values: Mapping[bytes, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(folder), map_size=2**24) as database,
        database.begin(write=True) as transaction,
    ):
        for key, value in values.items():
            transaction.put(key, value)
    return folder


def write_parquet(path: Path, columns: dict, features: dict | None = None) -> Path:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(columns)
    if features:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    parquet.write_table(table, path)
    return path


def main(data_dir: Path, *arguments) -> None:
    tool.main([*map(str, arguments), "--data_dir", str(data_dir)])


def refuse(capsys, data_dir: Path, *arguments) -> str:
    """The one line that a command ends with, having left nothing."""
    before = sorted(data_dir.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(data_dir, *arguments)
    assert sorted(data_dir.rglob("*")) == before
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert "Traceback" not in capsys.readouterr().err
    return message


def open_source(name: str, data_dir: Path) -> data.Source:
    return data.create_source(ml_collections.ConfigDict({"name": name, "path": str(data_dir)}))


def read_with_tfds(folder: Path, split: str = "train", **options) -> list[dict]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    return list(builder.as_data_source(split, **options))


def stored(folder: Path, split: str = "train") -> list[bytes]:
    import tensorflow_datasets as tfds

    examples = read_with_tfds(folder, split, decoders={"image": tfds.decode.SkipDecoding()})
    return [example["image"] for example in examples]


@pytest.fixture
def data_dir(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """A data folder with the tar of tars, as `synsets`."""
    folder = tmp_path_factory.mktemp("imagenet")
    main(folder, "--imagenet", write_imagenet(folder), "--name", "synsets")
    return folder


# What is written


def test_a_tar_of_tars_gives_its_images_in_order_with_labels_in_the_order_of_synsets(imagenet):
    source = open_source("tfds:synsets", imagenet)
    assert source.class_names == ("n01000000", "n02000000", "n03000000")
    assert source.image_shape == (None, None, 3)
    assert [int(source[i]["label"]) for i in range(len(source))] == [1, 1, 1, 0, 0, 0, 2]
    encoded = [image for images in synsets().values() for image in images.values()]
    for index, image in enumerate(encoded):
        expected = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        np.testing.assert_array_equal(source[index]["image"], expected)


def test_images_and_names_are_what_tfds_itself_reads_without_tensorflow(imagenet):
    examples = read_with_tfds(imagenet / "synsets" / "1.0.0")
    members = {name: image for images in synsets().values() for name, image in images.items()}
    assert [example["file_name"].decode() for example in examples] == list(members)
    for example, image in zip(examples, members.values(), strict=True):
        np.testing.assert_array_equal(example["image"], decode_image(image, "the image"))
    assert "tensorflow" not in sys.modules


def test_images_keep_their_bytes_but_cmyk(imagenet):
    kept = stored(imagenet / "synsets" / "1.0.0")
    given = [image for images in synsets().values() for image in images.values()]
    same = [one == other for one, other in zip(kept, given, strict=True)]
    assert same == [True, True, True, True, True, False, True]


def test_the_summary_says_what_was_made_and_how_to_train_on_it(capsys, data_dir, tmp_path):
    main(data_dir, "--imagenet", write_imagenet(tmp_path), "--split", "validation")
    size = sum(map(len, stored(data_dir / "train" / "1.0.0", "validation")))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{data_dir}/train/1.0.0: examples 7, classes 3, bytes {size:,}, "
        "files 1; re-encoded as PNG 1, left out 0",
        f"train on it with --config.data.name=tfds:train --config.data.path={data_dir} "
        "--config.data.split=validation",
    ]


def test_imagenets_classes_become_tfdss_imagenet2012(capsys, data_dir, tmp_path):
    import tensorflow_datasets as tfds

    defined = tfds.builder_cls("imagenet2012")(data_dir=str(tmp_path)).info.features["label"].names
    image = encode(tiles()[0])
    classes = {f"{name}.tar": pack({f"{name}_1.JPEG": image}) for name in defined}
    (tmp_path / "all.tar").write_bytes(pack(classes))
    main(data_dir, "--imagenet", tmp_path / "all.tar")
    assert "note: ImageNet's training set has 1,281,167 images" in capsys.readouterr().out
    builder = tfds.builder("imagenet2012", data_dir=str(data_dir))
    assert builder.is_prepared()
    last = builder.as_data_source("train")[999]
    assert last["label"] == 999 and last["file_name"].decode() == f"{defined[999]}_1.JPEG"
    assert open_source("tfds:imagenet2012", data_dir).class_names == tuple(defined)


def test_a_folder_is_prepared_as_training_reads_it(data_dir, tmp_path):
    folder = write_folder(tmp_path / "My pets")
    main(data_dir, "--folder", folder)
    source, expected = open_source("tfds:my_pets", data_dir), data.folder_source(folder)
    assert source.class_names == expected.class_names == ("cat", "dog")
    assert len(source) == len(expected) == 5
    for i in range(5):
        assert source[i]["label"] == expected[i]["label"]
        np.testing.assert_array_equal(source[i]["image"], expected[i]["image"])


def test_reading_says_nothing_of_the_module_that_wrote_it(data_dir, tmp_path, caplog):
    """Nor of data sets that were written without one, as before."""
    main(data_dir, "--folder", write_folder(tmp_path / "pets"))
    description = data_dir / "pets" / "1.0.0" / "dataset_info.json"
    about = json.loads(description.read_text())
    assert about["moduleName"] == prepare.__name__
    logger = logging.get_absl_logger()
    filters, propagate = list(logger.filters), logger.propagate
    logger.propagate = True
    with caplog.at_level("INFO", logger=logger.name):
        for module in ({}, {"moduleName": ""}):
            description.write_text(json.dumps(about | module))
            assert len(open_source("tfds:pets", data_dir)) == 5
        logger.info("the level lets this through")
    logger.propagate = propagate
    assert logger.filters == filters and "lets this through" in caplog.text
    assert "differ on disk" not in caplog.text


def test_a_photograph_keeps_its_bytes_and_stands_upright_as_from_the_folder(data_dir, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.jpg").write_bytes(given := encode(tiles()[0], exif=exif))
    main(data_dir, "--folder", tmp_path / "photos")
    assert stored(data_dir / "photos" / "1.0.0") == [given]
    expected = data.folder_source(tmp_path / "photos")[0]["image"]
    assert expected.shape == (56, 40, 3)
    np.testing.assert_array_equal(open_source("tfds:photos", data_dir)[0]["image"], expected)


def test_classes_called_by_numbers_can_be_in_their_order(data_dir, tmp_path):
    for name in ("10", "2"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "a.jpg").write_bytes(encode(tiles()[0]))
    main(data_dir, "--folder", tmp_path / "photos", "--class_order", "numeric")
    assert open_source("tfds:photos", data_dir).class_names == ("2", "10")


def test_ffhqs_folders_of_a_thousand_are_no_classes(data_dir, tmp_path):
    folder = write_folder(tmp_path / "thumbnails128x128")
    main(data_dir, "--folder", folder, "--labels", "none", "--name", "ffhq")
    source = open_source("tfds:ffhq", data_dir)
    assert len(source) == 5 and source.class_names == ()
    assert "label" not in read_with_tfds(data_dir / "ffhq" / "1.0.0")[0]


def test_an_lsun_database_keeps_its_webp_and_becomes_tfdss_lsun(data_dir, tmp_path):
    images = {bytes([65 + i]) * 40: encode(tiles()[i], "WEBP") for i in (2, 0, 1)}
    main(data_dir, "--lmdb", write_lmdb(tmp_path / "bedroom_train_lmdb", images))
    source = open_source("tfds:lsun/bedroom", data_dir)
    assert source.class_names == () and len(source) == 3
    for i, key in enumerate(sorted(images)):
        expected = np.asarray(Image.open(io.BytesIO(images[key])))
        np.testing.assert_array_equal(source[i]["image"], expected)
    folder = data_dir / "lsun" / "bedroom" / "3.1.0"
    assert stored(folder) == [images[key] for key in sorted(images)]

    import tensorflow_datasets as tfds

    first = tfds.builder("lsun/bedroom", data_dir=str(data_dir)).as_data_source("train")[0]
    assert first["id"] == b"A" * 40


def test_parquet_files_give_images_labels_and_the_names_in_their_metadata(data_dir, tmp_path):
    features = {"label": {"_type": "ClassLabel", "names": ["tench", "goldfish"]}}
    encoded = [encode(tile, "PNG") for tile in tiles()[:4]]
    for i in range(2):
        images = [{"bytes": encoded[2 * i + j], "path": f"{i}{j}.png"} for j in range(2)]
        columns = {"image": images, "label": [1, i], "other": [0, 0]}
        write_parquet(tmp_path / f"train-0000{i}.parquet", columns, features)
    main(data_dir, "--parquet", tmp_path / "train-*.parquet", "--name", "fish")
    source = open_source("tfds:fish", data_dir)
    assert source.class_names == ("tench", "goldfish")
    assert [int(source[i]["label"]) for i in range(4)] == [1, 0, 1, 1]
    for i in range(4):
        np.testing.assert_array_equal(source[i]["image"], tiles()[i])
    assert stored(data_dir / "fish" / "1.0.0") == encoded


def test_parquet_columns_of_bytes_and_of_numbers_will_do(data_dir, tmp_path):
    columns = {"img": [encode(tiles()[i]) for i in range(3)], "fine": [0, 3, 1]}
    path = write_parquet(tmp_path / "a.parquet", columns)
    columns = ("--image_column", "img", "--label_column", "fine")
    main(data_dir, "--parquet", path, "--name", "cifar/fine", *columns)
    source = open_source("tfds:cifar/fine", data_dir)
    assert source.class_names == ("0", "1", "2", "3")
    assert [int(source[i]["label"]) for i in range(3)] == [0, 3, 1]


def test_parquet_without_a_label_column_has_no_classes(data_dir, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"image": [encode(tiles()[0])]})
    main(data_dir, "--parquet", path, "--name", "faces")
    assert open_source("tfds:faces", data_dir).class_names == ()


def test_files_are_ended_at_their_size_and_order_goes_on_through_them(data_dir, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (7, 400, 400, 3), np.uint8)
    (tmp_path / "noise").mkdir()
    for i, image in enumerate(noise):  # 480 KB each
        (tmp_path / "noise" / f"{i}.png").write_bytes(encode(image, "PNG", compress_level=0))
    main(data_dir, "--folder", tmp_path / "noise", "--shard_mb", 1)
    folder = data_dir / "noise" / "1.0.0"
    shards = sorted(path.name for path in folder.glob("*array_record*"))
    assert shards == [f"noise-train.array_record-0000{i}-of-00003" for i in range(3)]
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["splits"][0]["shardLengths"] == ["3", "3", "1"]
    source = open_source("tfds:noise", data_dir)
    np.testing.assert_array_equal([source[i]["image"] for i in range(7)], noise)


def sixteen_bit_rgb() -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, contents: bytes) -> bytes:
        check = zlib.crc32(kind + contents)
        return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", check)

    rows = np.arange(4 * 5 * 3, dtype=">u2").reshape(4, 15) * 1000
    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


ODD = {
    "palette": lambda: encode(Image.fromarray(tiles()[0]).quantize(16), "PNG"),
    "transparent": lambda: encode(Image.fromarray(tiles()[0]).convert("RGBA"), "PNG"),
    "16-bit gray": lambda: encode(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30, "PNG"),
    "16-bit RGB": sixteen_bit_rgb,
    "1-bit": lambda: encode(Image.fromarray(tiles()[0]).convert("1"), "PNG"),
    "TIFF": lambda: encode(tiles()[0], "TIFF"),
    "animation": lambda: encode(
        Image.fromarray(tiles()[0]),
        "WEBP",
        save_all=True,
        append_images=[Image.fromarray(tiles()[5])],
        lossless=True,
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_pixels_that_readers_disagree_on_become_plain_png(kind):
    given = ODD[kind]()
    bytes_, reencoded = prepare.storable(given, "the image")
    assert reencoded
    with Image.open(io.BytesIO(bytes_)) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), decode_image(given, "the image"))


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]
)
@pytest.mark.parametrize("size", [(40, 56), (1, 1), (40, 1)])
def test_plain_images_are_kept_and_every_cut_is_found(kind, options, size):
    image = encode(tiles()[0][: size[0], : size[1]], kind, **options)
    assert prepare.storable(image, "the image") == (image, False)
    for length in (0, 10, len(image) // 2):
        with pytest.raises(prepare.BadImage, match="^the image: cannot be decoded"):
            prepare.storable(image[:length], "the image")


# What is refused, or left out


def test_a_bad_image_ends_the_preparation_naming_it(capsys, data_dir, tmp_path):
    folder = write_folder(tmp_path / "pets")
    bad = folder / "dog" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    message = refuse(capsys, data_dir, "--folder", folder)
    assert message.startswith(f"error: {bad}: cannot be decoded")


def test_bad_images_can_be_left_out_and_are_counted(capsys, data_dir, tmp_path):
    folder = write_folder(tmp_path / "pets")
    (folder / "cat" / "0.jpg").write_bytes(b"no image")
    main(data_dir, "--folder", folder, "--on_bad_image", "skip")
    assert "examples 4, classes 2," in (out := capsys.readouterr().out) and "left out 1" in out
    source = open_source("tfds:pets", data_dir)
    assert [int(source[i]["label"]) for i in range(len(source))] == [0, 1, 1, 1]


def test_bad_images_alone_are_refused(capsys, data_dir, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    arguments = ("--folder", tmp_path, "--labels", "none", "--name", "bad")
    message = refuse(capsys, data_dir, *arguments, "--on_bad_image", "skip")
    assert message == f"error: {tmp_path}: holds no image that can be decoded"


def test_a_bad_image_in_a_tar_is_named_with_its_class_tar(capsys, data_dir, tmp_path):
    path = tmp_path / "train.tar"
    path.write_bytes(pack({"n01.tar": pack({"n01_1.JPEG": b"no image"})}))
    message = refuse(capsys, data_dir, "--imagenet", path)
    assert message.startswith(f"error: {path}: n01.tar/n01_1.JPEG: cannot be decoded")


def test_something_that_is_no_tar_is_refused(capsys, data_dir, tmp_path):
    for contents in (b"", b"<html>not found</html>" * 100):
        (tmp_path / "train.tar").write_bytes(contents)
        message = refuse(capsys, data_dir, "--imagenet", tmp_path / "train.tar")
        assert message == f"error: {tmp_path}/train.tar: is not a tar file, or a damaged one"


@pytest.mark.parametrize("what", ["data", "header", "end mark", "damaged header"])
def test_a_truncated_tar_is_refused_naming_its_last_member(capsys, data_dir, tmp_path, what):
    path = write_imagenet(tmp_path)
    with tarfile.open(path) as archive:
        second, third = archive.getmembers()[1:]
    contents = bytearray(path.read_bytes())
    if what == "damaged header":
        contents[third.offset : third.offset + 512] = b"?" * 512
    length = {"data": third.offset - 600, "header": third.offset + 100, "end mark": third.offset}
    path.write_bytes(contents[: length.get(what)])
    message = refuse(capsys, data_dir, "--imagenet", path)
    assert message.startswith(f"error: {path}: is truncated or damaged at {second.name};")


def test_a_truncated_class_tar_is_refused_naming_its_last_image(capsys, data_dir, tmp_path):
    images = pack(synsets()["n02000000"])
    with tarfile.open(fileobj=io.BytesIO(images)) as archive:
        last = archive.getmembers()[-1]
    path = tmp_path / "train.tar"
    path.write_bytes(pack({"n01.tar": images[: last.offset_data + 100]}))
    message = refuse(capsys, data_dir, "--imagenet", path)
    assert f"{path}: n01.tar: " in message and last.name in message


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "must hold a tar for each class, .* and holds nothing"),
        ({"n01/a.JPEG": b"x"}, "must hold a tar for each class, .* and holds n01/a.JPEG"),
        ({"n01.tar": pack({})}, "n01.tar: holds no images, so it cannot be a class"),
        ({"n01.tar": b"x" * 600}, "n01.tar: is not a tar file"),
        ({"a/n01.tar": b"x", "b/n01.tar": b"x"}, "two of them have the same name"),
    ],
)
def test_a_tar_without_images_in_class_tars_is_refused(
    capsys, data_dir, tmp_path, members, message
):
    (tmp_path / "train.tar").write_bytes(pack(members))
    assert re.search(message, refuse(capsys, data_dir, "--imagenet", tmp_path / "train.tar"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--imagenet", "none.tar"), "--imagenet none.tar: no such file"),
        (("--folder", "none"), "none: no such folder"),
        (("--lmdb", "none"), "none/data.mdb: no such file"),
        (
            ("--parquet", "none-*.parquet", "--name", "a"),
            "--parquet none-\\*.parquet: no such files",
        ),
        (("--folder", "."), ".: holds no images"),
        (("--folder", "pets", "--name", "My-Pets"), "name 'My-Pets': must be of small letters"),
        (("--folder", "pets", "--name", "mnist"), "'mnist': TFDS has a data set of that name"),
        (("--folder", "pets", "--name", "imagenet2012"), "TFDS has a data set of that name"),
        (("--folder", "pets", "--split", "train[:9]"), "split 'train\\[:9\\]': must be of small"),
        (("--folder", "pets", "--shard_mb", "0"), "--shard_mb 0 is below 1"),
    ],
)
def test_flags_that_name_nothing_usable_are_refused(
    capsys, data_dir, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    if "pets" in arguments:
        write_folder(tmp_path / "pets")
    assert re.search(message, refuse(capsys, data_dir, *arguments))


def test_without_the_package_an_lmdb_is_refused_saying_how_to_install_it(
    capsys, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert "--lmdb needs the package lmdb: pip install lmdb" in refuse(
        capsys, data_dir, "--lmdb", tmp_path
    )


@pytest.mark.parametrize(
    ("length", "message"),
    [(20_000, "is truncated"), (100, "is not an LMDB"), (0, "is not an LMDB")],
)
def test_a_truncated_lmdb_is_refused(capsys, data_dir, tmp_path, length, message):
    values = {b"%d" % i: encode(tiles()[i], "PNG") for i in range(9)}
    file = write_lmdb(tmp_path / "cat", values) / "data.mdb"
    file.write_bytes(file.read_bytes()[:length])
    assert f"{file}: {message}" in refuse(capsys, data_dir, "--lmdb", tmp_path / "cat")


def test_a_value_of_an_lmdb_that_is_no_image_is_named_by_its_key(capsys, data_dir, tmp_path):
    folder = write_lmdb(tmp_path / "cat", {b"length": b"3"})
    message = refuse(capsys, data_dir, "--lmdb", folder)
    assert message.startswith(f"error: {folder}/data.mdb: key length: cannot be decoded")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": [b"x"], "label": [0]}, "no column 'image'; it has img, label"),
        ({"image": ["a.png"], "label": [0]}, "column 'image' is of type string"),
        ({"image": [b"x"], "label": ["cat"]}, "column 'label' is of type string"),
        ({"image": [b"x"], "label": [-1]}, "rows without a label"),
        ({"image": [b"x"], "label": [2]}, "label 2, but its metadata name 2 classes"),
        ({"image": [b"x"], "label": [0]}, "row 0: cannot be decoded"),
        ({"image": [{"bytes": None, "path": "a.png"}], "label": [0]}, "column 'image' is of type"),
    ],
)
def test_a_parquet_file_of_other_columns_is_refused(capsys, data_dir, tmp_path, columns, message):
    features = {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    path = write_parquet(tmp_path / "a.parquet", columns, features)
    line = refuse(capsys, data_dir, "--parquet", path, "--name", "a")
    assert f"error: {path}: {message}" in line


def test_a_label_column_that_is_not_there_is_refused_where_it_was_asked_for(
    capsys, data_dir, tmp_path
):
    path = write_parquet(tmp_path / "a.parquet", {"image": [encode(tiles()[0])], "fine": [0]})
    line = refuse(capsys, data_dir, "--parquet", path, "--name", "a", "--label_column", "label")
    assert line.startswith(f"error: {path}: no column 'label'")


def test_a_parquet_image_that_is_only_a_path_is_named_by_its_row(capsys, data_dir, tmp_path):
    images = [{"bytes": encode(tiles()[0]), "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}]
    path = write_parquet(tmp_path / "a.parquet", {"image": images})
    line = refuse(capsys, data_dir, "--parquet", path, "--name", "a")
    assert line.startswith(f"error: {path}: row 1: ")


def test_a_file_that_is_not_parquet_is_refused(capsys, data_dir, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    line = refuse(capsys, data_dir, "--parquet", tmp_path / "*.parquet", "--name", "a")
    assert line == f"error: {tmp_path}/a.parquet: is not a Parquet file, or a damaged one"


def test_an_error_names_the_commands_own_flags(capsys, data_dir, tmp_path):
    folder = write_folder(tmp_path / "pets")
    line = refuse(capsys, data_dir, "--folder", folder, "--class_order", "numeric")
    assert "class 'cat' is no number, so --class_order cannot be 'numeric'" in line
    (folder / "cat" / "0.jpg").write_bytes(b"no image")
    line = refuse(capsys, data_dir, "--folder", folder)
    assert line.endswith("replace the image or remove it, or give --on_bad_image=skip")


def test_files_below_the_users_home_are_found(capsys, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    line = refuse(capsys, data_dir, "--parquet", "~/*.parquet", "--name", "a")
    assert line.startswith(f"error: {tmp_path}/a.parquet: is not a Parquet file")


def test_the_identity_of_a_prepared_data_set_is_that_of_its_split(data_dir, tmp_path):
    folder = write_folder(tmp_path / "pets")
    for place in (data_dir, tmp_path / "again"):
        main(place, "--folder", folder)
    (folder / "cat" / "9.jpg").write_bytes(encode(tiles()[0]))
    main(tmp_path / "more", "--folder", folder)
    sources = [
        data.tfds_source("pets", split, place)
        for place in (data_dir, tmp_path / "again", tmp_path / "more")
        for split in ("train", "train[:2]")
    ]
    digests = [source.identity()["records"] for source in sources]
    assert digests[:2] == digests[2:4] and len(set(digests)) == 4


# Whole or not at all


def test_a_data_set_that_is_there_is_not_written_over(capsys, data_dir, tmp_path):
    folder = write_folder(tmp_path / "pets")
    main(data_dir, "--folder", folder)
    line = refuse(capsys, data_dir, "--folder", folder)
    assert line.startswith(f"error: {data_dir}/pets/1.0.0: is there already")


def test_a_disk_that_is_too_small_is_refused_before_writing(
    capsys, data_dir, tmp_path, monkeypatch
):
    folder = write_folder(tmp_path / "pets")
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: Namespace(free=100))
    assert "0.0 GB are free, but the images of" in refuse(capsys, data_dir, "--folder", folder)


def test_a_disk_that_fills_up_leaves_nothing(capsys, data_dir, tmp_path):
    (tmp_path / "noise").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    (tmp_path / "noise" / "0.png").write_bytes(encode(noise, "PNG", compress_level=0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python heeds it as a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        line = refuse(capsys, data_dir, "--folder", tmp_path / "noise")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in line and "make room" in line


def test_an_interrupted_preparation_leaves_nothing(capsys, data_dir, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pets")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare._Shards, "write", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(data_dir, "--folder", folder)
    assert stop.value.code == 130 and not list(data_dir.rglob("*"))
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing was left behind"


def test_a_killed_preparation_can_simply_be_run_again(data_dir, tmp_path):
    folder = write_folder(tmp_path / "pets")
    program = f"""
import os, signal
from mdt_jax.commands import prepare_dataset
from mdt_jax.data import prepare
write, written = prepare._Shards.write, []
def write_three(shards, record):
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write(shards, record))
prepare._Shards.write = write_three
prepare_dataset.main(["--folder", {str(folder)!r}, "--data_dir", {str(data_dir)!r}])
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in (data_dir / "pets").iterdir()] == ["1.0.0.partial"]
    main(data_dir, "--folder", folder)
    assert [path.name for path in (data_dir / "pets").iterdir()] == ["1.0.0"]
    assert len(open_source("tfds:pets", data_dir)) == 5
    names = sorted(path.name for path in (data_dir / "pets" / "1.0.0").iterdir())
    shard = "pets-train.array_record-00000-of-00001"
    assert names == ["dataset_info.json", "features.json", "label.labels.txt", shard]


def test_two_preparations_of_one_data_set_are_refused(capsys, data_dir, tmp_path):
    folder = write_folder(tmp_path / "pets")
    with prepare._aside(data_dir / "pets" / "1.0.0"):
        line = refuse(capsys, data_dir, "--folder", folder)
    assert f"{data_dir}/pets/1.0.0.partial: is just being written" in line


def test_the_same_images_give_the_same_bytes(data_dir, tmp_path, imagenet):
    main(data_dir, "--imagenet", write_imagenet(tmp_path), "--name", "synsets")
    for path in (data_dir / "synsets" / "1.0.0").iterdir():
        assert path.read_bytes() == (imagenet / "synsets" / "1.0.0" / path.name).read_bytes()


# ---- Training on them ---------------------------------------------------------------------------


def test_the_digits_prepared_are_the_digits(data_dir, tmp_path):
    scans = data.digits("heldout")
    for i in range(len(scans)):
        example = scans[i]
        place = tmp_path / "digits" / str(example["label"]) / f"{i:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(example["image"][..., 0]).save(place)
    main(data_dir, "--folder", tmp_path / "digits", "--name", "scans")
    prepared = open_source("tfds:scans", data_dir)
    assert prepared.class_names == scans.class_names and len(prepared) == len(scans)

    def contents(source):
        examples = (source[i] for i in range(len(source)))
        return sorted((int(e["label"]), e["image"][..., 0].tobytes()) for e in examples)

    assert contents(prepared) == contents(scans)


def test_a_model_trains_on_a_tar_of_tars(imagenet, tmp_path):
    config = default_config()
    config.model.update(name="DiT", input_size=8, in_channels=3, num_classes=-1, patch_size=4)
    config.model.update(hidden_size=8, depth=1, num_heads=2)
    apply_recipe(config)
    config.data.update(name="tfds:synsets", path=str(imagenet), crop="random")
    config.update(num_steps=2, batch_size=8, log_every=1)
    config.sample.every = 0
    state = loop.train(config, tmp_path / "run")
    assert int(state.step) == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines) and len(lines) == 2
    _, meta = read_meta(tmp_path / "run")
    assert tuple(meta["class_names"]) == open_source("tfds:synsets", imagenet).class_names
    assert meta["config"]["model"]["num_classes"] == len(meta["class_names"])


# Names and files as none should be


BAD_NAMES = ["cat\ndog", "cat\x1b[31m", os.fsdecode(b"caf\xe9"), "cat\u2028"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *[(kind, name) for kind in ("folder", "tar") for name in BAD_NAMES],
        *[("parquet", name) for name in BAD_NAMES if name.isascii()],  # JSON escapes the others
    ],
)
def test_a_class_whose_name_would_be_two_lines_is_refused(capsys, data_dir, tmp_path, name, kind):
    picture = encode(tiles()[0])
    if kind == "folder":
        for folder in ("ant", name):
            (tmp_path / "pets" / folder).mkdir(parents=True)
            (tmp_path / "pets" / folder / "0.jpg").write_bytes(picture)
        flags = ("--folder", tmp_path / "pets")
    elif kind == "tar":
        archive = pack({f"{class_}.tar": pack({"0.JPEG": picture}) for class_ in ("ant", name)})
        (tmp_path / "pets.tar").write_bytes(archive)
        flags = ("--imagenet", tmp_path / "pets.tar")
    else:
        columns = {"image": [picture] * 2, "label": [0, 1]}
        features = {"label": {"names": ["ant", name]}}
        flags = ("--parquet", write_parquet(tmp_path / "a.parquet", columns, features))
        flags += ("--name", "pets")
    message = refuse(capsys, data_dir, *flags)
    assert "the name of class 1, '" in message and message.isprintable()


def test_classes_that_differ_in_spaces_alone_are_refused(capsys, data_dir, tmp_path):
    for name in ("cat", "cat "):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "0.jpg").write_bytes(encode(tiles()[0]))
    message = refuse(capsys, data_dir, "--folder", tmp_path / "pets")
    assert "two of them have the same name" in message


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"\x1b[31m", b"\xff\xfe"])
def test_files_of_any_name_are_prepared(capsys, data_dir, tmp_path, name):
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / "cat" / os.fsdecode(name + b".jpg")).write_bytes(encode(tiles()[0]))
    main(data_dir, "--folder", tmp_path / "pets")
    (example,) = read_with_tfds(data_dir / "pets" / "1.0.0")
    assert (
        example["file_name"] == b"cat/" + name.decode(errors="backslashreplace").encode() + b".jpg"
    )
    assert capsys.readouterr().out.replace("\n", "").isprintable()


def test_a_link_to_nowhere_can_be_left_out(capsys, data_dir, tmp_path):
    folder = write_folder(tmp_path / "pets")
    (folder / "cat" / "gone.jpg").symlink_to("nowhere")
    assert "cat/gone.jpg: cannot be read (No such file" in refuse(
        capsys, data_dir, "--folder", folder
    )
    main(data_dir, "--folder", folder, "--on_bad_image", "skip")
    assert "examples 5" in capsys.readouterr().out


def test_pipes_and_links_around_are_no_images(capsys, data_dir, tmp_path):
    folder = write_folder(tmp_path / "pets")
    os.mkfifo(folder / "cat" / "pipe.jpg")
    (folder / "dog" / "up").symlink_to("..")
    main(data_dir, "--folder", folder)
    assert "examples 5, classes 2," in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_splits_are_no_classes(capsys, data_dir, tmp_path, kind):
    if kind == "folder":
        for name in ("train", "val"):
            (tmp_path / name / "n01").mkdir(parents=True)
            (tmp_path / name / "n01" / "0.jpg").write_bytes(encode(tiles()[0]))
        message = refuse(capsys, data_dir, "--folder", tmp_path)
        assert f"set --folder to one of them, such as {tmp_path}/train, or --labels to" in message
    else:
        (tmp_path / "all.tar").write_bytes(pack({"train.tar": b"", "val.tar": b""}))
        message = refuse(capsys, data_dir, "--imagenet", tmp_path / "all.tar")
        assert "its tars (train, val) are named like the splits" in message
