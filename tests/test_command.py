"""How commands end: one line and status 1 for what a user can mend, a traceback for the rest."""

import argparse
import ast
import contextlib
import errno
import functools
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import tqdm
from absl import logging

import mdt_jax
from mdt_jax import checkpoints
from mdt_jax.basics.places import refuse_url, refuse_urls
from mdt_jax.checkpoints import CheckpointError
from mdt_jax.evaluation.batches import open_images
from mdt_jax.parallel.command import (
    command_ending,
    ending_quietly,
    one_line,
)
from mdt_jax.sampling.inpainting import read_image, read_mask
from mdt_jax.training.step_log import NonFiniteLoss
from mdt_jax.weights import files as weight_files
from mdt_jax.weights import inception, pretrained
from mdt_jax.weights.autoencoder import Autoencoder

ROOT = Path(__file__).parents[1]


def end(error, **settings):
    """The status that a command whose body raises an error ends with."""
    with pytest.raises(SystemExit) as caught, command_ending(**settings):
        raise error
    return caught.value.code


@pytest.mark.parametrize("kind", [ValueError, OSError, CheckpointError, NonFiniteLoss])
def test_what_a_user_can_mend_ends_in_one_line(kind):
    assert end(kind("no run in\n  runs/digits")) == "error: no run in runs/digits"


def test_a_fault_of_the_code_keeps_its_traceback():
    for kind in (KeyError, RuntimeError, TypeError):
        with pytest.raises(kind), command_ending():
            raise kind("x")


def test_a_command_may_count_more_as_a_users():
    assert end(RuntimeError("no GPU"), also=(RuntimeError,)) == "error: no GPU"


def test_debugging_shows_the_traceback():
    before = logging.get_verbosity()
    logging.set_verbosity(logging.DEBUG)
    try:
        with pytest.raises(ValueError, match="x"), command_ending():
            raise ValueError("x")
    finally:
        logging.set_verbosity(before)


def test_a_body_that_ends_well_or_by_itself_is_left_alone():
    with command_ending():
        pass
    with pytest.raises(SystemExit) as caught, command_ending():
        raise SystemExit(3)
    assert caught.value.code == 3


def test_an_interruption_is_told_and_ends_with_130(capsys):
    assert end(KeyboardInterrupt(), interrupted="interrupted; it goes on") == 130
    assert capsys.readouterr().err == "interrupted; it goes on\n"
    with pytest.raises(KeyboardInterrupt), command_ending():
        raise KeyboardInterrupt


def test_a_line_holds_the_notes_and_the_commands_own_flags():
    error = ValueError("data.path DIR/data.path is empty")
    error.add_note("in the\nfirst example")
    assert one_line(error) == "data.path DIR/data.path is empty in the first example"
    assert one_line(error, {"data.path": "--folder"}).startswith("--folder DIR/data.path is empty")
    assert end(error, message=lambda error: "said otherwise") == "error: said otherwise"


# ---- Pipes that nobody reads any more, and outputs that cannot be written ---------------------


@contextlib.contextmanager
def output_into(descriptor, monkeypatch, name="stdout"):
    """A standard stream that writes to a file descriptor, closed in the end without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with os.fdopen(descriptor, "w") as stream:
            monkeypatch.setattr(sys, name, stream)
            yield stream
            monkeypatch.undo()


def unread_pipe():
    """The writing end of a pipe whose reader is gone, as of `head` when it has its lines."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def prints_much():
    for _ in range(10_000):
        print("a line of a table that fills a pipe")


def prints_little():
    print("a line that stays in Python's buffer")


def asks_for_help():
    argparse.ArgumentParser(description="much " * 10_000).parse_args(["--help"])


def flushes():
    print("a line", flush=True)


