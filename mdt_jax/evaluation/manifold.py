"""Improved precision and recall: the share of one set that lies within the other's manifold.

A set's manifold is the union of balls around its features, each reaching to the k-th nearest
neighbour within the set, the point itself not counted (Kynkäänniemi et al. 2019, arXiv:1904.06991).
Precision is the share of samples within the manifold of the reference, recall the reverse.

Distances are computed in blocks, so memory does not grow with the square of the number of images.
ADM's evaluator computes them in float16 where that does not overflow. Here float32 products of
centred features decide every clear case. A distance that is closer to a radius than their rounding
is computed again in float64, and at last by differences, so the counts do not depend on block,
order or device. Matrix products run in NumPy on the host: TPUs and GPUs would round float32
operands first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer

NEIGHBOURS = 3
ROWS_PER_BLOCK = 2048
# Candidates kept beyond the k-th nearest, since float32 may have their order wrong.
_SPARE = 4
# A bound of a squared distance's rounding error, in eps times the sum of the two squared norms.
_ROUNDING = 64


@dataclasses.dataclass(frozen=True)
class Manifolds:
    """The points of each set that lie within the other's manifold.

    Attributes:
      samples_inside: (n,) whether each sample lies within the reference's manifold.
      reference_inside: (m,) whether each reference image lies within the samples' manifold.
    """

    samples_inside: Bool[np.ndarray, "n"]
    reference_inside: Bool[np.ndarray, "m"]

    @property
    def precision(self) -> float:
        """The share of samples within the reference's manifold."""
        return float(self.samples_inside.mean())

    @property
    def recall(self) -> float:
        """The share of reference images within the samples' manifold."""
        return float(self.reference_inside.mean())


def num_pairs(num_reference: int, num_samples: int) -> int:
    """How many pairs of points `compare_manifolds` looks at, for a progress bar."""
    return num_reference**2 + num_samples**2 + num_reference * num_samples


def compare_manifolds(
    reference: Float[np.ndarray, "m d"],
    samples: Float[np.ndarray, "n e"],
    k: int = NEIGHBOURS,
    *,
    block_rows: int = ROWS_PER_BLOCK,
    progress: Callable[[int], None] = lambda _: None,
) -> Manifolds:
    """Finds which points of each set lie within the manifold of the other.

    Args:
      reference: (m, d) features, at least k + 1 of them.
      samples: (n, d) features, at least k + 1 of them.
      k: balls reach to the k-th nearest neighbour.
      block_rows: points of each set that are compared at a time; a block takes 4·block_rows² bytes.
      progress: called after each block with its number of pairs, which add up to `num_pairs`.

    Raises:
      ValueError: fewer than k + 1 points, or different numbers of features.
    """
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"{reference.shape[1]} features against {samples.shape[1]}: use one extractor for both"
        )
    # A shift changes the rounding of distances, not the distances.
    centre = reference.mean(axis=0, dtype=np.float64)
    a, b = _Points(reference, centre), _Points(samples, centre)
    radii_a = _squared_radii(a, k, block_rows, progress)
    radii_b = _squared_radii(b, k, block_rows, progress)
    inside_a, inside_b = np.zeros(len(a), bool), np.zeros(len(b), bool)
    for i in _blocks(len(a), block_rows):
        for j in _blocks(len(b), block_rows):
            distances, rounding = _squared_distances(a.single[i], b.single[j])
            inside_b[j] |= _covered(a, i, radii_a[i], b, j, distances, rounding)
            inside_a[i] |= _covered(b, j, radii_b[j], a, i, distances.T, rounding)
            progress(distances.size)
    return Manifolds(samples_inside=inside_b, reference_inside=inside_a)


def squared_radii(
    features: Float[np.ndarray, "n d"], k: int = NEIGHBOURS, *, block_rows: int = ROWS_PER_BLOCK
) -> Float64[np.ndarray, "n"]:
    """The squared distance of each row to its k-th nearest other row.

    Raises:
      ValueError: fewer than k + 1 rows.
    """
    points = _Points(features, features.mean(axis=0, dtype=np.float64))
    return _squared_radii(points, k, block_rows, lambda _: None)


