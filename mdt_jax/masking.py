"""Which tokens a masked pass keeps: how many, drawn on the host, and which, on the device."""

from __future__ import annotations

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
    likely, which fused attention and the TPU's tiles want. Between 128 and 255 tokens the range
    holds no four multiples of 16: there multiples of 8 take the probability of the counts nearest
    to them. Smaller N uses every count with the reference's own probability.

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
        if num_tokens >= 256:
            multiples = np.arange(-(-low // 16), high // 16 + 1) * 16
            chosen = np.round(np.linspace(0, len(multiples) - 1, min(4, len(multiples)))).astype(
                int
            )
            counts, weights = multiples[chosen].tolist(), [1.0] * len(chosen)
        else:
            step = 8 if num_tokens >= 128 else 1
            counts = list(np.arange(-(-int(low) // step), int(high) // step + 1) * step)
            edges = [
                (a + b) / 2 if step > 1 else b for a, b in zip(counts, counts[1:], strict=False)
            ]
            weights = np.diff([low, *edges, high]).tolist()
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
