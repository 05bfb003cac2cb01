"""Data that are damaged, or are named as none can be: each is refused in one line that names it.

Missing data are a legitimate dry run; data that are there and damaged are an error.
"""

from __future__ import annotations

import os
import signal
import socket
import tracemalloc
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict
from PIL import Image

from mdt_jax import data, train
from mdt_jax.basics.names import check_class_names, printable
from mdt_jax.config import apply_recipe, default_config
from mdt_jax.data import latent_writing
from mdt_jax.data.folders import read_folder
from mdt_jax.data.latent_cache import CacheDescription
from mdt_jax.data.missing import MissingData
from mdt_jax.data.source import check_posteriors
from mdt_jax.models.latent_space import STABLE_DIFFUSION_SCALE
from mdt_jax.parallel.command import one_line
from mdt_jax.training import checks

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture(autouse=True)
def no_hang():
    """A read that waits for ever fails its test after a minute."""

    def stop(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5)).save(folder / name)
    return folder


# Names


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe − 東京 🐕.png", "größe − 東京 🐕.png"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x1b]0;title\x07\x1b[31mred", r"\x1b]0;title\x07\x1b[31mred"),
        (NOT_UTF8, r"caf\xe9"),
        ("\u202egnp.exe\u2028\x85", r"\u202egnp.exe\u2028\x85"),
        (Path("/a\tb"), r"/a\tb"),
    ],
)
def test_a_name_is_shown_without_what_moves_the_cursor(text, shown):
    assert printable(text) == shown and printable(shown) == shown


CONTROLS = {
    "newline": "cat\ndog", "return": "cat\rdog", "tab": "cat\tdog", "escape": "\x1b[2Jcat",
    "delete": "cat\x7f", "next line": "cat\x85dog", "form feed": "cat\fdog",
    "line separator": "cat\u2028dog", "no UTF-8": NOT_UTF8,
}  # fmt: skip


@pytest.mark.parametrize("name", CONTROLS.values(), ids=CONTROLS)
def test_a_class_whose_name_no_list_can_hold_is_refused_naming_it_escaped(tmp_path, name):
    write_images(tmp_path, "ant/0.png", f"{name}/0.png")
    for open_source in (
        lambda: data.folder_source(tmp_path),
        lambda: data.arrays(np.zeros((2, 4, 4, 1), np.uint8), np.arange(2), ["ant", name]),
    ):
        with pytest.raises(ValueError, match="the name of class . holds|the name of") as caught:
            open_source()
        assert f"'{printable(name)}'" in str(caught.value) and str(caught.value).isprintable()


def test_names_of_any_script_are_classes():
    check_class_names("x", ["кот", "कुत्ता", "می\u200cخواهم", "n 01", "l'été", "猫"])


def test_messages_and_logs_show_names_escaped(tmp_path):
    folder = write_images(tmp_path / "a\x1b[31mb", "cat_\x07.png", "dog_0.png")
    source = data.folder_source(folder)
    assert "\\x1b[31m" in source.describe() and source.describe().isprintable()
    (folder / "cat_\x07.png").write_bytes(b"no image")
    with pytest.raises(data.BadImage) as caught:
        source[0]
    assert str(caught.value).isprintable() and r"cat_\x07.png: cannot be decoded" in str(
        caught.value
    )
    error = FileNotFoundError(2, "No such file or directory", "a\x1b[31mb")
    assert one_line(error).isprintable() and "x1b[31mb" in one_line(error)


# Folders


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        folder = os.open(path.parent, os.O_RDONLY)  # a socket's path must be short
        bound.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


@pytest.mark.parametrize("place", ["", "cat"])
@pytest.mark.parametrize(
    "make",
    [make_fifo, make_socket, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()],
    ids=["fifo", "socket", "device", "folder"],
)
def test_only_files_are_images(tmp_path, place, make):
    write_images(tmp_path / place, "a.png", "b.png")
    make(tmp_path / place / "c.png")
    files = read_folder(tmp_path, labels="none").files
    assert [os.path.basename(file) for file in files] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name in ("up", "cat/up", "cat/deep/up")
        for target in ("root", "parent", "class")
        if (name, target) != ("up", "class")  # another name of a class; see below
    ],
)
@pytest.mark.parametrize("labels", ["auto", "none"])
def test_a_link_to_a_folder_around_it_is_not_followed(tmp_path, name, target, labels):
    names = ["cat/0.png", "cat/1.png", "cat/deep/2.png", "dog/0.png"]
    root = write_images(tmp_path / "data" / "root", *names)
    (root / name).symlink_to(
        {"root": root, "parent": root.parent, "class": root / "cat"}[target],
        target_is_directory=True,
    )
    assert read_folder(root, labels=labels).files == tuple(names)


