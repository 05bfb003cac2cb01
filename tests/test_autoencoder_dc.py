"""The deep compression autoencoder against diffusers' own, its files, and what is refused."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from fixtures import drawn_autoencoder
from jax.extend import core as jex_core

from mdt_jax.convert import autoencoder_dc as convert
from mdt_jax.convert.autoencoder_dc import AutoencoderDCSettings, settings_from_config
from mdt_jax.convert.trees import flatten
from mdt_jax.models import autoencoder_dc as network
from mdt_jax.models.autoencoder_dc import AutoencoderDC

RES, ATTENTION = "ResBlock", "EfficientViTBlock"
# Small ones of the two kinds that are published, and one of all else that the settings allow. The
# coarsest stage of "imagenet" has fewer positions than a head has channels, where diffusers takes
# other products for the same sums. Heads have 12 channels or more: with 8, a query may have so
# little weight on every key that both implementations are 1e-5 off a network in float64.
CONFIGS = {
    "sana": {
        "latent_channels": 4,
        "attention_head_dim": 16,
        "encoder_block_types": (RES, RES, ATTENTION),
        "decoder_block_types": (RES, RES, ATTENTION),
        "encoder_block_out_channels": (16, 16, 32),
        "decoder_block_out_channels": (16, 16, 32),
        "encoder_layers_per_block": (1, 2, 2),
        "decoder_layers_per_block": (2, 1, 1),
        "encoder_qkv_multiscales": ((), (), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,)),
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    },
    "imagenet": {
        "latent_channels": 8,
        "attention_head_dim": 16,
        "encoder_block_types": (RES, RES, ATTENTION, ATTENTION),
        "decoder_block_types": (RES, RES, ATTENTION, ATTENTION),
        "encoder_block_out_channels": (8, 16, 32, 32),
        "decoder_block_out_channels": (8, 16, 32, 32),
        "encoder_layers_per_block": (0, 1, 1, 2),
        "decoder_layers_per_block": (0, 2, 1, 1),
        "encoder_qkv_multiscales": ((), (), (), ()),
        "decoder_qkv_multiscales": ((), (), (), ()),
        "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm", "rms_norm"),
        "decoder_act_fns": ("relu", "relu", "silu", "silu"),
    },
    "other": {
        "in_channels": 1,
        "latent_channels": 5,
        "attention_head_dim": 12,
        "encoder_block_types": (ATTENTION, RES, RES),
        "decoder_block_types": (RES, RES, ATTENTION),
        "encoder_block_out_channels": (16, 32, 32),
        "decoder_block_out_channels": (8, 16, 32),
        "encoder_layers_per_block": (1, 1, 0),
        "decoder_layers_per_block": (1, 1, 1),
        "encoder_qkv_multiscales": ((3, 5), (), (5,)),
        "decoder_qkv_multiscales": ((), (3,), (5, 3)),
        "downsample_block_type": "conv",
        "upsample_block_type": "pixel_shuffle",
        "decoder_norm_types": ("rms_norm", "rms_norm", "batch_norm"),
        "decoder_act_fns": ("GELU", "mish", "swish"),
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
        "decoder_conv_act_fn": "silu",
    },
}
SIDES = (24, 40)


def published(latent_channels: int, stages: int) -> dict:
    """A config of the published autoencoders of ImageNet, of which the authors give three."""
    widths = (128, 256, 512, 512, 1024, 1024, 2048, 2048)[:stages]
    return {
        "latent_channels": latent_channels,
        "encoder_block_types": (RES,) * 3 + (ATTENTION,) * (stages - 3),
        "decoder_block_types": (RES,) * 3 + (ATTENTION,) * (stages - 3),
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_layers_per_block": (0, 4, 8) + (2,) * (stages - 3),
        "decoder_layers_per_block": (0, 5, 10) + (2,) * (stages - 3),
        "encoder_qkv_multiscales": ((),) * stages,
        "decoder_qkv_multiscales": ((),) * stages,
        "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * (stages - 3),
        "decoder_act_fns": ("relu",) * 3 + ("silu",) * (stages - 3),
    }


PUBLISHED = {
    "dc-ae-f32c32-sana-1.0": {
        "latent_channels": 32,
        "encoder_block_types": (RES,) * 3 + (ATTENTION,) * 3,
        "decoder_block_types": (RES,) * 3 + (ATTENTION,) * 3,
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
    "dc-ae-f32c32-in-1.0": published(32, 6),
    "dc-ae-f64c128-in-1.0": published(128, 7),
    "dc-ae-f128c512-in-1.0": published(512, 8),
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def settings_of(name: str) -> AutoencoderDCSettings:
    return settings_from_config(CONFIGS[name])


def module_of(settings: AutoencoderDCSettings, **more) -> AutoencoderDC:
    return AutoencoderDC(**settings.module_settings(), **more)


def images(name: str, count: int = 2) -> np.ndarray:
    channels = settings_of(name).in_channels
    return rng().uniform(-1, 1, (count, *SIDES, channels)).astype(np.float32)


def latents(name: str) -> np.ndarray:
    module = module_of(settings_of(name))
    height, width = (side // module.downsampling for side in SIDES)
    z = rng(2).standard_normal((2, height, width, module.latent_channels))
    return z.astype(np.float32)


def shapes_of(settings: AutoencoderDCSettings) -> dict:
    """The tree of the parameters' shapes, of a network that is not run."""
    module = module_of(settings)
    side = module.downsampling
    x = jax.ShapeDtypeStruct((1, side, side, settings.in_channels), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), x)["params"]


