"""Weights and whole runs of PyTorch's go on in JAX as if they had never moved, and back."""

import argparse
import contextlib
import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures import FAMILIES, on_pixels, reference, relative_error

import mdt_jax
from mdt_jax import config as config_lib
from mdt_jax.checkpoints import CheckpointError, Checkpoints
from mdt_jax.commands import convert_checkpoint
from mdt_jax.convert.architecture import Architecture
from mdt_jax.diffusion import guided, sample_steps
from mdt_jax.parallel import sharding
from mdt_jax.train import loop
from mdt_jax.training.optimizers import AdanState
from mdt_jax.training.step import Draws
from mdt_jax.weights import descriptions

torch = pytest.importorskip("torch")
import torch_models  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_torch_models import architecture, authors_model, min_snr, state  # noqa: E402

pytestmark = pytest.mark.torch

# What a file of a family's weights does not show.
SHOWN = {"mdt_v1": {"decode_layers": 2}, "mdt_v2": {}, "dit": {"num_heads": 4}}
BATCH, KEPT = 8, 11
BEFORE, AFTER = range(3), range(3, 6)  # training steps in PyTorch, and in both
# How the files of the three steps are named: MDT saves before it counts a step, DiT after.
SAVED_AS = {"mdt_v1": 2, "mdt_v2": 2, "dit": 3}
RATE = 0.99  # of the EMA; 0.9999 would move it by little more than float32 rounds
LOSS_TOLERANCE, MOVEMENT_TOLERANCE, EMA_TOLERANCE = 1e-5, 1e-4, 1e-3


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """XLA without its expensive passes, which the tiny models here do not repay."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def convert(direction, **options):
    """Runs the command; options are its flags."""
    convert_checkpoint.main([direction, *(f"--{key}={value}" for key, value in options.items())])


def host(tree):
    """A tree's arrays in NumPy."""
    return jax.tree.map(np.asarray, tree)


def same_bits(a, b):
    """Whether two trees are alike in structure, types and every bit."""
    a, b = host(a), host(b)
    alike = jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), a, b)
    return all(jax.tree.leaves(alike))


@functools.cache
def forward(name):
    """(params, x, t, labels) → output, compiled once for each network."""
    model = reference(name).model()
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


# ---- Weights -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """name → a folder of a fixture's weights in PyTorch's files and in a workdir made of each."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        torch.save(state(name), folder / "authors.pt")
        save_file(state(name), folder / "authors.safetensors")
        for kind in ("pt", "safetensors"):
            source, workdir = folder / f"authors.{kind}", folder / f"from_{kind}"
            convert("to-jax", input=source, output=workdir, **SHOWN[name])
        return folder

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_every_way_in_gives_the_same_bits(name, weights):
    expected = reference(name).tree("param/")
    for source in ("authors.pt", "authors.safetensors", "from_pt", "from_safetensors"):
        shown = SHOWN[name] if "." in source else {}
        model, params = mdt_jax.load(weights(name) / source, **shown)
        assert descriptions.architecture_of(model.network) == architecture(name)
        assert same_bits(params, expected), source


@pytest.mark.parametrize("name", FAMILIES)
def test_converted_weights_compute_the_authors_outputs_and_guided_samples(name, weights):
    r = reference(name)
    model, params = mdt_jax.load(weights(name) / "from_pt")
    params = jax.tree.map(jnp.asarray, host(params))
    output = forward(name)(params, r.nhwc("in/x"), r["in/t"], r["in/y"])
    assert relative_error(output, r.nhwc("out/eval")) < 1e-5

    fn = guided(
        lambda *inputs: model.network.apply({"params": params}, *inputs),
        r["in/y"],
        model.network.num_classes,
        scale=float(r.arrays["cfg/scale"]),
        power=float(r.arrays["cfg/pow"]) if model.defaults["cfg_power"] else None,
        channels=model.defaults["guided_channels"],
    )
    count = len(r["in/y"])
    noise = r.nhwc("ddpm/noise")[::-1, :count]  # listed in the order drawn, from the highest down
    diffusion, start = model.diffusion.respaced("10"), r.nhwc("ddpm/start")[:count]
    sample = jax.jit(lambda: sample_steps("ddpm", diffusion, fn, start, lambda i: noise[i]))()
    assert relative_error(sample, r.nhwc("ddpm/sample")[:count]) < 1e-4


