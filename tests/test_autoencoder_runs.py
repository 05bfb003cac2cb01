"""A run on each kind of autoencoder's latents, from images to samples, and refusals on the way."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image
from test_encode_latents import tool
from test_sample import command

from mdt_jax import checkpoints, data, sampling
from mdt_jax import config as config_lib
from mdt_jax.convert import autoencoder, autoencoder_dc
from mdt_jax.convert.autoencoder_settings import settings_from_config
from mdt_jax.evaluate import command as evaluate_command
from mdt_jax.evaluate import flags as evaluate_flags
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.autoencoder_dc import AutoencoderDC
from mdt_jax.sampling import images
from mdt_jax.train import train
from mdt_jax.training import run_evaluation, transfer
from mdt_jax.training.run import Run
from mdt_jax.weights import files as weight_files
from mdt_jax.weights.autoencoder import Autoencoder

SIDE = 16
PLAIN = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
WITHOUT_QUANT = PLAIN | {"use_quant_conv": False, "use_post_quant_conv": False}
# Kinds of autoencoders, small: what their config.json says, and how latents are normalised.
KINDS = {
    "sdxl": (PLAIN | {"scaling_factor": 0.13025}, "autoencoder"),
    "flux": (
        WITHOUT_QUANT | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "autoencoder",
    ),
    "own channels": (PLAIN | {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}, "autoencoder"),
    "measured": (PLAIN, "channel"),
    "dc-ae": (
        {
            "_class_name": "AutoencoderDC",
            "latent_channels": 8,
            "attention_head_dim": 8,
            "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
            "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
            "encoder_block_out_channels": [8, 16],
            "decoder_block_out_channels": [8, 16],
            "encoder_layers_per_block": [1, 1],
            "decoder_layers_per_block": [1, 1],
            "encoder_qkv_multiscales": [[], [5]],
            "decoder_qkv_multiscales": [[], [5]],
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
            "scaling_factor": 0.41407,
        },
        "autoencoder",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """XLA without its expensive passes, which the tiny models here do not repay."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def save_autoencoder(folder: Path, config: dict, seed: int = 0) -> Path:
    """A random autoencoder as diffusers saves one."""
    deep = config["_class_name"] == "AutoencoderDC"
    read, network, to_torch = (
        (autoencoder_dc.settings_from_config, AutoencoderDC, autoencoder_dc.to_torch)
        if deep
        else (settings_from_config, AutoencoderKL, autoencoder.to_torch)
    )
    settings, rng = read(config), np.random.default_rng(seed)
    module = network(**settings.module_settings())
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    folder.mkdir()
    file = folder / "diffusion_pytorch_model.safetensors"
    weight_files.write_weights(file, to_torch(params, settings))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def pictures() -> data.Source:
    rng = np.random.default_rng(0)
    return data.arrays(rng.integers(0, 256, (8, SIDE, SIDE, 3), np.uint8), np.arange(8) % 2)


def encode(vae: Path, output: Path, normalize: str) -> data.Source:
    settings = {"image_size": SIDE, "batch_size": 4, "images_per_shard": 4, "mirror": False}
    loaded = Autoencoder.load(vae)
    assert tool.encode_latents(pictures(), loaded, output, normalize=normalize, **settings)
    return data.latents_source(output)


def config_for(cache: Path, channels: int):
    config = config_lib.default_config()
    config.model.update(name="MDT", input_size=8, in_channels=channels, num_classes=2)
    config.model.update(patch_size=4, hidden_size=8, depth=2, num_heads=2, decoder_depth=1)
    config_lib.apply_recipe(config)
    config.data.update(name="latents", path=str(cache), flip=False)
    config.num_steps, config.batch_size, config.log_every = 1, 8, 1
    config.sample.update(every=0, steps=2, cfg_scale=1.0, guided_channels=None)
    return config


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory) -> Path:
    """A folder with an autoencoder (vae), a cache of its latents, and a run on them."""
    folder = tmp_path_factory.mktemp("kind")
    config, normalize = KINDS[request.param]
    cache = encode(save_autoencoder(folder / "vae", config), folder / "cache", normalize)
    train(config_for(folder / "cache", cache.image_shape[-1]), folder / "run")
    return folder


def test_samples_are_decoded_by_the_numbers_of_the_latents(made, tmp_path):
    settings = (f"--workdir={made / 'run'}", "--labels=0,1", f"--output={tmp_path / 'out'}")
    latents = np.load(command(*settings)[0])["arr_0"]
    npz, png = command(*settings, f"--vae={made / 'vae'}")
    space = data.latents_source(made / "cache").latent_space
    loaded = Autoencoder.load(made / "vae")
    if space.mean:
        own = latents * np.float32(space.std) + np.float32(space.mean)
    else:
        own = latents / np.float32(space.scale) + np.float32(space.shift)
    decode = functools.partial(loaded.module.apply, method="decode")
    expected = images.to_uint8(np.asarray(decode({"params": loaded.params}, jnp.asarray(own))))
    found = np.load(npz)["arr_0"].astype(int)
    assert np.abs(found - expected).max() <= 1 and png.exists()  # other programs, other roundings


