"""Places for boxes and routes for edges: a layered layout of boxes in nested frames.

A frame is laid out by itself and is then one large box of the frame around it, so nothing foreign stands in it.
Edges that enter or leave it pass through ports on its upper and lower side. Within a frame: layers by longest path,
then their order and places across (`layers.py`). Between two layers edges are curves, beside a layer's boxes they are
vertical, so that no edge runs through a box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tinyllm.debug.graphs.layers import WEAK, Link, Vertex, order, place_across

Point = tuple[float, float]
Edge = tuple[str, str]

LANE = 8.0
"""The width that an edge takes where it passes a layer."""
PADDING = 16.0
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


class _Level:
    """The layout of one frame."""

    def __init__(self, frame: Frame, edges: Sequence[Edge], around: dict[str, tuple[Frame, ...]]) -> None:
        self.frame = frame
        self.members = {member.id: Vertex(member.width, member.height, member) for member in frame.members}
        self.entries: dict[str, Vertex] = {}
        self.exits: dict[str, Vertex] = {}
        self.edges: dict[tuple[str, str], tuple[Vertex, Vertex]] = {}
        for source, target in edges:
            start, end = self._member(source, around[source]), self._member(target, around[target])
            if start is not None and start == end:
                continue
            upper = self.members[start] if start else self.entries.setdefault(source, _port())
            lower = self.members[end] if end else self.exits.setdefault(source, _port())
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
        order(self.layers)
        place_across(self.layers)
        self._spread()
        self._place_down()
        self._finish()
        return {key: self._route(links) for key, links in paths.items()}

    def _assign_layers(self) -> None:
        """The longest path from above to each vertex; what has nothing above it moves down to what it feeds."""
        feeds: dict[Vertex, list[Vertex]] = {}
        waiting: dict[Vertex, int] = {}
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

    def _connect(self) -> dict[Edge, list[Link]]:
        """Fill the layers and join them by links; edges from one source share what they can."""
        vertices = [*self.entries.values(), *self.members.values(), *self.exits.values()]
        self.layers: list[list[Vertex]] = [[] for _ in range(max(vertex.layer for vertex in vertices) + 1)]
        for vertex in vertices:
            self.layers[vertex.layer].append(vertex)
        lanes: dict[str, list[Link]] = {}
        paths = {}
        for (source, target), (upper, lower) in self.edges.items():
            lane = lanes.setdefault(source, [])
            while upper.layer + len(lane) + 1 < lower.layer:
                passing = Vertex(LANE, passing=True)
                passing.layer = upper.layer + len(lane) + 1
                self.layers[passing.layer].append(passing)
                lane.append(_link(source, lane[-1].lower if lane else upper, passing))
            shared = lane[: lower.layer - upper.layer - 1]
            last = shared[-1].lower if shared else upper
            paths[source, target] = [*shared, _link(source, last, lower)]
        for vertex in self.members.values():
            # A parameter or constant stands beside the main line and does not bend it.
            leaves = [link for link in vertex.above if link.upper.item and not link.upper.above]
            if len(leaves) < len(vertex.above):
                for link in leaves:
                    link.weight = WEAK * WEAK
        for layer in self.layers:
            layer.sort(key=lambda vertex: not vertex.above and vertex.item is not None)
        return paths

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

    def _route(self, links: Sequence[Link]) -> list[Point]:
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


def _port() -> Vertex:
    return Vertex(1.0)


def _link(source: str, upper: Vertex, lower: Vertex) -> Link:
    """A link that touches boxes in the middle, and frames where they say."""
    leaves = upper.item.exits[source] - upper.width / 2 if isinstance(upper.item, Frame) else 0.0
    enters = lower.item.entries[source] - lower.width / 2 if isinstance(lower.item, Frame) else 0.0
    return Link(upper, lower, leaves, enters)


def _label_place(frame: Frame) -> tuple[float, float]:
    """Where the frame's label begins, clear of the edges that enter, and the width that the frame needs for it."""
    left = PADDING / 2
    for entry in sorted(frame.entries.values()):
        if left + frame.label_width + PADDING / 2 <= entry:
            break
        left = entry + PADDING / 2
    return left, max(frame.width, left + frame.label_width + PADDING / 2)