# ---- Whole runs --------------------------------------------------------------------------------


@functools.cache
def draws(name):
    """Data and every draw of six steps, labels kept; images NCHW."""
    rng, steps = np.random.default_rng(7), len(BEFORE) + len(AFTER)
    images = rng.normal(size=(2, steps, BATCH, 4, 8, 8)).astype(np.float32)
    # Not 0: there float32 cannot tell the mass of a bin far from the mean, PyTorch's float64 can.
    t = rng.integers(1, 1000, (steps, BATCH))
    return types.SimpleNamespace(
        x=images[0],
        noise=images[1],
        t=t,
        y=rng.integers(0, 10, (steps, BATCH)),
        mask=rng.random((steps, BATCH, 16)).astype(np.float32),
    )


def torch_step(name, model, ema, optimizer, k):
    """Step k in PyTorch; returns its loss."""
    d = draws(name)
    x, t, noise, y, mask = (torch.from_numpy(a[k]) for a in (d.x, d.t, d.noise, d.y, d.mask))
    ids = mask.argsort(1)[:, :KEPT] if model.masks else None
    loss = torch_models.training_loss(model, x, t, noise, y, ids, min_snr(name))
    return torch_models.update(model, ema, optimizer, loss, RATE)


def injected_draws(name):
    """AFTER's draws in place of `draw_randomness`, for a run that goes on at step SAVED_AS."""
    d = draws(name)
    noise = jnp.asarray(np.moveaxis(d.noise, 2, -1))
    t, mask, keep_label = jnp.float32((d.t + 0.5) / 1000), jnp.asarray(d.mask), jnp.ones(BATCH)

    def draw(seed, step, shape, num_tokens):
        k = step - SAVED_AS[name] + AFTER.start
        return Draws(t[k], noise[k], noise[k], keep_label, keep_label, mask[k])

    return draw


def config_of(workdir):
    """The config that a workdir was written with, for batches of 8 and one number of tokens."""
    config = config_lib.from_json(json.loads((workdir / "config.json").read_text()))
    config.batch_size, config.masking.ratio_span = BATCH, 0.0
    return config


@functools.cache
def compiled_steps(name):
    """What `Run.compile_steps` gives for a fixture's model and recipe, with the draws injected."""
    config = descriptions.create_config(architecture(name))
    config.batch_size, config.masking.ratio_span, config.ema_rates = BATCH, 0.0, (RATE,)
    run = loop.Run(config, "")
    (count,) = run.kept_tokens.programs
    assert count == (KEPT if run.model.supports_masking else None)
    step = dataclasses.replace(run.trainer, draw_fn=injected_draws(name)).jit_step(count)
    like = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.batch_sharding(run.mesh))
    shape = (BATCH, *run.model.image_shape)
    batch = {"image": like(shape, np.float32), "label": like(shape[:1], np.int32)}
    # XLA's older way to make kernels takes half the time.
    options = {"xla_cpu_use_fusion_emitters": False}
    return {count: step.lower(run.abstract, batch).compile(options)}


def weights_of(model):
    """A copy of a PyTorch model's parameters by name."""
    return {k: p.detach().numpy().copy() for k, p in model.named_parameters()}


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory):
    """name → three steps in PyTorch, saved as the authors save, then three more.

    Its attributes: files, by the converter's options; saved and ended, (parameters, EMA) by weight
    name; losses, of the last three steps.
    """

    @functools.cache
    def make(name):
        folder, model = tmp_path_factory.mktemp(name), authors_model(name)
        ema, optimizer = torch_models.ema_of(model), torch_models.create_optimizer(model)
        for k in BEFORE:
            torch_step(name, model, ema, optimizer, k)
        step = SAVED_AS[name]
        if name == "dit":
            path = folder / f"{step:07d}.pt"
            torch_models.save_dit_run(path, model, ema, optimizer, argparse.Namespace(lr=1e-4))
            files = dict.fromkeys(("model", "ema", "opt"), path)
        else:
            torch_models.save_run(folder, model, ema, optimizer, step, RATE)
            names = (f"model{step:06d}.pt", f"ema_{RATE}_{step:06d}.pt", f"opt{step:06d}.pt")
            files = {n.split("0")[0].strip("_"): folder / n for n in names}
        saved = weights_of(model), weights_of(ema)
        losses = [torch_step(name, model, ema, optimizer, k) for k in AFTER]
        ended = weights_of(model), weights_of(ema)
        return types.SimpleNamespace(files=files, saved=saved, ended=ended, losses=losses)

    return make


