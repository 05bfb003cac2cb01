"""Prepares a data set for training: ArrayRecord files with TFDS's metadata, without TensorFlow.

    mdt prepare-dataset --imagenet ILSVRC2012_img_train.tar --data_dir DIR
    mdt prepare-dataset --folder PHOTOS --data_dir DIR
    mdt prepare-dataset --lmdb bedroom_train_lmdb --data_dir DIR
    mdt prepare-dataset --parquet 'data/train-*.parquet' --name NAME --data_dir DIR

The last line it prints says how to train on the data. They are in DIR/NAME/VERSION, which TFDS
itself reads too.

--imagenet  a tar of a tar for each class, as ILSVRC2012 comes; it is not unpacked. Classes are in
            the order of their names, which for ImageNet's thousand is TFDS's: NAME is imagenet2012.
--folder    image files, or a sub-folder of them for each class, as `data.name=folder` reads them.
--lmdb      an LSUN category as its zip unpacks: NAME is lsun/CATEGORY, without classes. It needs
            the package lmdb: `pip install lmdb`.
--parquet   files as the Hugging Face hub has them: a column of encoded images, and a column of
            labels if there are classes, whose names are read from the metadata.

FFHQ's images come in folders of a thousand, `images1024x1024/00000/00000.png` and on, and so do its
thumbnails. FFHQ has no classes, and those folders are none: give --labels none.

    mdt prepare-dataset --folder thumbnails128x128 --labels none --name ffhq

The bytes of an image are kept as they are, unless its pixels are of a kind that readers disagree
on (CMYK, palettes, transparency, 16 bits, animations): those become PNGs, and the summary counts
them. Images stay in their order; training draws them at random. A preparation that was killed
leaves DIR/NAME/VERSION.partial, which the next one removes.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from absl import logging

from mdt_jax.basics.help_page import Page
from mdt_jax.basics.names import printable
from mdt_jax.basics.places import expand
from mdt_jax.data.decoding import BadImage
from mdt_jax.data.folders import CLASS_ORDERS, LABELS, are_splits, read_folder
from mdt_jax.data.parquet import from_parquet
from mdt_jax.data.prepare import InputImage, InputImages, PreparedDataset, prepare_dataset
from mdt_jax.parallel.command import command_ending, ending_quietly, one_line
from mdt_jax.parallel.flag_parsing import ArgumentParser

PAGE = Page(
    "mdt prepare-dataset",
    "python -m mdt_jax.commands.prepare_dataset",
    "(--imagenet TAR | --folder DIR | --lmdb DIR | --parquet GLOB) [OPTION ...]",
    __doc__,
)
IMAGENET, IMAGENET_COUNT = "imagenet2012", 1_281_167
# A configuration's keys, which messages about folders contain → this command's flags.
FLAGS_OF_KEYS = {
    "data.path": "--folder",
    "data.class_order": "--class_order",
    "data.labels": "--labels",
}
TAR_BLOCK = 512
TAR_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error)


def from_tar(path: Path) -> InputImages:
    """The images of a tar of a tar for each class, in the tar's order.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no tar, one that ends early, or one without class tars.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--imagenet {path}: no such file; give the tar of class tars")
    with _open_tar(str(path), name=path) as archive:
        members = list(_members(str(path), archive))
    members = [member for member in members if member.isfile() and not _is_hidden(member.name)]
    others = [member.name for member in members if not member.name.endswith(".tar")]
    if others or not members:
        what = others[0] if others else "nothing"
        raise ValueError(
            f"{path}: must hold a tar for each class, such as n01440764.tar, and holds "
            f"{printable(what)}; "
            "images that are not in class tars can be unpacked, for --folder"
        )
    names = sorted(PurePosixPath(member.name).stem for member in members)
    if are_splits(names):
        raise ValueError(
            f"{path}: its tars ({', '.join(names)}) are named like the splits of a data set, not "
            "like classes; unpack it, and give the one to train on"
        )

    def records() -> Iterator[InputImage]:
        with _open_tar(str(path), name=path) as archive:
            for member in members:
                label = names.index(PurePosixPath(member.name).stem)
                yield from _class_records(f"{path}: {member.name}", archive, member, label)

    return InputImages(str(path), records, path.stat().st_size, tuple(names))


