"""The attention kernel, interpreted, against the plain form: output and every gradient."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models import attention_kernel, placement
from mdt_jax.models.computation import choose_kernels
from mdt_jax.models.positions import relative_position_index
from mdt_jax.parallel import sharding

GRID = 16
N = GRID**2


def plain(qkv, table, ids):
    """Attention by the definition, tokens last as the kernel has them."""
    index = jnp.asarray(relative_position_index(GRID))
    if ids is not None:
        index = index[ids[:, :, None], ids[:, None, :]]
    q, k, v = (jnp.swapaxes(qkv[:, i], -1, -2) for i in range(3))
    logits = jnp.einsum("bhqe,bhke->bhqk", q * q.shape[-1] ** -0.5, k, precision="highest")
    weights = jax.nn.softmax(logits + jnp.moveaxis(table[index], -1, -3), axis=-1)
    return jnp.einsum("bhqk,bhke->bheq", weights, v, precision="highest")


def kernel(qkv, bias, table, ids):
    strips = attention_kernel.bias_strips(table, GRID)
    tokens = qkv.shape[-1] if ids is None else ids.shape[1]
    return attention_kernel.attention(qkv, bias, strips, (ids,), (tokens,), True)


def arrays(batch, heads, width, kept, seed=0):
    rng = np.random.default_rng(seed)
    tokens = kept or N
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    ids = np.stack([rng.permutation(N)[:tokens] for _ in range(batch)]).astype(np.int32)
    return (
        draw(batch, 3, heads, width, tokens),
        draw(3, heads, width),
        draw((2 * GRID - 1) ** 2 + 3, heads),
        jnp.asarray(ids) if kept else None,
        draw(batch, heads, width, tokens),
    )


def error(actual, expected):
    return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())


@pytest.mark.parametrize(
    ("batch", "heads", "width", "kept"), [(2, 2, 8, None), (3, 3, 24, 144), (2, 1, 16, 179)]
)
def test_output_and_gradients_are_those_of_the_plain_form(batch, heads, width, kept):
    qkv, bias, table, ids, along = arrays(batch, heads, width, kept)

    def through(attend):
        out, pull = jax.vjp(attend, qkv, bias, table)
        return out, *pull(along)

    actual = jax.jit(lambda: through(lambda q, b, t: kernel(q, b, t, ids)))()
    # The kernel's queries, keys and values have their bias already; it only sums its gradient.
    expected = jax.jit(
        lambda: through(
            lambda q, b, t: plain(q + b[..., None] - jax.lax.stop_gradient(b)[..., None], t, ids)
        )
    )()
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and error(a, e) < 1e-5


def test_lanes_after_the_tokens_are_not_read():
    """What stands in them is not a number, and their gradient is zero."""
    qkv, bias, table, ids, along = arrays(2, 2, 8, 179)
    padded = jnp.pad(qkv, [(0, 0)] * 4 + [(0, 77)], constant_values=jnp.nan)

    def through(qkv):
        out, pull = jax.vjp(lambda *a: kernel(*a, ids), qkv, bias, table)
        return out, *pull(along)

    out, d_qkv, *rest = through(padded)
    expected, d_expected, *rest_expected = through(qkv)
    assert not d_qkv[..., 179:].any()
    found = (out, d_qkv[..., :179], *rest)
    for a, e in zip(found, (expected, d_expected, *rest_expected), strict=True):
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("kept", [128, 144, 179])
def test_packed_passes_are_those_apart(kept):
    """Two full passes and a masked one: outputs, and gradients summed over the passes."""
    full, bias, table, _, along = arrays(2, 2, 8, None)
    second, along_second = full[::-1], along[::-1]
    masked, _, _, ids, along_masked = arrays(2, 2, 8, kept, seed=1)
    strips = attention_kernel.bias_strips(table, GRID)
    lengths, lanes = (N, N, kept), 2 * N + -(-kept // 128) * 128

    def packed(full, second, masked, bias, strips):
        qkv = jnp.concatenate([full, second, masked], axis=-1)
        padding = [(0, 0)] * 4 + [(0, lanes - qkv.shape[-1])]
        qkv = jnp.pad(qkv, padding, constant_values=jnp.nan)
        ids_keep = None, None, ids
        out = attention_kernel.attention(qkv, bias, strips, ids_keep, lengths, True)
        assert out.shape[-1] == sum(lengths)
        return out[..., :N], out[..., N : 2 * N], out[..., 2 * N :]

    def apart(full, second, masked, bias, strips):
        one = lambda qkv, ids, n: attention_kernel.attention(  # noqa: E731
            qkv, bias, strips, (ids,), (n,), True
        )
        return one(full, None, N), one(second, None, N), one(masked, ids, kept)

    def through(attend):
        out, pull = jax.vjp(attend, full, second, masked, bias, strips)
        return out, pull((along, along_second, along_masked))

    found, expected = (jax.jit(lambda a=a: through(a))() for a in (packed, apart))
    for a, e in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.shape == e.shape and error(a, e) < 1e-5


def test_a_short_pass_before_the_last_is_refused():
    qkv, bias, table, ids, _ = arrays(1, 1, 8, 144)
    strips = attention_kernel.bias_strips(table, GRID)
    with pytest.raises(ValueError, match="those before the last must have 256"):
        attention_kernel.attention(
            jnp.concatenate([qkv, qkv], axis=-1), bias, strips, (ids, ids), (144, 144), True
        )


def test_a_bias_with_queries_and_keys_exchanged_shows():
    qkv, bias, table, ids, _ = arrays(1, 1, 8, 144)
    turned = jnp.concatenate([table[-4::-1], table[-3:]])  # the row of (−r, −c)
    assert error(kernel(qkv, bias, turned, ids), plain(qkv, table, ids)) > 1e-2


def test_kept_ids_of_another_sample_show():
    qkv, bias, table, ids, _ = arrays(2, 1, 8, 144)
    assert error(kernel(qkv, bias, table, ids[::-1]), plain(qkv, table, ids)) > 1e-2


def test_strips_hold_the_table_exactly():
    table = arrays(1, 3, 8, None)[2]
    strips = np.asarray(attention_kernel.bias_strips(table, GRID))
    index = relative_position_index(GRID)
    for key in (0, 5, 100, N - 1):
        row, column = divmod(key, GRID)
        start = (GRID - 1 - row) * GRID
        np.testing.assert_array_equal(
            strips[:, column, start : start + N], np.asarray(table)[index[:, key]].T
        )


def test_bfloat16_is_near():
    qkv, bias, table, ids, _ = arrays(2, 2, 8, 144)
    out = kernel(qkv.astype(jnp.bfloat16), bias, table, ids)
    assert out.dtype == jnp.bfloat16
    assert error(out.astype(jnp.float32), plain(qkv, table, ids)) < 2e-2


@pytest.mark.parametrize(
    ("platform", "grid", "width", "kernels"),
    [
        ("tpu", 16, 72, "pallas"),
        (None, 16, 72, "plain"),  # no mesh is in force
        ("tpu", 16, 64, "pallas"),
        ("tpu", 32, 72, "plain"),  # 1,024 tokens: their logits do not fit the core
        ("tpu", 2, 16, "plain"),
        ("tpu", 16, 36, "plain"),
        ("cpu", 16, 72, "plain"),
    ],
)
def test_kernels_are_chosen_by_platform_and_size(platform, grid, width, kernels):
    token = placement.current.set(placement.Placement(platform=platform))
    try:
        assert choose_kernels(True, grid, width, jnp.bfloat16) == kernels
        assert choose_kernels(False, grid, width, jnp.bfloat16) == "plain"
    finally:
        placement.current.reset(token)


@pytest.mark.parametrize(
    ("capability", "width", "dtype", "kernels"),
    [
        ("9.0", 72, jnp.bfloat16, "cudnn"),
        ("8.0", 64, "bfloat16", "cudnn"),
        (None, 64, "bfloat16", "cudnn"),  # a GPU that only a compiler knows of does not say
        ("10.0", 64, jnp.float32, "plain"),
        ("9.0", 36, jnp.bfloat16, "plain"),
        ("9.0", 136, jnp.bfloat16, "plain"),
        ("7.5", 64, jnp.bfloat16, "plain"),
        ("gfx942", 64, jnp.bfloat16, "plain"),
    ],
)
def test_gpus_since_ampere_take_cudnns_attention_in_bfloat16(capability, width, dtype, kernels):
    card = {} if capability is None else {"compute_capability": capability}
    for platform in ("gpu", "cuda"):
        fits = sharding.has_cudnn_attention(SimpleNamespace(platform=platform, **card))
        place = placement.Placement(platform="gpu", cudnn_attention=fits)
        token = placement.current.set(place)
        try:
            assert choose_kernels(True, 16, width, dtype) == kernels
            assert choose_kernels(False, 16, width, dtype) == kernels
        finally:
            placement.current.reset(token)
    assert not sharding.has_cudnn_attention(SimpleNamespace(platform="tpu", **card))
