"""Samples on disk while they are being made: a folder of parts, each whole, checksummed and final.

    OUTPUT.parts/manifest.json     what made them: all that their bits depend on
                 00000256.bin      the batch of samples from 256 on: its bytes and a BLAKE2b digest
                                   of manifest, first index and bytes

A part appears by one rename when it is on the disk, so a run that is killed loses the batch under
way and nothing else. A part that is damaged, or of another run, does not match its digest and is
made again. The number of samples is not in the manifest: sample i does not depend on it.

Process 0 alone reads and writes the folder, and locks it meanwhile, since two commands would remove
each other's parts; `by_first_process` tells the other processes what it found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Integer, Shaped

from mdt_jax.basics.atomic import is_full_disk, make_folder, whole_file
from mdt_jax.basics.places import open_file, read_bytes
from mdt_jax.checkpoints.lock import LOCK_FILE, WorkdirInUse, WorkdirLock
from mdt_jax.parallel.distributed import by_first_process
from mdt_jax.sampling.images import stream_npz

PARTS_MANIFEST = "manifest.json"
_PART, _ASIDE = ".bin", ".tmp"
_DIGEST_BYTES = 32
_PIECE_BYTES = 4 * 2**20


class Parts:
    """A folder of batches of samples, `folder`, of one set of settings.

    Args:
      folder: the folder; made if it is not there.
      settings: all that the samples' bits depend on, as JSON, first the settings that a user is
        most likely to change. Among them is `batch_size`, the samples in a part.
      shape: the shape of one sample.
      dtype: the type of the samples.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        shape: tuple[int, int, int],
        dtype: np.dtype,
    ):
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.shape, self.dtype = shape, dtype
        self._size = self.settings["batch_size"]
        self._row_bytes = int(np.prod(shape)) * self.dtype.itemsize
        self._seed = json.dumps(self.settings, sort_keys=True).encode()
        self._lock: WorkdirLock | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other commands out of the folder while its body runs, on all processes.

        The folder is made, and removed in the end if nothing is left in it.

        Raises:
          ValueError: another command has it; says on which host, by which process.
        """
        by_first_process(self._hold)
        try:
            yield
        finally:
            if self._lock is not None:
                with contextlib.suppress(OSError):  # such as a folder that went away
                    self._remove_if_empty()
                self._lock.release()

    def begin(self, count: int) -> list[int]:
        """Makes the folder, or finds the parts in it that belong to `count` samples.

        Parts that are damaged, that end before they should, or that are not finite are removed.

        Returns:
          The first index of every part that is there.

        Raises:
          FileExistsError: the folder holds other things.
          ValueError: the folder holds samples of other settings; names the first that differs.
          OSError: the disk has no room for the rest of the samples and for joining them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open()
        for left in self.folder.glob(f"*{_ASIDE}"):
            left.unlink()
        done = []
        for first in self._firsts(count):
            problem = self._problem(first, count)
            if problem is None:
                done.append(first)
            elif self._path(first).exists():
                logging.warning("%s %s: it is made again", self._path(first), problem)
                self._path(first).unlink()
        missing = sum(self._rows(first, count) for first in self._firsts(count))
        missing -= sum(self._rows(first, count) for first in done)
        self._check_space((missing + count) * self._row_bytes)
        return done

    def write(self, first: int, samples: Shaped[np.ndarray, "n h w c"]) -> None:
        """Writes the part that begins with sample `first`.

        Raises:
          OSError: it cannot be written; one line says what to do where the disk is full.
        """
        if not (self.folder / PARTS_MANIFEST).exists():
            raise OSError(
                f"{self.folder} was removed while its samples were drawn, and what it held is "
                "gone; the same command draws them again"
            )
        data = np.ascontiguousarray(samples, self.dtype).data.cast("B")
        digest = self._hash(first)
        digest.update(data)
        with self.explained(), whole_file(self._path(first)) as file:
            file.write(data)
            file.write(digest.digest())

    def pieces(self, count: int) -> Iterator[bytes]:
        """The bytes of the first `count` samples, a few megabytes at a time.

        Raises:
          ValueError: a part is missing or damaged.
        """
        for first in self._firsts(count):
            left = self._rows(first, count) * self._row_bytes
            try:
                for piece in self._read(first):
                    if left:
                        yield piece[:left]
                    left -= min(left, len(piece))
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{self._path(first)} {error}: run the same command again, which makes it anew"
                ) from error

    def first_samples(self, count: int) -> Shaped[np.ndarray, "n h w c"]:
        """The first `count` samples."""
        return np.frombuffer(b"".join(self.pieces(count)), self.dtype).reshape(-1, *self.shape)

    def join(
        self,
        path: Path,
        labels: Integer[np.ndarray, " n"],
        texts: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Writes the first samples, one for each label, as `images.stream_npz` does.

        Beside `texts` it writes these parts' settings, which `is_joined` looks for.

        Raises:
          OSError: as `write`.
          ValueError: a part is missing or damaged.
        """
        count = len(labels)
        texts = {**texts, "settings": self.settings}
        # In this folder, where `begin` finds what a kill leaves of it.
        with self.explained():
            stream_npz(
                path,
                (count, *self.shape),
                self.dtype,
                self.pieces(count),
                labels,
                texts,
                folder=self.folder,
            )

    def is_joined(self, path: Path, count: int) -> bool:
        """Whether a file holds `count` samples of these settings, joined before."""
        if not path.is_file() or not zipfile.is_zipfile(path):
            return False
        with np.load(path) as arrays:
            return (
                "settings" in arrays
                and json.loads(str(arrays["settings"])) == self.settings
                and len(arrays["arr_1"]) == count
            )

    def remove(self) -> None:
        """Removes the parts, if they are of these settings."""
        if self._found() != self.settings:
            return
        for path in [*self._parts(), *self.folder.glob(f"*{_ASIDE}")]:
            path.unlink()
        (self.folder / PARTS_MANIFEST).unlink()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Replaces the error of a full disk by one that says what is kept and what to do."""
        try:
            yield
        except OSError as error:
            if not is_full_disk(error):
                raise
            raise OSError(
                f"{self.folder}: the disk is full; {len(self._parts())} parts of {self._size} "
                "samples are kept; make room and run the same command again, which goes on"
            ) from error

    def _hold(self) -> None:
        make_folder(self.folder)
        try:
            self._lock = WorkdirLock(self.folder, flag="--output")
        except WorkdirInUse as error:
            raise ValueError(str(error)) from None

    def _remove_if_empty(self) -> None:
        """Removes the folder if at most its lock is in it."""
        if not any(path.name != LOCK_FILE for path in self.folder.iterdir()):
            (self.folder / LOCK_FILE).unlink(missing_ok=True)
            self.folder.rmdir()

    def _open(self) -> None:
        """Writes the manifest, or compares the settings with the manifest that is there."""
        found = self._found()
        if found is None:
            own = (self.folder / LOCK_FILE, *self.folder.glob(f"*{_ASIDE}"))
            others = [file.name for file in self.folder.iterdir() if file not in own]
            if others:
                raise FileExistsError(
                    f"{self.folder}: holds {others[0]} and no {PARTS_MANIFEST}; parts of samples "
                    "go there: remove it, or give another --output"
                )
        elif self._parts() and (difference := first_difference(found, self.settings)):
            raise ValueError(
                f"{self.folder}: {difference}; give what these parts were made with and they go "
                "on, or another --output, or remove them"
            )
        if found != self.settings:
            with self.explained(), whole_file(self.folder / PARTS_MANIFEST) as file:
                file.write(json.dumps(self.settings, indent=1).encode())

    def _found(self) -> dict[str, Any] | None:
        """The manifest that is there, None without one."""
        path = self.folder / PARTS_MANIFEST
        try:
            return dict(json.loads(read_bytes(path)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: cannot be read ({error}); remove {self.folder}, or give another --output"
            ) from error

    def _parts(self) -> list[Path]:
        return [path for path in self.folder.glob(f"*{_PART}") if path.stem.isdecimal()]

    def _firsts(self, count: int) -> range:
        return range(0, count, self._size)

    def _rows(self, first: int, count: int) -> int:
        """Samples of a part that `count` samples need."""
        return min(self._size, count - first)

    def _path(self, first: int) -> Path:
        return self.folder / f"{first:08d}{_PART}"

    def _hash(self, first: int) -> Any:
        digest = hashlib.blake2b(self._seed, digest_size=_DIGEST_BYTES)
        digest.update(f"\n{first}\n".encode())
        return digest

    def _problem(self, first: int, count: int) -> str | None:
        """Why a part is not one of `count` samples', None if it is."""
        read, finite = 0, True
        try:
            for piece in self._read(first):
                read += len(piece)
                if self.dtype.kind == "f" and not len(piece) % self.dtype.itemsize:
                    finite &= bool(np.isfinite(np.frombuffer(piece, self.dtype)).all())
        except (OSError, ValueError) as error:
            return str(error)
        if not finite:
            return "holds NaN or infinite values"
        wanted = self._rows(first, count)
        return None if read >= wanted * self._row_bytes else f"ends before {first + wanted} samples"

    def _read(self, first: int) -> Iterator[bytes]:
        """A part's samples in pieces; ValueError at the end if they are not what was written."""
        digest = self._hash(first)
        with open_file(self._path(first)) as file:
            left = max(os.fstat(file.fileno()).st_size - _DIGEST_BYTES, 0)
            while piece := file.read(min(left, _PIECE_BYTES)):
                left -= len(piece)
                digest.update(piece)
                yield piece
            if file.read() != digest.digest():
                raise ValueError("is damaged (its checksum differs)")

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder}: {free / 1e9:,.1f} GB are free, what is missing of the samples and "
                f"then joining them takes {needed / 1e9:,.1f}; make room, or give --output on "
                "another disk"
            )


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first setting in which two differ, in words; None if they do not."""
    for name in [*wanted, *(found.keys() - wanted.keys())]:
        if found.get(name) != wanted.get(name):
            there, here = (_say(settings.get(name)) for settings in (found, wanted))
            return f"made with {name} {there}, not {here}"
    return None


def _say(value: Any) -> str:
    if isinstance(value, list):
        value = ",".join(map(str, value))
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
