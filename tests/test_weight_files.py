"""Weight files are read and written bit for bit, or end in one line that says what is wrong."""

import argparse
import errno
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mdt_jax.weights import files as weight_files
from mdt_jax.weights import names as weight_names
from mdt_jax.weights.files import WeightsError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.torch

ENDINGS = (".pt", ".safetensors")


def bits(count, seed=0):
    """Arbitrary 16-bit patterns, NaNs and denormals among them."""
    return np.random.default_rng(seed).integers(0, 2**16, count, dtype=np.uint16)


def tensors():
    """One of each type by name, every name out of alphabetical order."""
    data = torch.from_numpy(bits(24).view(np.int16))
    found = {
        "z.scalar": torch.tensor(3.0),
        "m.float16": data.view(torch.float16).reshape(2, 12),
        "k.bfloat16": data.view(torch.bfloat16).reshape(4, 6),
        "c.float32": data.view(torch.float32).reshape(3, 4),
        "a.int64": data.view(torch.int64),
    }
    return {name: tensor.clone() for name, tensor in found.items()}


def save(path, content, **options):
    if path.suffix == ".safetensors":
        safetensors_torch.save_file(content, path)
    else:
        torch.save(content, path, **options)
    return path


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def refusal(call, *args, **kwargs):
    """The one line of the WeightsError that a call ends in."""
    with pytest.raises(WeightsError) as caught:
        call(*args, **kwargs)
    (line,) = str(caught.value).splitlines()
    return line


# ---- Reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("new.pt", {}),
        ("old.pt", {"_use_new_zipfile_serialization": False}),
        ("some.pth", {}),
        ("some.bin", {}),
        ("some.safetensors", {}),
    ],
)
def test_every_type_is_read_bit_for_bit(tmp_path, name, options):
    content = tensors()
    weights = weight_files.read_weights(save(tmp_path / name, content, **options))
    assert set(weights) == set(content) and len(weights) == len(content)
    for key, tensor in content.items():
        array = weights[key]
        assert weights.shapes[key] == array.shape == tuple(tensor.shape)
        assert weights.dtypes[key] == array.dtype == str(tensor.dtype).removeprefix("torch.")
        assert array.tobytes() == raw(tensor)


def test_bfloat16_is_ml_dtypes_bfloat16(tmp_path):
    for ending in ENDINGS:
        path = save(tmp_path / f"a{ending}", {"a": torch.tensor([1.5], dtype=torch.bfloat16)})
        assert weight_files.read_weights(path)["a"].dtype == np.dtype(ml_dtypes.bfloat16)


def test_a_pickle_keeps_the_order_of_its_names(tmp_path):
    weights = weight_files.read_weights(save(tmp_path / "a.pt", tensors()))
    assert list(weights) == list(tensors())


def test_parameters_and_transposed_tensors_are_read(tmp_path):
    matrix = torch.arange(6.0).reshape(2, 3)
    content = {"parameter": torch.nn.Parameter(matrix), "bf16": matrix.bfloat16().T}
    weights = weight_files.read_weights(save(tmp_path / "a.pt", content))
    np.testing.assert_array_equal(weights["parameter"], matrix.numpy())
    np.testing.assert_array_equal(weights["bf16"].astype(np.float32), matrix.numpy().T)


@pytest.mark.skipif(sys.platform != "linux", reason="whether a map sees later writes is the OS's")
@pytest.mark.parametrize("ending", ENDINGS)
def test_arrays_are_read_when_they_are_asked_for(tmp_path, ending):
    page = 1 << 14  # numbers; more than a page of memory apart
    path = save(tmp_path / f"a{ending}", {"a": torch.ones(page), "b": torch.ones(page)})
    weights = weight_files.read_weights(path)
    assert weights["a"].mean() == 1
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(content.replace(np.ones(page, "f4").tobytes(), np.zeros(page, "f4").tobytes()))
    assert weights["b"].mean() == 0


def test_asking_whether_a_name_is_there_reads_nothing():
    def read(name):
        raise AssertionError(name)

    weights = weight_files.WeightFile(Path("a"), {"a": (2,)}, {"a": np.dtype("f4")}, read)
    assert "a" in weights and "b" not in weights and list(weights.keys()) == ["a"]


