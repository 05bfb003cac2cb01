"""Attention with a relative-position bias as one Pallas TPU kernel, forward and backward.

The logits (tokens × tokens), the bias and the probabilities never leave the core's vector memory.
Everything lies transposed against the usual form, with tokens along the lanes, as qkv is computed
for it: S is (keys, queries), a softmax reduces over sublanes, and only k and v have to be turned.

The bias of a head is G strips of one small array (`bias_strips`), laid out as N × N once for all
samples; its gradient is summed over samples in the same form. A masked pass keeps K tokens, other
ones in each sample: queries go back to their N places, by a product with a 0/1 matrix, so that each
has its bias in its own lane, and keys take the bias' rows of their places. In lanes without a query
stands what nobody reads and no gradient reaches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mdt_jax.models import placement
from mdt_jax.models.linear import LANES, matmul_precision

TOKENS = 2 * LANES  # N, of which a head's logits fit the registers and the core's memory
_VMEM_LIMIT = 96 * 2**20
# Bytes of a group's scratch and blocks: with what the compiler adds they fit a v4 core's 16 MiB.
_GROUP_BYTES = 12_300_000
_UNROLL = 8  # rows of the bias moved in one turn of a loop
_LOG2_E = math.log2(math.e)
# Which axes of two matrices a product sums over: the usual ones, both first, both last.
_NN, _TN, _NT = ((1,), (0,)), ((0,), (0,)), ((1,), (1,))


def supports(grid_size: int, head_width: int) -> bool:
    """Whether the kernel takes these sizes."""
    return grid_size**2 == TOKENS and head_width % 8 == 0


def bias_strips(
    table: Float[Array, "rows heads"], grid_size: int
) -> Float[Array, "heads {grid_size} offsets"]:
    """The bias table as (H, G, (2G−1)·G): key (r', c') finds its bias towards all queries in
    [h, c', (G−1−r')·G : (G−1−r')·G + N].

    A product with zeros and ones, which the TPU does faster than a gather, and its gradient faster
    than a scatter; exact, since each sum has one term.
    """
    g = grid_size
    offsets = table[: (2 * g - 1) ** 2].reshape(2 * g - 1, 2 * g - 1, -1)
    columns = np.arange(g)
    select = columns[None] - columns[:, None] + g - 1 == np.arange(2 * g - 1)[:, None, None]
    strips = jnp.einsum(
        "dkh,kab->hadb", offsets, select.astype(np.float32), precision=matmul_precision(jnp.float32)
    )
    return strips.reshape(*strips.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    qkv: Float[Array, "batch 3 heads width lanes"],
    qkv_bias: Float[Array, "3 heads width"],
    strips: Float[Array, "heads grid offsets"],
    ids_keep: Int[Array, "batch tokens"] | None = None,
    interpret: bool = False,
) -> Float[Array, "batch heads width tokens"]:
    """softmax(qᵀk/√width + bias) v of each head, tokens last.

    Args:
      qkv: queries, keys and values, bfloat16 or float32. With `ids_keep`, lanes after those of the
        tokens are not read, and their gradient is zero.
      qkv_bias: what was added to them, whose gradient is summed here.
      strips: the relative-position bias (`bias_strips`), float32.
      ids_keep: which of the G² tokens these are, None for all of them in order.
      interpret: whether to interpret the kernels, which needs no TPU.

    Softmax and sums are float32, and so are the products of float32.
    """
    return _run_forward(qkv, strips, ids_keep, interpret)[0]


def _forward_rule(
    qkv: Array, qkv_bias: Array, strips: Array, ids_keep: Array | None, interpret: bool
) -> tuple[Array, Any]:
    out, log_sums = _run_forward(qkv, strips, ids_keep, interpret)
    return out, (qkv, strips, ids_keep, out, log_sums)


def _backward_rule(interpret: bool, saved: Any, d_out: Array) -> tuple[Array | None, ...]:
    qkv, strips, ids_keep, out, log_sums = saved
    ids = [] if ids_keep is None else [ids_keep]

    def local(qkv: Array, strips: Array, out: Array, log_sums: Array, d_out: Array, *ids: Array):
        kernel = _Kernel.of(qkv, strips, *ids)
        found = kernel.backward(qkv, strips, out, log_sums, d_out, *ids, interpret=interpret)
        d_qkv, d_strips, d_bias = found
        return d_qkv, d_strips[None], d_bias[None, ..., 0]  # sums of this device's samples

    run = placement.current.get().partition(
        local,
        (_QKV, _STRIPS, _BY_HEAD, _BY_HEAD, _BY_HEAD, *[("batch", None)] * len(ids)),
        (_QKV, _BY_HEAD, ("batch", None, "heads", None)),
    )
    d_qkv, d_strips, d_bias = run(qkv, strips, out, log_sums, d_out, *ids)
    more, shape = qkv.shape[-1] - d_qkv.shape[-1], d_qkv.shape
    if placement.current.get().merges:
        # Features as one axis, as they come from the product: there both this and its slice vanish.
        d_qkv = d_qkv.reshape(shape[0], -1, shape[-1])
    d_qkv = jnp.pad(d_qkv, [(0, 0)] * (d_qkv.ndim - 1) + [(0, more)]).reshape(qkv.shape)
    return d_qkv, d_bias.sum(axis=0), d_strips.sum(axis=0), None


attention.defvjp(_forward_rule, _backward_rule)
_QKV, _BY_HEAD = ("batch", None, "heads", None, None), ("batch", "heads", None, None)
_STRIPS = ("heads", None, None)


def _run_forward(
    qkv: Array, strips: Array, ids_keep: Array | None, interpret: bool
) -> tuple[Array, Array]:
    """The attention, and log₂ of each softmax's sum, (batch, heads, 1, N)."""
    ids = [] if ids_keep is None else [ids_keep]

    def local(qkv: Array, strips: Array, *ids: Array) -> tuple[Array, Array]:
        kernel = _Kernel.of(qkv, strips, *ids)
        return kernel.forward(qkv, strips, *ids, interpret=interpret)

    run = placement.current.get().partition(
        local,
        (_QKV, _STRIPS, *[("batch", None)] * len(ids)),
        (_BY_HEAD, _BY_HEAD),
    )
    return run(qkv, strips, *ids)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """Sizes of one device's part, and the two kernels for them.

    The grid is (groups of heads, samples): the bias of a group stays on the core while the samples
    go by, and a chip with two cores takes a group on each. Scratch holds rows of a head `stride`
    apart, an odd number, which reads eight rows at once.

    Attributes:
      batch: samples.
      groups, heads: of heads, and heads of one group.
      width: of a head.
      tokens: K, or N without a mask.
      lanes: of qkv, at least as many.
      grid_size: G.
      masked: whether the tokens are kept ones.
      dtype: of everything but bias and sums.
    """

    batch: int
    groups: int
    heads: int
    width: int
    tokens: int
    lanes: int
    grid_size: int
    masked: bool
    dtype: DTypeLike

    @classmethod
    def of(cls, qkv: Array, strips: Array, ids: Array | None = None) -> _Kernel:
        batch, _, heads, width, lanes = qkv.shape
        tokens = lanes if ids is None else ids.shape[1]
        masked = ids is not None
        sizes = cls(batch, 1, heads, width, tokens, lanes, strips.shape[1], masked, qkv.dtype)
        # As few groups as fit, an even number where it can be, for two cores.
        groups = next(
            n
            for n in range(1, heads + 1)
            if heads % n == 0
            and (n == heads or heads // n * sizes.bytes_per_head() <= _GROUP_BYTES)
            and (n % 2 == 0 or heads % 2)
        )
        return dataclasses.replace(sizes, groups=groups, heads=heads // groups)

    def bytes_per_head(self) -> int:
        """Of the backward kernel's scratch and blocks, which come twice, lanes padded."""
        lanes, size = -(-self.lanes // LANES) * LANES, jnp.dtype(self.dtype).itemsize
        scratch = 4 * self.places * (2 * self.places + self.masked * self.tokens)
        blocks = 2 * self.width * (8 * lanes * size + 3 * LANES * 4)
        return scratch + blocks

    @property
    def places(self) -> int:
        """N."""
        return self.grid_size**2

    @property
    def stride(self) -> int:
        return self.heads | 1

    @cached_property
    def scale(self) -> float:
        """Of q, for logits to the base 2."""
        return self.width**-0.5 * _LOG2_E

    def forward(self, qkv: Array, strips: Array, *ids: Array, interpret: bool) -> Any:
        out, sums = self._tokens_spec(), self._sums_spec()
        return self._run(
            _attention_forward,
            (*_ids_twice(ids), qkv, strips),
            in_specs=[*self._ids_specs(), self._qkv_spec(self.lanes), self._strips_spec()],
            out_specs=[out[1], sums[1]],
            out_shape=[
                jax.ShapeDtypeStruct(out[0], self.dtype),
                jax.ShapeDtypeStruct(sums[0], jnp.float32),
            ],
            scratch_shapes=[self._rows(self.places), *self._rows_of_kept()],
            interpret=interpret,
        )

    def backward(
        self,
        qkv: Array,
        strips: Array,
        out: Array,
        log_sums: Array,
        d_out: Array,
        *ids: Array,
        interpret: bool,
    ) -> Any:
        tokens, sums = self._tokens_spec()[1], self._sums_spec()[1]
        bias = (3, self.groups * self.heads, self.width, 1)
        return self._run(
            _attention_backward,
            (*_ids_twice(ids), qkv, out, log_sums, d_out, strips),
            in_specs=[
                *self._ids_specs(),
                self._qkv_spec(self.lanes),
                tokens,
                sums,
                tokens,
                self._strips_spec(),
            ],
            out_specs=[
                self._qkv_spec(self.tokens),
                self._strips_spec(),
                pl.BlockSpec((3, self.heads, self.width, 1), lambda g, _: (0, g, 0, 0)),
            ],
            out_shape=[
                jax.ShapeDtypeStruct((*qkv.shape[:-1], self.tokens), qkv.dtype),
                jax.ShapeDtypeStruct(strips.shape, jnp.float32),
                jax.ShapeDtypeStruct(bias, jnp.float32),
            ],
            scratch_shapes=[*[self._rows(self.places)] * 2, *self._rows_of_kept()],
            interpret=interpret,
        )

    def _run(self, kernel: Callable, arguments: tuple[Array, ...], **more: Any) -> Any:
        return pl.pallas_call(
            partial(kernel, self),
            grid=(self.groups, self.batch),
            name=kernel.__name__.strip("_") + ("_masked" if self.masked else ""),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
            ),
            **more,
        )(*arguments)

    def _qkv_spec(self, lanes: int) -> pl.BlockSpec:
        block = (1, 3, self.heads, self.width, lanes)
        return pl.BlockSpec(block, lambda g, b: (b, 0, g, 0, 0))

    def _strips_spec(self) -> pl.BlockSpec:
        block = (self.heads, self.grid_size, (2 * self.grid_size - 1) * self.grid_size)
        return pl.BlockSpec(block, lambda g, _: (g, 0, 0))

    def _tokens_spec(self) -> tuple[tuple[int, ...], pl.BlockSpec]:
        """Shape of the heads' output, and a group's part of it."""
        return self._by_head(self.width, self.tokens)

    def _sums_spec(self) -> tuple[tuple[int, ...], pl.BlockSpec]:
        return self._by_head(1, self.places)

    def _by_head(self, *rest: int) -> tuple[tuple[int, ...], pl.BlockSpec]:
        shape = (self.batch, self.groups * self.heads, *rest)
        return shape, pl.BlockSpec((1, self.heads, *rest), lambda g, b: (b, g, 0, 0))

    def _ids_specs(self) -> list[pl.BlockSpec]:
        row, column = (1, 1, self.tokens), (1, self.tokens, 1)
        specs = [
            pl.BlockSpec(row, lambda _, b: (b, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec(column, lambda _, b: (b, 0, 0)),
        ]
        return specs if self.masked else []

    def _rows(self, count: int) -> Any:
        """Scratch for `count` keys' rows of N of each head, cut into tiles of lanes."""
        shape = (self.places // LANES, count * self.stride, LANES)
        return pltpu.VMEM(shape, jnp.float32)

    def _rows_of_kept(self) -> list[Any]:
        return [self._rows(self.tokens)] if self.masked else []

    def lay_out_bias(self, strips: Any, bias: Any) -> None:
        """Fills `bias` with the bias of all pairs, to the base 2."""

        def of_head(h: Array, _: None) -> None:
            for row in range(self.grid_size):
                start = (self.grid_size - 1 - row) * self.grid_size
                strip = strips[h][:, start : start + self.places]
                self.store(bias, h, row * self.grid_size, strip * _LOG2_E)

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
            turn(n * _UNROLL, _UNROLL)

        whole = self.tokens // _UNROLL
        jax.lax.fori_loop(0, whole, loop, None)
        turn(whole * _UNROLL, self.tokens % _UNROLL)

    def selection(self, ids: Any) -> Array:
        """(kept, N) of 0 and 1: a product with it puts columns at their places, exactly."""
        lanes = jax.lax.broadcasted_iota(jnp.int32, (self.tokens, self.places), 1)
        return (ids[0] == lanes).astype(self.dtype)


def _ids_twice(ids: Sequence[Array]) -> list[Array]:
    """Kept ids as rows, for the scalar core, and as columns."""
    return [one for x in ids for one in (x[:, None, :], x[:, :, None])]


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


def _attention_forward(sizes: _Kernel, *refs: Any) -> None:
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
        out[0, h] = _product(o, selected, _NT, dtype) if sizes.masked else o

    _pipeline(sizes.heads, place, logits, softmax, values, finish)


def _attention_backward(sizes: _Kernel, *refs: Any) -> None:
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
        if not sizes.masked:
            return q, d_out[0, h]
        return _product(q, selected, _NN, dtype), _product(d_out[0, h], selected, _NN, dtype)

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
            products = do.astype(jnp.float32) * out[0, h].astype(jnp.float32)
            mean = jnp.sum(products, axis=0, keepdims=True)
        ds = p * (dp - mean)
        if sizes.masked:
            sizes.store(rows, h, 0, ds)
        else:
            sizes.store(d_bias, h, 0, sizes.load(d_bias, h) + ds)
        return q, do, p.astype(dtype), ds.astype(dtype)

    def write(which: int, h: int, gradient: Array) -> None:
        d_qkv[0, which, h] = gradient.astype(dtype)
        sums[which, h] += jnp.sum(gradient, axis=1, keepdims=True)

    def gradients(h: int, x: tuple[Array, ...]) -> Array:
        q, do, p, ds = x
        write(2, h, _product(do, p, _NT))
        write(1, h, _product(q, ds, _NT) * (1 / _LOG2_E))
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
