"""Whole models on Pallas kernels, interpreted, against the plain ones; also over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mdt_jax import sharding
from mdt_jax.models import attention_kernel, create_model, norm_kernels

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


def setting(batch, kept=144):
    rng = np.random.default_rng(0)
    model = create_model("MDTv2", **SIZES, remat="dots")
    x = jnp.asarray(rng.normal(size=(batch, *model.image_shape)).astype(np.float32))
    t = jnp.asarray(rng.integers(0, 1000, batch).astype(np.int32))
    labels = jnp.asarray(rng.integers(0, 3, batch).astype(np.int32))
    ids = np.stack([rng.permutation(256)[:kept] for _ in range(batch)]).astype(np.int32)
    abstract = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), x, t, labels))["params"]
    # No parameter is as it is initialised: the gates are open, the last layer is not zero.
    params = jax.tree.map(
        lambda leaf: jnp.asarray((0.05 * rng.normal(size=leaf.shape)).astype(np.float32)), abstract
    )
    return model, params, (x, t, labels), jnp.asarray(ids)


def loss_and_gradients(model, params, inputs, ids, mesh=None):
    def loss(params):
        with sharding.activations(mesh) if mesh else jax.named_scope("one_device"):
            passes = [model.apply({"params": params}, *inputs, i) for i in (None, ids)]
            return sum(jnp.mean(out**2) for out in passes)

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_alike(actual, expected):
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    assert_gradients_alike(actual[1], expected[1])


def assert_gradients_alike(actual, expected):
    for path, e in jax.tree_util.tree_leaves_with_path(expected):
        a = actual
        for key in path:
            a = a[key.key]
        assert float(jnp.abs(a - e).max()) <= 1e-5 * float(jnp.abs(e).max()) + 1e-9, path


def test_both_passes_and_all_gradients_on_one_device_and_on_a_mesh(interpreted):
    model, params, inputs, ids = setting(batch=4)
    expected = loss_and_gradients(model, params, inputs, ids)
    pallas = model.clone(kernels="pallas")
    assert_alike(loss_and_gradients(pallas, params, inputs, ids), expected)
    mesh = sharding.create_mesh(2, 2, 2)
    assert_alike(loss_and_gradients(pallas, params, inputs, ids, mesh), expected)
    # A sample that keeps other tokens changes what both give, so that the above could fail.
    other = ids.at[0].set((ids[0] + 1) % 256)
    with pytest.raises(AssertionError):
        assert_gradients_alike(loss_and_gradients(pallas, params, inputs, other)[1], expected[1])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"input_size": 64}, "1024 tokens"),
        ({"num_heads": 32}, "heads of a multiple of 8"),
    ],
)
def test_sizes_that_the_kernels_do_not_take_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        create_model("MDTv2", **SIZES | settings, kernels="pallas")
    with pytest.raises(ValueError, match="'mosaic' is unknown; known: plain, pallas"):
        create_model("MDTv2", **SIZES, kernels="mosaic")


def test_a_model_without_a_bias_has_no_such_kernels():
    with pytest.raises(ValueError, match="with a relative-position bias"):
        create_model("DiT-S/2", kernels="pallas")
