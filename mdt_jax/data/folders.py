"""Folders of image files: their layout, and so their images and classes."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mdt_jax.data.decoding import decode_picture
from mdt_jax.data.source import Source

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CLASS_ORDERS = ("string", "numeric")
LABELS = ("auto", "file_names", "none")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Image files and their labels, each file decoded when it is asked for.

    Attributes:
      path: the folder.
      files: paths in it; a million `Path`s would be large to keep and to pickle.
      class_names: in the order of the labels; empty where there are no classes.
      labels: one for each file; None where there are no classes.
      layout: how the classes were found, or why there are none, for a log.
    """

    path: Path
    files: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: np.ndarray | None
    layout: str

    def __len__(self) -> int:
        return len(self.files)

    @property
    def digest(self) -> str:
        """A digest of the files' names, in order, and labels; under a second for a million."""
        digest = hashlib.sha256("\0".join(self.files).encode("utf-8", "surrogateescape"))
        if self.labels is not None:
            digest.update(b"\0" + self.labels.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        ((picture, label),) = self.pictures([index])
        return np.asarray(picture), label

    def pictures(self, indices: Sequence[int]) -> list[tuple[Image.Image, int]]:
        """RGB pictures and labels, decoded now."""
        paths = [self.path / self.files[index] for index in indices]
        labels = [0 if self.labels is None else int(self.labels[index]) for index in indices]
        return [(decode_picture(p, str(p)), label) for p, label in zip(paths, labels, strict=True)]


def read_folder(path: str | Path, class_order: str = "string", labels: str = "auto") -> ImageFolder:
    """The images in a folder, and their classes, by the layout that it recognises.

    1. Sub-folders with images, at any depth: each is a class of that name.
    2. Images called CLASS_IMAGE, as `n01440764_10026.JPEG` or `7_12.png`: ADM's layout. The class
       is the part before the first underscore. Every image must be called so, there must be two
       classes or more, and one of them must have two images or more.
    3. Any other folder of images: they have no classes.

    Images are .jpg, .jpeg, .png, .webp, .bmp, .gif, .tif and .tiff files, in upper or lower case,
    in the order of their sorted paths (class by class in layout 1). Other files, and those that
    start with a dot, are left out.

    Args:
      path: the folder.
      class_order: how class names are sorted, which gives their labels. "string" puts "10" before
        "2", as ADM does (and PyTorch's ImageFolder); "numeric" sorts by value.
      labels: "auto" recognises the layout. "file_names" reads any folder as layout 2, "none" as
        layout 3; both take the images in sub-folders too, as ADM does, so that FFHQ's sub-folders
        of a thousand can be read as one set.

    Raises:
      FileNotFoundError: no such folder, or no images in it or in one of its classes.
      ValueError: images beside sub-folders of images, names that are no numbers or hold no
        class where they must, or an unknown `class_order` or `labels`.
    """
    folder = Path(path).expanduser()
    _check_choice("data.class_order", class_order, CLASS_ORDERS)
    _check_choice("data.labels", labels, LABELS)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; data.path must name one of images, or of a sub-folder of "
            "images for each class"
        )
    loose, classes = _entries(folder)
    inside = {name: _images_below(folder, name) for name in classes}
    filled = [name for name in classes if inside[name]]
    if not loose and not filled:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise FileNotFoundError(f"{folder}: holds no images ({kinds}), nor do its sub-folders")

    if labels != "auto":
        files = sorted(loose + [file for name in classes for file in inside[name]])
        names = _named_classes(folder, files) if labels == "file_names" else None
        return _label(folder, files, names, "file names", class_order, f"data.labels is {labels!r}")
    if loose and filled:
        raise ValueError(
            f"{folder}: images such as {loose[0]} beside sub-folders of images such as "
            f"{filled[0]}; put every image into the sub-folder of its class, or all into one "
            "folder, or set data.labels to 'none' or 'file_names' to read them as one set"
        )
    if loose:
        why_not = _why_unlabelled(loose)
        names = None if why_not else [_class_in_name(file) for file in loose]
        return _label(folder, loose, names, "file names", class_order, why_not)
    if len(filled) < len(classes):
        empty = next(name for name in classes if not inside[name])
        raise FileNotFoundError(
            f"{folder / empty}: holds no images, so it cannot be a class; remove it, or fill it"
        )
    classes = _sort_classes(folder, classes, class_order)
    files = [file for name in classes for file in inside[name]]
    names = [name for name in classes for _ in inside[name]]
    return _label(folder, files, names, "sub-folders", class_order)


