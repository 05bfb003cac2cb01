"""The bodies of the attention kernels: one turn of the grid, forward and backward.

`mdt_jax.models.attention_kernel` says how arrays lie, and calls them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array

from mdt_jax.models.linear import LANES, matmul_precision

UNROLL = 8  # rows of the bias moved in one turn of a loop
LOG2_E = math.log2(math.e)
# Which axes of two matrices a product sums over: the usual ones, both first, both last.
_NN, _TN, _NT = ((1,), (0,)), ((0,), (0,)), ((1,), (1,))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one pass in one turn of the grid, and how its scratch is laid out.

    A turn is one sample and one group of heads. Scratch holds the rows of a head `stride` apart, an
    odd number, which lets eight rows be read at once.

    Attributes:
      heads: heads of a group.
      width: width of a head.
      tokens: K, or N without a mask.
      grid_size: G.
      masked: whether the tokens are kept ones.
      dtype: the dtype of everything but bias and sums.
    """

    heads: int
    width: int
    tokens: int
    grid_size: int
    masked: bool
    dtype: DTypeLike

    @property
    def places(self) -> int:
        """N."""
        return self.grid_size**2

    @property
    def stride(self) -> int:
        """How far apart the rows of a head lie in scratch."""
        return self.heads | 1

    @cached_property
    def scale(self) -> float:
        """The factor of q, for logits to the base 2."""
        return self.width**-0.5 * LOG2_E

    def lay_out_bias(self, strips: Any, bias: Any) -> None:
        """Fills `bias` with the bias of all pairs, to the base 2."""

        def of_head(h: Array, _: None) -> None:
            for row in range(self.grid_size):
                start = (self.grid_size - 1 - row) * self.grid_size
                strip = strips[h][:, start : start + self.places]
                self.store(bias, h, row * self.grid_size, strip * LOG2_E)

        jax.lax.fori_loop(0, self.heads, of_head, None)

    def fold_bias(self, d_bias: Any, d_strips: Any) -> None:
        """Sums the gradient of all pairs' bias into the strips'."""
        d_strips[...] = jnp.zeros_like(d_strips)

        def of_head(h: Array, _: None) -> None:
            for row in range(self.grid_size):
                start = (self.grid_size - 1 - row) * self.grid_size
                key = row * self.grid_size
                added = self.load(d_bias, h, key, self.grid_size)
                d_strips[h, :, start : start + self.places] += added

        jax.lax.fori_loop(0, self.heads, of_head, None)

    def load(self, rows: Any, h: Any, key: int = 0, count: int | None = None) -> Array:
        """(count, N) of a head, from a key on; by default of all tokens."""
        at = pl.ds(key * self.stride + h, count or self.tokens, stride=self.stride)
        return jnp.concatenate([rows.at[tile][at, :] for tile in range(rows.shape[0])], axis=1)

    def store(self, rows: Any, h: Any, key: int, values: Array) -> None:
        """Writes what `load` reads."""
        at = pl.ds(key * self.stride + h, values.shape[0], stride=self.stride)
        for tile in range(rows.shape[0]):
            rows.at[tile][at, :] = values[:, tile * LANES : (tile + 1) * LANES]

    def part(self, qkv: Any, which: int, h: int) -> Array:
        """(width, tokens) of a head: 0 for its queries, 1 its keys, 2 its values."""
        return qkv[0, which, h, :, : self.tokens]

    def move_rows(self, ids: Any, move: Callable[[Any, Any], Any]) -> None:
        """Calls move(where kept key j's rows of all heads are, where its place's are) for all j."""

        def turn(first: Any, count: int) -> None:
            for j in range(count):
                kept, place = first + j, ids[0, 0, first + j]
                move(pl.ds(kept * self.stride, self.heads), pl.ds(place * self.stride, self.heads))

        def loop(n: Array, _: None) -> None:
            turn(n * UNROLL, UNROLL)

        whole = self.tokens // UNROLL
        jax.lax.fori_loop(0, whole, loop, None)
        turn(whole * UNROLL, self.tokens % UNROLL)

    def selection(self, ids: Any) -> Array:
        """(kept, N) of 0 and 1: a product with it puts columns at their places, exactly."""
        lanes = jax.lax.broadcasted_iota(jnp.int32, (self.tokens, self.places), 1)
        return (ids[0] == lanes).astype(self.dtype)


def _pipeline(count: int, *stages: Callable[[int, Any], Any]) -> None:
    """Runs stages(n, result of the stage before) for n < count, those of neighbours side by side.

    The scheduler keeps to the order in which a kernel is written: with one head's products next to
    another's softmax, both units are busy.
    """
    held: dict[tuple[int, int], Any] = {}
    for tick in range(count + len(stages) - 1):
        for k, stage in enumerate(stages):
            if 0 <= (n := tick - k) < count:
                held[k, n] = stage(n, held.pop((k - 1, n), None))


def _product(a: Array, b: Array, contracted: Any, dtype: DTypeLike | None = None) -> Array:
    out = jax.lax.dot_general(
        a,
        b,
        (contracted, ((), ())),
        precision=matmul_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )
    return out if dtype is None else out.astype(dtype)