def go_on(name, files, workdir):
    """Converts a run, makes the steps in AFTER, saves, and converts parameters and EMA back.

    Returns:
      restored and ended: the states; losses; back: the files of parameters and EMA.
    """
    rate = {"ema_rate": RATE} if name == "dit" else {}  # not in the name of DiT's file
    convert("to-jax", output=workdir, **files, **SHOWN[name], **rate)
    run, d, losses = loop.Run(config_of(workdir), workdir), draws(name), []
    (step,) = compiled_steps(name).values()
    with contextlib.closing(Checkpoints(workdir)) as store:
        state, _ = run.restore(store)
        restored = host(state)
        for k in AFTER:
            batch = {"image": np.moveaxis(d.x[k], 1, -1), "label": d.y[k].astype(np.int32)}
            batch = jax.device_put(batch, sharding.batch_sharding(run.mesh))
            state, values = step(state, batch)
            losses.append(float(values["loss"]))
        run.save(store, state, int(state.step), {"config": config_lib.to_json(run.config)})
    back = workdir / "raw.pt", workdir / "ema.pt"
    for path in back:
        convert("to-torch", input=workdir, output=path, params=path.stem)
    return types.SimpleNamespace(restored=restored, ended=host(state), losses=losses, back=back)


@pytest.fixture(scope="module")
def moved(torch_run, tmp_path_factory):
    """name → the run moved over whole, and gone on."""
    folder = tmp_path_factory.mktemp("moved")
    return functools.cache(lambda name: go_on(name, torch_run(name).files, folder / name))


def movement_error(start, ours, theirs):
    """‖ours − theirs‖ / ‖theirs‖ of the movement from `start`, key biases left out.

    The true gradient of a key's bias is zero, so that Adam moves it by the sign of rounding.
    """
    moved = ([], [])
    for weight, before in start.items():
        keep = np.ones(before.shape, bool)
        if weight.endswith("qkv.bias"):
            keep[len(keep) // 3 : 2 * len(keep) // 3] = False
        for into, after in zip(moved, (ours[weight], theirs[weight]), strict=True):
            into.append((np.float64(after) - before)[keep])
    return relative_error(*map(np.concatenate, moved))


def differences(there, here):
    """The largest relative error of a loss, and those of the parameters' and the EMA's movement."""
    losses = [abs(a / b - 1) for a, b in zip(here.losses, there.losses, strict=True)]
    moved = []
    for start, path, theirs in zip(there.saved, here.back, there.ended, strict=True):
        ours = torch.load(path, weights_only=True)
        moved.append(movement_error(start, {k: v.numpy() for k, v in ours.items()}, theirs))
    return max(losses), *moved


@pytest.mark.parametrize("name", FAMILIES)
def test_a_moved_run_goes_on_as_it_would_have_in_pytorch(name, torch_run, moved):
    loss, parameters, ema = differences(torch_run(name), moved(name))
    assert loss < LOSS_TOLERANCE
    assert parameters < MOVEMENT_TOLERANCE and ema < EMA_TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_updates_are_counted_by_the_optimizer_and_steps_by_the_file_name(name, moved):
    restored = moved(name).restored
    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState, AdanState)
    for part in jax.tree.leaves(restored.opt_state, is_leaf=lambda part: isinstance(part, kinds)):
        if isinstance(part, optax.ScaleByScheduleState):
            assert int(part.count) == SAVED_AS[name]
        elif isinstance(part, kinds):
            assert int(part.count) == len(BEFORE)
            assert int(getattr(part, "step", SAVED_AS[name])) == SAVED_AS[name]
    assert int(restored.step) == SAVED_AS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_moved_without_its_moments_goes_elsewhere(name, torch_run, tmp_path):
    files = {key: path for key, path in torch_run(name).files.items() if key != "opt"}
    faulty = go_on(name, files, tmp_path / "workdir")
    loss, parameters, ema = differences(torch_run(name), faulty)
    assert loss > LOSS_TOLERANCE
    assert parameters > 1000 * MOVEMENT_TOLERANCE and ema > 100 * EMA_TOLERANCE


