"""`init_from`: a run that starts from other weights, as they are or fitted to its own network."""

import contextlib
import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
from fixtures import FAMILIES, on_pixels, reference, start

from mdt_jax.checkpoints import CheckpointError, Checkpoints
from mdt_jax.convert.adapt import resize_position_table, resize_relative_bias
from mdt_jax.models.latent_space import LatentSpace
from mdt_jax.parallel import sharding
from mdt_jax.train import loop
from mdt_jax.training import transfer
from mdt_jax.training.finetune import initial_parameters
from mdt_jax.weights import descriptions, pretrained
from mdt_jax.weights import files as weight_files

BATCH = 8


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """XLA without its expensive passes, which the tiny models here do not repay."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def authors_weights(name):
    """A fixture's state dict; none of its arrays is at its initial value."""
    arrays = reference(name).arrays
    return {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of every fixture's weights, NAME.safetensors, and DiT's as a workdir, dit."""
    folder = tmp_path_factory.mktemp("weights")
    for name in FAMILIES:
        weight_files.write_weights(folder / f"{name}.safetensors", authors_weights(name))
    found = pretrained.read_pretrained(folder / "dit.safetensors", num_heads=4)
    transfer.to_workdir(folder / "dit", found)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 20 images of 8 × 8 × 4 in 10 classes."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 256, (20, 8, 8, 4), np.uint8))
    np.save(folder / "labels.npy", np.arange(20) % 10)
    return folder


def config_for(name, init_from="", data="", **changes):
    """A config of a fixture's network, or of one with other settings ("model__depth")."""
    config = descriptions.create_config(descriptions.architecture_of(reference(name).model()))
    config.update(batch_size=BATCH, log_every=1, num_steps=1, init_from=str(init_from))
    config.masking.ratio_span = 0.0  # one number of kept tokens, so one step to compile
    config.data.update(name="npy", path=str(data))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def first_state(config, workdir):
    """The run of a config, and the state it starts with."""
    run = loop.Run(config, workdir)
    with contextlib.closing(Checkpoints(workdir)) as store:
        state, meta = run.restore(store)
    assert meta == {} and int(state.step) == 0
    return run, state


def same_bits(a, b):
    """Whether two trees are alike in structure, types and every bit."""
    a, b = jax.tree.map(np.asarray, (a, b))
    alike = jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), a, b)
    return all(jax.tree.leaves(alike))


def flat(params):
    """Arrays by path, such as "final_layer/linear/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): np.asarray(leaf) for path, leaf in leaves}


# ---- The same network --------------------------------------------------------------------------


@functools.cache
def compiled_steps():
    """DiT's steps; they do not depend on the weights that a run starts from."""
    return loop.Run(config_for("dit"), "").compile_steps()


def one_step(run, state):
    """The loss of the first step on a fixed batch, and the parameters after it."""
    rng = np.random.default_rng(1)
    image = rng.normal(size=(BATCH, *run.model.image_shape)).astype(np.float32)
    batch = {"image": image, "label": np.arange(BATCH, dtype=np.int32)}
    batch = jax.device_put(batch, sharding.batch_sharding(run.mesh))
    (step,) = compiled_steps().values()
    state, values = step(state, batch)
    return float(values["loss"]), jax.tree.map(np.asarray, state.params)


@functools.cache
def step_from_the_source():
    """`one_step` of a trainer that starts from the fixture's parameters without `init_from`."""
    run = loop.Run(config_for("dit"), "")
    return one_step(run, start(run.trainer, reference("dit").tree("param/")))


def assert_starts_at_the_source(source, tmp_path):
    loss, params = one_step(*first_state(config_for("dit", source), tmp_path))
    expected_loss, expected_params = step_from_the_source()
    assert loss == expected_loss and same_bits(params, expected_params)


@pytest.mark.parametrize("source", ["dit.safetensors", "dit"])
def test_the_first_step_is_the_sources_own(source, weights, tmp_path):
    assert_starts_at_the_source(weights / source, tmp_path)


@pytest.mark.torch
def test_the_first_step_is_the_sources_own_from_a_pickle(tmp_path):
    pytest.importorskip("torch")
    weight_files.write_weights(tmp_path / "dit.pt", authors_weights("dit"))
    assert_starts_at_the_source(tmp_path / "dit.pt", tmp_path / "run")