@functools.cache
def random_weights(name: str) -> dict[str, np.ndarray]:
    """Weights under diffusers' names, every one drawn."""
    settings = settings_of(name)
    return convert.to_torch(drawn_autoencoder(shapes_of(settings)), settings)


def relative_error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


# Against diffusers


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    """Latents and images by diffusers' autoencoder of these weights."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderDC(**CONFIGS[name]).eval()
    model.load_state_dict({k: torch.tensor(v) for k, v in random_weights(name).items()})

    def run(method, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            (out,) = method(torch.tensor(x).permute(0, 3, 1, 2), return_dict=False)
        return out.permute(0, 2, 3, 1).numpy()

    return {
        "encode": run(model.encode, images(name)),
        "decode": run(model.decode, latents(name)),
    }


@functools.cache
def compiled(module: AutoencoderDC, method: str) -> Callable:
    return jax.jit(functools.partial(module.apply, method=method))


def outputs(
    name: str,
    method: str,
    weights: dict[str, np.ndarray] | None = None,
    settings: AutoencoderDCSettings | None = None,
    compiled: Callable = compiled,
    **more,
) -> jax.Array:
    """What a network made here gives, with whatever was done to it."""
    settings = settings or settings_of(name)
    params = convert.from_torch(weights or random_weights(name), settings)
    x = images(name) if method == "encode" else latents(name)
    return compiled(module_of(settings, **more), method)({"params": params}, x)


def error_with(monkeypatch, name: str, method: str, **faults) -> float:
    """The relative error of a network with some of its module's names replaced."""
    for attribute, fault in faults.items():
        monkeypatch.setattr(network, attribute, fault)
    found = outputs(name, method, compiled=compiled.__wrapped__)
    return relative_error(found, reference(name)[method])


@pytest.mark.torch
@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_and_decoder_are_diffusers(name, method):
    ours, theirs = outputs(name, method), reference(name)[method]
    error = relative_error(ours, theirs)
    print(f"{name}: {method} {error:.1e}")
    assert ours.shape == theirs.shape and ours.dtype == jnp.float32
    assert error < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("name", [*CONFIGS, *PUBLISHED])