def test_links_to_folders_elsewhere_are_classes_and_parts_of_them(tmp_path):
    write_images(tmp_path / "store", "n01/0.png", "n02/1.png", "more/2.png")
    subset = tmp_path / "subset"
    subset.mkdir()
    for name in ("n01", "n02"):
        (subset / name).symlink_to(tmp_path / "store" / name)
        (subset / name / "more").symlink_to(tmp_path / "store" / "more")
    folder = read_folder(subset)
    assert folder.files == ("n01/0.png", "n01/more/2.png", "n02/1.png", "n02/more/2.png")
    assert folder.labels.tolist() == [0, 0, 1, 1]


def test_one_folder_by_two_names_is_no_two_classes_and_one_set(tmp_path):
    write_images(tmp_path, "cat/0.png", "dog/0.png")
    (tmp_path / "tiger").symlink_to("cat")
    with pytest.raises(ValueError, match="sub-folders cat and tiger are one folder, by a link"):
        read_folder(tmp_path)
    assert read_folder(tmp_path, labels="none").files == ("cat/0.png", "dog/0.png")


def test_a_link_to_itself_is_a_bad_image_or_no_folder(tmp_path):
    write_images(tmp_path, "cat/0.png")
    (tmp_path / "cat" / "1.png").symlink_to("1.png")
    (tmp_path / "cat" / "loop").symlink_to("loop")
    (tmp_path / "dog").symlink_to("dog")
    source = data.folder_source(tmp_path)
    assert source.class_names == ("cat",) and len(source) == 2
    with pytest.raises(data.BadImage, match="cat/1.png: cannot be decoded .Too many levels"):
        source[1]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_images(tmp_path, "cat/0.png", "cat/locked/1.png")
    scan = os.scandir

    def refuse(path):  # the tests' user may be allowed everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="cat/locked: cannot be listed .Permission denied"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val"), ("Train", "VALIDATION", "Test"), ("training", "eval"), ("train",),
        ("train2017", "val2017"), ("dev_set", "heldout"), ("train", "held-out", "valid"),
        ("train", "validate"), ("train", "tests"), ("val", "holdout"), ("trn", "tst"),
        ("train", "unlabeled"), ("train", "minival"), ("imagenet_train", "imagenet_val"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"), ("trainA", "trainB", "testA"),
        ("train-images", "t10k-images"), ("fold0", "fold1"), ("fold_1", "fold_2"),
    ],
)  # fmt: skip
def test_sub_folders_named_like_splits_are_no_classes(tmp_path, names):
    write_images(tmp_path, *(f"{name}/n0{i}/{i}.png" for name in names for i in range(2)))
    with pytest.raises(ValueError, match="named like the splits of a data set, not like") as caught:
        data.folder_source(tmp_path)
    first = min(names) if "train" not in names[0].lower() else names[0]
    assert f"set data.path to one of them, such as {tmp_path}/{first}" in str(caught.value)
    assert "data.labels to 'sub_folders' if they are classes" in str(caught.value)
    with pytest.raises(ValueError, match="give one of them") as caught:
        read_folder(tmp_path, settings=False)
    assert "data." not in str(caught.value)
    assert set(read_folder(tmp_path, labels="sub_folders").class_names) == set(names)
    assert len(read_folder(tmp_path, labels="none")) == 2 * len(names)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "bus"), ("trains", "vals"), ("test1a", "test2b"), ("freight_train", "bus"),
        ("freight_train", "bullet_train"), ("bullet_train",), ("fold", "crease"),
        ("model_train", "model_bus"), ("Valentine", "training_dog"),
    ],
)  # fmt: skip
def test_other_sub_folders_are_classes(tmp_path, names):
    write_images(tmp_path, *(f"{name}/0.png" for name in (*names, "__MACOSX", ".cache")))
    assert set(read_folder(tmp_path).class_names) == set(names)


