"""Data sets of TensorFlow Datasets, prepared on disk as ArrayRecord, without TensorFlow."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from logging import LogRecord
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from mdt_jax.basics.names import printable
from mdt_jax.basics.places import check_is_file, expand, read_text
from mdt_jax.data.decoding import decode_picture
from mdt_jax.data.missing import MissingData
from mdt_jax.data.source import Source, short_digest

_MODULE = "module_name"  # a field of dataset_info.json that data sets do not depend on


def tfds_source(name: str, split: str = "train", data_dir: str | Path | None = None) -> Source:
    """A TensorFlow Datasets dataset, prepared on disk as ArrayRecord; needs no TensorFlow.

    Its feature "image" is the image, and its feature "label", if it is a `ClassLabel`, the label;
    without one the dataset is unconditional. The files on disk suffice: neither TFDS's code for the
    dataset nor a network is needed.

    Args:
      name: as TFDS writes it: "cifar10", "imagenet_resized/64x64", "name/config:version".
      split: as TFDS writes it: "train", "test", "train[:90%]".
      data_dir: the folder that holds TFDS's datasets, its own default where None; or the folder of
        one prepared dataset, with dataset_info.json in it. `name` must then agree with it, or be
        empty.

    Raises:
      MissingData: the dataset is not prepared in that folder.
      ValueError: it has no such split, no "image" of uint8, or a format without random access.
    """
    import tensorflow_datasets as tfds  # here, so that other sources do not wait for it

    builder = _find_prepared(name, expand(data_dir or tfds.core.constants.DATA_DIR))
    place = f"tfds:{name or builder.name}"
    features, splits = builder.info.features, builder.info.splits
    if "image" not in features:
        raise ValueError(f"{place}: no feature 'image'; it has {', '.join(features)}")
    shape, dtype = tuple(features["image"].shape), np.dtype(features["image"].np_dtype)
    if len(shape) != 3 or dtype != np.uint8:
        raise ValueError(
            f"{place}: images of type {dtype} and shape {shape}; they must be uint8 of three axes: "
            "write others to an images.npy of that type, for data.name 'npy'"
        )
    encoded = [key for key in features if isinstance(features[key], tfds.features.Image)]
    # TFDS's own decoding leaves CMYK with four channels, and a damaged image without a name.
    ours = "image" in encoded and shape[2] in (1, 3)
    skipped = {key: tfds.decode.SkipDecoding() for key in encoded if ours or key != "image"}
    try:
        examples = builder.as_data_source(split, decoders=skipped)
    except NotImplementedError as error:
        raise ValueError(
            f"{place}: {builder.data_dir} holds {builder.info.file_format.value} files, which have "
            f"no random access; {_prepare_command(name, 'DIR')}, and name that in data.path"
        ) from error
    except ValueError as error:
        if split in splits:
            raise _undescribed(name, builder.data_dir) from error
        raise ValueError(
            f"{place}: cannot read split {split!r} (data.split); there are {', '.join(splits)}"
        ) from error
    labelled = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    class_names = tuple(features["label"].names or ()) if labelled else ()
    place = f"{place}/{split}"
    files = [(name, info.shard_lengths, info.num_bytes) for name, info in sorted(splits.items())]
    digest = short_digest(builder.info.full_name, split, *map(str, files))
    channels = shape[2] if ours else None
    _check_description(name, Path(builder.data_dir), len(examples), len(class_names))
    folder = printable(str(builder.data_dir))
    return Source(
        name=place,
        records=_TfdsRecords(place, examples, bool(class_names), channels, digest, folder),
        image_shape=shape,
        class_names=class_names,
    )


def _check_description(name: str, folder: Path, examples: int, classes: int) -> None:
    """Refuses, with ValueError, a description that its files on disk contradict.

    A list of class names of one name too many or too few gives classes wrong names without a word.
    """
    features = folder / "features.json"
    try:
        found = json.loads(read_text(features))["featuresDict"]["features"]["label"]["classLabel"]
        told = int(found["numClasses"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        told = 0  # of a version that does not say so, or without classes
    if classes and told and classes != told:
        raise ValueError(
            f"tfds:{name}: {printable(folder)}/label.labels.txt has {classes} names of classes, "
            f"features.json says {told}; prepare the dataset again"
        )
    if examples > sum(file.stat().st_size for file in folder.iterdir()):  # a byte each at least
        raise _undescribed(name, folder)


def _undescribed(name: str, folder: str | Path) -> ValueError:
    return ValueError(
        f"tfds:{name}: the description in {printable(folder)} (dataset_info.json, features.json) "
        "cannot be read; prepare the dataset again"
    )


def _check_files(folder: Path, within: bool) -> None:
    """Refuses, with ValueError, a prepared dataset in which something is no file.

    TFDS would wait for ever for what a pipe says.

    Args:
      folder: the dataset's, or that of its configs and versions.
      within: whether it is the latter.
    """
    folders = [info.parent for info in folder.rglob("dataset_info.json")] if within else [folder]
    for file in (file for folder in folders for file in folder.iterdir() if not file.is_dir()):
        check_is_file(file)


def _find_prepared(name: str, folder: Path) -> Any:
    """TFDS's builder of a dataset on disk, which is inside `folder` or is `folder` itself.

    Raises:
      MissingData: there is no such dataset.
      ValueError: it cannot be read, or `folder` holds another one.
    """
    from google.protobuf.json_format import ParseError
    from tensorflow_datasets.core import read_only_builder, registered

    itself = (folder / "dataset_info.json").exists()
    if itself or name:
        _check_files(folder if itself else folder / re.split("[/:]", name)[0], within=not itself)
    logger = logging.get_absl_logger()
    logger.addFilter(_is_no_note_of_module)
    try:
        if itself:
            builder = read_only_builder.builder_from_directory(folder)
        else:
            builder = read_only_builder.builder_from_files(name, data_dir=str(folder))
    except registered.DatasetNotFoundError as error:  # its message has many lines
        raise MissingData(
            f"tfds:{name}: not in {folder}; {_prepare_command(name, str(folder))}, or name the "
            "folder that has it in data.path"
        ) from error
    except ImportError as error:
        raise ValueError(
            f"tfds:{name}: the features that {printable(folder)} describes need a package that is "
            f"not installed ({error}); prepare the dataset again with images and labels alone"
        ) from error
    except (ParseError, ValueError, TypeError, LookupError, RecursionError) as error:
        if itself or not isinstance(error, ValueError):
            raise _undescribed(name, folder) from error
        raise ValueError(
            f"tfds:{name}: no name of a TFDS dataset, which is NAME, NAME/CONFIG or NAME:VERSION; "
            "without one data.path must be the folder with its dataset_info.json"
        ) from error
    finally:
        logger.removeFilter(_is_no_note_of_module)
    if itself and name.partition(":")[0].partition("/")[0] not in ("", builder.name):
        raise ValueError(
            f"{folder}: holds {builder.name}, not {name}; set data.name to 'tfds:{builder.name}', "
            "or name another folder in data.path"
        )
    return builder


def _is_no_note_of_module(record: LogRecord) -> bool:
    """Drops TFDS's line that a data set was written by another module than the one that reads."""
    is_note = str(record.msg).startswith("For '%s': fields info.")
    return not (is_note and record.args[1:] == (_MODULE,))


