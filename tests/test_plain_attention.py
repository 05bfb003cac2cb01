"""cuDNN's attention by the form that runs here, and what is asked of a GPU."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models import create_model, plain_attention
from mdt_jax.parallel import sharding


def arrays(n, shared, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(2, n, 3, 2, 8)), dtype)
    bias = jnp.asarray(rng.normal(size=(2, n, n) if shared else (2, 2, n, n)), jnp.float32)
    return qkv, bias


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", [6, 7])
def test_what_cudnn_is_given_is_the_plain_form(n, shared):
    qkv, bias = arrays(n, shared)

    def through(attend):
        out, pull = jax.vjp(attend, qkv, bias)
        return out, *pull(jnp.cos(out))

    actual = through(lambda q, b: plain_attention.cudnn_attention(q, b, "xla"))
    for a, e in zip(actual, through(plain_attention.attention), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_the_heads_gradient_on_a_cpu_is_jaxs_own():
    qkv, _ = arrays(5, True)

    def through(qkv):
        heads, pull = jax.vjp(lambda qkv: plain_attention.heads_first(qkv), qkv)
        return heads, pull([jnp.cos(one) for one in heads])

    with sharding.activations(sharding.create_mesh(1, devices=jax.devices()[:1])):
        found = through(qkv)
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(through(qkv)), strict=True):
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("shared", [True, False])
def test_a_mesh_divides_it(shared):
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(4, 6, 3, 2, 8)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=(2, 6, 6) if shared else (4, 2, 6, 6)), jnp.float32)

    def through(qkv, bias, mesh=None):
        with sharding.activations(mesh) if mesh else contextlib.nullcontext():
            out, pull = jax.vjp(
                lambda q, b: plain_attention.cudnn_attention(q, b, "xla"), qkv, bias
            )
            return out, *pull(jnp.cos(out))

    mesh = sharding.create_mesh(2, 2, 2)
    actual = jax.jit(lambda: through(qkv, bias, mesh))()
    for a, e in zip(actual, through(qkv, bias), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_a_bias_with_queries_and_keys_exchanged_shows():
    qkv, bias = arrays(6, shared=True)
    turned = plain_attention.cudnn_attention(qkv, jnp.swapaxes(bias, -1, -2), "xla")
    assert float(jnp.abs(turned - plain_attention.attention(qkv, bias)).max()) > 1e-2


@pytest.mark.parametrize(("n", "calls"), [(6, {"", "Backward"}), (7, set())])
def test_a_gpu_is_asked_for_the_fused_kernels_with_their_bias(monkeypatch, n, calls):
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    qkv, bias = arrays(n, shared=True, dtype=jnp.bfloat16)

    def loss(qkv, bias):
        return plain_attention.cudnn_attention(qkv, bias).astype(jnp.float32).sum()

    step = jax.jit(jax.grad(loss, (0, 1))).trace(qkv, bias)
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$fmhaScaleBiasSoftmax(\w*)", text)) == calls


def test_cudnn_in_float32_is_refused():
    with pytest.raises(ValueError, match="'cudnn' computes in bfloat16, not float32"):
        create_model("MDTv2-S/2", kernels="cudnn")
