"""The drawing of a graph: what is in it, what its numbers are, and that one can read it."""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm import Tensor, no_grad, ops, use_formulas
from tinyllm.debug import Graph, graph
from tinyllm.debug.graphs.elements import Statistics
from tinyllm.debug.graphs.layers import nearest_apart
from tinyllm.debug.graphs.layout import Box, Frame, Point, arrange
from tinyllm.debug.graphs.svg import text_width
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import Linear, Module

CONFIG = ModelConfig(vocab_size=11, context_length=8, num_layers=4, num_heads=2, hidden_size=16)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 9))
SVG = "{http://www.w3.org/2000/svg}"
BLOCK_PARTS = ["attention_norm", "attention", "add", "feed_forward_norm", "feed_forward", "add"]


def model_and_loss(**changes: Any) -> tuple[TransformerLM, Tensor]:
    model = TransformerLM(replace(CONFIG, **changes), seed=0)
    return model, ops.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:])


def scalars() -> tuple[Tensor, ...]:
    """The graph of examples/01."""
    a, b, c = (
        Tensor(value, requires_grad=True, name=name)
        for name, value in zip("abc", (2.0, -3.0, 10.0), strict=True)
    )
    return a, b, c, (a * b + c) ** 2


def labels(drawn: Graph, group: str | None = None) -> list[str]:
    return [node.label for node in drawn.nodes if node.group == group]


def joined(drawn: Graph) -> set[tuple[str, str]]:
    names = {node.id: node.label for node in drawn.nodes}
    return {(names[edge.source], names[edge.target]) for edge in drawn.edges}


def group_id(drawn: Graph, path: str) -> str:
    (found,) = [group.id for group in drawn.groups if group.path == path]
    return found


# ---- what is drawn -----------------------------------------------------------------------------


