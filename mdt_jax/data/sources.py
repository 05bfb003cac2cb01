"""Where examples come from: random-access sources of images and labels, one function per dataset.

A source decodes an example only when it is asked for it, and knows nothing of order, epochs,
batches or processes: those are the pipeline's. A new dataset is one function that returns a
`Source`, and one line in `create_source`.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_collections
import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@runtime_checkable
class Records(Protocol):
    """What a `Source` reads from. It must pickle, to travel to the pipeline's worker processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Record `index` of 0 ... len(self) - 1 as (image, label), label 0 where there is none."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset with random access: `source[i]` for 0 <= i < `len(source)`.

    Attributes:
        name: how messages call it.
        records: what is read, one record an example.
        image_shape: (height, width, channels) of an image as a model sees it; height and width
            are None where they vary, and the pipeline then needs an `image_size`.
        class_names: the name of each label, in order; empty for an unconditional dataset, whose
            labels are all 0.
        latents: False for pixels, uint8. True for an autoencoder's latents: an example's "image"
            is then the posterior, float32 of shape (height, width, 2 * channels), the mean's
            channels before the standard deviation's, and the pipeline draws a latent from it.
    """

    name: str
    records: Records
    image_shape: tuple[int | None, int | None, int]
    class_names: tuple[str, ...] = ()
    latents: bool = False

    def __post_init__(self):
        if len(self.records) == 0:
            raise ValueError(f"{self.name}: holds no examples; a source needs at least one")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 (H, W, C) or float32 (h, w, 2c), "label": np.int32}.

        Raises:
            IndexError: `index` is not in 0 ... len(self) - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: no example {index}; it holds 0 ... {len(self) - 1}")
        image, label = self.records[index]
        return {
            "image": np.asarray(image, np.float32 if self.latents else np.uint8),
            "label": np.int32(label),
        }


def digits(split: str = "train") -> Source:
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 gray, which need no download.

    Its values 0 ... 16 become round(value * 255 / 16) in uint8, and round(pixel * 16 / 255) gives
    them back.

    Args:
        split: "heldout" is every sixth scan, those whose index leaves 5 when divided by 6 (299);
            "train" is the rest (1,498); "all" is both, in scikit-learn's order.

    Raises:
        ValueError: an unknown split.
    """
    from sklearn.datasets import load_digits  # over a second to import

    scans = load_digits()
    heldout = np.arange(len(scans.target)) % 6 == 5
    splits = {"train": ~heldout, "heldout": heldout, "all": np.full_like(heldout, True)}
    if split not in splits:
        raise ValueError(f"digits: no split {split!r}; there are {', '.join(splits)}")
    chosen = splits[split]
    images = np.rint(scans.images[chosen] * (255 / 16)).astype(np.uint8)
    names = tuple(str(name) for name in scans.target_names)
    return dataclasses.replace(
        arrays(images[..., None], scans.target[chosen], names), name=f"digits/{split}"
    )


def arrays(
    images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"],
    labels: Integer[np.ndarray, "n"] | None = None,
    class_names: Sequence[str] = (),
) -> Source:
    """Examples in memory.

    Args:
        images: uint8 pixels; or floating-point posteriors of latents, whose channels are the
            mean's followed by as many of the standard deviation.
        labels: one per image; None for an unconditional dataset.
        class_names: one per class; with labels and no names, the classes are called "0", "1", ...
            up to the largest label.

    Raises:
        ValueError: the arrays do not fit each other, or the labels the names.
    """
    return _from_arrays("arrays", images, labels, class_names)


