"""Blocks on Pallas kernels, interpreted, against the plain ones; also over a mesh."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mdt_jax.models import attention_kernel, create_model, norm_kernels, placement
from mdt_jax.models.blocks import Block
from mdt_jax.parallel import sharding

WIDTH, HEADS, KEPT = 128, 2, 24
SIZES = {"hidden_size": 128, "depth": 4, "num_heads": 2, "num_classes": 3, "decoder_depth": 2}


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels that run here."""
    for module, name in (
        (attention_kernel, "attention"),
        (norm_kernels, "modulated_norm"),
        (norm_kernels, "gated_residual"),
    ):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, function=function: function(*a, True))


@pytest.fixture
def quick_compilation():
    """XLA without its expensive passes, which double the time of an interpreted network."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def create_model_of(kernels):
    return create_model("MDTv2", **SIZES, kernels=kernels, dtype=jnp.float32)


def create_block(kernels):
    return Block(create_model_of(kernels).block_settings)


def setting(batch, tokens, seed=0):
    """Parameters none of which is as it is initialised (the gates are open), and inputs."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    ids = np.stack([rng.permutation(256)[:tokens] for _ in range(batch)]).astype(np.int32)
    ids = None if tokens == 256 else jnp.asarray(ids)
    x, c, along = draw(batch, tokens, WIDTH), draw(batch, 1, WIDTH), draw(batch, tokens, WIDTH)
    block, packing = create_block("plain"), create_model_of("plain").packing([ids])
    abstract = jax.eval_shape(block.init, jax.random.key(0), x, c, packing)
    params = jax.tree.map(lambda leaf: 0.1 * draw(*leaf.shape), nn.unbox(abstract))
    return params, x, c, ids, along


def output_and_gradients(kernels, params, x, c, ids, along, mesh=None):
    block, packing = create_block(kernels), create_model_of(kernels).packing([ids])

    def apply(params, x, c):
        return block.apply(params, x, c, packing)

    def through(params, x, c):
        with sharding.activations(mesh) if mesh else contextlib.nullcontext():
            out, pull = jax.vjp(apply, params, x, c)
            return out, pull(along)

    if mesh:  # every kernel's work is divided, on the way back too
        pallas = kernels == "pallas"
        primitives = str(jax.make_jaxpr(through)(params, x, c))
        kernels = len(re.findall(r"= pallas_call\[", primitives))
        sums = 5  # of weights' gradients: qkv, projection, the MLP's two, modulation
        assert len(re.findall(r"= shard_map\[", primitives)) == kernels + sums
        assert kernels == (8 if pallas else 0)
    return jax.jit(through)(params, x, c)


def assert_alike(actual, expected):
    for path, e in jax.tree_util.tree_leaves_with_path(expected):
        a = dict(jax.tree_util.tree_leaves_with_path(actual))[path]
        assert float(jnp.abs(a - e).max()) <= 1e-5 * float(jnp.abs(e).max()), path


@pytest.mark.parametrize("tokens", [256, KEPT])
def test_a_block_is_that_of_the_plain_form(interpreted, tokens):
    arguments = setting(2, tokens)
    expected = output_and_gradients("plain", *arguments)
    assert_alike(output_and_gradients("pallas", *arguments), expected)


def test_a_mesh_divides_the_kernels_work(interpreted, monkeypatch):
    arguments = setting(4, KEPT)
    expected = output_and_gradients("plain", *arguments)
    mesh = sharding.create_mesh(2, 2, 2)
    assert_alike(output_and_gradients("pallas", *arguments, mesh), expected)

    # Devices whose samples are given other samples' places would show.
    attend = attention_kernel.attention

    def misplaced(qkv, bias, strips, ids_keep, lengths):
        return attend(qkv, bias, strips, tuple(ids[::-1] for ids in ids_keep), lengths)

    monkeypatch.setattr(attention_kernel, "attention", misplaced)
    with pytest.raises(AssertionError):
        assert_alike(output_and_gradients("pallas", *arguments, mesh), expected)


def model_output_and_gradients(family, kernels, remat, kept):
    """A whole network's masked pass from random parameters, in float32."""
    sizes = SIZES if family == "MDTv2" else {k: v for k, v in SIZES.items() if k != "decoder_depth"}
    model = create_model(family, **sizes, kernels=kernels, remat=remat, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    x, t, labels = draw(1, *model.image_shape), jnp.array([300]), jnp.array([1])
    ids = jnp.asarray(np.sort(rng.permutation(256)[:kept])[None].astype(np.int32))
    abstract = jax.eval_shape(model.init, jax.random.key(0), x, t, labels)["params"]
    params = jax.tree.map(lambda leaf: 0.1 * draw(*leaf.shape), nn.unbox(abstract))

    def through(params, x):
        out, pull = jax.vjp(lambda p, x: model.apply({"params": p}, x, t, labels, ids), params, x)
        return out, pull(jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    return jax.jit(through)(params, x)


@pytest.mark.parametrize(
    ("family", "remat", "kept"), [("MDTv2", "dots", 144), ("MDT", "none", 179)]
)
def test_a_network_is_that_of_the_plain_form(interpreted, quick_compilation, family, remat, kept):
    """Shortcuts, loops over layers, side-interpolator and what rematerialisation keeps."""
    expected = model_output_and_gradients(family, "plain", "none", kept)
    assert_alike(model_output_and_gradients(family, "pallas", remat, kept), expected)


def test_kernels_are_chosen_where_a_mesh_of_tpus_is_in_force():
    model = create_model("MDTv2", **SIZES)
    assert model.chosen_kernels == "plain"  # as whoever calls the network itself has it
    token = placement.current.set(placement.Placement(platform="tpu"))
    try:
        assert model.chosen_kernels == "pallas"
        assert model.clone(input_size=64).chosen_kernels == "plain"
        assert create_model("DiT-S/2").chosen_kernels == "plain"
    finally:
        placement.current.reset(token)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"input_size": 64}, "takes 256 tokens, not 1024"),
        ({"num_heads": 32}, "heads of a multiple of 8, not 4"),
    ],
)
def test_sizes_that_the_kernels_do_not_take_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        create_model("MDTv2", **SIZES | settings, kernels="pallas")
    with pytest.raises(ValueError, match="'mosaic' is unknown; known: auto, plain, pallas, cudnn"):
        create_model("MDTv2", **SIZES, kernels="mosaic")


def test_a_model_without_a_bias_has_no_such_kernels():
    with pytest.raises(ValueError, match="is for models with a relative-position bias"):
        create_model("DiT-S/2", kernels="pallas")