def test_sub_folders_asked_for_must_be_there(tmp_path):
    write_images(tmp_path, "0.png")
    with pytest.raises(ValueError, match="data.labels is 'sub_folders', and none has images"):
        read_folder(tmp_path, labels="sub_folders")


# Pictures


def png(width: int, height: int, *extra: bytes, data: bytes = b"") -> bytes:
    """A PNG of any size in its header, with other chunks before its data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return len(content).to_bytes(4) + checked + zlib.crc32(checked).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(data))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


BOMB = zlib.compress(bytes(2**27))  # 128 MiB of zeros in 130 kB
PICTURES = {
    "of a billion pixels": png(40000, 40000),
    "of the most pixels": png(2**31 - 1, 2**31 - 1),
    "of no pixels": png(0, 0),
    "without its data": png(400, 400),
    "of text that swells": png(4, 4, b"".join(
        [len(BOMB + b"a\0\0").to_bytes(4), b"zTXta\0\0", BOMB,
         zlib.crc32(b"zTXta\0\0" + BOMB).to_bytes(4)])),
    "of a chunk of the largest length": png(4, 4, b"\xff\xff\xff\xffzTXt"),
    "empty": b"",
    "of text": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}  # fmt: skip


@pytest.mark.parametrize("what", PICTURES)
def test_a_picture_that_cannot_be_decoded_costs_little_memory(tmp_path, what):
    write_images(tmp_path, "cat/0.png")
    (tmp_path / "cat" / "1.png").write_bytes(PICTURES[what])
    source = data.folder_source(tmp_path)
    tracemalloc.start()
    with pytest.raises(data.BadImage, match="cat/1.png: cannot be decoded") as caught:
        source[1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**28 and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("make", [make_fifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_picture_that_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "mask.png")
    with pytest.raises(
        data.BadImage, match="mask.png: cannot be decoded .it is a pipe or a device"
    ):
        data.decode_image(tmp_path / "mask.png", str(tmp_path / "mask.png"))


# Arrays

IMAGES = np.arange(4 * 3 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3, 3)


def npy_bytes(header: str) -> bytes:
    """A file of 108 bytes of numbers under a header of one's own."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + IMAGES.tobytes()


