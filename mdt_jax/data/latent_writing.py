"""Making a latent cache, with any number of processes that may be killed and started again.

While a cache (`latent_cache`) is being made, `encoding.json` stands in for the manifest, and each
finished shard has its entry for the manifest beside it, in a .json file of its name. Every file
appears whole or not at all, and a shard whose size and SHA-256 are not those of its entry counts as
unfinished, so an interrupted run can go on. Each process claims the shards that it is to write, and
no other can have them while it lives. The process that comes last writes the manifest. If a shard
is later found to be damaged, `encoding.json` takes the manifest's place again until that shard is
made anew.

Claims are locks of bytes of a file, which end with their process. On a file system without locks
nothing is claimed: two processes may then write one shard, each to a file of its own, and the later
replaces the earlier.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from mdt_jax.basics.atomic import is_at, make_folder, whole_file, whole_path
from mdt_jax.basics.places import open_file
from mdt_jax.data.cache_json import (
    CACHE_MANIFEST,
    ENCODING,
    check_entries,
    check_fields,
    explained,
    read_json,
    unusable,
)
from mdt_jax.data.channel_sums import ChannelSums
from mdt_jax.data.latent_cache import CacheDescription, description_defaults

CLAIMS, STATE_LOCK = ".shards.lock", ".encoding.lock"
_HALF_WRITTEN = ".*.array_record.*"  # shards while `whole_path` writes them


def begin_cache(folder: Path, description: CacheDescription) -> None:
    """Makes a folder for a cache, or goes on with the same cache, begun or finished there.

    Raises:
      FileExistsError: the folder holds other things.
      ValueError: the folder holds another cache; the message names the first difference.
    """
    make_folder(folder)
    wanted = _plain(description)
    with _state_lock(folder):
        found = _found(folder)
        if found is not None:
            _check_same(folder, found, wanted)
            return
        for file in folder.iterdir():
            if not file.name.startswith("."):
                raise FileExistsError(
                    f"{folder}: holds {file.name}, which is no part of a latent cache; remove it, "
                    "or give another --output"
                )
        _write_json(folder / ENCODING, wanted)


@contextlib.contextmanager
def claim_shards(
    folder: Path, description: CacheDescription, shards: Iterable[int]
) -> Iterator[None]:
    """Holds shards for this process, to write them, while the context lasts.

    Raises:
      FileExistsError: another process holds one of them, which the message names.
    """
    shards = list(shards)
    with _lock_file(folder / CLAIMS, lambda file: _lock_shards(file, description, shards)) as held:
        if held:
            mine = {description.shard_name(shard) for shard in shards}
            for left in folder.glob(_HALF_WRITTEN):  # by processes that were killed
                if _whole_name(left) in mine:
                    left.unlink(missing_ok=True)
        yield


def unfinished_shards(
    folder: Path, description: CacheDescription, shards: Iterable[int]
) -> list[int]:
    """Those of some shards whose files are missing, or not of their entry's size and SHA-256.

    A manifest that counts one of them as finished becomes `encoding.json` again.
    """
    with _state_lock(folder):
        entries = _entries(folder, description)
    found = [k for k in shards if not _is_whole(folder / description.shard_name(k), entries[k])]
    if damaged := [shard for shard in found if entries[shard]]:
        with _state_lock(folder):
            _forget(folder, description, damaged)
    return found


def bytes_to_come(folder: Path, description: CacheDescription, shards: Iterable[int]) -> int:
    """About how many bytes are still to be written, for these shards and by other processes."""
    files = map(description.shard_name, range(description.num_shards))
    missing = (shard for shard, file in enumerate(files) if not (folder / file).exists())
    needed = sum(map(description.shard_bytes, {*shards, *missing}))
    for partial in folder.glob(_HALF_WRITTEN):
        with contextlib.suppress(FileNotFoundError):
            needed -= partial.stat().st_size
    return max(needed, 0)


def write_shard(
    folder: Path, description: CacheDescription, shard: int, records: Iterable[np.ndarray]
) -> dict[str, Any]:
    """Writes a shard and its entry for the manifest, which it returns.

    Args:
      folder: the cache's.
      description: its contents.
      shard: the shard's number.
      records: arrays of `record_type`, in the order of the images.

    Raises:
      OSError: it cannot be written, such as on a full disk.
    """
    path = folder / description.shard_name(shard)
    if _found(folder) is None:
        raise OSError(
            f"{folder} was removed while its latents were encoded, and what it held is gone; the "
            "same command begins again"
        )
    sums = ChannelSums(description.latent_shape[-1]) if measures(description) else None
    with whole_path(path) as aside:
        images = _write_records(Path(aside), records, sums)
        entry = {
            "file": path.name,
            "records": len(images),
            "left_out": sorted(set(description.shard_images(shard)).difference(images)),
            "bytes": os.path.getsize(aside),
            "sha256": _digest(Path(aside)),
        }
    if sums is not None:
        entry["sums"] = sums.to_json()
    _write_json(_part(path), entry)
    return entry


def finish_cache(folder: Path, description: CacheDescription) -> bool:
    """Writes the manifest if every shard is finished, and returns whether that is so.

    The process that comes last does it; several at once do it one after the other.
    """
    with _state_lock(folder):
        entries = _entries(folder, description)
        if not all(entries):
            return False
        found = _found(folder)
        # The names that the cache was begun with.
        values = _plain(description) | {key: found[key] for key in ("source", "vae")}
        values["records"] = sum(entry["records"] for entry in entries)
        values["left_out"] = description.num_images - values["records"] // description.versions
        if measures(description):
            values["measured"] = _measured(folder, description, entries)
        _write_json(folder / CACHE_MANIFEST, values | {"shards": entries})
        (folder / ENCODING).unlink(missing_ok=True)
        for shard in range(description.num_shards):
            _part(folder / description.shard_name(shard)).unlink(missing_ok=True)
        for pattern in (".*.json.*", _HALF_WRITTEN):  # left by processes that were killed
            for left in folder.glob(pattern):
                left.unlink(missing_ok=True)
        return True


def measures(description: CacheDescription) -> bool:
    """Whether every channel's mean and standard deviation are measured over the cache."""
    return description.normalize == "channel"


