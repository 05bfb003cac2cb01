"""A data set's latents on disk: shards of posteriors, and the manifest that says what they are of.

`tools/encode_latents.py` makes such a folder, `data.name=latents` reads it. It holds
`latents-00000-of-00313.array_record` and so on, ArrayRecord files, and `manifest.json`: whose
images they are, by which autoencoder, and every shard's size and SHA-256. A record is the bytes of
one structured value (`record_type`), each a group of its own, uncompressed, so that one is read
without another and the same records are the same bytes. An image's record is followed by that of
its mirror image, where the cache has those.

While a cache is being made, `encoding.json` stands in for the manifest, and each finished shard has
its part of it beside it, a .json of its own name. Every file appears whole or not at all; a shard
that does not have the bytes that its part tells of is unfinished. So whatever is interrupted goes
on, any number of processes can share the work, and the last to finish a shard writes the manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import threading
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int32, Integer

from mdt_jax.data.transforms import LATENT_SCALE

MANIFEST, ENCODING = "manifest.json", "encoding.json"
VERSION = 1
_DTYPES = {"float32": "<f4", "float16": "<f2"}
_TOOL = "tools/encode_latents.py"


@dataclasses.dataclass(frozen=True)
class Description:
    """What a cache holds. Two caches hold the same if these agree.

    Attributes:
        source: the data set's name.
        num_images: how many the data set has.
        class_names: in the order of the labels; empty where there are no classes.
        image_size: pixels that the images were cropped to.
        vae: how the autoencoder was asked for; what it is says the digest.
        vae_digest: of the encoder's weights.
        scale: what the autoencoder's latents are multiplied by for a diffusion model.
        compute_dtype: what the autoencoder computed in.
        latent_shape: (height, width, channels) of a latent.
        dtype: of the stored numbers, "float32" or "float16".
        mirror: whether the mirror images are there, too.
        images_per_shard: of every shard but the last.
    """

    source: str
    num_images: int
    class_names: tuple[str, ...]
    image_size: int
    vae: str
    vae_digest: str
    scale: float
    compute_dtype: str
    latent_shape: tuple[int, int, int]
    dtype: str
    mirror: bool
    images_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.images_per_shard)

    @functools.cached_property
    def record_type(self) -> np.dtype:
        """A record: its image's index in the data set and label, whether it is of the mirror
        image, and the posterior, the mean's channels before the standard deviation's."""
        height, width, channels = self.latent_shape
        posterior = ("posterior", _DTYPES[self.dtype], (height, width, 2 * channels))
        return np.dtype([("index", "<i8"), ("label", "<i4"), ("mirrored", "<i4"), posterior])

    def shard_name(self, shard: int) -> str:
        return f"latents-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def shard_images(self, shard: int) -> range:
        """The indices of a shard's images in the data set."""
        first = shard * self.images_per_shard
        return range(first, min(first + self.images_per_shard, self.num_images))

    def shard_bytes(self, shard: int) -> int:
        """About what a shard takes."""
        records = len(self.shard_images(shard)) * (2 if self.mirror else 1)
        return records * (self.record_type.itemsize + 128)


# Making one


def begin(folder: Path, description: Description) -> None:
    """Makes a folder for a cache, or finds in it the beginning, or the whole, of the same one.

    Raises:
        FileExistsError: the folder holds other things.
        ValueError: the folder holds another cache; names the first thing that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = _plain(description)
    found = _found(folder)
    if found is None:
        for file in folder.iterdir():
            if not file.name.startswith((ENCODING, f".{ENCODING}.")):  # another process's
                raise FileExistsError(
                    f"{folder}: holds {file.name}, which is no part of a latent cache; remove it, "
                    "or give another --output"
                )
        _write_json(folder / ENCODING, wanted)
        return
    for key, value in wanted.items():
        # Two names of one encoder are no difference, such as "mse" and the path of a copy.
        if key != "vae" and found.get(key) != value:
            raise ValueError(
                f"{folder}: holds latents of {_say(key, found)}, not of {_say(key, wanted)}; give "
                "another --output, or the flags that these were begun with, or remove them"
            )


def finished_shard(folder: Path, description: Description, shard: int) -> dict[str, Any] | None:
    """A shard's part of the manifest, if its file has just the bytes that this tells of."""
    entry, path = _entry(folder, description, shard), folder / description.shard_name(shard)
    with contextlib.suppress(FileNotFoundError):
        if entry and path.stat().st_size == entry["bytes"] and _digest(path) == entry["sha256"]:
            return entry
    _part(path).unlink(missing_ok=True)  # so that no other process takes it for finished
    return None


