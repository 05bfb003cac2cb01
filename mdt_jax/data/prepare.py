"""Writes images as a data set that TensorFlow Datasets reads like its own, without TensorFlow.

The examples are TFDS's, in ArrayRecord files with one record a group, so that each is read alone,
beside TFDS's description of them. `InputImages` describe images of any origin.
"""

import collections
import contextlib
import dataclasses
import fcntl
import io
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from mdt_jax.basics.names import check_class_names, printable
from mdt_jax.basics.places import expand, open_file, read_bytes
from mdt_jax.data.decoding import BadImage, decode_image

# Formats that TFDS's decoders without TensorFlow, OpenCV's and Pillow's, read alike.
KEPT_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # an MPO is a JPEG with further pictures behind it
DATASET_NAME = re.compile(r"[a-z][a-z0-9_]*(/[\w+.-]+)?")
SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class InputImage:
    """An image that is to be written.

    Attributes:
      place: its place, for messages.
      name: its name in the data set, the `file_name`.
      data: the encoded image, or its file, which is then read in a thread.
      label: its class; 0 where there are none.
    """

    place: str
    name: str
    data: bytes | Path
    label: int = 0


@dataclasses.dataclass(frozen=True)
class InputImages:
    """The images that are to be written, in that order.

    Attributes:
      place: their place, for messages.
      records: called once, yields the images.
      num_bytes: about how many bytes they have, for the progress bar and to see that they fit.
      class_names: the name of each label, in order; empty for images without classes.
    """

    place: str
    records: Callable[[], Iterable[InputImage]]
    num_bytes: int
    class_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A data set that was written: its folder, and counts of what is in it."""

    folder: Path
    examples: int
    num_bytes: int
    shards: int
    reencoded: int
    skipped: int


def prepare_dataset(
    images: InputImages,
    name: str,
    data_dir: str | Path,
    *,
    split: str = "train",
    shard_bytes: int = 256 * 2**20,
    skip_bad: bool = False,
    progress: bool = False,
) -> PreparedDataset:
    """Writes a data set whole or not at all.

    Every image is decoded once, to see that it can be. Its bytes are kept if all of TFDS's decoders
    give the same RGB or gray pixels for them; others (CMYK, palettes, transparency, 16 bits,
    animations, rare formats) become PNGs of the pixels of `decode_image`. A camera's orientation
    stays in the bytes; a reader turns the picture.

    Args:
      images: the images to write.
      name: the data set's name in TFDS, "name" or "name/config". With a name that TFDS knows, such
        as "imagenet2012" or "lsun/bedroom", the classes and features must be those it knows.
      data_dir: TFDS's data folder, in which DATA_DIR/NAME/VERSION is made.
      split: the name of the only split.
      shard_bytes: a file ends when it holds this many bytes.
      skip_bad: whether an image that cannot be decoded is left out, with a warning.
      progress: whether to show a progress bar.

    Returns:
      The folder and the counts.

    Raises:
      FileExistsError: the data set is there already, or another process is writing it.
      OSError: the disk is full.
      ValueError: a name or classes that TFDS cannot have; an image that cannot be decoded; no image
        that can; or an error of `images.records`.
    """
    target = _target(name, expand(data_dir), images.class_names)
    if not SPLIT_NAME.fullmatch(split):
        raise ValueError(
            f"split {split!r}: must be of small letters, digits and _, such as 'train'"
        )
    if target.folder.exists():
        raise FileExistsError(
            f"{target.folder}: is there already, and nothing is written over; remove it, or give "
            "another name or data folder"
        )
    counts: collections.Counter = collections.Counter()
    with _aside(target.folder) as folder:
        _check_space(folder, images)
        shards = _Shards(folder, shard_bytes)
        with (
            contextlib.closing(_checked(images.records())) as checked,
            _bar(images, progress) as bar,
        ):
            for record, result in checked:
                try:
                    data, reencoded = result()
                except BadImage as error:
                    if not skip_bad:
                        raise
                    logging.warning("%s; left out", error)
                    counts["skipped"] += 1
                    continue
                shards.write(target.serialize(record, data))
                counts.update(examples=1, num_bytes=len(data), reencoded=reencoded)
                bar.set_postfix(images=counts["examples"], refresh=False)
                bar.update(len(data))
        if not counts["examples"]:
            raise ValueError(f"{images.place}: holds no image that can be decoded")
        lengths = shards.close()
        target.describe(folder, split, lengths, counts["num_bytes"], shards.paths)
    fields = ("examples", "num_bytes", "reencoded", "skipped")
    return PreparedDataset(
        target.folder, shards=len(lengths), **{key: counts[key] for key in fields}
    )


def storable(data: bytes, place: str) -> tuple[bytes, bool]:
    """The bytes to store for an encoded image, and whether they differ from those given.

    Raises:
      BadImage: it cannot be decoded; the message begins with its `place`.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if _is_kept(picture, data):
                # A JPEG's bits are still all read, but 64 pixels become 1: twice as fast.
                picture.draft("L", (1, 1))
                picture.load()
                return data, False
    except Exception:  # decode_image below says what is wrong, if anything is
        pass
    png = io.BytesIO()
    Image.fromarray(decode_image(data, place)).save(png, "PNG")
    return png.getvalue(), True


