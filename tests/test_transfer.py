"""Weights and runs go from PyTorch to a workdir and back, through the commands, bit for bit."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from fixtures import FAMILIES, make_trainer, reference

from mdt_jax import config as config_lib
from mdt_jax.checkpoints import Checkpoints, read_meta, restore_item
from mdt_jax.commands import convert_checkpoint, export_params
from mdt_jax.convert.architecture import Architecture, UnknownWeights, parameter_shapes
from mdt_jax.convert.optimizers import MOMENTS, moments_from_torch
from mdt_jax.convert.transformers import from_torch
from mdt_jax.models.latent_space import LatentSpace
from mdt_jax.parallel import sharding
from mdt_jax.sampling.suggestion import sampling_command
from mdt_jax.training import metrics, transfer
from mdt_jax.training.step import TrainState
from mdt_jax.weights import descriptions, pretrained
from mdt_jax.weights import files as weight_files
from mdt_jax.weights.files import WeightsError

torch = pytest.importorskip("torch")
import torch_models  # noqa: E402

pytestmark = pytest.mark.torch

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
EMA = "ema_0.9999"


def convert(*args):
    convert_checkpoint.main([str(arg) for arg in args])


def export(*args):
    export_params.main([str(arg) for arg in args])


def refusal(command, *args):
    """The one line that a command ends in, with exit status 1."""
    with pytest.raises(SystemExit) as caught:
        command(*args)
    (line,) = str(caught.value.code).splitlines()
    assert line.startswith("error: ")
    return line


def architecture(family, **changes):
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 4}
    sizes |= {"num_heads": 4, "decoder_depth": 0 if family == "DiT" else 2, "mlp_ratio": 2.0}
    sizes |= {"num_classes": 10, "null_class": True, "learn_variance": True}
    return Architecture(family=family, **sizes | changes)


def hints(a):
    """The flags for what weights do not show."""
    if a.family == "DiT":
        return ("--num_heads", a.num_heads)
    return ("--decode_layers", a.decoder_depth) if a.family == "MDT" else ()


def arbitrary_bits(a, dtype, seed=0):
    """A state dict of arbitrary bits, NaNs and denormals among them; buffers as they are."""
    generator = torch.Generator().manual_seed(seed)
    state = torch_models.build(a).state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            limits = torch.iinfo(BITS[dtype])
            noise = torch.randint(limits.min, limits.max, tensor.shape, generator=generator)
            state[name] = noise.to(BITS[dtype]).view(dtype)
    return dict(state)


def save(path, state):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def load(path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)


def assert_same_bits(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        found = actual[name]
        assert (name, found.dtype, found.shape) == (name, tensor.dtype, tensor.shape)
        bits = BITS.get(tensor.dtype, tensor.dtype)
        assert torch.equal(found.contiguous().view(bits), tensor.contiguous().view(bits)), name


def assert_same_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


# ---- PyTorch → JAX → PyTorch -------------------------------------------------------------------

ROUND_TRIPS = [
    ("MDT", {}, torch.float32, ".pt", ".pt"),
    ("MDT", {"decoder_depth": 3}, torch.bfloat16, ".safetensors", ".pt"),
    ("MDTv2", {}, torch.float32, ".safetensors", ".safetensors"),
    ("MDTv2", {"num_classes": 0}, torch.float16, ".pt", ".safetensors"),
    ("MDTv2", {"learn_variance": False}, torch.bfloat16, ".pt", ".pt"),
    ("DiT", {}, torch.float16, ".safetensors", ".pt"),
    ("DiT", {"null_class": False, "num_classes": 1000}, torch.float32, ".pt", ".pt"),
]


@pytest.mark.parametrize(("family", "changes", "dtype", "ending", "ending_out"), ROUND_TRIPS)
def test_every_bit_comes_back_without_the_source(
    tmp_path, family, changes, dtype, ending, ending_out
):
    a = architecture(family, **changes)
    state = arbitrary_bits(a, dtype)
    source = save(tmp_path / f"source{ending}", state)
    convert("to-jax", "--input", source, "--output", tmp_path / "run", *hints(a))
    source.unlink()
    back = tmp_path / f"back{ending_out}"
    convert("to-torch", "--input", tmp_path / "run", "--output", back)
    found = load(back)
    assert_same_bits(found, state)
    if ending_out == ".pt":
        assert list(found) == list(state)
    model = torch_models.build(a, seed=1).to(dtype)
    model.load_state_dict(found, strict=True)
    assert pretrained.read_pretrained(tmp_path / "run").architecture == a
    assert sorted(os.listdir(tmp_path)) == [back.name, "run"]


def test_a_file_of_mixed_types_comes_back_in_them(tmp_path):
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    state = torch_models.build(architecture("MDTv2")).state_dict()
    for i, (name, tensor) in enumerate(state.items()):
        if tensor.is_floating_point():
            state[name] = (tensor.double() / 3).to(kinds[i % 4])
    source = save(tmp_path / "source.pt", dict(state))
    convert("to-jax", "--input", source, "--output", tmp_path / "run")
    source.unlink()
    export("--input", tmp_path / "run", "--output", tmp_path / "run_ema")
    for run in ("run", "run_ema"):
        convert("to-torch", "--input", tmp_path / run, "--output", tmp_path / "back.pt")
        assert_same_bits(load(tmp_path / "back.pt"), state)
    out = ("--output", tmp_path / "back.pt", "--dtype", "float32")
    convert("to-torch", "--input", tmp_path / "run", *out)
    assert {t.dtype for t in load(tmp_path / "back.pt").values()} == {torch.float32, torch.int64}


# ---- The authors' fixtures ---------------------------------------------------------------------


def fixture_architecture(name):
    """As the fixture's model is."""
    s, family = reference(name).settings, FAMILIES[name]
    sizes = {k: s[k] for k in ("input_size", "patch_size", "in_channels", "hidden_size", "depth")}
    sizes |= {k: s[k] for k in ("num_heads", "num_classes")}
    depth = s.get("decode_layer", 0)
    return architecture(family, **sizes, decoder_depth=depth, mlp_ratio=4.0)