def npy_directory(path: str | Path) -> Source:
    """Examples in a folder of NumPy files, memory-mapped: nothing is read before it is used.

    Args:
        path: a folder with either `images.npy`, uint8 (n, h, w, c), or `latents.npy`, float16 or
            float32 (n, h, w, 2c), posterior means before standard deviations; and, where they
            have classes, `labels.npy`, integers (n,), with `class_names.txt`, a name per line,
            or without (the names are then "0", "1", ... up to the largest label).

    Raises:
        FileNotFoundError: no such folder, or nothing to read in it.
        ValueError: a file that cannot be read, or files that do not fit each other.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; data.path must name one with images.npy or latents.npy"
        )
    present = [name for name in ("images.npy", "latents.npy") if (folder / name).exists()]
    if len(present) != 1:
        found = "both images.npy and latents.npy" if present else "no images.npy or latents.npy"
        error = ValueError if present else FileNotFoundError
        raise error(f"{folder}: holds {found}; data.path must name a folder with one of them")

    images = _MemoryMap(folder / present[0])
    if images.array.dtype.kind != ("u" if present[0] == "images.npy" else "f"):
        raise ValueError(
            f"{images.path}: holds {images.array.dtype}; images.npy must be uint8 pixels, "
            "latents.npy floating-point posteriors"
        )
    names_file, labels_file = folder / "class_names.txt", folder / "labels.npy"
    names = names_file.read_text(encoding="utf-8").splitlines() if names_file.exists() else ()
    # Labels are small and every one is checked, so they are read at once.
    labels = np.array(_MemoryMap(labels_file).array) if labels_file.exists() else None
    return _from_arrays(str(folder), images.array, labels, names, read_from=images)


def folder_source(path: str | Path) -> Source:
    """Image files in a folder, decoded when they are asked for.

    Args:
        path: a folder of .jpg, .jpeg, .png, .webp or .bmp files (in any case); or of sub-folders
            of them, one a class, however deep in it. Classes are the sub-folders' names, sorted,
            and images are in the order of their sorted paths. Files of other kinds, and whatever
            starts with a dot, are passed over.

    Images become RGB, gray ones three equal channels, transparency dropped; their size is their
    own. What a camera says about its orientation is not heeded, as in ADM.

    Raises:
        FileNotFoundError: no such folder, or no images in it or in one of its classes.
        ValueError: images beside sub-folders of images.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; data.path must name one of images, or of a sub-folder of "
            "images for each class"
        )
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    loose = [entry.name for entry in entries if _is_image(entry.name) and entry.is_file()]
    classes = [entry.name for entry in entries if entry.is_dir()]
    files = {name: _images_below(folder, name) for name in classes}
    filled = [name for name in classes if files[name]]
    if loose and filled:
        raise ValueError(
            f"{folder}: images such as {loose[0]} beside sub-folders of images such as "
            f"{filled[0]}; put every image into the sub-folder of its class, or all into one folder"
        )
    if not loose and not filled:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise FileNotFoundError(f"{folder}: holds no images ({kinds}), nor do its sub-folders")
    if loose:
        return Source(str(folder), _FileRecords(folder, tuple(loose), None), (None, None, 3))
    if len(filled) < len(classes):
        empty = next(name for name in classes if not files[name])
        raise FileNotFoundError(
            f"{folder / empty}: holds no images, so it cannot be a class; remove it, or fill it"
        )
    labels = np.repeat(np.arange(len(classes)), [len(files[name]) for name in classes])
    names = tuple(file for name in classes for file in files[name])
    return Source(str(folder), _FileRecords(folder, names, labels), (None, None, 3), tuple(classes))


def tfds_source(name: str, split: str = "train", data_dir: str | Path | None = None) -> Source:
    """A TensorFlow Datasets dataset, prepared on disk as ArrayRecord; needs no TensorFlow.

    Its feature "image" is the image; its feature "label", where it is a `ClassLabel`, the label,
    and otherwise the dataset is unconditional.

    Args:
        name: as TFDS writes it: "cifar10", "imagenet_resized/64x64", "name/config:version".
        split: as TFDS writes it: "train", "test", "train[:90%]".
        data_dir: the folder that holds TFDS's datasets; TFDS's own default where None.

    Raises:
        FileNotFoundError: the dataset is not prepared in that folder.
        ValueError: it has no such split, no "image" of uint8, or a format without random access.
    """
    import tensorflow_datasets as tfds  # only those who read such a dataset should wait for it

    folder = str(data_dir or tfds.core.constants.DATA_DIR)
    way_out = (
        f"prepare it with `tfds build {name} --data_dir={folder} --file_format=array_record`, "
        "or name the folder that has it in data.path"
    )
    try:
        builder = tfds.builder(name, data_dir=folder)
        prepared = builder.is_prepared()
    except tfds.core.DatasetNotFoundError:  # its message lists every dataset that TFDS knows
        prepared = False
    if not prepared:
        raise FileNotFoundError(f"tfds:{name}: not in {folder}; {way_out}")

    features, splits = builder.info.features, builder.info.splits
    if "image" not in features:
        raise ValueError(f"tfds:{name}: no feature 'image'; it has {', '.join(features)}")
    if features["image"].np_dtype != np.uint8:
        raise ValueError(
            f"tfds:{name}: images of type {np.dtype(features['image'].np_dtype)}; they must be "
            "uint8: write them to an images.npy of that type, for data.name 'npy'"
        )
    try:
        records = builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"tfds:{name}: {builder.data_dir} holds {builder.info.file_format.value} files, "
            f"which have no random access; {way_out}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"tfds:{name}: cannot read split {split!r} (data.split); there are {', '.join(splits)}"
        ) from error
    labelled = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    return Source(
        name=f"tfds:{name}/{split}",
        records=_TfdsRecords(records, labelled),
        image_shape=tuple(features["image"].shape),
        class_names=tuple(features["label"].names) if labelled else (),
    )