def test_our_names_and_shapes_are_those_that_diffusers_saves(name):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config = (CONFIGS | PUBLISHED)[name]
    with torch.device("meta"):
        theirs = diffusers.AutoencoderDC(**config).state_dict()
    # Views of one number: the largest of them has 4 GB of weights.
    weights = {k: np.broadcast_to(np.float32(0), tuple(v.shape)) for k, v in theirs.items()}
    settings = settings_from_config(config)
    tree = convert.from_torch(weights, settings)
    ours = {path: leaf.shape for path, leaf in flatten(shapes_of(settings))}
    assert {path: leaf.shape for path, leaf in flatten(tree)} == ours
    if name in CONFIGS:
        saved = {k: v.shape for k, v in random_weights(name).items()}
        assert saved == {k: tuple(v.shape) for k, v in theirs.items()}
    else:
        stride = int(name.split("-")[2].partition("c")[0].removeprefix("f"))
        assert module_of(settings).downsampling == stride


@pytest.mark.torch
def test_entries_and_defaults_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    parameters = dict(inspect.signature(diffusers.AutoencoderDC.__init__).parameters)
    del parameters["self"]
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    assert defaults.keys() == convert._READ.keys()
    assert settings_from_config(defaults) == settings_from_config({}) == AutoencoderDCSettings()


# Each of these is a network with one fault. The error of the right one is below 1e-5.


def swapped(name: str, one: str, other: str) -> dict[str, np.ndarray]:
    """Weights with two of the first maps of attention exchanged, in all of the network."""
    names = {f".to_{one}.": f".to_{other}.", f".to_{other}.": f".to_{one}."}
    exchanged = {
        key.replace(there, here): array
        for key, array in random_weights(name).items()
        for there, here in names.items()
        if there in key
    }
    return random_weights(name) | exchanged


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pair", [("q", "k"), ("k", "v")])
def test_swapped_attention_would_show(name, pair):
    found = outputs(name, "encode", swapped(name, *pair))
    assert relative_error(found, reference(name)["encode"]) > 1e-3


@pytest.mark.torch
def test_heads_sorted_into_queries_keys_and_values_would_show(monkeypatch):
    def by_layer(x, pattern, **axes):
        if "qkv c" in pattern:
            pattern = pattern.replace("(heads qkv c)", "(qkv heads c)")
        return rearrange(x, pattern, **axes)

    assert error_with(monkeypatch, "imagenet", "encode", rearrange=by_layer) > 1e-3


@pytest.mark.torch
@pytest.mark.parametrize(
    ("method", "shortcut"),
    [("encode", "encoder_out_shortcut"), ("decode", "decoder_in_shortcut")],
)
def test_a_missing_shortcut_at_the_latents_would_show(method, shortcut):
    settings = settings_from_config(CONFIGS["sana"] | {shortcut: False})
    found = outputs("sana", method, settings=settings)
    assert relative_error(found, reference("sana")[method]) > 1e-3


@pytest.mark.torch
@pytest.mark.parametrize("name", ["sana", "imagenet"])
@pytest.mark.parametrize(("method", "shortcut"), [("encode", "_average"), ("decode", "_repeat")])
def test_a_missing_shortcut_between_stages_would_show(monkeypatch, name, method, shortcut):
    right = getattr(network, shortcut)
    at_latents = settings_of(name).latent_channels

    def wrong(x, width):
        return right(x, width) * (at_latents in (width, x.shape[-1]))

    assert error_with(monkeypatch, name, method, **{shortcut: wrong}) > 1e-3


@pytest.mark.torch
@pytest.mark.parametrize(("method", "function"), [("encode", "_unshuffle"), ("decode", "_shuffle")])
def test_shuffling_with_channels_last_would_show(monkeypatch, method, function):
    patterns = {
        "_unshuffle": "b (h p) (w q) c -> b h w (p q c)",
        "_shuffle": "b h w (p q c) -> b (h p) (w q) c",
    }
    wrong = functools.partial(rearrange, pattern=patterns[function], p=2, q=2)
    assert error_with(monkeypatch, "imagenet", method, **{function: wrong}) > 1e-3


@pytest.mark.torch
def test_another_epsilon_would_show(monkeypatch):
    assert error_with(monkeypatch, "sana", "encode", NORM_EPSILON=1e-6) > 1e-3


