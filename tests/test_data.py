"""Sources, transforms and the input pipeline: what an example is, and that nothing but the seed and
its index decides it."""

import io
import itertools
import json
import math
import pickle
import shutil
import threading
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from mdt_jax import data
from mdt_jax.data import sources
from mdt_jax.data.stream import epoch_order
from mdt_jax.data.tfds import _TfdsRecords
from mdt_jax.training.step import scale_pixels

DATA = Path(__file__).parent / "data"


def numbered(count: int) -> data.Source:
    """Examples whose label is their record's number."""
    images = np.arange(count, dtype=np.uint8).repeat(12).reshape(count, 2, 2, 3)
    return data.arrays(images, np.arange(count), [f"c{i}" for i in range(count)])


def posteriors(count: int = 20) -> data.Source:
    """Latents of mean 1 and standard deviation 2 everywhere."""
    moments = np.concatenate([np.full((count, 4, 4, 3), 1), np.full((count, 4, 4, 3), 2)], -1)
    return data.arrays(moments.astype(np.float16))


def open_batches(source, global_batch_size=6, **changes) -> data.BatchIterator:
    settings = {"seed": 0, "process_index": 0, "process_count": 1, "flip": False} | changes
    return data.create_batches(source, global_batch_size=global_batch_size, **settings)


def take(batches, count: int) -> list:
    with batches:
        return list(itertools.islice(batches, count))


def labels_of(batches: list) -> list[int]:
    return np.concatenate([batch["label"] for batch in batches]).tolist()


def global_labels(source, count: int, process_count: int, **changes) -> list[int]:
    """The labels of `count` global batches, each put together from every process's rows."""
    parts = [
        take(open_batches(source, process_index=p, process_count=process_count, **changes), count)
        for p in range(process_count)
    ]
    return [label for rows in zip(*parts, strict=True) for label in labels_of(rows)]


# Sources


def test_digits_heldout_is_every_sixth_scan_and_train_all_the_others():
    train, heldout, everything = (data.digits(s) for s in ("train", "heldout", "all"))
    scans = load_digits()
    numbers = np.arange(1797)
    for source, chosen in (
        (train, numbers[numbers % 6 != 5]),
        (heldout, numbers[5::6]),
        (everything, numbers),
    ):
        assert [source[i]["label"] for i in range(len(source))] == scans.target[chosen].tolist()
        images = np.stack([source[i]["image"][..., 0] for i in range(len(source))])
        np.testing.assert_array_equal(np.rint(images / 255 * 16), scans.images[chosen])
    assert (len(train), len(heldout), len(everything)) == (1498, 299, 1797)


def test_digits_are_uint8_8x8_gray_of_ten_named_classes():
    source = data.digits()
    assert source[0]["image"].dtype == np.uint8 and source[0]["label"].dtype == np.int32
    assert source[0]["image"].shape == source.image_shape == (8, 8, 1)
    assert source.class_names == tuple("0123456789") and not source.latents


def test_a_source_refuses_an_index_it_does_not_hold():
    with pytest.raises(IndexError, match=r"arrays: no example 5; it holds 0 \.\.\. 4"):
        numbered(5)[5]


def test_a_block_of_examples_is_those_examples():
    source = numbered(5)
    block = source.__getitems__([3, 0, 3])
    assert [example["label"] for example in block] == [3, 0, 3]
    np.testing.assert_array_equal(block[0]["image"], source[3]["image"])
    assert block[0]["label"].dtype == np.int32
    with pytest.raises(IndexError, match="arrays: no example 5"):
        source.__getitems__([1, 5])


class Blocks:
    """Records that are read in blocks, and count how many."""

    def __init__(self):
        self.blocks = []

    def __len__(self):
        return 9

    def __getitem__(self, index):
        raise AssertionError("read one by one")

    def __getitems__(self, indices):
        self.blocks.append(list(indices))
        return [(np.full((2, 2, 1), index, np.uint8), index) for index in indices]


def test_records_that_read_blocks_are_asked_for_them():
    records = Blocks()
    source = data.Source("blocks", records, (2, 2, 1), tuple("abcdefghi"))
    assert [example["label"] for example in source.__getitems__([7, 1])] == [7, 1]
    assert records.blocks == [[7, 1]]


@pytest.mark.parametrize("names", [(), ("a", "b", "c")])
def test_a_label_that_is_no_class_is_refused_naming_its_record(names):
    source = data.Source("nine", Blocks(), (2, 2, 1), names)
    with pytest.raises(ValueError, match=f"nine: record 4 has label 4; with {len(names)} classes"):
        source.__getitems__([4])


