"""Several passes of a batch through the same layers at once, packed along the token axis.

MDT's training step takes a full and a masked pass of every image, which differ in their number of
tokens. Their tokens lie one pass after the other in one array, as NaViT packs images
(arXiv:2307.06304, §2.1). Most of a block computes each token for itself and need not know;
attention takes each pass's segment apart, and `over_tokens` gives each its own conditioning. A
layer's weights are so gathered once for all passes, and their gradient is one sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int


class Pass(NamedTuple):
    """A model's arguments for one forward pass.

    Attributes:
      x: noisy latents or images (batch, H, W, C).
      t: timesteps of the training process (batch,), integers or floats.
      labels: classes (batch,); num_classes is the null class; None for an unconditional model.
      ids_keep: kept token ids (batch, kept) of a masked pass, None for the full pass.
    """

    x: Float[Array, "batch h w c"]
    t: Int[Array, " batch"] | Float[Array, " batch"]
    labels: Int[Array, " batch"] | None = None
    ids_keep: Int[Array, "batch kept"] | None = None


class Packing(struct.PyTreeNode):
    """Where the passes' tokens lie in a packed array (batch, n, ...), and where on the grid.

    Attributes:
      lengths: tokens of each pass, n in all.
      ids_keep: each pass's places of its tokens on the grid (batch, length), None for all in order.
      pairs: each pass's row of the relative-position bias table for every (query, key) pair of its
        tokens, (length, length) or (batch, length, length); None where attention needs no such
        rows. They are the same in every layer.
    """

    lengths: tuple[int, ...] = struct.field(pytree_node=False)
    ids_keep: tuple[Int[Array, "batch _"] | None, ...]
    pairs: tuple[Int[Array, "... _ _"] | None, ...]

    def split(self, x: Float[Array, "batch n ..."]) -> list[Float[Array, "batch _ ..."]]:
        """Each pass's tokens of a packed array."""
        return [x[:, start:stop] for start, stop in segments(self.lengths)]


def join(parts: Sequence[Float[Array, "batch _ ..."]]) -> Float[Array, "batch n ..."]:
    """The packed array of each pass's tokens."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def segments(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """The first token of each pass, and the one after its last."""
    stops = list(accumulate(lengths))
    return list(zip([0, *stops], stops, strict=False))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def over_tokens(
    v: Float[Array, "batch passes width"], lengths: tuple[int, ...]
) -> Float[Array, "batch n width"] | Float[Array, "batch 1 width"]:
    """Each pass's vector at each of its tokens; for one pass it broadcasts."""
    owner = np.repeat(np.arange(len(lengths)), lengths)[:, None]
    spread = v[:, :1]
    for i in range(1, len(lengths)):
        spread = jnp.where(owner == i, v[:, i : i + 1], spread)
    return spread


def _spread(v: Array, lengths: tuple[int, ...]) -> tuple[Array, None]:
    return over_tokens(v, lengths), None


def _sum_by_pass(lengths: tuple[int, ...], _: None, gradient: Array) -> tuple[Array]:
    """Sums the gradient over each pass's own tokens.

    The gradient of the selects would read all tokens once for each pass.
    """
    if gradient.shape[1] == 1:
        return (gradient,)
    sums = [gradient[:, a:b].sum(axis=1) for a, b in segments(lengths)]
    return (jnp.stack(sums, axis=1),)


over_tokens.defvjp(_spread, _sum_by_pass)
