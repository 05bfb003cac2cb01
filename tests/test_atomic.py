"""Files appear whole or not at all, by whatever they are written."""

import errno
import os
from pathlib import Path

import pytest

from mdt_jax.atomic import is_full_disk, whole_file, whole_path


def test_a_file_appears_when_it_is_on_the_disk(tmp_path, monkeypatch):
    path, seen = tmp_path / "new" / "a", []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    with whole_file(path) as file:
        file.write(b"new")
    assert seen == [False] and path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_body_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), whole_file(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_writer_may_replace_the_file_it_is_given(tmp_path):
    """safetensors does."""
    with whole_path(tmp_path / "a") as aside:
        Path(aside).write_bytes(b"half")
        (tmp_path / "b").write_bytes(b"whole")
        os.replace(tmp_path / "b", aside)
    assert (tmp_path / "a").read_bytes() == b"whole" and os.listdir(tmp_path) == ["a"]


def test_a_file_may_be_written_in_another_folder(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    with whole_file(tmp_path / "a", folder):
        (left,) = folder.iterdir()
        assert left.suffix == ".tmp"
    assert sorted(os.listdir(tmp_path)) == ["a", "parts"] and not list(folder.iterdir())


def test_a_full_disk_is_known_by_its_number_or_its_text():
    assert is_full_disk(OSError(errno.ENOSPC, "whatever"))
    assert is_full_disk(ValueError("writing a/b: No space left on device [os_error_code]"))
    assert not is_full_disk(OSError(errno.ENOENT, "No space left on device"))
    assert not is_full_disk(ValueError("no such thing"))