def test_a_source_describes_itself_in_one_line():
    assert data.digits("heldout").describe() == "digits/heldout: 299 examples, 10 classes: " + (
        ", ".join(f"{digit} = {digit}" for digit in range(10))
    )
    many = numbered(200).describe()
    assert many.startswith("arrays: 200 examples, 200 classes: 0 = c0, 1 = c1, ")
    assert many.endswith(" 9 = c9, ..., 199 = c199")
    assert data.arrays(np.zeros((3, 2, 2, 1), np.uint8)).describe() == "arrays: 3 examples"


def test_arrays_without_labels_are_unconditional():
    source = data.arrays(np.zeros((3, 2, 2, 1), np.uint8))
    assert source.class_names == () and source[2]["label"] == 0


def test_classes_without_names_are_called_by_their_numbers():
    source = data.arrays(np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 2, 1]))
    assert source.class_names == ("0", "1", "2")


def write_folder(folder: Path, **files) -> Path:
    for name, content in files.items():
        if name == "class_names":
            (folder / "class_names.txt").write_text("\n".join(content) + "\n")
        else:
            np.save(folder / f"{name}.npy", content)
    return folder


IMAGES = np.arange(4 * 3 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3, 3)


def test_a_folder_of_pixels_gives_back_what_was_saved(tmp_path):
    write_folder(tmp_path, images=IMAGES, labels=np.array([1, 0, 1, 1]), class_names=["cat", "dog"])
    source = data.npy_directory(tmp_path)
    assert source.class_names == ("cat", "dog") and source.image_shape == (3, 3, 3)
    assert [source[i]["label"] for i in range(4)] == [1, 0, 1, 1]
    np.testing.assert_array_equal(np.stack([source[i]["image"] for i in range(4)]), IMAGES)


def test_a_folder_of_latents_gives_float32_posteriors_of_twice_the_channels(tmp_path):
    moments = np.random.default_rng(0).normal(size=(4, 2, 2, 8)).astype(np.float16)
    source = data.npy_directory(write_folder(tmp_path, latents=moments))
    assert source.latents and source.image_shape == (2, 2, 4)
    assert source[1]["image"].dtype == np.float32
    np.testing.assert_array_equal(source[1]["image"], moments[1])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no images.npy or latents.npy; data.path must name"),
        ({"images": IMAGES, "latents": np.ones((4, 2, 2, 8))}, "both images.npy and latents.npy"),
        ({"images": IMAGES[0]}, r"images of shape \(3, 3, 3\); they must be \(count, height"),
        ({"images": IMAGES / 255}, "images.npy: holds float64; images.npy must be uint8"),
        ({"images": IMAGES.astype(np.uint16)}, "images of type uint16; they must be uint8"),
        ({"latents": IMAGES}, "latents.npy: holds uint8; images.npy must be uint8"),
        ({"latents": np.ones((4, 2, 2, 7))}, "latents of 7 channels; they must be even"),
        ({"images": IMAGES, "labels": np.zeros(3, int)}, r"labels of shape \(3,\).* for 4 images"),
        ({"images": IMAGES, "labels": np.zeros(4)}, "type float64 for 4 images"),
        ({"images": IMAGES, "labels": np.array([0, -1, 1, 1])}, "label -1; labels count from 0"),
        (
            {"images": IMAGES, "labels": np.array([0, 2, 1, 1]), "class_names": ["cat", "dog"]},
            r"label 2 with 2 class names; labels must be 0 \.\.\. 1",
        ),
        ({"images": IMAGES, "class_names": ["cat"]}, "1 class names but no labels"),
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused_in_one_line(tmp_path, files, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        data.npy_directory(write_folder(tmp_path, **files))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such folder; data.path must name"):
        data.npy_directory(tmp_path / "gone")


def test_a_cut_off_file_is_named(tmp_path):
    file = write_folder(tmp_path, images=IMAGES) / "images.npy"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="images.npy: cannot be memory-mapped"):
        data.npy_directory(tmp_path)


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="arrays: holds no examples"):
        data.arrays(np.zeros((0, 2, 2, 1), np.uint8))


def write_images(folder: Path, *names: str) -> Path:
    """Image files of 5 x 6 pixels whose values are their place in the list."""
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (value,) * 3).save(folder / name)
    return folder


