"""A data set's latents on disk: shards of posteriors, and a manifest that describes them.

`mdt encode-latents` makes such a folder (`latent_writing`), `data.name=latents` reads it. It
holds `latents-00000-of-00313.array_record` and so on, ArrayRecord files, and `manifest.json`: the
data set, the autoencoder, and every shard's size and SHA-256. A record is the bytes of one
structured value (`record_type`), each a group of its own, uncompressed, so that one is read without
another and the same records are the same bytes. In a cache with mirror images, each image's record
is followed by its mirror image's.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int32, Integer

from mdt_jax.basics.names import printable
from mdt_jax.basics.places import expand, wrong_kind
from mdt_jax.data import reading
from mdt_jax.data.cache_json import (
    CACHE_MANIFEST,
    ENCODING,
    TOOL,
    check_entries,
    check_fields,
    explained,
    read_json,
)
from mdt_jax.data.missing import MissingData
from mdt_jax.data.shard_readers import ShardReaders
from mdt_jax.data.source import ExampleKind, Source, check_posteriors
from mdt_jax.models.latent_space import LatentSpace

# Caches that a reader from before there were shifts would normalise wrongly are of version 2.
VERSIONS = (1, 2)
NORMALIZATIONS = ("autoencoder", "channel")
_DTYPES = {"float32": "<f4", "float16": "<f2"}
_HEAD = np.dtype([("index", "<i8"), ("label", "<i4"), ("mirrored", "<i4")])


@dataclasses.dataclass(frozen=True)
class CacheDescription:
    """The contents of a cache. Two caches hold the same if their descriptions agree.

    Attributes:
      source: the data set's name.
      num_images: how many images the data set has.
      class_names: in the order of the labels; empty where there are no classes.
      image_size: pixels that the images were cropped to.
      vae: the name or path by which the autoencoder was asked for; the digest says which it is.
      vae_digest: the digest of the encoder's weights.
      scale, shift: a diffusion model sees (latent − shift)·scale.
      compute_dtype: the type that the autoencoder computed in.
      latent_shape: (height, width, channels) of a latent.
      dtype: the type of the stored numbers, "float32" or "float16".
      mirror: whether the cache also has the mirror images.
      images_per_shard: how many images every shard but the last is for.
      source_digest: the digest of the data set's images, their order and labels (see
        `Source.identity`); empty in caches made before there was one.
      mean, std: the autoencoder's own numbers of each channel, which take the place of scale and
        shift; empty for most.
      normalize: "autoencoder", by those numbers; or "channel", by each channel's mean and standard
        deviation over this cache, which its manifest has.
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
    source_digest: str = ""
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    normalize: str = "autoencoder"

    @property
    def version(self) -> int:
        """The version of the manifest."""
        plain = self.shift == 0 and not self.mean and self.normalize == "autoencoder"
        return VERSIONS[0] if plain else VERSIONS[1]

    @property
    def latent_space(self) -> LatentSpace:
        """What the latents are, normalised by the autoencoder's own numbers."""
        return LatentSpace(
            channels=self.latent_shape[-1],
            stride=self.image_size // self.latent_shape[0],
            scale=self.scale,
            shift=self.shift,
            mean=self.mean,
            std=self.std,
            autoencoder=self.vae,
            digest=self.vae_digest,
        )

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.images_per_shard)

    @property
    def versions(self) -> int:
        """How many records an image has: 2 with its mirror image's."""
        return 2 if self.mirror else 1

    @functools.cached_property
    def record_type(self) -> np.dtype:
        """The type of a record: index in the data set, label, whether mirrored, and posterior.

        The posterior has the mean's channels before the standard deviation's.
        """
        height, width, channels = self.latent_shape
        posterior = ("posterior", _DTYPES[self.dtype], (height, width, 2 * channels))
        return np.dtype([*_HEAD.descr, posterior])

    def shard_name(self, shard: int) -> str:
        return f"latents-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def shard_images(self, shard: int) -> range:
        """The indices of a shard's images in the data set."""
        first = shard * self.images_per_shard
        return range(first, min(first + self.images_per_shard, self.num_images))

    def shard_bytes(self, shard: int) -> int:
        """About how many bytes a shard takes."""
        records = len(self.shard_images(shard)) * self.versions
        return records * (self.record_type.itemsize + 128)


def description_defaults() -> dict[str, Any]:
    """The defaults of a description's newer fields, as JSON has them."""
    fields = dataclasses.fields(CacheDescription)
    found = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in found.items()
    }


