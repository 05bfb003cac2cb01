"""A network is found in any training script's file, whatever wraps its names, bit for bit."""

import argparse
import functools
import itertools
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging as absl_logging

from mdt_jax.convert.architecture import Architecture
from mdt_jax.weights import files as weight_files
from mdt_jax.weights import names as weight_names
from mdt_jax.weights import pretrained
from mdt_jax.weights.files import WeightsError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
import torch_models  # noqa: E402

pytestmark = pytest.mark.torch

TINY = Architecture(
    family="MDTv2",
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=16,
    depth=4,
    num_heads=4,
    decoder_depth=2,
    mlp_ratio=2.0,
    num_classes=10,
    null_class=True,
    learn_variance=True,
)


@functools.cache
def state(seed=0, family="MDTv2"):
    """A tiny network's arrays at random bits that are no NaN, under the authors' names."""
    changes = {} if family == "MDTv2" else {"family": family, "decoder_depth": 0}
    network = torch_models.build(Architecture(**vars(TINY) | changes))
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in network.state_dict().items()
    }


def save(path, content):
    if path.suffix == ".safetensors":
        safetensors_torch.save_file({k: v.clone() for k, v in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def arrays(path, **options):
    """A file's parameters as one list of bytes, by this project's paths."""
    found = pretrained.read_pretrained(path, num_heads=4, **options)
    leaves = jax.tree_util.tree_leaves_with_path(found.params)
    return {jax.tree_util.keystr(key): np.asarray(leaf).tobytes() for key, leaf in leaves}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The arrays of `state(seed)` as they are read from a plain state dict."""
    folder = tmp_path_factory.mktemp("plain")
    return functools.cache(lambda seed=0: arrays(save(folder / f"{seed}.pt", state(seed))))


def under(prefix, names):
    return {f"{prefix}{name}": value for name, value in names.items()}


def in_blocks(wrapper, names):
    """Each block wrapped, and one layer in each."""
    new = {}
    for name, value in names.items():
        parts = name.split(".")
        if len(parts) > 1 and parts[1].isdecimal():
            parts.insert(2, wrapper)
            parts = [f"{part}.{wrapper}" if part == "mlp" else part for part in parts]
        new[".".join(parts)] = value
    return new


WRAPPERS = (
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("_forward_module", "_module", "_fpw_module"),
)
PLACES = {
    "root": lambda wrapper, names: under(f"{wrapper}.", names),
    "twice": lambda wrapper, names: under(f"{wrapper}.module.{wrapper}.", names),
    "blocks": in_blocks,
    "root and blocks": lambda wrapper, names: under(f"{wrapper}.", in_blocks(wrapper, names)),
    "in model.": lambda wrapper, names: under(f"model.{wrapper}.", in_blocks(wrapper, names)),
    "around net.": lambda wrapper, names: under(f"{wrapper}.net.", names),
    "each weight": lambda wrapper, names: {
        f"{name.rpartition('.')[0]}.{wrapper}.{name.rpartition('.')[2]}".lstrip("."): value
        for name, value in names.items()
    },
}


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize(("wrapper", "place"), list(itertools.product(WRAPPERS, PLACES)))
def test_a_wrapper_comes_off_wherever_it_is(wrapper, place, ending, plain, tmp_path):
    wrapped = PLACES[place](wrapper, state())
    assert set(wrapped) != set(state()) and len(wrapped) == len(state())
    assert arrays(save(tmp_path / f"a{ending}", wrapped)) == plain()


ROOTS = (
    *("model.", "net.", "network.", "ema_model.", "model.diffusion_model.", "my.own.name."),
    *("denoiser.", "module.model."),
)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("root", ROOTS)
def test_what_all_names_of_a_network_share_comes_off(root, ending, plain, tmp_path):
    others = {"loss.weight": torch.ones(3), "betas": torch.ones(7)}
    for more in ({}, others):
        content = under(root, state()) | more
        assert arrays(save(tmp_path / f"a{ending}", content)) == plain()


@pytest.mark.parametrize("seed", range(20))
def test_wrappers_drawn_at_random_come_off(seed, plain, tmp_path):
    rng = np.random.default_rng(seed)
    known, root = {}, rng.choice(["", *ROOTS])

    def wrap(path):
        """The same wrappers for the same module of all names."""
        if path not in known:
            known[path] = list(rng.choice(WRAPPERS, rng.integers(0, 3)))
        return known[path]

    content = {}
    for name, tensor in state().items():
        parts = name.split(".")
        above = [".".join(parts[:cut]) for cut in range(len(parts))]
        pieces = [
            piece for path, part in zip(above, parts, strict=True) for piece in (*wrap(path), part)
        ]
        content[root + ".".join(pieces)] = tensor
    assert arrays(save(tmp_path / "a.pt", content)) == plain()


# Where a script keeps things: the file's content from raw and averaged weights, and which is taken.
AVERAGED = {
    **{
        name: (lambda raw, ema, name=name: {"model": raw, name: ema, "opt": {"state": {}}})
        for name in weight_names.AVERAGES
    },
    "DeepSpeed": lambda raw, ema: {"module": raw, "ema": {"module": ema}, "global_steps": 3},
    "nested": lambda raw, ema: {"state_dict": {"model": raw, "ema": ema}},
    "Lightning": lambda raw, ema: {"state_dict": under("model.", raw) | under("ema_model.", ema)},
    "Lightning net": lambda raw, ema: {"state_dict": under("net.", raw) | under("net_ema.", ema)},
    "ema_pytorch": lambda raw, ema: {
        "model": raw,
        "ema": under("online_model.", raw)
        | under("ema_model.", ema)
        | {"initted": torch.tensor([True]), "step": torch.tensor([9])},
    },
    "AveragedModel": lambda raw, ema: {
        "model": raw,
        "average": {"n_averaged": torch.tensor(5)} | under("module.", ema),
    },
    "AveragedModel of another name": lambda raw, ema: {
        "model": raw,
        "other": {"n_averaged": torch.tensor(5)} | under("module.module.", ema),
    },
    "LitEma": lambda raw, ema: {
        "state_dict": under("model.", raw)
        | {f"model_ema.{name.replace('.', '')}": value for name, value in ema.items()}
        | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}
    },
    "LitEma of a wrapper": lambda raw, ema: {
        "state_dict": under("model.diffusion_model.", raw)
        | {f"model_ema.diffusion_model{k.replace('.', '')}": value for k, value in ema.items()}
    },
    "a callback's": lambda raw, ema: {
        "state_dict": under("model.", raw),
        "callbacks": {"EMA": {"ema_state_dict": under("model.", ema)}},
    },
    "upper case": lambda raw, ema: {"G": raw, "G_EMA": ema},
}


@pytest.mark.parametrize("script", AVERAGED)
def test_an_average_is_taken_wherever_a_script_keeps_it(script, plain, tmp_path, caplog):
    path = save(tmp_path / "a.pt", AVERAGED[script](state(0), state(1)))
    before = absl_logging.get_verbosity()
    with caplog.at_level(logging.INFO, "absl"):
        absl_logging.set_verbosity(absl_logging.INFO)
        assert arrays(path) == plain(1)
        absl_logging.set_verbosity(before)
    assert f"{path}: taking " in caplog.text and "(EMA weights); it also holds" in caplog.text
    assert arrays(path, nest="model") == plain(0) and arrays(path, nest="ema") == plain(1)
    assert weight_files.has_part(path, "ema") and weight_files.has_part(path, "model")


@pytest.mark.parametrize("names", ["model.{} ema.{}", "model.{} ema_model.module.{}"])
def test_an_average_in_a_flat_file_is_taken(names, plain, tmp_path):
    raw, ema = names.split()
    content = {raw.format(k): v for k, v in state(0).items()}
    content |= {ema.format(k): v for k, v in state(1).items()}
    path = save(tmp_path / "a.safetensors", content)
    assert arrays(path) == plain(1) and arrays(path, nest="model") == plain(0)


EMPTY = {
    "no average": {},
    "none": None,
    "only its numbers": {"decay": 0.9999, "num_updates": torch.tensor(3)},
    "without names": {"shadow_params": [torch.ones(2)]},
}


@pytest.mark.parametrize("nest", ["model", "state_dict", "generator", "model_state_dict"])
@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_average_is_none(nest, empty, plain, tmp_path, caplog):
    path = save(tmp_path / "a.pt", {nest: state(), "ema": EMPTY[empty]})
    assert arrays(path) == plain()
    assert f"its 'ema' holds no weights by name; taking '{nest}' (raw weights)" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        {"student": state, "teacher": state},
        {"ema_0.999": state, "ema_0.9999": state},
        {"model": state, "ema_0.999": state, "ema_0.9999": state},
        {"model": lambda: under("a.", state()) | under("b.", state())},
    ],
)
def test_several_networks_of_equal_standing_are_refused(content, tmp_path):
    path = save(tmp_path / "a.pt", {name: make() for name, make in content.items()})
    with pytest.raises(
        WeightsError, match="holds several (networks|averages), .*, .*; save the one that is meant"
    ):
        weight_files.read_weights(path)


def test_an_average_that_is_a_list_is_said_to_be_one(tmp_path, caplog):
    average = {"decay": 0.999, "shadow_params": [*state().values()]}
    path = save(tmp_path / "a.pt", {"ema": average})
    with pytest.raises(WeightsError, match="'ema.shadow_params', as a list of arrays without nam"):
        weight_files.read_weights(path)
    weight_files.read_weights(save(tmp_path / "b.pt", {"ema": average, "model": state()}))
    assert "the average, ema.shadow_params, is a list without names" in caplog.text


@pytest.mark.parametrize("name", ["num_steps", "trained_steps", "num_iters", "train_steps"])
def test_steps_are_known_by_several_names(name):
    assert weight_names.read_step({"model": state(), name: 7}) == 7


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_names_that_collapse_into_one_are_refused(wrapper, ending, tmp_path):
    name = "en_inblocks.0.mlp.fc1.bias"
    double = f"en_inblocks.0.{wrapper}.mlp.fc1.bias"
    path = save(tmp_path / f"a{ending}", state() | {double: torch.zeros(32)})
    with pytest.raises(WeightsError, match="two weights of one name") as caught:
        weight_files.read_weights(path)
    assert name in str(caught.value) and double in str(caught.value)


@pytest.mark.parametrize("key", weight_names.STEPS)
@pytest.mark.parametrize("value", [7, 7.0, np.int64(7), torch.tensor(7), torch.tensor([7])])
def test_the_steps_done_are_read_under_their_usual_names(key, value):
    assert weight_names.read_step({"ema": state(), key: value}) == 7


@pytest.mark.parametrize("value", [None, True, -1, 7.5, float("nan"), "7 of 9", [7], torch.ones(2)])
def test_what_is_no_number_of_steps_is_none(value):
    assert weight_names.read_step({"step": value}) is None


def test_a_files_own_steps_come_before_its_arguments_and_its_name(tmp_path):
    arguments = argparse.Namespace(global_step=5, max_train_steps=9, steps=9)
    content = {"model": state(), "args": arguments}
    path = save(tmp_path / "0000003.pt", content)
    assert pretrained.read_pretrained(path).step == 5
    save(path, content | {"train_steps": 7})
    assert pretrained.read_pretrained(path).step == 7
    save(path, {"model": state()})
    assert pretrained.read_pretrained(path).step == 3


def test_a_safetensors_file_says_its_steps(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors_torch.save_file({k: v.clone() for k, v in state().items()}, path, {"step": "7"})
    assert pretrained.read_pretrained(path).step == 7


@pytest.mark.parametrize("old", [False, True])
def test_numbers_of_numpys_and_paths_are_no_code(old, tmp_path):
    numbers = [np.float64(2.5), np.int64(3), np.float32(1), np.bool_(True), np.dtype("f4")]
    arguments = argparse.Namespace(data_path=Path("/data"), numbers=numbers)
    content = {"model": state(), "train_steps": np.int64(7), "best_fid": np.float64(2.2)}
    path = save(tmp_path / "a.pt", content | {"args": arguments})
    if old:  # as NumPy 1 pickles them
        torch.save(content | {"args": arguments}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b"numpy._core.mult", b"numpy.core.mult"))
    weights = weight_files.read_weights(path)
    assert weights.step == 7 and weights.arguments["data_path"] == Path("/data")
    assert weights.arguments["numbers"] == numbers


def test_arguments_are_found_in_groups():
    arguments = argparse.Namespace(model="DiT", transport={"path-type": "Linear"}, lr=1e-4)
    found = weight_names.read_arguments({"args": arguments, "config": {"Data": {"size": 3}}})
    assert found == {"model": "DiT", "transport": None, "path_type": "Linear", "lr": 1e-4} | {
        "data": None,
        "size": 3,
    }


def test_other_networks_are_found_under_a_prefix_too(tmp_path):
    encoder = {"encoder.conv_in.weight": torch.ones(2), "decoder.conv_in.weight": torch.ones(2)}
    for prefix in ("module.", "first_stage_model.", "model._orig_mod."):
        weights = weight_files.read_weights(save(tmp_path / "a.pt", under(prefix, encoder)))
        assert set(weights) == set(encoder)
