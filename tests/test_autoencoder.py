"""The autoencoder against diffusers' own, its weights in every naming, and what its users meet."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import drawn_autoencoder

from mdt_jax.convert import autoencoder as convert
from mdt_jax.convert.autoencoder_settings import (
    AutoencoderSettings,
    settings_from_config,
)
from mdt_jax.models import autoencoder as network
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.latent_space import AUTOENCODERS, LatentSpace
from mdt_jax.parallel import sharding
from mdt_jax.weights import autoencoder as latents_lib
from mdt_jax.weights import files as weight_files
from mdt_jax.weights.autoencoder import Autoencoder

# Stable Diffusion's at a quarter of its width and less; and what others of the kind have: more
# channels, a shift, attention in stages, no quantising convolutions.
CONFIGS = {
    "sd": {
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "other": {
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 16,
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
}
CONFIGS["flux"] = CONFIGS["sd"] | {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
# The config.json of published autoencoders.
FULL_SIZE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.29.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "latents_mean": None,
    "latents_std": None,
}
SIXTEEN = FULL_SIZE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
PUBLISHED_CONFIGS = {
    "mse": FULL_SIZE | {"latent_channels": 4, "sample_size": 256},
    "sdxl": FULL_SIZE | {"latent_channels": 4, "scaling_factor": 0.13025},
    "sd3": SIXTEEN | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux": SIXTEEN | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
}
SIDES = (24, 40)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def images(count: int = 2) -> np.ndarray:
    return rng().uniform(-1, 1, (count, *SIDES, 3)).astype(np.float32)


def settings_of(name: str) -> AutoencoderSettings:
    return settings_from_config(CONFIGS[name])


@functools.cache
def random_weights(name: str) -> dict[str, np.ndarray]:
    """Weights under diffusers' names, every one drawn."""
    settings = settings_of(name)
    module = AutoencoderKL(**settings.module_settings())
    x = jnp.zeros((1, *SIDES, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    return convert.to_torch(drawn_autoencoder(shapes), settings)


def build(name: str, weights: dict[str, np.ndarray] | None = None) -> Autoencoder:
    settings = settings_of(name)
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    params = convert.from_torch(weights or random_weights(name), settings)
    return Autoencoder(
        AutoencoderKL(**settings.module_settings()),
        jax.device_put(params, sharding.replicated(mesh)),
        dataclasses.replace(settings.latents, autoencoder=name),
        mesh,
    )


def save(folder: Path, name: str, dtype=np.float32, config: dict | None = None) -> Path:
    """A folder as diffusers saves one."""
    weights = {k: v.astype(dtype) for k, v in random_weights(name).items()}
    weight_files.write_weights(folder / "diffusion_pytorch_model.safetensors", weights)
    config = CONFIGS[name] | {"_class_name": "AutoencoderKL"} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def relative_error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def to_old_diffusers(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in weights.items():
        for new, old in names.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = array
    return renamed


def to_compvis(weights: dict[str, np.ndarray], stages: int) -> dict[str, np.ndarray]:
    """CompVis's names, written down from its checkpoints independently of the table under test."""
    renamed = {}
    for name, array in weights.items():
        attention = "attentions" in name
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.attentions", r"down.\1.attn", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"mid_block\.resnets\.0", "mid.block_1", name)
        name = re.sub(r"mid_block\.resnets\.1", "mid.block_2", name)
        name = re.sub(r"mid_block\.attentions\.0", "mid.attn_1", name)
        up = re.match(r"decoder\.up_blocks\.(\d+)\.(.*)", name)
        if up:
            rest = up[2].replace("resnets", "block").replace("attentions", "attn")
            rest = rest.replace("upsamplers.0", "upsample")
            name = f"decoder.up.{stages - 1 - int(up[1])}.{rest}"
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if attention:
            for new, old in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
                name = name.replace(f".{new}.", f".{old}.")
            name = name.replace("to_out.0", "proj_out")
            array = array[..., None, None] if array.ndim == 2 else array
        renamed[name] = array
    return renamed


# Against diffusers


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    """Moments and images by diffusers' autoencoder of these weights."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(**CONFIGS[name]).eval()
    model.load_state_dict({k: torch.tensor(v) for k, v in random_weights(name).items()})
    channels, factor = model.config.latent_channels, 2 ** (len(model.config.block_out_channels) - 1)
    shape = (2, SIDES[0] // factor, SIDES[1] // factor, channels)
    z = rng(2).standard_normal(shape).astype(np.float32)

    def nchw(x: np.ndarray):
        return torch.tensor(x).permute(0, 3, 1, 2)

    with torch.no_grad():
        moments = model.encode(nchw(images())).latent_dist.parameters
        decoded = model.decode(nchw(z)).sample
    return {
        "z": z,
        "moments": moments.permute(0, 2, 3, 1).numpy(),
        "decoded": decoded.permute(0, 2, 3, 1).numpy(),
    }


def errors_of(name: str, weights: dict[str, np.ndarray] | None = None) -> tuple[float, float]:
    """Relative errors of the posterior and of the image, against diffusers'."""
    theirs, autoencoder = reference(name), build(name, weights)
    mean, std = autoencoder.encode(images())
    ours = np.concatenate([mean, 2 * np.log(std)], axis=-1)
    scaled = autoencoder.latents.normalize(theirs["z"])
    decoded = autoencoder.decode(scaled.astype(np.float32))
    return relative_error(ours, theirs["moments"]), relative_error(decoded, theirs["decoded"])


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_and_decoder_are_diffusers(name):
    encode_error, decode_error = errors_of(name)
    print(f"{name}: encode {encode_error:.1e}, decode {decode_error:.1e}")
    assert encode_error < 1e-5 and decode_error < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_our_names_are_those_that_diffusers_saves(name):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(**CONFIGS[name]).state_dict()
    ours = random_weights(name)
    assert {k: v.shape for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}


def moments_of(name: str, weights: dict[str, np.ndarray] | None = None, **settings) -> jax.Array:
    """Moments by a network made here, with whatever was done to it."""
    module = AutoencoderKL(**settings_of(name).module_settings(), **settings)
    params = convert.from_torch(weights or random_weights(name), settings_of(name))
    apply = jax.jit(functools.partial(module.apply, method="encode"))
    return apply({"params": params}, images())


@pytest.mark.torch
def test_swapped_queries_and_keys_would_show():
    weights = dict(random_weights("other"))
    q, k = (f"encoder.mid_block.attentions.0.{part}.weight" for part in ("to_q", "to_k"))
    weights[q], weights[k] = weights[k], weights[q]
    moments = moments_of("other", weights)
    assert relative_error(moments, reference("other")["moments"]) > 1e-3


@pytest.mark.torch
def test_symmetric_padding_would_show(monkeypatch):
    conv = network._conv

    def symmetric(*args, **kwargs):
        return conv(*args, **kwargs | ({"padding": 1} if kwargs.get("strides") == 2 else {}))

    monkeypatch.setattr(network, "_conv", symmetric)
    assert relative_error(moments_of("other"), reference("other")["moments"]) > 1e-3


@pytest.mark.torch
def test_another_epsilon_would_show(monkeypatch):
    monkeypatch.setattr(network, "GROUP_NORM_EPSILON", 1e-5)
    assert relative_error(moments_of("other"), reference("other")["moments"]) > 1e-3


def test_bfloat16_is_near():
    exact = np.asarray(moments_of("other"))
    assert 1e-4 < relative_error(moments_of("other", dtype=jnp.bfloat16), exact) < 5e-2


def test_float32_asks_for_float32_products(tmp_path):
    module = Autoencoder.load(save(tmp_path, "other"), dtype="float32").module
    x = jax.ShapeDtypeStruct((1, *SIDES, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    text = str(jax.make_jaxpr(module.apply)(variables, x))
    assert "Precision.HIGHEST" in text and "precision=None" not in text


def test_stable_diffusions_is_the_default_and_has_its_size():
    init = jax.eval_shape(AutoencoderKL().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(init)) == 83_653_863


# Namings


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("naming", ["diffusers", "old diffusers", "CompVis", "Stable Diffusion"])
def test_every_naming_gives_one_tree_and_back(name, naming):
    weights, settings = random_weights(name), settings_of(name)
    stages = len(settings.block_widths)
    extra = np.zeros(3, np.float32)
    if naming == "old diffusers":
        renamed = to_old_diffusers(weights)
    elif naming == "CompVis":
        training = {"loss.discriminator.main.0.weight": extra, "model_ema.decay": extra}
        renamed = to_compvis(weights, stages) | training
    elif naming == "Stable Diffusion":
        first_stage = to_compvis(weights, stages)
        renamed = {f"first_stage_model.{k}": v for k, v in first_stage.items()}
        renamed |= {"model.diffusion_model.out.2.bias": extra, "betas": extra}
    else:
        renamed = weights
    back = convert.to_torch(convert.from_torch(renamed, settings), settings)
    assert back.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(back[key], array)
    shapes = {k: v.shape for k, v in renamed.items()}
    if settings.norm_groups == convert.DEFAULT_NORM_GROUPS:
        seen = convert.settings_from_shapes(shapes)
        assert seen.module_settings() == settings.module_settings()
    else:  # 32 groups, which the shapes are taken to mean, do not fit these widths
        with pytest.raises(ValueError, match=r"norm_num_groups 32 does not divide the width 16;"):
            convert.settings_from_shapes(shapes)


def test_all_but_the_groups_and_the_scale_shows_in_the_shapes(monkeypatch):
    monkeypatch.setattr(convert, "DEFAULT_NORM_GROUPS", 8)
    shapes = {k: v.shape for k, v in random_weights("other").items()}
    seen = convert.settings_from_shapes(shapes).module_settings()
    assert seen == settings_of("other").module_settings()


def test_attention_may_be_stored_as_convolutions_under_diffusers_names():
    weights = {
        k: v[..., None, None] if ".to_" in k and v.ndim == 2 else v
        for k, v in random_weights("other").items()
    }
    settings = settings_of("other")
    back = convert.to_torch(convert.from_torch(weights, settings), settings)
    assert all((back[k] == v).all() for k, v in random_weights("other").items())


def test_types_are_kept():
    weights = {k: v.astype(np.float16) for k, v in random_weights("other").items()}
    tree = convert.from_torch(weights, settings_of("other"))
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(np.float16)}


# What is refused


def without(name: str, *keys: str, **more: np.ndarray) -> dict[str, np.ndarray]:
    return {k: v for k, v in random_weights(name).items() if k not in keys} | more


def test_a_missing_weight_is_named():
    with pytest.raises(ValueError, match=r"^weight 'decoder.conv_out.bias' is missing: the file"):
        convert.from_torch(without("other", "decoder.conv_out.bias"), settings_of("other"))


def test_an_unknown_weight_is_named_with_the_nearest():
    weights = without("other", "decoder.conv_out.bias")
    weights["decoder.conv_uot.bias"] = np.zeros(3)
    message = (
        r"^unknown weight 'decoder.conv_uot.bias'; the nearest expected, 'decoder.conv_out.bias',"
        r" is missing$"
    )
    with pytest.raises(ValueError, match=message):
        convert.from_torch(weights, settings_of("other"))


def test_a_wrong_shape_is_named_with_the_right_one():
    weights = dict(random_weights("other"))
    weights["encoder.conv_in.weight"] = np.zeros((16, 4, 3, 3), np.float32)
    message = r"^weight 'encoder.conv_in.weight' is of shape \(16, 4, 3, 3\), .* \(16, 3, 3, 3\)$"
    with pytest.raises(ValueError, match=message):
        convert.from_torch(weights, settings_of("other"))


def test_a_diffusion_transformer_is_recognised():
    weights = {"x_embedder.proj.weight": np.zeros((8, 4, 2, 2)), "pos_embed": np.zeros((1, 4, 8))}
    message = r"^these are the weights of a diffusion transformer \(MDT or DiT: 'x_embedder"
    with pytest.raises(ValueError, match=message):
        convert.settings_from_shapes({k: v.shape for k, v in weights.items()})


def test_something_else_is_named():
    with pytest.raises(ValueError, match=r"is missing: this is no KL autoencoder; it holds 'fc'"):
        convert.from_torch({"fc": np.zeros(3)}, settings_of("other"))


def test_an_autoencoder_without_variances_is_refused():
    shapes = {k: v.shape for k, v in random_weights("sd").items()}
    shapes["encoder.conv_out.weight"] = (4, 64, 3, 3)
    with pytest.raises(ValueError, match=r"gives 4 channels .* takes 4: .* no KL autoencoder$"):
        convert.settings_from_shapes(shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, r"^act_fn 'gelu' is not supported; it must be 'silu' or 'swish'$"),
        (
            {"up_block_types": ("CrossUp",) * 3},
            r"^up_block_types 'CrossUp' is not supported; known: UpDecoderBlock2D, AttnUpDecoder",
        ),
        ({"_class_name": "VQModel"}, r"^_class_name 'VQModel' is not supported; it must be 'Auto"),
        ({"latents_mean": [0.0]}, "mean has 1 values, and the latents 16 channels"),
        ({"latents_mean": [0.0] * 16}, "std has 0 values, and the latents 16 channels"),
        ({"latents_std": [0.0] * 16}, r"^latents_std is .* list of numbers above 0$"),
        ({"latents_mean": 0.5}, "^latents_mean is 0.5; it must be a list of numbers$"),
        ({"temporal": True}, r"^temporal True is not supported: .* remove it from config.json$"),
        ({"norm_num_groups": 7}, r"^norm_num_groups 7 does not divide the width 16"),
        (
            {"down_block_types": ("DownEncoderBlock2D",)},
            r"^down_block_types has 1 stages, block_out_channels 3$",
        ),
        ({"block_out_channels": None}, r"^block_out_channels is None; it must be a list of whole"),
        ({"block_out_channels": []}, r"^block_out_channels is \[\]; it must be a list of whole"),
        ({"block_out_channels": ["a"]}, r"^block_out_channels is \['a'\]; it must be a list of"),
        ({"norm_num_groups": "32"}, r"^norm_num_groups is '32'; it must be a whole number above 0"),
        ({"norm_num_groups": 0}, r"^norm_num_groups is 0; it must be a whole number above 0$"),
        ({"layers_per_block": 10**12}, "^layers_per_block is above 16,384, which no network known"),
        ({"block_out_channels": [8, 10**9]}, "^block_out_channels is above 16,384, which no netwo"),
        ({"latent_channels": True}, r"^latent_channels is True; it must be a whole number above"),
        ({"layers_per_block": 1.0}, r"^layers_per_block is 1.0; it must be a whole number above"),
        ({"down_block_types": 3}, r"^down_block_types is 3; it must be a list of names$"),
        ({"up_block_types": "Up"}, r"^up_block_types is 'Up'; it must be a list of names$"),
        ({"use_quant_conv": "no"}, r"^use_quant_conv is 'no'; it must be true or false$"),
        ({"scaling_factor": "1"}, r"^scaling_factor is '1'; it must be a number above 0$"),
        ({"scaling_factor": float("nan")}, r"^scaling_factor is nan; it must be a number above 0$"),
        ({"shift_factor": [0.1]}, r"^shift_factor is \[0.1\]; it must be a number$"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        settings_from_config(CONFIGS["other"] | change)


def test_a_config_without_entries_has_diffusers_defaults():
    settings = settings_from_config({"_class_name": "AutoencoderKL", "sample_size": 256})
    assert (settings.scale, settings.shift, settings.block_widths) == (0.18215, 0.0, (64,))


@pytest.mark.torch
@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_published_autoencoders_have_the_shapes_and_numbers_of_theirs(name):
    torch, diffusers = (pytest.importorskip(module) for module in ("torch", "diffusers"))
    config = PUBLISHED_CONFIGS[name]
    settings = settings_from_config(config)
    assert dataclasses.replace(settings.latents, autoencoder=name) == AUTOENCODERS[name]
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**{k: v for k, v in config.items() if k[0] != "_"})
    module = AutoencoderKL(**settings.module_settings())
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    ours = convert.to_torch(jax.tree.map(lambda s: np.broadcast_to(0, s.shape), shapes), settings)
    wanted = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.items()} == wanted


def test_channels_of_a_config_have_diffusers_normalisation():
    """Its pipelines multiply by scaling_factor and divide by latents_std."""
    channels = {"latents_mean": [0.5, -1.0, 0, 2], "latents_std": [2.0, 1, 0.5, 4]}
    space = settings_from_config(CONFIGS["sd"] | channels | {"scaling_factor": 0.5}).latents
    z = rng().standard_normal((2, 3, 3, 4)).astype(np.float32)
    expected = (z - np.array(channels["latents_mean"])) * 0.5 / np.array(channels["latents_std"])
    np.testing.assert_allclose(space.normalize(z), expected, rtol=1e-6)


NOT_STABLE_DIFFUSIONS = {
    "16 channels": ({"latent_channels": 16}, "latent_channels is 16, and 4 there"),
    "no quant convolutions": ({"use_quant_conv": False}, "quant_conv is False, and True there"),
    "one stage less": (
        {
            "block_out_channels": (32, 32, 64),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        },
        "stages is 3, and 4 there",
    ),
    "attention in a stage": (
        {"down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",)},
        r"down_attention is \(3,\), and \(\) there",
    ),
    "one block a stage": ({"layers_per_block": 1}, "layers_per_block is 1, and 2 there"),
}


@pytest.mark.parametrize("case", NOT_STABLE_DIFFUSIONS)
def test_without_a_config_another_kind_of_autoencoder_is_refused(case, tmp_path, monkeypatch):
    change, message = NOT_STABLE_DIFFUSIONS[case]
    monkeypatch.setitem(CONFIGS, case, CONFIGS["sd"] | change)
    save(tmp_path, case)
    (tmp_path / "config.json").unlink()
    with pytest.raises(weight_files.WeightsError, match=message) as error:
        Autoencoder.load(tmp_path)
    assert "config.json beside the weights" in str(error.value) and "\n" not in str(error.value)


def test_a_deep_compression_autoencoder_without_a_config_is_refused(tmp_path):
    weights = {"encoder.down_blocks.0.0.conv1.conv.weight": np.zeros((2, 2, 3, 3), np.float32)}
    weight_files.write_weights(tmp_path / "vae.safetensors", weights)
    with pytest.raises(weight_files.WeightsError, match="put its config.json beside them$"):
        Autoencoder.load(tmp_path)


def test_without_a_config_the_log_says_the_scale_that_is_assumed(tmp_path, caplog):
    save(tmp_path, "sd")
    (tmp_path / "config.json").unlink()
    with caplog.at_level("INFO", logger="absl"):
        assert Autoencoder.load(tmp_path).latents.scale == 0.18215
    assert "of scale 0.18215. SDXL's has the same shapes and another scale" in caplog.text


# Files


def test_a_folder_of_diffusers_loads_whole(tmp_path):
    autoencoder = Autoencoder.load(save(tmp_path, "other"))
    space = autoencoder.latents
    assert (space.scale, space.shift) == (0.3611, 0.1159)
    assert autoencoder.name == str(tmp_path)
    back = convert.to_torch(autoencoder.params, settings_of("other"))
    for key, array in random_weights("other").items():
        np.testing.assert_array_equal(back[key], array)


def test_a_file_alone_is_of_stable_diffusions_groups_and_scale(tmp_path):
    weights = to_compvis(random_weights("sd"), 4)
    weight_files.write_weights(tmp_path / "vae.safetensors", weights)
    for source in (tmp_path, tmp_path / "vae.safetensors"):
        autoencoder = Autoencoder.load(source)
        assert (autoencoder.latents.scale, autoencoder.module.norm_groups) == (0.18215, 32)
        assert autoencoder.module.block_widths == (32, 32, 64, 64)


def test_a_float16_file_becomes_float32_parameters(tmp_path):
    autoencoder = Autoencoder.load(save(tmp_path, "other", np.float16))
    assert {leaf.dtype for leaf in jax.tree.leaves(autoencoder.params)} == {np.dtype(np.float32)}
    kernel = autoencoder.params["decoder"]["conv_in"]["kernel"]
    stored = random_weights("other")["decoder.conv_in.weight"].astype(np.float16)
    np.testing.assert_array_equal(kernel, stored.transpose(2, 3, 1, 0))


@pytest.mark.torch
def test_a_lightning_checkpoint_loads(tmp_path):
    torch = pytest.importorskip("torch")
    weights = to_compvis(random_weights("sd"), 4)
    tensors = {f"first_stage_model.{k}": torch.tensor(v) for k, v in weights.items()}
    torch.save({"state_dict": tensors, "global_step": 3}, tmp_path / "model.ckpt")
    autoencoder = Autoencoder.load(tmp_path / "model.ckpt")
    assert autoencoder.module.latent_channels == 4


def test_what_cannot_be_loaded_says_where(tmp_path):
    with pytest.raises(ValueError, match=r"^autoencoder 'nowhere': .* give 'ema', 'mse', 'sdxl'"):
        Autoencoder.load("nowhere")
    (tmp_path / "vae").mkdir()
    with pytest.raises(ValueError, match=rf"^{tmp_path}: no weights .*; is {tmp_path}/vae meant\?"):
        Autoencoder.load(tmp_path)
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r": several files of weights, a.pt, b.safetensors; give"):
        Autoencoder.load(tmp_path)


def test_a_config_that_is_refused_is_named(tmp_path):
    save(tmp_path, "other", config={"act_fn": "gelu"})
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json: act_fn 'gelu'"):
        Autoencoder.load(tmp_path)


def test_a_config_that_is_no_settings_is_named(tmp_path):
    save(tmp_path, "other", config=["AutoencoderKL"])
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json holds a list"):
        Autoencoder.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json is not JSON"):
        Autoencoder.load(tmp_path)


def test_weights_of_another_config_are_named(tmp_path):
    save(tmp_path, "other", config=CONFIGS["other"] | {"latent_channels": 8})
    message = rf"^{tmp_path}/diffusion_pytorch_model.safetensors: weight 'encoder.conv_out.weight'"
    with pytest.raises(ValueError, match=message):
        Autoencoder.load(tmp_path)


def test_a_published_autoencoder_out_of_reach_says_what_to_download(monkeypatch):
    def unreachable(source):
        raise weight_files.WeightsError("no network")

    monkeypatch.setattr(weight_files, "fetch", unreachable)
    message = r"^the autoencoder 'mse' cannot be fetched: .* stabilityai/sd-vae-ft-mse into one"
    with pytest.raises(ValueError, match=message):
        Autoencoder.load("mse")


def hub_without_config(monkeypatch, file: Path, error: ValueError) -> None:
    """A hub that gives a file of weights, and an error for the config.json beside it."""

    def fetch(source):
        if str(source).endswith("config.json"):
            raise error
        return file

    monkeypatch.setattr(weight_files, "fetch", fetch)


def test_a_repository_without_config_is_of_stable_diffusions_groups(tmp_path, monkeypatch):
    file = tmp_path / "vae.safetensors"
    weight_files.write_weights(file, to_compvis(random_weights("sd"), 4))
    missing = weight_files.NoSuchFile("o/r holds no file config.json")
    hub_without_config(monkeypatch, file, missing)
    assert Autoencoder.load("hf://o/r/vae.safetensors").module.norm_groups == 32


def test_a_config_that_may_be_out_of_reach_is_not_taken_to_be_missing(tmp_path, monkeypatch):
    file = tmp_path / "vae.safetensors"
    weight_files.write_weights(file, to_compvis(random_weights("sd"), 4))
    hub_without_config(monkeypatch, file, weight_files.WeightsError("the hub cannot be reached"))
    with pytest.raises(ValueError, match=r"the hub cannot be reached"):
        Autoencoder.load("hf://o/r/vae.safetensors")


# Encoding and decoding


@functools.cache
def small() -> Autoencoder:
    return build("other")


def test_images_that_do_not_fit_are_refused():
    for x, message in (
        (np.zeros((1, 26, 40, 3), np.float32), r"of 26 x 40 pixels; .* of 4: 24 x 40 would fit$"),
        (np.zeros((1, 3, 40, 3), np.float32), r"of 3 x 40 pixels; .* of 4: 4 x 40 would fit$"),
        (np.zeros((1, 24, 40, 1), np.float32), r"^images of 1 channels; .* takes 3$"),
    ):
        with pytest.raises(ValueError, match=message):
            small().encode(x)
    with pytest.raises(ValueError, match=r"^latents of 4 channels; the autoencoder other has 16$"):
        small().decode(np.zeros((1, 6, 10, 4), np.float32))
    with pytest.raises(ValueError, match=r"^batch_size 0 is below 1$"):
        small().encode(images(), batch_size=0)


def test_batches_and_devices_change_nothing():
    x, one = images(5), small()
    mesh = sharding.create_mesh(data=2, devices=jax.devices()[:2])
    params = jax.device_put(one.params, sharding.replicated(mesh))
    two = Autoencoder(one.module, params, one.latents, mesh)
    mean, std = one.encode(x, batch_size=5)
    in_batches = two.encode(x, batch_size=2)  # the last batch is padded
    np.testing.assert_allclose(in_batches[0], mean, atol=1e-5)
    np.testing.assert_allclose(in_batches[1], std, atol=1e-5)
    np.testing.assert_allclose(
        two.decode(mean, batch_size=2), one.decode(mean, batch_size=5), atol=1e-5
    )


def test_no_images_give_no_latents():
    mean, std = small().encode(np.zeros((0, *SIDES, 3), np.float32))
    assert mean.shape == std.shape == (0, 6, 10, 16)


def test_the_log_variance_is_clamped():
    weights = dict(random_weights("other"))
    bias = weights["encoder.conv_out.bias"].copy()
    bias[16:24], bias[24:] = 1000, -1000
    _, std = build("other", weights | {"encoder.conv_out.bias": bias}).encode(images())
    np.testing.assert_allclose(std[..., :8], np.exp(10), rtol=1e-6)
    np.testing.assert_allclose(std[..., 8:], np.exp(-15), rtol=1e-6)


# Tiles


def test_a_tile_as_large_as_the_image_is_one_pass():
    z = rng().standard_normal((2, 6, 10, 16)).astype(np.float32)
    np.testing.assert_array_equal(small().decode(z, tile_size=10), small().decode(z))


@pytest.mark.parametrize(("side", "tile"), [(6, 10), (10, 10), (11, 8), (37, 8), (30, 5)])
def test_tiles_cover_every_pixel_with_weights_that_sum_to_one(side, tile):
    total = np.zeros(2 * side)
    for start, weights in latents_lib._tiles(side, tile, 2):
        assert start >= 0 and len(weights) == 2 * min(side, tile)
        total[2 * start : 2 * start + len(weights)] += weights
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_tiles_hand_over_linearly():
    (_, left), (start, right) = latents_lib._tiles(14, 8, 4)
    assert start == 6  # an overlap of two latents, 8 pixels
    np.testing.assert_allclose(right[:8], (np.arange(8) + 0.5) / 8, rtol=1e-6)
    np.testing.assert_allclose(left[-8:], 1 - right[:8], rtol=1e-6)
    assert (left[:-8] == 1).all() and (right[8:] == 1).all()


def test_tiles_come_near_one_pass_and_leave_no_seams():
    # Latents that change slowly, as a smooth image's: GroupNorm sees much the same in each tile.
    rows, columns = np.mgrid[0:24, 0:24] / 24
    waves = [np.sin(2 * np.pi * (3 * rows + i * columns) + i) for i in range(16)]
    z = np.stack(waves, axis=-1).astype(np.float32)[None]
    whole, tiled = small().decode(z), small().decode(z, tile_size=16)
    error = np.abs(tiled - whole).max() / np.abs(whole).max()
    steps = [np.abs(np.diff(x, axis=a)).max() for x in (whole, tiled) for a in (1, 2)]
    print(f"tiles: {error:.2f} of the range; largest steps between pixels {steps}")
    assert tiled.shape == whole.shape and error < 0.5
    assert max(steps[2:]) < 1.2 * max(steps[:2])


def test_too_small_a_tile_is_refused():
    with pytest.raises(ValueError, match=r"^tile_size 2 is below 4 latents$"):
        small().decode(np.zeros((1, 6, 10, 16), np.float32), tile_size=2)


def test_a_last_smaller_batch_runs_the_program_of_the_others(monkeypatch):
    seen = []

    def decode(self, latents, batch_size, tile_size):
        seen.append((latents.shape, batch_size, tile_size))
        return latents + 1

    monkeypatch.setattr(Autoencoder, "decode", decode)
    module, mesh = AutoencoderKL(), sharding.create_mesh()
    autoencoder = Autoencoder(module, {}, LatentSpace(scale=1.0), mesh)
    # Without the shapes checked: these images are latents.
    decode_batch = getattr(Autoencoder.decode_batch, "__wrapped__", Autoencoder.decode_batch)
    latents = np.random.default_rng(0).standard_normal((3, 2, 2, 4)).astype(np.float32)
    for size in (8, 4, 3):
        images = decode_batch(autoencoder, latents, size, 4, 64)
        np.testing.assert_array_equal(images, latents + 1)
    assert seen == [((n, 2, 2, 4), 4, 64) for n in (4, 4, 3)]
