"""Folders of images: which layout each has, its classes and their order, and what is refused."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdt_jax import data
from mdt_jax.data.folders import read_folder


def write_images(folder: Path, *names: str) -> Path:
    """Image files of 5 x 6 pixels whose values are their place in the list."""
    folder.mkdir(exist_ok=True)
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (value,) * 3).save(folder / name)
    return folder


def values(source) -> list[int]:
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


def labels(source) -> list[int]:
    return [int(source[i]["label"]) for i in range(len(source))]


# The three layouts


def test_a_folder_of_sub_folders_is_labelled_by_their_sorted_names(tmp_path):
    names = ["dog/b.png", "cat/2.PNG", "cat/1.bmp", "dog/more/a.webp", "ant/z.tiff"]
    write_images(tmp_path, *names)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    write_images(tmp_path, ".hidden/0.png", "cat/.hidden/0.png", "cat/.0.png", ".0.png")
    source = data.folder_source(tmp_path)
    assert source.class_names == ("ant", "cat", "dog") and source.image_shape == (None, None, 3)
    assert labels(source) == [0, 1, 1, 2, 2]
    # Sorted within a class: 1.bmp before 2.PNG, b.png before more/a.webp.
    assert values(source) == [4, 2, 1, 0, 3]


def test_a_class_keeps_its_name_whatever_its_files_are_called(tmp_path):
    source = data.folder_source(write_images(tmp_path, "cat/1_0.png", "cat/2_0.png", "dog/1_1.png"))
    assert source.class_names == ("cat", "dog") and labels(source) == [0, 0, 1]


def test_adms_file_names_are_labelled_by_what_stands_before_the_underscore(tmp_path):
    names = ["n02_7.JPEG", "n01_10_b.png", "n02_1.png", "n01_9.png"]
    source = data.folder_source(write_images(tmp_path, *names))
    assert source.class_names == ("n01", "n02")
    assert values(source)[:2] == [1, 3] and labels(source) == [0, 0, 1, 1]


def test_one_class_is_enough(tmp_path):
    source = data.folder_source(write_images(tmp_path, "cat/0.png", "cat/1.png"))
    assert source.class_names == ("cat",) and labels(source) == [0, 0]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["00001.png", "00000.png"], "00000.png names none before an underscore"),  # FFHQ
        (["9f6c.webp", "0ab1.webp"], "0ab1.webp names none before an underscore"),  # LSUN
        (["1_0.png", "1_1.png", "2_0.png", "cover.png"], "cover.png names none before an undersc"),
        (["_0.png", "1_1.png", "1_2.png"], "_0.png names none before an underscore"),
        (["img_0.png", "img_1.png"], "all file names begin with img_"),
        (["48_a.png", "57_b.png", "63_c.png"], "no two file names have the same class before"),
    ],
)
def test_other_file_names_are_no_classes(tmp_path, names, why):
    source = data.folder_source(write_images(tmp_path, *names))
    assert source.class_names == () and set(labels(source)) == {0}
    assert values(source) == [names.index(name) for name in sorted(names)]
    assert f"(no classes: {why}" in source.describe()


# The order of classes

NUMBERED = ("2_0.png", "10_0.png", "1_0.png", "10_1.png")


def test_classes_are_in_string_order_as_adms_are_and_the_log_says_so(tmp_path):
    source = data.folder_source(write_images(tmp_path, *NUMBERED))
    assert source.class_names == ("1", "10", "2")
    assert dict(zip(values(source), labels(source), strict=True)) == {0: 2, 1: 1, 2: 0, 3: 1}
    assert source.describe() == (
        f"{tmp_path}: 4 examples, 3 classes: 0 = 1, 1 = 10, 2 = 2 (classes from file names, in "
        "string order, which is not that of the numbers: data.class_order 'numeric' is)"
    )


@pytest.mark.parametrize("separator", ["_", "/"])
def test_classes_are_in_the_order_of_numbers_if_asked_for(tmp_path, separator):
    write_images(tmp_path, *(name.replace("_", separator) for name in NUMBERED))
    source = data.folder_source(tmp_path, class_order="numeric")
    assert source.class_names == ("1", "2", "10")
    assert dict(zip(values(source), labels(source), strict=True)) == {0: 1, 1: 2, 2: 0, 3: 2}
    assert source.note.endswith("in numeric order")


@pytest.mark.parametrize("names", [("1/0.png", "cat/0.png"), ("1_0.png", "cat_0.png", "cat_1.png")])
def test_classes_that_are_no_numbers_have_no_order_of_numbers(tmp_path, names):
    message = f"^{tmp_path}: class 'cat' is no number, so data.class_order cannot be 'numeric'; set"
    with pytest.raises(ValueError, match=message):
        data.folder_source(write_images(tmp_path, *names), class_order="numeric")


# Where the folder's layout is not heeded


def test_labels_none_reads_one_set_of_every_image(tmp_path):
    names = ["01000/01000.png", "00000/00001.png", "00000/00000.png", "cover_1.png", "cover_2.png"]
    source = data.folder_source(write_images(tmp_path, *names), labels="none")
    assert source.class_names == () and values(source) == [2, 1, 0, 3, 4]
    assert source.note == "no classes: data.labels is 'none'"


def test_labels_from_file_names_are_read_in_sub_folders_too(tmp_path):
    names = ["a/2_0.png", "b/2_1.png", "10_0.png"]
    source = data.folder_source(write_images(tmp_path, *names), labels="file_names")
    assert source.class_names == ("10", "2")
    assert dict(zip(values(source), labels(source), strict=True)) == {0: 1, 1: 1, 2: 0}


def test_a_file_name_without_a_class_is_refused_where_names_must_have_one(tmp_path):
    write_images(tmp_path, "a/2_0.png", "b/cover.png")
    message = f"^{tmp_path}/b/cover.png: names no class before an underscore, as data.labels"
    with pytest.raises(ValueError, match=message):
        data.folder_source(tmp_path, labels="file_names")


# What is refused


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no images .*jpeg.*, nor do its sub-folders"),
        (["0.png", "a/1.png"], "images such as 0.png beside sub-folders of images such as a; put"),
    ],
)
def test_a_folder_of_images_that_is_none_is_refused(tmp_path, names, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        data.folder_source(write_images(tmp_path, *names))
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_a_class_without_images_is_refused_by_name(tmp_path):
    write_images(tmp_path, "cat/0.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/dog: holds no images, so it cannot"):
        data.folder_source(tmp_path)


def test_a_missing_folder_of_images_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such folder; data.path must name one of"):
        data.folder_source(tmp_path / "gone")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_order": "size"}, "data.class_order is 'size'; known are 'string', 'numeric'"),
        ({"labels": "all"}, "data.labels is 'all'; known are 'auto', 'file_names', 'none'"),
    ],
)
def test_unknown_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        data.folder_source(tmp_path, **changes)


def test_an_image_file_that_cannot_be_decoded_is_named(tmp_path):
    source = data.folder_source(write_images(tmp_path, "a/0.png", "a/1.png"))
    file = tmp_path / "a" / "1.png"
    file.write_bytes(file.read_bytes()[:45])
    assert source[0]["label"] == 0
    with pytest.raises(data.BadImage, match=f"^{file}: cannot be decoded .*; replace the image or"):
        source[1]
    with pytest.raises(data.BadImage, match=f"^{file}: "):
        source.__getitems__([0, 1])


def test_a_link_to_nowhere_is_a_bad_image(tmp_path):
    write_images(tmp_path, "a/0.png")
    (tmp_path / "a" / "1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(
        data.BadImage, match="a/1.png: cannot be decoded .No such file or directory"
    ):
        data.folder_source(tmp_path)[1]


def test_image_files_pickle_without_their_pixels(tmp_path):
    source = data.folder_source(write_images(tmp_path, "a/0.png", "b/1.png"))
    again = pickle.loads(pickle.dumps(source))
    for i in range(2):
        np.testing.assert_array_equal(again[i]["image"], source[i]["image"])
        assert again[i]["label"] == source[i]["label"] == i
    assert read_folder(tmp_path).files == ("a/0.png", "b/1.png")


# What tells folders apart


def test_the_identity_of_a_folder_is_that_of_its_files_and_classes(tmp_path):
    names = ["1/a.png", "1/b.png", "10/c.png", "2/d.png"]
    folder = write_images(tmp_path / "images", *names)
    identity = data.folder_source(folder).identity()
    assert identity == {
        "examples": "4", "classes": identity["classes"], "records": identity["records"],
        "autoencoder": "", "normalisation": "",
    }  # fmt: skip
    shutil.copytree(folder, tmp_path / "copy")
    assert data.folder_source(tmp_path / "copy").identity() == identity

    def changed(**settings) -> set[str]:
        found = data.folder_source(folder, **settings).identity()
        return {key for key in identity if found[key] != identity[key]}

    assert changed(class_order="numeric") == {"classes", "records"}
    (folder / "2" / "d.png").rename(folder / "2" / "e.png")
    assert changed() == {"records"}
    (folder / "2" / "e.png").rename(folder / "1" / "d.png")
    (folder / "10" / "c.png").rename(folder / "2" / "c.png")
    (folder / "10").rmdir()
    assert changed() == {"records", "classes"}


def test_a_folder_below_the_users_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "images", "a/0.png")
    assert data.folder_source("~/images").name == str(tmp_path / "images")
