"""A graph as SVG, written by hand: no other program, no browser, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from tinyllm.debug.graphs.elements import Edge, Group, Node
from tinyllm.debug.graphs.layout import Box, Frame, Point, arrange
from tinyllm.debug.tracing import shape_text

FONT = "'DejaVu Sans', Verdana, Helvetica, Arial, sans-serif"
SIZE, LABEL_SIZE = 12, 13
LINE = 17
INSET = 11
BOLD = 1.24
"""How much wider bold letters are."""

FILLS = {
    "module": ("#e8f0fa", "#7d9cc4"), "ops": ("#e8f0fa", "#7d9cc4"), "op": ("#ffffff", "#8a94a3"),
    "parameter": ("#eaf5ea", "#86b08a"), "input": ("#fdf5dc", "#c9b06a"), "constant": ("#f1f1f1", "#a5a5a5"),
}  # fmt: skip
ALARM = ("#fdeaea", "#c25b5b")
TEXT, QUIET, RED, LINES = "#1f2933", "#566270", "#a62b2b", "#66717f"
FRAME_FILLS = ("#fafbfd", "#f3f6fa")

_WIDTHS = {
    0.3: "'IJijl", 0.35: " ,./:;\\|", 0.4: "()-[]ft", 0.45: "!r²", 0.5: '"*_`', 0.55: "?csz", 0.6: "FLkvxy",
    0.65: "$0123456789EPSTYabdeghnopqu{}", 0.7: "ABCKRVXZ", 0.75: "NU", 0.8: "&DGHOQ", 0.85: "#+<=>^w~±×",
    0.9: "M",
}  # fmt: skip
"""Advance widths of DejaVu Sans in ems, rounded up; it is wider than the fonts that may stand in for it."""
_WIDTH_OF = {letter: width for width, letters in _WIDTHS.items() for letter in letters}


def text_width(text: str, size: float = SIZE, bold: bool = False) -> float:
    """An upper estimate of the width of a line of text in pixels."""
    return sum(_WIDTH_OF.get(letter, 1.0) for letter in text) * size * (BOLD if bold else 1.0)


def draw(title: str, nodes: Sequence[Node], edges: Sequence[Edge], groups: Sequence[Group]) -> str:
    """The SVG document of a graph; every node, edge and group is an element with its id and a tooltip."""
    root = Frame("root")
    frames = {None: root} | {
        group.id: Frame(
            group.id,
            label_width=text_width(group.label, LABEL_SIZE, bold=True),
            label_height=LABEL_SIZE + 6.0,
        )
        for group in groups
    }
    for group in groups:
        frames[group.parent].members.append(frames[group.id])
    boxes = {node.id: Box(node.id, _width(node), _height(node)) for node in nodes}
    for node in nodes:
        frames[node.group].members.append(boxes[node.id])
    routes = arrange(root, [(edge.source, edge.target) for edge in edges])
    notes = [title, "value and gradient: mean ± standard deviation in [least, greatest]"]
    width = max(root.width, *[text_width(note) + 2 * INSET for note in notes])
    height = root.height + LINE * len(notes)
    labels = {node.id: node.path or node.label for node in nodes}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.1f} {height:.1f}" font-family="{FONT}" font-size="{SIZE}" fill="{TEXT}">',
        f'<rect width="{width:.1f}" height="{height:.1f}" fill="#ffffff"/>',
        *[_frame(group, frames[group.id], _depth(group, groups)) for group in groups],
        *[_edge(edge, routes[edge.source, edge.target], labels) for edge in edges],
        *[_node(node, boxes[node.id]) for node in nodes],
        *[
            f'<text x="{INSET}" y="{root.height + LINE * i:.1f}" fill="{QUIET}">{escape(note)}</text>'
            for i, note in enumerate(notes)
        ],
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _lines(node: Node) -> list[str]:
    return [*node.lines(), *([node.alarm] if node.alarm else [])]


def _width(node: Node) -> float:
    widths = [text_width(node.label, LABEL_SIZE, bold=True), *map(text_width, _lines(node))]
    return max(widths) + 2 * INSET


def _height(node: Node) -> float:
    return (1 + len(_lines(node))) * LINE + INSET


def _depth(group: Group, groups: Sequence[Group]) -> int:
    parents = {other.id: other.parent for other in groups}
    depth, parent = 0, group.parent
    while parent is not None:
        depth, parent = depth + 1, parents[parent]
    return depth


def _frame(group: Group, frame: Frame, depth: int) -> str:
    return (
        f'<g class="group" id="{group.id}"><title>{escape(group.path)}</title>'
        f'<rect x="{frame.x:.1f}" y="{frame.y:.1f}" width="{frame.width:.1f}" height="{frame.height:.1f}" rx="8" '
        f'fill="{FRAME_FILLS[depth % 2]}" stroke="#b9c4d2" stroke-dasharray="5 3"/>'
        f'<text x="{frame.x + frame.label_x:.1f}" y="{frame.y + LABEL_SIZE + 5:.1f}" font-size="{LABEL_SIZE}" '
        f'font-weight="bold" fill="{QUIET}">{escape(group.label)}</text></g>'
    )


def _edge(edge: Edge, points: Sequence[Point], labels: Mapping[str, str]) -> str:
    shapes = ", ".join(map(shape_text, edge.shapes))
    positions = f", input {' and '.join(map(str, edge.positions))}" if edge.positions else ""
    tooltip = f"{labels[edge.source]} to {labels[edge.target]}: {shapes}{positions}"
    x, y = points[-1]
    twice = (
        f'<text x="{x + 6:.1f}" y="{y - 5:.1f}" font-size="11">{edge.uses}×</text>' if edge.uses > 1 else ""
    )
    return (
        f'<g class="edge" data-source="{edge.source}" data-target="{edge.target}"><title>{escape(tooltip)}</title>'
        f'<path d="{_path(points)}" fill="none" stroke="{LINES}" stroke-width="1.3"/>'
        f'<polygon points="{x:.1f},{y:.1f} {x - 3.6:.1f},{y - 8:.1f} {x + 3.6:.1f},{y - 8:.1f}" fill="{LINES}"/>'
        f"{twice}</g>"
    )


def _path(points: Sequence[Point]) -> str:
    """Vertical lines, and between points beside each other curves that leave and arrive vertically."""
    x, y = points[0]
    commands = [f"M{x:.1f} {y:.1f}"]
    for next_x, next_y in points[1:]:
        if abs(next_x - x) < 0.05:
            commands.append(f"L{next_x:.1f} {next_y:.1f}")
        else:
            middle = (y + next_y) / 2
            commands.append(f"C{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f} {next_x:.1f} {next_y:.1f}")
        x, y = next_x, next_y
    return " ".join(commands)


def _node(node: Node, box: Box) -> str:
    fill, stroke = ALARM if node.alarm else FILLS[node.kind]
    radius = 10 if node.kind in ("parameter", "input", "constant") else 3
    left, y = box.x + INSET, box.y + LINE + 1
    lines = [
        f'<text x="{left:.1f}" y="{y:.1f}" font-size="{LABEL_SIZE}" font-weight="bold">{escape(node.label)}</text>'
    ]
    for i, line in enumerate(_lines(node), 1):
        colour = RED if i > len(node.lines()) else QUIET
        lines.append(f'<text x="{left:.1f}" y="{y + i * LINE:.1f}" fill="{colour}">{escape(line)}</text>')
    return (
        f'<g class="node" id="{node.id}"><title>{escape(chr(10).join(node.details()))}</title>'
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="{radius}" '
        f'fill="{fill}" stroke="{stroke}"/>{"".join(lines)}</g>'
    )
