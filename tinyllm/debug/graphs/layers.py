"""Order and places of vertices in layers: what a layered layout does across.

The order is by barycentres (Sugiyama, Tagawa and Toda, 1981), the places by isotonic regression.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

SEPARATION = 30.0
"""The least distance between two boxes of a layer."""
WEAK = 1e-4
"""The weight of links that should not bend others."""
SWEEPS = 8


class Vertex:
    """Something in a layer: a box (`item`), a port of a frame, or the place where an edge passes the layer."""

    def __init__(self, width: float, height: float = 0.0, item: Any = None, passing: bool = False) -> None:
        self.width, self.height, self.item, self.passing = width, height, item, passing
        self.layer = 0
        self.x = 0.0  # of its middle
        self.above: list[Link] = []
        self.below: list[Link] = []


class Link:
    """The piece of an edge from one layer to the next; the offsets are from the middles to where it touches."""

    def __init__(
        self, upper: Vertex, lower: Vertex, upper_offset: float = 0.0, lower_offset: float = 0.0
    ) -> None:
        self.upper, self.lower = upper, lower
        self.upper_offset, self.lower_offset = upper_offset, lower_offset
        # A passing edge gives way to boxes that want to stand under each other.
        self.weight = 1.0 if upper.passing == lower.passing else WEAK
        upper.below.append(self)
        lower.above.append(self)


def order(layers: list[list[Vertex]]) -> None:
    """Sort each layer by the mean place of its neighbours, down and up, and keep the order with least crossings."""
    best, fewest = [list(layer) for layer in layers], _crossings(layers)
    for sweep in range(2 * SWEEPS):
        if not fewest:
            break
        downward = sweep % 2 == 0
        for i in range(1, len(layers)) if downward else range(len(layers) - 2, -1, -1):
            places = _places(layers[i - 1 if downward else i + 1])
            keys = {}
            for index, vertex in enumerate(layers[i]):
                links = vertex.above if downward else vertex.below
                ends = [
                    places[link.upper] + link.upper_offset / (link.upper.width + 1)
                    if downward
                    else places[link.lower] + link.lower_offset / (link.lower.width + 1)
                    for link in links
                ]
                keys[vertex] = sum(ends) / len(ends) if ends else float(index)
            layers[i].sort(key=keys.__getitem__)
        crossings = _crossings(layers)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best


def _crossings(layers: Sequence[Sequence[Vertex]]) -> int:
    count = 0
    for upper, lower in itertools.pairwise(layers):
        places, below = _places(upper), _places(lower)
        ends = sorted(
            (
                places[link.upper] + link.upper_offset / (link.upper.width + 1),
                below[vertex] + link.lower_offset / (vertex.width + 1),
            )
            for vertex in lower
            for link in vertex.above
        )
        passed: list[float] = []
        for _, end in ends:
            count += len(passed) - bisect.bisect_right(passed, end)
            bisect.insort(passed, end)
    return count


def place_across(layers: Sequence[Sequence[Vertex]]) -> None:
    """Each vertex as near to above or below its neighbours as the distances in its layer let it be."""
    for layer in layers:
        x = 0.0
        for left, vertex in zip([None, *layer], layer, strict=False):
            x += _distance(left, vertex) if left else 0.0
            vertex.x = x
    for sweep in range(3 * SWEEPS + 1):
        downward = sweep % 2 == 0
        for layer in layers if downward else reversed(layers):
            _settle_layer(layer, downward)
    # Edges that pass layers become straight; then chains of boxes that are bent a little because widths differ.
    for move in (_align_lanes, _straighten):
        for layer in reversed(layers):
            move(layer, downward=False)
        for layer in layers:
            move(layer, downward=True)


def _places(layer: Sequence[Vertex]) -> dict[Vertex, int]:
    return {vertex: place for place, vertex in enumerate(layer)}


def _distance(left: Vertex, right: Vertex) -> float:
    """The least distance between the middles of two neighbours in a layer."""
    gap = SEPARATION / 2 if left.passing or right.passing else SEPARATION
    return left.width / 2 + gap + right.width / 2


def _settle_layer(layer: Sequence[Vertex], downward: bool) -> None:
    """Move a layer's vertices to their neighbours in the layer above, or in the one below."""
    desired, weights = [], []
    for vertex in layer:
        total = moment = 0.0
        for link in vertex.above if downward else vertex.below:
            x = link.upper.x + link.upper_offset - link.lower_offset
            if not downward:
                x = link.lower.x + link.lower_offset - link.upper_offset
            total += link.weight
            moment += link.weight * x
        desired.append(moment / total if total else vertex.x)
        weights.append((WEAK if vertex.passing else 1.0) * (total or 0.1))
    distances = [_distance(a, b) for a, b in itertools.pairwise(layer)]
    for vertex, x in zip(layer, nearest_apart(desired, weights, distances), strict=True):
        vertex.x = x


def _align_lanes(layer: Sequence[Vertex], downward: bool) -> None:
    """Move the edges that pass a layer to where they pass the next one, as far as boxes, which stay, let them."""
    desired, weights = [], []
    for vertex in layer:
        links = vertex.above if downward else vertex.below
        ends = [link.upper if downward else link.lower for link in links]
        lanes = [end for end in ends if end.passing] if vertex.passing else []
        desired.append(lanes[0].x if lanes else vertex.x)
        weights.append((WEAK if lanes else WEAK * WEAK) if vertex.passing else 1.0)
    distances = [_distance(a, b) for a, b in itertools.pairwise(layer)]
    for vertex, x in zip(layer, nearest_apart(desired, weights, distances), strict=True):
        vertex.x = x


def _straighten(layer: Sequence[Vertex], downward: bool) -> None:
    """Move what stands almost under (above) its only neighbour exactly there, if half of the gaps is left."""
    for _ in range(2):
        for place, vertex in enumerate(layer):
            links = [link for link in (vertex.above if downward else vertex.below) if link.weight == 1.0]
            if len(links) != 1:
                continue
            (link,) = links
            x = link.upper.x + link.upper_offset - link.lower_offset
            if not downward:
                x = link.lower.x + link.lower_offset - link.upper_offset
            clear = abs(x - vertex.x) <= SEPARATION
            if place > 0:
                clear &= x - layer[place - 1].x >= _distance(layer[place - 1], vertex) - SEPARATION / 4
            if place + 1 < len(layer):
                clear &= layer[place + 1].x - x >= _distance(vertex, layer[place + 1]) - SEPARATION / 4
            if clear:
                vertex.x = x


def nearest_apart(
    desired: Sequence[float], weights: Sequence[float], distances: Sequence[float]
) -> list[float]:
    """The positions with at least these distances that are nearest to the desired ones in weighted least squares.

    After subtracting the distances this is isotonic regression, which pooling adjacent violators solves exactly.

    Example:
        >>> nearest_apart([0.0, 0.0], [1.0, 1.0], [10.0])
        [-5.0, 5.0]
    """
    shifts = [0.0]
    for distance in distances:
        shifts.append(shifts[-1] + distance)
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, shift, weight in zip(desired, shifts, weights, strict=True):
        mean, count = value - shift, 1
        while pools and pools[-1][0] >= mean:
            other_mean, other_weight, other_count = pools.pop()
            mean = (mean * weight + other_mean * other_weight) / (weight + other_weight)
            weight, count = weight + other_weight, count + other_count
        pools.append((mean, weight, count))
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + shift for mean, shift in zip(means, shifts, strict=True)]