def test_one_changed_weight_changes_the_first_loss(tmp_path):
    changed = authors_weights("dit")
    changed["final_layer.linear.bias"] = changed["final_layer.linear.bias"] + np.float32(1e-3)
    weight_files.write_weights(tmp_path / "dit.safetensors", changed)
    config = config_for("dit", tmp_path / "dit.safetensors")
    loss, params = one_step(*first_state(config, tmp_path / "run"))
    expected_loss, expected_params = step_from_the_source()
    assert loss != expected_loss and not same_bits(params, expected_params)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_and_average_start_as_the_source_and_the_optimizer_afresh(
    name, weights, tmp_path
):
    _, state = first_state(config_for(name, weights / f"{name}.safetensors"), tmp_path)
    expected = reference(name).tree("param/")
    assert same_bits(state.params, expected) and same_bits(state.ema["0.9999"], expected)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


# ---- Another network ---------------------------------------------------------------------------


def test_other_classes_have_new_rows_and_all_else_is_kept(weights, tmp_path):
    config = config_for("mdt_v2", weights / "mdt_v2.safetensors", model__num_classes=4)
    _, state = first_state(config, tmp_path)
    ours, theirs = flat(state.params), flat(reference("mdt_v2").tree("param/"))
    table, known = ours.pop("label_embed"), theirs.pop("label_embed")
    assert same_bits(ours, theirs)
    assert table.shape == (5, 32) and table[-1].tobytes() == known[-1].tobytes()
    assert 0.01 < table[:-1].std() < 0.04  # drawn with 0.02; the fixture's rows have another
    assert known.std() > 0.06
    assert same_bits(state.ema["0.9999"], state.params)


def test_the_log_says_what_became_of_the_weights(weights, tmp_path, caplog):
    changes = {"model__num_classes": 4, "model__input_size": 12}
    changes["diffusion__variance"] = "fixed_large"
    source = weights / "mdt_v1.safetensors"
    with caplog.at_level("INFO", logger="absl"):
        first_state(config_for("mdt_v1", source, **changes), tmp_path)
    lines = caplog.text.splitlines()
    assert any(f"starting from {source} (MDT)" in line for line in lines)
    for said in (
        "loaded    ",
        "resized   pos_embed: (16, 32) -> (36, 32), grid 4 x 4 -> 6 x 6, bicubic",
        "resized   encoder_blocks/layers/attn/relative_bias: ",
        "re-drawn  label_embed: (11, 32) -> (5, 32), num_classes 10 -> 4",
        "left      final_layer/linear/kernel: ",
    ):
        assert any(line.startswith(said) for line in lines), said


@pytest.mark.parametrize("name", FAMILIES)
def test_another_resolution_resizes_the_tables_alone(name, weights, tmp_path):
    config = config_for(name, weights / f"{name}.safetensors", model__input_size=12)
    _, state = first_state(config, tmp_path)
    ours, theirs = flat(state.params), flat(reference(name).tree("param/"))
    for path, array in theirs.items():
        if path.endswith("pos_embed"):
            array = resize_position_table(array, 6)
        elif path.endswith("relative_bias"):
            array = resize_relative_bias(array, 6)
        assert np.array_equal(ours[path], array), path


def test_another_resolution_trains(weights, tmp_path):
    data, rng = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    np.save(data / "latents.npy", rng.uniform(0.1, 1, (BATCH, 12, 12, 8)).astype(np.float32))
    np.save(data / "labels.npy", np.arange(BATCH))
    config = config_for("dit", weights / "dit.safetensors", data, model__input_size=12)
    trained = loop.train(config, tmp_path / "run")  # stops at a loss that is not finite
    assert int(trained.step) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.params))


