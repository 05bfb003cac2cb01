"""Which tokens a masked pass keeps: how many, drawn on the host, and which, on the device."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MOST_COUNTS = 4  # each is a program that takes up to minutes to compile


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
    def of_ratio(
        cls,
        num_tokens: int,
        mask_ratio: float,
        ratio_span: float,
        at_most: int | None = MOST_COUNTS,
    ) -> KeptTokens:
        """The numbers that stand for a mask ratio, or for one drawn in each step.

        The reference keeps int(N·(1 − r)), r fixed (MDT) or uniform on [mask_ratio, mask_ratio +
        ratio_span) (MDTv2, span 0.2). A count is a compile-time constant, so for large N the draw
        is over four evenly spaced multiples of 16 in that range (N = 256: 128, 144, 160, 176),
        equally likely, which fused attention and the TPU's tiles want. Where that would move the
        mean by more than 1%, each takes the probability of the counts nearest to it; where the
        range holds fewer than three of them, multiples of 8 do. Below 128 tokens, or over a narrow
        range, counts need no multiple: all of them are used, with the reference's own
        probabilities, or four spread over the range, with probabilities that keep the reference's
        mean and variance.

        Args:
          num_tokens: N.
          mask_ratio, ratio_span: as above.
          at_most: how many counts there may be. None stands for the rule that runs of before it
            was four have: every count, below 128 tokens or over a narrow range.

        Raises:
          ValueError: a ratio outside [0, 1) or one that keeps no token.
        """
        if not (0 <= mask_ratio < 1 and ratio_span >= 0 and mask_ratio + ratio_span < 1):
            raise ValueError(
                f"masking.ratio {mask_ratio} with masking.ratio_span {ratio_span} leaves [0, 1)"
            )
        # A span that is nothing beside one token is none.
        if round(num_tokens * ratio_span, 6) == 0:
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
            if counts[0] > 0 and (step == 1 or abs(np.mean(counts) / mean - 1) > 0.01):
                # A count stands for the reference's from halfway to its neighbours on.
                between = [(a + b) / 2 if step > 1 else b for a, b in pairwise(counts)]
                weights = np.diff([low, *between, high]).tolist()
                total = sum(weights)
                off = abs(np.dot(counts, weights) / total / mean - 1) > 0.01
                if at_most is not None and (len(counts) > at_most or off):
                    counts, weights = _fewer(counts, np.divide(weights, total), at_most, low, high)
        if min(counts) < 1:
            raise ValueError(
                f"masking.ratio {mask_ratio} with masking.ratio_span {ratio_span}: a mask ratio up "
                f"to {mask_ratio + ratio_span} keeps none of {num_tokens} tokens"
            )
        pairs = [(int(c), w / sum(weights)) for c, w in zip(counts, weights, strict=True) if w > 0]
        return cls(tuple(c for c, _ in pairs), tuple(p for _, p in pairs))

    def to_json(self) -> dict[str, list]:
        """The counts and their probabilities as values of JSON, exact."""
        return {"counts": list(self.counts), "probabilities": list(self.probabilities)}

    @classmethod
    def from_json(cls, values: dict[str, list]) -> KeptTokens:
        """The inverse of `to_json`."""
        return cls(tuple(values["counts"]), tuple(values["probabilities"]))

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

    def in_order(self, seed: int, step: int) -> list[int | None]:
        """The programs in the order in which the steps from `step` on need them.

        Those that the next 10,000 steps do not need come last.
        """
        wanted, order = set(self.programs), dict[int | None, None]()
        for next_step in range(step, step + 10_000):
            if len(order) == len(wanted):
                break
            order.setdefault(self.draw(seed, next_step))
        return [*order, *(count for count in self.programs if count not in order)]

    def __str__(self) -> str:
        return ", ".join(map(str, self.counts)) or "no masked pass"


NO_MASKED_PASS = KeptTokens((), ())


def _fewer(
    counts: list[int], weights: np.ndarray, at_most: int, low: float, high: float
) -> tuple[list[int], list[float]]:
    """A few of some counts, spread over them, that keep the reference's mean and variance.

    Their probabilities are those nearest to what a count gets that stands for all from halfway to
    its neighbours on. Where the variance would need a negative one, the mean alone is kept, by
    probabilities that a power of the count tilts.

    Args:
      counts, weights: the counts and their probabilities.
      at_most: how many to choose.
      low, high: the reference keeps int(u), u uniform between them.
    """
    whole = np.arange(int(low), int(np.ceil(high)))
    chances = np.minimum(whole + 1, high) - np.maximum(whole, low)
    chances /= chances.sum()
    moments = np.array([1.0, chances @ whole, chances @ np.square(whole)])
    few = np.linspace(0, len(counts) - 1, min(at_most, len(counts))).round().astype(int)
    chosen = np.array(counts)[few]
    between = [(a + b) / 2 for a, b in pairwise(few)]
    nearest = np.searchsorted(between, np.arange(len(counts)))
    share = np.bincount(nearest, weights, minlength=len(few))
    # Scaled, since squares of counts are thousands.
    scale = float(chosen[-1]) ** -np.arange(3)
    powers = np.stack([chosen**k for k in range(3)]) * scale[:, None]
    matched = share + np.linalg.lstsq(powers, moments * scale - powers @ share, rcond=None)[0]
    if np.allclose(powers @ matched, moments * scale, rtol=1e-9) and (matched > 0).all():
        return chosen.tolist(), matched.tolist()
    return chosen.tolist(), _tilted(share, chosen, moments[1]).tolist()


def _tilted(share: np.ndarray, counts: np.ndarray, mean: float) -> np.ndarray:
    """Probabilities in proportion to share·exp(λ·count), with the λ that gives a mean.

    The mean is held to the counts' own range.
    """
    places = (counts - counts[0]) / max(counts[-1] - counts[0], 1)
    wanted = (mean - counts[0]) / max(counts[-1] - counts[0], 1)
    low, high = -700.0, 700.0
    for _ in range(200):
        middle = (low + high) / 2
        weights = share * np.exp(middle * (places - 0.5))
        weights /= weights.sum()
        low, high = (middle, high) if weights @ places < wanted else (low, middle)
    return weights


def ids_to_keep(noise: Float[Array, "batch n"], num_kept: int) -> Int[Array, "batch {num_kept}"]:
    """Ids of the kept tokens: the first of the argsort of uniform noise, per sample (MAE)."""
    return jnp.argsort(noise, axis=1)[:, :num_kept]