def precision_within_classes(
    reference: Float[np.ndarray, "m d"],
    reference_labels: Integer[np.ndarray, "m"],
    samples: Float[np.ndarray, "n d"],
    sample_labels: Integer[np.ndarray, "n"],
    k: int = NEIGHBOURS,
) -> dict[int, float]:
    """The share of each class's samples within the manifold of that class's reference images.

    Classes with fewer than k + 1 reference images have no manifold and are left out. Unlike in the
    precision over all classes, a picture of the wrong class is a miss.
    """
    found = {}
    for label in np.unique(sample_labels):
        own = reference[reference_labels == label]
        if len(own) > k:
            found[int(label)] = _precision(own, samples[sample_labels == label], k)
    return found


def precision_per_class(
    samples_inside: Bool[np.ndarray, "n"], labels: Integer[np.ndarray, "n"]
) -> dict[int, float]:
    """The share of each class's samples within the manifold of all reference images."""
    return {
        int(label): float(samples_inside[labels == label].mean()) for label in np.unique(labels)
    }


def _precision(reference: np.ndarray, samples: np.ndarray, k: int) -> float:
    """The precision alone, which a single sample suffices for."""
    centre = reference.mean(axis=0, dtype=np.float64)
    a, b = _Points(reference, centre), _Points(samples, centre)
    radii = _squared_radii(a, k, ROWS_PER_BLOCK, lambda _: None)
    inside = np.zeros(len(b), bool)
    for i in _blocks(len(a), ROWS_PER_BLOCK):
        for j in _blocks(len(b), ROWS_PER_BLOCK):
            distances, rounding = _squared_distances(a.single[i], b.single[j])
            inside[j] |= _covered(a, i, radii[i], b, j, distances, rounding)
    return float(inside.mean())


class _Points:
    """Features less a centre, all in float32 (`single`), or some rows in float64 (`double`)."""

    def __init__(self, features: np.ndarray, centre: np.ndarray):
        self.given, self._centre = features, centre
        shifted = features - centre.astype(features.dtype)
        self.single = shifted.astype(np.float32, copy=False)

    def __len__(self) -> int:
        return len(self.given)

    def double(self, indices: slice | np.ndarray) -> np.ndarray:
        """Some rows, less the centre, in float64."""
        return self.given[indices].astype(np.float64) - self._centre


