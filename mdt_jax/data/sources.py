"""Where examples come from: random-access sources of images and labels, one function per dataset.

A source decodes an example only when it is asked for it, and knows nothing of order, epochs,
batches or processes: those are the pipeline's. A new dataset is one function that returns a
`Source`, and one line in `create_source`.
"""

import dataclasses
import enum
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_collections
import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

from mdt_jax.data.decoding import BadImage, decode_picture
from mdt_jax.data.folders import read_folder
from mdt_jax.data.latent_cache import LatentCache

__all__ = [
    "BadImage",
    "ExampleKind",
    "Records",
    "Source",
    "arrays",
    "create_source",
    "digits",
    "folder_source",
    "latents_source",
    "npy_directory",
    "tfds_source",
]


class ExampleKind(enum.Enum):
    """The content of a batch's "image" array, and so how the training step makes inputs of it.

    Attributes:
      PIXELS: uint8 (B, H, W, C), which the step scales to [-1, 1].
      POSTERIORS: floating-point (B, h, w, 2c), an autoencoder's means before its standard
        deviations; the step draws latents from them.
      INPUTS: floating-point (B, H, W, C), the model's inputs themselves. No source gives them;
        benchmarks and compilers do.
    """

    PIXELS = "pixels"
    POSTERIORS = "posteriors of latents"
    INPUTS = "the model's inputs"


