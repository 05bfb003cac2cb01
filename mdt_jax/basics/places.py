"""Places that a person names: URLs and what to do about them, what is there, and reading files.

Files are read from a file system. What is not a plain file (a pipe, a socket, a device) is never
opened: reading it could wait for ever.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

from mdt_jax.basics.names import printable

# Also one whose slashes `pathlib` made one.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/{1,3}(?=[^/])")
# Settings that are folders, which no download gives.
_FOLDERS = re.compile(r"workdir|checkpoints|_dir\b|imagenet|--folder|--lmdb")
_APPENDED = re.compile(r"workdir|checkpoints")
# Settings, by the last part of their names, that are files of weights: hf://OWNER/REPO/FILE too.
_WEIGHTS = ("checkpoint", "ema", "inception", "init_from", "input", "model", "opt", "vae")
# What makes a bucket, or another host's folder, one of this host.
_MOUNTS = {
    "gs": "the bucket (gcsfuse)",
    "s3": "the bucket (mount-s3)",
    **dict.fromkeys(("abfs", "abfss", "az", "wasb", "wasbs"), "the container (blobfuse2)"),
    **dict.fromkeys(("scp", "sftp", "ssh"), "the folder (sshfs)"),
}
_DOWNLOADS = ("http", "https", "ftp")


def refuse_urls(settings: Any, name: str = "--") -> None:
    """Refuses a setting that is a URL: only files are read and written, and weights of the hub.

    Args:
      settings: a command's flags or a config, by name; lists and mappings in it are looked into.
      name: what stands before a setting's name in the message.

    Raises:
      ValueError: the first that is a URL; says what to do.
    """
    for key, value in settings.items():
        if isinstance(value, str | os.PathLike):
            for text in os.fspath(value).split(","):  # several files of one flag
                refuse_url(text, f"{name}{key}")
        elif isinstance(value, list | tuple):
            for entry in value:
                refuse_url(entry, f"{name}{key}")
        elif hasattr(value, "items"):
            refuse_urls(value, f"{name}{key}.")


def refuse_url(path: Any, name: str) -> None:
    """Refuses a path that is a URL, with ValueError; see `refuse_urls`.

    Args:
      path: a path. One through `pathlib`, which makes one slash of two, is known too. Anything
        else is left alone.
      name: what the message calls it, such as "--workdir" or "data.path".
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    found = _URL.match(text) if isinstance(text, str) else None
    if found is None:
        return
    scheme = found[1].lower()
    weights = re.split(r"[-. ]", name)[-1] in _WEIGHTS
    if scheme == "hf" and weights:
        return
    if "://" not in text:
        text = text.replace(":/", ":///" if scheme == "file" else "://", 1)
    if scheme in _DOWNLOADS and _FOLDERS.search(name):
        way_out = "download the files in it, and give their folder"
    elif scheme in _DOWNLOADS:
        way_out = f"download the file (curl -LO {text}), and give its path"
    elif scheme == "file":
        way_out = "give the path alone"
    elif scheme == "s3" and _APPENDED.search(name):
        way_out = (
            "mount-s3 cannot append to a file, as a run does; give a folder of a shared file "
            "system (NFS, FSx)"
        )
    elif scheme == "hf":
        way_out = "download it (hf download OWNER/REPO), and give the path"
    else:
        way_out = f"mount {_MOUNTS.get(scheme, 'it')}, and give the path"
    raise ValueError(f"{name} {text} is a URL: {way_out}".strip())


def expand(path: str | os.PathLike) -> Path:
    """A path with its leading ~ or ~USER replaced by that user's home.

    Raises:
      ValueError: there is no such user, or no home of this one; names the path.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise ValueError(
            f"{printable(path)}: the home of {printable(user)} is not known; write the path in "
            "full, or as ./~… for a folder of that name"
        ) from error


def what_is_there(path: str | os.PathLike) -> str:
    """What is at a path where something else was wanted, in words, such as "a pipe"."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            return f"a link to {printable(os.readlink(path))}, which leads to nothing"
        return "nothing" if isinstance(error, FileNotFoundError) else f"closed ({error.strerror})"
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder"}
    kinds |= {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def wrong_kind(path: str | os.PathLike, wanted: str = "file") -> str:
    """What a message says of a path that is no file, or no folder, as wanted."""
    return f"{printable(path)}: is no {wanted} but {what_is_there(path)}"


def check_is_file(path: str | os.PathLike) -> None:
    """Refuses, with ValueError, what is there and is no plain file, or no link to one."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(wrong_kind(path))


def open_file(path: str | os.PathLike, mode: str = "rb", **more: Any) -> Any:
    """`open`, for a place where a plain file is, or is to be; `more` is for `open`, too.

    Raises:
      FileNotFoundError: nothing is there, and the mode is one of reading.
      OSError: it cannot be opened.
      ValueError: it is no file.
    """
    check_is_file(path)
    return open(path, mode, **more)


def read_bytes(path: str | os.PathLike) -> bytes:
    """A small file's bytes; raises as `open_file`."""
    with open_file(path) as file:
        return file.read()


def read_text(path: str | os.PathLike) -> str:
    """A small file's text in UTF-8, with or without a mark in front.

    Raises:
      FileNotFoundError: nothing is there.
      OSError: it cannot be read.
      ValueError: it is no file, or no text in UTF-8; for a message that names the file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"is no file but {what_is_there(path)}")
    return Path(path).read_text(encoding="utf-8-sig")