def _is_kept(picture: Image.Image, data: bytes) -> bool:
    if picture.format not in KEPT_FORMATS or picture.mode not in ("RGB", "L"):
        return False
    if picture.format in ("JPEG", "MPO"):
        return True
    # The header's bit depth, which Pillow does not tell for RGB.
    sixteen_bits = picture.format == "PNG" and data[24] == 16
    animated = getattr(picture, "n_frames", 1) > 1
    return not (sixteen_bits or animated or picture.has_transparency_data)


def _checked(
    records: Iterable[InputImage],
) -> Iterator[tuple[InputImage, Callable[[], tuple[bytes, bool]]]]:
    """Each image, in order, with a function that returns `storable` of it or raises BadImage."""

    def check(record: InputImage) -> tuple[bytes, bool]:
        data = record.data
        try:
            data = data if isinstance(data, bytes) else read_bytes(data)
        except OSError as error:
            place = printable(record.place)
            raise BadImage(f"{place}: cannot be read ({error.strerror})") from error
        return storable(data, record.place)

    workers = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(workers)
    pending: collections.deque[tuple[InputImage, Future]] = collections.deque()
    try:
        for record in records:
            pending.append((record, pool.submit(check, record)))
            if len(pending) > 4 * workers:
                record, future = pending.popleft()
                yield record, future.result
        while pending:
            record, future = pending.popleft()
            yield record, future.result
    finally:
        pool.shutdown(cancel_futures=True)


def _bar(images: InputImages, progress: bool) -> tqdm:
    return tqdm(
        total=images.num_bytes, unit="B", unit_scale=True, smoothing=0.05, disable=not progress
    )


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder to write in, which is renamed to `folder` at the end; on an error it is removed.

    Raises:
      FileExistsError: another process is writing there.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    made = [parent for parent in (partial, *partial.parents) if not parent.exists()]
    partial.mkdir(parents=True, exist_ok=True)
    with open_file(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"{partial}: is just being written by another preparation; wait until it is done"
            ) from error
        except OSError:  # a file system without locks
            pass
        for left in partial.iterdir():  # left by a process that was killed
            if left.name != "lock":
                left.unlink()
        try:
            yield partial
            (partial / "lock").unlink()
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made[1:]:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


def _check_space(folder: Path, images: InputImages) -> None:
    free = shutil.disk_usage(folder).free
    if free < images.num_bytes:
        raise OSError(
            f"{folder.parent}: {free / 1e9:,.1f} GB are free, but the images of {images.place} "
            f"take {images.num_bytes / 1e9:,.1f} GB; make room, or give a data folder elsewhere"
        )


