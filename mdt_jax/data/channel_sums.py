"""Each channel's mean and standard deviation over a data set, added up part by part."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float


class ChannelSums:
    """Counts, means and squared deviations of channels, added up part by part in float64.

    Parts are joined by Chan, Golub and LeVeque's formula (1979), so that nothing cancels.

    Attributes:
      count: latents' places that were counted.
      mean: (channels,), the mean of the posteriors' means.
      squares: (channels,), the sum of squared deviations of the means from it.
      variance: (channels,), the sum of the posteriors' own variances.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.mean, self.squares, self.variance = np.zeros((3, channels))

    def add(self, posteriors: Float[np.ndarray, "... moments"]) -> None:
        """Adds posteriors, means before standard deviations."""
        mean, std = np.split(np.asarray(posteriors, np.float64), 2, axis=-1)
        axes = tuple(range(mean.ndim - 1))
        part = ChannelSums(mean.shape[-1])
        part.count = int(np.prod(mean.shape[:-1]))
        if part.count:
            part.mean = mean.mean(axes)
            part.squares = np.square(mean - part.mean).sum(axes)
            part.variance = np.square(std).sum(axes)
            self.join(part)

    def join(self, other: ChannelSums) -> None:
        """Adds another part's sums."""
        count = self.count + other.count
        if not count:
            return
        apart = other.mean - self.mean
        self.squares += other.squares + np.square(apart) * (self.count * other.count / count)
        self.mean = self.mean + apart * (other.count / count)
        self.variance += other.variance
        self.count = count

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of latents that are drawn from the posteriors.

        The variance of a draw is that of the means, and the mean of the variances.
        """
        return self.mean, np.sqrt((self.squares + self.variance) / max(self.count, 1))

    def to_json(self) -> dict[str, Any]:
        """The sums as values of JSON, exact."""
        lists = {name: getattr(self, name).tolist() for name in ("mean", "squares", "variance")}
        return {"count": self.count} | lists

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ChannelSums:
        """The inverse of `to_json`."""
        sums = cls(len(values["mean"]))
        sums.count = values["count"]
        for name in ("mean", "squares", "variance"):
            setattr(sums, name, np.array(values[name], np.float64))
        return sums
