"""Files appear whole or not at all, by whatever they are written."""

import errno
import os
from pathlib import Path

import pytest

from mdt_jax.basics.atomic import is_at, is_full_disk, make_folder, whole_file, whole_path


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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_an_error_of_writing_names_the_file_that_a_user_knows(code, tmp_path):
    with (
        pytest.raises(OSError, match="report.json") as caught,
        whole_file(tmp_path / "report.json"),
    ):
        raise OSError(code, os.strerror(code))
    assert caught.value.filename == str(tmp_path / "report.json")
    assert not os.listdir(tmp_path)


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    for error in (OSError(errno.EIO, "x"), OSError(errno.ENOSPC, "x", "other")):
        with pytest.raises(OSError) as caught, whole_file(tmp_path / "report.json"):
            raise error
        assert caught.value.filename == error.filename != str(tmp_path / "report.json")


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "n" * 199])
def test_a_name_as_long_as_the_system_allows_is_written(name, tmp_path):
    with whole_file(tmp_path / name) as file:
        file.write(b"all")
    assert os.listdir(tmp_path) == [name]


def test_a_folder_that_cannot_be_made_or_written_to_says_why(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("gone")
    for name, said in (
        ("file", "file is a file; move it away"),
        ("file/a/b", "file is a file; move it away"),
        ("link", "link is a symbolic link to gone, which is not there; mend it"),
        ("link/a", "link is a symbolic link to gone, which is not there; mend it"),
        ("n" * 300, "File name too long; mend the path"),
    ):
        with pytest.raises(OSError, match=f"cannot be made: .*{said}, or give another --output"):
            make_folder(tmp_path / name)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OSError, match="a/b cannot be written to: change its permissions, or give"):
        make_folder(tmp_path / "a" / "b", "--workdir")


def test_a_file_that_was_removed_or_replaced_is_noticed(tmp_path):
    with open(tmp_path / "a", "a") as file:
        assert is_at(file, tmp_path / "a")
        (tmp_path / "a").unlink()
        assert not is_at(file, tmp_path / "a")
        (tmp_path / "a").write_text("")
        assert not is_at(file, tmp_path / "a")