@pytest.mark.parametrize("body", [prints_much, prints_little, asks_for_help, flushes])
@pytest.mark.parametrize("ending", [command_ending, ending_quietly])
def test_a_command_whose_output_is_no_longer_read_ends_quietly(ending, body, monkeypatch, capfd):
    with output_into(unread_pipe(), monkeypatch):
        with pytest.raises(SystemExit) as caught, ending():
            body()
        # argparse itself does not mind where its help goes.
        assert caught.value.code == (0 if body is asks_for_help else 141)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("body", [prints_much, prints_little, flushes])
@pytest.mark.parametrize("ending", [command_ending, ending_quietly])
def test_messages_that_are_no_longer_read_are_no_error(ending, body, monkeypatch, capfd):
    with output_into(unread_pipe(), monkeypatch, "stderr"):
        monkeypatch.setattr("builtins.print", functools.partial(print, file=sys.stderr))
        with contextlib.suppress(SystemExit), ending():
            body()
    assert capfd.readouterr() == ("", "")


def test_a_users_error_is_told_though_the_output_is_no_longer_read(monkeypatch):
    with output_into(unread_pipe(), monkeypatch):
        with pytest.raises(SystemExit) as caught, ending_quietly(), command_ending():
            print("a line")
            raise ValueError("no run there")
        assert caught.value.code == "error: no run there"


def test_another_pipe_that_breaks_is_no_silent_end():
    error = BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert end(error) == "error: Broken pipe"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_an_output_on_a_full_disk_is_an_error(monkeypatch):
    with output_into(os.open("/dev/full", os.O_WRONLY), monkeypatch):
        with pytest.raises(SystemExit) as caught, command_ending():
            print("a line")
        assert "No space left on device; make room" in caught.value.code


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with command_ending():
        print("nowhere")


COMMANDS = [
    path
    for path in [*ROOT.glob("tools/*.py"), *ROOT.glob("mdt_jax/**/*.py")]
    if '\nif __name__ == "__main__":' in path.read_text()
    and path.name != "kernels.py"
    and "runpy.run_module(" not in path.read_text()  # runs another of these
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_ends_so_whatever_it_prints(path):
    tree = ast.parse(path.read_text())
    last = tree.body[-1]
    ended = ("ending_quietly()", "run_command(")  # which ends so itself
    assert any(end in ast.unparse(last) for end in ended)
    mains = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and node.name == "main"
        and not re.search(r"\w\.main\(arguments", ast.unparse(node))  # another file's
    ]
    for main in mains:
        inside = [
            node
            for block in ast.walk(main)
            if isinstance(block, ast.With)
            and any("command_ending" in ast.unparse(item) for item in block.items)
            for node in ast.walk(block)
        ]
        prints = [node for node in ast.walk(main) if getattr(node, "id", "") == "print"]
        assert inside and all(node in inside for node in prints)


def test_the_commands_are_found():
    assert len(COMMANDS) >= 18


# ---- Progress bars ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("x"), "error: x"), (KeyboardInterrupt(), 130)]
)
def test_a_bar_ends_before_the_error(error, status, capsys):
    bars = [tqdm.tqdm(total=9, desc=name) for name in ("outer", "inner")]
    bars[1].update(3)
    assert end(error, interrupted="interrupted") == status
    assert capsys.readouterr().err.removesuffix("interrupted\n").endswith("\n")
    assert all(bar.disable for bar in bars)


def test_a_bar_of_a_generator_that_is_still_held_ends(capsys):
    def batches():
        with tqdm.tqdm(total=9) as bar:
            for _ in range(9):
                yield 1
                bar.update()

    held = batches()
    with pytest.raises(SystemExit), command_ending():
        next(held)
        raise OSError("the disk went away")
    assert capsys.readouterr().err.endswith("\n")