def test_image_files_pickle_and_are_cropped(tmp_path):
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(6)]
    source = data.folder_source(write_images(tmp_path, *names))
    again = pickle.loads(pickle.dumps(source))
    for i in range(6):
        np.testing.assert_array_equal(again[i]["image"], source[i]["image"])
    (batch,) = take(open_batches(source, image_size=4), 1)
    assert batch["image"].shape == (6, 4, 4, 3)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] % 2, batch["label"])


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory) -> Path:
    """A data folder of TFDS with `shapes`: five images of growing height, of two classes. The
    first is gray, the second CMYK."""
    import tensorflow_datasets as tfds  # only here: the other tests should not wait for it

    def encoded(value):
        file = io.BytesIO()
        rgb = Image.new("RGB", (8, 8 + value), (value,) * 3)
        if value == 1:
            rgb.convert("CMYK").save(file, "JPEG", quality=100)
        else:
            (rgb.convert("L") if value == 0 else rgb).save(file, "PNG")
        file.seek(0)
        return file

    with tfds.core.registered.skip_registration():

        class Shapes(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["round", "square"]),
                    "depth": tfds.features.Image(shape=(None, None, 1)),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, _):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i in range(5):
                    yield i, {"image": encoded(i), "label": i % 2, "depth": encoded(0)}

    folder = tmp_path_factory.mktemp("tfds")
    Shapes(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_gives_the_images_and_labels_that_were_prepared(tfds_folder):
    source = data.tfds_source("shapes", "train", tfds_folder)
    assert source.class_names == ("round", "square") and source.image_shape == (None, None, 3)
    examples = [source[i] for i in range(len(source))]
    values = [int(example["image"][0, 0, 0]) for example in examples]
    assert sorted(values) == [0, 1, 2, 3, 4]
    assert [example["image"].shape[0] for example in examples] == [8 + value for value in values]
    assert [example["label"] for example in examples] == [value % 2 for value in values]
    assert {example["image"].shape[1:] for example in examples} == {(8, 3)}


def test_tfds_blocks_are_their_examples(tfds_folder):
    source = data.tfds_source("shapes", "train", tfds_folder)
    for i, example in zip((4, 0), source.__getitems__([4, 0]), strict=True):
        np.testing.assert_array_equal(example["image"], source[i]["image"])
        assert example["label"] == source[i]["label"]


@pytest.mark.parametrize("name", ["shapes", "shapes:1.0.0", ""])
def test_tfds_data_are_also_read_from_their_own_folder(tfds_folder, name):
    source = data.tfds_source(name, "train[:3]", tfds_folder / "shapes" / "1.0.0")
    assert len(source) == 3 and source.class_names == ("round", "square")


def test_a_folder_of_other_tfds_data_is_refused(tfds_folder):
    with pytest.raises(ValueError, match="1.0.0: holds shapes, not cifar10; set data.name to 'tfd"):
        data.tfds_source("cifar10", "train", tfds_folder / "shapes" / "1.0.0")


@pytest.mark.parametrize("name", ["imagenet2012", "lsun/bedroom"])
def test_tfds_names_with_code_of_their_own_are_read_from_what_is_on_disk(
    tfds_folder, tmp_path, name
):
    base, _, config = name.partition("/")
    folder = tmp_path / name / "1.0.0"
    shutil.copytree(tfds_folder / "shapes" / "1.0.0", folder)
    for file in folder.glob("shapes-*"):
        file.rename(file.with_name(file.name.replace("shapes", base)))
    info = folder / "dataset_info.json"
    changed = {"name": base, "configName": config, "version": "1.0.0"}
    info.write_text(json.dumps(json.loads(info.read_text()) | changed))
    source = data.tfds_source(name, "train", tmp_path)
    assert source.name == f"tfds:{name}/train" and source[4]["image"].shape[1:] == (8, 3)


def test_images_that_vary_in_size_need_an_image_size(tfds_folder):
    source = data.tfds_source("shapes", "train", tfds_folder)
    with pytest.raises(ValueError, match="tfds:shapes/train: its images vary in size; set image_s"):
        open_batches(source)
    (batch,) = take(open_batches(source, image_size=8), 1)
    assert batch["image"].shape == (6, 8, 8, 3)


@pytest.mark.parametrize("name", ["mnist", "no_such_dataset"])
def test_tfds_data_not_on_disk_are_refused_naming_the_folder(tmp_path, name):
    with pytest.raises(
        FileNotFoundError, match=f"tfds:{name}: not in {tmp_path}; prepare"
    ) as caught:
        data.tfds_source(name, "train", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("imagenet2012", "--imagenet ILSVRC2012_img_train.tar"),
        ("lsun/bedroom", "--lmdb DIR"),
        ("mine:1.0.0", r"--folder DIR \(or --parquet GLOB\) --name mine"),
    ],
)
def test_tfds_data_not_on_disk_are_refused_with_the_command_that_prepares_them(
    tmp_path, name, options
):
    command = f"`mdt prepare-dataset {options} --data_dir {tmp_path}`"
    with pytest.raises(FileNotFoundError, match=f"prepare it with {command}, or name the folder"):
        data.tfds_source(name, "train", tmp_path)


