"""Reading a learning curve between its points: the place of a distance, the distance at a place.

Between two neighbouring points the logarithm of the distance is taken to be linear. Beyond the ends
nothing is known, and nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Number = int | float


def first_place(
    places: Sequence[Number], distances: Sequence[Number], distance: Number
) -> Number | None:
    """Where a curve first is at a distance or below.

    Args:
      places: where its points are, in steps, FLOPs or seconds, growing.
      distances: the distance at each, above 0.
      distance: the distance to be reached, above 0.

    Returns:
      The place; the first point's if that is below already; None if the curve never gets there.
    """
    for i, (place, found) in enumerate(zip(places, distances, strict=True)):
        if found <= distance:
            if i == 0:
                return place
            before = distances[i - 1]
            share = math.log(before / distance) / math.log(before / found)
            return places[i - 1] + share * (place - places[i - 1])
    return None


def distance_at(
    places: Sequence[Number], distances: Sequence[Number], place: Number
) -> Number | None:
    """A curve's distance at a place; None outside its first and last point.

    Args:
      places: where its points are, growing.
      distances: the distance at each, above 0.
      place: the place asked for.
    """
    if not places or not places[0] <= place <= places[-1]:
        return None
    if len(places) == 1:
        return distances[0]
    points = list(zip(places, distances, strict=True))
    for (left, before), (right, after) in pairwise(points):
        if place <= right:
            share = (place - left) / (right - left)
            return math.exp((1 - share) * math.log(before) + share * math.log(after))
    raise AssertionError("a place within the ends is between two points")
