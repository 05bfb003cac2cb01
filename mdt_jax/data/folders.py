"""Folders of image files: their layout, and so their images and classes."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mdt_jax.basics.names import printable
from mdt_jax.basics.places import expand, wrong_kind
from mdt_jax.data.decoding import decode_picture
from mdt_jax.data.missing import MissingData
from mdt_jax.data.source import Source

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CLASS_ORDERS = ("string", "numeric")
LABELS = ("auto", "file_names", "none", "sub_folders")
# The names of a data set's splits: train, Val, test2017, dev_set, held-out, trainA, fold0.
_SPLIT = re.compile(
    r"(train|training|trn|trainval|val|valid|validate|validation|minival|test|tests|testing|tst"
    r"|dev|eval|evaluation|h[eo]ld[-_ ]?out|unlabell?ed|t10k|fold(?=[-_ ]?\d))"
    r"([-_ ]?(set|split|data|images|\d+)|(?-i:[AB]))?",
    re.IGNORECASE,
)
_NOT_DATA = "__MACOSX"  # the Mac's notes on files, which its archives carry beside them


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

    def place(self, index: int) -> str:
        """The path of an image, for messages."""
        return printable(self.path / self.files[index])

    def pictures(self, indices: Sequence[int]) -> list[tuple[Image.Image, int]]:
        """RGB pictures and labels, decoded now."""
        paths = [self.path / self.files[index] for index in indices]
        labels = [0 if self.labels is None else int(self.labels[index]) for index in indices]
        return [(decode_picture(p, str(p)), label) for p, label in zip(paths, labels, strict=True)]


def read_folder(
    path: str | Path, class_order: str = "string", labels: str = "auto", *, settings: bool = True
) -> ImageFolder:
    """The images in a folder, and their classes, by the layout that it recognises.

    1. Sub-folders with images, at any depth: each is a class of that name.
    2. Images called CLASS_IMAGE, as `n01440764_10026.JPEG` or `7_12.png`: ADM's layout. The class
       is the part before the first underscore. Every image must be called so, there must be two
       classes or more, and one of them must have two images or more.
    3. Any other folder of images: they have no classes.

    Images are .jpg, .jpeg, .png, .webp, .bmp, .gif, .tif and .tiff files, in upper or lower case,
    in the order of their sorted paths (class by class in layout 1). Other files, those that start
    with a dot, and what is called so but is no file (a pipe, a device) are left out, and so are
    hidden folders and __MACOSX, which the Mac's archives bring. Links are
    followed, to a folder once for each class, and never to the folder itself or to one around it.

    Sub-folders that are all named like a data set's splits (train and val, say) are refused as
    classes: a model would learn for weeks to tell train from val without a word, while the way out
    takes a moment, and "sub_folders" lets them be classes after all.

    Args:
      path: the folder.
      class_order: how class names are sorted, which gives their labels. "string" puts "10" before
        "2", as ADM does (and PyTorch's ImageFolder); "numeric" sorts by value.
      labels: "auto" recognises the layout. "file_names" reads any folder as layout 2, "none" as
        layout 3; both take the images in sub-folders too, as ADM does, so that FFHQ's sub-folders
        of a thousand can be read as one set. "sub_folders" reads it as layout 1, whatever the
        sub-folders are called.
      settings: whether the caller has `data.labels` and `data.path`, which messages then advise.

    Raises:
      MissingData: no such folder, or no images in it.
      FileNotFoundError: no images in one of its classes.
      PermissionError: the folder or one in it cannot be listed.
      ValueError: two classes that are one folder, images beside sub-folders of images, sub-folders
        named like splits, names that are no numbers or hold no class where they must, or an unknown
        `class_order` or `labels`.
    """
    folder = expand(path)
    _check_choice("data.class_order", class_order, CLASS_ORDERS)
    _check_choice("data.labels", labels, LABELS)
    if not folder.is_dir():
        wanted = "data.path must name one of images, or of a sub-folder of images for each class"
        if os.path.lexists(folder):
            raise NotADirectoryError(f"{wrong_kind(folder, 'folder')}; {wanted}")
        raise MissingData(f"{printable(folder)}: no such folder; {wanted}")
    loose, found = _entries(folder)
    classes, seen, twins = _sub_folders(folder, found)
    one_set = labels in ("file_names", "none")
    if one_set:
        classes = [name for name in classes if name not in twins]
    # A folder that is linked to from several classes is in each of them.
    inside = {n: _images_below(folder, n, seen if one_set else set(seen)) for n in classes}
    filled = [name for name in classes if inside[name]]
    if not loose and not filled:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise MissingData(f"{printable(folder)}: holds no images ({kinds}), nor do its sub-folders")

    if one_set:
        files = sorted(loose + [file for name in classes for file in inside[name]])
        names = _named_classes(folder, files) if labels == "file_names" else None
        return _label(folder, files, names, "file names", class_order, f"data.labels is {labels!r}")
    if loose and filled:
        or_set = ", or set data.labels to 'none' or 'file_names' to read them as one set"
        raise ValueError(
            f"{printable(folder)}: images such as {printable(loose[0])} beside sub-folders of "
            f"images such as {printable(filled[0])}; put every image into the sub-folder of its "
            f"class, or all into one folder{or_set if settings else ''}"
        )
    if loose:
        why_not = "data.labels is 'sub_folders', and none has images"
        if labels == "sub_folders":
            raise ValueError(f"{printable(folder)}: {why_not}; set it to 'auto', or make them")
        why_not = _why_unlabelled(loose)
        names = None if why_not else [_class_in_name(file) for file in loose]
        return _label(folder, loose, names, "file names", class_order, why_not)
    if labels == "auto":
        _check_no_splits(folder, filled, settings)
    if len(filled) < len(classes):
        empty = next(name for name in classes if not inside[name])
        raise FileNotFoundError(
            f"{printable(folder / empty)}: holds no images, so it cannot be a class; remove it, or "
            "fill it"
        )
    for name, other in twins.items():
        raise ValueError(
            f"{printable(folder)}: the sub-folders {printable(other)} and {printable(name)} are "
            "one folder, by a link; its images cannot be of two classes: remove one"
        )
    classes = _sort_classes(folder, classes, class_order)
    files = [file for name in classes for file in inside[name]]
    names = [name for name in classes for _ in inside[name]]
    return _label(folder, files, names, "sub-folders", class_order)


def are_splits(names: Iterable[str]) -> bool:
    """Whether names are all those of a data set's splits, such as train and val, and no classes.

    They may all begin with the data set's name, as imagenet_train and imagenet_val do.
    """
    names = list(names)
    shared = os.path.commonprefix(names) if len(names) > 1 else ""
    start = 1 + max(map(shared.rfind, "-_. "))
    return all(map(_SPLIT.fullmatch, names)) or all(_SPLIT.fullmatch(n[start:]) for n in names)


def _check_no_splits(place: Path, names: Sequence[str], settings: bool) -> None:
    """Refuses, with ValueError, classes that are all named like splits; see `read_folder`."""
    if not are_splits(names):
        return
    first = min(names, key=lambda name: ("train" not in name.lower(), name))
    such = f"one of them, such as {printable(place / first)}"
    way_out = f"set data.path to {such}, or data.labels to 'sub_folders' if they are classes"
    raise ValueError(
        f"{printable(place)}: its sub-folders ({', '.join(names)}) are named like the splits of a "
        f"data set, not like classes; {way_out if settings else f'give {such}'}"
    )


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
                f"{printable(folder)}: class {name!r} is no number, so data.class_order cannot be "
                "'numeric'; set it to 'string'"
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
            return f"{printable(file)} names none before an underscore, nor are there sub-folders"
        names.add(name)
    if len(names) == 1:
        return f"all file names begin with {printable(names.pop())}_, nor are there sub-folders"
    if len(names) == len(files):
        return "no two file names have the same class before an underscore"
    return ""


def _named_classes(folder: Path, files: Sequence[str]) -> list[str]:
    names = [_class_in_name(file) for file in files]
    if not all(names):
        file = files[names.index("")]
        raise ValueError(
            f"{printable(folder / file)}: names no class before an underscore, as data.labels "
            "'file_names' wants; rename it, or set data.labels to 'auto' or 'none'"
        )
    return names


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{key} is {value!r}; known are {', '.join(map(repr, known))}")


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _may_be_image(entry: os.DirEntry) -> bool:
    """Whether an entry is a file with an image's name, or such a link that leads nowhere.

    Reading the latter says so. Reading a pipe, a socket or a device could wait for ever.
    """
    if not _is_image(entry.name):
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link to itself
        return True


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the images and of the sub-folders in a folder, sorted.

    Raises:
      PermissionError: it cannot be listed.
    """
    images, folders = [], []
    try:
        with os.scandir(folder) as entries:  # a million entries, without a `stat` of each
            for entry in entries:
                if _is_folder(entry):
                    if not entry.name.startswith(".") and entry.name != _NOT_DATA:
                        folders.append(entry.name)
                elif _may_be_image(entry):
                    images.append(entry.name)
    except PermissionError as error:
        raise PermissionError(
            f"{printable(folder)}: cannot be listed ({error.strerror}); allow this user to read "
            "it, or move it elsewhere"
        ) from error
    return sorted(images), sorted(folders)


def _identity(folder: str | Path) -> tuple[int, int]:
    """What a folder is, by whatever links it was reached."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _sub_folders(
    folder: Path, names: Sequence[str]
) -> tuple[list[str], set[tuple[int, int]], dict[str, str]]:
    """The sub-folders of a folder, without links to the folder itself or to one around it.

    Returns:
      Their names; the identities of all those folders; and each name of a folder that has an
      earlier name, by a link, with that name.
    """
    real = folder.resolve()
    seen = {_identity(place) for place in (real, *real.parents)}
    found = {name: _identity(folder / name) for name in names}
    found = {name: identity for name, identity in found.items() if identity not in seen}
    first: dict[tuple[int, int], str] = {}
    for name, identity in found.items():
        first.setdefault(identity, name)
    twins = {name: first[one] for name, one in found.items() if first[one] != name}
    return list(found), seen.union(first), twins


def _images_below(folder: Path, name: str, seen: set[tuple[int, int]]) -> list[str]:
    """The image files in a sub-folder and its own, as sorted paths in the folder.

    Args:
      folder: the folder.
      name: the sub-folder.
      seen: folders that a link does not lead to; those that are read are added to it.
    """
    found, waiting = [], [name]
    while waiting:
        inside = waiting.pop()
        images, folders = _entries(folder / inside)
        found += [os.path.join(inside, image) for image in images]
        for inner in reversed(folders):
            place = os.path.join(inside, inner)
            if (identity := _identity(folder / place)) not in seen:
                seen.add(identity)
                waiting.append(place)
    return sorted(found)