@pytest.mark.torch
@pytest.mark.parametrize("change", [{"decoder_act_fns": "relu"}, {"decoder_conv_act_fn": "gelu"}])
def test_another_activation_would_show(change):
    found = outputs("sana", "decode", settings=settings_from_config(CONFIGS["sana"] | change))
    assert relative_error(found, reference("sana")["decode"]) > 1e-3


# Running


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_bfloat16_is_near(method):
    exact = np.asarray(outputs("sana", method))
    found = outputs("sana", method, dtype=jnp.bfloat16)
    assert found.dtype == jnp.float32
    assert 1e-4 < relative_error(found, exact) < 5e-2


def products(name: str, dtype) -> list[tuple[str, str]]:
    """Precision and type of the operands of every product and convolution of a network."""
    module = module_of(settings_of(name), dtype=dtype)
    x = jax.ShapeDtypeStruct((1, *SIDES, module.in_channels), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    found = []

    def visit(jaxpr) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                kind = str(equation.invars[0].aval.dtype)
                found.append((str(equation.params["precision"]), kind))
            for inner in jex_core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(module.apply)(variables, x).jaxpr)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_asks_for_float32_products(name):
    found = products(name, jnp.float32)
    assert len(found) > 20
    assert {(p.count("HIGHEST"), kind) for p, kind in found} == {(2, "float32")}