def fixture_state(name):
    keys = [k for k in reference(name).arrays if k.startswith("param/")]
    return {
        k.removeprefix("param/"): torch.from_numpy(np.array(reference(name).arrays[k]))
        for k in keys
    }


@pytest.fixture(scope="module", params=FAMILIES)
def fixture_run(request, tmp_path_factory):
    """A workdir of an authors' model, and the model's name."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save(folder / "source.pt", fixture_state(request.param))
    flags = hints(fixture_architecture(request.param))
    convert("to-jax", "--input", source, "--output", folder / "run", *flags)
    source.unlink()
    return request.param, folder / "run"


def test_the_authors_names_order_buffers_and_values_come_back(fixture_run, tmp_path):
    name, run = fixture_run
    convert("to-torch", "--input", run, "--output", tmp_path / "back.pt")
    found, state = load(tmp_path / "back.pt"), fixture_state(name)
    assert list(found) == list(state)
    assert_same_bits(found, state)


def test_a_written_safetensors_file_says_what_shapes_do_not(fixture_run, tmp_path):
    name, run = fixture_run
    convert("to-torch", "--input", run, "--output", tmp_path / "back.safetensors")
    again = pretrained.read_pretrained(tmp_path / "back.safetensors")  # no hints
    assert again.architecture == fixture_architecture(name)
    metadata = weight_files.read_weights(tmp_path / "back.safetensors").metadata
    assert metadata["format"] == "pt"


def test_a_written_safetensors_file_keeps_process_step_and_names(tmp_path, caplog):
    """All that would silently change what is sampled from the weights."""
    config = descriptions.create_config(architecture("MDTv2"))
    config.diffusion.update(schedule="squared_cosine", prediction="velocity")
    config.sample.update(cfg_scale=2.0, cfg_power=None, clip=True)
    names = tuple(f"class {i}" for i in range(config.model.num_classes))
    network = config_lib.create_network(config)
    abstract = sharding.abstract_parameters(sharding.create_mesh(), network)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), abstract)
    meta = {"config": config_lib.to_json(config), "class_names": names}
    with contextlib.closing(Checkpoints(tmp_path / "run")) as store:
        store.save(10, {"ema_0.9999": params}, meta)
    convert("to-torch", "--input", tmp_path / "run", "--output", tmp_path / "back.safetensors")
    again = pretrained.read_pretrained(tmp_path / "back.safetensors")
    assert config_lib.to_json(again.config) == config_lib.to_json(config)
    assert (again.step, again.class_names) == (10, names)
    # A .pt cannot say so, and the authors' code would sample as from its own process.
    assert "diffusion.prediction is velocity; the authors' code" in caplog.text


@pytest.mark.parametrize("garbled", ["{", "{}", "[]", '{"architecture": {}, "config": 3}'])
def test_garbled_metadata_is_refused_by_its_file(garbled, tmp_path):
    weights = dict(torch_models.build(architecture("MDT")).state_dict())
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    weight_files.write_weights(tmp_path / "a.safetensors", arrays, {descriptions.METADATA: garbled})
    with pytest.raises(
        WeightsError, match=r"a\.safetensors: its metadata 'mdt_jax' cannot be read"
    ):
        pretrained.read_pretrained(tmp_path / "a.safetensors")


def test_weights_that_are_not_floats_are_refused(tmp_path):
    weights = dict(torch_models.build(architecture("MDT")).state_dict())
    weights["mask_token"] = weights["mask_token"].to(torch.int32)
    save(tmp_path / "a.pt", weights)
    with pytest.raises(UnknownWeights, match=r"a\.pt: mask_token holds int32, not floats"):
        pretrained.read_pretrained(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "state", [{"state": [], "param_groups": []}, {"state": {0: 3}, "param_groups": 1}, [1, 2]]
)
def test_a_garbled_optimizer_state_is_refused_by_its_file(state, tmp_path):
    source = save(tmp_path / "a.pt", dict(torch_models.build(architecture("MDT")).state_dict()))
    save(tmp_path / "opt.pt", state)
    with pytest.raises(WeightsError, match=r"opt\.pt: "):
        transfer.read_moments(tmp_path / "opt.pt", pretrained.read_pretrained(source))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small converted workdir for reading only."""
    folder = tmp_path_factory.mktemp("run")
    source = save(
        folder / "source.pt", dict(torch_models.build(architecture("MDTv2")).state_dict())
    )
    convert("to-jax", "--input", source, "--output", folder / "run", "--step", 7)
    return folder / "run"


