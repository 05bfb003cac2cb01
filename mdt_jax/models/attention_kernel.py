"""Attention with a relative-position bias as one Pallas TPU kernel, forward and backward.

The logits (tokens × tokens), the bias and the probabilities never leave the core's vector memory.
Everything lies transposed against the usual form, with tokens along the lanes, as qkv is computed
for it: S is (keys, queries), a softmax reduces over sublanes, and only k and v have to be turned.

The bias of a head is G strips of one small array (`bias_strips`), laid out as N × N once for all
samples; its gradient is summed over samples in the same form. A masked pass keeps K tokens, other
ones in each sample: queries go back to their N places, by a product with a 0/1 matrix, so that each
has its bias in its own lane, and keys take the bias' rows of their places. Lanes at places that
were not kept hold garbage: no result is read from them and no gradient goes into them.

Passes are packed along the lanes. Each has a kernel call of its own, which reads and writes its
block of the packed arrays in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from mdt_jax.models import attention_bodies, placement
from mdt_jax.models.attention_bodies import Sizes
from mdt_jax.models.linear import LANES, matmul_precision
from mdt_jax.models.passes import segments

GRID_SIZE = 16  # G; the logits of a head of G² tokens fit the registers and the core's memory
TOKENS = GRID_SIZE**2
_VMEM_LIMIT = 96 * 2**20
# Bytes of a group's scratch and blocks: with what the compiler adds they fit a v4 core's 16 MiB.
_GROUP_BYTES = 12_300_000


def supports(grid_size: int, head_width: int) -> bool:
    """Whether the kernel takes these sizes."""
    return grid_size == GRID_SIZE and head_width % 8 == 0


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


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(
    qkv: Float[Array, "batch 3 heads width lanes"],
    qkv_bias: Float[Array, "3 heads width"],
    strips: Float[Array, "heads grid offsets"],
    ids_keep: tuple[Int[Array, "batch _"] | None, ...],
    lengths: tuple[int, ...],
    interpret: bool = False,
) -> Float[Array, "batch heads width n"]:
    """softmax(qᵀk/√width + bias) v of each head in each pass, tokens last.

    Softmax and sums are float32, and so are the products of float32.

    Args:
      qkv: queries, keys and values, bfloat16 or float32, the passes' tokens along the lanes. Lanes
        after the n tokens are not read, and their gradient is zero.
      qkv_bias: the bias that was added to them, whose gradient is summed here.
      strips: the relative-position bias (`bias_strips`), float32.
      ids_keep: which of the G² tokens each pass has, None for all of them in order.
      lengths: tokens of each pass, n in all.
      interpret: whether to interpret the kernels, which needs no TPU.

    Raises:
      ValueError: a pass before the last that does not fill its block of G² lanes.
    """
    return _forward_rule(qkv, qkv_bias, strips, ids_keep, lengths, interpret)[0]


def _forward_rule(
    qkv: Array,
    qkv_bias: Array,
    strips: Array,
    ids_keep: tuple[Array | None, ...],
    lengths: tuple[int, ...],
    interpret: bool,
) -> tuple[Array, Any]:
    masks = tuple(ids is not None for ids in ids_keep)
    kept = [ids for ids in ids_keep if ids is not None]

    def local(qkv: Array, strips: Array, *kept: Array) -> tuple[Array, ...]:
        out, sums = None, []
        for call, ids in _calls(qkv, strips, lengths, masks, kept):
            out, log_sums = call.forward(qkv, strips, out, ids, interpret)
            sums.append(log_sums)
        return out, *sums

    run = placement.current.get().partition(
        local,
        (_QKV, _STRIPS, *[_IDS] * len(kept)),
        (_BY_HEAD,) * (1 + len(lengths)),
    )
    out, *log_sums = run(qkv, strips, *kept)
    return out, (qkv, strips, ids_keep, out, log_sums)


def _backward_rule(
    lengths: tuple[int, ...], interpret: bool, saved: Any, d_out: Array
) -> tuple[Array | None, ...]:
    qkv, strips, ids_keep, out, log_sums = saved
    masks = tuple(ids is not None for ids in ids_keep)
    kept = [ids for ids in ids_keep if ids is not None]

    def local(qkv: Array, strips: Array, out: Array, d_out: Array, *more: Array) -> Any:
        log_sums, kept = more[: len(lengths)], more[len(lengths) :]
        d_qkv, d_strips, d_bias = None, [], []
        calls = _calls(qkv, strips, lengths, masks, kept)
        for (call, ids), sums in zip(calls, log_sums, strict=True):
            found = call.backward(qkv, strips, out, sums, d_out, d_qkv, ids, interpret)
            d_qkv = found[0]
            d_strips.append(found[1])
            d_bias.append(found[2])
        # Sums over this device's samples.
        return d_qkv, reduce(jnp.add, d_strips)[None], reduce(jnp.add, d_bias)[None, ..., 0]

    run = placement.current.get().partition(
        local,
        (_QKV, _STRIPS, *[_BY_HEAD] * (2 + len(lengths)), *[_IDS] * len(kept)),
        (_QKV, _BY_HEAD, ("batch", None, "heads", None)),
    )
    d_qkv, d_strips, d_bias = run(qkv, strips, out, d_out, *log_sums, *kept)
    more, shape = qkv.shape[-1] - d_qkv.shape[-1], d_qkv.shape
    if placement.current.get().merges:
        # Features as one axis, as they come from the product: there both this and its slice vanish.
        d_qkv = d_qkv.reshape(shape[0], -1, shape[-1])
    d_qkv = jnp.pad(d_qkv, [(0, 0)] * (d_qkv.ndim - 1) + [(0, more)]).reshape(qkv.shape)
    return d_qkv, d_bias.sum(axis=0), d_strips.sum(axis=0), None


attention.defvjp(_forward_rule, _backward_rule)
_QKV, _BY_HEAD = ("batch", None, "heads", None, None), ("batch", "heads", None, None)
_STRIPS, _IDS = ("heads", None, None), ("batch", None)


def _calls(
    qkv: Array,
    strips: Array,
    lengths: tuple[int, ...],
    masks: tuple[bool, ...],
    kept: Sequence[Array],
) -> Iterator[tuple[_Call, Array | None]]:
    """The kernel call of each pass, with the ids of its tokens if they are kept ones."""
    ids = iter(kept)
    for (start, stop), masked in zip(segments(lengths), masks, strict=True):
        if start % TOKENS:
            raise ValueError(
                f"passes of {lengths} tokens: those before the last must have {TOKENS}, or several"
            )
        call = _Call.of(qkv, strips, start, stop - start, sum(lengths), masked)
        yield call, next(ids) if masked else None


@dataclasses.dataclass(frozen=True)
class _Call(Sizes):
    """The kernel calls of one pass on one device's part of the arrays.

    The grid is (groups of heads, samples): the bias of a group stays on the core while the samples
    go by, and a chip with two cores takes a group on each.

    Attributes beside those of `Sizes`:
      batch: samples.
      groups: groups of heads.
      block: which block of lanes of the packed arrays is this pass's.
      lanes: lanes of qkv in a block.
      packed: n, the tokens of all passes.
    """

    batch: int
    groups: int
    block: int
    lanes: int
    packed: int

    @classmethod
    def of(
        cls, qkv: Array, strips: Array, start: int, tokens: int, packed: int, masked: bool
    ) -> _Call:
        batch, _, heads, width, lanes = qkv.shape
        call = cls(
            heads=heads,
            width=width,
            tokens=tokens,
            grid_size=strips.shape[1],
            masked=masked,
            dtype=qkv.dtype,
            batch=batch,
            groups=1,
            block=start // TOKENS,
            lanes=min(TOKENS, lanes),
            packed=packed,
        )
        # As few groups as fit, an even number where it can be, for two cores.
        groups = next(
            n
            for n in range(1, heads + 1)
            if heads % n == 0
            and (n == heads or heads // n * call.bytes_per_head() <= _GROUP_BYTES)
            and (n % 2 == 0 or heads % 2)
        )
        return dataclasses.replace(call, groups=groups, heads=heads // groups)

    def bytes_per_head(self) -> int:
        """Bytes of the backward kernel's scratch and blocks, which come twice, lanes padded."""
        lanes, size = -(-self.lanes // LANES) * LANES, jnp.dtype(self.dtype).itemsize
        scratch = 4 * self.places * (2 * self.places + self.masked * self.tokens)
        blocks = 2 * self.width * (8 * lanes * size + 3 * LANES * 4)
        return scratch + blocks

    def forward(
        self, qkv: Array, strips: Array, out: Array | None, ids: Array | None, interpret: bool
    ) -> tuple[Array, Array]:
        """Writes this pass's block of the output; and log₂ of its softmax's sums.

        Args:
          qkv, strips: as `attention` has them.
          out: the output with the blocks before this pass's, None for the first.
          ids: the places of this pass's tokens, None for all in order.
          interpret: whether to interpret the kernel.
        """
        heads = self.groups * self.heads
        sums = (self.batch, heads, 1, self.places)
        return self._run(
            attention_bodies.attention_forward,
            out,
            (*_ids_twice(ids), qkv, strips),
            [*self._ids_specs(), self._lanes_of(3), self._strips_spec()],
            [
                (self._tokens_of(), (self.batch, heads, self.width, self.packed), self.dtype),
                (self._sums_spec(), sums, jnp.float32),
            ],
            [self._rows(self.places), *self._rows_of_kept()],
            interpret,
        )

    def backward(
        self,
        qkv: Array,
        strips: Array,
        out: Array,
        log_sums: Array,
        d_out: Array,
        d_qkv: Array | None,
        ids: Array | None,
        interpret: bool,
    ) -> tuple[Array, Array, Array]:
        """Writes this pass's block of qkv's gradient; and the gradients of strips and qkv's bias.

        `log_sums` are what `forward` returned, `d_qkv` holds the blocks before this pass's.
        """
        heads = self.groups * self.heads
        bias_spec = pl.BlockSpec((3, self.heads, self.width, 1), lambda g, _: (0, g, 0, 0))
        return self._run(
            attention_bodies.attention_backward,
            d_qkv,
            (*_ids_twice(ids), qkv, out, log_sums, d_out, strips),
            [
                *self._ids_specs(),
                self._lanes_of(3),
                self._tokens_of(),
                self._sums_spec(),
                self._tokens_of(),
                self._strips_spec(),
            ],
            [
                (self._tokens_of(3), (*qkv.shape[:-1], self.packed), qkv.dtype),
                (self._strips_spec(), strips.shape, jnp.float32),
                (bias_spec, (3, heads, self.width, 1), jnp.float32),
            ],
            [*[self._rows(self.places)] * 2, *self._rows_of_kept()],
            interpret,
        )

    def _run(
        self,
        body: Callable,
        written: Array | None,
        arguments: tuple[Array, ...],
        inputs: list[pl.BlockSpec],
        outputs: list[tuple[pl.BlockSpec, tuple[int, ...], Any]],
        scratch: list[Any],
        interpret: bool,
    ) -> Any:
        """Calls a kernel; its first output goes into the array `written`, if there is one."""

        def kernel(*refs: Any) -> None:
            body(self, *refs[first:])

        first, aliases = 0, {}
        if written is not None:
            first, aliases = 1, {0: 0}
            arguments = (written, *arguments)
            inputs = [pl.BlockSpec(memory_space=pl.ANY), *inputs]
        return pl.pallas_call(
            kernel,
            grid=(self.groups, self.batch),
            in_specs=inputs,
            out_specs=[spec for spec, _, _ in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
            scratch_shapes=scratch,
            input_output_aliases=aliases,
            interpret=interpret,
            name=body.__name__ + ("_masked" if self.masked else ""),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
            ),
        )(*arguments)

    def _lanes_of(self, count: int) -> pl.BlockSpec:
        """This pass's block of (batch, count, heads, width, lanes)."""
        block = (1, count, self.heads, self.width, self.lanes)
        return pl.BlockSpec(block, lambda g, b: (b, 0, g, 0, self.block))

    def _tokens_of(self, count: int | None = None) -> pl.BlockSpec:
        """This pass's block of (batch, heads, width, n), or of (batch, count, heads, width, n)."""
        tokens = min(TOKENS, self.packed)
        if count is None:
            one = (1, self.heads, self.width, tokens)
            return pl.BlockSpec(one, lambda g, b: (b, g, 0, self.block))
        block = (1, count, self.heads, self.width, tokens)
        return pl.BlockSpec(block, lambda g, b: (b, 0, g, 0, self.block))

    def _sums_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.heads, 1, self.places), lambda g, b: (b, g, 0, 0))

    def _strips_spec(self) -> pl.BlockSpec:
        block = (self.heads, self.grid_size, (2 * self.grid_size - 1) * self.grid_size)
        return pl.BlockSpec(block, lambda g, _: (g, 0, 0))

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


def _ids_twice(ids: Array | None) -> list[Array]:
    """Kept ids as rows, for the scalar core, and as columns."""
    return [] if ids is None else [ids[:, None, :], ids[:, :, None]]