# ---- The system's own errors --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "/a/b: No space left on device; make room"),
        (errno.EDQUOT, "/a/b: Disk quota exceeded; make room in your quota"),
        (errno.EFBIG, "/a/b: File too large; raise the limit"),
        (errno.EROFS, "/a/b: Read-only file system; give a place that can be written to"),
        (errno.EACCES, "/a/b: Permission denied; give a place that is yours"),
        (errno.ENAMETOOLONG, "/a/b: File name too long; give a shorter name"),
        (errno.ENOENT, "/a/b: No such file or directory; is the path right?"),
        (errno.EIO, "/a/b: Input/output error"),
    ],
)
def test_an_error_of_the_system_names_the_file_and_the_way_out(code, said):
    assert one_line(OSError(code, os.strerror(code), "/a/b")).startswith(said)
    assert "Errno" not in one_line(OSError(code, os.strerror(code)))


# ---- URLs ---------------------------------------------------------------------------------------

URLS = {
    "https://x.y/z.pt": "download the file (curl -LO https://x.y/z.pt), and give its path",
    "http://x.y/z": "download the file",
    "gs://bucket/run": "mount the bucket (gcsfuse), and give the path",
    "s3://bucket/run": "mount the bucket (mount-s3), and give the path",
    "GS://bucket/run": "mount the bucket (gcsfuse), and give the path",
    "abfs://bucket/run": "mount the container (blobfuse2), and give the path",
    "sftp://host/run": "mount the folder (sshfs), and give the path",
    "hdfs://host/run": "mount it, and give the path",
    "HTTPS://x.y/z.pt": "download the file",
    "file:///tmp/a.pt": "give the path alone",
}


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_refused_as_it_was_given(url):
    for settings, name in (
        (argparse.Namespace(output=url), "--output"),
        (argparse.Namespace(samples=["a.npz", url]), "--samples"),
        (argparse.Namespace(samples=f"a.npz,{url}"), "--samples"),
        (argparse.Namespace(config={"data": {"path": url}}), "--config.data.path"),
        (argparse.Namespace(input=url, step=3), "--input"),
    ):
        with pytest.raises(SystemExit) as caught, command_ending(settings):
            pass
        assert caught.value.code.startswith(f"error: {name} {url} is a URL: {URLS[url]}")


def test_slashes_that_pathlib_took_come_back():
    with pytest.raises(ValueError, match="--workdir https://x.y/z.pt is a URL"):
        refuse_url(Path("https://x.y/z.pt"), "--workdir")


@pytest.mark.parametrize("name", ["--workdir", "workdir", "--data_dir", "--config.checkpoints"])
def test_a_url_of_a_folder_is_not_to_be_downloaded_as_a_file(name):
    with pytest.raises(ValueError, match="is a URL: download the files in it, and give their"):
        refuse_url("https://x.y/run", name)


@pytest.mark.parametrize("path", ["configs/digits.py:MDTv2", "a:b", "runs/a", "", "tfds:mnist"])
def test_what_is_no_url_is_let_through(path):
    refuse_urls({"path": path, "more": [path, 3, None], "config": {"a": path}})
    refuse_url(Path(path), "--path")


HUB = "hf://OWNER/REPO/FILE"


@pytest.mark.parametrize("name", ["--checkpoint", "--vae", "config.init_from", "eval.inception"])
def test_weights_are_taken_from_the_hub(name):
    refuse_url(HUB, name)


@pytest.mark.parametrize("name", ["--workdir", "--output", "data.path", "--samples", "the images"])
def test_nothing_else_is_taken_from_the_hub(name):
    with pytest.raises(ValueError, match=f"^{name} {HUB} is a URL: download it .hf download OWN"):
        refuse_url(HUB, name)


@pytest.mark.parametrize(
    "read",
    [
        weight_files.read_weights,
        pretrained.read_pretrained,
        inception.load_network,
        Autoencoder.load,
        checkpoints.read_meta,
        mdt_jax.load,
        open_images,
        read_mask,
        functools.partial(read_image, channels=3),
    ],
)
@pytest.mark.parametrize("url", ["https://x.y/z.pt", "https://x.y/run"])
def test_python_functions_name_a_url_as_it_was_given(read, url):
    for source in (url, Path(url)):
        with pytest.raises(ValueError, match=f"{url} is a URL: download the file"):
            read(source)