def test_a_converted_workdir_says_its_step_and_source(run):
    step, meta = read_meta(run)
    assert step == 7 and meta["weights"]["source"] == "source.pt"
    assert meta["weights"]["items"] == [EMA]
    assert json.loads((run / "config.json").read_text()) == meta["config"]
    shown = {path.name for path in run.iterdir() if not path.name.startswith(".")}  # .lock is not
    assert shown == {"checkpoints", "config.json"}
    saved = (path for path in (run / "checkpoints" / "7").iterdir() if path.is_dir())
    assert sorted(path.name for path in saved) == [EMA, "meta"]


@pytest.mark.parametrize("dtype", transfer.DTYPES)
def test_a_type_asked_for_is_the_sources_rounded(run, tmp_path, dtype):
    out = tmp_path / "back.safetensors"
    convert("to-torch", "--input", run, "--output", out, "--dtype", dtype)
    state = torch_models.build(architecture("MDTv2")).state_dict()
    kind = getattr(torch, dtype)
    assert_same_bits(
        load(out), {k: v.to(kind) if v.is_floating_point() else v for k, v in state.items()}
    )


@pytest.fixture(scope="module")
def exported(run):
    """The EMA of that run in bfloat16, in a folder that was there and empty."""
    folder = run.with_name("exported")
    folder.mkdir()
    export("--input", run, "--output", folder, "--dtype", "bfloat16")
    return folder


def test_an_exported_run_holds_the_ema_alone_in_the_type_asked_for(run, exported):
    ema = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), restore_item(run, EMA))
    assert_same_trees(restore_item(exported, EMA), ema)
    step, meta = read_meta(exported)
    assert step == 7 and meta["weights"]["items"] == [EMA]
    assert pretrained.read_pretrained(exported).architecture == architecture("MDTv2")


def test_an_average_that_is_not_kept_is_not_exported(run, tmp_path):
    line = refusal(export, "--input", run, "--output", tmp_path / "b", "--ema_rate", 0.5)
    assert "0.5" in line and "0.9999" in line and not os.listdir(tmp_path)


def test_raw_parameters_of_an_exported_run_are_refused(exported, tmp_path):
    to_torch = ("to-torch", "--input", exported, "--output", tmp_path / "back.pt")
    assert "no raw parameters" in refusal(convert, *to_torch, "--params", "raw")
    assert not os.listdir(tmp_path)
    convert(*to_torch)


# ---- JAX → PyTorch → JAX -----------------------------------------------------------------------