def write_shard(
    folder: Path, description: Description, shard: int, records: Iterable[np.ndarray]
) -> dict[str, Any]:
    """Writes a shard of records, arrays of `record_type`, and returns its part of the manifest."""
    from array_record.python import array_record_module

    path = folder / description.shard_name(shard)
    aside = path.with_name(f".{path.name}.partial")
    writer = array_record_module.ArrayRecordWriter(str(aside), "group_size:1,uncompressed")
    count = 0
    try:
        for rows in records:
            for row in rows:
                writer.write(row.tobytes())
            count += len(rows)
    finally:
        writer.close()
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    entry = {
        "file": path.name,
        "records": count,
        "bytes": aside.stat().st_size,
        "sha256": _digest(aside),
    }
    aside.rename(path)
    _write_json(_part(path), entry)
    return entry


def finish(folder: Path, description: Description) -> bool:
    """Writes the manifest if every shard is there, and returns whether it is.

    Whichever process comes last does it; several at once write the same.
    """
    entries = [_entry(folder, description, shard) for shard in range(description.num_shards)]
    if not all(entries):
        return False
    values = _plain(description) | {"vae": _found(folder)["vae"]}  # as it was called first
    values["records"] = sum(entry["records"] for entry in entries)
    _write_json(folder / MANIFEST, values | {"shards": entries})
    for shard in range(description.num_shards):
        _part(folder / description.shard_name(shard)).unlink(missing_ok=True)
    (folder / ENCODING).unlink(missing_ok=True)
    for left in folder.glob(".*.json.*"):  # by processes that were killed
        left.unlink(missing_ok=True)
    return True


def _found(folder: Path) -> dict[str, Any] | None:
    # In this order: the one goes when the other is there.
    return _read_json(folder / ENCODING) or _read_json(folder / MANIFEST)


def _entry(folder: Path, description: Description, shard: int) -> dict[str, Any] | None:
    """What is written about a shard, beside it or in the manifest."""
    entry = _read_json(_part(folder / description.shard_name(shard)))
    if entry is None and (manifest := _read_json(folder / MANIFEST)):
        entry = manifest["shards"][shard]
    return entry


def _part(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _plain(description: Description) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps({"version": VERSION, **dataclasses.asdict(description)}))


def _say(key: str, values: dict[str, Any]) -> str:
    if key == "vae_digest":
        return f"the autoencoder {values['vae']} ({values[key]})"
    if key == "class_names":
        return f"{len(values[key])} classes"
    return f"{key} {values.get(key)}"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: is damaged ({error}); remove it") from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all, with several processes at it."""
    # Processes of other hosts, or containers, may have the same number.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        aside.rename(path)
    except FileNotFoundError:  # another process has finished, and cleared away
        if not path.exists():
            raise


# Reading one