@runtime_checkable
class Records(Protocol):
    """The examples that a `Source` reads, by index. They pickle, to travel to worker processes.

    Records may also have any of these:

    - `__getitems__(indices)`, a list of what `__getitem__` gives for each index, where reading
      many at a time is faster;
    - `pictures(indices)`, the same with Pillow's pictures in place of arrays, where images are
      stored encoded;
    - `digest`, a short string of their number, order, names and labels, where it is cheap to tell.

    Posteriors that are stored in shards also have `read_posteriors(indices, mirror)`, `mirrored`,
    `stored_dtype` and `autoencoder_digest` (see `LatentCache`).
    """

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
      kind: the content of an example's "image": pixels, uint8, or an autoencoder's posterior,
        float32 of shape (height, width, 2 * channels).
      note: how the classes were found, where that was a guess; for `describe`.
    """

    name: str
    records: Records
    image_shape: tuple[int | None, int | None, int]
    class_names: tuple[str, ...] = ()
    kind: ExampleKind = ExampleKind.PIXELS
    note: str = ""

    def __post_init__(self):
        if len(self.records) == 0:
            raise ValueError(f"{self.name}: holds no examples; a source needs at least one")

    @property
    def latents(self) -> bool:
        """Whether a model of these examples works on an autoencoder's latents, not on pixels."""
        return self.kind is ExampleKind.POSTERIORS

    @property
    def autoencoder_digest(self) -> str | None:
        """The digest of the encoder's weights that made the latents; None where it is not known."""
        return getattr(self.records, "autoencoder_digest", None)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 (H, W, C) or float32 (h, w, 2c), "label": np.int32}.

        Raises:
          IndexError: `index` is not in 0 ... len(self) - 1.
          BadImage: its image cannot be used.
          ValueError: its label is not that of a class.
        """
        self._check_index(index)
        return self._example(index, *self.records[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """`[self[i] for i in indices]`, read as one block where the records can be.

        Raises:
          IndexError, BadImage, ValueError: as `self[i]` of the first that does.
        """
        for index in indices:
            self._check_index(index)
        read_block = getattr(self.records, "__getitems__", None)
        if read_block is None:
            return [self._example(i, *self.records[i]) for i in indices]
        return [self._example(i, *r) for i, r in zip(indices, read_block(indices), strict=True)]

    def pictures(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """`__getitems__`, but images that are stored encoded are Pillow's pictures.

        To crop those takes less time than to crop their pixels.
        """
        read_pictures = getattr(self.records, "pictures", None)
        if read_pictures is None:
            return self.__getitems__(indices)
        for index in indices:
            self._check_index(index)
        found = zip(indices, read_pictures(indices), strict=True)
        return [{"image": picture, "label": self._label(i, n)} for i, (picture, n) in found]

    def identity(self) -> dict[str, str]:
        """What the data are, to see whether two processes, or a run and its resumption, have the
        same: short strings, empty where there is nothing to tell.

        It takes a second for a million images: files are told apart by their names in the folder,
        not by their contents, and arrays by some of their rows.

        Returns:
          "examples", their number; "classes", their number and a digest of their names in order;
          "records", a digest of which records there are, in what order and with which labels;
          "autoencoder", the digest of the encoder that made a cache of latents.
        """
        names = ""
        if self.class_names:
            names = f"{len(self.class_names)} ({_short_digest(*self.class_names)})"
        return {
            "examples": str(len(self)),
            "classes": names,
            "records": getattr(self.records, "digest", ""),
            "autoencoder": (self.autoencoder_digest or "")[:16],
        }

    def describe(self) -> str:
        """One line for a log: how many examples, and the number of every class, or of the first
        ten and the last."""
        names = [f"{label} = {name}" for label, name in enumerate(self.class_names)]
        if len(names) > 20:
            names[10:-1] = ["..."]
        classes = f", {len(self.class_names):,} classes: {', '.join(names)}" if names else ""
        note = f" ({self.note})" if self.note else ""
        return f"{self.name}: {len(self):,} examples{classes}{note}"

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: no example {index}; it holds 0 ... {len(self) - 1}")

    def _example(self, index: int, image: np.ndarray, label: int) -> dict[str, Any]:
        return {
            "image": np.asarray(image, np.float32 if self.latents else np.uint8),
            "label": self._label(index, label),
        }

    def _label(self, index: int, label: int) -> np.int32:
        if not 0 <= label < max(1, len(self.class_names)):
            raise ValueError(
                f"{self.name}: record {index} has label {label}; with {len(self.class_names)} "
                f"classes labels are 0 ... {max(0, len(self.class_names) - 1)}"
            )
        return np.int32(label)


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
    folder = Path(path).expanduser()
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


def folder_source(path: str | Path, class_order: str = "string", labels: str = "auto") -> Source:
    """Image files in a folder, decoded when they are asked for.

    Images become RGB of their own size (see `decoding.decode_image`). The layout, and so the
    classes, are recognised (see `folders.read_folder`, whose arguments these are, and errors).
    """
    folder = read_folder(path, class_order, labels)
    return Source(str(folder.path), folder, (None, None, 3), folder.class_names, note=folder.layout)


def latents_source(path: str | Path) -> Source:
    """Latents that `tools/encode_latents.py` wrote: their posteriors.

    Raises:
      FileNotFoundError: no such folder, or not one that the tool finished.
      ValueError: a shard that is missing or damaged, or an autoencoder of another scale.
    """
    cache = LatentCache.open(path)
    d = cache.description
    return Source(
        str(cache.folder),
        cache,
        d.latent_shape,
        d.class_names,
        ExampleKind.POSTERIORS,
        note=cache.describe(),
    )


def tfds_source(name: str, split: str = "train", data_dir: str | Path | None = None) -> Source:
    """A TensorFlow Datasets dataset, prepared on disk as ArrayRecord; needs no TensorFlow.

    Its feature "image" is the image; its feature "label", where it is a `ClassLabel`, the label,
    and otherwise the dataset is unconditional. What is on disk suffices: neither TFDS's code for
    the dataset nor a network is needed.

    Args:
      name: as TFDS writes it: "cifar10", "imagenet_resized/64x64", "name/config:version".
      split: as TFDS writes it: "train", "test", "train[:90%]".
      data_dir: the folder that holds TFDS's datasets, its own default where None; or the very
        folder of a prepared dataset, the one with dataset_info.json in it, which `name` must
        then agree with or, empty, leaves open.

    Raises:
      FileNotFoundError: the dataset is not prepared in that folder.
      ValueError: it has no such split, no "image" of uint8, or a format without random access.
    """
    import tensorflow_datasets as tfds  # only those who read such a dataset should wait for it

    builder = _find_prepared(name, Path(data_dir or tfds.core.constants.DATA_DIR).expanduser())
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
        raise ValueError(
            f"{place}: cannot read split {split!r} (data.split); there are {', '.join(splits)}"
        ) from error
    labelled = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    class_names = tuple(features["label"].names or ()) if labelled else ()
    place = f"{place}/{split}"
    files = [(name, info.shard_lengths, info.num_bytes) for name, info in sorted(splits.items())]
    digest = _short_digest(builder.info.full_name, split, *map(str, files))
    channels = shape[2] if ours else None
    return Source(
        name=place,
        records=_TfdsRecords(place, examples, bool(class_names), channels, digest),
        image_shape=shape,
        class_names=class_names,
    )


def _find_prepared(name: str, folder: Path) -> Any:
    """TFDS's builder of a dataset on disk: in `folder`, or which `folder` is."""
    from google.protobuf.json_format import ParseError
    from tensorflow_datasets.core import read_only_builder, registered

    itself = (folder / "dataset_info.json").exists()
    try:
        if itself:
            builder = read_only_builder.builder_from_directory(folder)
        else:
            builder = read_only_builder.builder_from_files(name, data_dir=str(folder))
    except registered.DatasetNotFoundError as error:  # its message has many lines
        raise FileNotFoundError(
            f"tfds:{name}: not in {folder}; {_prepare_command(name, str(folder))}, or name the "
            "folder that has it in data.path"
        ) from error
    except (ParseError, ValueError) as error:
        if itself or isinstance(error, ParseError):
            raise ValueError(
                f"tfds:{name}: the description in {folder} (dataset_info.json, features.json) "
                "cannot be read; prepare the dataset again"
            ) from error
        raise ValueError(
            f"tfds:{name}: no name of a TFDS dataset, which is NAME, NAME/CONFIG or NAME:VERSION; "
            "without one data.path must be the folder with its dataset_info.json"
        ) from error
    if itself and name.partition(":")[0].partition("/")[0] not in ("", builder.name):
        raise ValueError(
            f"{folder}: holds {builder.name}, not {name}; set data.name to 'tfds:{builder.name}', "
            "or name another folder in data.path"
        )
    return builder