def saved_run(folder, a, mesh):
    """A training run's checkpoint at step 3, and its EMA and raw parameters as JAX arrays."""
    config = descriptions.create_config(a)
    abstract = sharding.abstract_parameters(mesh, config_lib.create_network(config))
    rng = np.random.default_rng(0)

    def draw(like):
        bits = rng.integers(0, 2**32, like.shape, dtype=np.uint32).view(np.float32)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: bits[index])

    ema, raw = (jax.tree.map(draw, abstract) for _ in range(2))
    state = TrainState(step=jnp.int32(3), params=raw, opt_state={}, ema={}, loss_history=None)
    meta = {"config": config_lib.to_json(config), "class_names": list("abc"), "position": 0}
    store = Checkpoints(folder)
    store.save(3, {"state": state, EMA: ema}, meta | {"window": metrics.Window().state()})
    store.close()
    return abstract, ema, raw


@pytest.mark.parametrize(
    ("a", "axes", "params", "ending"),
    [
        (architecture("MDT", decoder_depth=3), {}, "ema", ".safetensors"),
        (architecture("MDTv2"), {"fsdp": 4, "tensor": 2}, "ema", ".pt"),
        (architecture("DiT"), {"fsdp": 4, "tensor": 2}, "raw", ".safetensors"),
    ],
    ids=["MDT on one device", "MDTv2 sharded", "DiT sharded"],
)
def test_a_runs_parameters_come_back_onto_their_mesh(tmp_path, a, axes, params, ending):
    mesh = sharding.create_mesh(**axes, devices=jax.devices()[: 8 if axes else 1])
    abstract, ema, raw = saved_run(tmp_path / "run", a, mesh)
    file = tmp_path / f"back{ending}"
    convert("to-torch", "--input", tmp_path / "run", "--output", file, "--params", params)
    convert("to-jax", "--input", file, "--output", tmp_path / "again")
    file.unlink()
    restored = restore_item(tmp_path / "again", EMA, abstract)
    assert_same_trees(restored, {"ema": ema, "raw": raw}[params])
    leaves = jax.tree.leaves(abstract)
    assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == [x.sharding for x in leaves]
    assert any(not leaf.sharding.is_fully_replicated for leaf in leaves) == bool(axes)


@pytest.mark.parametrize(
    ("name", "step", "rate"),
    [
        ("model400000.pt", 400_000, None),
        ("runs/opt000002.pt", 2, None),
        ("ema_0.9999_400000.pt", 400_000, 0.9999),
        ("hf://owner/repo/ema_0.99_0400000.safetensors", 400_000, 0.99),
        ("0050000.pt", 50_000, None),
        ("mdt_xl2_v2_ckpt.pt", None, None),
        ("DiT-XL-2-256x256.pt", None, None),
        ("diffusion_pytorch_model.safetensors", None, None),
    ],
)
def test_a_files_name_tells_step_and_rate(name, step, rate):
    assert descriptions.step_of(name) == step and descriptions.ema_rate_of(name) == rate


# ---- Optimisers --------------------------------------------------------------------------------

RUNS = {family: architecture(family) for family in ("MDT", "MDTv2", "DiT")}