def test_what_is_no_tfds_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tfds:my data: no name of a TFDS dataset, which is NAME"):
        data.tfds_source("my data", "train", tmp_path)


def test_a_tfds_description_that_cannot_be_read_is_refused(tfds_folder, tmp_path):
    shutil.copytree(tfds_folder / "shapes", tmp_path / "shapes")
    info = tmp_path / "shapes" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text()[:50])
    for folder in (tmp_path, info.parent):
        with pytest.raises(ValueError, match=f"tfds:shapes: the description in {folder} .* cannot"):
            data.tfds_source("shapes", "train", folder)


@pytest.mark.parametrize("names", ["round\nflat\nand\n", "round\n"])
def test_a_tfds_list_of_more_or_fewer_names_than_classes_is_refused(tfds_folder, tmp_path, names):
    """As a class whose name held a newline would leave it."""
    shutil.copytree(tfds_folder / "shapes", tmp_path / "shapes")
    folder = tmp_path / "shapes" / "1.0.0"
    (folder / "label.labels.txt").write_text(names)
    count = names.count("\n")
    message = f"{folder}/label.labels.txt has {count} names of classes, features.json says 2;"
    with pytest.raises(ValueError, match=message):
        data.tfds_source("shapes", "train", tmp_path)


@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_a_tfds_file_that_cannot_be_read_is_refused(tfds_folder, tmp_path, damage):
    shutil.copytree(tfds_folder / "shapes", tmp_path / "shapes")
    (file,) = (tmp_path / "shapes" / "1.0.0").glob("shapes-train*")
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="tfds:shapes/train: a file of it is damaged or missing"):
        data.tfds_source("shapes", "train", tmp_path)[0]


def test_a_damaged_image_of_a_tfds_dataset_is_named_by_its_record():
    class Examples(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    records = _TfdsRecords("tfds:x/train", Examples([{"image": b"no image"}]), False, 3)
    with pytest.raises(data.BadImage, match="tfds:x/train: record 0: cannot be decoded .no image"):
        data.Source("tfds:x/train", records, (None, None, 3))[0]


def test_tfds_unknown_split_is_refused_naming_those_there_are(tfds_folder):
    with pytest.raises(ValueError, match="cannot read split 'val'.*; there are train"):
        data.tfds_source("shapes", "val", tfds_folder)


def test_tfds_data_without_random_access_are_refused(tfds_folder, tmp_path):
    shutil.copytree(tfds_folder / "shapes", tmp_path / "shapes")
    info = tmp_path / "shapes" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="holds tfrecord files, which have no random access"):
        data.tfds_source("shapes", "train", tmp_path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("picture", "tfds:shapes: no feature 'image'; it has .*picture"),
        ("image", "tfds:shapes: images of type uint16 and shape .*; they must be uint8"),
    ],
)
def test_tfds_data_without_uint8_images_are_refused(tfds_folder, tmp_path, image, message):
    shutil.copytree(tfds_folder / "shapes", tmp_path / "shapes")
    file = tmp_path / "shapes" / "1.0.0" / "features.json"
    written = json.loads(file.read_text())
    features = written["featuresDict"]["features"]
    features[image] = features.pop("image")
    features[image]["image"]["dtype"] = "uint16"
    file.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=message):
        data.tfds_source("shapes", "train", tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "cifar"}, "data.name is 'cifar'; known are 'digits', 'fashion_mnist', 'fo"),
        ({"name": "digits", "split": "val"}, "digits: no split 'val'; there are train, heldout"),
        ({"name": "npy"}, "data.name 'npy' needs data.path"),
        ({"name": "npy", "path": "x", "split": "test"}, "data.split is 'test', but a folder"),
        ({"name": "folder"}, "data.name 'folder' needs data.path, the folder of images"),
        ({"name": "folder", "path": "x", "split": "test"}, "data.split is 'test', but a folder"),
        ({"name": "folder", "path": "x", "class_order": "age"}, "data.class_order is 'age'; known"),
        (
            {"name": "folder", "path": "x", "labels": "all"},
            "data.labels is 'all'; known are 'auto'",
        ),
        (
            {"name": "latents", "path": "gs://bucket/latents"},
            "^data.path gs://bucket/latents is a URL: mount the bucket .gcsfuse",
        ),
    ],
)
def test_a_configuration_that_names_no_data_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        data.create_source(ml_collections.ConfigDict(config))