def test_an_unknown_name_is_a_key_error(tmp_path):
    weights = weight_files.read_weights(save(tmp_path / "a.pt", tensors()))
    assert "b" not in weights
    with pytest.raises(KeyError, match="b"):
        weights["b"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_of_wrappers_come_off(tmp_path, ending, prefix):
    path = save(tmp_path / f"a{ending}", {f"{prefix}module_x.weight": torch.arange(3.0)})
    weights = weight_files.read_weights(path)
    assert list(weights) == ["module_x.weight"]
    np.testing.assert_array_equal(weights["module_x.weight"], [0, 1, 2])


@pytest.mark.parametrize("ending", ENDINGS)
def test_two_weights_of_one_plain_name_are_refused(tmp_path, ending):
    path = save(tmp_path / f"a{ending}", {"w": torch.ones(2), "module.w": torch.zeros(2)})
    line = refusal(weight_files.read_weights, path)
    assert str(path) in line and "module.w" in line and "two weights of one name" in line


@pytest.mark.parametrize("nest", weight_names.NESTS)
def test_a_nested_state_dict_is_found(tmp_path, nest):
    weights = weight_files.read_weights(save(tmp_path / "a.ckpt", {nest: tensors(), "epoch": 3}))
    assert weights.nest == nest and list(weights) == list(tensors())


def test_a_flat_state_dict_is_in_no_nest(tmp_path):
    assert weight_files.read_weights(save(tmp_path / "a.pt", tensors())).nest == ""


@pytest.fixture
def dit_file(tmp_path):
    """As DiT's training script saves: model, EMA, optimiser and its own arguments."""
    content = {
        "model": {"w": torch.zeros(2)},
        "ema": {"w": torch.ones(2)},
        "opt": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}},
        "args": argparse.Namespace(model="DiT-XL/2", num_classes=1000),
    }
    return save(tmp_path / "0000003.pt", content)


def test_of_a_dit_file_the_ema_is_read_or_what_is_asked_for(dit_file):
    assert weight_files.read_weights(dit_file)["w"].tolist() == [1, 1]
    assert weight_files.read_weights(dit_file, nest="model")["w"].tolist() == [0, 0]
    assert weight_files.has_part(dit_file, "ema") and not weight_files.has_part(dit_file, "args")
    assert "'state_dict'" in refusal(weight_files.read_weights, dit_file, nest="state_dict")


def test_an_object_is_read_with_arrays_for_tensors(dit_file):
    state = weight_files.read_object(dit_file)["opt"]["state"][0]
    assert isinstance(state["exp_avg"], np.ndarray) and state["exp_avg"].tolist() == [1, 1]
    assert int(state["step"]) == 3


def test_metadata_of_a_safetensors_file_is_read(tmp_path):
    weight_files.write_weights(tmp_path / "a.safetensors", {"a": np.ones(2)}, {"step": "7"})
    assert weight_files.read_weights(tmp_path / "a.safetensors").metadata == {"step": "7"}


# ---- Writing -----------------------------------------------------------------------------------


def arrays():
    """The same as arrays."""
    found = tensors()
    bfloat16 = found["k.bfloat16"].view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return {k: bfloat16 if k == "k.bfloat16" else tensor.numpy() for k, tensor in found.items()}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_what_torch_would_have_saved(tmp_path, ending):
    path = tmp_path / "new" / f"a{ending}"
    weight_files.write_weights(path, arrays())
    load = safetensors_torch.load_file if ending == ".safetensors" else torch.load
    loaded = load(path)
    assert set(loaded) == set(tensors())
    for key, tensor in tensors().items():
        assert (loaded[key].dtype, loaded[key].shape) == (tensor.dtype, tensor.shape)
        assert raw(loaded[key]) == raw(tensor)
    assert os.listdir(path.parent) == [path.name]


def test_a_pickle_is_written_in_order(tmp_path):
    weight_files.write_weights(tmp_path / "a.pt", arrays())
    assert list(torch.load(tmp_path / "a.pt", weights_only=True)) == list(tensors())


