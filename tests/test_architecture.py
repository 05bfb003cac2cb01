"""What a network is, read off the names and shapes of its weights; what is none is refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import config as config_lib
from mdt_jax.convert import diffusers_dit
from mdt_jax.convert.architecture import (
    BUFFER,
    Architecture,
    UnknownWeights,
    identify,
    parameter_shapes,
    state_dict_shapes,
)
from mdt_jax.models import create_model, model_names
from mdt_jax.models.positions import sincos_position_table
from mdt_jax.weights import descriptions, pretrained


def make(family, **changes):
    """A small network; sizes that weights show, unless changed."""
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "depth": 4}
    sizes |= {"num_heads": 4, "decoder_depth": 0 if family == "DiT" else 2, "mlp_ratio": 4.0}
    sizes |= {"num_classes": 10, "null_class": True, "learn_variance": True}
    return Architecture(family=family, **sizes | changes)


def published(name, **changes):
    """The architecture of a published name at 32 × 32 × 4 latents of 1000 classes."""
    a = descriptions.architecture_of(create_model(name))
    return dataclasses.replace(a, **changes)


def hints(a):
    """What the weights do not show."""
    shown = {"decode_layers": a.decoder_depth} if a.family == "MDT" else {}
    return shown | ({"num_heads": a.num_heads} if a.family == "DiT" else {})


VARIANTS = {
    "MDT": make("MDT"),
    "MDTv2": make("MDTv2"),
    "DiT": make("DiT"),
    "patch_4": make("MDT", input_size=32, patch_size=4),
    "patch_8": make("DiT", input_size=32, patch_size=8),
    "unconditional_MDT": make("MDT", num_classes=0),
    "unconditional_MDTv2": make("MDTv2", num_classes=0),
    "unconditional_DiT": make("DiT", num_classes=0),
    "no_null_row": make("MDTv2", num_classes=1000, null_class=False),
    "imagenet": make("DiT", num_classes=1000),
    "MDT_decoder_1": make("MDT", decoder_depth=1),
    "MDT_decoder_3": make("MDT", decoder_depth=3),
    "MDTv2_decoder_4": make("MDTv2", depth=12, decoder_depth=4),
    "MDTv2_decoder_6": make("MDTv2", depth=12, decoder_depth=6),
    "DiT_width_384": make("DiT", hidden_size=384, num_heads=6),
    "fixed_variance": make("MDT", learn_variance=False),
    "pixels": make("MDTv2", in_channels=3),
    "grey_pixels_fixed_variance": make("DiT", in_channels=1, learn_variance=False),
    "mlp_ratio_2": make("MDTv2", mlp_ratio=2.0),
    "grid_of_one": make("MDT", input_size=2),
    "odd_grid": make("MDT", input_size=10),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_is_known_by_its_shapes(variant):
    a = VARIANTS[variant]
    assert identify(state_dict_shapes(a), **hints(a)) == a


@pytest.mark.parametrize("variant", VARIANTS)
def test_buffers_may_be_missing_and_names_in_any_order(variant):
    a = VARIANTS[variant]
    shapes = dict(reversed(parameter_shapes(a).items()))
    assert identify(shapes, **hints(a)) == a


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_of_an_architecture_makes_that_network(variant):
    config = descriptions.create_config(VARIANTS[variant])
    config_lib.from_json(json.loads(json.dumps(config_lib.to_json(config))))
    assert descriptions.architecture_of(config_lib.create_network(config)) == VARIANTS[variant]


@pytest.mark.torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_order_and_shapes_are_those_of_a_state_dict(variant):
    pytest.importorskip("torch")
    import torch_models

    a = VARIANTS[variant]
    model = torch_models.build(a)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(state.items()) == list(state_dict_shapes(a).items())
    assert [name for name, _ in model.named_parameters()] == list(parameter_shapes(a))


@pytest.mark.parametrize("name", model_names())
def test_published_sizes_get_their_names(name):
    a = published(name)
    # DiT's widths tell its heads; an S/2 of the second version may have 6 decoder blocks.
    found = identify(state_dict_shapes(a), num_classes=1000)
    assert found == a and found.name == name
    assert descriptions.architecture_of(create_model(name, **found.settings())) == a


def test_what_is_of_no_published_size_has_its_familys_name():
    changes = ({"mlp_ratio": 2.0}, {"depth": 30}, {"num_heads": 8}, {"patch_size": 4})
    for change in changes:
        assert published("MDTv2-XL/2", **change).name == "MDTv2"
    assert published("MDTv2-S/2", decoder_depth=6).name == "MDTv2-S/2"


@pytest.mark.parametrize(
    ("name", "count"),
    [("MDT-XL/2", 699_778_144), ("MDTv2-XL/2", 742_263_904), ("DiT-XL/2", 674_834_720)],
)
def test_trainable_parameters_are_as_many_as_the_authors(name, count):
    shapes = parameter_shapes(published(name))
    if name.startswith("DiT"):  # its position table is fixed
        del shapes["pos_embed"]
    assert sum(map(math.prod, shapes.values())) == count


@pytest.mark.parametrize(
    ("rows", "num_classes", "expected"),
    [
        (1, None, (0, True)),
        (2, None, (1, True)),
        (11, None, (10, True)),
        (1000, None, (1000, False)),
        (1001, None, (1000, True)),
        (1000, 999, (999, True)),
        (1000, 1000, (1000, False)),
        (1001, 1001, (1001, False)),
        (11, 11, (11, False)),
        (11, 10, (10, True)),
    ],
)
def test_the_last_label_row_is_the_null_class_unless_told_otherwise(rows, num_classes, expected):
    shapes = state_dict_shapes(make("MDTv2"))
    shapes["y_embedder.embedding_table.weight"] = (rows, 24)
    a = identify(shapes, num_classes=num_classes)
    assert (a.num_classes, a.null_class) == expected


def test_heads_given_for_a_dit_replace_those_of_its_width():
    a = make("DiT", hidden_size=384, num_heads=12)
    assert identify(state_dict_shapes(a)).num_heads == 6
    assert identify(state_dict_shapes(a), num_heads=12) == a


# ---- Refusals ----------------------------------------------------------------------------------


def refusal(shapes, **options):
    """The one line of UnknownWeights that identifying ends in."""
    with pytest.raises(UnknownWeights) as caught:
        identify(shapes, **options)
    (line,) = str(caught.value).splitlines()
    return line


def test_a_missing_weight_is_named_with_the_nearest_there():
    shapes = state_dict_shapes(make("MDTv2"))
    shapes["en_outblocks.0.skip_linear.wait"] = shapes.pop("en_outblocks.0.skip_linear.weight")
    line = refusal(shapes)
    assert line.startswith("en_outblocks.0.skip_linear.weight (24, 48) of MDTv2 is missing")
    assert line.endswith("the nearest there is en_outblocks.0.skip_linear.wait")


@pytest.mark.parametrize(
    "name",
    ["pos_embed", "x_embedder.proj.weight", "final_layer.linear.bias",
     "y_embedder.embedding_table.weight", "en_inblocks.0.mlp.fc1.bias",
     "en_inblocks.0.attn.rel_pos_bias.relative_position_bias_table", "de_blocks.1.attn.qkv.weight",
     "en_inblocks.0.attn.qkv.bias", "sideblocks.0.mlp.fc2.weight", "mask_token"],
)  # fmt: skip
def test_any_missing_weight_is_named(name):
    shapes = state_dict_shapes(make("MDTv2"))
    del shapes[name]
    line = refusal(shapes)
    assert line.startswith(name) and "is missing" in line


def test_more_missing_weights_are_counted():
    shapes = state_dict_shapes(make("MDT"))
    lost = [name for name in shapes if name.startswith("sideblocks") and BUFFER not in name]
    for name in lost:
        del shapes[name]
    assert f"{lost[0]} (72, 24) of MDT is missing (and {len(lost) - 1} more)" in refusal(shapes)


def test_a_block_missing_in_the_middle_is_named():
    shapes = {k: v for k, v in state_dict_shapes(make("MDT")).items() if "blocks.1." not in k}
    assert refusal(shapes).startswith("blocks.1.attn.qkv.weight")


def test_an_unknown_weight_is_named_with_the_nearest_expected():
    shapes = state_dict_shapes(make("MDT")) | {"blocks.0.mlp.fc3.weight": (24, 24)}
    line = refusal(shapes)
    assert line.startswith("blocks.0.mlp.fc3.weight (24, 24) is no weight of MDT;")
    assert "the nearest expected is blocks.0.mlp.fc" in line


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.3.attn.qkv.weight", (24, 24)),
        ("decoder_pos_embed", (1, 25, 24)),
        ("blocks.1.attn.rel_pos_bias.relative_position_bias_table", (52, 2)),
        (f"sideblocks.0.attn.rel_pos_bias.{BUFFER}", (16, 9)),
        ("final_layer.linear.weight", (32, 25)),
    ],
)
def test_a_wrong_shape_is_named(name, shape):
    shapes = state_dict_shapes(make("MDT"))
    line = refusal(shapes | {name: shape})
    assert line == f"{name} has shape {shape}; MDT has {shapes[name]}"


def test_by_a_wrong_size_of_the_whole_others_are_judged():
    shapes = state_dict_shapes(make("MDT"))
    line = refusal(shapes | {"pos_embed": (1, 16, 32)})
    assert line == "decoder_pos_embed has shape (1, 16, 24); MDT has (1, 16, 32)"
    line = refusal(shapes | {"final_layer.linear.bias": (33,)})
    assert line == "final_layer.linear.weight has shape (32, 24); MDT has (16, 24)"


def test_weights_of_too_many_axes_are_named():
    shapes = state_dict_shapes(make("DiT"))
    shapes["x_embedder.proj.weight"] = (24, 4, 2, 2, 2)
    line = refusal(shapes, num_heads=4)
    assert "x_embedder.proj.weight has shape (24, 4, 2, 2, 2), not 4 axes" in line
    shapes = state_dict_shapes(make("DiT")) | {"pos_embed": ()}
    assert "pos_embed has shape (), not 3 axes" in refusal(shapes, num_heads=4)


def test_tokens_that_are_no_square_are_refused():
    shapes = state_dict_shapes(make("MDT")) | {"pos_embed": (1, 15, 24)}
    assert "15 tokens are no square grid" in refusal(shapes)


def test_an_autoencoder_is_told_from_a_model():
    shapes = {"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_in.weight": (512, 4, 3, 3)}
    line = refusal(shapes)
    assert "not an MDT, MDTv2 or DiT" in line and "VAE" in line and "--vae" in line


def test_something_else_is_shown_by_its_first_names():
    line = refusal({"layer1.weight": (3,), "layer1.bias": (3,)})
    assert "layer1.weight, layer1.bias" in line and "no blocks.0 or en_inblocks.0" in line
    assert "not an MDT" in refusal({})


def test_a_dit_of_unknown_width_asks_for_its_heads():
    line = refusal(state_dict_shapes(make("DiT")))
    assert "width 24" in line and "--num_heads" in line and "1152: 16" in line


def test_heads_that_do_not_divide_the_width_are_refused():
    for heads in (5, -4):
        line = refusal(state_dict_shapes(make("DiT")), num_heads=heads)
        assert line == f"--num_heads {heads} does not divide the width 24"
    assert "heads 5" in refusal(state_dict_shapes(make("MDTv2", num_heads=5)))


@pytest.mark.parametrize("decode_layers", [-1, 0, 4, 5])
def test_a_decoder_deeper_than_an_mdt_is_refused(decode_layers):
    line = refusal(state_dict_shapes(make("MDT")), decode_layers=decode_layers)
    assert f"--decode_layers {decode_layers}: an MDT of 4 blocks has 1 to 3" in line


@pytest.mark.parametrize("num_classes", [-1, 9, 12, 1000])
def test_classes_that_the_table_cannot_have_are_refused(num_classes):
    line = refusal(state_dict_shapes(make("MDT")), num_classes=num_classes)
    assert f"--num_classes {num_classes}" in line and "11 rows" in line
    assert "10 with a null class or 11 without" in line


# ---- diffusers' DiT ----------------------------------------------------------------------------

BLOCKS, WIDTH, HEADS = 3, 16, 2


@pytest.fixture(scope="module")
def diffusers_model():
    """diffusers' DiT at random weights, one embedder in all blocks, as facebook/DiT-XL-2-256."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=BLOCKS,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-6,  # the authors'; the published config's 1e-5 is of one of three norms
    ).eval()
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # DiT's; diffusers has 1
    return model