def test_a_transformer_collapses_to_its_parts() -> None:
    model, loss = model_and_loss()
    drawn = graph(loss)
    chain = ["embedding", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm", "head", "cross_entropy"]
    assert labels(drawn) == chain
    assert joined(drawn) == set(itertools.pairwise(chain))
    assert drawn.groups == ()
    for path, module in model.named_modules():
        if path.startswith("blocks.") and path.count(".") == 1:
            node = drawn.find(path)
            assert node.kind == "module"
            assert len(node.ops) == 17
            assert {part.name for part in node.parameters} == {name for name, _ in module.named_parameters()}
            assert sum(part.value.size for part in node.parameters) == module.num_parameters()
    assert f"{model.num_parameters():,} numbers" in drawn.title


def test_every_op_and_parameter_is_counted_once_at_any_depth() -> None:
    model, loss = model_and_loss()
    numbers = {}
    for depth in (0, 1, 2, 3, 9):
        drawn = graph(loss, depth=depth)
        ops_inside = sum(len(node.ops) for node in drawn.nodes)
        parts = [part for node in drawn.nodes for part in node.parameters]
        parts += [node.outputs[0] for node in drawn.nodes if node.kind == "parameter"]
        assert ops_inside == 4 * 17 + 4
        assert sum(part.value.size for part in parts) == model.num_parameters()
        assert len(parts) == len(list(model.parameters()))
        numbers[depth] = len(drawn.nodes)
    assert numbers[0] == 2
    assert numbers[1] == 8
    assert numbers[9] == 4 * 17 + 4 + len(list(model.parameters()))
    assert sorted(numbers.values()) == list(numbers.values())


def test_a_block_opens_into_its_parts_and_its_residual_edges_are_there() -> None:
    _, loss = model_and_loss()
    drawn = graph(loss, expand="blocks.1")
    inside = group_id(drawn, "blocks.1")
    assert labels(drawn, inside) == BLOCK_PARTS
    assert len(labels(drawn)) == 7
    nodes = [node for node in drawn.nodes if node.group == inside]
    before, after = drawn.find("blocks.0").id, drawn.find("blocks.2").id
    attention_norm, attention, add, feed_forward_norm, feed_forward, last = (node.id for node in nodes)
    edges = {(edge.source, edge.target) for edge in drawn.edges}
    assert edges >= {
        (before, attention_norm), (before, add), (attention_norm, attention), (attention, add),
        (add, feed_forward_norm), (add, last), (feed_forward_norm, feed_forward), (feed_forward, last), (last, after),
    }  # fmt: skip


def test_expanding_a_part_opens_what_leads_to_it_and_single_ops_show_their_parameters() -> None:
    _, loss = model_and_loss()
    drawn = graph(loss, expand=["blocks.0.attention", "blocks.0.attention.query"])
    outer, inner = group_id(drawn, "blocks.0"), group_id(drawn, "blocks.0.attention")
    query = group_id(drawn, "blocks.0.attention.query")
    parents = {group.id: group.parent for group in drawn.groups}
    assert parents == {outer: None, inner: outer, query: inner}
    assert labels(drawn, outer) == [part for part in BLOCK_PARTS if part != "attention"]
    assert labels(drawn, query) == ["linear", "weight"]
    assert ("weight", "linear") in joined(drawn)
    (weight,) = [node for node in drawn.nodes if node.kind == "parameter"]
    assert weight.path == "blocks.0.attention.query.weight"
    assert weight.shape == (16, 16)
    assert {"key", "value", "scaled_dot_product_attention", "split_heads", "output"} <= set(
        labels(drawn, inner)
    )


class Halves(Module):
    """x to its two halves, the second doubled."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:1], x[1:] * 2


class Swapped(Module):
    def __init__(self) -> None:
        self.halves = Halves()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.halves(x)
        return second * 10 - first


def test_a_module_with_two_outputs_shows_both_and_the_later_first() -> None:
    node = graph(Swapped()(Tensor(np.array([1.0, 2, 3]), requires_grad=True)).sum()).find("halves")
    assert [part.shape for part in node.outputs] == [(1,), (2,)]
    assert (node.shape, node.value.mean) == ((2,), 5)
    assert "2 outputs, the last:" in node.lines()[0]


def test_tied_weights_are_one_node_with_two_users() -> None:
    _, loss = model_and_loss(tie_embeddings=True)
    assert graph(loss, depth=9).find("embedding.weight").group is None, "not in the frame of one of them"
    drawn = graph(loss)
    weight = drawn.find("embedding.weight")
    assert weight.kind == "parameter"
    assert {drawn_to for source, drawn_to in joined(drawn) if source == "embedding.weight"} == {
        "embedding",
        "head",
    }


def test_the_graph_of_single_numbers() -> None:
    *_, loss = scalars()
    drawn = graph(loss, gradients=True)
    assert joined(drawn) == {
        ("a", "multiply"), ("b", "multiply"), ("c", "add"), ("multiply", "add"), ("add", "power_of_constant"),
    }  # fmt: skip
    assert {node.label: (node.value.mean, node.gradient.mean) for node in drawn.nodes if node.gradient} == {
        "a": (2, -24), "b": (-3, 16), "c": (10, 8), "multiply": (-6, 8), "add": (4, 8), "power_of_constant": (16, 1),
    }  # fmt: skip
    assert "value 16" in drawn.find("power_of_constant").lines()
    assert drawn.find("add").formula == "a + b"


def test_names_constants_and_inputs_used_twice() -> None:
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    scaled = x * 0.125
    scaled.name = "scaled"
    drawn = graph((scaled * scaled + Tensor(np.ones((2, 3)))).sum())
    assert joined(drawn) == {
        ("input", "scaled = multiply"), ("scaled = multiply", "multiply"), ("multiply", "add"), ("constant", "add"),
        ("add", "sum"),
    }  # fmt: skip
    assert drawn.find("scaled = multiply").constants == ((1, "0.125"),)
    (square,) = [edge for edge in drawn.edges if edge.uses > 1]
    assert (square.uses, square.positions, square.shapes) == (2, (0, 1), ((2, 3),))
    assert "2×" in drawn.to_svg()


class Twice(Module):
    """One layer, used before and after a nonlinearity."""

    def __init__(self) -> None:
        self.layer = Linear(3, 3, rng=np.random.default_rng(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(ops.tanh(self.layer(x)))


def test_a_module_that_is_called_twice_is_two_nodes_without_a_cycle() -> None:
    x = Tensor(np.ones((2, 3), np.float32))
    drawn = graph(Twice()(x).sum())
    assert joined(drawn) == {
        ("constant", "layer"), ("layer", "tanh"), ("tanh", "layer (call 2)"), ("layer (call 2)", "sum"),
        ("layer.weight", "layer"), ("layer.weight", "layer (call 2)"), ("layer.bias", "layer"),
        ("layer.bias", "layer (call 2)"),
    }  # fmt: skip
    opened = graph(Twice()(x).sum(), expand="layer")
    assert [group.label for group in opened.groups] == ["layer", "layer (call 2)"]


def test_several_models_in_one_graph_are_told_apart() -> None:
    x = Tensor(np.ones((2, 3), np.float32))
    rng = np.random.default_rng(0)
    loss = Linear(3, 3, bias=False, rng=rng)(Linear(3, 3, bias=False, rng=rng)(x)).sum() + Twice()(x).sum()
    drawn = graph(loss)
    assert {node.label for node in drawn.nodes if node.kind == "module"} == {"Linear", "Linear#2", "Twice"}
    assert labels(graph(loss, expand="Twice.layer"), "g0")[:1] == ["tanh"]


def test_formula_mode_draws_the_ops_of_the_mathematics() -> None:
    q = Tensor(np.ones((1, 2, 3, 4)), requires_grad=True)
    with use_formulas():
        y = ops.scaled_dot_product_attention(q, q, q, causal=True).sum()
    assert {"scores", "softmax", "attention"} <= {node.label for node in graph(y).nodes}


# ---- statistics --------------------------------------------------------------------------------


def test_statistics_are_those_of_the_arrays() -> None:
    model, loss = model_and_loss()
    drawn = graph(loss, gradients=True)
    with no_grad():
        embedded = model.embedding(TOKENS[:, :-1]).data
    value = drawn.find("embedding").value
    assert (value.size, value.least, value.greatest) == (embedded.size, embedded.min(), embedded.max())
    assert math.isclose(value.mean, embedded.mean(dtype=np.float64), rel_tol=1e-12)
    assert math.isclose(value.std, embedded.std(dtype=np.float64), rel_tol=1e-12)
    assert drawn.find("cross_entropy").value.mean == loss.item()
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing is stored"

    shown = {f"{node.path}.{part.name}": part.gradient for node in drawn.nodes for part in node.parameters}
    loss.backward()  # the graph is still there
    for name, parameter in model.named_parameters():
        expected = Statistics.of(parameter.grad)
        assert shown[name] == expected
        assert expected.std > 0


def test_gradients_that_are_known_already_are_shown() -> None:
    model, loss = model_and_loss()
    assert all(node.gradient is None for node in graph(loss).nodes)
    loss.backward(retain_graph=True)
    drawn = graph(loss, depth=9)
    by_path = {node.path: node for node in drawn.nodes if node.kind == "parameter"}
    assert len(by_path) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert by_path[name].gradient == Statistics.of(parameter.grad)
    assert drawn.find("cross_entropy").gradient is None
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = x * 3
    y.retain_grad()
    loss = (y * y).sum()
    loss.backward(retain_graph=True)
    gradient = next(node for node in graph(loss).nodes if node.constants).gradient
    assert gradient is not None
    assert (gradient.least, gradient.greatest) == (6, 12)


def test_statistics_of_awkward_arrays() -> None:
    found = Statistics.of(np.array([1.0, 3.0, np.inf, -np.inf, np.nan]))
    assert (found.mean, found.std, found.least, found.greatest) == (2, 1, 1, 3)
    assert (found.size, found.nans, found.infinities, found.non_finite) == (5, 1, 2, 3)
    assert str(found) == "2 ± 1 in [1, 3], 1 NaN, 2 infinite"
    assert str(Statistics.of(np.zeros((0, 3)))) == "no elements"
    assert str(Statistics.of(np.array(np.nan))) == "nothing finite, 1 NaN"
    assert str(Statistics.of(np.array(7))) == "7"
    assert Statistics.of(np.array([True, False])).mean == 0.5
    assert Statistics.of(np.array([3 + 4j])).mean == 5
    huge = Statistics.of(np.array([3e38, -3e38], dtype=np.float32))
    assert math.isclose(huge.std, 3e38, rel_tol=1e-6)
    assert Statistics.of(np.array([1e308, -1e308])).std == 1e308


def test_what_is_not_finite_is_marked_in_red() -> None:
    x = Tensor(np.array([-1.0, 0.0, 2.0]), requires_grad=True, name="x")
    with np.errstate(all="ignore"):
        loss = (ops.log(x) * 2).sum()
        drawn = graph(loss, gradients=True)
    assert drawn.find("log").alarm == "1 NaN, 1 infinite in value"
    assert drawn.find("x").alarm == "1 infinite in gradient"
    assert "#a62b2b" in drawn.to_svg()
    assert "#a62b2b" not in graph(scalars()[-1]).to_svg()
    assert "1 NaN, 1 infinite in value" in drawn.to_dot()


# ---- the picture -------------------------------------------------------------------------------


Rectangle = tuple[float, float, float, float]


def rectangle(element: ElementTree.Element) -> Rectangle:
    """Left, top, right and bottom."""
    x, y, width, height = (float(element.attrib[name]) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def along(path: str) -> Iterator[Point]:
    """Points on the way of an SVG path of lines and cubic curves."""
    numbers = [
        (piece[0], [float(n) for n in piece[1:].split()]) for piece in re.findall(r"[MLC][^MLC]+", path)
    ]
    here: Point = (0.0, 0.0)
    for command, values in numbers:
        points = list(zip(values[::2], values[1::2], strict=True))
        if command == "M":
            yield points[0]
        for t in np.linspace(0, 1, 24) if command != "M" else ():
            if command == "L":
                yield tuple((1 - t) * np.array(here) + t * np.array(points[0]))
            else:
                p = [np.array(here), *map(np.array, points)]
                weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
                yield tuple(sum(w * q for w, q in zip(weights, p, strict=True)))
        here = points[-1]


def inside(point: Point, box: Rectangle, margin: float = 0.0) -> bool:
    left, top, right, bottom = box
    return left - margin < point[0] < right + margin and top - margin < point[1] < bottom + margin


def overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def encloses(outer: Rectangle, inner: Rectangle) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def elements(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [element for element in root.iter(f"{SVG}g") if element.attrib["class"] == kind]


def check_picture(drawn: Graph) -> None:
    root = ElementTree.fromstring(drawn.to_svg())
    canvas = (0.0, 0.0, float(root.attrib["width"]) + 1, float(root.attrib["height"]) + 1)
    boxes = {
        element.attrib["id"]: rectangle(element.find(f"{SVG}rect")) for element in elements(root, "node")
    }  # type: ignore[arg-type]
    frames = {
        element.attrib["id"]: rectangle(element.find(f"{SVG}rect")) for element in elements(root, "group")
    }  # type: ignore[arg-type]
    assert set(boxes) == {node.id for node in drawn.nodes}
    assert set(frames) == {group.id for group in drawn.groups}

    items = list(boxes.items())
    for i, (name, box) in enumerate(items):
        assert encloses(canvas, box)
        assert not any(overlap(box, other) for _, other in items[i + 1 :]), name
    lineage: dict[str | None, set[str]] = {None: set()}
    for group in drawn.groups:
        lineage[group.id] = lineage[group.parent] | {group.id}
        if group.parent is not None:
            assert encloses(frames[group.parent], frames[group.id])
    for node in drawn.nodes:
        for name, frame in frames.items():
            if name in lineage[node.group]:
                assert encloses(frame, boxes[node.id])
            else:
                assert not overlap(frame, boxes[node.id]), (
                    "a box stands in a frame that it does not belong to"
                )

    texts = check_texts(root, boxes, frames, canvas)
    edges = elements(root, "edge")
    assert len(edges) == len(drawn.edges)
    for edge in edges:
        check_edge(edge, boxes, texts)


def check_texts(
    root: ElementTree.Element, boxes: dict[str, Rectangle], frames: dict[str, Rectangle], canvas: Rectangle
) -> list[Rectangle]:
    """Every text is inside its box and large enough; returns where the labels of frames are."""
    found = []
    for kind, places in (("node", boxes), ("group", frames)):
        for element in elements(root, kind):
            for text in element.iter(f"{SVG}text"):
                size = float(text.attrib.get("font-size", root.attrib["font-size"]))
                assert size >= 11
                assert text.text
                x, y = float(text.attrib["x"]), float(text.attrib["y"])
                width = text_width(text.text, size, bold=text.attrib.get("font-weight") == "bold")
                place = (x, y - 0.8 * size, x + width, y + 0.25 * size)
                assert encloses(places[element.attrib["id"]], place), text.text
                if kind == "group":
                    found.append(place)
    for text in root.findall(f"{SVG}text"):
        assert text.text
        assert float(text.attrib["x"]) + text_width(text.text) <= canvas[2]
        assert float(text.attrib["y"]) + 3 <= canvas[3]
    return found


def check_edge(edge: ElementTree.Element, boxes: dict[str, Rectangle], labels: list[Rectangle]) -> None:
    source, target = boxes[edge.attrib["data-source"]], boxes[edge.attrib["data-target"]]
    path = edge.find(f"{SVG}path")
    assert path is not None
    points = list(along(path.attrib["d"]))
    (x0, y0), (x1, y1) = points[0], points[-1]
    assert abs(y0 - source[3]) < 0.2, "an edge begins on the lower side of its source"
    assert source[0] < x0 < source[2]
    assert abs(y1 - target[1]) < 0.2, "an edge ends on the upper side of its target"
    assert target[0] < x1 < target[2]
    for point in points:
        assert not any(inside(point, box, margin=-0.2) for box in boxes.values()), (
            "an edge runs through a box"
        )
        assert not any(inside(point, label) for label in labels), "an edge runs through the label of a frame"
    heights = [y for _, y in points]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(heights)), "edges go down"


PICTURES: dict[str, Callable[[], Graph]] = {
    "collapsed": lambda: graph(model_and_loss()[1]),
    "one box": lambda: graph(model_and_loss()[1], depth=0),
    "one block": lambda: graph(model_and_loss()[1], expand="blocks.0", gradients=True),
    "attention": lambda: graph(
        model_and_loss()[1], expand=["blocks.1.attention", "blocks.2"], gradients=True
    ),
    "everything": lambda: graph(model_and_loss(num_layers=2)[1], depth=9),
    "tied": lambda: graph(model_and_loss(tie_embeddings=True, num_layers=2)[1], depth=2),
    "scalars": lambda: graph(scalars()[-1], gradients=True),
    "twice": lambda: graph(Twice()(Tensor(np.ones((2, 3), np.float32))).sum(), expand="layer"),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES.keys())
def test_nothing_overlaps_and_every_text_fits(make: Callable[[], Graph]) -> None:
    check_picture(make())


def test_a_model_by_formula_can_be_read() -> None:
    with use_formulas():
        _, loss = model_and_loss(num_layers=2)
    check_picture(graph(loss, expand=["blocks.0.attention", "blocks.1.feed_forward_norm"]))


@pytest.mark.parametrize(
    ("text", "pixels"),
    # Measured in DejaVu Sans at 12 pixels, which the picture asks for first.
    [
        ("gradient -1.12e-05 ± 0.00078 in [-0.00287, 0.00251]", 318.84),
        ("25 ops, 11 parameters of 197,952 numbers", 262.33),
        ("scaled_dot_product_attention", 177.36),
    ],
)
def test_the_width_of_text_is_estimated_from_above_and_closely(text: str, pixels: float) -> None:
    assert pixels <= text_width(text, 12) <= 1.1 * pixels


def test_bold_text_is_wider() -> None:
    assert 199.39 <= text_width("scaled_dot_product_attention", 12, bold=True) <= 1.2 * 199.39


@st.composite
def nested_graphs(draw: st.DrawFn) -> tuple[Frame, list[tuple[str, str]]]:
    """Boxes of many sizes in nested frames, in an order such that edges go forward and frames close no cycle."""
    root = Frame("root")
    path = [root]
    count = draw(st.integers(1, 14))
    boxes = []
    for i in range(count):
        for _ in range(draw(st.integers(0, 2))):
            if len(path) > 1 and draw(st.booleans()) and path[-1].members:
                path.pop()
            elif len(path) < 4:
                frame = Frame(
                    f"g{i}{len(path)}", label_width=draw(st.sampled_from([20.0, 150.0])), label_height=19.0
                )
                path[-1].members.append(frame)
                path.append(frame)
        box = Box(f"n{i}", draw(st.sampled_from([30.0, 90.0, 260.0])), draw(st.sampled_from([40.0, 90.0])))
        path[-1].members.append(box)
        boxes.append(box.id)
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=24)) if pairs else []
    return root, edges


def placed(frame: Frame) -> Iterator[Box | Frame]:
    for member in frame.members:
        yield member
        if isinstance(member, Frame):
            yield from placed(member)


@given(nested_graphs())
@settings(max_examples=60, deadline=None)
def test_any_graph_in_any_frames_is_laid_out_without_overlap(
    made: tuple[Frame, list[tuple[str, str]]],
) -> None:
    root, edges = made
    routes = arrange(root, edges)
    spans = {item.id: (item.x, item.y, item.x + item.width, item.y + item.height) for item in placed(root)}
    spans["root"] = (0.0, 0.0, root.width, root.height)
    for frame in [root, *(item for item in placed(root) if isinstance(item, Frame))]:
        members = [spans[member.id] for member in frame.members]
        label = (frame.label_x, frame.label_x + frame.label_width)
        assert label[0] >= 0
        assert label[1] <= frame.width
        assert not any(label[0] < entry < label[1] for entry in frame.entries.values())
        assert all(encloses(spans[frame.id], member) for member in members)
        assert not any(overlap(a, b) for i, a in enumerate(members) for b in members[i + 1 :])
    boxes = {item.id: spans[item.id] for item in placed(root) if isinstance(item, Box)}
    assert set(routes) == set(edges)
    for (source, target), points in routes.items():
        assert points[0][1] == pytest.approx(boxes[source][3])
        assert points[-1][1] == pytest.approx(boxes[target][1])
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            assert y1 >= y0 - 1e-9
            assert abs(x1 - x0) < 1e-6 or y1 - y0 >= 30 - 1e-6, "a curve has the room of a gap"
            # A curve stays in the rectangle of its ends.
            piece = (min(x0, x1), y0 + 1e-6, max(x0, x1), y1 - 1e-6)
            assert not any(overlap(piece, box) for box in boxes.values())


@given(
    st.lists(st.tuples(st.floats(-100, 100), st.floats(0.1, 10), st.floats(0, 50)), min_size=1, max_size=8)
)
@settings(max_examples=60, deadline=None)
def test_nearest_apart_keeps_distances_and_cannot_be_improved(
    items: list[tuple[float, float, float]],
) -> None:
    desired, weights, distances = [i[0] for i in items], [i[1] for i in items], [i[2] for i in items][1:]
    found = nearest_apart(desired, weights, distances)

    def cost(x: list[float]) -> float:
        return sum(w * (a - b) ** 2 for w, a, b in zip(weights, x, desired, strict=True))

    def apart(x: list[float], slack: float = 1e-9) -> bool:
        return all(b - a >= d - slack for a, b, d in zip(x, x[1:], distances, strict=False))

    assert apart(found)
    # The problem is convex: no small move of neighbours that keeps the distances makes it better.
    for i in range(len(found)):
        for j in range(i + 1, len(found) + 1):
            for step in (-1e-3, 1e-3):
                moved = [x + step * (i <= k < j) for k, x in enumerate(found)]
                assert cost(moved) >= cost(found) - 1e-9 or not apart(moved)


# ---- formats -----------------------------------------------------------------------------------


def check_dot(text: str, drawn: Graph) -> None:
    assert text.startswith("digraph {")
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    assert '"' not in bare.replace('""', ""), "every string ends"
    assert bare.count("{") == bare.count("}") == 1 + len(drawn.groups)
    assert bare.count("[") == bare.count("]")
    nodes = re.findall(r"^\s*(n\d+) \[label=", bare, re.MULTILINE)
    assert len(nodes) == len(set(nodes)) == len(drawn.nodes)
    edges = re.findall(r"^\s*(n\d+) -> (n\d+) \[", bare, re.MULTILINE)
    assert len(edges) == len(drawn.edges)
    assert {end for edge in edges for end in edge} <= set(nodes)
    clusters = re.findall(r"subgraph (cluster_g\d+) \{", bare)
    assert len(clusters) == len(set(clusters)) == len(drawn.groups)


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES.keys())
def test_dot_is_well_formed(make: Callable[[], Graph]) -> None:
    drawn = make()
    check_dot(drawn.to_dot(), drawn)


def test_names_may_hold_anything() -> None:
    name = 'x<&>"\\ {}]\n'
    x = Tensor(np.ones(2), requires_grad=True, name=name)
    drawn = graph((x * x).sum())
    check_dot(drawn.to_dot(), drawn)
    root = ElementTree.fromstring(drawn.to_svg())
    assert any(text.text == name for text in root.iter(f"{SVG}text"))
    check_picture(drawn)


def test_tooltips_say_everything() -> None:
    _, loss = model_and_loss()
    root = ElementTree.fromstring(graph(loss, expand="blocks.0", gradients=True).to_svg())
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    (block,) = [title for title in titles if title.startswith("module blocks.1\n")]
    assert "8 linear" not in block
    assert "7 linear" in block
    assert "parameter attention.query.weight (16,16) float32: " in block
    assert block.count("gradient") == 12
    assert any(title.startswith("op blocks.0\na + b\n") for title in titles)
    assert "blocks.1 to blocks.2: (2,8,16)" in titles


def test_save_writes_what_the_suffix_says(tmp_path: Path) -> None:
    drawn = graph(scalars()[-1])
    drawn.save(tmp_path / "graph.svg")
    drawn.save(str(tmp_path / "graph.dot"))
    assert (tmp_path / "graph.svg").read_text(encoding="utf-8") == drawn.to_svg() == drawn._repr_svg_()
    assert (tmp_path / "graph.dot").read_text(encoding="utf-8") == drawn.to_dot()
    with pytest.raises(ValueError, match=r"as \.svg or \.dot; got 'graph\.png'"):
        drawn.save(tmp_path / "graph.png")
    assert not (tmp_path / "graph.png").exists()


def test_the_same_graph_gives_the_same_picture() -> None:
    first, second = (graph(model_and_loss()[1], expand="blocks.0", gradients=True) for _ in range(2))
    assert first.to_svg() == second.to_svg()
    assert first.to_dot() == second.to_dot()


# ---- size and errors ---------------------------------------------------------------------------


class Chain(Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(10_000):
            x = x * 1.0001
        return x


class Around(Module):
    def __init__(self) -> None:
        self.chain = Chain()

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) + 1


@pytest.mark.parametrize(("make", "label"), [(Chain, "10,001 ops"), (Around, "chain")])
def test_ten_thousand_ops_are_drawn_at_once(make: type[Module], label: str) -> None:
    x = Tensor(np.ones(2), requires_grad=True, name="x")
    loss = make()(x).sum()
    begun = time.perf_counter()
    drawn = graph(loss, gradients=True)
    text = drawn.to_svg() + drawn.to_dot()
    assert time.perf_counter() - begun < 5
    assert len(drawn.nodes) < 5
    assert len(text) < 20_000
    assert len(drawn.find(label).ops) >= 10_000
    gradient = drawn.find("x").gradient
    assert gradient is not None
    assert math.isclose(gradient.mean, 1.0001**10_000, rel_tol=1e-9)


def test_a_thousand_boxes_are_laid_out_without_recursion() -> None:
    x = Tensor(np.ones(2), requires_grad=True)
    y = x
    for _ in range(495):
        y = ops.tanh(y) * x
    begun = time.perf_counter()
    drawn = graph(y.sum())
    svg = drawn.to_svg()
    assert time.perf_counter() - begun < 10
    assert len(drawn.nodes) == 2 * 495 + 2
    ElementTree.fromstring(svg)


def test_an_unknown_path_is_an_error_that_names_the_near_miss() -> None:
    _, loss = model_and_loss()
    with pytest.raises(
        ValueError, match=r"expand='blocks\.0\.atention' is no module .* did you mean 'blocks.0.attention'"
    ):
        graph(loss, expand="blocks.0.atention")
    with pytest.raises(ValueError, match="there are: none"):
        graph(scalars()[-1], expand="blocks.0")


def test_a_graph_that_is_not_there_is_an_error() -> None:
    x = Tensor(np.ones(2), requires_grad=True)
    with pytest.raises(RuntimeError, match="no graph leads to this Tensor"):
        graph(x)
    with no_grad(), pytest.raises(RuntimeError, match="no graph leads to this Tensor"):
        graph(x * x)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="freed by an earlier backward pass"):
        graph(y)


def test_gradients_need_one_element() -> None:
    x = Tensor(np.ones(2), requires_grad=True)
    assert len(graph(x * x).nodes) == 2
    with pytest.raises(ValueError, match=r"needs a loss of one element; this Tensor has shape \(2,\)"):
        graph(x * x, gradients=True)


def test_find_names_the_near_miss() -> None:
    with pytest.raises(KeyError, match="no node 'mutliply' in this graph; the nearest is 'multiply'"):
        graph(scalars()[-1]).find("mutliply")
