"""Sampling: the same images however they are batched and spread, refusals, and the command."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import linen as nn
from jobs import xla_flags
from PIL import Image

import mdt_jax
from mdt_jax import checkpoints, sampling
from mdt_jax import config as config_lib
from mdt_jax.convert.autoencoder import to_torch as autoencoder_to_torch
from mdt_jax.convert.autoencoder_settings import settings_from_config
from mdt_jax.convert.transformers import to_torch
from mdt_jax.diffusion.samplers import FEW_STEPS, SAMPLERS
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.parallel import sharding
from mdt_jax.sample import command as sample_command
from mdt_jax.sample import flags as sample_flags
from mdt_jax.sampling import images
from mdt_jax.training import transfer
from mdt_jax.weights import files as weight_files

ROOT = Path(__file__).parents[1]
NAMES = ("cat", "catfish", "dog", "goldfish")


def random_params(network, seed):
    """Parameters that no layer starts at zero, so that every input moves the output."""
    x, zero = jnp.zeros((1, *network.image_shape)), jnp.zeros(1, jnp.int32)
    abstract = nn.unbox(jax.eval_shape(network.init, jax.random.key(0), x, zero, zero))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), abstract)


def save_run(path, **process):
    """A run of a tiny model at step 7, whose averages of two rates are parameters of their own."""
    config = config_lib.default_config()
    config.diffusion.update(process)
    config.model.update(name="DiT", input_size=8, in_channels=1, num_classes=4, patch_size=4)
    config.model.update(hidden_size=8, depth=1, num_heads=2)
    config.ema_rates = (0.9, 0.99)
    config.sample.update(steps=20, cfg_scale=2.0, guided_channels=None, clip=True)
    network = config_lib.create_network(config)
    params, *averages = (random_params(network, seed) for seed in range(3))
    store = checkpoints.Checkpoints(path)
    store.save(
        7,
        {"state": {"params": params}, "ema_0.9": averages[0], "ema_0.99": averages[1]},
        {"config": config_lib.to_json(config), "class_names": list(NAMES)},
    )
    store.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    save_run(path)
    return path


@pytest.fixture(scope="module")
def loaded(workdir):
    return mdt_jax.load(workdir)


@pytest.fixture(scope="module")
def twelve(loaded):
    """Samples of the classes in turn, key 3, in one batch."""
    return mdt_jax.sample(*loaded, num_samples=12, key=3)


def test_load_gives_the_average_asked_for(workdir, loaded):
    model, params = loaded
    assert (model.name, model.step, model.class_names) == ("DiT", 7, NAMES)
    slower = mdt_jax.load(workdir, ema_rate=0.99)[1]
    for found, item in ((params, "ema_0.9"), (slower, "ema_0.99")):
        jax.tree.map(np.testing.assert_array_equal, found, checkpoints.restore_item(workdir, item))
    raw = checkpoints.restore_item(workdir, "state")["params"]
    assert not np.array_equal(raw["pos_embed"], params["pos_embed"])
    with pytest.raises(ValueError, match=r"no average of rate 0\.5; it keeps 0\.9, 0\.99"):
        mdt_jax.load(workdir, ema_rate=0.5)
    with pytest.raises(checkpoints.CheckpointError, match="no checkpoint of step 6"):
        mdt_jax.load(workdir, step=6)


def test_samples_differ_by_sample_and_by_key(loaded, twelve):
    assert twelve.shape == (12, 8, 8, 1) and np.isfinite(twelve).all()
    assert len({image.tobytes() for image in twelve}) == 12
    other = mdt_jax.sample(*loaded, num_samples=12, key=4)
    assert np.abs(other - twelve).max(axis=(1, 2, 3)).min() > 0.1
    same = mdt_jax.sample(*loaded, num_samples=12, key=jax.random.key(3))
    np.testing.assert_array_equal(same, twelve)


def test_labels_and_parameters_are_used(workdir, loaded, twelve):
    model, _ = loaded
    labels = np.arange(12) % 4
    relabelled = mdt_jax.sample(*loaded, labels=(labels + 1) % 4, key=3)
    slower = mdt_jax.sample(model, mdt_jax.load(workdir, ema_rate=0.99)[1], num_samples=12, key=3)
    for other in (relabelled, slower):
        assert np.abs(other - twelve).max(axis=(1, 2, 3)).min() > 1e-3


def test_the_batch_size_does_not_change_samples(loaded, twelve):
    batched = mdt_jax.sample(*loaded, num_samples=12, key=3, batch_size=8)
    np.testing.assert_allclose(batched, twelve, atol=1e-5)


def test_the_first_samples_do_not_depend_on_how_many_are_asked_for(loaded, twelve):
    np.testing.assert_allclose(mdt_jax.sample(*loaded, num_samples=3, key=3), twelve[:3], atol=1e-5)


def test_the_devices_do_not_change_samples(loaded, twelve):
    alone = sharding.create_mesh(devices=jax.devices()[:1])
    samples = mdt_jax.sample(*loaded, num_samples=12, key=3, mesh=alone)
    np.testing.assert_allclose(samples, twelve, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_where_the_progress_bar_moves_does_not_change_a_bit(loaded, twelve, chunk, monkeypatch):
    monkeypatch.setattr(sampling.sampler, "CHUNK_STEPS", chunk)
    np.testing.assert_array_equal(mdt_jax.sample(*loaded, num_samples=12, key=3), twelve)


def test_ddim_is_deterministic_but_for_its_start(loaded, twelve):
    first, second = (
        mdt_jax.sample(*loaded, num_samples=8, key=3, sampler="ddim", steps=steps)
        for steps in ("ddim20", "ddim20")
    )
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, twelve[:8], atol=1e-3)


@pytest.mark.parametrize("sampler", ["heun", "dpm++", "dpm++sde"])
def test_every_sampler_runs_in_chunks_on_devices(loaded, sampler, monkeypatch):
    def draw():
        return mdt_jax.sample(*loaded, num_samples=8, key=3, sampler=sampler, steps="logsnr6")

    whole = draw()
    assert np.isfinite(whole).all()
    monkeypatch.setattr(sampling.sampler, "CHUNK_STEPS", 4)
    np.testing.assert_array_equal(draw(), whole)


def test_samplers_that_need_few_steps_take_few():
    config = config_lib.default_config()
    config.model.update(name="DiT", input_size=8, in_channels=4, num_classes=0, patch_size=4)
    config.model.update(hidden_size=8, depth=1, num_heads=2)
    model = sampling.DiffusionModel.from_config(config)

    def steps(**given):
        return sampling.resolve_options(model, **given).steps

    assert steps() == steps(sampler="ddpm") == steps(sampler="ddim") == 250  # the model's
    assert steps(sampler="heun") == 10
    assert steps(sampler="dpm++") == steps(sampler="dpm++sde") == "logsnr20"
    assert steps(sampler="dpm++", steps="30") == "logsnr30"
    config.sample.update(sampler="dpm++", steps=40)
    model = sampling.DiffusionModel.from_config(config)
    assert steps() == steps(sampler="dpm++") == "logsnr40"
    assert steps(sampler="heun") == 10


def test_the_help_tells_of_every_sampler_and_its_steps():
    told = sampling.SAMPLER_OPTIONS["sampler"].help
    for sampler in SAMPLERS:
        about = told.split(f"{sampler}: ")[1].split(". ")[0]
        assert re.search(r"\b\d+\b", about), sampler
        if sampler in FEW_STEPS:
            assert f"({FEW_STEPS[sampler]}" in about, sampler


def test_guidance_can_be_kept_to_an_interval(loaded, twelve):
    def draw(**options):
        return mdt_jax.sample(*loaded, num_samples=12, key=3, **options)

    np.testing.assert_array_equal(draw(cfg_interval=(0, 1)), twelve)
    part = draw(cfg_interval=(0.3, 0.6))
    for other in (twelve, draw(cfg_scale=1.0)):
        assert np.abs(part - other).max() > 1e-3
    for wrong in ((0.6, 0.3), (0, 2), (0.1, 0.2, 0.3)):
        with pytest.raises(ValueError, match=r"is not \(low, high\), 0 <= low < high <= 1"):
            draw(cfg_interval=wrong)


def test_labels_are_numbers_or_names(loaded):
    model, _ = loaded
    resolve = sampling.resolve_labels
    assert resolve(model, [3, 0]).tolist() == [3, 0]
    assert resolve(model, ["dog", "1"]).tolist() == [2, 1]
    assert resolve(model, ["dog"], 3).tolist() == [2, 2, 2]
    assert resolve(model, jnp.array([1, 2])).tolist() == [1, 2]
    assert resolve(model, None, 6).tolist() == [0, 1, 2, 3, 0, 1]
    assert len(resolve(model)) == 16


REFUSED = {
    "a class out of range": ({"labels": [4]}, "label 4 is outside 0 to 3"),
    "a negative class": ({"labels": [-1]}, "label -1 is outside 0 to 3"),
    "an unknown name": ({"labels": ["catfsh"]}, "'catfsh'; the nearest: catfish, "),
    "no samples": ({"num_samples": 0}, "num_samples 0 is below 1"),
    "a sampler": ({"sampler": "euler"}, "sampler 'euler' is unknown; known: ddpm, ddim"),
    "too many steps": ({"steps": 2000}, "2000 of the 1000 steps"),
    "steps that are none": ({"steps": "fast"}, "'fast'"),
    "channels to guide": ({"guided_channels": 2}, "guided_channels 2 is outside 1 to 1; None"),
    "a batch of none": ({"batch_size": 0}, "batch_size 0 is below 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_model_does_not_have_is_refused(what, loaded):
    settings, message = REFUSED[what]
    with pytest.raises(ValueError) as error:
        mdt_jax.sample(*loaded, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unconditional_model_takes_no_labels(loaded):
    config = config_lib.default_config()
    config.model.update(name="DiT", input_size=8, num_classes=0, patch_size=4)
    config.model.update(hidden_size=8, depth=1, num_heads=2)
    model = sampling.DiffusionModel.from_config(config)
    with pytest.raises(ValueError, match="the model is unconditional; it takes no labels"):
        sampling.resolve_labels(model, [0])
    assert sampling.resolve_labels(model, None, 3).tolist() == [0, 0, 0]
    assert sampling.resolve_options(model, cfg_scale=4.0).cfg_scale == 1


def run_command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "mdt_jax.sample", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla_flags(8)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.smoke
def test_the_command_writes_pictures_that_say_what_made_them(workdir, loaded, tmp_path):
    output = tmp_path / "new" / "cats3.8"
    done = run_command(
        "--workdir", workdir, "--output", output, "--labels=cat,2", "--num_samples=5", "--seed=3"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{output}.npz", f"{output}.png"]
    expected = mdt_jax.sample(*loaded, labels=["cat", "dog"], num_samples=5, key=3)
    with np.load(f"{output}.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (5, 8, 8, 1)
        # Truncation to 8 bits may turn a difference of 1e-5 into one level.
        levels = images.to_uint8(jnp.asarray(expected)).astype(int)
        assert np.abs(levels - arrays["arr_0"]).max() <= 1
        assert arrays["arr_1"].tolist() == [0, 2, 0, 2, 0]
        assert json.loads(str(arrays["metadata"])) == images.read_metadata(f"{output}.npz")
    for suffix in (".npz", ".png"):
        said = images.read_metadata(f"{output}{suffix}")
        assert "synthetic" in said["Content"]
        found = {key: said[key] for key in ("model", "step", "seed", "labels", "cfg_scale")}
        assert found == {
            "model": "DiT",
            "step": "7",
            "seed": "3",
            "labels": "0,2,0,2,0",
            "cfg_scale": "2.0",
        }


def test_the_command_refuses_a_folder_without_a_run_in_one_line(tmp_path):
    done = run_command("--workdir", tmp_path / "nothing", "--output", tmp_path / "samples")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "no checkpoint in" in line and str(tmp_path / "nothing") in line
    assert not list(tmp_path.iterdir())


# ---- Numbers that are none ----------------------------------------------------------------------


def with_value(params, path, value):
    """The parameters with one number of the array at a path replaced."""

    def change(keys, leaf):
        if jax.tree_util.keystr(keys, simple=True, separator="/") != path:
            return leaf
        leaf = np.array(leaf)
        leaf.reshape(-1)[0] = value
        return leaf

    return jax.tree_util.tree_map_with_path(change, params)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_weight_that_is_not_finite_is_named(value, loaded):
    model, params = loaded
    params = with_value(params, "final_layer/linear/bias", value)
    with pytest.raises(
        ValueError, match="12 of 12 samples hold NaN, the first at index 0: "
    ) as told:
        mdt_jax.sample(model, params, num_samples=12, key=3)
    said = "final_layer/linear/bias of the weights holds NaN or infinite values; sample an earlier"
    assert said in str(told.value)


class FakeBatch:
    """A compiled sampler whose samples of some indices are not finite."""

    shape, num_steps = (4, 2, 2, 4), 1

    def __init__(self, mesh, bad):
        self.mesh, self.bad = mesh, bad

    def __call__(self, params, rows, key, first, advance):
        samples = np.zeros((len(rows), 2, 2, 4), np.float32)
        samples[np.isin(rows, self.bad)] = np.inf
        return samples


@pytest.mark.parametrize(("bad", "said"), [([6, 7], "2 of 4 .* index 6"), ([9], "1 of 2 .* 9")])
def test_drawn_and_painted_latents_are_checked_batch_by_batch(bad, said):
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    settings = {"key": 0, "batch_size": 4, "mesh": mesh, "progress": False}
    make = functools.partial(
        sampling.run_in_batches, lambda mesh, size: FakeBatch(mesh, bad), {"a": np.ones(2)}, 10,
        lambda rows: (rows,),
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=f"{said}: the model's output is not finite; sample an ear"
    ):
        make(**settings)


def test_latents_that_are_not_finite_are_not_written(latent_model, tmp_path):
    weights = weight_files.read_weights(latent_model / "model.safetensors")
    arrays = {name: np.array(array) for name, array in weights.items()}
    arrays["t_embedder.mlp.0.bias"][3] = np.nan
    weight_files.write_weights(tmp_path / "bad.safetensors", arrays)
    flags = ["--labels=1,2", "--steps=2", f"--output={tmp_path / 'out'}"]
    for vae in ([], [f"--vae={latent_model / 'vae'}"]):
        with pytest.raises(
            ValueError, match="2 of 2 samples hold NaN, the first at index 0: timest"
        ):
            command(f"--checkpoint={tmp_path / 'bad.safetensors'}", *flags, *vae)
    assert not list(tmp_path.glob("out*.npz"))


# ---- Weights from PyTorch, latents, holes -------------------------------------------------------


def command(*arguments):
    """What the command does with these flags, in this process; the files it wrote."""
    values = flags.FlagValues()
    sample_flags.define_flags(values)
    values(["sample", *map(str, arguments)])
    return sample_command.generate(values, sharding.create_mesh())


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """The run's average under PyTorch's names."""
    path = tmp_path_factory.mktemp("exported") / "weights.safetensors"
    weight_files.write_weights(path, *transfer.to_state_dict(workdir))
    return path


def test_a_checkpoint_of_pytorch_gives_the_run_s_samples(tmp_path):
    """With no setting given again: the file says how the run was trained and is sampled."""
    workdir, exported = tmp_path / "run", tmp_path / "weights.safetensors"
    save_run(workdir, schedule="squared_cosine", prediction="velocity")
    weight_files.write_weights(exported, *transfer.to_state_dict(workdir))
    found, told = [], []
    for source in (f"--workdir={workdir}", f"--checkpoint={exported}"):
        npz, _ = command(source, "--labels=dog,cat", f"--output={tmp_path / 'out'}")
        found.append(np.load(npz)["arr_0"])
        told.append(images.read_metadata(npz))
    assert np.array_equal(*found)
    assert told[0] == told[1] and told[0]["step"] == "7"


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    """Weights of a model of latents and an autoencoder with four times their side, files both."""
    folder = tmp_path_factory.mktemp("latents")
    network = mdt_jax.create_model(
        "MDTv2", input_size=8, in_channels=4, num_classes=4, patch_size=2, hidden_size=8, depth=3,
        num_heads=2, decoder_depth=1,
    )  # fmt: skip
    weights = to_torch(random_params(network, 0), family="MDTv2", depth=3, decoder_depth=1)
    weight_files.write_weights(folder / "model.safetensors", weights)
    widths = [8, 8, 8]
    down, up = ["DownEncoderBlock2D"] * 3, ["UpDecoderBlock2D"] * 3
    settings = {"block_out_channels": widths, "down_block_types": down, "up_block_types": up}
    settings |= {"layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(settings))
    settings = settings_from_config(settings)
    module = AutoencoderKL(**settings.module_settings())
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weight_files.write_weights(file, autoencoder_to_torch(params, settings))
    return folder


def test_an_autoencoder_turns_latents_into_images(latent_model, tmp_path):
    checkpoint = f"--checkpoint={latent_model / 'model.safetensors'}"
    settings = (checkpoint, "--labels=1,2", "--steps=2", f"--output={tmp_path / 'out'}")
    (latents_file,) = command(*settings)
    latents = np.load(latents_file)["arr_0"]
    assert latents.shape == (2, 8, 8, 4)
    vae = latent_model / "vae"
    npz, png = command(*settings, f"--vae={vae}")
    decoded = mdt_jax.Autoencoder.load(vae).decode(latents)
    assert np.array_equal(np.load(npz)["arr_0"], images.to_uint8(decoded))
    assert images.read_metadata(png)["vae"] == str(vae)
    with pytest.raises(ValueError, match="--vae_batch_size 0 is below 1"):
        command(*settings, f"--vae={vae}", "--vae_batch_size=0")


@pytest.fixture
def pictures(tmp_path):
    """A photograph and a hole, as arrays; files of theirs are photo.png and mask.png."""
    photo = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    hole = np.zeros((32, 32), np.uint8)
    hole[10:20, 5:25] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(hole).save(tmp_path / "mask.png")
    return photo, hole


@pytest.fixture
def paint(latent_model, pictures, tmp_path):
    """The command that paints the hole in two steps; more flags take the place of its own."""
    flags = (
        f"--checkpoint={latent_model / 'model.safetensors'}", f"--vae={latent_model / 'vae'}",
        f"--inpaint={tmp_path / 'photo.png'}", f"--mask={tmp_path / 'mask.png'}", "--steps=2",
        f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    return lambda *more: command(*flags, *more)


def test_a_hole_is_painted_and_the_rest_left(paint, pictures, tmp_path, monkeypatch):
    photo, hole = pictures
    calls = spy_on_decode(monkeypatch)
    written = paint("--num_samples=2", "--vae_batch_size=1", "--vae_tile_size=8")
    painted, labels = (np.load(written[0])[key] for key in ("arr_0", "arr_1"))
    assert painted.shape == (2, 32, 32, 3) and labels.tolist() == [4, 4]
    assert all(np.array_equal(image[hole == 0], photo[hole == 0]) for image in painted)
    assert not np.array_equal(painted[0], painted[1])
    assert calls == [(1, 8)]


def spy_on_decode(monkeypatch):
    """The list that the batch and tile size of every decoding will be added to."""
    calls, decode = [], mdt_jax.Autoencoder.decode

    def spy(self, latents, batch_size=16, tile_size=None):
        calls.append((batch_size, tile_size))
        return decode(self, latents, batch_size, tile_size)

    monkeypatch.setattr(mdt_jax.Autoencoder, "decode", spy)
    return calls


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), {"labels": "4", "cfg_scale": "1.0"}),
        (("--labels=2",), {"labels": "2", "cfg_scale": "3.8"}),
        (
            ("--labels=2", "--cfg_scale=2", "--resamples=1", "--masked_share=0"),
            {"labels": "2", "cfg_scale": "2.0", "resamples": "1", "masked_share": "0.0"},
        ),
    ],
    ids=["without a class", "with one", "with settings"],
)
def test_a_painting_says_how_it_was_made(paint, latent_model, tmp_path, flags, said):
    expected = {
        "steps": "2",
        "resamples": "4",
        "masked_share": "0.5",
        "inpainted": str(tmp_path / "photo.png"),
        "mask": str(tmp_path / "mask.png"),
        "vae": str(latent_model / "vae"),
    } | said
    for file in paint(*flags):
        found = images.read_metadata(file)
        assert {key: found.get(key) for key in expected} == expected


def test_pictures_that_do_not_fit_are_refused_before_any_work(paint, pictures, tmp_path):
    photo, hole = pictures
    Image.fromarray(hole[:16]).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small\.png is 32 × 16 pixels.*photo\.png 32 × 32"):
        paint(f"--mask={tmp_path / 'small.png'}")
    Image.fromarray(photo[:24]).save(tmp_path / "low.png")
    with pytest.raises(
        ValueError, match=r"^--inpaint .*low\.png is 32 × 24 pixels; MDTv2 paints 32"
    ):
        paint(f"--inpaint={tmp_path / 'low.png'}")
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"^.*cut\.png: cannot be decoded \(.*truncated"):
        paint(f"--inpaint={tmp_path / 'cut.png'}")
    with pytest.raises(ValueError, match=r"photo\.png: MDTv2 is a model of latents, .* give --vae"):
        paint("--vae=")


def test_flags_that_do_not_go_together_are_refused(workdir, exported, latent_model, tmp_path):
    with pytest.raises(ValueError, match=r"give --workdir, a run, or --checkpoint"):
        command(f"--workdir={workdir}", f"--checkpoint={exported}")
    with pytest.raises(ValueError, match=r"--inpaint IMAGE and --mask MASK go together"):
        command(f"--workdir={workdir}", "--inpaint=a.png")
    with pytest.raises(ValueError, match=r"decodes 4 channels, DiT makes 1"):
        command(f"--workdir={workdir}", f"--vae={latent_model / 'vae'}")
    with pytest.raises(ValueError, match=r"autoencoder's \(a VAE\); give it as --vae"):
        vae = latent_model / "vae" / "diffusion_pytorch_model.safetensors"
        command(f"--checkpoint={vae}")
    with pytest.raises(ValueError, match=r"ema_rate and step are a run's"):
        command(f"--checkpoint={exported}", "--step=3")
