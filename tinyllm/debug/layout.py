"""Places for boxes and routes for edges: a layered layout of boxes in nested frames.

A frame is laid out by itself and is then one large box of the frame around it, so nothing foreign stands in it.
Edges that enter or leave it pass through ports on its upper and lower side. Within a frame: layers by longest path,
order in the layers by barycentres (Sugiyama, Tagawa and Toda, 1981), positions by isotonic regression. Between two
layers edges are curves, beside a layer's boxes they are vertical, so that no edge runs through a box.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]
Edge = tuple[str, str]

SEPARATION = 30.0
"""The least distance between two boxes of a layer."""
LANE = 8.0
"""The width that an edge takes where it passes a layer."""
PADDING = 16.0
WEAK = 1e-4
"""The weight of links that should not bend others."""
SWEEPS = 8
_OUT = ""
"""The target of routes to a frame's lower side."""


@dataclass
class Box:
    """A rectangle; `arrange` sets `x` and `y`, its upper left corner."""

    id: str
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0


@dataclass
class Frame:
    """A rectangle around boxes and frames; `arrange` sets its place and size, and the place of its label.

    `entries` and `exits` are where edges pass its upper and lower side, from its left side, by the edge's source.
    """

    id: str
    members: list[Box | Frame] = field(default_factory=list)
    label_width: float = 0.0
    label_height: float = 0.0
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0
    label_x: float = 0.0
    entries: dict[str, float] = field(default_factory=dict)
    exits: dict[str, float] = field(default_factory=dict)


def arrange(root: Frame, edges: Sequence[Edge]) -> dict[Edge, list[Point]]:
    """Set the places of all boxes and frames in `root`, and return the route of each edge.

    A route is a list of points from the lower side of the source's box to the upper side of the target's.
    Consecutive points have the same x (a vertical line), or a curve with vertical ends joins them.

    Args:
        root: the outermost frame. edges: pairs of ids of boxes, without cycles.
    """
    around = dict(_frames_around(root, ()))
    inside: dict[str, list[Edge]] = {}
    for source, target in edges:
        for frame in {frame.id: frame for frame in (*around[source], *around[target])}.values():
            inside.setdefault(frame.id, []).append((source, target))
    routes = {
        frame.id: _Level(frame, inside.get(frame.id, []), around).run() for frame in _innermost_first(root)
    }
    _settle(root, 0.0, 0.0)
    return {edge: _joined(edge, around, routes) for edge in edges}


def _frames_around(frame: Frame, outer: tuple[Frame, ...]) -> Iterator[tuple[str, tuple[Frame, ...]]]:
    """Each box with the frames that it is in, outermost first."""
    for member in frame.members:
        if isinstance(member, Frame):
            yield from _frames_around(member, (*outer, frame))
        else:
            yield member.id, (*outer, frame)


def _innermost_first(frame: Frame) -> Iterator[Frame]:
    for member in frame.members:
        if isinstance(member, Frame):
            yield from _innermost_first(member)
    yield frame


def _settle(frame: Frame, x: float, y: float) -> None:
    """Turn places in the frame into places in the picture."""
    frame.x, frame.y = x, y
    for member in frame.members:
        if isinstance(member, Frame):
            _settle(member, x + member.x, y + member.y)
        else:
            member.x, member.y = x + member.x, y + member.y


def _joined(
    edge: Edge, around: dict[str, tuple[Frame, ...]], routes: dict[str, dict[Edge, list[Point]]]
) -> list[Point]:
    """The route of an edge out of its pieces in the frames that it passes."""
    source, target = edge
    up, down = around[source], around[target]
    shared = sum(1 for a, b in zip(up, down, strict=False) if a is b)
    pieces = [(frame, _OUT) for frame in reversed(up[shared:])]
    within = [*[frame.id for frame in down[shared:]], target]
    pieces += list(zip(down[shared - 1 :], within, strict=True))
    points: list[Point] = []
    for frame, goal in pieces:
        for x, y in routes[frame.id][source, goal]:
            point = (x + frame.x, y + frame.y)
            if not points or point != points[-1]:
                points.append(point)
    return points


class _Vertex:
    """A box, a frame, a port of the frame being laid out, or the place where an edge passes a layer."""

    def __init__(self, item: Box | Frame | None, passing: bool = False) -> None:
        self.item, self.passing = item, passing
        self.width = item.width if item else LANE if passing else 1.0
        self.height = item.height if item else 0.0
        self.layer = 0
        self.x = 0.0  # of its middle
        self.above: list[_Link] = []
        self.below: list[_Link] = []


class _Link:
    """The piece of an edge from one layer to the next."""

    def __init__(self, source: str, upper: _Vertex, lower: _Vertex) -> None:
        self.upper, self.lower = upper, lower
        # From the middle of a vertex to where the edge touches it.
        self.upper_offset = (
            upper.item.exits[source] - upper.width / 2 if isinstance(upper.item, Frame) else 0.0
        )
        self.lower_offset = (
            lower.item.entries[source] - lower.width / 2 if isinstance(lower.item, Frame) else 0.0
        )
        # A passing edge gives way to boxes that want to stand under each other.
        self.weight = 1.0 if upper.passing == lower.passing else WEAK
        upper.below.append(self)
        lower.above.append(self)


