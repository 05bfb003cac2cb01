"""The moments of features and their Fréchet distance, and the Inception Score, in float64.

NumPy keeps the sums on the host, since JAX computes in float32 here. Images are streamed: memory
depends on the number of features, not of images.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Float64

# Rows that are added to the moments at a time, in whatever batches they come. Each time the whole
# covariance is read and written, and the same blocks give the same bits at any batch size.
ROWS_PER_FOLD = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (d,) and covariance (d, d) of features, float64.

    Raises:
      ValueError: shapes that do not fit each other, or numbers that are not finite.
    """

    mean: np.ndarray
    covariance: np.ndarray

    def __post_init__(self):
        size = self.mean.size
        if self.mean.shape != (size,) or self.covariance.shape != (size, size):
            raise ValueError(
                f"a mean of shape {self.mean.shape} and a covariance of {self.covariance.shape} do "
                "not belong to one set of features"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("mean or covariance hold numbers that are not finite")

    @functools.cached_property
    def factor(self) -> Float64[np.ndarray, "d r"]:
        """A matrix A with A·Aᵀ = covariance, with as many columns as the covariance's rank r.

        Directions whose variance is only rounding error of the largest are left out: the square
        root would make the error 1e8 times as large.

        Raises:
          ValueError: a clearly negative variance, so the matrix is no covariance.
        """
        # Made symmetric first, as eigh reads one triangle only.
        values, vectors = np.linalg.eigh((self.covariance + self.covariance.T) / 2)
        largest = max(values[-1], 0.0)
        if values[0] < -1e-4 * largest or values[-1] < 0:
            raise ValueError(
                f"the covariance has the negative eigenvalue {values[0]:.3g}, its largest is "
                f"{values[-1]:.3g}: it is no covariance"
            )
        kept = values > len(values) * np.finfo(np.float64).eps * largest
        return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁S₂)^½), FID's distance (Heusel et al. 2017, arXiv:1706.08500).

    The trace of (S₁S₂)^½ is the sum of the singular values of S₁^½ S₂^½, and so of A₁ᵀA₂ for any
    factors A·Aᵀ = S. Two symmetric eigendecompositions and one SVD are accurate to rounding for
    singular covariances, too, where the usual general matrix square root is not (ADM then adds
    1e-6 to the diagonals). For equal arguments rounding can leave about −1e-12 times the traces.

    Raises:
      ValueError: different numbers of features.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(
            f"means of {one.mean.size} and {other.mean.size} features: both sets need the same "
            "extractor (and, for sFID, images of any size but the same network)"
        )
    root = np.linalg.svd(one.factor.T @ other.factor, compute_uv=False).sum()
    difference = one.mean - other.mean
    traces = np.trace(one.covariance) + np.trace(other.covariance)
    return float(difference @ difference + traces - 2 * root)


class FeatureMoments:
    """Running mean and covariance of rows, merged block by block (Chan, Golub & LeVeque 1983).

    Each block is centred by its own mean, so that features far from zero lose no digits.
    """

    def __init__(self, size: int):
        """Moments of no rows yet, which will have `size` features."""
        self.count = 0
        self._mean = np.zeros(size)
        self._scatter = np.zeros((size, size))  # sum of (x − mean)(x − mean)ᵀ
        self._waiting = np.empty((ROWS_PER_FOLD, size))
        self._num_waiting = 0

    def update(self, rows: Float[np.ndarray, "n d"]) -> None:
        """Adds rows; the result has the same bits however they are divided into calls."""
        start = 0
        while start < len(rows):
            taken = rows[start : start + ROWS_PER_FOLD - self._num_waiting]
            self._waiting[self._num_waiting : self._num_waiting + len(taken)] = taken
            self._num_waiting += len(taken)
            start += len(taken)
            if self._num_waiting == ROWS_PER_FOLD:
                self._fold()

    def merge(self, other: FeatureMoments) -> None:
        """Adds the rows that other moments were given."""
        other._fold()
        self._fold()
        self._combine(other.count, other._mean, other._scatter)

    def state(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Count, mean (d,) and scatter matrix (d, d), to send to another process."""
        self._fold()
        return self.count, self._mean, self._scatter

    @classmethod
    def from_state(cls, count: int, mean: np.ndarray, scatter: np.ndarray) -> FeatureMoments:
        """The moments of another's `state`."""
        moments = cls(len(mean))
        moments._combine(int(count), mean, scatter)
        return moments

    def gaussian(self) -> Gaussian:
        """The mean and the unbiased covariance, divided by n − 1.

        Raises:
          ValueError: fewer than two rows, which have no covariance.
        """
        self._fold()
        if self.count < 2:
            raise ValueError(f"a covariance needs two rows, {self.count} came")
        return Gaussian(self._mean.copy(), self._scatter / (self.count - 1))

    def _fold(self) -> None:
        rows, self._num_waiting = self._waiting[: self._num_waiting], 0
        if len(rows):
            mean = rows.mean(axis=0)
            centred = rows - mean
            self._combine(len(rows), mean, centred.T @ centred)

    def _combine(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not count:
            return
        total = self.count + count
        shift = mean - self._mean
        self._scatter += scatter
        if self.count:
            weighted = shift * (self.count * count / total)
            self._scatter += np.outer(weighted, shift)
        self._mean = self._mean + shift * (count / total)
        self.count = total


class InceptionScore:
    """exp of the mean KL(p(y|x) ‖ p(y)) of each split, averaged (Salimans et al. 2016, 1606.03498).

    Image i belongs to split i // split_size, so the score depends on the order of the images, as
    ADM's does, but not on batches or processes. The last, shorter split counts like the others.
    The divergence is computed from two sums, of Σ p log p and of p. A probability of 0 adds 0, its
    limit (ADM's formula gives NaN).
    """

    def __init__(self, num_images: int, num_classes: int, split_size: int = 5000):
        """The score of no images yet, which will be 0 to num_images − 1."""
        self.split_size = split_size
        splits = -(-num_images // split_size)
        # A row for each split: images, Σ p log p, Σ p of each class.
        self.sums = np.zeros((splits, 2 + num_classes))

    def update(self, first: int, probabilities: Float[np.ndarray, "n k"]) -> None:
        """Adds the class probabilities of images `first`, first + 1, ..."""
        indices = (first + np.arange(len(probabilities))) // self.split_size
        p = probabilities.astype(np.float64)
        entropy = (p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)
        for split in np.unique(indices):
            rows = indices == split
            self.sums[split, 0] += rows.sum()
            self.sums[split, 1] += entropy[rows].sum()
            self.sums[split, 2:] += p[rows].sum(axis=0)

    def value(self) -> float:
        """The score over all splits.

        Raises:
          ValueError: a split without images.
        """
        count = self.sums[:, :1]
        if not count.all():
            raise ValueError(f"split {int(np.argmin(count))} of the Inception Score has no images")
        mean = self.sums / count
        marginal = mean[:, 2:]
        log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))
        divergence = mean[:, 1] - (marginal * log_marginal).sum(axis=1)
        return float(np.exp(divergence).mean())