def test_adans_last_gradient_with_the_wrong_sign_goes_elsewhere(torch_run, tmp_path):
    there, path = torch_run("mdt_v2"), tmp_path / "opt000002.pt"
    moments = torch.load(there.files["opt"], weights_only=True)
    for of_weight in moments["state"].values():
        of_weight["neg_pre_grad"] *= -1
    torch.save(moments, path)
    faulty = go_on("mdt_v2", there.files | {"opt": path}, tmp_path / "workdir")
    loss, parameters, ema = differences(there, faulty)
    assert loss > LOSS_TOLERANCE
    assert parameters > 1000 * MOVEMENT_TOLERANCE and ema > 100 * EMA_TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_model_trained_here_computes_the_same_in_pytorch(name, moved):
    r, here = reference(name), moved(name)
    model = torch_models.build(architecture(name), seed=1)
    x, t, y = (torch.from_numpy(np.array(r.arrays[f"in/{key}"])) for key in "xty")
    for path, params in zip(here.back, (here.ended.params, here.ended.ema[str(RATE)]), strict=True):
        model.load_state_dict(torch.load(path, weights_only=True), strict=True)
        ours = forward(name)(params, r.nhwc("in/x"), r["in/t"], r["in/y"])
        e = relative_error(np.moveaxis(np.asarray(ours), -1, 1), model(x, t, y))
        assert e < 1e-5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer.name": "adan", "optimizer.betas": None}, "optimizer.name: adamw, now adan"),
        ({"ema_rates": (0.5,)}, "ema_rates: 0.99, now 0.5"),
        ({"model.depth": 6}, "depth: 4, now 6"),
    ],
)
def test_a_moved_run_is_refused_as_another(settings, said, torch_run, tmp_path):
    convert("to-jax", output=tmp_path, **torch_run("dit").files, num_heads=4, ema_rate=RATE)
    config = config_of(tmp_path)
    config.update_from_flattened_dict(settings)
    refused = pytest.raises((ValueError, CheckpointError), match=said)
    with contextlib.closing(Checkpoints(tmp_path)) as store, refused as error:
        loop.Run(config, tmp_path).restore(store)
    assert "\n" not in str(error.value)


# ---- Training on from converted weights --------------------------------------------------------