@pytest.mark.torch
def test_diffusers_dit_computes_what_diffusers_computes(diffusers_model, tmp_path):
    import torch

    diffusers_model.save_pretrained(tmp_path)
    weights = pretrained.read_pretrained(tmp_path / "diffusion_pytorch_model.safetensors")
    assert weights.architecture == make(
        "DiT", hidden_size=WIDTH, depth=BLOCKS, num_heads=HEADS, num_classes=10
    )
    params = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, weights.params))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    t, labels = np.array([0, 500, 999]), np.array([0, 9, 10])  # the null class among them
    model = config_lib.create_network(weights.config)
    ours = jax.jit(model.apply)({"params": params}, x, t, labels)
    with torch.no_grad():
        inputs = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t)
        theirs = diffusers_model(*inputs, class_labels=torch.from_numpy(labels)).sample
    np.testing.assert_allclose(np.moveaxis(np.asarray(ours), -1, 1), theirs.numpy(), atol=1e-5)
    assert theirs.std() > 0.1


@pytest.mark.torch
def test_diffusers_pickle_holds_what_its_safetensors_file_does(diffusers_model, tmp_path):
    found = []
    for safe, ending in ((True, "safetensors"), (False, "bin")):
        diffusers_model.save_pretrained(tmp_path, safe_serialization=safe)
        weights = pretrained.read_pretrained(tmp_path / f"diffusion_pytorch_model.{ending}")
        found.append(jax.tree.map(np.asarray, weights.params))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.torch
