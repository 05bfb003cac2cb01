"""Parameters fitted to another network: resampled, re-drawn, re-split, refused; the rest as is."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fixtures import FAMILIES, reference, relative_error
from flax import linen as nn

from mdt_jax.convert.adapt import adapt, resize_position_table, resize_relative_bias
from mdt_jax.convert.architecture import Architecture
from mdt_jax.models import create_model
from mdt_jax.models.positions import relative_position_index

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
GRID_PAIRS = [(4, 8), (8, 4), (4, 6), (6, 4), (5, 7), (7, 5), (2, 16), (3, 3), (2, 1)]
WIDTH = 8


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def torch_bicubic(table, new, **settings):
    """torch's interpolation of a position table, a 1 × width × G × G picture to it."""
    torch = pytest.importorskip("torch")
    old = round(len(table) ** 0.5)
    picture = torch.from_numpy(table.T.reshape(1, -1, old, old).copy())
    settings = {"align_corners": False} | settings
    out = torch.nn.functional.interpolate(picture, size=(new, new), mode="bicubic", **settings)
    return out.numpy().reshape(table.shape[1], -1).T


@pytest.mark.torch
@pytest.mark.parametrize(("old", "new"), [*GRID_PAIRS, (1, 4), (16, 32), (32, 16), (9, 4)])
def test_position_tables_are_resized_as_torch_does(old, new):
    table = random(old**2, WIDTH)
    resized = resize_position_table(table, new)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, torch_bicubic(table, new), atol=1e-5)


@pytest.mark.torch
def test_the_comparison_with_torch_would_notice_other_rules():
    table = random(64, WIDTH)
    for new, other in ((16, {"align_corners": True}), (4, {"antialias": True})):
        difference = resize_position_table(table, new) - torch_bicubic(table, new, **other)
        assert np.abs(difference).max() > 1e-3
    swapped = table.reshape(8, 8, WIDTH).swapaxes(0, 1).reshape(64, WIDTH)
    assert np.abs(resize_position_table(swapped, 16) - torch_bicubic(table, 16)).max() > 1e-3


def linear_bias(grid, row, column, constant=0.0):
    """A table of row·Δr + column·Δc + constant, (…, rows, heads), the slopes (…, heads)."""
    offsets = np.arange(1 - grid, grid, dtype=np.float64)
    dr, dc = (x.ravel()[:, None] for x in np.meshgrid(offsets, offsets, indexing="ij"))
    table = row[..., None, :] * dr + column[..., None, :] * dc + constant
    unused = np.broadcast_to([[7.0], [8.0], [9.0]], (*row.shape[:-1], 3, row.shape[-1]))
    return np.concatenate([table, unused], axis=-2).astype(np.float32)


@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize(("old", "new"), GRID_PAIRS)
def test_a_bias_linear_in_the_offset_stays_linear(old, new, layers):
    row, column = random(*layers, 4), random(*layers, 4, seed=1)
    resized = resize_relative_bias(linear_bias(old, row, column, 0.5), new)
    ratio = old / new
    expected = linear_bias(new, row * ratio, column * ratio, 0.5)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, atol=1e-5)
    if old != new and new > 1:  # slopes are told apart, and scaled
        assert np.abs(resized - linear_bias(new, column * ratio, row * ratio, 0.5)).max() > 1e-2
        assert np.abs(resized - linear_bias(new, row, column, 0.5)).max() > 1e-2


@pytest.mark.parametrize(("old", "new"), [*GRID_PAIRS, (1, 4)])
def test_the_bias_at_offset_0_and_the_unused_rows_keep_their_bits(old, new):
    table = random(2, (2 * old - 1) ** 2 + 3, 4)
    resized = resize_relative_bias(table, new)
    middle = [relative_position_index(grid)[0, 0] for grid in (old, new)]
    assert np.array_equal(resized[:, middle[1]], table[:, middle[0]])
    assert np.array_equal(resized[:, -3:], table[:, -3:])


def test_on_a_doubled_grid_every_other_offset_is_an_old_one():
    table = random((2 * 4 - 1) ** 2 + 3, 2)
    old = table[relative_position_index(4)].reshape(4, 4, 4, 4, 2)
    new = resize_relative_bias(table, 8)[relative_position_index(8)].reshape(8, 8, 8, 8, 2)
    np.testing.assert_allclose(new[::2, ::2, ::2, ::2], old, atol=1e-6)


def test_a_bias_of_one_token_becomes_the_same_for_all():
    table = random(4, 2)
    resized = resize_relative_bias(table, 3)
    assert np.array_equal(resized[:-3], np.broadcast_to(table[:1], (25, 2)))