class LatentCache:
    """The records of a finished cache, for a `Source`: image i's posterior and label by i.

    Attributes:
        folder, description: where and what it is.
        mirrored: whether `read_posteriors` can give those of mirror images.
    """

    def __init__(self, folder: Path, description: Description, shards: Sequence[dict[str, Any]]):
        self.folder, self.description = folder, description
        self.mirrored = description.mirror
        self._files = [shard["file"] for shard in shards]
        # Of its own images, a shard may lack some that could not be read.
        images = [shard["records"] // (2 if description.mirror else 1) for shard in shards]
        self._ends = np.cumsum(images)
        self._open_readers()

    @classmethod
    def open(cls, folder: str | Path) -> LatentCache:
        """Raises FileNotFoundError or ValueError, with one line, for what is no finished cache."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder; data.path must name one that {_TOOL} made"
            )
        manifest = _read_json(folder / MANIFEST)
        if manifest is None:
            raise FileNotFoundError(f"{folder}: {_why_no_manifest(folder)}")
        if manifest.get("version") != VERSION:
            raise ValueError(
                f"{folder / MANIFEST}: is of version {manifest.get('version')}, this program reads "
                f"{VERSION}; encode the images again with {_TOOL}"
            )
        if manifest["scale"] != LATENT_SCALE:
            raise ValueError(
                f"{folder}: holds latents of the autoencoder {manifest['vae']}, whose scale is "
                f"{manifest['scale']}; training scales latents by {LATENT_SCALE}, Stable "
                "Diffusion's: encode the images with 'mse', 'ema' or another of that scale"
            )
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            size = path.stat().st_size if path.exists() else None
            if size != shard["bytes"]:
                what = "is missing" if size is None else f"has {size:,} bytes"
                raise ValueError(
                    f"{path}: {what}, of {shard['bytes']:,} bytes in the manifest; {_again(folder)}"
                )
        fields = {field.name: manifest[field.name] for field in dataclasses.fields(Description)}
        fields |= {key: tuple(fields[key]) for key in ("class_names", "latent_shape")}
        return cls(folder, Description(**fields), manifest["shards"])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        posteriors, labels = self.read_posteriors(np.asarray(indices, np.int64))
        return list(zip(posteriors, labels.tolist(), strict=True))

    def read_posteriors(
        self,
        indices: Integer[np.ndarray, "n"],
        mirror: Bool[np.ndarray, "n"] | None = None,
    ) -> tuple[Float[np.ndarray, "n h w moments"], Int32[np.ndarray, "n"]]:
        """A block of images' posteriors, as they are stored, and labels.

        Args:
            indices: of the images.
            mirror: whose mirror image is wanted instead; only where `mirrored`.

        Raises:
            ValueError: a damaged shard, by name.
        """
        shards = np.searchsorted(self._ends, indices, side="right")
        places = indices - np.concatenate([[0], self._ends])[shards]
        if self.mirrored:
            places = 2 * places + (0 if mirror is None else mirror)
        d = self.description
        height, width, channels = d.latent_shape
        posteriors = np.empty((len(indices), height, width, 2 * channels), d.dtype)
        labels = np.empty(len(indices), np.int32)
        # One record a call: a call of several distributes them over threads of its own, which
        # takes twice the time that it takes to read records of this size.
        for row, (shard, place) in enumerate(zip(shards.tolist(), places.tolist(), strict=True)):
            (record,) = np.frombuffer(self._read(shard, place), d.record_type)
            posteriors[row], labels[row] = record["posterior"], record["label"]
        return posteriors, labels

    def describe(self) -> str:
        """One line for a log."""
        d = self.description
        mirror = " and of mirror images" if d.mirror else ""
        return (
            f"{d.dtype} latents of {d.source} at {d.image_size} pixels{mirror}, by the autoencoder "
            f"{d.vae}"
        )

    def _open_readers(self) -> None:
        self._readers: list[Any] = [None] * len(self._files)
        self._lock = threading.Lock()

    def _read(self, shard: int, place: int) -> bytes:
        try:
            (data,) = (self._readers[shard] or self._reader(shard)).read([place])
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._damaged(shard, place) from error
        if len(data) != self.description.record_type.itemsize:
            raise self._damaged(shard, place)
        return data

    def _damaged(self, shard: int, place: int) -> ValueError:
        path = self.folder / self._files[shard]
        return ValueError(f"{path}: record {place} is damaged; {_again(self.folder)}")

    def _reader(self, shard: int) -> Any:
        """A shard's reader, which several threads can use, opened when it is first needed."""
        from array_record.python import array_record_module

        with self._lock:
            if self._readers[shard] is None:
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    str(self.folder / self._files[shard]),
                    options="readahead_buffer_size:0",
                    file_reader_buffer_size=32768,
                )
        return self._readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_readers()


def _again(folder: Path) -> str:
    return f"run the {_TOOL} command of --output {folder} again, which makes that shard anew"


def _why_no_manifest(folder: Path) -> str:
    if (folder / ENCODING).exists():
        return f"is not finished; run the {_TOOL} command that began it again, and it goes on"
    if (folder / "latents.npy").exists():
        return "holds latents.npy, which data.name 'npy' reads"
    return f"holds no {MANIFEST}; data.path must name a folder that {_TOOL} made"