def folder_source(path: str | Path, class_order: str = "string", labels: str = "auto") -> Source:
    """The image files in a folder, decoded when they are asked for.

    Images become RGB of their own size (see `decoding.decode_image`). Arguments and errors are
    those of `read_folder`, which recognises the layout, and so the classes.
    """
    folder = read_folder(path, class_order, labels)
    return Source(str(folder.path), folder, (None, None, 3), folder.class_names, note=folder.layout)


def _label(
    folder: Path,
    files: Sequence[str],
    names: Sequence[str] | None,
    origin: str,
    class_order: str,
    why_unlabelled: str = "",
) -> ImageFolder:
    """The folder of some files, with the class name of each; no classes if `names` is None."""
    if names is None:
        return ImageFolder(folder, tuple(files), (), None, f"no classes: {why_unlabelled}")
    classes = _sort_classes(folder, set(names), class_order)
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[name] for name in names])
    layout = f"classes from {origin}, in {class_order} order"
    if (
        class_order == "string"
        and all(map(_is_number, classes))
        and classes != sorted(classes, key=int)
    ):
        layout += ", which is not that of the numbers: data.class_order 'numeric' is"
    return ImageFolder(folder, tuple(files), tuple(classes), labels, layout)


def _sort_classes(folder: Path, names: Iterable[str], class_order: str) -> list[str]:
    if class_order == "string":
        return sorted(names)
    names = sorted(names)
    for name in names:
        if not _is_number(name):
            raise ValueError(
                f"{folder}: class {name!r} is no number, so data.class_order cannot be 'numeric'; "
                "set it to 'string'"
            )
    return sorted(names, key=int)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _class_in_name(file: str) -> str:
    """The part of a file's name before the first underscore; "" where there is none."""
    before, underscore, _ = os.path.basename(file).partition("_")
    return before if underscore else ""


def _why_unlabelled(files: Sequence[str]) -> str:
    """Why the names of `files` are not ADM's; "" where they are."""
    names = set()
    for file in files:
        name = _class_in_name(file)
        if not name:
            return f"{file} names none before an underscore, nor are there sub-folders"
        names.add(name)
    if len(names) == 1:
        return f"all file names begin with {names.pop()}_, nor are there sub-folders"
    if len(names) == len(files):
        return "no two file names have the same class before an underscore"
    return ""


def _named_classes(folder: Path, files: Sequence[str]) -> list[str]:
    names = [_class_in_name(file) for file in files]
    if not all(names):
        file = files[names.index("")]
        raise ValueError(
            f"{folder / file}: names no class before an underscore, as data.labels 'file_names' "
            "wants; rename it, or set data.labels to 'auto' or 'none'"
        )
    return names


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{key} is {value!r}; known are {', '.join(map(repr, known))}")


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the images and of the sub-folders in a folder, sorted."""
    images, folders = [], []
    with os.scandir(folder) as entries:  # a million entries, without a `stat` of each
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    folders.append(entry.name)
            elif _is_image(entry.name):
                images.append(entry.name)
    return sorted(images), sorted(folders)


def _images_below(folder: Path, name: str) -> list[str]:
    """The image files in a sub-folder and its own, as sorted paths in the folder."""
    found = []
    for place, folders, files in os.walk(folder / name, followlinks=True):
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        inside = os.path.relpath(place, folder)
        found += [os.path.join(inside, file) for file in files if _is_image(file)]
    return sorted(found)
