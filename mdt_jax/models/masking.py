"""Which tokens a masked pass keeps: how many, drawn on the host, and which, on the device."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class KeptTokens:
    """How many tokens the masked passes of a run keep: a draw for each step, or no masked pass.

    Attributes:
      counts: the numbers of kept tokens, each a program of its own; empty without a masked pass.
      probabilities: how likely each is.
    """

    counts: tuple[int, ...]
    probabilities: tuple[float, ...]

    @classmethod
    def of_ratio(cls, num_tokens: int, mask_ratio: float, ratio_span: float) -> KeptTokens:
        """The numbers that stand for a mask ratio, or for one drawn in each step.

        The reference keeps int(N·(1 − r)), r fixed (MDT) or uniform on [mask_ratio, mask_ratio +
        ratio_span) (MDTv2, span 0.2). A count is a compile-time constant, so for large N the draw
        is over four evenly spaced multiples of 16 in that range (N = 256: 128, 144, 160, 176),
        equally likely, which fused attention and the TPU's tiles want. Where that would move the
        mean by more than 1%, each takes the probability of the counts nearest to it; where the
        range holds fewer than three of them, multiples of 8 do. Below 128 tokens, or over a narrow
        range, every count is used, with the reference's own probability.

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
            mean = (low + high - 1) / 2  # mean of the reference's counts
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
                f"masking.ratio {mask_ratio} with masking.ratio_span {ratio_span}: a mask ratio up "
                f"to {mask_ratio + ratio_span} keeps none of {num_tokens} tokens"
            )
        pairs = [(int(c), w / sum(weights)) for c, w in zip(counts, weights, strict=True) if w > 0]
        return cls(tuple(c for c, _ in pairs), tuple(p for _, p in pairs))

    @property
    def programs(self) -> dict[int | None, float]:
        """The step's programs by their number of kept tokens, and how often each runs.

        Without a masked pass it is one, under None.
        """
        return dict(zip(self.counts, self.probabilities, strict=True)) or {None: 1.0}

    @property
    def mean(self) -> float | None:
        """The mean number of kept tokens, None without a masked pass."""
        return float(np.dot(self.counts, self.probabilities)) if self.counts else None

    @property
    def nearest_to_mean(self) -> int | None:
        """The number of kept tokens nearest to the mean, None without a masked pass."""
        mean = self.mean
        return None if mean is None else min(self.counts, key=lambda n: abs(n - mean))

    def draw(self, seed: int, step: int) -> int | None:
        """The number of tokens a step keeps, from (seed, step) alone: the same on every process.

        None without a masked pass.
        """
        if len(self.counts) < 2:
            return next(iter(self.programs))
        rng = np.random.default_rng([seed, step])
        return self.counts[int(rng.choice(len(self.counts), p=self.probabilities))]

    def __str__(self) -> str:
        return ", ".join(map(str, self.counts)) or "no masked pass"


NO_MASKED_PASS = KeptTokens((), ())


def ids_to_keep(noise: Float[Array, "batch n"], num_kept: int) -> Int[Array, "batch {num_kept}"]:
    """Ids of the kept tokens: the first of the argsort of uniform noise, per sample (MAE)."""
    return jnp.argsort(noise, axis=1)[:, :num_kept]