def header(shape: str, descr: str = "'|u1'") -> bytes:
    return npy_bytes(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")


DAMAGED = {
    "labels shorter": ({"labels": np.zeros(3, int)}, "labels of shape (3,)"),
    "labels longer": ({"labels": np.zeros(5, int)}, "labels of shape (5,)"),
    "labels negative": ({"labels": np.array([0, 1, -1, 0])}, "label -1"),
    "labels float": ({"labels": np.zeros(4)}, "type float64"),
    "labels bool": ({"labels": np.zeros(4, bool)}, "type bool"),
    "labels scalar": ({"labels": np.int64(3)}, "labels of shape ()"),
    "labels of two axes": ({"labels": np.zeros((4, 1), int)}, "labels of shape (4, 1)"),
    "labels huge": ({"labels": np.array([0, 2**31, 1, 0])}, "label 2147483648; without class_na"),
    "labels unsigned": ({"labels": np.array([0, 2**64 - 1, 1, 0], "u8")}, "label 1844674407370955"),
    "labels objects": ({"labels": np.array([0, 1, 1, None])}, "labels.npy: cannot be mem"),
    "labels text": ({"labels": b"0\n1\n"}, "labels.npy: cannot be memory-mapped"),
    "labels nowhere": ({"labels": "link"}, "labels.npy: is no file"),
    "images float": ({"images": IMAGES / 255}, "images.npy: holds float64"),
    "images objects": ({"images": np.array([None] * 4)}, "it holds pickled Python objects"),
    "images empty file": ({"images": b""}, "images.npy: cannot be memory-mapped"),
    "images cut off": ({"images": header("(4, 3, 3, 4)")}, "cut off, 36 bytes before its end"),
    "images cut in the header": ({"images": header("(4, 3, 3, 3)")[:50]}, "cannot be memory-map"),
    "images negative": ({"images": header("(-4, 3, 3, 3)")}, "its header says the shape (-4, 3, 3"),
    "images huge": ({"images": header(f"(4, 3, 3, {2**62})")}, "cut off"),
    "images overflow": ({"images": header(f"({2**64}, {2**64}, 3, 3)")}, "cut off"),
    "images of True": ({"images": header("(4, 3, 3, True)")}, "its header says the shape (4, 3"),
    "images without pixels": ({"images": np.zeros((4, 0, 0, 3), np.uint8)}, "have no pixels"),
    "images without channels": ({"images": np.zeros((4, 3, 3, 0), np.uint8)}, "have no pixels"),
    "images none": ({"images": np.zeros((0, 3, 3, 3), np.uint8)}, "holds no examples"),
    "images scalar": ({"images": np.uint8(3)}, "images of shape ()"),
    "images npz": ({"images": "npz"}, "images.npy: cannot be memory-mapped"),
    "images folder": ({"images": "folder"}, "images.npy: is no file"),
    "images pipe": ({"images": "fifo"}, "images.npy: is no file"),
    "images of a version": ({"images": b"\x93NUMPY\x09\x00" + bytes(200)}, "version (9, 0)"),
    "images in brackets": ({"images": npy_bytes("(" * 100)}, "images.npy: cannot be memory-mapped"),
    "images records": ({"images": header("(27,)", "[('a','<i4')]")}, "images of shape (27,)|holds"),
    "images NCHW": ({"images": np.zeros((4, 3, 8, 8), np.uint8)}, "(count, channels, height, w"),
    "images gray NCHW": ({"images": np.zeros((4, 1, 8, 8), np.uint8)}, "np.moveaxis(array, 1, -1)"),
    "latents NCHW": ({"latents": np.zeros((4, 8, 32, 32), "f4")}, "latents of shape (4, 8, 32, 3"),
    "latents integers": ({"latents": np.zeros((4, 8, 8, 8), int)}, "latents.npy: holds int64"),
    "latents complex": ({"latents": np.zeros((4, 8, 8, 8), "c8")}, "latents.npy: holds complex64"),
}  # fmt: skip


def write_arrays(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        file = folder / f"{name}.npy"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content == "npz" if isinstance(content, str) else False:
            np.savez(folder / "x.npz", arr_0=IMAGES)
            (folder / "x.npz").rename(file)
        elif isinstance(content, str):
            {"folder": file.mkdir, "fifo": lambda file=file: os.mkfifo(file),
             "link": lambda file=file: file.symlink_to("gone")}[content]()  # fmt: skip
        else:
            np.save(file, content, allow_pickle=True)
    return folder


def dry_config(folder: Path) -> ConfigDict:
    config = default_config()
    config.model.update(name="MDT", input_size=3, in_channels=3, num_classes=2, patch_size=1)
    config.model.update(hidden_size=8, depth=2, num_heads=2, decoder_depth=1)
    apply_recipe(config)
    config.data.update(name="npy", path=str(folder))
    config.batch_size, config.sample.every = 8, 0
    return config


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_arrays_are_refused_in_one_line_by_a_dry_run_too(tmp_path, case):
    files, message = DAMAGED[case]
    if not {"images", "latents"} & files.keys():
        files = files | {"images": IMAGES}
    write_arrays(tmp_path, files)
    for run in (data.npy_directory, lambda folder: train.dry_run(dry_config(folder))):
        with pytest.raises((ValueError, OSError)) as caught:
            run(tmp_path)
        said = str(caught.value)
        assert not isinstance(caught.value, MissingData), said
        assert any(part in said for part in message.split("|")), said
        assert str(tmp_path) in said and "\n" not in said and len(said) < 400


def test_data_that_are_missing_are_a_dry_run(tmp_path):
    for config in (dry_config(tmp_path / "gone"), dry_config(tmp_path), dry_config(Path(""))):
        shown = train.dry_run(config)
        assert "trainable parameters" in shown and "data           not there: " in shown
    config.data.path = ""
    assert "needs data.path" in train.dry_run(config)


def test_a_class_folder_without_images_is_an_error_of_a_dry_run(tmp_path):
    write_images(tmp_path, "cat/0.png")
    (tmp_path / "dog").mkdir()
    config = dry_config(tmp_path)
    config.data.name = "folder"
    with pytest.raises(FileNotFoundError, match="dog: holds no images"):
        train.dry_run(config)


def test_arrays_of_any_order_of_bytes_and_axes_are_read(tmp_path):
    latents = np.random.default_rng(0).uniform(0, 1, (4, 3, 3, 8))
    labels = np.array([1, 0, 2, 1])
    for dtype, order in ((">f4", "C"), ("<f2", "F"), (">f2", "C"), ("<f8", "F")):
        stored = np.asarray(latents.astype(dtype), order=order)
        write_arrays(tmp_path, {"latents": stored, "labels": labels.astype(">i8")})
        source = data.npy_directory(tmp_path)
        np.testing.assert_array_equal(source[2]["image"], stored[2].astype(np.float32))
        assert source[2]["label"] == 2 and source.class_names == ("0", "1", "2")
        stream = data.ExampleStream(source, seed=0)
        assert stream.block(0, 4)["image"].shape == (4, 3, 3, 8)


# Posteriors that no latent can be drawn from


def open_latents(folder: Path, posteriors: np.ndarray, kind: str) -> data.Source:
    """A source of the posteriors: an array, a folder of npy files, or a cache."""
    if kind == "arrays":
        return data.arrays(posteriors)
    if kind == "npy":
        return data.npy_directory(write_arrays(folder, {"latents": posteriors}))
    count, side, _, channels = posteriors.shape
    description = CacheDescription(
        source="pictures", num_images=count, class_names=(), image_size=8, vae="mse",
        vae_digest="0" * 64, scale=STABLE_DIFFUSION_SCALE, compute_dtype="float32",
        latent_shape=(side, side, channels // 2), dtype=posteriors.dtype.name, mirror=False,
        images_per_shard=4,
    )  # fmt: skip
    rows = np.zeros(count, description.record_type)
    rows["index"], rows["posterior"] = np.arange(count), posteriors
    latent_writing.begin_cache(folder, description)
    for shard in range(description.num_shards):
        images = description.shard_images(shard)
        latent_writing.write_shard(folder, description, shard, [rows[images.start : images.stop]])
    assert latent_writing.finish_cache(folder, description)
    return data.latents_source(folder)


@pytest.mark.parametrize("kind", ["arrays", "npy", "latents"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("channel", "value", "what"),
    [
        (1, np.nan, "the mean of its latent is nan in row 2, column 3, channel 1"),
        (0, -np.inf, "the mean of its latent is -inf in row 2, column 3, channel 0"),
        (2, np.nan, "the standard deviation of its latent is nan in row 2, column 3, channel 0"),
        (3, np.inf, "the standard deviation of its latent is inf in row 2, column 3, channel 1"),
        (3, -0.25, "the standard deviation of its latent is -0.25 in row 2, column 3, channel 1"),
    ],
)
def test_a_latent_that_is_no_number_ends_a_run_naming_it(
    tmp_path, kind, dtype, channel, value, what
):
    posteriors = np.random.default_rng(0).uniform(0.1, 1, (6, 4, 4, 4)).astype(dtype)
    posteriors[..., :2] -= 0.5
    posteriors[5, 2, 3, channel] = value
    place = {
        "arrays": "arrays: example 5", "npy": f"{tmp_path}/latents.npy: example 5",
        "latents": f"{tmp_path}/latents-00001-of-00002.array_record: record 1",
    }  # fmt: skip
    source = open_latents(tmp_path, posteriors, kind)
    settings = {"global_batch_size": 6, "seed": 0, "process_index": 0, "process_count": 1}
    with data.create_batches(source, **settings, flip=False) as batches:
        with (
            data.prefetch_to_device(batches, SingleDeviceSharding(jax.devices()[0])) as on_device,
            pytest.raises(ValueError, match="which cannot be trained on; encode") as caught,
        ):
            next(on_device)
        assert f"{place[kind]}: {what}, " in str(caught.value) and "\n" not in str(caught.value)
        assert one_line(caught.value) == str(caught.value)  # without notes of Grain's
    assert source[4]["image"].shape == (4, 4, 4)  # opening and other examples are as before


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_a_standard_deviation_of_zero_or_minus_zero_is_one(dtype):
    posteriors = np.zeros((2, 4, 4, 4), dtype)
    posteriors[0, 0, 0, 2], posteriors[..., 0] = -0.0, -3
    check_posteriors(posteriors, str)
    check_posteriors(posteriors[:0], str)


# Lists of class names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"cat\ndog\n", ("cat", "dog")),
        (b"cat\ndog", ("cat", "dog")),
        (b"cat\r\ndog\r\n", ("cat", "dog")),
        (b"cat\rdog\r", ("cat", "dog")),
        (b"\xef\xbb\xbfcat\r\ndog", ("cat", "dog")),
        ("größe\n猫\n".encode(), ("größe", "猫")),
        (b" cat \ndog\n", (" cat ", "dog")),
    ],
)
def test_class_names_are_the_lines_of_their_file(tmp_path, text, names):
    write_arrays(tmp_path, {"images": IMAGES, "labels": np.arange(4) % 2})
    (tmp_path / "class_names.txt").write_bytes(text)
    assert data.npy_directory(tmp_path).class_names == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"cat\n\ndog\n", "class_names.txt: line 2 is empty"),
        (b"cat\ndog\n\n", "class_names.txt: line 3 is empty"),
        (b"cat\n  \t\n", "class_names.txt: line 2 is empty"),
        (b"", "label 1 with 0|has label 1"),
        (b"caf\xe9\ndog\n", "class_names.txt: is no text in UTF-8 .* at byte 3"),
        ("cat\ndog\n".encode("utf-16"), "class_names.txt: is no text in UTF-8"),
        (b"cat\x0cdog\nemu\n", r"the name of class 0, 'cat\\x0cdog', holds a control character"),
        (b"cat\ndog\x1b[31m\n", r"the name of class 1, 'dog\\x1b\[31m', holds a control character"),
        (None, "class_names.txt: is no file"),
    ],
)
def test_a_list_of_class_names_that_cannot_be_one_is_refused(tmp_path, text, message):
    write_arrays(tmp_path, {"images": IMAGES, "labels": np.arange(4) % 2})
    file = tmp_path / "class_names.txt"
    file.symlink_to("gone") if text is None else file.write_bytes(text)
    if text == b"":  # no names: the labels' own numbers
        assert data.npy_directory(tmp_path).class_names == ("0", "1")
        return
    with pytest.raises(ValueError, match=message) as caught:
        data.npy_directory(tmp_path)
    assert not isinstance(caught.value, MissingData) and str(caught.value).isprintable()