def test_a_bias_of_the_same_grid_is_not_changed():
    table = random(2, 52, 4)
    assert np.array_equal(resize_relative_bias(table, 4), table)


def test_tables_of_no_square_grid_are_refused():
    with pytest.raises(ValueError, match="position table of 15 rows"):
        resize_position_table(random(15, 4), 3)
    for rows in (50, 4**2 + 3):  # no square; of an even number of offsets
        with pytest.raises(ValueError, match=f"bias table of {rows} rows"):
            resize_relative_bias(random(rows, 4), 3)


def architecture(r, **changes):
    """The `Architecture` of a fixture, with changes."""
    s = r.settings
    sizes = {k: s[k] for k in ("input_size", "patch_size", "in_channels", "hidden_size")}
    sizes |= {k: s[k] for k in ("depth", "num_heads", "num_classes")}
    return Architecture(
        **{
            "family": r.family,
            **sizes,
            "decoder_depth": s.get("decode_layer", 0),
            "mlp_ratio": 4.0,
            "null_class": True,
            "learn_variance": True,
            **changes,
        }
    )


def source(r):
    return jax.tree.map(np.asarray, r.tree("param/"))


def target_shapes(want):
    """What the model itself would initialise, as shapes."""
    model = create_model(want.family, **want.settings())
    x = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), x, t, t))["params"]


def at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


class Fresh:
    """Draws a target's parameters, and remembers which were asked for."""

    def __init__(self, want):
        self.shapes, self.paths = target_shapes(want), []

    def __call__(self, path):
        self.paths.append(path)
        return random(*at(self.shapes, path).shape, seed=len(path))


def nothing_is_drawn(path):
    raise AssertionError(f"{path} was drawn")


def fit(name, **changes):
    """A fixture's parameters, the adapted ones, the report, and what was drawn for them."""
    r = reference(name)
    want = architecture(r, **changes)
    before, fresh = source(r), Fresh(want)
    after, report = adapt(before, architecture(r), want, fresh)
    return before, after, report, fresh


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


CHANGES = {
    "larger": {"input_size": 12, "num_classes": 3},
    "smaller": {"input_size": 2, "num_classes": 0},
    "coarser patches": {"patch_size": 4},
    "same grid": {"input_size": 16, "patch_size": 4},
    "fixed variance": {"learn_variance": False, "null_class": False},
    "other channels": {"in_channels": 3},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("change", CHANGES)
def test_the_tree_has_the_target_structure_and_shapes(name, change):
    _, params, report, fresh = fit(name, **CHANGES[change])
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh.shapes)
    named = [path for path, _ in report.loaded + report.resized + report.redrawn + report.left]
    assert len(named) == len(set(named)) == len(jax.tree.leaves(params))
    assert set(fresh.paths) <= {path for path, _ in report.redrawn}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_network_gets_the_very_arrays(name):
    r = reference(name)
    params, same = source(r), architecture(r)
    fitted, report = adapt(params, same, same, nothing_is_drawn)
    assert jax.tree.structure(fitted) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (fitted, params)), strict=True))
    assert str(report) == f"loaded    {len(jax.tree.leaves(params))} arrays unchanged"


@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_depends_on_the_grid_is_resized(name):
    before, after, report, fresh = fit(name, input_size=12)
    resized = {path for path, _ in report.resized}
    tables = {"pos_embed"} if name == "dit" else {"pos_embed", "decoder_pos_embed"}
    assert {path for path in resized if "relative_bias" not in path} == tables
    stacks = {"mdt_v1": 3, "mdt_v2": 4, "dit": 0}[name]  # the side block's among them
    assert sum("relative_bias" in path for path in resized) == stacks
    assert all(at(after, path) is at(before, path) for path, _ in report.loaded)
    assert len(report.loaded) == len(jax.tree.leaves(before)) - len(resized)
    assert fresh.paths == []
    for path in resized:
        resize = resize_relative_bias if "relative_bias" in path else resize_position_table
        assert np.array_equal(at(after, path), resize(at(before, path), 6))


def test_patches_that_keep_the_grid_keep_its_tables():
    before, after, report, _ = fit("mdt_v2", input_size=16, patch_size=4)
    assert report.resized == []
    assert after["pos_embed"] is before["pos_embed"]
    assert {path for path, _ in report.redrawn} == {
        "patch_embed/proj/kernel",
        "patch_embed/proj/bias",
        "final_layer/linear/kernel",
        "final_layer/linear/bias",
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "classes", [(10, 3), (3, 10), (10, 0), (0, 10)], ids=lambda c: f"{c[0]} to {c[1]}"
)
def test_the_null_row_survives_other_classes_bit_for_bit(dtype, classes):
    old, new = classes
    r = reference("dit")
    params = source(r) | {"label_embed": random(old + 1, 32, seed=3).astype(dtype)}
    want = architecture(r, num_classes=new)
    fresh = Fresh(want)
    fitted, report = adapt(params, architecture(r, num_classes=old), want, fresh)
    table = fitted["label_embed"]
    assert table.shape == (new + 1, 32) and table.dtype == dtype
    assert np.array_equal(bits(table[-1]), bits(params["label_embed"][-1]))
    assert np.array_equal(bits(table[:-1]), bits(fresh("label_embed")[:-1].astype(dtype)))
    assert not (table[:-1] == params["label_embed"][-1]).all(axis=1).any()
    assert len(report.redrawn) == (new > 0) and len(report.left) == (new == 0)


@pytest.mark.parametrize("classes", [10, 3, 0])
def test_a_null_row_the_weights_lack_is_drawn(classes):
    r = reference("dit")
    params = source(r) | {"label_embed": random(10, 32)}
    want = architecture(r, num_classes=classes)
    fresh = Fresh(want)
    fitted, report = adapt(params, architecture(r, null_class=False), want, fresh)
    table = fitted["label_embed"]
    assert np.array_equal(table[-1], fresh("label_embed")[-1])
    kept = params["label_embed"] if classes == 10 else fresh("label_embed")[:-1]
    assert np.array_equal(table[:-1], kept)
    assert "null row re-drawn, the weights have none" in str(report)


def test_a_null_row_the_model_lacks_is_left():
    before, after, report, fresh = fit("dit", null_class=False)
    assert np.array_equal(after["label_embed"], before["label_embed"][:-1])
    assert "label_embed: (11, 32) -> (10, 32), class rows kept, null row left" in str(report)
    assert fresh.paths == []


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_is_resized_in_float32_and_kept_elsewhere(dtype):
    r = reference("mdt_v1")
    params = jax.tree.map(lambda a: a.astype(dtype), source(r))
    fitted, report = adapt(
        params, architecture(r), architecture(r, input_size=12), nothing_is_drawn
    )
    for path, _ in report.resized:
        assert at(fitted, path).dtype == np.float32
    for path, _ in report.loaded:
        assert at(fitted, path) is at(params, path)
    widened = params["pos_embed"].astype(np.float32)
    assert np.array_equal(fitted["pos_embed"], resize_position_table(widened, 6))


@pytest.mark.parametrize("decoder_depth", [1, 3])
def test_mdt_v1_is_cut_at_another_block(decoder_depth):
    before, after, report, _ = fit("mdt_v1", decoder_depth=decoder_depth)
    whole, cut = (
        jax.tree.map(lambda a, b: np.concatenate([a, b]), p["encoder_blocks"], p["decoder_blocks"])
        for p in (before, after)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, cut))
    assert len(after["decoder_blocks"]["layers"]["attn"]["relative_bias"]) == decoder_depth
    assert f"2 + 2 -> {4 - decoder_depth} + {decoder_depth} blocks, all of them kept" in str(report)


def test_a_cut_elsewhere_is_the_same_function_but_for_where_positions_are_added():
    r = reference("mdt_v1")
    before, after, _, _ = fit("mdt_v1", decoder_depth=1)
    positions = before["decoder_pos_embed"]
    outputs = []
    for decoder_depth, params in ((2, before), (1, after)):
        model, params = r.model(decoder_depth=decoder_depth), jax.tree.map(jnp.asarray, params)

        @jax.jit
        def output(table, model=model, params=params):
            params = params | {"decoder_pos_embed": table}
            return model.apply({"params": params}, r.nhwc("in/x"), r["in/t"], r["in/y"])

        outputs.append([output(table) for table in (np.zeros_like(positions), positions)])
    (without, with_positions), (cut_without, cut_with) = outputs
    assert relative_error(cut_without, without) < 1e-5
    assert relative_error(cut_with, with_positions) > 1e-3


