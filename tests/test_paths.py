"""Paths that users give, and small files beside their data: what cannot be read is said so."""

import ast
import contextlib
import functools
import os
import signal
import socket
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from mdt_jax import config as config_lib
from mdt_jax import data
from mdt_jax.basics import places
from mdt_jax.checkpoints import CheckpointError, seal
from mdt_jax.checkpoints.lock import WorkdirLock
from mdt_jax.data import feature_files, latent_writing, npy
from mdt_jax.data.cache_json import read_json
from mdt_jax.data.decoding import decode_image
from mdt_jax.data.idx import read_idx
from mdt_jax.evaluation import classifier
from mdt_jax.parallel import sharding
from mdt_jax.parallel.command import USER_ERRORS, one_line
from mdt_jax.sample import flags
from mdt_jax.sampling import images
from mdt_jax.sampling.parts import PARTS_MANIFEST, Parts
from mdt_jax.training import metrics
from mdt_jax.weights import files as weight_files
from mdt_jax.weights import inception, pretrained


@contextlib.contextmanager
def deadline(seconds):
    """A context that ends with AssertionError, which no reader takes for its own, in time."""

    def ring(*_):
        raise AssertionError(f"waited for {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def link_to_itself(path):
    path.symlink_to(path)


def listen(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


KINDS = {
    "a pipe": os.mkfifo,
    "a socket": listen,
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nowhere, which leads to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("what", KINDS)
def test_what_is_no_file_is_named(tmp_path, what):
    KINDS[what](tmp_path / "a")
    assert places.wrong_kind(tmp_path / "a") == f"{tmp_path}/a: is no file but {what}"


@pytest.mark.parametrize("what", [what for what in KINDS if "link" not in what])
def test_a_small_file_that_is_none_is_not_opened(tmp_path, what):
    KINDS[what](tmp_path / "a")
    with pytest.raises(ValueError, match=f"is no file but {what}"):
        places.read_text(tmp_path / "a")
    with pytest.raises(ValueError, match=f"a: is damaged .*is no file but {what}"):
        read_json(tmp_path / "a")


def test_a_mark_in_front_is_no_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn")
    assert places.read_text(tmp_path / "a") == "grün"


@pytest.mark.parametrize("name", ["folder", "npy", "latents", "fashion_mnist", "tfds:cifar10"])
def test_the_home_of_nobody_is_named_in_one_line(name):
    config = config_lib.default_config()
    config.data.update(name=name, path="~no_such_user/x")
    with pytest.raises(ValueError, match="~no_such_user/x: the home of ~no_such_user is not known"):
        data.create_source(config.data)


@pytest.mark.parametrize("name", ["folder", "npy", "latents"])
@pytest.mark.parametrize("make", [lambda path: path.write_text(""), os.mkfifo, link_to_itself])
def test_a_data_path_that_is_no_folder_is_there_but_wrong(tmp_path, name, make):
    make(tmp_path / "a")
    config = config_lib.default_config()
    config.data.update(name=name, path=str(tmp_path / "a"))
    with pytest.raises(NotADirectoryError, match="a: is no folder but a"):
        data.create_source(config.data)


@pytest.mark.parametrize("target", ["nowhere", "images.npy"])
def test_a_link_for_images_that_leads_to_nothing_is_no_missing_data(tmp_path, target):
    (tmp_path / "images.npy").symlink_to(target)
    with pytest.raises(ValueError, match=f"images.npy: is no file but a link to {target}"):
        data.npy_directory(tmp_path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "is no file but a pipe; mend it"),
        (os.mkdir, "is no file but a folder; mend it"),
        (lambda path: path.write_text("[1]"), r"it holds '\[1\]', and must hold an object such as"),
        (lambda path: path.write_text("null"), "it holds 'None', and must hold an object such as"),
        (lambda path: path.write_text('{"scale": 1e308}'), "scale is 1e\\+308; it must be a num"),
        (lambda path: path.write_text('{"scale": 1e-40}'), "scale is 1e-40; it must be a number"),
    ],
)
def test_a_description_of_latents_that_is_none_is_refused(tmp_path, make, said):
    np.save(tmp_path / "latents.npy", np.ones((2, 4, 4, 8), np.float16))
    make(tmp_path / "latents.json")
    with pytest.raises(ValueError, match=f"latents.json: .*{said}") as told:
        data.npy_directory(tmp_path)
    assert len(str(told.value).splitlines()) == 1


def test_a_description_of_latents_may_have_a_mark_in_front(tmp_path):
    np.save(tmp_path / "latents.npy", np.ones((2, 4, 4, 8), np.float16))
    (tmp_path / "latents.json").write_text('{"scale": 0.5}', encoding="utf-8-sig")
    assert data.npy_directory(tmp_path).latent_space.scale == 0.5


def test_one_of_fast_dits_folders_says_to_give_the_one_around_both(tmp_path):
    for name, array in (("x_features", np.ones((1, 4, 8, 8))), ("x_labels", np.zeros(1, int))):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", array)
    assert len(data.npy_directory(tmp_path)) == 1
    for name in ("x_features", "x_labels"):
        with pytest.raises(ValueError, match=f"set data.path to the one around both, {tmp_path}"):
            data.npy_directory(tmp_path / name)
    np.save(tmp_path / "x_features" / "0.npy", np.ones((1, 8, 8, 4)))
    with pytest.raises(ValueError, match="channels are the last axis there.; a file of latents"):
        data.npy_directory(tmp_path)


@pytest.mark.parametrize("output", ["/tmp/s/", " ", ".", "..", "", ".npz", "a/.png", "a/.."])
def test_an_output_without_a_name_is_refused(output):
    with pytest.raises(ValueError, match="names no file; give a name for OUTPUT.npz and OUTPUT.p"):
        flags.output_files(output)


@pytest.mark.parametrize("output", ["s", "a/s.npz", "a/s.png", "a/.s", "...s"])
def test_an_output_with_a_name_is_taken(output):
    npz, png = flags.output_files(output)
    assert npz.suffix == ".npz" and png.suffix == ".png" and npz.stem == png.stem


@pytest.mark.parametrize("source", ["", " ", None, 3])
def test_what_is_no_path_of_weights_is_refused(source):
    with pytest.raises(ValueError, match=f"{source!r} is no path of weights; give a workdir"):
        pretrained.check_source(source)


def test_a_number_beyond_the_dtype_is_refused_without_a_warning():
    mesh = sharding.create_mesh()
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = {"a": {"kernel": jax.ShapeDtypeStruct((2,), np.float32, sharding=whole)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"a/kernel of the weights holds 1e\+300 in float64"):
            pretrained.place_parameters({"a": {"kernel": np.array([1, 1e300])}}, like)
        placed = pretrained.place_parameters({"a": {"kernel": np.array([1, np.inf])}}, like)
    assert np.isinf(placed["a"]["kernel"][1])


# ---- Files that are read by name, and are none --------------------------------------------------


def step_of_a_run(folder):
    """A folder of a checkpoint in a workdir, and its workdir."""
    step = folder / "checkpoints" / "3"
    step.mkdir(parents=True)
    return step


def read_manifest(make, folder):
    make(step_of_a_run(folder) / "manifest.json")
    (problem,) = seal.find_problems(folder / "checkpoints" / "3")
    raise ValueError(problem)


def read_parts(make, folder):
    make(folder / PARTS_MANIFEST)
    parts = Parts.__new__(Parts)
    parts.folder = folder
    parts._found()


def read_tfds(make, folder, name="info/1.0.0", file="dataset_info.json"):
    inside = folder / name
    inside.mkdir(parents=True, exist_ok=True)
    (inside / "dataset_info.json").write_text("{}")
    (inside / file).unlink(missing_ok=True)
    make(inside / file)
    data.tfds_source("info", data_dir=folder)


def made(name, read):
    """Reads a place that is none, called `name`."""

    def attempt(make, folder):
        make(folder / name)
        read(folder / name)

    return attempt


READ = {
    "an IDX file": made("train-labels", read_idx),
    "an npy file": made("a.npy", lambda path: npy.MemoryMap(path).array),
    "features": made("0.npy", feature_files._read),
    "the weights of a classifier": made("c.npy", lambda path: classifier._read(path, 3)),
    "the lines of a run": made("metrics.jsonl", metrics.read_lines),
    "the lines of a run that goes on": made(
        "metrics.jsonl", lambda path: metrics.MetricsWriter(path.parent, total_steps=3)
    ),
    "a lock": made(".lock", lambda path: WorkdirLock(path.parent)),
    "a file of a checkpoint": made("a", seal.fingerprint),
    "a manifest": read_manifest,
    "the settings of parts": read_parts,
    "a grid": made("a.png", images.read_metadata),
    "a shard of latents": made("a.bin", latent_writing._digest),
    "a description of a data set": read_tfds,
    "features of a data set": functools.partial(read_tfds, file="features.json"),
    "class names of a data set": functools.partial(read_tfds, file="label.labels.txt"),
    "a shard of a data set": functools.partial(read_tfds, file="x-train.array_record-0-of-1"),
    "a data set itself": functools.partial(read_tfds, name=""),
    "weights": made("a.pt", weight_files.read_weights),
    "an Inception graph": made("a.pb", lambda path: inception.load_network(path)),
    "a picture": made("a.png", lambda path: decode_image(path, str(path), 3)),
}  # fmt: skip


@pytest.mark.parametrize("what", ["a pipe", "a socket", "a device"])
@pytest.mark.parametrize("read", READ)
def test_what_is_read_by_name_and_is_no_file_is_never_waited_for(read, what, tmp_path):
    with deadline(30), pytest.raises((*USER_ERRORS, CheckpointError)) as error:
        READ[read](KINDS[what], tmp_path)
    said = one_line(error.value)
    assert what in said or "no file" in said or "not a file" in said, said


# Where a file of a known kind is opened by a library, or none that a person gives.
OWN = {
    "basics/places.py": "the opener",
    "basics/atomic.py": "the file that it has just written",
    "commands/benchmarking.py": "of the system",
    "commands/input_rates.py": "whose plain reading it measures",
    "parallel/compilation_cache.py": "of the system",
    "parallel/host_memory.py": "of the system",
    "demo/markup.py": "of the package",
    "evaluation/image_classifier.py": "opened before",
    "compilers/kernels.py": "of its own child",
    "evaluation/classifier.py": "checked before",
    "sampling/images.py": "opened before",
    "sampling/parts.py": "checked before",
}


def opened(path):
    """The lines of a module that open a file by its path otherwise than `places` does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call in ("open", "np.load", "io.open") or call.endswith(
                (".read_text", ".read_bytes")
            ):
                yield f"{path.name}:{node.lineno} {call}"


def test_every_other_file_goes_through_one_opener():
    package = Path(places.__file__).parents[1]
    found = {str(p.relative_to(package)): [*opened(p)] for p in package.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines and name not in OWN} == {}
    assert [name for name in OWN if not found[name]] == []