def _measured(
    folder: Path, description: CacheDescription, entries: Iterable[dict[str, Any]]
) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel over all shards.

    Raises:
      ValueError: a channel that is the same everywhere, which cannot be normalised.
    """
    total = ChannelSums(description.latent_shape[-1])
    with explained(folder / ENCODING):
        for entry in entries:
            total.join(ChannelSums.from_json(entry["sums"]))
    mean, std = total.moments()
    if not (std > 0).all() or not np.isfinite(std).all():
        channel = int(np.argmin(np.where(np.isfinite(std), std, -1)))
        raise ValueError(
            f"{folder}: channel {channel} of the latents has the standard deviation "
            f"{std[channel]:g} over all images, and cannot be normalised; encode with "
            "--normalize autoencoder"
        )
    return {"mean": mean.tolist(), "std": std.tolist()}


def _write_records(
    path: Path, records: Iterable[np.ndarray], sums: ChannelSums | None
) -> list[int]:
    """Writes an ArrayRecord file, adds its posteriors up, and returns each record's image."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    images: list[int] = []
    try:
        for rows in records:
            with _disk_errors(path):
                for row in rows:
                    writer.write(row.tobytes())
            images += rows["index"].tolist()
            if sums is not None:
                sums.add(rows["posterior"])
    finally:
        with _disk_errors(path):
            writer.close()
    return images


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the only one that ArrayRecord raises
        raise OSError(
            f"{path.parent / _whole_name(path)}: cannot be written ({str(error).split(';')[0]}); "
            "make room, and run the same command again, which goes on"
        ) from error


@contextlib.contextmanager
def _lock_file(path: Path, lock: Callable[[IO[str]], bool]) -> Iterator[bool]:
    """Holds a lock file, and removes it at the end unless another process holds a part of it.

    Args:
      path: the file.
      lock: locks the open file and returns True, or False on a file system without locks.

    Yields:
      The answer of `lock`.

    Raises:
      FileExistsError: another process holds a part, as `lock` found.
    """
    patience = 3
    while True:
        with open_file(path, "a") as file:
            try:
                held = lock(file)
            except FileExistsError:  # the other process may be just leaving
                patience -= 1
                if not patience:
                    raise
                time.sleep(0.1)
                continue
            if held and not is_at(file, path):
                continue  # its last holder has removed it; there may be a new one to lock
            try:
                yield held
            finally:
                with contextlib.suppress(OSError):
                    if held:
                        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # all of it
                    path.unlink()
        return


def _state_lock(folder: Path) -> contextlib.AbstractContextManager[bool]:
    """A lock on the entries of all shards, to read or to change them."""

    def lock(file: IO[str]) -> bool:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
            return True
        return False

    return _lock_file(folder / STATE_LOCK, lock)