@functools.cache
def trained(family):
    """Model, EMA and optimiser after two unmasked updates, which leave some weights without any."""
    model = torch_models.build(RUNS[family])
    ema, optimizer = torch_models.ema_of(model), torch_models.create_optimizer(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        x = torch.randn(2, 4, 8, 8, generator=generator)
        loss = model(x, torch.tensor([1, 500]), torch.tensor([0, 10])).square().mean()
        torch_models.update(model, ema, optimizer, loss)
    return model, ema, optimizer


def run_files(family, folder):
    """The flags for the files of a run as its authors' code saves them."""
    model, ema, optimizer = trained(family)
    if family == "DiT":
        file = folder / "0000002.pt"
        torch_models.save_dit_run(file, model, ema, optimizer, argparse.Namespace(lr=1e-4))
        return {"--model": file, "--ema": file, "--opt": file}
    torch_models.save_run(folder, model, ema, optimizer, 2)
    names = {"--model": "model000002", "--ema": "ema_0.9999_000002", "--opt": "opt000002"}
    return {flag: folder / f"{name}.pt" for flag, name in names.items()}


def flat(flags):
    return [str(part) for pair in flags.items() for part in pair]


def optimizer_state(family):
    """A run's optimiser state as arrays, free to be changed."""
    state = trained(family)[2].state_dict()
    arrays = {
        index: {
            key: value.numpy().copy() if torch.is_tensor(value) else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {"state": arrays, "param_groups": [dict(group) for group in state["param_groups"]]}


@pytest.mark.parametrize("family", RUNS)
def test_moments_are_the_optimisers_by_weight_name(family):
    state, shapes = optimizer_state(family), parameter_shapes(RUNS[family])
    moments = moments_from_torch(state, shapes)
    assert moments.optimizer == ("adan" if family == "MDTv2" else "adamw")
    assert moments.count == 2
    for moment, key in MOMENTS[moments.optimizer].items():
        assert list(moments.arrays[moment]) == list(shapes)
        for index, (name, array) in enumerate(moments.arrays[moment].items()):
            entry = state["state"].get(index)
            expected = np.zeros(shapes[name], np.float32) if entry is None else entry[key]
            sign = -1 if key == "neg_pre_grad" else 1
            np.testing.assert_array_equal(array, sign * expected)
    without = set(range(len(shapes))) - state["state"].keys()
    names = [list(shapes)[index] for index in without]
    assert ("pos_embed" if family == "DiT" else "mask_token") in names


def test_settings_are_the_optimisers():
    shapes = parameter_shapes(RUNS["MDTv2"])
    settings = moments_from_torch(optimizer_state("MDTv2"), shapes).settings
    assert settings == {"lr": 3e-4, "betas": (0.98, 0.92, 0.99), "eps": 1e-8, "weight_decay": 0.0,
                        "max_grad_norm": 1.0}  # fmt: skip


def test_a_learning_rate_in_a_tensor_is_a_number():
    state, shapes = optimizer_state("MDT"), parameter_shapes(RUNS["MDT"])
    state["param_groups"][0]["lr"] = np.array(0.25)
    rate = moments_from_torch(state, shapes).settings["lr"]
    assert rate == 0.25 and isinstance(rate, float)


def test_an_earlier_adans_gradients_are_taken_as_they_are():
    state, shapes = optimizer_state("MDTv2"), parameter_shapes(RUNS["MDTv2"])
    expected = moments_from_torch(state, shapes).arrays["previous"]
    for entry in state["state"].values():
        entry["pre_grad"] = -entry.pop("neg_pre_grad")
    found = moments_from_torch(state, shapes).arrays["previous"]
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_state_that_does_not_say_its_step_takes_the_weights():
    state, shapes = optimizer_state("MDTv2"), parameter_shapes(RUNS["MDTv2"])
    del state["param_groups"][0]["step"]
    assert moments_from_torch(state, shapes, 400_000).count == 400_000


def test_parameters_in_several_groups_keep_their_order():
    state, shapes = optimizer_state("MDT"), parameter_shapes(RUNS["MDT"])
    expected = moments_from_torch(state, shapes)
    (group,) = state["param_groups"]
    halves = group["params"][:9], group["params"][9:]
    state["param_groups"] = [group | {"params": half} for half in halves]
    found = moments_from_torch(state, shapes)
    assert_same_trees(found.arrays, expected.arrays)


@pytest.mark.parametrize(
    "content",
    [
        lambda state: state,
        *(lambda state, name=name: {"ema": {}, name: state} for name in transfer._OPTIMIZERS),
        lambda state: {"state_dict": {}, "optimizer_states": [state]},  # Lightning
    ],
)
def test_an_optimisers_state_is_found_where_scripts_keep_it(content, tmp_path):
    a = architecture("DiT")
    shapes = parameter_shapes(a)
    model = pretrained.Pretrained("x.pt", a, descriptions.create_config(a), {}, step=9)
    moments = {"exp_avg": torch.ones(next(iter(shapes.values()))), "step": torch.tensor(7.0)}
    state = {"state": {0: moments | {"exp_avg_sq": moments["exp_avg"] * 2}}}
    state["param_groups"] = [{"params": list(range(len(shapes))), "lr": 1e-4}]
    torch.save(content(state), tmp_path / "opt.pt")
    found = transfer.read_moments(tmp_path / "opt.pt", model)
    assert (found.optimizer, found.count) == ("adamw", 7)
    assert found.arrays["nu"]["pos_embed"].max() == 2


def test_a_lightning_checkpoint_moves_whole(tmp_path, capsys):
    """One file has raw and averaged weights of compiled blocks, steps, and a list of optimisers."""
    a = architecture("DiT")
    shapes = parameter_shapes(a)
    state = torch_models.build(a).state_dict()
    raw, average = ({k: v + number for k, v in state.items()} for number in (1, 2))
    content = {f"model.{k.replace('.mlp.', '._orig_mod.mlp.')}": v for k, v in raw.items()}
    content |= {f"ema_model.module.{k}": v for k, v in average.items()}
    content |= {"ema_model.n_averaged": torch.tensor(3)}
    one = {
        "exp_avg": torch.ones(shapes["pos_embed"]),
        "exp_avg_sq": torch.ones(shapes["pos_embed"]),
    }
    optimizer = {"state": {0: one | {"step": torch.tensor(7.0)}}}
    optimizer["param_groups"] = [{"params": list(range(len(shapes))), "lr": 1e-4}]
    path = tmp_path / "last.ckpt"
    torch.save(
        {"state_dict": content, "optimizer_states": [optimizer], "global_step": 7, "epoch": 1}, path
    )
    flags = [flag for name in ("model", "ema", "opt") for flag in (f"--{name}", path)]
    convert("to-jax", *flags, "--output", tmp_path / "run", *hints(a))
    assert "DiT at step 7, adamw after 7 updates" in capsys.readouterr().out
    for params, expected in (("raw", raw), ("ema", average)):
        found, _ = transfer.to_state_dict(tmp_path / "run", params=params)
        assert_same_bits({k: torch.from_numpy(np.array(v)) for k, v in found.items()}, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["param_groups"][0]["params"].append(99), "parameters, the model has"),
        (lambda s: s["state"].clear(), "empty: it was saved before the first update"),
        (lambda s: s.pop("state"), "no 'state' and 'param_groups'"),
        (lambda s: s["state"][0].pop("exp_avg"), "known: AdamW, Adan"),
        (lambda s: [e.update(momentum_buffer=0) for e in s["state"].values()], "momentum_buffer"),
        (lambda s: s["state"][5].pop("exp_avg_sq"), "no exp_avg_sq for"),
        (
            lambda s: s["state"][0].update(exp_avg=np.zeros(3)),
            "exp_avg of pos_embed has shape (3,)",
        ),
    ],
)
def test_another_optimisers_or_models_state_is_refused(change, said):
    state = optimizer_state("MDT")
    change(state)
    with pytest.raises(ValueError) as caught:
        moments_from_torch(state, parameter_shapes(RUNS["MDT"]))
    assert said in str(caught.value)


@pytest.mark.parametrize("family", RUNS)
def test_a_moved_run_holds_the_exact_moments(family, tmp_path):
    a, (model, ema, _) = RUNS[family], trained(family)
    flags = run_files(family, tmp_path)
    convert("to-jax", *flat(flags), "--output", tmp_path / "run", *hints(a))
    for file in set(flags.values()):
        file.unlink()
    step, meta = read_meta(tmp_path / "run")
    config = config_lib.from_json(meta["config"])
    assert step == 2 and meta["position"] == 2 * config.batch_size
    assert config.optimizer.name == ("adan" if family == "MDTv2" else "adamw")
    assert config.optimizer.learning_rate == (3e-4 if family == "MDTv2" else 1e-4)

    name = {found: name for name, found in FAMILIES.items()}[family]
    trainer = make_trainer(name, model=config_lib.create_network(config))
    abstract = trainer.abstract_state().replace(ema={})
    state = restore_item(tmp_path / "run", "state", abstract)
    moments = moments_from_torch(optimizer_state(family), parameter_shapes(a))
    settings = {"family": family, "depth": a.depth, "num_heads": a.num_heads}
    tree = functools.partial(from_torch, **settings, decoder_depth=a.decoder_depth)
    for moment, arrays in moments.arrays.items():
        assert_same_trees(optax.tree.get(state.opt_state, moment), tree(arrays))
    counts = [leaf for _, leaf in optax.tree.get_all_with_path(state.opt_state, "count")]
    assert counts and set(map(int, counts)) == {2} and int(state.step) == 2
    for module, params in ((model, state.params), (ema, restore_item(tmp_path / "run", EMA))):
        arrays = {k: v.detach().numpy() for k, v in module.state_dict().items()}
        assert_same_trees(jax.tree.map(np.asarray, params), tree(arrays))


def test_both_parts_of_a_moved_run_go_back(tmp_path):
    model, ema, _ = trained("DiT")
    flags = run_files("DiT", tmp_path)
    del flags["--opt"]
    convert("to-jax", *flat(flags), "--output", tmp_path / "run", *hints(RUNS["DiT"]))
    for params, module in (("ema", ema), ("raw", model)):
        out = tmp_path / f"{params}.pt"
        convert("to-torch", "--input", tmp_path / "run", "--output", out, "--params", params)
        assert_same_bits(load(out), module.state_dict())


# ---- Refusals ----------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """A file of weights in a folder of its own."""
    return save(
        tmp_path / "source.pt", dict(torch_models.build(architecture("MDTv2")).state_dict())
    )


def test_an_ema_of_another_model_is_refused(tmp_path):
    a, b = architecture("MDTv2"), architecture("MDTv2", depth=6)
    for file, which in (("model000002.pt", a), ("ema_0.9999_000002.pt", b)):
        save(tmp_path / file, dict(torch_models.build(which).state_dict()))
    files = {"--model": tmp_path / "model000002.pt", "--ema": tmp_path / "ema_0.9999_000002.pt"}
    line = refusal(convert, "to-jax", *flat(files), "--output", tmp_path / "run")
    assert "ema_0.9999_000002.pt is of another model" in line and "depth 6" in line
    assert not (tmp_path / "run").exists()


def test_an_optimisers_state_of_another_model_names_its_file(source, tmp_path):
    opt = run_files("MDT", tmp_path)["--opt"]
    files = ("--model", source, "--opt", opt)
    line = refusal(convert, "to-jax", *files, "--output", tmp_path / "run")
    assert str(opt) in line and "parameters, the model has" in line
    line = refusal(convert, "to-jax", "--model", source, "--opt", source, "--output", "run")
    assert f"{source}: not an optimiser's state" in line


def test_a_folder_that_holds_something_is_not_written_to(source, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("")
    line = refusal(convert, "to-jax", "--input", source, "--output", tmp_path / "run")
    assert str(tmp_path / "run") in line and "give a new folder" in line
    assert os.listdir(tmp_path / "run") == ["precious"]
    line = refusal(convert, "to-jax", "--input", source, "--output", source)
    assert str(source) in line and source.is_file()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--input X, or --model M"),
        (("--input", "a.pt", "--ema", "b.pt"), "--input X, or --model M"),
        (("--input", "a.pt", "--model", "b.pt"), "--input X, or --model M"),
        (("--input", "missing.pt"), "missing.pt is not there"),
        (("--input", "hf://owner"), "hf://OWNER/REPO/FILE"),
    ],
)
def test_to_jax_says_what_it_wants(args, said, tmp_path):
    assert said in refusal(convert, "to-jax", *args, "--output", tmp_path / "run")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("option", ["--step -3", "--ema_rate 2.0", "--ema_rate -0.5"])