def test_the_checkpoint_and_exported_weights_say_what_the_latents_are(made, tmp_path):
    space = data.latents_source(made / "cache").latent_space
    assert space.digest and space.autoencoder == str(made / "vae")
    arrays, metadata = transfer.to_state_dict(made / "run")
    weight_files.write_weights(tmp_path / "model.safetensors", arrays, metadata)
    for place in (made / "run", tmp_path / "model.safetensors"):
        assert sampling.load(place)[0].latents == space


def test_an_evaluation_decodes_them(made):
    f = flags.FlagValues()
    evaluate_flags.define_flags(f)
    f(["evaluate", f"--vae={made / 'vae'}", "--num_samples=2", "--steps=2"])
    assert np.load(evaluate_command.make_samples(f, str(made / "run")))["arr_0"].shape == (
        2,
        SIDE,
        SIDE,
        3,
    )


def test_a_hole_is_painted_in_the_models_latents(made, tmp_path):
    photo = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    hole = np.zeros((SIDE, SIDE), np.uint8)
    hole[4:8, 4:8] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(hole).save(tmp_path / "mask.png")
    npz, _ = command(
        f"--workdir={made / 'run'}", f"--vae={made / 'vae'}", "--labels=1", "--resamples=1",
        f"--inpaint={tmp_path / 'photo.png'}", f"--mask={tmp_path / 'mask.png'}",
        f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    painted = np.load(npz)["arr_0"]
    assert np.array_equal(painted[0][hole == 0], photo[hole == 0])


def test_a_run_goes_on_and_is_finetuned_on_its_own_latents(made, tmp_path):
    channels = data.latents_source(made / "cache").image_shape[-1]
    config = config_for(made / "cache", channels)
    config.init_from = str(made / "run")
    assert int(train(config, tmp_path / "tuned").step) == 1
    assert checkpoints.read_meta(tmp_path / "tuned")[1]["latents"]["scale"] > 0


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on the latents of an autoencoder of SDXL's scale."""
    folder = tmp_path_factory.mktemp("run")
    config, normalize = KINDS["sdxl"]
    encode(save_autoencoder(folder / "vae", config), folder / "cache", normalize)
    train(config_for(folder / "cache", 4), folder / "run")
    return folder


SDXL = KINDS["sdxl"][0]
# Autoencoders of the same shapes that are not the run's, and the first difference in words.
OTHERS = {
    "weights": (SDXL, 1, "the encoder"),
    "scale": (SDXL | {"scaling_factor": 0.18215}, 0, "scale 0.18215, shift 0"),
    "shift": (SDXL | {"shift_factor": 0.1}, 0, "scale 0.13025, shift 0.1"),
    "channels' numbers": (
        SDXL | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        0,
        "mean 0, std 7.67754 of channel 0 and others",
    ),
}


def refusal(make) -> str:
    with pytest.raises(ValueError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", OTHERS)
def test_another_autoencoder_is_refused_wherever_it_meets_the_latents(run, case, tmp_path):
    config, seed, difference = OTHERS[case]
    other = save_autoencoder(tmp_path / "other", config, seed)
    cache = tmp_path / "cache"
    encode(other, cache, "autoencoder")
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(tmp_path / "photo.png")
    source = data.latents_source(run / "cache")
    sampled = (f"--workdir={run / 'run'}", f"--vae={other}", f"--output={tmp_path / 'out'}")
    painted = (f"--inpaint={tmp_path / 'photo.png'}", f"--mask={tmp_path / 'photo.png'}")
    judged = config_for(run / "cache", 4)
    judged.eval.vae = str(other)
    f = flags.FlagValues()
    evaluate_flags.define_flags(f)
    f(["evaluate", f"--vae={other}", "--num_samples=2"])
    tuned, continued = config_for(cache, 4), config_for(cache, 4)
    tuned.init_from, continued.num_steps = str(run / "run"), 2
    places = {
        "sample": (lambda: command(*sampled), f"--vae {other}"),
        "inpaint": (lambda: command(*sampled, *painted), f"--vae {other}"),
        "evaluate": (lambda: evaluate_command.make_samples(f, str(run / "run")), f"--vae {other}"),
        "grids and judgements": (
            lambda: run_evaluation.load_decoder(Run(judged, tmp_path), source),
            f"eval.vae {other}",
        ),
        "fine-tuning": (lambda: train(tuned, tmp_path / "tuned"), f"data.path {cache}"),
        "continuing": (lambda: train(continued, run / "run"), str(cache)),
    }
    for place, (make, named) in places.items():
        said = refusal(make)
        assert said.startswith(f"{named}: latents of {other} with "), (place, said)
        assert difference in said and "has latents of " in said, (place, said)
    assert not list(tmp_path.glob("out*"))


def test_a_finetuned_decoder_of_the_same_encoder_is_taken(run, tmp_path):
    other = save_autoencoder(tmp_path / "other", SDXL)
    file = other / "diffusion_pytorch_model.safetensors"
    weights = weight_files.read_weights(file)
    tuned = {name: weights[name] + name.startswith("decoder.") for name in weights}
    weight_files.write_weights(file, {k: v.astype(np.float32) for k, v in tuned.items()})
    settings = (f"--workdir={run / 'run'}", f"--vae={other}", "--num_samples=1")
    assert command(*settings, f"--output={tmp_path / 'out'}")[1].exists()