def _lock_shards(file: IO[str], description: CacheDescription, shards: Iterable[int]) -> bool:
    """Locks the byte of each shard; False on a file system without locks.

    Raises:
      FileExistsError: another process holds one of them.
    """
    for shard in shards:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except (BlockingIOError, PermissionError) as error:
            raise FileExistsError(
                f"{Path(file.name).with_name(description.shard_name(shard))}: another process is "
                "to encode it, and is still running; wait for that one or end it, or give each "
                "process a --process_index of its own and the same --process_count"
            ) from error
        except OSError:  # a file system without locks
            return False
    return True


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses, with ValueError, to go on with a cache of another description."""
    known, found = found.get("source_digest"), description_defaults() | found
    for key, value in wanted.items():
        # A copy of an encoder may have another name than "mse"; the version follows from the rest.
        if key in ("vae", "version"):
            continue
        if key == "source" and known and known == wanted["source_digest"]:  # a folder that moved
            continue
        if key == "source_digest" and not known:  # begun before there was one
            continue
        if found.get(key) != value:
            before, now = _say(key, found, wanted)
            raise ValueError(
                f"{folder}: holds latents of {before}, not of {now}; give another --output, or the "
                "flags and images that these were begun with, or remove them"
            )


def _say(key: str, found: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, str]:
    """A difference between two descriptions in words: the value found, and the one wanted."""
    pair = found, wanted
    if key == "vae_digest":
        return tuple(f"the autoencoder {values['vae']} ({values[key]})" for values in pair)
    if key == "num_images":
        return f"the {found[key]:,} images that {found['source']} held", f"the {wanted[key]:,} now"
    if key == "class_names":
        for label, names in enumerate(zip(*(values[key] for values in pair), strict=False)):
            if names[0] != names[1]:
                return tuple(f"{name!r} as class {label}" for name in names)
        return tuple(f"{len(values[key]):,} classes" for values in pair)
    if key == "source_digest":
        return (
            f"{found['source']} as it was ({found[key]})",
            f"what it holds now ({wanted[key]}): as many images of the same classes, but others, "
            "or in another order, or labelled otherwise",
        )
    return tuple(f"{key} {values.get(key)}" for values in pair)


def _found(folder: Path) -> dict[str, Any] | None:
    """The content of `encoding.json`, which counts even beside a manifest, or of the manifest.

    Raises:
      ValueError: it is damaged.
    """
    for path in (folder / ENCODING, folder / CACHE_MANIFEST):
        if found := read_json(path):
            with explained(path):
                check_fields(CacheDescription, description_defaults() | found)
                check_entries([entry for entry in found.get("shards", ()) if entry is not None])
            return found
    return None


def _entries(folder: Path, description: CacheDescription) -> list[dict[str, Any] | None]:
    """The entry of each shard, from beside it or from the manifest; None where it has none.

    Raises:
      ValueError: an entry is damaged.
    """
    entries = list((_found(folder) or {}).get("shards") or [None] * description.num_shards)
    if len(entries) != description.num_shards:
        raise unusable(folder / CACHE_MANIFEST, f"holds {len(entries)} shards")
    for shard in range(description.num_shards):
        path = _part(folder / description.shard_name(shard))
        if part := read_json(path):
            with explained(path):
                (entries[shard],) = check_entries([part])
    return entries


def _forget(folder: Path, description: CacheDescription, shards: list[int]) -> None:
    """Removes the entries of some shards; the cache is unfinished from then on."""
    found = _found(folder)
    if "shards" in found:
        for shard in shards:
            found["shards"][shard] = None
        _write_json(folder / ENCODING, found)
        (folder / CACHE_MANIFEST).unlink(missing_ok=True)
    for shard in shards:
        _part(folder / description.shard_name(shard)).unlink(missing_ok=True)


def _is_whole(path: Path, entry: dict[str, Any] | None) -> bool:
    """Whether a shard has an entry, and the size and SHA-256 that it gives."""
    try:
        return (
            entry is not None
            and path.stat().st_size == entry["bytes"]
            and _digest(path) == entry["sha256"]
        )
    except FileNotFoundError:
        return False


def _part(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _whole_name(partial: Path) -> str:
    """The name of the shard that a half-written .SHARD.ID.tmp is to become."""
    return partial.name[1:].rsplit(".", 2)[0]


def _plain(description: CacheDescription) -> dict[str, Any]:
    """A description as JSON gives it back, with lists in place of tuples, and the version."""
    return json.loads(
        json.dumps({"version": description.version, **dataclasses.asdict(description)})
    )


def _digest(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    try:
        with whole_file(path) as file:
            # A name's byte that is no UTF-8 becomes JSON's escape of it.
            file.write(text.encode(errors="backslashreplace"))
    except FileNotFoundError:  # another process has finished, and removed what was half written
        if not path.exists():
            raise