def _prepare_command(name: str, folder: str) -> str:
    name = name.partition(":")[0]
    if name == "imagenet2012":
        source = "--imagenet ILSVRC2012_img_train.tar"
    elif name.startswith("lsun"):
        source = "--lmdb DIR"
    else:
        source = f"--folder DIR (or --parquet GLOB) --name {name}"
    return f"prepare it with `mdt prepare-dataset {source} --data_dir {folder}`"


@dataclasses.dataclass(frozen=True)
class _TfdsRecords:
    """The examples of a TFDS data source, decoded by `decode_picture` where that can."""

    name: str
    examples: Any  # TFDS's data source
    labelled: bool
    channels: int | None  # to decode images to; None where TFDS has decoded them
    digest: str = ""  # the data set's, for `Source.identity`
    folder: str = ""  # for messages

    def __len__(self) -> int:
        return len(self.examples)

    def place(self, index: int) -> str:
        """The number of a record, for messages."""
        return f"{self.name}: record {index}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        found = self.pictures(indices)
        return [(_to_pixels(picture), label) for picture, label in found]

    def pictures(self, indices: Sequence[int]) -> list[tuple[Image.Image | np.ndarray, int]]:
        """Pictures, or arrays where TFDS decodes them, and labels."""
        try:
            examples = self.examples.__getitems__(indices)
        except RuntimeError as error:  # ArrayRecord's; it reads many records or none
            raise ValueError(
                f"{self.name}: a file of it is damaged or missing ({error}, in {self.folder}); "
                "prepare it again"
            ) from error
        return [self._record(i, example) for i, example in zip(indices, examples, strict=True)]

    def _record(
        self, index: int, example: Mapping[str, Any]
    ) -> tuple[Image.Image | np.ndarray, int]:
        image = example["image"]
        if self.channels is not None:
            image = decode_picture(image, self.place(index), self.channels)
        return image, int(example["label"]) if self.labelled else 0


def _to_pixels(picture: Image.Image | np.ndarray) -> np.ndarray:
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels
