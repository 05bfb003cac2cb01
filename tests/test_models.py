"""The models compute the authors' function: outputs, gradients, initialisation, sizes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import FAMILIES, reference, relative_error
from flax import linen as nn

from mdt_jax.convert.transformers import from_torch, to_torch
from mdt_jax.models import Pass, base, create_model, layers, model_names
from mdt_jax.models.passes import over_tokens
from mdt_jax.parallel import sharding

MASKED = ("mdt_v1", "mdt_v2")


def forward(r, params, *extra, **overrides):
    return r.model(**overrides).apply(
        {"params": params}, r.nhwc("in/x"), r["in/t"], r["in/y"], *extra
    )


@pytest.mark.smoke
@pytest.mark.parametrize("name", FAMILIES)
def test_full_pass_equals_the_authors(name):
    r = reference(name)
    assert relative_error(forward(r, r.tree("param/")), r.nhwc("out/eval")) < 1e-5


@pytest.mark.smoke
@pytest.mark.parametrize("name", MASKED)
def test_masked_pass_equals_the_authors(name):
    r = reference(name)
    out = forward(r, r.tree("param/"), r["mask/ids_keep"])
    assert relative_error(out, r.nhwc("out/masked")) < 1e-5


@pytest.mark.smoke
@pytest.mark.parametrize("name", FAMILIES)
def test_passes_side_by_side_are_the_authors(name):
    """Other noise, timesteps and labels in each pass, which no two samples share."""
    r = reference(name)
    x, t, labels = r.nhwc("in/x"), r["in/t"], r["in/y"]
    ids, masked = (r["mask/ids_keep"], "out/masked") if r.masks else (None, "out/eval")
    reverse = [a[::-1] for a in (x, t, labels)]
    passes = Pass(x, t, labels, ids), Pass(*reverse)
    first, second = r.model().apply({"params": r.tree("param/")}, passes, method="run")
    assert relative_error(first, r.nhwc(masked)) < 1e-5
    assert relative_error(second[::-1], r.nhwc("out/eval")) < 1e-5


@pytest.mark.parametrize("mesh_shape", [None, (2, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_passes_side_by_side_are_those_apart(name, mesh_shape):
    """Outputs and gradients, with a mesh that divides the batch and without."""
    r, rng = reference(name), np.random.default_rng(0)
    model, params = r.model(), r.tree("param/")
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    kept = jnp.argsort(draw(16, model.num_tokens))[:, :7] if r.masks else None
    passes = [
        Pass(
            draw(16, *model.image_shape),
            jnp.asarray(rng.integers(0, 1000, 16)),
            jnp.asarray(rng.integers(0, model.num_classes, 16)),
            ids,
        )
        for ids in (None, kept)
    ]
    along = draw(2, *jax.eval_shape(lambda: model.apply({"params": params}, *passes[0])).shape)

    def apart(params):
        return jnp.stack([model.apply({"params": params}, *one) for one in passes])

    def side_by_side(params):
        return jnp.stack(model.apply({"params": params}, passes, method="run"))

    def through(function):
        out, pull = jax.vjp(function, params)
        return out, *pull(along)

    mesh = sharding.create_mesh(*mesh_shape) if mesh_shape else None
    with sharding.activations(mesh) if mesh else contextlib.nullcontext():
        found = jax.jit(lambda: through(side_by_side))()
    for a, e in zip(*map(jax.tree.leaves, (found, through(apart))), strict=True):
        assert np.linalg.norm(a - e) <= 1e-5 * np.linalg.norm(e)  # 0 of a table that is frozen


def test_two_masked_passes_are_refused():
    r = reference("mdt_v2")
    masked = Pass(r.nhwc("in/x"), r["in/t"], r["in/y"], r["mask/ids_keep"])
    with pytest.raises(ValueError, match="more than one masked pass"):
        r.model().apply({"params": r.tree("param/")}, (masked, masked), method="run")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_passes_become_one_batch_and_stay_on_their_devices(count):
    mesh = sharding.create_mesh(2, 4, 1)
    at = sharding.batch_sharding(mesh)
    arrays = [jax.device_put(jnp.arange(16) + 100 * i, at) for i in range(count)]

    @jax.jit
    def through(arrays):
        with sharding.activations(mesh):
            merged = base._as_one_batch(arrays)
            return merged, base._split_passes(merged, count)

    merged, back = through(arrays)
    for i, e in enumerate(arrays):
        np.testing.assert_array_equal(back[:, i], e)
    for shard in merged.addressable_shards:
        held = {int(x) for array in arrays for x in local(array, shard.device)}
        assert {int(x) for x in shard.data} == held


def local(x, device):
    """What a device holds of an array."""
    return next(shard.data for shard in x.addressable_shards if shard.device == device)


def test_each_pass_has_its_own_vector_at_its_tokens():
    v = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32))
    lengths = (2, 1, 3)
    out, pull = jax.vjp(lambda v: over_tokens(v, lengths), v)
    np.testing.assert_array_equal(out, np.repeat(v, lengths, axis=1))
    along = jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)
    _, expected = jax.vjp(lambda v: v[:, np.repeat(np.arange(3), lengths)], v)
    np.testing.assert_allclose(pull(along)[0], expected(along)[0], rtol=1e-6)


@pytest.mark.parametrize("name", MASKED)
def test_the_order_of_kept_tokens_does_not_matter(name):
    r = reference(name)
    out = forward(r, r.tree("param/"), jnp.sort(r["mask/ids_keep"], axis=1))
    assert relative_error(out, r.nhwc("out/masked")) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("setting", [{"scan_unroll": 2}, {"remat": "full"}, {"remat": "dots"}])
def test_remat_and_unrolling_change_neither_names_nor_outputs(name, setting):
    r = reference(name)
    args = (r.nhwc("in/x"), r["in/t"], r["in/y"])
    shapes = [jax.eval_shape(r.model(**s).init, jax.random.key(0), *args) for s in ({}, setting)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    assert relative_error(forward(r, r.tree("param/"), **setting), r.nhwc("out/eval")) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_keeps_the_parameters_and_stays_near(name):
    r = reference(name)
    error = relative_error(forward(r, r.tree("param/"), dtype=jnp.bfloat16), r.nhwc("out/eval"))
    assert 1e-5 < error < 3e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_come_back_from_our_names_bit_for_bit(name):
    r = reference(name)
    weights = to_torch(
        r.tree("param/"),
        family=r.family,
        depth=r.settings["depth"],
        decoder_depth=r.settings.get("decode_layer", 0),
    )
    theirs = {
        k.removeprefix("param/"): v
        for k, v in r.arrays.items()
        if k.startswith("param/") and not k.endswith("relative_position_index")
    }
    assert weights.keys() == theirs.keys()
    assert all(np.array_equal(weights[k], theirs[k]) for k in theirs)


def test_a_missing_weight_is_named():
    with pytest.raises(KeyError, match=r"blocks\.0\.attn\.qkv\.weight"):
        weights = {
            k.removeprefix("param/"): v
            for k, v in reference("dit").arrays.items()
            if k.startswith("param/") and k != "param/blocks.0.attn.qkv.weight"
        }
        from_torch(weights, family="DiT", depth=4, num_heads=4)


def test_layer_norm_epsilon_is_1e_6():
    # A row whose variance is as small as epsilon: 1e-5 instead would be off by a factor of 2.3.
    x = 1e-3 * jnp.array([[[1.0, -1.0, 1.0, -1.0]]])
    out = layers.layer_norm(x)
    np.testing.assert_allclose(out, x / np.sqrt(1e-6 + 1e-6), rtol=1e-5)


def test_gelu_is_the_tanh_form():
    x = jnp.linspace(-3, 3, 13)[None, None]
    identity = {"kernel": np.eye(13, dtype=np.float32), "bias": np.zeros(13, np.float32)}
    params = {"fc1": identity, "fc2": identity}
    out = layers.Mlp(1.0, layers.gelu, jnp.float32).apply({"params": params}, x).added()
    tanh_form = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(out, tanh_form, atol=1e-6)  # erf's form differs by 5e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_initial_position_tables_are_the_authors(name):
    r = reference(name)
    (params,) = inits(r.model(), 1)
    for table in ("pos_embed", "decoder_pos_embed")[: 2 if r.masks else 1]:
        np.testing.assert_allclose(params[table], r[f"init/{table}"][0], atol=1e-7)


def inits(model, num_seeds):
    """Initial parameters of some seeds, sharding names taken off."""
    x = jnp.zeros((1, *model.image_shape))
    labels = jnp.zeros(1, jnp.int32)
    init = jax.jit(lambda key: nn.unbox(model.init(key, x, labels, labels))["params"])
    return [init(jax.random.key(seed)) for seed in range(num_seeds)]


@pytest.mark.parametrize("name", FAMILIES)
def test_initial_statistics_agree_with_the_authors(name):
    r = reference(name)
    seeds = [
        to_torch(
            params,
            family=r.family,
            depth=r.settings["depth"],
            decoder_depth=r.settings.get("decode_layer", 0),
        )
        for params in inits(r.model(), 5)
    ]
    for weight, values in seeds[0].items():
        pooled = np.stack([s[weight] for s in seeds])
        mean, std, _ = r.arrays[f"init/stats/{weight}"]
        assert np.isfinite(pooled).all()
        if std == 0 or "pos_embed" in weight:
            assert np.array_equal(pooled[0], pooled[1]), weight
            assert pooled.std() == pytest.approx(std, abs=1e-6), weight
            continue
        assert not np.array_equal(pooled[0], pooled[1]), weight
        # Their one draw and our five have sampling errors of std/√n and about std/√(2n).
        n = values.size
        assert abs(pooled.mean() - mean) < 4 * std * np.sqrt(1.2 / n), weight
        assert abs(pooled.std() - std) < 4 * std * np.sqrt(1.2 / (2 * n)), weight


def test_initial_statistics_of_large_tensors_follow_the_rule_within_2_percent():
    """The authors' rule in closed form: Xavier over the fused matrices, N(0, 0.02), zeros."""
    model = create_model(
        "MDTv2", hidden_size=128, depth=4, decoder_depth=2, num_heads=2, input_size=40
    )
    d = 128
    expected = {
        "attn/qkv/kernel": np.sqrt(2 / (d + 3 * d)),
        "attn/proj/kernel": np.sqrt(2 / (2 * d)),
        "mlp/fc1/kernel": np.sqrt(2 / (5 * d)),
        "mlp/fc2/kernel": np.sqrt(2 / (5 * d)),
        "skip/kernel": np.sqrt(2 / (3 * d)),
        "attn/relative_bias": 0.02,
        "modulation/linear/kernel": 0.0,
    }
    checked = 0
    for params in inits(model, 5):
        for stack in ("in_blocks", "out_blocks", "decoder_blocks"):
            for path, std in expected.items():
                leaf = params[stack]["layers"]
                for key in path.split("/"):
                    leaf = leaf.get(key) if leaf is not None else None
                if leaf is None:
                    assert path.startswith("skip") and stack == "in_blocks"
                    continue
                for layer in np.asarray(leaf):
                    if layer.size > 10_000 or std == 0:
                        assert abs(layer.std() - std) <= 0.02 * std, (stack, path)
                        assert abs(layer.mean()) <= 5 * std / np.sqrt(layer.size)
                        checked += 1
        for path in ("fc1", "fc2"):
            kernel = np.asarray(params["timestep_embed"][path]["kernel"])
            assert abs(kernel.std() - 0.02) < 0.02 * 0.02
        assert abs(np.asarray(params["label_embed"]).std() - 0.02) < 0.02 * 0.02
    assert checked > 100


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "count"),
    [("MDT-XL/2", 699_778_144), ("MDTv2-XL/2", 742_263_904), ("DiT-XL/2", 674_834_720)],
)
def test_trainable_parameters_of_the_published_models(name, count):
    model = create_model(name)
    x = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    i = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, i, i)["params"]  # allocates nothing
    trained = {k: v for k, v in params.items() if k not in model.frozen}
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(trained)) == count


@pytest.mark.parametrize("name", [n for n in model_names() if n.split("-")[1][0] in "SB"])
def test_every_name_makes_its_sizes(name):
    model = create_model(name)
    size, patch = name.split("-")[1].split("/")
    assert (model.depth, model.hidden_size) == {"S": (12, 384), "B": (12, 768)}[size]
    assert model.num_tokens == (32 // int(patch)) ** 2


@pytest.mark.parametrize("family", ["MDT", "MDTv2", "DiT"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (12, 3, 3), (16, 4, 2)])
def test_any_square_input_and_patch_unconditional_too(family, sizes):
    side, patch, channels = sizes
    model = create_model(
        family, input_size=side, patch_size=patch, in_channels=channels, hidden_size=16, depth=4,
        num_heads=2, num_classes=0, **({} if family == "DiT" else {"decoder_depth": 2}),
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
    t = jax.ShapeDtypeStruct((2,), jnp.int32)
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x, t)
    assert out.shape == (2, side, side, 2 * channels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_model("MDTv2-XL"), "unknown model 'MDTv2-XL'.*MDTv2-XL/2"),
        (lambda: create_model("MDT-S/2", widht=3), "no setting 'widht'"),
        (lambda: create_model("MDT", input_size=30, patch_size=4), "patch_size 4 .* 1, 2, 3, 5"),
        (lambda: create_model("MDT", hidden_size=100, num_heads=7), "num_heads 7 does not divide"),
        (lambda: create_model("MDT", remat="some"), "remat 'some'.*none, full, dots"),
        (lambda: create_model("MDTv2-S/2", decoder_depth=5), "decoder_depth 5.*2, 4, 6"),
        (lambda: create_model("MDT-S/2", decoder_depth=12), "decoder_depth 12.*1 to 11"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_what_would(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_label_and_shape_mistakes_are_named():
    model = create_model("DiT", input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    x, t = jnp.ones((2, 8, 8, 4)), jnp.zeros(2, jnp.int32)
    variables = model.init(jax.random.key(0), x, t, t)
    with pytest.raises(ValueError, match="3 classes needs labels"):
        model.apply(variables, x, t)
    with pytest.raises(ValueError, match=r"\(8, 8, 3\).*\(8, 8, 4\)"):
        model.apply(variables, x[..., :3], t, t)