@pytest.mark.parametrize("ending", ENDINGS)
def test_transposed_and_read_only_arrays_are_written(tmp_path, ending):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    array.flags.writeable = False
    weight_files.write_weights(tmp_path / f"a{ending}", {"a": array})
    np.testing.assert_array_equal(weight_files.read_weights(tmp_path / f"a{ending}")["a"], array)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    weight_files.write_weights(path, {"a": np.ones(2)})
    before = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_files.os, "replace", _fail)
        line = refusal(weight_files.write_weights, path, {"a": np.zeros(2)})
    assert str(path) in line and "could not be written" in line
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    weight_files.write_weights(path, {"a": np.zeros(2)})
    assert weight_files.read_weights(path)["a"].tolist() == [0, 0]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.EROFS, "Read-only file system; give a place that can be written to"),
        (errno.EACCES, "Permission denied; give a place that is yours"),
        (errno.ENOSPC, "No space left on device; is the disk full?"),
        (errno.EDQUOT, "Disk quota exceeded; is the disk full?"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_file_that_cannot_be_written_says_why(code, said, ending, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(weight_files.os, "replace", fail)
    line = refusal(weight_files.write_weights, tmp_path / f"a{ending}", {"a": np.ones(2)})
    assert f"a{ending} could not be written: {said}" in line and not os.listdir(tmp_path)


def _fail(*_):
    raise OSError("the disk went away")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    weight_files.write_weights(path, {"a": np.ones(2)})
    before = path.read_bytes()
    code = """
        import resource, signal, sys
        import numpy as np
        from mdt_jax.weights import files as weight_files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails with EFBIG instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        try:
            arrays = {name: np.zeros(10_000, np.float32) for name in "abc"}
            weight_files.write_weights(sys.argv[1], arrays)
        except weight_files.WeightsError as error:
            sys.exit(f"error: {error}")
        """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), path], capture_output=True, text=True
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert str(path) in line and "is the disk full?" in line
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_an_unknown_ending_is_not_written(tmp_path):
    line = refusal(weight_files.write_weights, tmp_path / "a.npz", {"a": np.ones(2)})
    assert "a.npz" in line and ".pt or .safetensors" in line
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.pt"
    assert str(path) in refusal(weight_files.write_weights, path, {"a": np.ones(2)})


# ---- Bad input ---------------------------------------------------------------------------------


class RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "old", "pickle", "protocol 0"])
def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path, form):
    path, trace = tmp_path / "evil.pt", tmp_path / "it_ran"
    content = {"a": torch.ones(2), "b": RunsCode(trace)}
    if form in ("zip", "old"):
        save(path, content, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps(RunsCode(trace), protocol=0 if form == "protocol 0" else 2))
    line = refusal(weight_files.read_weights, path)
    assert str(path) in line and not trace.exists()
    assert form == "protocol 0" or "could run code of its own (posix.mkdir)" in line
    assert str(path) in refusal(weight_files.read_object, path) and not trace.exists()
    pickle.loads(pickle.dumps(RunsCode(trace)))
    assert trace.exists()  # the test would notice


def test_a_pickled_module_is_refused_by_name(tmp_path):
    line = refusal(weight_files.read_weights, save(tmp_path / "a.pt", torch.nn.Linear(2, 2)))
    assert "torch.nn.modules.linear.Linear" in line and "state_dict()" in line


@pytest.mark.parametrize("name", ["new.pt", "old.pt", "a.safetensors"])
def test_a_file_cut_anywhere_is_said_to_be_damaged(tmp_path, name):
    options = {"_use_new_zipfile_serialization": False} if name == "old.pt" else {}
    path = save(tmp_path / name, {"a": torch.ones(1000), "b": torch.ones(1000)}, **options)
    content = path.read_bytes()
    for size in (1, 9, 100, len(content) // 2, len(content) - 5, len(content) - 1):
        path.write_bytes(content[:size])
        line = refusal(weight_files.read_weights, path)
        assert str(path) in line and "fetch it again" in line, (size, line)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "content",
    ["", "abc", "weights, in words\n" * 9, "<!DOCTYPE html>\n<html>", "version https://git-lfs\n"],
)
def test_what_is_no_weight_file_is_said_to_be_none(tmp_path, ending, content):
    (path := tmp_path / f"a{ending}").write_text(content)
    line = refusal(weight_files.read_weights, path)
    assert str(path) in line and "not a " in line and "run code" not in line