def _prepare_command(name: str, folder: str) -> str:
    name = name.partition(":")[0]
    if name == "imagenet2012":
        source = "--imagenet ILSVRC2012_img_train.tar"
    elif name.startswith("lsun"):
        source = "--lmdb DIR"
    else:
        source = f"--folder DIR (or --parquet GLOB) --name {name}"
    return f"prepare it with `python tools/prepare_dataset.py {source} --data_dir {folder}`"


def create_source(data_config: ml_collections.ConfigDict) -> Source:
    """The source that the `data` part of an experiment's configuration names.

    Args:
      data_config: `name`, one of
        "digits": `split` is "train" (the default), "heldout" or "all";
        "folder": `path` is a folder of images, with `class_order` and `labels` as
          `folders.read_folder` has them;
        "latents": `path` is a folder that `tools/encode_latents.py` made;
        "npy": `path` is a folder of .npy files;
        "tfds:NAME": `split` as TFDS writes it ("train" by default), `path` TFDS's data folder
          or the dataset's own.
        A "folder", "latents" or "npy" is one split, called "train".

        `class_order` and `labels` other than the defaults are refused where there are no such
        choices, and so is `crop` "random" where the data are latents.

    Raises:
      ValueError: an unknown name or split, no path where one is needed, or a setting that the
        data have no use for.
      FileNotFoundError: the data are not where the configuration says.
    """
    _check_use(data_config, "class_order", "string")
    _check_use(data_config, "labels", "auto")
    source = _named_source(data_config)
    if source.latents and data_config.get("crop") == "random":
        raise ValueError(
            f"data.crop is 'random', but {source.name} holds latents, of images that were cropped "
            "when they were encoded; set it to 'center', or train on the images"
        )
    return source