def test_numbers_that_cannot_be_are_refused(source, tmp_path, option):
    out = ("--output", tmp_path / "run", *option.split())
    assert option in refusal(convert, "to-jax", "--input", source, *out)
    assert os.listdir(tmp_path) == [source.name]


def test_a_folder_that_cannot_be_made_is_named(source, tmp_path):
    line = refusal(convert, "to-jax", "--input", source, "--output", source / "run")
    assert f"{source}/run could not be written" in line and "disk" not in line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--output", "a.npz"), "must end in .pt or .safetensors"),
        (("--output", "a.pt", "--ema_rate", "0.5"), "it keeps 0.9999"),
        (("--output", "a.pt", "--step", "5"), "no checkpoint of step 5"),
    ],
)
def test_to_torch_says_what_it_wants(run, args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(convert, "to-torch", "--input", run, *args)
    assert not os.listdir(tmp_path)


def test_a_workdir_that_is_none_is_named(tmp_path):
    out = ("--output", tmp_path / "a.pt")
    for command in (functools.partial(convert, "to-torch"), export):
        assert str(tmp_path / "x") in refusal(command, "--input", tmp_path / "x", *out)


def test_inspect_says_what_a_file_is(capsys, tmp_path):
    a = architecture("DiT")
    path = save(tmp_path / "a.pt", {"ema": dict(torch_models.build(a).half().state_dict())})
    convert("inspect", "--input", path, *hints(a))
    out = capsys.readouterr().out
    count = sum(p.numel() for p in torch_models.build(a).parameters())
    assert f"{path}, its 'ema'" in out and f"{count:,}" in out and "float16" in out
    for key, value in dataclasses.asdict(a).items():
        assert f"{key:<15} {value}" in out
    assert "--num_heads" in refusal(convert, "inspect", "--input", path)


# ---- Failures in the middle --------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_nothing(source, tmp_path, monkeypatch, error):
    read = weight_files.WeightFile.__getitem__

    def fail_later(self, name):
        if name == "mask_token":
            assert any(".partial" in file for file in os.listdir(tmp_path))
            raise error("the source went away")
        return read(self, name)

    monkeypatch.setattr(weight_files.WeightFile, "__getitem__", fail_later)
    args = ("to-jax", "--input", source, "--output", tmp_path / "run")
    if error is OSError:
        line = refusal(convert, *args)
        assert str(tmp_path / "run") in line and "the source went away" in line
    else:
        with pytest.raises(error):
            convert(*args)
    assert os.listdir(tmp_path) == [source.name]


def test_a_checkpoint_that_cannot_be_sealed_leaves_nothing(source, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mdt_jax.checkpoints.store.write_json", fail)
    line = refusal(convert, "to-jax", "--input", source, "--output", tmp_path / "run")
    assert "No space left on device" in line and "is the disk full?" in line
    assert os.listdir(tmp_path) == [source.name]


@pytest.mark.parametrize(
    ("channels", "latents", "vae", "decoder"),
    [
        (1, None, "", ""),
        (3, None, "", ""),
        (4, None, "", " --vae ema"),  # of published weights it is not known
        (4, LatentSpace(autoencoder="mse"), "", " --vae mse"),
        (4, LatentSpace(autoencoder="mse"), "ema", " --vae ema"),
        (16, LatentSpace(autoencoder="sd3"), "", " --vae sd3"),
        (4, LatentSpace(), "", " --vae ema"),
        (3, LatentSpace(autoencoder="my vae"), "", " --vae 'my vae'"),
    ],
)
def test_the_command_that_samples_a_run_names_the_decoder_of_its_latents(
    channels, latents, vae, decoder
):
    said = sampling_command("runs/a b", "out", channels, latents, vae)
    assert said == f"python -m mdt_jax.sample --workdir 'runs/a b' --output out{decoder}"


def test_what_weights_can_be_stored_in_is_the_same_list():
    assert tuple(transfer.DTYPES) == convert_checkpoint.DTYPES


def test_a_full_disk_ends_the_commands_in_one_line(source, run, tmp_path):
    code = """
        import resource, signal, sys
        from mdt_jax.commands.convert_checkpoint import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails with EFBIG instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.RLIM_INFINITY))
        for command in sys.argv[1:]:
            try:
                main(command.split())
            except SystemExit as error:
                print(error.code, file=sys.stderr)
        """
    (back := tmp_path / "back.pt").write_text("an older file")
    commands = (
        f"to-jax --input {source} --output {tmp_path}/run",
        f"to-torch --input {run} --output {back}",
    )
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *commands],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    lines = process.stderr.splitlines()
    assert len(lines) == 2, process.stderr
    for line, output in zip(lines, (tmp_path / "run", back), strict=True):
        assert line.startswith(f"error: {output} could not be written") and "disk full?" in line
    assert back.read_text() == "an older file"
    assert sorted(os.listdir(tmp_path)) == [back.name, source.name]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_told_on_every_way(value, tmp_path, caplog):
    a = architecture("DiT")
    arrays = {k: np.ones(shape, np.float32) for k, shape in parameter_shapes(a).items()}
    arrays["blocks.1.mlp.fc1.bias"][0] = value
    weight_files.write_weights(tmp_path / "a.safetensors", arrays)
    convert(
        "to-jax", "--input", tmp_path / "a.safetensors", "--output", tmp_path / "run", *hints(a)
    )
    export("--input", tmp_path / "run", "--output", tmp_path / "alone")
    convert("to-torch", "--input", tmp_path / "run", "--output", tmp_path / "back.pt")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3 and all("holds NaN or infinite values; its samples" in t for t in told)
    names = ("blocks/layers/mlp/fc1/bias",) * 2 + ("blocks.1.mlp.fc1.bias",)
    assert all(name in text for name, text in zip(names, told, strict=True))


def test_a_type_too_small_for_the_weights_is_told(tmp_path, caplog):
    a = architecture("DiT")
    arrays = {k: np.full(shape, 1e5, np.float32) for k, shape in parameter_shapes(a).items()}
    weight_files.write_weights(tmp_path / "a.safetensors", arrays)
    convert(
        "to-jax", "--input", tmp_path / "a.safetensors", "--output", tmp_path / "run", *hints(a)
    )
    assert not caplog.records
    export("--input", tmp_path / "run", "--output", tmp_path / "half", "--dtype", "float16")
    assert "holds NaN or infinite values" in caplog.text