@pytest.mark.parametrize("seed", range(20))
def test_garbled_pickles_end_in_one_line(tmp_path, seed):
    path = save(tmp_path / "a.pt", tensors(), _use_new_zipfile_serialization=False)
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for place in rng.integers(2, len(content) // 2, 40):
        content[place] = rng.integers(256)
    path.write_bytes(content)
    assert str(path) in refusal(weight_files.read_weights, path)


def test_a_missing_file_a_folder_and_an_unknown_ending_are_named(tmp_path):
    assert "not there" in refusal(weight_files.read_weights, tmp_path / "a.pt")
    assert "a folder" in refusal(weight_files.read_weights, tmp_path)
    (tmp_path / "a.npz").write_bytes(b"PK and no more")
    line = refusal(weight_files.read_weights, tmp_path / "a.npz")
    assert "a.npz" in line and "not a PyTorch file" in line


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "is a pipe, not a file"),
        (lambda path: path.symlink_to("nowhere.pt"), "is a link to nowhere.pt, which leads to"),
        (lambda path: path.symlink_to(path), "which leads to nothing"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x"),
            "is a pointer of Git LFS, not a file: run git lfs pull",
        ),
    ],
)
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_there_instead_of_a_file_is_named(make, said, ending, tmp_path):
    make(tmp_path / f"a{ending}")
    assert said in refusal(weight_files.read_weights, tmp_path / f"a{ending}")