def test_classes_of_one_name_are_told_of(tmp_path, caplog):
    write_arrays(tmp_path, {"images": IMAGES, "labels": np.arange(4) % 3})
    (tmp_path / "class_names.txt").write_text("crane\nmaillot\ncrane\n")
    with caplog.at_level("WARNING", logger="absl"):
        assert data.npy_directory(tmp_path).class_names == ("crane", "maillot", "crane")
    assert "class_names.txt: 2 classes are called crane" in caplog.text


# Data and a model


def test_data_of_fewer_classes_than_the_model_are_told_of(tmp_path, caplog):
    write_arrays(tmp_path, {"images": IMAGES, "labels": np.arange(4) % 2})
    config = dry_config(tmp_path)
    for classes, told in (
        (2, None),
        (1000, "2 class(es), model.num_classes is 1000: the other 998"),
    ):
        config.model.num_classes = classes
        caplog.clear()
        with caplog.at_level("WARNING", logger="absl"):
            train.dry_run(config)
        assert (told is None) == (caplog.text == "") and (told or "") in caplog.text
    assert "set model.num_classes to 2, or data.path to" in caplog.text
    config.model.num_classes = -1
    assert "2 classes" in train.dry_run(config)


@pytest.mark.parametrize("channels", [4, 8])
def test_latents_without_standard_deviations_are_seen_as_such(channels):
    config = dry_config(Path(""))
    config.model.update(input_size=8, in_channels=4)
    source = data.arrays(np.zeros((3, 8, 8, channels), np.float32), np.arange(3) % 2)
    if channels == 8:
        checks.check_data(config, source)
        return
    with pytest.raises(ValueError, match="are its 4 channels a latent's mean alone"):
        checks.check_data(config, source)