def attention_forward(sizes: Sizes, *refs: Any) -> None:
    if sizes.masked:
        ids, column, qkv, strips, out, log_sums, bias, rows = refs
    else:
        qkv, strips, out, log_sums, bias = refs
        rows = bias
    dtype = sizes.dtype

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        sizes.lay_out_bias(strips, bias)

    if sizes.masked:
        sizes.move_rows(ids, partial(_copy, rows, bias))
        selected = sizes.selection(column)

    def place(h: int, _: None) -> Array:
        q = (sizes.part(qkv, 0, h).astype(jnp.float32) * sizes.scale).astype(dtype)
        return _product(q, selected, _NN, dtype) if sizes.masked else q

    def logits(h: int, q: Array) -> Array:
        return _product(sizes.part(qkv, 1, h), q, _TN) + sizes.load(rows, h)

    def softmax(h: int, s: Array) -> tuple[Array, Array]:
        largest = jnp.max(s, axis=0, keepdims=True)
        p = jnp.exp2(s - largest)
        total = jnp.sum(p, axis=0, keepdims=True)
        log_sums[0, h] = largest + jnp.log2(total)
        return p.astype(dtype), 1 / total

    def values(h: int, weights: tuple[Array, Array]) -> Array:
        p, normaliser = weights
        return (_product(sizes.part(qkv, 2, h), p, _NN) * normaliser).astype(dtype)

    def finish(h: int, o: Array) -> None:
        o = _product(o, selected, _NT, dtype) if sizes.masked else o
        out[0, h, :, : sizes.tokens] = o

    _pipeline(sizes.heads, place, logits, softmax, values, finish)


def attention_backward(sizes: Sizes, *refs: Any) -> None:
    if sizes.masked:
        ids, column, qkv, out, log_sums, d_out, strips, *written, rows = refs
    else:
        qkv, out, log_sums, d_out, strips, *written = refs
    d_qkv, d_strips, sums, bias, d_bias = written
    rows = rows if sizes.masked else bias
    dtype = sizes.dtype

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        sizes.lay_out_bias(strips, bias)
        d_bias[...] = jnp.zeros_like(d_bias)
        sums[...] = jnp.zeros_like(sums)

    if sizes.masked:
        sizes.move_rows(ids, partial(_copy, rows, bias))
        selected = sizes.selection(column)

    def place(h: int, _: None) -> tuple[Array, Array]:
        q = (sizes.part(qkv, 0, h).astype(jnp.float32) * sizes.scale).astype(dtype)
        do = d_out[0, h, :, : sizes.tokens]
        if not sizes.masked:
            return q, do
        return _product(q, selected, _NN, dtype), _product(do, selected, _NN, dtype)

    def products(h: int, placed: tuple[Array, Array]) -> tuple[Array, ...]:
        q, do = placed
        s = _product(sizes.part(qkv, 1, h), q, _TN) + sizes.load(rows, h)
        return q, do, s, _product(sizes.part(qkv, 2, h), do, _TN)

    def softmax(h: int, x: tuple[Array, ...]) -> tuple[Array, ...]:
        q, do, s, dp = x
        p = jnp.exp2(s - log_sums[0, h])
        if sizes.masked:  # out's lanes are other ones
            mean = jnp.sum(p * dp, axis=0, keepdims=True)
        else:
            products = do.astype(jnp.float32) * out[0, h, :, : sizes.tokens].astype(jnp.float32)
            mean = jnp.sum(products, axis=0, keepdims=True)
        ds = p * (dp - mean)
        if sizes.masked:
            sizes.store(rows, h, 0, ds)
        else:
            sizes.store(d_bias, h, 0, sizes.load(d_bias, h) + ds)
        return q, do, p.astype(dtype), ds.astype(dtype)

    def write(which: int, h: int, gradient: Array) -> None:
        d_qkv[0, which, h, :, : sizes.tokens] = gradient.astype(dtype)
        sums[which, h] += jnp.sum(gradient, axis=1, keepdims=True)

    def gradients(h: int, x: tuple[Array, ...]) -> Array:
        q, do, p, ds = x
        write(2, h, _product(do, p, _NT))
        write(1, h, _product(q, ds, _NT) * (1 / LOG2_E))
        return _product(sizes.part(qkv, 1, h), ds, _NN) * sizes.width**-0.5

    def finish(h: int, dq: Array) -> None:
        write(0, h, _product(dq.astype(dtype), selected, _NT) if sizes.masked else dq)

    _pipeline(sizes.heads, place, products, softmax, gradients, finish)
    if sizes.masked:
        sizes.move_rows(ids, partial(_add, d_bias, rows))

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        sizes.fold_bias(d_bias, d_strips)


def _copy(rows: Any, bias: Any, kept: Any, place: Any) -> None:
    for tile in range(rows.shape[0]):
        rows[tile, kept, :] = bias[tile, place, :]


def _add(d_bias: Any, rows: Any, kept: Any, place: Any) -> None:
    for tile in range(rows.shape[0]):
        d_bias[tile, place, :] += rows[tile, kept, :]