def _check_use(data_config: ml_collections.ConfigDict, key: str, default: str) -> None:
    value = data_config.get(key)
    if value not in (None, default) and data_config.name != "folder":
        raise ValueError(
            f"data.{key} is {value!r}, but data.name {data_config.name!r} has classes of its own; "
            f"set it to {default!r}: only a 'folder' can choose"
        )


def _named_source(data_config: ml_collections.ConfigDict) -> Source:
    name = data_config.name
    split, path = data_config.get("split") or "train", data_config.get("path")
    if "://" in (path or ""):
        raise ValueError(
            f"data.path {path} is a URL: copy the data to this host's disk, or mount the bucket, "
            "and give the path"
        )
    if name == "digits":
        return digits(split)
    contents = {
        "folder": "images",
        "latents": "latents, which tools/encode_latents.py makes",
        "npy": "images.npy or latents.npy",
    }
    if name in contents:
        if not path:
            raise ValueError(f"data.name {name!r} needs data.path, the folder of {contents[name]}")
        if split != "train":
            raise ValueError(
                f"data.split is {split!r}, but a folder is one split, 'train': name another folder "
                "in data.path instead"
            )
        if name == "npy":
            return npy_directory(path)
        if name == "latents":
            return latents_source(path)
        order, labels = data_config.get("class_order"), data_config.get("labels")
        return folder_source(path, order or "string", labels or "auto")
    if name.startswith("tfds:"):
        return tfds_source(name.removeprefix("tfds:"), split, path)
    raise ValueError(
        f"data.name is {name!r}; known are 'digits', 'folder', 'latents', 'npy' and 'tfds:NAME'"
    )


@dataclasses.dataclass(frozen=True)
class _ArrayRecords:
    """Images and labels by index, from memory or from a memory map."""

    images: "np.ndarray | _MemoryMap"
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], 0 if self.labels is None else int(self.labels[index])

    @property
    def digest(self) -> str:
        images = self.images.array if isinstance(self.images, _MemoryMap) else self.images
        rows = np.linspace(0, len(images) - 1, min(len(images), 64)).astype(int)
        some = np.ascontiguousarray(images[rows])
        labels = b"" if self.labels is None else np.asarray(self.labels, "<i8").tobytes()
        return _short_digest(f"{images.dtype} {images.shape}", some.tobytes(), labels)


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
class _TfdsRecords:
    """The examples of a TFDS data source, decoded here."""

    name: str
    examples: Any  # what `as_data_source` gives
    labelled: bool
    channels: int | None  # of the images, which arrive encoded; None: TFDS has decoded them
    digest: str = ""  # of the files, for `Source.identity`

    def __len__(self) -> int:
        return len(self.examples)

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
                f"{self.name}: a file of it is damaged or missing ({error}); prepare it again"
            ) from error
        return [self._record(i, example) for i, example in zip(indices, examples, strict=True)]

    def _record(
        self, index: int, example: Mapping[str, Any]
    ) -> tuple[Image.Image | np.ndarray, int]:
        image = example["image"]
        if self.channels is not None:
            image = decode_picture(image, f"{self.name}: record {index}", self.channels)
        return image, int(example["label"]) if self.labelled else 0


def _short_digest(*parts: str | bytes) -> str:
    """Of parts, one after the other, none of which holds the byte 0 where it is text."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape"))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _to_pixels(picture: Image.Image | np.ndarray) -> np.ndarray:
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


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
        kind=ExampleKind.POSTERIORS if latents else ExampleKind.PIXELS,
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