@pytest.mark.parametrize("learned", [True, False])
def test_outputs_of_the_mean_are_kept_when_those_of_the_variance_come_or_go(learned):
    r = reference("dit")
    want = architecture(r, learn_variance=not learned)
    have, fresh = architecture(r, learn_variance=learned), Fresh(want)
    params = source(r)
    if not learned:
        params["final_layer"]["linear"] = {"kernel": random(32, 16), "bias": random(16)}
    fitted, report = adapt(params, have, want, fresh)
    for leaf in ("kernel", "bias"):
        path = f"final_layer/linear/{leaf}"
        old = at(params, path).reshape(-1, 2, 2, 8 if learned else 4)
        new = at(fitted, path).reshape(-1, 2, 2, 4 if learned else 8)
        assert np.array_equal(new[..., :4], old[..., :4])
        if not learned:
            assert np.array_equal(new[..., 4:], fresh(path).reshape(new.shape)[..., 4:])
    assert {path for path, _ in (report.left if learned else report.redrawn)} == {
        "final_layer/linear/kernel",
        "final_layer/linear/bias",
    }


def test_the_report_names_all_that_is_not_as_it_was():
    _, _, report, _ = fit("mdt_v1", input_size=16, num_classes=3, decoder_depth=1, in_channels=3)
    positions = "(16, 32) -> (64, 32), grid 4 x 4 -> 8 x 8, bicubic"
    bias = "grid 4 x 4 -> 8 x 8, linear in the offset"
    channels = "in_channels 4 -> 3"
    first, *lines = str(report).splitlines()
    assert first == "loaded    37 arrays unchanged"
    assert set(lines) == {
        "re-split  encoder_blocks, decoder_blocks: 2 + 2 -> 3 + 1 blocks, all of them kept, "
        "decoder_depth 2 -> 1",
        f"resized   pos_embed: {positions}",
        f"resized   decoder_pos_embed: {positions}",
        f"resized   encoder_blocks/layers/attn/relative_bias: (3, 52, 4) -> (3, 228, 4), {bias}",
        f"resized   decoder_blocks/layers/attn/relative_bias: (1, 52, 4) -> (1, 228, 4), {bias}",
        f"resized   side_block/attn/relative_bias: (52, 4) -> (228, 4), {bias}",
        "re-drawn  label_embed: (11, 32) -> (4, 32), num_classes 10 -> 3, class rows re-drawn, "
        "null row kept",
        f"re-drawn  patch_embed/proj/kernel: (2, 2, 4, 32) -> (2, 2, 3, 32), {channels}",
        f"re-drawn  patch_embed/proj/bias: {channels}",
        f"re-drawn  final_layer/linear/kernel: (32, 32) -> (32, 24), {channels}",
        f"re-drawn  final_layer/linear/bias: (32,) -> (24,), {channels}",
    }


REFUSED = {
    "hidden_size": ("mdt_v1", {"hidden_size": 64}, "32 in the weights and 64 in the model"),
    "depth": ("mdt_v1", {"depth": 6}, "4 in the weights and 6 in the model"),
    "num_heads": ("dit", {"num_heads": 8}, "4 in the weights and 8 in the model"),
    "mlp_ratio": ("dit", {"mlp_ratio": 2.0}, "4.0 in the weights and 2.0 in the model"),
    "family": ("mdt_v1", {"family": "MDTv2"}, "MDT in the weights and MDTv2 in the model"),
    "decoder_depth": ("mdt_v2", {"decoder_depth": 4}, "2 in the weights and 4.*shortcuts"),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_other_networks_are_refused_in_a_line(setting):
    name, changes, message = REFUSED[setting]
    r = reference(name)
    have, want = architecture(r), architecture(r, **changes)
    with pytest.raises(ValueError, match=f"^{setting} is {message}") as error:
        adapt(source(r), have, want, nothing_is_drawn)
    way_out = f"set the model's {setting} to {getattr(have, setting)}, or start from weights of "
    assert way_out + f"{setting} {getattr(want, setting)}" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_mlp_ratio_of_the_same_width_is_the_same():
    r = reference("dit")
    have, want = architecture(r), architecture(r, mlp_ratio=4.01)
    assert int(want.hidden_size * want.mlp_ratio) == 128
    fitted, _ = adapt(source(r), have, want, nothing_is_drawn)
    assert fitted["pos_embed"].shape == (16, 32)


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("label_embed", (10, 32), "label_embed has 10 rows.* 10 classes and the null class"),
        ("pos_embed", (25, 32), "pos_embed has 25 rows, not the 16 of 4 x 4 tokens"),
    ],
)
def test_tables_of_another_network_than_described_are_named(path, shape, message):
    r = reference("dit")
    have = architecture(r)
    with pytest.raises(ValueError, match=message):
        adapt(source(r) | {path: random(*shape)}, have, have, nothing_is_drawn)