def test_a_configuration_chooses_dataset_split_and_folder(tmp_path, tfds_folder):
    def create(**config):
        return data.create_source(ml_collections.ConfigDict(config))

    assert len(create(name="digits")) == 1498
    assert len(create(name="digits", split="heldout")) == 299
    assert len(create(name="npy", path=str(write_folder(tmp_path, images=IMAGES)))) == 4
    assert len(create(name="folder", path=str(write_images(tmp_path / "files", "a/0.png")))) == 1
    numbers = str(write_images(tmp_path / "numbers", "2_0.png", "10_0.png", "2_1.png"))
    assert create(name="folder", path=numbers).class_names == ("10", "2")
    assert create(name="folder", path=numbers, class_order="numeric").class_names == ("2", "10")
    assert create(name="folder", path=numbers, labels="none").class_names == ()
    assert len(create(name="tfds:shapes", path=str(tfds_folder), split="train[:2]")) == 2


def test_a_new_data_set_is_one_function_and_one_line(monkeypatch):
    def halves(data_config):
        return data.arrays(IMAGES[:2] if data_config.split == "first" else IMAGES[2:])

    monkeypatch.setitem(sources.SOURCES, "halves", halves)
    source = data.create_source(ml_collections.ConfigDict({"name": "halves", "split": "first"}))
    np.testing.assert_array_equal(source[1]["image"], IMAGES[1])
    with pytest.raises(ValueError, match="'npy', 'tfds:NAME' and 'halves'"):
        data.create_source(ml_collections.ConfigDict({"name": "thirds"}))


# Transforms


@pytest.mark.parametrize(
    "crop",
    ["china/64", "china/256", "flower/64", "flower/256", "tall/256", "exact/64", "exact/256"],
)
def test_center_crop_equals_adm_bit_for_bit(crop):
    photo, size = crop.split("/")
    china, flower = load_sample_images().images
    whole = {
        "china": china,
        "flower": flower,
        "tall": china[:, 200:317],
        "exact": flower[:256, :256],
    }
    expected = np.load(DATA / "preprocess.npz")[crop]
    np.testing.assert_array_equal(data.center_crop(whole[photo], int(size)), expected)


def test_center_crop_of_gray_is_that_of_equal_rgb_channels():
    gray = load_sample_images().images[0][..., :1]
    rgb = data.center_crop(gray.repeat(3, axis=2), 32)
    np.testing.assert_array_equal(data.center_crop(gray, 32), rgb[..., :1])


@pytest.mark.parametrize("shape", [(9, 9, 2), (0, 9, 3)])
def test_crops_refuse_what_they_cannot_resize(shape):
    image = np.zeros(shape, np.uint8)
    for crop in (data.center_crop, lambda *args: data.random_crop(*args, np.random.default_rng(0))):
        with pytest.raises(
            ValueError, match=f"shape .{str(shape)[1:-1]}.: it must have pixels, and"
        ):
            crop(image, 4)