WITHOUT_NUMBERS = {
    "sparse_coo": torch.Tensor.to_sparse,
    "sparse_csr": torch.Tensor.to_sparse_csr,
    "meta": lambda tensor: tensor.to("meta"),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", WITHOUT_NUMBERS)
def test_a_tensor_without_plain_numbers_is_named(kind, tmp_path):
    tensor = WITHOUT_NUMBERS[kind](torch.ones(2, 2))
    path = save(tmp_path / "a.pt", {"v": torch.ones(2, 2), "w": tensor})
    assert f"w is a {kind} tensor" in refusal(weight_files.read_weights, path)
    path = save(tmp_path / "b.pt", {"state": {0: {"exp_avg": [torch.ones(2), tensor]}}})
    assert f"b.pt: state.0.exp_avg.1 is a {kind} tensor" in refusal(weight_files.read_object, path)
    assert f"c.pt: it is a {kind} tensor" in refusal(
        weight_files.read_object, save(tmp_path / "c.pt", tensor)
    )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_a_type_that_no_array_has_is_named_in_an_objects_place(dtype, tmp_path):
    path = save(tmp_path / "a.pt", {"state": {0: {"step": torch.ones(2).to(dtype)}}})
    assert "a.pt: state.0.step is of type" in refusal(weight_files.read_object, path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_type_that_no_model_has_is_named(tmp_path, ending):
    path = save(tmp_path / f"a{ending}", {"w": torch.ones(4).to(torch.float8_e4m3fn)})
    assert "F8_E4M3" in refusal(weight_files.read_weights, path).upper().replace("FLOAT8", "F8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "an empty dict"),
        ({"epoch": 3}, "'epoch'"),
        ({0: torch.ones(2)}, "a dict of 0"),
        ([torch.ones(2)], "type list"),
        (torch.ones(2), "type Tensor"),
    ],
)
def test_a_pickle_without_weights_by_name_says_what_it_holds(tmp_path, content, said):
    assert said in refusal(weight_files.read_weights, save(tmp_path / "a.pt", content))


def test_a_safetensors_file_without_arrays_is_refused(tmp_path):
    assert "no arrays" in refusal(weight_files.read_weights, save(tmp_path / "a.safetensors", {}))


def test_without_pytorch_a_pickle_says_what_to_do(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pt", tensors())
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refusal(weight_files.read_weights, path)
    assert "pip install" in line and ".safetensors" in line
    line = refusal(weight_files.write_weights, tmp_path / "b.pt", {"a": np.ones(2)})
    assert "pip install" in line and "disk" not in line


# ---- The hub -----------------------------------------------------------------------------------


def make_cache(folder, owner, repo, files):
    """A Hugging Face cache that holds files of a repository."""
    root = folder / f"models--{owner}--{repo}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for name, content in files.items():
        path = root / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A hub out of reach, with an empty cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_without_a_network_it_says_which_file_to_fetch(offline):
    source = "hf://shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt"
    line = refusal(weight_files.read_weights, source)
    assert line.startswith(source) and "the hub cannot be reached" in line
    assert "download the file mdt_xl2_v2_ckpt.pt" in line and "repository shgao/MDT-XL2" in line
    assert "give its path in place" in line


def test_a_cached_file_needs_no_network(offline, tmp_path):
    save(path := tmp_path / "a.safetensors", {"a": torch.ones(2)})
    make_cache(offline, "owner", "repo", {"folder/a.safetensors": path.read_bytes()})
    source = "hf://owner/repo/folder/a.safetensors"
    weights = weight_files.read_weights(source)
    assert weights["a"].tolist() == [1, 1]
    assert weights.path.is_relative_to(offline)
    # Nobody can say whether the repository has a config.json, which would change the model.
    assert "cannot be reached" in refusal(weight_files.json_beside, source, weights.path)


def test_the_config_beside_a_cached_file_is_found(offline, tmp_path):
    save(path := tmp_path / "a.safetensors", {"a": torch.ones(2)})
    files = {"t/a.safetensors": path.read_bytes(), "t/config.json": b'{"sample_size": 64}'}
    make_cache(offline, "owner", "repo", files)
    source = "hf://owner/repo/t/a.safetensors"
    beside = weight_files.json_beside(source, weight_files.fetch(source))
    assert beside == {"sample_size": 64}


def test_a_config_that_is_not_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    line = refusal(weight_files.json_beside, "a.pt", tmp_path / "a.pt")
    assert "config.json is not JSON" in line
    (tmp_path / "config.json").write_text("[1]")
    line = refusal(weight_files.json_beside, "a.pt", tmp_path / "a.pt")
    assert "config.json holds a list, not settings by name" in line


def test_the_environment_says_where_the_cache_is_and_that_there_is_no_network(tmp_path):
    save(path := tmp_path / "a.safetensors", {"a": torch.ones(2)})
    make_cache(tmp_path / "home" / "hub", "owner", "repo", {"a.safetensors": path.read_bytes()})
    code = """
        from mdt_jax.weights import files as weight_files
        print(weight_files.read_weights("hf://owner/repo/a.safetensors")["a"].tolist())
        try:
            weight_files.read_weights("hf://owner/repo/b.pt")
        except weight_files.WeightsError as error:
            print(error)
        """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    cached, missing = run.stdout.splitlines()
    assert cached == "[1.0, 1.0]" and "download the file b.pt" in missing
    assert not run.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("RemoteEntryNotFoundError", "owner/repo holds no file a.pt"),
        ("RepositoryNotFoundError", "the hub has no owner/repo, or HF_TOKEN gives no access"),
        ("GatedRepoError", "HF_TOKEN"),
        ("HfHubHTTPError", "download the file a.pt"),
    ],
)
def test_what_the_hub_answers_is_said_plainly(monkeypatch, error, said):
    import huggingface_hub.constants
    from huggingface_hub import errors

    kind = getattr(errors, error, None) or errors.EntryNotFoundError

    def download(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert said in refusal(weight_files.read_weights, "hf://owner/repo/a.pt")


@pytest.mark.parametrize("source", ["hf://", "hf://owner", "hf://owner/repo", "hf://owner//a.pt"])
def test_an_incomplete_hub_address_says_its_form(source):
    assert "hf://OWNER/REPO/FILE" in refusal(weight_files.read_weights, source)


def test_a_weight_file_is_told_from_a_workdir_by_its_name():
    names = ("hf://a/b/c", "a.pt", "b/a.pth", "a.bin", "a.ckpt", "a.safetensors")
    assert all(map(weight_files.is_weight_file, names))
    assert not any(map(weight_files.is_weight_file, ("runs/mine", "a.pt.d", "pt")))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*TorchScript.*:UserWarning")
def test_a_torchscript_program_is_named_as_one(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    with pytest.raises(WeightsError, match="program.pt is a TorchScript program, not weights by"):
        weight_files.read_weights(tmp_path / "program.pt")