def test_attention_is_float32_in_bfloat16_networks():
    found = products("sana", jnp.bfloat16)
    exact = [kind for precision, kind in found if "HIGHEST" in precision]
    rest = [kind for precision, kind in found if "HIGHEST" not in precision]
    assert exact == ["float32"] * 9  # three products in each of three layers of attention
    assert set(rest) == {"bfloat16"}


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_an_image_knows_nothing_of_the_others_in_its_batch(method):
    x = images("imagenet") if method == "encode" else latents("imagenet")
    module = module_of(settings_of("imagenet"))
    params = convert.from_torch(random_weights("imagenet"), settings_of("imagenet"))
    run = functools.partial(compiled(module, method), {"params": params})
    both, other = np.asarray(run(x)), np.asarray(run(np.stack([x[0], 100 * x[1]])))
    assert relative_error(run(x[::-1])[::-1], both) < 1e-6
    assert relative_error(other[0], both[0]) < 1e-6 < relative_error(other[1], both[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_stride(name):
    module = module_of(settings_of(name))
    factor = {"sana": 4, "imagenet": 8, "other": 4}[name]
    assert (module.downsampling, module.out_channels) == (factor, module.in_channels)
    variables = {"params": shapes_of(settings_of(name))}
    for height, width in ((1, 1), (3, 5)):
        pixels = (2, height * factor, width * factor, module.in_channels)
        coarse = (2, height, width, module.latent_channels)
        for method, given, expected in (("encode", pixels, coarse), ("decode", coarse, pixels)):
            apply = functools.partial(module.apply, method=method)
            out = jax.eval_shape(apply, variables, jax.ShapeDtypeStruct(given, jnp.float32))
            assert (out.shape, out.dtype) == (expected, jnp.float32)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sides", [(26, 40), (24, 41), (3, 4)])
def test_sides_that_do_not_fit_are_refused(name, sides):
    module = module_of(settings_of(name))
    x = jnp.zeros((1, *sides, module.in_channels))
    with pytest.raises(ValueError) as refusal:
        module.apply({}, x, method="encode")
    # JAX adds lines of its own to a message.
    assert str(refusal.value).splitlines()[0] == (
        f"images of {sides[0]} x {sides[1]} pixels; their sides must be multiples of "
        f"{module.downsampling}"
    )


# Names


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_become_a_tree_and_back_bit_by_bit(name, dtype):
    settings = settings_of(name)
    weights = {
        k: v if k.endswith(convert._COUNTER) else v.astype(dtype)
        for k, v in random_weights(name).items()
    }
    tree = convert.from_torch(weights, settings)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(dtype)}
    back = convert.to_torch(tree, settings)
    assert back.keys() == weights.keys()
    for key, array in weights.items():
        assert back[key].dtype == array.dtype and back[key].flags.c_contiguous
        np.testing.assert_array_equal(back[key], array)


def test_counters_of_batch_norms_may_be_there_or_not():
    weights, settings = random_weights("imagenet"), settings_of("imagenet")
    counters = [k for k in weights if k.endswith(convert._COUNTER)]
    assert len(counters) == 2  # of the decoder's residual blocks
    counted = weights | {k: np.array(9000) for k in counters}
    without = {k: v for k, v in weights.items() if k not in counters}
    for given in (counted, without):
        back = convert.to_torch(convert.from_torch(given, settings), settings)
        assert back.keys() == weights.keys()
        assert all((back[k] == weights[k]).all() for k in weights)


def named(*names: str) -> dict[str, np.ndarray]:
    return dict.fromkeys(names, np.zeros(3, np.float32))


AUTHORS = named("encoder.project_in.conv.weight", "encoder.stages.0.op_list.0.main.conv1.conv.bias")
KL = named("encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.norm1.weight")


@pytest.mark.parametrize(
    ("names", "is_one"),
    [
        *((name, True) for name in CONFIGS),
        (AUTHORS, True),
        (KL, False),
        (named("encoder.down.0.block.0.conv1.weight"), False),
        (named("x_embedder.proj.weight"), False),
        ({}, False),
    ],
)
def test_deep_compression_autoencoders_are_recognised_by_names(names, is_one):
    names = random_weights(names) if isinstance(names, str) else names
    assert convert.is_autoencoder_dc(iter(names)) is is_one


# What is refused


def changed(name: str, **changes) -> dict[str, np.ndarray]:
    """Weights with some replaced, added, or, where the change is None, left out."""
    weights = random_weights(name) | {k.replace("__", "."): v for k, v in changes.items()}
    return {k: v for k, v in weights.items() if v is not None}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            lambda: changed("sana", decoder__conv_out__bias=None),
            r"^weight 'decoder.conv_out.bias' is missing: the file is incomplete, or the settings "
            r"\(config.json\) are another autoencoder's$",
        ),
        (
            lambda: changed("sana", decoder__conv_in__bias=None, decoder__conv_out__bias=None),
            r"^weight 'decoder.conv_in.bias' \(and 1 more\) is missing",
        ),
        (
            lambda: changed(
                "sana", decoder__conv_out__bias=None, decoder__conv_uot__bias=np.zeros(3)
            ),
            r"^unknown weight 'decoder.conv_uot.bias'; the nearest expected, "
            r"'decoder.conv_out.bias', is missing$",
        ),
        (
            lambda: random_weights("sana") | named("encoder.conv_in.wieght"),
            r"^unknown weight 'encoder.conv_in.wieght'; the nearest expected, "
            r"'encoder.conv_in.weight', is there$",
        ),
        (
            lambda: changed("sana", encoder__conv_in__weight=np.zeros((16, 4, 3, 3))),
            r"^weight 'encoder.conv_in.weight' is of shape \(16, 4, 3, 3\), where the settings "
            r"\(config.json\) ask for \(16, 3, 3, 3\)$",
        ),
        (
            lambda: changed("sana", encoder__conv_in__weight=np.zeros((3, 3, 3, 16))),
            r"^weight 'encoder.conv_in.weight' is of shape \(3, 3, 3, 16\), where",
        ),
        (
            lambda: changed("sana", decoder__norm_out__bias=np.zeros(())),
            r"^weight 'decoder.norm_out.bias' is of shape \(\), where .* ask for \(16,\)$",
        ),
        (lambda: random_weights("imagenet"), r"^unknown weight '.*' \(and \d+ more\); the nearest"),
        (
            lambda: AUTHORS,
            r"^these weights have the names of the authors' code \('encoder.project_in.…'\); give",
        ),
        (lambda: KL, r"^weights .* missing: this is no deep .*; it holds 'encoder.conv_in.weight'"),
        (dict, r"^weights 'encoder.down_blocks.0.0.…' are missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(weights, message):
    with pytest.raises(ValueError, match=message) as refusal:
        convert.from_torch(weights(), settings_of("sana"))
    assert "\n" not in str(refusal.value)


def test_a_parameter_that_is_missing_is_named():
    tree = convert.from_torch(random_weights("sana"), settings_of("sana"))
    del tree["encoder"]["down_2"]["attn_1"]["depth_0"]["kernel"]
    with pytest.raises(ValueError, match=r"^parameter 'encoder/down_2/attn_1/depth_0/kernel' is m"):
        convert.to_torch(tree, settings_of("sana"))


NOT_COUNTS = (0, -1, 1.0, True, "3", None, [3])
NOT_SWITCHES = (0, 1, "true", None, [True])
NOT_NAMES = (3, None, True)
COUNTS = "a list of whole numbers above 0"
BLOCKS = "a list of whole numbers of 0 or more"
SCALES = "a list of lists of odd numbers"
WRONG_TYPES = {
    **dict.fromkeys(
        ("in_channels", "latent_channels", "attention_head_dim"),
        (NOT_COUNTS, "a whole number above 0"),
    ),
    **dict.fromkeys(
        ("encoder_block_types", "decoder_block_types", "decoder_norm_types", "decoder_act_fns"),
        ((*NOT_NAMES, [], ["silu", None]), "a name or a list of names"),
    ),
    **dict.fromkeys(
        ("encoder_block_out_channels", "decoder_block_out_channels"),
        ((128, None, [], ["a"], [0], [16.0], [True], "128"), COUNTS),
    ),
    **dict.fromkeys(
        ("encoder_layers_per_block", "decoder_layers_per_block"),
        ((2, None, [], ["a"], [-1], [2.0], [False], [None]), BLOCKS),
    ),
    **dict.fromkeys(
        ("encoder_qkv_multiscales", "decoder_qkv_multiscales"),
        ((5, None, [], [5], [[4]], [[-5]], [["5"]], [[5.0]], [[True]], "5"), SCALES),
    ),
    **dict.fromkeys(
        ("upsample_block_type", "downsample_block_type", "decoder_conv_act_fn"),
        ((*NOT_NAMES, ["conv"]), "a name"),
    ),
    **dict.fromkeys(
        ("encoder_out_shortcut", "decoder_in_shortcut"), (NOT_SWITCHES, "true or false")
    ),
    "scaling_factor": ((0, -1.0, float("nan"), float("inf"), "1", True, [1]), "a number above 0"),
}


@pytest.mark.parametrize("key", convert._READ)
def test_a_value_of_a_wrong_type_is_refused_by_name(key):
    values, what = WRONG_TYPES[key]
    for value in values:
        with pytest.raises(ValueError) as refusal:
            settings_from_config(CONFIGS["sana"] | {key: value})
        assert str(refusal.value) == f"{key} is {value!r}; it must be {what}"


ONLY_ENDS = "only the first and the last of several stages may have no blocks"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "AutoencoderKL"},
            "_class_name 'AutoencoderKL' is not supported; it must be 'AutoencoderDC'",
        ),
        (
            {"encoder_block_types": "Res"},
            "encoder_block_types 'Res' is not supported; known: ResBlock, EfficientViTBlock",
        ),
        (
            {"decoder_block_types": (RES, RES, "ViT")},
            "decoder_block_types 'ViT' is not supported; known: ResBlock, EfficientViTBlock",
        ),
        (
            {"decoder_norm_types": "layer_norm"},
            "decoder_norm_types 'layer_norm' is not supported; known: rms_norm, batch_norm",
        ),
        (
            {"decoder_act_fns": ["silu", "relu6", "silu"]},
            "decoder_act_fns 'relu6' is not supported; known: relu, silu, swish, gelu, mish",
        ),
        (
            {"decoder_conv_act_fn": "Tanh"},
            "decoder_conv_act_fn 'Tanh' is not supported; known: relu, silu, swish, gelu, mish",
        ),
        (
            {"downsample_block_type": "Pixel_Unshuffle"},
            "downsample_block_type 'Pixel_Unshuffle' is not supported; known: "
            "pixel_unshuffle, conv",
        ),
        (
            {"upsample_block_type": "Interpolate"},
            "upsample_block_type 'Interpolate' is not supported; known: pixel_shuffle, interpolate",
        ),
        (
            {"shift_factor": 0.1},
            "shift_factor 0.1 is not supported: no AutoencoderDC known here has a shift_factor; "
            "if it is of no effect, remove it from config.json",
        ),
        (
            {"block_out_channels": [1]},
            "block_out_channels [1] is not supported: no AutoencoderDC known here has a "
            "block_out_channels; if it is of no effect, remove it from config.json",
        ),
        (
            {"decoder_block_out_channels": (16, 32)},
            "decoder_block_out_channels has 2 stages, encoder_block_out_channels 3",
        ),
        (
            {"encoder_layers_per_block": [1] * 4},
            "encoder_layers_per_block has 4 stages, encoder_block_out_channels 3",
        ),
        (
            {"encoder_qkv_multiscales": [[5]]},
            "encoder_qkv_multiscales has 1 stages, encoder_block_out_channels 3",
        ),
        (
            {"decoder_norm_types": ["rms_norm"]},
            "decoder_norm_types has 1 stages, encoder_block_out_channels 3",
        ),
        (
            {"encoder_layers_per_block": (1, 0, 1)},
            f"encoder_layers_per_block [1, 0, 1]: {ONLY_ENDS}",
        ),
        (
            {"decoder_layers_per_block": (0, 0, 1)},
            f"decoder_layers_per_block [0, 0, 1]: {ONLY_ENDS}",
        ),
        (
            {"attention_head_dim": 64},
            "encoder_block_out_channels 32 is below attention_head_dim 64: an EfficientViTBlock "
            "of that width has no heads",
        ),
        (
            {"encoder_block_out_channels": (16, 24, 32)},
            "encoder_block_out_channels goes from 16 to 24: the latter does not divide 4 x 16, "
            "as the shortcut between the stages needs",
        ),
        (
            {"decoder_block_out_channels": (16, 128, 128)},
            "decoder_block_out_channels goes from 16 to 128: the latter does not divide 4 x 16, "
            "as the shortcut between the stages needs",
        ),
        (
            {
                "downsample_block_type": "pixel_unshuffle",
                "encoder_block_out_channels": (5, 10, 40),
            },
            "encoder_block_out_channels 10 is no multiple of 4, as downsample_block_type "
            "'pixel_unshuffle' needs",
        ),
        (
            {"latent_channels": 5},
            "latent_channels 5 does not divide encoder_block_out_channels 32, as "
            "encoder_out_shortcut needs",
        ),
        (
            {"latent_channels": 64, "encoder_out_shortcut": False},
            "latent_channels 64 does not divide decoder_block_out_channels 32, as "
            "decoder_in_shortcut needs",
        ),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(ValueError) as refusal:
        settings_from_config(CONFIGS["sana"] | change)
    assert str(refusal.value) == message


def test_a_single_stage_needs_blocks():
    one = {
        "encoder_block_out_channels": [32],
        "decoder_block_out_channels": [32],
        "encoder_layers_per_block": [1],
        "decoder_layers_per_block": [1],
        "encoder_qkv_multiscales": [[]],
        "decoder_qkv_multiscales": [[]],
    }
    assert module_of(settings_from_config(one)).downsampling == 1
    with pytest.raises(ValueError) as refusal:
        settings_from_config(one | {"encoder_layers_per_block": [0]})
    assert str(refusal.value) == f"encoder_layers_per_block [0]: {ONLY_ENDS}"


def test_the_scale_is_the_files_or_diffusers():
    assert (settings_of("sana").scale, settings_of("sana").shift) == (0.41407, 0.0)
    for config in ({}, {"_class_name": "AutoencoderDC", "scaling_factor": None}):
        assert settings_from_config(config).scale == 1.0


def test_names_of_one_kind_may_stand_for_every_stage():
    named = {
        "encoder_block_types": RES,
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
    }
    listed = {key: [value] * 3 for key, value in named.items()}
    assert settings_from_config(CONFIGS["sana"] | named) == settings_from_config(
        CONFIGS["sana"] | listed
    )