@pytest.mark.parametrize("kind", ["file", "workdir"])
def test_mdt_v1_is_cut_into_encoder_and_decoder_as_the_run_has_it(kind, weights, tmp_path):
    source = weights / "mdt_v1.safetensors"
    if kind == "workdir":  # which says where it was cut: 2 + 2
        source = transfer.to_workdir(tmp_path / "workdir", pretrained.read_pretrained(source))
    config = config_for("mdt_v1", source, model__decoder_depth=1)
    _, state = first_state(config, tmp_path / "run")
    known = reference("mdt_v1").tree("param/")
    stacks = ("encoder_blocks", "decoder_blocks")
    ours, theirs = (
        jax.tree.map(lambda *parts: np.concatenate(parts), *(tree[stack] for stack in stacks))
        for tree in (state.params, known)
    )
    assert same_bits(ours, theirs)
    assert {len(leaf) for leaf in jax.tree.leaves(state.params["decoder_blocks"])} == {1}


# ---- What cannot be started from ---------------------------------------------------------------

REFUSED = {
    "no such file": ("gone.safetensors", {}, "gone.safetensors is not there"),
    "no such workdir": ("gone", {}, "no checkpoint in .*gone"),
    "a VAE": ("vae.safetensors", {}, "these are an autoencoder's"),
    "another family": ("mdt_v2.safetensors", {}, "family is MDTv2 in the weights and MDT in"),
    "another width": ("mdt_v1.safetensors", {"model__hidden_size": 64}, "hidden_size is 32 .*64"),
    "another depth": ("mdt_v1.safetensors", {"model__depth": 8}, "depth is 4 .* and 8 in"),
}


@contextlib.contextmanager
def no_compilation():
    """Fails if XLA compiles anything."""
    heard = []

    def listen(event, duration, fun_name="?", **_):
        if "backend_compile" in event:
            heard.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not heard


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_started_from_is_refused_before_compiling(what, weights, data, tmp_path):
    source, changes, message = REFUSED[what]
    vae = {"encoder.conv_in.weight": np.zeros((8, 3, 3, 3), np.float32)}
    weight_files.write_weights(weights / "vae.safetensors", vae)
    config = config_for("mdt_v1", weights / source, data, **changes)
    refusals = (ValueError, CheckpointError)
    with no_compilation(), pytest.raises(refusals, match=message) as error:
        loop.train(config, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_latents_of_another_autoencoder_are_refused(weights, tmp_path, monkeypatch):
    ours, other = LatentSpace(digest="a" * 64), LatentSpace(digest="b" * 64)
    read = pretrained.read_pretrained

    def read_of_ours(*args, **hints):
        return dataclasses.replace(read(*args, **hints), latents=ours)

    monkeypatch.setattr(pretrained, "read_pretrained", read_of_ours)
    run = loop.Run(config_for("dit", weights / "dit.safetensors"), tmp_path)
    with contextlib.closing(Checkpoints(tmp_path)) as store:
        message = r"the encoder b{12}, but init_from .*dit.safetensors has .* the encoder a{12};"
        with pytest.raises(ValueError, match=message):
            run.restore(store, other)
        for same in (ours, None):
            assert int(run.restore(store, same)[0].step) == 0


# ---- Going on ----------------------------------------------------------------------------------


def test_a_finetuned_run_goes_on_without_its_source(weights, data, tmp_path, monkeypatch):
    steps = on_pixels(compiled_steps())
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: steps)
    source = shutil.copy(weights / "dit.safetensors", tmp_path / "source.safetensors")
    config, workdir = config_for("dit", source, data), tmp_path / "run"
    assert int(loop.train(config, workdir).step) == 1
    (tmp_path / "source.safetensors").unlink()
    config.num_steps = 2
    assert int(loop.train(config, workdir).step) == 2

    config.init_from = str(weights / "dit")
    with pytest.raises(ValueError, match=f"init_from: {source}, now .*another --workdir"):
        loop.train(config, workdir)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_trained_on(value, tmp_path):
    arrays = {k: np.array(v) for k, v in authors_weights("dit").items()}
    arrays["blocks.0.mlp.fc1.bias"][0] = value
    weight_files.write_weights(tmp_path / "a.safetensors", arrays)
    config = config_for("dit", tmp_path / "a.safetensors")
    model = reference("dit").model()
    with pytest.raises(
        ValueError, match="blocks/layers/mlp/fc1/bias holds NaN or infinite values; give"
    ):
        initial_parameters(config, model, dict)