def test_diffusers_embedders_that_differ_are_refused(diffusers_model, tmp_path):
    import torch

    state = diffusers_model.state_dict()
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"
    torch.save(state | {name: state[name] + 1}, tmp_path / "a.pt")
    with pytest.raises(UnknownWeights) as caught:
        pretrained.read_pretrained(tmp_path / "a.pt", num_heads=HEADS)
    assert f"{name} differs from {name.replace('.2.', '.0.', 1)}" in str(caught.value)


@pytest.mark.torch
def test_a_missing_weight_of_diffusers_is_named(diffusers_model, tmp_path):
    import torch

    state = diffusers_model.state_dict()
    del state["transformer_blocks.1.attn1.to_k.bias"]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UnknownWeights, match=r"transformer_blocks\.1\.attn1\.to_k\.bias .*missing"):
        pretrained.read_pretrained(tmp_path / "a.pt", num_heads=HEADS)


@pytest.mark.torch
def test_without_a_config_beside_it_diffusers_heads_must_be_given(diffusers_model, tmp_path):
    import torch

    torch.save(diffusers_model.state_dict(), tmp_path / "a.pt")
    with pytest.raises(UnknownWeights, match="--num_heads"):
        pretrained.read_pretrained(tmp_path / "a.pt")
    assert (
        pretrained.read_pretrained(tmp_path / "a.pt", num_heads=HEADS).architecture.num_heads
        == HEADS
    )