@pytest.fixture
def trainable(torch_run, tmp_path, monkeypatch):
    """A DiT's EMA of step 3 converted alone, and a config that trains it by two steps."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    data.mkdir()
    np.save(data / "images.npy", rng.integers(0, 256, (20, 8, 8, 4), np.uint8))
    np.save(data / "labels.npy", np.arange(20) % 10)
    source, workdir = torch_run("dit").files["ema"], tmp_path / "workdir"
    convert("to-jax", input=source, output=workdir, num_heads=4, ema_rate=RATE)
    config = config_of(workdir)
    config.data.update(name="npy", path=str(data))
    config.num_steps = 5
    config.log_every = 1
    steps = on_pixels(compiled_steps("dit"))
    monkeypatch.setattr(loop.Run, "compile_steps", lambda run, _: steps)
    return types.SimpleNamespace(config=config, workdir=workdir)


def logged_steps(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_converted_weights_start_parameters_and_average(trainable, torch_run):
    run = loop.Run(trainable.config, trainable.workdir)
    with contextlib.closing(Checkpoints(trainable.workdir)) as store:
        state, _ = run.restore(store)
    _, params = mdt_jax.load(torch_run("dit").files["ema"], num_heads=4)
    assert same_bits(state.params, params) and same_bits(state.ema[str(RATE)], params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if np.ndim(leaf)]
    assert moments and not any(np.any(leaf) for leaf in moments)


def test_converted_weights_and_init_from_do_not_go_together(trainable):
    trainable.config.init_from = "other.pt"
    with pytest.raises(ValueError, match=r"holds converted weights .*init_from other\.pt"):
        loop.train(trainable.config, trainable.workdir)


def test_a_converted_step_stays_and_is_gone_back_to(trainable):
    """However many checkpoints follow, and when the only one that follows is damaged."""
    config, workdir = trainable.config, trainable.workdir
    run = loop.Run(config, workdir)
    with contextlib.closing(Checkpoints(workdir, keep_last=1, async_save=False)) as store:
        state, meta = run.restore(store)
        first = int(state.step)
        own = {k: v for k, v in meta.items() if k != "weights"} | {
            "config": config_lib.to_json(config)
        }
        for step in (first + 1, first + 2):
            run.save(store, state, step, own)
        store.wait()
        kept = sorted(
            int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal()
        )
        assert kept == [first, first + 2]
        newest = workdir / "checkpoints" / str(first + 2) / "state"
        damaged = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        damaged.write_bytes(b"damaged")
        again, _ = run.restore(store)
    assert int(again.step) == first and same_bits(again.params, state.params)


def test_an_unconditional_model_is_trained_on_with_no_label_dropout(tmp_path):
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 2}
    sizes |= {"num_heads": 4, "decoder_depth": 0, "mlp_ratio": 2.0, "num_classes": 0}
    a = Architecture(family="DiT", null_class=True, learn_variance=True, **sizes)
    torch.save(torch_models.build(a).state_dict(), tmp_path / "a.pt")
    convert("to-jax", input=tmp_path / "a.pt", output=tmp_path / "run", num_heads=4)
    config = config_of(tmp_path / "run")
    config.label_dropout = 0.0  # as configs/lsun_bedroom256.py has it
    with contextlib.closing(Checkpoints(tmp_path / "run")) as store:
        state, _ = loop.Run(config, tmp_path / "run").restore(store)
    assert state.params["label_embed"].shape == (1, 16)


def test_converted_weights_train_on_and_resume(trainable):
    config, workdir = trainable.config, trainable.workdir
    assert int(loop.train(config, workdir).step) == 5
    config.num_steps = 6
    assert int(loop.train(config, workdir).step) == 6
    assert logged_steps(workdir) == [4, 5, 6]
    # From its own first checkpoint on it is a run like any other.
    config.seed = 1
    with pytest.raises(ValueError, match="seed: 0, now 1"):
        loop.train(config, workdir)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.depth": 6}, "model.depth: 4, now 6"),
        ({"model.num_classes": 12}, "model.num_classes: 10, now 12"),
        ({"diffusion.variance": "fixed_large"}, "model.learn_variance: True, now False"),
        ({"diffusion.prediction": "velocity"}, "diffusion.prediction: epsilon, now velocity"),
        (
            {"diffusion.schedule": "squared_cosine"},
            "diffusion.schedule: linear, now squared_cosine",
        ),
    ],
)
def test_converted_weights_of_another_network_are_refused(settings, said, trainable):
    trainable.config.update_from_flattened_dict(settings)
    with pytest.raises(ValueError, match="another --workdir") as error:
        loop.train(trainable.config, trainable.workdir)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_bfloat16_weights_are_trained_in_float32_and_given_back_as_they_were(tmp_path):
    path, workdir, back = tmp_path / "half.pt", tmp_path / "workdir", tmp_path / "back.pt"
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state("mdt_v2").items()}
    torch.save(half, path)
    convert("to-jax", input=path, output=workdir)
    with contextlib.closing(Checkpoints(workdir)) as store:
        trained, _ = loop.Run(config_of(workdir), workdir).restore(store)
    expected = jax.tree.map(
        lambda x: np.float32(x.astype(jnp.bfloat16)), reference("mdt_v2").tree("param/")
    )
    assert same_bits(trained.params, expected)
    convert("to-torch", input=workdir, output=back)
    again = torch.load(back, weights_only=True)
    assert list(again) == list(half)
    assert all(again[k].dtype == v.dtype and torch.equal(again[k], v) for k, v in half.items())