def create_source(data_config: ml_collections.ConfigDict) -> Source:
    """The source that the `data` part of an experiment's configuration names.

    Args:
        data_config: `name`, one of
            "digits": `split` is "train" (the default), "heldout" or "all";
            "folder": `path` is a folder of image files, or of a sub-folder for each class;
            "npy": `path` is a folder of .npy files;
            "tfds:NAME": `split` as TFDS writes it ("train" by default), `path` TFDS's data folder.
            A "folder" or "npy" is one split, called "train".

    Raises:
        ValueError: an unknown name or split, or no path where one is needed.
        FileNotFoundError: the data are not where the configuration says.
    """
    name = data_config.name
    split, path = data_config.get("split") or "train", data_config.get("path")
    if name == "digits":
        return digits(split)
    if name in ("folder", "npy"):
        what = "images" if name == "folder" else "images.npy or latents.npy"
        if not path:
            raise ValueError(f"data.name {name!r} needs data.path, the folder of {what}")
        if split != "train":
            raise ValueError(
                f"data.split is {split!r}, but a folder is one split, 'train': name another folder "
                "in data.path instead"
            )
        return folder_source(path) if name == "folder" else npy_directory(path)
    if name.startswith("tfds:"):
        return tfds_source(name.removeprefix("tfds:"), split, path)
    raise ValueError(f"data.name is {name!r}; known are 'digits', 'folder', 'npy' and 'tfds:NAME'")


@dataclasses.dataclass(frozen=True)
class _ArrayRecords:
    """Images and labels by index, from memory or from a memory map."""

    images: "np.ndarray | _MemoryMap"
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], 0 if self.labels is None else int(self.labels[index])


@dataclasses.dataclass(frozen=True)
class _MemoryMap:
    """A .npy file that pickles as its path: NumPy would pickle the contents of a memory map."""

    path: Path

    @functools.cached_property
    def array(self) -> np.ndarray:
        try:
            return np.load(self.path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{self.path}: cannot be memory-mapped ({error}); write it again with np.save"
            ) from error

    def __reduce__(self):
        return _MemoryMap, (self.path,)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.array[index]


@dataclasses.dataclass(frozen=True)
class _FileRecords:
    """Image files and their labels, decoded one at a time."""

    folder: Path
    files: tuple[str, ...]  # paths in the folder: a million Paths would be large to keep and pickle
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self.folder / self.files[index]
        try:
            with Image.open(path) as picture:
                image = np.asarray(picture.convert("RGB"))
        # Pillow's decoders have a variety of their own for damaged files.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{path}: cannot be decoded ({error}); replace the image or remove it"
            ) from error
        return image, 0 if self.labels is None else int(self.labels[index])


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _images_below(folder: Path, name: str) -> list[str]:
    """The image files in a sub-folder and its own, as sorted paths in the folder."""
    found = []
    for place, folders, files in os.walk(folder / name, followlinks=True):
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        inside = os.path.relpath(place, folder)
        found += [os.path.join(inside, file) for file in files if _is_image(file)]
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class _TfdsRecords:
    """A TFDS data source, which decodes one example at a time."""

    examples: Sequence[Mapping[str, Any]]
    labelled: bool

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        example = self.examples[index]
        return example["image"], int(example["label"]) if self.labelled else 0


def _from_arrays(
    place: str,
    images: np.ndarray,
    labels: np.ndarray | None,
    class_names: Sequence[str],
    read_from: _MemoryMap | None = None,
) -> Source:
    """The source of checked arrays; `read_from` is what to keep in place of `images`."""
    if images.ndim != 4:
        raise ValueError(
            f"{place}: images of shape {images.shape}; they must be (count, height, width, "
            "channels), with a channel axis even for gray"
        )
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(
            f"{place}: images of type {images.dtype}; they must be uint8 pixels, or "
            "floating-point posteriors of latents"
        )
    *size, channels = images.shape[1:]
    latents = images.dtype != np.uint8
    if latents and channels % 2:
        raise ValueError(
            f"{place}: latents of {channels} channels; they must be even in number, the mean's "
            "and then the standard deviation's (pixels are uint8)"
        )
    if labels is not None:
        class_names = _check_labels(place, labels, len(images), class_names)
    elif class_names:
        raise ValueError(
            f"{place}: {len(class_names)} class names but no labels; give labels (labels.npy) or "
            "leave out the names (class_names.txt)"
        )
    return Source(
        name=place,
        records=_ArrayRecords(images if read_from is None else read_from, labels),
        image_shape=(*size, channels // 2 if latents else channels),
        class_names=tuple(class_names),
        latents=latents,
    )


def _check_labels(
    place: str, labels: np.ndarray, count: int, class_names: Sequence[str]
) -> Sequence[str]:
    """The class names, or the labels' own numbers where there are none; refuses labels that do
    not fit them or the `count` images."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{place}: labels of shape {labels.shape} and type {labels.dtype} for {count} images; "
            "there must be one integer for each"
        )
    if count and labels.min() < 0:
        raise ValueError(f"{place}: label {labels.min()}; labels count from 0")
    if count and class_names and labels.max() >= len(class_names):
        raise ValueError(
            f"{place}: label {labels.max()} with {len(class_names)} class names; labels must be "
            f"0 ... {len(class_names) - 1}, or class_names.txt have a line for each class"
        )
    return class_names or [str(label) for label in range(labels.max() + 1 if count else 0)]