def test_diffusers_names_cover_every_weight_of_a_dit_but_its_position_table():
    names = set(parameter_shapes(make("DiT"))) - {"pos_embed"}
    assert set(diffusers_dit.sources(4)) == names


@pytest.mark.torch
def test_the_position_table_that_diffusers_does_not_store_is_its_own(diffusers_model):
    table = diffusers_model.pos_embed.pos_embed.numpy()[0]
    np.testing.assert_allclose(table, sincos_position_table(WIDTH, 4), atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "like", "said"),
    [
        ("0.attn2.to_q.weight", "proj_out_2.bias", r"no weight of diffusers' DiT; the nearest"),
        ("1.attn1.to_k.bias", "proj_out_2.bias", r"to_k\.bias has shape .*to_q\.bias has"),
    ],
    ids=["unknown", "shape"],
)
def test_other_weights_in_diffusers_layout_are_refused(diffusers_model, name, like, said, tmp_path):
    import torch

    state = diffusers_model.state_dict()
    state[f"transformer_blocks.{name}"] = state[like]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UnknownWeights, match=said):
        pretrained.read_pretrained(tmp_path / "a.pt")


@pytest.mark.torch
@pytest.mark.parametrize("value", ["8", [8], 0])
def test_a_garbled_config_of_diffusers_is_refused(diffusers_model, value, tmp_path):
    diffusers_model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"sample_size": value}))
    with pytest.raises(UnknownWeights, match="sample_size .* not a positive number"):
        pretrained.read_pretrained(next(tmp_path.glob("*.safetensors")))


@pytest.mark.torch
def test_the_size_of_diffusers_latents_can_be_given(diffusers_model, tmp_path):
    import torch

    torch.save(diffusers_model.state_dict(), tmp_path / "a.pt")
    _, found = pretrained.open_weights(tmp_path / "a.pt", num_heads=HEADS, input_size=64)
    assert found.input_size == 64


def test_an_unconditional_model_has_its_null_row_whatever_it_was_told():
    a = make("MDT", num_classes=0)
    for null_class in (True, False):
        settings = a.settings() | {"null_class": null_class}
        assert descriptions.architecture_of(create_model(a.family, **settings)) == a
