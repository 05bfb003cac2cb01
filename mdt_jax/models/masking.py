"""Which tokens a masked pass keeps: how many, drawn on the host, and which, on the device."""

from __future__ import annotations

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def kept_counts(
    num_tokens: int, mask_ratio: float, ratio_span: float
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The numbers of kept tokens a run uses, and the probability of each.

    The reference keeps int(N·(1 − r)), r fixed (MDT) or uniform on [mask_ratio, mask_ratio +
    ratio_span) (MDTv2, span 0.2). A count is a compile-time constant, so for large N the draw is
    over four evenly spaced multiples of 16 in that range (N = 256: 128, 144, 160, 176), equally
    likely, which fused attention and the TPU's tiles want. Where that would move the mean by more
    than 1%, each takes the probability of the counts nearest to it; where the range holds fewer
    than three of them, multiples of 8 do. Below 128 tokens, or over a narrow range, every count is
    used, with the reference's own probability.

    Raises:
      ValueError: a ratio outside [0, 1) or one that keeps no token.
    """
    if not (0 <= mask_ratio < 1 and ratio_span >= 0 and mask_ratio + ratio_span < 1):
        raise ValueError(
            f"masking.ratio {mask_ratio} with masking.ratio_span {ratio_span} leaves [0, 1)"
        )
    if ratio_span == 0:
        low = high = num_tokens * (1 - mask_ratio)
        counts, weights = [int(high)], [1.0]
    else:
        low, high = num_tokens * (1 - mask_ratio - ratio_span), num_tokens * (1 - mask_ratio)
        # Guards against 0.3 + 0.2 falling on either side of a whole number.
        low, high = round(low, 6), round(high, 6)
        mean = (low + high - 1) / 2  # of the reference's counts
        for step, enough in ((16, 3), (8, 2), (1, 1)):
            multiples = np.arange(-(-int(low) // step), int(high) // step + 1) * step
            if (num_tokens >= 128 or step == 1) and len(multiples) >= enough:
                break
        if step > 1:
            few = np.linspace(0, len(multiples) - 1, min(4, len(multiples)))
            multiples = multiples[np.round(few).astype(int)]
        counts = multiples.tolist()
        weights = [1.0] * len(counts)
        if step == 1 or abs(np.mean(counts) / mean - 1) > 0.01:
            # A count stands for the reference's from halfway to its neighbours on.
            between = [(a + b) / 2 if step > 1 else b for a, b in pairwise(counts)]
            weights = np.diff([low, *between, high]).tolist()
    if min(counts) < 1:
        raise ValueError(
            f"a mask ratio up to {mask_ratio + ratio_span} keeps none of {num_tokens} tokens"
        )
    pairs = [(int(c), w / sum(weights)) for c, w in zip(counts, weights, strict=True) if w > 0]
    return tuple(c for c, _ in pairs), tuple(p for _, p in pairs)


def draw_kept_count(
    counts: tuple[int, ...], probabilities: tuple[float, ...], seed: int, step: int
) -> int:
    """The number of tokens a step keeps, from (seed, step) alone: the same on every process."""
    if len(counts) == 1:
        return counts[0]
    rng = np.random.default_rng([seed, step])
    return counts[int(rng.choice(len(counts), p=probabilities))]


def ids_to_keep(noise: Float[Array, "batch n"], num_kept: int) -> Int[Array, "batch {num_kept}"]:
    """Ids of the kept tokens: the first of the argsort of uniform noise, per sample (MAE)."""
    return jnp.argsort(noise, axis=1)[:, :num_kept]