class LatentCache:
    """The records of a finished cache, for a `Source`: image i's posterior and label by i.

    Attributes:
      folder: the cache's folder.
      description: its contents.
      mirrored: whether `read_posteriors` can give the mirror images' posteriors.
      digest: a digest of all shards' bytes.
      latent_space: what the latents are, with the numbers that training normalises them by.
    """

    def __init__(
        self,
        folder: Path,
        description: CacheDescription,
        shards: Sequence[dict[str, Any]],
        measured: dict[str, Any] | None = None,
    ):
        self.folder, self.description = folder, description
        self.latent_space = description.latent_space
        if description.normalize == "channel":
            mean, std = (tuple((measured or {})[key]) for key in ("mean", "std"))
            self.latent_space = dataclasses.replace(self.latent_space, mean=mean, std=std)
        self.mirrored = description.mirror
        told = [(shard["file"], shard["records"], shard["sha256"]) for shard in shards]
        self.digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        images = [records // description.versions for _, records, _ in told]
        # A shard may lack some of its images, which could not be used.
        wanted = [len(description.shard_images(shard)) for shard in range(len(shards))]
        self._left_out = np.array(wanted) - images
        self._ends = np.cumsum(images)
        self._readers = ShardReaders(folder, [file for file, *_ in told])

    @property
    def stored_dtype(self) -> np.dtype:
        """The type of the stored numbers, which `read_posteriors` gives."""
        return np.dtype(self.description.dtype)

    @classmethod
    def open(cls, folder: str | Path) -> LatentCache:
        """Opens a cache and checks its manifest and its files' sizes.

        Raises:
          MissingData: no such folder, or no finished cache in it.
          ValueError: a damaged cache, or one that training cannot use.
        """
        folder = expand(folder)
        if not folder.is_dir():
            wanted = f"data.path must name one that {TOOL} made"
            if os.path.lexists(folder):
                raise NotADirectoryError(f"{wrong_kind(folder, 'folder')}; {wanted}")
            raise MissingData(f"{printable(folder)}: no such folder; {wanted}")
        manifest = read_json(folder / CACHE_MANIFEST)
        if manifest is None:
            raise MissingData(f"{printable(folder)}: {_why_no_manifest(folder)}")
        if manifest.get("version") not in VERSIONS:
            raise ValueError(
                f"{folder / CACHE_MANIFEST}: is of version {manifest.get('version')}, this program "
                f"reads {' and '.join(map(str, VERSIONS))}; encode the images again with {TOOL}"
            )
        cache = cls._from_manifest(folder, manifest)
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            size = path.stat().st_size if path.exists() else None
            if size != shard["bytes"]:
                what = "is missing" if size is None else f"has {size:,} bytes"
                raise ValueError(
                    f"{path}: {what}, of {shard['bytes']:,} bytes in the manifest; {_again(folder)}"
                )
        return cache

    @classmethod
    def _from_manifest(cls, folder: Path, manifest: dict[str, Any]) -> LatentCache:
        """The cache of a manifest.

        Raises:
          ValueError: the manifest lacks something or contradicts itself, as one changed by hand.
        """
        with explained(folder / CACHE_MANIFEST):
            # Caches from before a field was there have its default.
            known = description_defaults() | manifest
            check_fields(CacheDescription, known)
            shards = check_entries(manifest["shards"])
            fields = {
                field.name: known[field.name] for field in dataclasses.fields(CacheDescription)
            }
            listed = ("class_names", "latent_shape", "mean", "std")
            fields |= {key: tuple(fields[key]) for key in listed}
            description = CacheDescription(**fields)
            if description.normalize not in NORMALIZATIONS:
                raise ValueError(f"normalize is {description.normalize!r}")
            count, found = description.num_shards, [shard["file"] for shard in shards]
            # Counted first: the number of images may be any.
            if len(found) != count or found != list(map(description.shard_name, range(count))):
                raise ValueError(f"{len(found)} shards, which are not those of its images")
            cache = cls(folder, description, shards, manifest.get("measured"))
            if min(cache._left_out) < 0 or not cache._ends[-1]:
                raise ValueError(f"{cache._ends[-1]:,} of {description.num_images:,} images")
            size = description.record_type.itemsize
            if any(shard["bytes"] < shard["records"] * size for shard in shards):
                raise ValueError(f"records of {size:,} bytes, more than its shards have")
        return cache

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
        """Some images' posteriors, in the type they are stored in, and their labels.

        Args:
          indices: the images' indices.
          mirror: True for each image whose mirror image is wanted instead; only where `mirrored`.

        Raises:
          ValueError: a damaged shard, a record of another image, or a posterior that cannot be
            drawn from, by name.
          OSError: this process has too many files open.
        """
        shards = np.searchsorted(self._ends, indices, side="right")
        images = indices - np.concatenate([[0], self._ends])[shards]
        mirror = np.zeros(len(indices), bool) if mirror is None else mirror
        places = images * self.description.versions + mirror
        d, heads = self.description, []
        height, width, channels = d.latent_shape
        stored = np.dtype(_DTYPES[d.dtype])
        posteriors = np.empty((len(indices), height * width * 2 * channels), stored)
        # One record a call: the reader distributes several over threads of its own, which takes
        # twice as long as reading records of this size does.
        for row, (shard, place) in enumerate(zip(shards.tolist(), places.tolist(), strict=True)):
            record = self._read(shard, place)
            heads.append(record[: _HEAD.itemsize])
            posteriors[row] = np.frombuffer(record, stored, offset=_HEAD.itemsize)
        found = np.frombuffer(b"".join(heads), _HEAD)
        self._check(found, shards, images, mirror)
        posteriors = posteriors.reshape(-1, height, width, 2 * channels)
        check_posteriors(posteriors, lambda row: self._place(int(shards[row]), int(places[row])))
        return posteriors, found["label"].copy()

    def describe(self) -> str:
        """One line for a log."""
        d = self.description
        mirror = " and of mirror images" if d.mirror else ""
        return (
            f"{d.dtype} latents of {d.source} at {d.image_size} pixels{mirror}, by the autoencoder "
            f"{d.vae}, {self.latent_space.numbers}"
        )

    def _read(self, shard: int, place: int) -> bytes:
        reading.at(self._place, shard, place)
        try:
            data = self._readers.read(shard, place)
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._damaged(shard, place) from error
        if len(data) != self.description.record_type.itemsize:
            raise self._damaged(shard, place)
        return data

    def _check(
        self,
        found: np.ndarray,
        shards: Integer[np.ndarray, "n"],
        images: Integer[np.ndarray, "n"],
        mirror: Bool[np.ndarray, "n"],
    ) -> None:
        """Refuses, with ValueError, records that say they are of other images, or of no class."""
        d = self.description
        # Images that were left out come before, at most as many as the shard lacks.
        late = found["index"] - (shards * d.images_per_shard + images)
        wrong = (late < 0) | (late > self._left_out[shards]) | (found["mirrored"] != mirror)
        wrong |= (found["label"] < 0) | (found["label"] >= max(1, len(d.class_names)))
        if wrong.any():
            row = int(wrong.argmax())
            shard, place = int(shards[row]), int(images[row] * d.versions + mirror[row])
            index, label, mirrored = found[row].item()
            said = f"{'mirrored ' if mirrored else ''}image {index}, label {label}"
            sought = f"{'mirrored ' if mirror[row] else ''}image {index - late[row]}"
            raise ValueError(
                f"{self._place(shard, place)} says that it is of {said}, "
                f"and should be of {sought}, label 0 to {max(1, len(d.class_names)) - 1}; remove "
                f"the file, and {_again(self.folder)}"
            )

    def _place(self, shard: int, place: int) -> str:
        return f"{printable(self.folder / self.description.shard_name(shard))}: record {place}"

    def _damaged(self, shard: int, place: int) -> ValueError:
        return ValueError(f"{self._place(shard, place)} is damaged; {_again(self.folder)}")


def latents_source(path: str | Path) -> Source:
    """The posteriors of a finished cache.

    Raises:
      MissingData: no such folder, or not one that the tool finished.
      ValueError: a shard that is missing or damaged.
    """
    cache = LatentCache.open(path)
    d = cache.description
    kind = ExampleKind.POSTERIORS
    return Source(
        str(cache.folder), cache, d.latent_shape, d.class_names, kind, note=cache.describe()
    )


def _again(folder: Path) -> str:
    return f"run the {TOOL} command of --output {folder} again, which makes that shard anew"


def _why_no_manifest(folder: Path) -> str:
    if (folder / ENCODING).exists():
        return f"is not finished; run the {TOOL} command that began it again, and it goes on"
    if (folder / "latents.npy").exists():
        return "holds latents.npy, which data.name 'npy' reads"
    return f"holds no {CACHE_MANIFEST}; data.path must name a folder that {TOOL} made"