def adm_resize(image: np.ndarray, size: int) -> np.ndarray:
    """ADM's halving and resizing, without our limit on an image's length."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), Image.BOX)
    scale = size / min(picture.size)
    return np.asarray(picture.resize(tuple(round(x * scale) for x in picture.size), Image.BICUBIC))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200, 301])
def test_an_image_one_pixel_wide_is_cropped_as_adm_would(length):
    image = np.random.default_rng(0).integers(0, 256, (length, 1, 3), np.uint8)
    whole = adm_resize(image, 16)
    top = (len(whole) - 16) // 2
    np.testing.assert_array_equal(data.center_crop(image, 16), whole[top : top + 16])
    turned = data.center_crop(image.transpose(1, 0, 2), 16)
    np.testing.assert_array_equal(turned, data.center_crop(image, 16).transpose(1, 0, 2))


def test_an_image_one_pixel_wide_takes_no_gigabytes():
    image = np.zeros((60_000, 1, 3), np.uint8)  # enlarged whole, 12 GB
    assert data.center_crop(image, 256).shape == (256, 256, 3)
    assert data.random_crop(image, 256, np.random.default_rng(0)).shape == (256, 256, 3)


def random_crops(image: np.ndarray, size: int, count: int) -> list[tuple[int, int, int]]:
    """The shorter side, top and left of random crops, found by trying every place."""
    rng, found = np.random.default_rng(0), []
    short = range(size, math.ceil(size / 0.8) + 1)
    resized = {side: adm_resize(image, side) for side in short}
    for _ in range(count):
        crop = data.random_crop(image, size, rng)
        found += [
            (side, top, left)
            for side, whole in resized.items()
            for top in range(whole.shape[0] - size + 1)
            for left in range(whole.shape[1] - size + 1)
            if np.array_equal(whole[top : top + size, left : left + size], crop)
        ]
    return found


def test_random_crops_are_adms_at_every_size_and_place():
    photo = load_sample_images().images[0][:40, :50]
    found = random_crops(photo, 16, 1500)
    assert len(found) == 1500  # each is a window of ADM's resized image, and of one only
    # 16 ... 20, all equally often; and for each, every top and left.
    sizes = [side for side, _, _ in found]
    assert all(240 < sizes.count(side) < 360 for side in range(16, 21))  # 300 +- 3.9 sigma
    for side in range(16, 21):
        width = round(50 * side / 40)
        assert {top for s, top, _ in found if s == side} == set(range(side - 16 + 1))
        assert {left for s, _, left in found if s == side} == set(range(width - 16 + 1))


def test_random_crop_is_a_function_of_its_generator():
    photo = load_sample_images().images[1]
    first, again, other = (
        data.random_crop(photo, 64, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_random_crop_of_a_large_photograph_halves_first():
    photo = load_sample_images().images[0]  # 427 x 640: halved twice for 64 ... 80
    crop = data.random_crop(photo, 64, np.random.default_rng(0), min_fraction=1.0)
    whole = adm_resize(photo, 64)
    assert any(np.array_equal(whole[:, left : left + 64], crop) for left in range(96 - 64 + 1))


@pytest.mark.parametrize("fractions", [(0.0, 1.0), (0.9, 0.8), (0.8, 1.1)])
def test_random_crop_refuses_fractions_out_of_order(fractions):
    with pytest.raises(ValueError, match=f"min_fraction {fractions[0]} and max_fraction"):
        data.random_crop(np.zeros((9, 9, 3), np.uint8), 4, np.random.default_rng(0), *fractions)


def test_to_unit_range_maps_0_and_255_to_the_ends():
    pixels = data.to_unit_range(np.array([[[0, 51, 255]]], np.uint8))
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels.ravel(), [-1, -0.6, 1], rtol=0, atol=1e-7)


LEVELS = np.arange(256, dtype=np.uint8)


def test_every_level_is_scaled_to_adms_bits_on_the_host_and_in_a_compiled_step():
    adms = LEVELS.astype(np.float32) / 127.5 - 1
    assert adms.dtype == np.float32
    np.testing.assert_array_equal(data.to_unit_range(LEVELS), adms)
    np.testing.assert_array_equal(scale_pixels(jax.numpy.asarray(LEVELS)), adms)
    np.testing.assert_array_equal(jax.jit(scale_pixels)(LEVELS), adms)
    # What becomes of the division when a compiler makes it a product is told apart.
    assert np.any(LEVELS * np.float32(1 / 127.5) - np.float32(1) != adms)


# The pipeline on the host


def test_batches_are_uint8_images_and_int32_labels():
    (batch,) = take(open_batches(data.digits(), 16), 1)
    assert batch["image"].shape == (16, 8, 8, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (16,) and batch["label"].dtype == np.int32
    assert batch["image"].min() == 0 and batch["image"].max() == 255


def test_an_image_stays_with_its_label():
    for batch in take(open_batches(numbered(17)), 4):
        np.testing.assert_array_equal(
            batch["image"], np.ones((6, 2, 2, 3)) * batch["label"][:, None, None, None]
        )


def test_order_and_mirroring_of_a_seed_never_change():
    # If this fails, runs resumed with the new code no longer continue those of the old.
    for seed, order in ((0, "0291854367"), (2**64 - 1, "8907426315")):
        labels = labels_of(take(open_batches(numbered(10), 10, seed=seed), 1))
        assert labels == [int(digit) for digit in order]
    slope = data.arrays(np.array([0, 255], np.uint8).reshape(1, 1, 2, 1))
    (batch,) = take(open_batches(slope, 12, flip=True), 1)
    assert (batch["image"][:, 0, 0, 0] == 255).tolist() == [
        i in (1, 6, 7, 9, 11) for i in range(12)
    ]


def test_two_epochs_lose_and_double_nothing_and_differ_in_order():
    labels = labels_of(take(open_batches(numbered(30)), 10))
    first, second = labels[:30], labels[30:]
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second and first != sorted(first)


def test_seeds_differ_in_order():
    first, second = (take(open_batches(numbered(30), 30, seed=s), 2) for s in (0, 1))
    assert labels_of(first[:1]) != labels_of(second[:1])
    # A seed that only shifted another's epochs would repeat them.
    assert labels_of(first[1:]) != labels_of(second[:1])


def test_every_order_is_about_equally_likely():
    orders = [tuple(epoch_order(0, epoch, 4)) for epoch in range(4800)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == 4800 and min(counts) > 140 and max(counts) < 260  # 200 +- 4.2 sigma


@pytest.mark.parametrize("process_count", [2, 3, 4])
def test_any_number_of_processes_delivers_the_same_global_order(process_count):
    source = numbered(31)
    assert global_labels(source, 5, process_count, global_batch_size=12) == labels_of(
        take(open_batches(source, 12), 5)
    )


def test_each_process_has_its_own_rows_of_the_global_batch():
    source = numbered(31)
    whole = labels_of(take(open_batches(source, 12), 1))
    (third,) = take(open_batches(source, 12, process_index=2, process_count=3), 1)
    assert third["label"].tolist() == whole[8:12]


@pytest.mark.parametrize("position", [0, 12, 17, 25, 31, 100])
@pytest.mark.parametrize(("process_count", "batch_size"), [(1, 12), (2, 8), (3, 9)])
def test_a_run_resumed_anywhere_goes_on_as_it_would_have(position, process_count, batch_size):
    source = numbered(25)
    whole = labels_of(take(open_batches(source), 24))
    resumed = global_labels(
        source, 3, process_count, global_batch_size=batch_size, position=position
    )
    assert resumed == whole[position : position + 3 * batch_size]


def test_position_counts_what_all_processes_were_given_not_what_is_read_ahead():
    with open_batches(numbered(25), 12, process_count=3, position=7, read_ahead=8) as batches:
        assert batches.position == 7
        next(batches)
        next(batches)
        assert batches.position == 7 + 24


@pytest.mark.parametrize("source", [data.digits(), posteriors()], ids=["pixels", "latents"])
def test_mirroring_belongs_to_seed_and_index_alone(source):
    stream = data.ExampleStream(source, seed=3, flip=True)
    expected = np.stack([stream[i]["image"] for i in reversed(range(9, 45))])[::-1]
    for process_count, batch_size in ((1, 12), (2, 6), (3, 36)):
        processes = [
            take(
                open_batches(
                    source,
                    batch_size,
                    seed=3,
                    flip=True,
                    position=9,
                    process_index=p,
                    process_count=process_count,
                ),
                36 // batch_size,
            )
            for p in range(process_count)
        ]
        images = [rows["image"] for step in zip(*processes, strict=True) for rows in step]
        np.testing.assert_array_equal(np.concatenate(images), expected)


def test_an_image_is_mirrored_in_half_of_its_epochs():
    source = data.digits("heldout")
    plain, mirrored = (data.ExampleStream(source, seed=0, flip=flip) for flip in (False, True))
    indices = range(len(source), len(source) + 200)
    flipped = [not np.array_equal(plain[i]["image"], mirrored[i]["image"]) for i in indices]
    np.testing.assert_array_equal(
        mirrored[indices[flipped.index(True)]]["image"],
        plain[indices[flipped.index(True)]]["image"][:, ::-1],
    )
    assert 65 < sum(flipped) < 135


def test_workers_deliver_what_threads_do(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 4, 4, 3), np.uint8)
    source = data.npy_directory(write_folder(tmp_path, images=images, labels=np.arange(20)))
    settings = {"flip": True, "position": 5}
    threads = take(open_batches(source, **settings), 6)
    workers = take(open_batches(source, num_workers=2, **settings), 6)
    for expected, batch in zip(threads, workers, strict=True):
        assert type(batch["image"]) is np.ndarray  # not Grain's shared memory
        np.testing.assert_array_equal(batch["image"], expected["image"])
        np.testing.assert_array_equal(batch["label"], expected["label"])


def test_a_memory_mapped_source_travels_to_workers_as_its_path(tmp_path):
    images = np.zeros((100, 32, 32, 3), np.uint8)
    source = data.npy_directory(write_folder(tmp_path, images=images))
    assert len(pickle.dumps(source)) < 2000
    assert pickle.loads(pickle.dumps(source))[99]["image"].shape == (32, 32, 3)


class FailsOnce:
    """Records, of which number 3 cannot be read the first time."""

    def __init__(self):
        self.failed = False

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 3 and not self.failed:
            self.failed = True
            raise OSError("the disk is away")
        return np.full((2, 2, 1), index, np.uint8), index


def test_a_record_that_fails_is_named_and_trying_again_gives_the_batch_owed():
    names = tuple(str(i) for i in range(20))
    records = FailsOnce()
    source = data.Source("flaky", records, (2, 2, 1), names)
    with open_batches(source, 5) as batches:
        delivered, errors = [], []
        while len(delivered) < 4:
            try:
                delivered.append(next(batches))
            except OSError as error:
                errors.append(error)
        assert batches.position == 20
    (error,) = errors
    assert str(error) == "the disk is away (in record 3 of flaky, example 12 of the run)"
    assert labels_of(delivered) == labels_of(take(open_batches(source, 5), 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_index": 2, "process_count": 2}, "process_index is 2 of process_count 2"),
        ({"process_count": 4}, "global_batch_size is 6, for 4 processes; it must be a positive"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"position": -1}, "position is -1; it must be at least 0"),
        ({"num_workers": -1}, "num_workers is -1; it must be at least 0"),
        ({"read_ahead": 0}, "read_ahead is 0; it must be at least 1"),
        ({"seed": -1}, r"seed is -1; it must be in 0 \.\.\. 2\*\*64 - 1"),
        ({"image_size": 0}, "image_size is 0; it must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        open_batches(numbered(5), **changes)


def test_latents_are_not_resized():
    with pytest.raises(ValueError, match="latents are 4 x 4 and cannot be resized to image_size 8"):
        open_batches(posteriors(), image_size=8)


# From the host to the devices

SHARDING = jax.sharding.NamedSharding(
    jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",)), jax.sharding.PartitionSpec("data")
)


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch_to_device" for thread in threading.enumerate())


def wait_until(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_prefetch_delivers_the_same_batches_as_global_arrays_in_order():
    expected = take(open_batches(data.digits(), 16), 5)
    with (
        open_batches(data.digits(), 16) as batches,
        data.prefetch_to_device(batches, SHARDING) as prefetched,
    ):
        for want, got in zip(expected, prefetched, strict=False):
            assert isinstance(got["image"], jax.Array) and got["image"].sharding == SHARDING
            np.testing.assert_array_equal(got["image"], want["image"])
            np.testing.assert_array_equal(got["label"], want["label"])


def test_prefetch_ends_where_its_batches_end():
    batches = [{"x": np.full(2, i)} for i in range(3)]
    prefetched = data.prefetch_to_device(batches, SHARDING, depth=5)
    assert [int(batch["x"][0]) for batch in prefetched] == [0, 1, 2]
    assert next(prefetched, None) is None
    assert wait_until(lambda: prefetch_threads() == 0)


def test_an_error_reaches_the_consumer_after_the_batches_before_it():
    broken = OSError("the disk is away")

    def batches():
        yield {"x": np.zeros(2)}
        yield {"x": np.ones(2)}
        raise broken

    with data.prefetch_to_device(batches(), SHARDING) as prefetched:
        assert [int(next(prefetched)["x"][0]) for _ in range(2)] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is away") as caught:
                next(prefetched)
            assert caught.value is broken


def test_prefetch_takes_depth_batches_ahead_and_no_more():
    taken = 0

    def batches():
        nonlocal taken
        while True:
            taken += 1
            yield {"x": np.zeros(2)}

    with data.prefetch_to_device(batches(), SHARDING, depth=2) as prefetched:
        for consumed in range(3):
            assert wait_until(lambda ahead=consumed + 2: taken == ahead)
            time.sleep(0.05)
            assert taken == consumed + 2
            next(prefetched)


def test_closing_ends_the_thread_and_the_iterator():
    prefetched = data.prefetch_to_device(({"x": np.zeros(2)} for _ in itertools.count()), SHARDING)
    next(prefetched)
    assert prefetch_threads() == 1
    prefetched.close()
    prefetched.close()
    assert prefetch_threads() == 0
    with pytest.raises(ValueError, match="iterator is closed"):
        next(prefetched)


def test_dropping_the_iterator_ends_the_thread():
    prefetched = data.prefetch_to_device(({"x": np.zeros(2)} for _ in itertools.count()), SHARDING)
    next(prefetched)
    del prefetched
    assert wait_until(lambda: prefetch_threads() == 0)


def test_a_depth_of_zero_is_refused():
    with pytest.raises(ValueError, match="depth is 0; it must be at least 1"):
        data.prefetch_to_device([], SHARDING, depth=0)