class _Level:
    """The layout of one frame."""

    def __init__(self, frame: Frame, edges: Sequence[Edge], around: dict[str, tuple[Frame, ...]]) -> None:
        self.frame = frame
        self.members = {member.id: _Vertex(member) for member in frame.members}
        self.entries: dict[str, _Vertex] = {}
        self.exits: dict[str, _Vertex] = {}
        self.edges: dict[tuple[str, str], tuple[_Vertex, _Vertex]] = {}
        for source, target in edges:
            start, end = self._member(source, around[source]), self._member(target, around[target])
            if start is not None and start == end:
                continue
            upper = self.members[start] if start else self.entries.setdefault(source, _Vertex(None))
            lower = self.members[end] if end else self.exits.setdefault(source, _Vertex(None))
            self.edges[source, end or _OUT] = (upper, lower)

    def _member(self, box: str, frames: tuple[Frame, ...]) -> str | None:
        """The id of the member that is the box or has it inside; None for a box outside."""
        for i, frame in enumerate(frames):
            if frame is self.frame:
                return frames[i + 1].id if i + 1 < len(frames) else box
        return None

    def run(self) -> dict[Edge, list[Point]]:
        """Places for the members, and the routes of edges to members and to the frame's lower side."""
        self._assign_layers()
        paths = self._connect()
        if max(map(len, self.layers)) > 1:
            self._order()
        self._place_across()
        self._spread()
        self._place_down()
        self._finish()
        return {key: self._route(links) for key, links in paths.items()}

    def _assign_layers(self) -> None:
        """The longest path from above to each vertex; what has nothing above it moves down to what it feeds."""
        feeds: dict[_Vertex, list[_Vertex]] = {}
        waiting: dict[_Vertex, int] = {}
        for upper, lower in self.edges.values():
            feeds.setdefault(upper, []).append(lower)
            waiting[lower] = waiting.get(lower, 0) + 1
        first = 1 if self.entries else 0
        for vertex in self.members.values():
            vertex.layer = first
        sources = [v for v in (*self.entries.values(), *self.members.values()) if v not in waiting]
        ready = list(sources)
        while ready:
            upper = ready.pop()
            for lower in feeds.get(upper, ()):
                lower.layer = max(lower.layer, upper.layer + 1)
                waiting[lower] -= 1
                if not waiting[lower]:
                    ready.append(lower)
        ports = {*self.entries.values(), *self.exits.values()}
        for vertex in sources:
            if vertex not in ports and vertex in feeds:
                vertex.layer = min(lower.layer for lower in feeds[vertex]) - 1
        last = max([vertex.layer for vertex in self.members.values()], default=first) + 1
        for vertex in self.exits.values():
            vertex.layer = last

    def _connect(self) -> dict[Edge, list[_Link]]:
        """Fill the layers and join them by links; edges from one source share what they can."""
        vertices = [*self.entries.values(), *self.members.values(), *self.exits.values()]
        self.layers: list[list[_Vertex]] = [[] for _ in range(max(vertex.layer for vertex in vertices) + 1)]
        for vertex in vertices:
            self.layers[vertex.layer].append(vertex)
        lanes: dict[str, list[_Link]] = {}
        paths = {}
        for (source, target), (upper, lower) in self.edges.items():
            lane = lanes.setdefault(source, [])
            while upper.layer + len(lane) + 1 < lower.layer:
                passing = _Vertex(None, passing=True)
                passing.layer = upper.layer + len(lane) + 1
                self.layers[passing.layer].append(passing)
                lane.append(_Link(source, lane[-1].lower if lane else upper, passing))
            shared = lane[: lower.layer - upper.layer - 1]
            last = shared[-1].lower if shared else upper
            paths[source, target] = [*shared, _Link(source, last, lower)]
        for vertex in self.members.values():
            # A parameter or constant stands beside the main line and does not bend it.
            leaves = [link for link in vertex.above if link.upper.item and not link.upper.above]
            if len(leaves) < len(vertex.above):
                for link in leaves:
                    link.weight = WEAK * WEAK
        for layer in self.layers:
            layer.sort(key=lambda vertex: not vertex.above and vertex.item is not None)
        return paths

    def _order(self) -> None:
        """Sort each layer by the mean place of its neighbours, down and up, and keep the order with least crossings."""
        best, fewest = [list(layer) for layer in self.layers], self._crossings()
        for sweep in range(2 * SWEEPS):
            if not fewest:
                break
            downward = sweep % 2 == 0
            for i in range(1, len(self.layers)) if downward else range(len(self.layers) - 2, -1, -1):
                places = _places(self.layers[i - 1 if downward else i + 1])
                keys = {}
                for index, vertex in enumerate(self.layers[i]):
                    links = vertex.above if downward else vertex.below
                    ends = [
                        places[link.upper] + link.upper_offset / (link.upper.width + 1)
                        if downward
                        else places[link.lower] + link.lower_offset / (link.lower.width + 1)
                        for link in links
                    ]
                    keys[vertex] = sum(ends) / len(ends) if ends else float(index)
                self.layers[i].sort(key=keys.__getitem__)
            crossings = self._crossings()
            if crossings < fewest:
                best, fewest = [list(layer) for layer in self.layers], crossings
        self.layers = best

    def _crossings(self) -> int:
        count = 0
        for upper, lower in itertools.pairwise(self.layers):
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

    def _place_across(self) -> None:
        """Each vertex as near to above or below its neighbours as the distances in its layer let it be."""
        for layer in self.layers:
            x = 0.0
            for left, vertex in zip([None, *layer], layer, strict=False):
                x += _distance(left, vertex) if left else 0.0
                vertex.x = x
        for sweep in range(3 * SWEEPS + 1):
            downward = sweep % 2 == 0
            for layer in self.layers if downward else reversed(self.layers):
                _settle_layer(layer, downward)
        # Edges that pass layers become straight; then chains of boxes that are bent a little because widths differ.
        for move in (_align_lanes, _straighten):
            for layer in reversed(self.layers):
                move(layer, downward=False)
            for layer in self.layers:
                move(layer, downward=True)

    def _spread(self) -> None:
        """Where several edges end on a box, they end beside each other, in the order in which they come."""
        for vertex in self.members.values():
            if isinstance(vertex.item, Box):
                links = sorted(vertex.above, key=lambda link: link.upper.x + link.upper_offset)
                for i, link in enumerate(links, 1):
                    link.lower_offset = vertex.width * (i / (len(links) + 1) - 0.5)

    def _place_down(self) -> None:
        """The upper and lower edge of each layer; gaps are higher where edges go far across."""
        y = PADDING / 2 + self.frame.label_height
        self.bands: list[tuple[float, float]] = []
        for i, layer in enumerate(self.layers):
            if i > 0:
                across = [
                    abs(link.upper.x + link.upper_offset - link.lower.x - link.lower_offset)
                    for vertex in layer
                    for link in vertex.above
                ]
                y += min(30 + 0.12 * max(across, default=0.0), 64)
            height = max(vertex.height for vertex in layer)
            self.bands.append((y, y + height))
            y += height
        self.frame.height = y + PADDING

    def _finish(self) -> None:
        """Shift everything to begin at the padding, and tell the members and the frame around their places."""
        frame = self.frame
        vertices = [vertex for layer in self.layers for vertex in layer]
        left = min(vertex.x - vertex.width / 2 for vertex in vertices) - PADDING
        for vertex in vertices:
            vertex.x -= left
        frame.width = max(vertex.x + vertex.width / 2 for vertex in vertices) + PADDING
        for vertex in self.members.values():
            assert vertex.item is not None
            top, bottom = self.bands[vertex.layer]
            # What only feeds others stands near them, everything else in the middle of its layer.
            slack = bottom - top - vertex.height
            vertex.item.x = vertex.x - vertex.width / 2
            vertex.item.y = top + (slack if not vertex.above else slack / 2)
        frame.entries = {source: vertex.x for source, vertex in self.entries.items()}
        frame.exits = {source: vertex.x for source, vertex in self.exits.items()}
        frame.label_x, frame.width = _label_place(frame)

    def _route(self, links: Sequence[_Link]) -> list[Point]:
        points: list[Point] = []
        first, last = links[0], links[-1]
        start = first.upper.x + first.upper_offset
        if first.upper.item is None:
            points.append((start, 0.0))
        else:
            points.append((start, first.upper.item.y + first.upper.height))
        for link in links:
            points.append((link.upper.x + link.upper_offset, self.bands[link.upper.layer][1]))
            points.append((link.lower.x + link.lower_offset, self.bands[link.lower.layer][0]))
        end = last.lower.x + last.lower_offset
        points.append((end, self.frame.height if last.lower.item is None else last.lower.item.y))
        return points


def _places(layer: Sequence[_Vertex]) -> dict[_Vertex, int]:
    return {vertex: place for place, vertex in enumerate(layer)}


def _distance(left: _Vertex, right: _Vertex) -> float:
    """The least distance between the middles of two neighbours in a layer."""
    gap = SEPARATION / 2 if left.passing or right.passing else SEPARATION
    return left.width / 2 + gap + right.width / 2


def _settle_layer(layer: Sequence[_Vertex], downward: bool) -> None:
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


def _align_lanes(layer: Sequence[_Vertex], downward: bool) -> None:
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


def _straighten(layer: Sequence[_Vertex], downward: bool) -> None:
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


def _label_place(frame: Frame) -> tuple[float, float]:
    """Where the frame's label begins, clear of the edges that enter, and the width that the frame needs for it."""
    left = PADDING / 2
    for entry in sorted(frame.entries.values()):
        if left + frame.label_width + PADDING / 2 <= entry:
            break
        left = entry + PADDING / 2
    return left, max(frame.width, left + frame.label_width + PADDING / 2)