def _class_records(
    place: str, archive: tarfile.TarFile, member: tarfile.TarInfo, label: int
) -> Iterator[InputImage]:
    empty = True
    with _open_tar(place, fileobj=archive.extractfile(member)) as images:
        for image in _members(place, images):
            if not image.isfile() or _is_hidden(image.name):
                continue
            try:
                data = images.extractfile(image).read()
            except TAR_ERRORS as error:
                raise ValueError(f"{place}: ends early in {image.name} ({error})") from error
            yield InputImage(f"{place}/{image.name}", PurePosixPath(image.name).name, data, label)
            empty = False
    if empty:
        raise ValueError(f"{place}: holds no images, so it cannot be a class")


def _open_tar(place: str, **source) -> tarfile.TarFile:
    try:
        return tarfile.open(**source)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{place}: is not a tar file, or a damaged one") from error


def _members(place: str, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar; damage between them, which `tarfile` takes for the end, is an error."""
    last = "its beginning"
    try:
        for member in archive:
            yield member
            last = member.name
        archive.fileobj.seek(archive.offset)
        whole = archive.fileobj.read(TAR_BLOCK) == bytes(TAR_BLOCK)
    except TAR_ERRORS:
        whole = False
    if not whole:
        raise ValueError(
            f"{place}: is truncated or damaged at {last}; copy or download the file again"
        )


def _is_hidden(name: str) -> bool:
    return PurePosixPath(name).name.startswith(".")


def from_folder(path: Path, class_order: str = "string", labels: str = "auto") -> InputImages:
    """The images of a folder, as training reads it.

    Raises:
      FileNotFoundError, ValueError: as `read_folder`.
    """
    folder = read_folder(path, class_order, labels)
    print(f"{printable(path)}: {folder.layout}")

    def records() -> Iterator[InputImage]:
        for index, file in enumerate(folder.files):
            label = 0 if folder.labels is None else int(folder.labels[index])
            yield InputImage(str(path / file), file, path / file, label)

    num_bytes = sum(_size(path / file) for file in folder.files)
    return InputImages(str(path), records, num_bytes, folder.class_names)


def _size(file: Path) -> int:
    """A file's bytes; 0 for a link that leads nowhere, which reading it will say."""
    with contextlib.suppress(OSError):
        return file.stat().st_size
    return 0


def from_lmdb(path: Path) -> InputImages:
    """The values of an LSUN database, encoded images, in the order of their keys.

    Raises:
      FileNotFoundError: no such folder, or no database in it.
      ValueError: no database, a truncated or an empty one, or no package to read it with.
    """
    try:
        import lmdb
    except ImportError as error:
        raise ValueError("--lmdb needs the package lmdb: pip install lmdb") from error
    file = path / "data.mdb"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; --lmdb names the folder that holds it")
    try:
        with lmdb.open(str(path), readonly=True, lock=False) as database:
            count, pages = database.stat()["entries"], database.info()["last_pgno"] + 1
            num_bytes = pages * database.stat()["psize"]
    except lmdb.Error as error:
        raise ValueError(f"{file}: is not an LMDB database, or a damaged one ({error})") from error
    if file.stat().st_size < num_bytes:  # reading on would end the program without a word
        raise ValueError(f"{file}: is truncated; copy or download it again")
    if not count:
        raise ValueError(f"{file}: holds no images")

    def records() -> Iterator[InputImage]:
        with (
            lmdb.open(str(path), readonly=True, lock=False) as database,
            database.begin() as transaction,
        ):
            for key, value in transaction.cursor():
                name = key.decode(errors="backslashreplace")
                yield InputImage(f"{file}: key {name}", name, value)

    return InputImages(str(path), records, num_bytes)


def default_name(args: argparse.Namespace, images: InputImages) -> str:
    """The data set's name where --name is not given, made of the name of its file or folder.

    Raises:
      ValueError: Parquet files, which have no such name.
    """
    if args.parquet is not None:
        raise ValueError("--parquet needs --name, what to call the data set")
    path = Path(args.imagenet or args.folder or args.lmdb).resolve()
    if args.imagenet and _is_imagenet(images):
        return IMAGENET
    if args.lmdb and (lsun := re.fullmatch(r"(\w+)_train_lmdb", path.name)):
        return f"lsun/{lsun[1]}"
    stem = path.name.removesuffix(".tar") if args.imagenet else path.name
    name = re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_")
    return name if name[:1].isalpha() else f"images_{name}".strip("_")


def _is_imagenet(images: InputImages) -> bool:
    names = images.class_names
    return len(names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names)


def read_input(args: argparse.Namespace) -> InputImages:
    """The images of the one input that the flags name."""
    if args.imagenet is not None:
        return from_tar(expand(args.imagenet))
    if args.folder is not None:
        return from_folder(expand(args.folder), args.class_order, args.labels)
    if args.lmdb is not None:
        return from_lmdb(expand(args.lmdb))
    return from_parquet(args.parquet, args.image_column, args.label_column)


def preparation_summary(
    images: InputImages, name: str, data_dir: Path, split: str, made: PreparedDataset
) -> str:
    """Two lines: counts of what was written, and the flags to train on it."""
    flags = f"--config.data.name=tfds:{name} --config.data.path={shlex.quote(str(data_dir))}"
    flags += "" if split == "train" else f" --config.data.split={split}"
    folder = printable(made.folder)
    return (
        f"{folder}: examples {made.examples:,}, classes {len(images.class_names):,}, "
        f"bytes {made.num_bytes:,}, files {made.shards:,}; re-encoded as PNG {made.reencoded:,}, "
        f"left out {made.skipped:,}\ntrain on it with {printable(flags)}"
    )


def prepare_from_flags(args: argparse.Namespace) -> None:
    """Prepares the data set that the flags describe, and prints what was made."""
    import tensorflow_datasets as tfds  # takes seconds, which --help should not

    images = read_input(args)
    name = args.name or default_name(args, images)
    data_dir = Path(args.data_dir or tfds.core.constants.DATA_DIR).expanduser().resolve()
    made = prepare_dataset(
        images,
        name,
        data_dir,
        split=args.split,
        shard_bytes=args.shard_mb * 2**20,
        skip_bad=args.on_bad_image == "skip",
        progress=True,
    )
    if name == IMAGENET and made.examples + made.skipped != IMAGENET_COUNT:
        print(
            f"note: ImageNet's training set has {IMAGENET_COUNT:,} images, and {images.place} "
            f"{made.examples + made.skipped:,}"
        )
    print(preparation_summary(images, name, data_dir, args.split, made))


def _message(error: Exception) -> str:
    """The line of an exception, which names this command's flags."""
    way_out = ", or give --on_bad_image=skip" if isinstance(error, BadImage) else ""
    return one_line(error, FLAGS_OF_KEYS) + way_out


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(page=PAGE)
    inputs = parser.add_argument_group("The images, one of").add_mutually_exclusive_group(
        required=True
    )
    inputs.add_argument("--imagenet", metavar="TAR", help="a tar of a tar for each class")
    inputs.add_argument("--folder", metavar="DIR", help="image files, or a sub-folder a class")
    inputs.add_argument("--lmdb", metavar="DIR", help="LSUN's folder with data.mdb")
    inputs.add_argument("--parquet", metavar="GLOB", help="Hugging Face's files, in quotes")
    made = parser.add_argument_group("The data set")
    made.add_argument("--name", help="the data set's name: NAME or NAME/CONFIG")
    made.add_argument(
        "--data_dir", help="TFDS's data folder, in which it is made; TFDS's own if not given"
    )
    made.add_argument("--split", default="train", help="the one split it has (%(default)s)")
    made.add_argument("--shard_mb", type=int, default=256, help="MiB a file (%(default)s)")
    read = parser.add_argument_group("How they are read")
    read.add_argument(
        "--on_bad_image",
        choices=("error", "skip"),
        default="error",
        help="for an image that cannot be decoded (%(default)s); skip leaves it out and counts it",
    )
    read.add_argument(
        "--class_order",
        choices=CLASS_ORDERS,
        default="string",
        help="with --folder: the order of its classes' names",
    )
    read.add_argument(
        "--labels", choices=LABELS, default="auto", help="with --folder: where its classes are"
    )
    read.add_argument("--image_column", default="image", help="with --parquet (%(default)s)")
    read.add_argument(
        "--label_column", help="with --parquet; '' for no classes; 'label' if it is there"
    )
    args = parser.parse_args(argv)
    nothing_left = "interrupted; nothing was left behind"
    with command_ending(args, message=_message, interrupted=nothing_left):
        prepare_from_flags(args)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    with ending_quietly():
        main()