def _blocks(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _squared_distances(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, float]:
    """(n, m) |u|² + |v|² − 2 u·v of the rows of u (n, d) and v (m, d), and its rounding's bound."""
    norms_u, norms_v = (np.einsum("nd,nd->n", rows, rows) for rows in (u, v))
    distances = u @ v.T
    distances *= -2
    distances += norms_u[:, None]
    distances += norms_v
    largest = norms_u.max(initial=0) + norms_v.max(initial=0)
    return distances, float(_ROUNDING * np.finfo(u.dtype).eps * largest)


def _exact(a: _Points, i: np.ndarray, b: _Points, j: np.ndarray) -> np.ndarray:
    """(n,) squared distances of rows i[n] of a and j[n] of b, by differences in float64."""
    found = np.empty(len(i))
    for part in _blocks(len(i), ROWS_PER_BLOCK):
        difference = a.given[i[part]].astype(np.float64) - b.given[j[part]]
        found[part] = np.einsum("nd,nd->n", difference, difference)
    return found


def _squared_radii(
    points: _Points, k: int, block_rows: int, progress: Callable[[int], None]
) -> np.ndarray:
    count = len(points)
    if count < k + 1:
        raise ValueError(f"a neighbour number {k} needs {k + 1} images at least, there are {count}")
    kept = min(k + _SPARE, count - 1)
    distances = np.full((count, kept), np.inf, np.float32)
    indices = np.zeros((count, kept), np.int64)
    blocks, rounding = list(_blocks(count, block_rows)), 0.0
    for n, i in enumerate(blocks):
        for j in blocks[n:]:  # the matrix is symmetric
            block, bound = _squared_distances(points.single[i], points.single[j])
            rounding = max(rounding, bound)
            if i == j:
                np.fill_diagonal(block, np.inf)
            _keep_nearest(distances[i], indices[i], block, j.start)
            if i != j:
                _keep_nearest(distances[j], indices[j], np.ascontiguousarray(block.T), i.start)
            progress(block.size * (1 if i == j else 2))
    rows = np.arange(count)
    radii = _kth(points, rows, indices, k)
    if kept < count - 1:
        # Rows that may have nearer points than those kept, within the rounding of float32.
        unsure = rows[radii > np.maximum(distances.max(axis=1) - rounding, 0)]
        for part in _blocks(len(unsure), block_rows):
            nearest = _nearest_in_double(points, unsure[part], kept, blocks)
            radii[unsure[part]] = _kth(points, unsure[part], nearest, k)
    return radii


def _nearest_in_double(
    points: _Points, rows: np.ndarray, kept: int, blocks: list[slice]
) -> np.ndarray:
    """(n, kept) indices of the points nearest to some rows, by float64 distances."""
    distances = np.full((len(rows), kept), np.inf)
    indices = np.zeros((len(rows), kept), np.int64)
    for j in blocks:
        block, _ = _squared_distances(points.double(rows), points.double(j))
        block[rows[:, None] == np.arange(j.start, j.stop)] = np.inf
        _keep_nearest(distances, indices, block, j.start)
    return indices


def _kth(points: _Points, rows: np.ndarray, nearest: np.ndarray, k: int) -> np.ndarray:
    """The k-th smallest squared distance of each row to its `nearest` points, (n, kept) indices."""
    pairs = np.repeat(rows, nearest.shape[1])
    exact = _exact(points, pairs, points, nearest.reshape(-1)).reshape(nearest.shape)
    return np.partition(exact, k - 1, axis=1)[:, k - 1]


def _keep_nearest(
    distances: np.ndarray, indices: np.ndarray, block: np.ndarray, first: int
) -> None:
    """Updates the nearest points found so far with those of another block, in place.

    Args:
      distances: (n, kept) squared distances of the nearest points so far.
      indices: (n, kept) their indices.
      block: (n, columns) squared distances to further points.
      first: the index of the block's first column.
    """
    kept = distances.shape[1]
    if block.shape[1] > kept:
        columns = np.argpartition(block, kept - 1, axis=1)[:, :kept]
        block = np.take_along_axis(block, columns, axis=1)
    else:
        columns = np.broadcast_to(np.arange(block.shape[1]), block.shape)
    both = np.concatenate([distances, block], axis=1)
    both_indices = np.concatenate([indices, columns + first], axis=1)
    nearest = np.argpartition(both, kept - 1, axis=1)[:, :kept]
    distances[:] = np.take_along_axis(both, nearest, axis=1)
    indices[:] = np.take_along_axis(both_indices, nearest, axis=1)


def _covered(
    balls: _Points,
    i: slice,
    squared_radii: np.ndarray,
    points: _Points,
    j: slice,
    distances: np.ndarray,
    rounding: float,
) -> np.ndarray:
    """Whether each of some points lies in any of some balls.

    Args:
      balls: the points that balls are around.
      i: the rows of the balls.
      squared_radii: (rows of i,) their squared radii.
      points: the points.
      j: the rows of the points.
      distances: (rows of i, rows of j) float32 squared distances.
      rounding: a bound of their rounding error.

    Returns:
      (rows of j,) booleans.
    """
    nearest = (distances - squared_radii.astype(np.float32)[:, None]).min(axis=0)
    inside = nearest < -rounding
    unsure = np.flatnonzero(~inside & (nearest <= rounding))
    if unsure.size:
        double, rounding = _squared_distances(balls.double(i), points.double(unsure + j.start))
        margin = double - squared_radii[:, None]
        inside[unsure] = _covered_exactly(
            balls, i.start, squared_radii, points, unsure + j.start, margin, rounding
        )
    return inside


def _covered_exactly(
    balls: _Points,
    first: int,
    squared_radii: np.ndarray,
    points: _Points,
    indices: np.ndarray,
    margin: np.ndarray,
    rounding: float,
) -> np.ndarray:
    """`_covered` for some points, where float64 distances may still be too close to a radius.

    `margin` (balls, points) is the squared distance less the squared radius. Each point's likeliest
    ball is tried first, by differences; a miss is struck out and the next ball is tried.
    """
    inside = margin.min(axis=0) < -rounding
    unsure = np.flatnonzero(~inside & (margin.min(axis=0) <= rounding))
    while unsure.size:
        ball = margin[:, unsure].argmin(axis=0)
        hit = _exact(balls, ball + first, points, indices[unsure]) <= squared_radii[ball]
        inside[unsure[hit]] = True
        margin[ball[~hit], unsure[~hit]] = np.inf
        unsure = unsure[~hit]
        unsure = unsure[margin[:, unsure].min(axis=0) <= rounding]
    return inside