class _Shards:
    """ArrayRecord files of about the same size, numbered in the order of their writing."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.paths: list[Path] = []
        self._folder, self._shard_bytes = folder, shard_bytes
        self._lengths: list[int] = []
        self._writer, self._room = None, 0

    def write(self, record: bytes) -> None:
        from array_record.python import array_record_module

        if self._writer is None or self._room <= 0:
            self._end()
            self.paths.append(self._folder / f"shard-{len(self.paths):05d}")
            self._lengths.append(0)
            # Images are compressed already; compressing them again would halve the rate.
            self._writer = array_record_module.ArrayRecordWriter(
                str(self.paths[-1]), "group_size:1,uncompressed"
            )
            self._room = self._shard_bytes
        with self._disk_errors():
            self._writer.write(record)
        self._lengths[-1] += 1
        self._room -= len(record)

    def close(self) -> list[int]:
        """Ends the last file; returns the number of records in each."""
        self._end()
        return self._lengths

    def _end(self) -> None:
        from array_record.python import array_record_module

        if self._writer is None:
            return
        with self._disk_errors():
            self._writer.close()
        self._writer = None
        reader = array_record_module.ArrayRecordReader(str(self.paths[-1]))
        written = reader.num_records()
        reader.close()
        if written != self._lengths[-1]:
            raise OSError(
                f"{self.paths[-1]}: holds {written} records of the {self._lengths[-1]} that were "
                "written; look after the disk"
            )

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the only one that the writer raises
            raise OSError(
                f"{self.paths[-1]}: cannot be written ({str(error).split(';')[0]}); make room, or "
                "give a data folder elsewhere"
            ) from error


@dataclasses.dataclass(frozen=True)
class _Target:
    """A data set's description for TFDS."""

    name: str
    config: str | None
    version: str
    folder: Path
    features: Any
    texts: tuple[str, ...]  # the features that hold a record's name

    def serialize(self, record: InputImage, data: bytes) -> bytes:
        # TFDS's texts are UTF-8; the names of files may not be.
        name = record.name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        example = dict.fromkeys(self.texts, name) | {"image": data}
        if "label" in self.features:
            example["label"] = record.label
        return self.features.serialize_example(self.features.encode_example(example))

    def describe(
        self, folder: Path, split: str, lengths: list[int], num_bytes: int, shards: list[Path]
    ) -> None:
        """Gives the shards their names and writes features.json and dataset_info.json."""
        import tensorflow_datasets as tfds

        template = tfds.core.ShardedFileTemplate(
            dataset_name=self.name, data_dir=folder, split=split, filetype_suffix="array_record"
        )
        for index, shard in enumerate(shards):
            shard.rename(template.sharded_filepath(shard_index=index, num_shards=len(shards)))
        identity = tfds.core.DatasetIdentity(
            name=self.name,
            version=tfds.core.Version(self.version),
            data_dir=str(folder),
            module_name=__name__,  # what TFDS, reading, would tell of as differing if it were empty
            config_name=self.config,
        )
        keys = ("image", "label") if "label" in self.features else None
        info = tfds.core.DatasetInfo(
            builder=identity, features=self.features, supervised_keys=keys, disable_shuffling=True
        )
        info.set_file_format("array_record")
        splits = [tfds.core.SplitInfo(split, lengths, num_bytes, template)]
        info.set_splits(tfds.core.SplitDict(splits))
        info.write_to_directory(folder)


def _target(name: str, data_dir: Path, class_names: tuple[str, ...]) -> _Target:
    """The description of a data set: TFDS's own if it knows the name, or a new one.

    Raises:
      ValueError: a name or classes that TFDS cannot have, or other classes than it knows.
    """
    import tensorflow_datasets as tfds  # takes seconds

    if not DATASET_NAME.fullmatch(name):
        raise ValueError(
            f"name {name!r}: must be of small letters, digits and _, and begin with a letter; one "
            "such name may follow a slash"
        )
    check_class_names("classes", class_names)
    plain = list(map(str.strip, class_names))  # as TFDS reads them
    if len(set(plain)) < len(plain) or not all(plain):
        raise ValueError("classes: two of them have the same name, or one has none")
    base, _, config = name.partition("/")
    try:
        definition = tfds.builder_cls(base)
    except tfds.core.DatasetNotFoundError:
        definition = None
    # For data sets that it knows, TFDS takes its own description, not the one on the disk.
    if definition is not None and (not config or config in definition.builder_configs):
        builder = definition(data_dir=str(data_dir), config=config or None)
        features, folder = builder.info.features, Path(builder.data_dir)
        texts = tuple(k for k, v in features.items() if isinstance(v, tfds.features.Text))
        if not _fits(features, texts, class_names):
            raise ValueError(
                f"name {name!r}: TFDS has a data set of that name, with other features or classes; "
                "give another name"
            )
        config = builder.builder_config.name if builder.builder_config else ""
        return _Target(base, config or None, str(builder.version), folder, features, texts)
    kinds = {"file_name": tfds.features.Text(), "image": tfds.features.Image(shape=(None, None, 3))}
    if class_names:
        kinds["label"] = tfds.features.ClassLabel(names=list(class_names))
    features = tfds.features.FeaturesDict(kinds)
    folder = data_dir / name / "1.0.0"
    return _Target(base, config or None, "1.0.0", folder, features, ("file_name",))


def _fits(features: Any, texts: tuple[str, ...], class_names: tuple[str, ...]) -> bool:
    """Whether TFDS's features are those of records with an image, its name and its class."""
    if set(features) - set(texts) != ({"image", "label"} if class_names else {"image"}):
        return False
    image, names = features["image"], features["label"].names if class_names else ()
    return (
        image.shape == (None, None, 3)
        and image.np_dtype == np.uint8
        and (tuple(names) == class_names)
    )
