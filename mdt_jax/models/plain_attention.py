"""Attention without kernels of ours: as the compiler makes it of the plain form, or by cuDNN."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from mdt_jax.models import placement
from mdt_jax.models.linear import matmul_precision


def attention(
    qkv: Float[Array, "batch n 3 heads width"],
    bias: Float[Array, "*batch heads n n"] | None,
) -> Float[Array, "batch n heads width"]:
    """softmax(q·kᵀ/√width + bias) v of each head; logits, bias and softmax are float32."""
    precision = matmul_precision(qkv.dtype)
    q, k, v = heads_first(qkv)
    logits = attention_logits(q * q.shape[-1] ** -0.5, k, precision)
    if bias is not None:
        logits = add_bias(logits, bias)
    weights = softmax(logits).astype(qkv.dtype)
    out = jnp.einsum("bhqk,bhke->bhqe", weights, v, precision=precision)
    return jnp.transpose(out, (0, 2, 1, 3))


def cudnn_takes(head_width: int) -> bool:
    """Whether cuDNN's fused attention takes heads of this width on every card that has it."""
    return head_width % 8 == 0 and head_width <= 128


def cudnn_attention(
    qkv: Float[Array, "batch n 3 heads width"],
    bias: Float[Array, "*batch heads n n"] | None,
    implementation: Any = "cudnn",
) -> Float[Array, "batch n heads width"]:
    """The same by cuDNN's fused attention, bias and its gradient included, in qkv's bfloat16.

    cuDNN has no gradient of a bias for odd lengths: those are computed in the plain form.

    Args:
      qkv, bias: as of `attention`; the bias is rounded to bfloat16.
      implementation: the argument of `jax.nn.dot_product_attention`.
    """
    if bias is not None and qkv.shape[1] % 2:
        return attention(qkv, bias)
    shared = bias is not None and bias.ndim == 3
    biases = [] if bias is None else [(bias[None] if shared else bias).astype(qkv.dtype)]

    def local(qkv: Array, *biases: Array) -> tuple[Array]:
        q, k, v = (qkv[:, :, i] for i in range(3))
        bias = biases[0] if biases else None
        return (jax.nn.dot_product_attention(q, k, v, bias=bias, implementation=implementation),)

    # Left to the partitioner, a bias of each sample may stay whole beside a divided batch.
    axes = (None if shared else "batch", "heads", None, None)
    (out,) = placement.current.get().partition(
        local,
        (("batch", None, None, "heads", None), *[axes] * len(biases)),
        (("batch", None, "heads", None),),
    )(qkv, *biases)
    return out


def heads_first(qkv: Float[Array, "batch n 3 heads width"]) -> list[Array]:
    """Queries, keys and values (batch, heads, n, width).

    Batched matmuls over the two last axes are several times faster on a CPU than contractions with
    the heads in the middle.
    """
    on_cpu = placement.current.get().platform == "cpu"
    return list(_heads_first(qkv) if on_cpu else jnp.transpose(qkv, _HEADS_FIRST))


_HEADS_FIRST = (2, 0, 3, 1, 4)  # (3, batch, heads, n, width) of (batch, n, 3, heads, width)


@jax.custom_vjp
def _heads_first(qkv: Array) -> tuple[Array, ...]:
    """`heads_first` whose gradient is one stack: JAX's own adds up three padded arrays."""
    return tuple(jnp.transpose(qkv, _HEADS_FIRST))


_heads_first.defvjp(
    lambda qkv: (_heads_first(qkv), None),
    lambda _, gradients: (jnp.transpose(jnp.stack(gradients), (1, 3, 0, 2, 4)),),
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention_logits(
    q: Float[Array, "batch heads n width"],
    k: Float[Array, "batch heads n width"],
    precision: jax.lax.Precision | None = None,
) -> Float32[Array, "batch heads n n"]:
    """q·kᵀ of each head, summed and returned in float32, for the softmax.

    Their gradient comes in float32 too. It is rounded to q's dtype before the two matmuls that it
    goes through, which differentiation would leave with one float32 operand.
    """
    return jnp.einsum(
        "bhqe,bhke->bhqk", q, k, precision=precision, preferred_element_type=jnp.float32
    )


def _attention_logits_forward(q: Array, k: Array, precision: Any) -> tuple[Array, Any]:
    return attention_logits(q, k, precision), (q, k)


def _attention_logits_backward(precision: Any, saved: Any, gradient: Array) -> tuple[Array, Array]:
    q, k = saved
    gradient = gradient.astype(q.dtype)
    return (
        jnp.einsum("bhqk,bhke->bhqe", gradient, k, precision=precision),
        jnp.einsum("bhqk,bhqe->bhke", gradient, q, precision=precision),
    )


attention_logits.defvjp(_attention_logits_forward, _attention_logits_backward)


@jax.custom_vjp
def add_bias(
    logits: Float[Array, "batch heads n n"], bias: Float[Array, "*batch heads n n"]
) -> Float[Array, "batch heads n n"]:
    """logits + bias, whose gradient is summed over the batch if all samples share it.

    On a CPU, as a product with ones: XLA's sum over the first axis takes 60 times as long there
    (16 × 6 × 256 × 256 float32 on one core: 36 ms against 0.6).
    """
    return logits + bias


def _add_bias_forward(logits: Array, bias: Array) -> tuple[Array, tuple[()] | None]:
    return logits + bias, None if bias.ndim == logits.ndim else ()


def _add_bias_backward(shared: tuple[()] | None, gradient: Array) -> tuple[Array, Array]:
    if shared is None:
        return gradient, gradient

    def product(g: Array) -> Array:
        with jax.named_scope("sum_over_samples"):
            ones = jnp.ones(g.shape[0], g.dtype)
            return jnp.einsum("b,bn->n", ones, g.reshape(g.shape[0], -1)).reshape(g.shape[1:])

    total = jax.lax.platform_dependent(gradient, cpu=product, default=lambda g: g.sum(axis=0))
    return gradient, total


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def softmax(logits: Float32[Array, "batch heads n n"]) -> Float32[Array, "batch heads n n"]:
    """Softmax over the last axis. Its gradient needs the result alone, so nothing else is kept."""
    return jax.nn.softmax(logits, axis=-1)


def _softmax_forward(logits: Array) -> tuple[Array, Array]:
    weights = softmax(logits)
    return weights, weights


def _softmax_backward(weights: Array, gradient: Array) -> tuple[Array]:
    product = weights * gradient
    return (product - weights * jnp.sum(product, axis=-1, keepdims=True),)


softmax.defvjp(_softmax_forward, _softmax_backward)
