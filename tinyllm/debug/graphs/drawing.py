"""The graph of ops behind a Tensor, collapsed by module, as DOT and as SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllm.autograd.backward_pass import ancestors, propagate
from tinyllm.autograd.tensor import Op, Tensor
from tinyllm.backend import current
from tinyllm.debug.graphs.elements import Edge, Group, Kind, Node, Part, Statistics
from tinyllm.debug.graphs.svg import FILLS, draw
from tinyllm.debug.tracing import formula_of
from tinyllm.nn import Module, Parameter
from tinyllm.nn.module import path_of
from tinyllm.system.wording import did_you_mean, nearest

MOST_NODES = 1000
"""Above this many boxes, ops of the same module in a row become one."""


@dataclass(frozen=True)
class Graph:
    """A drawing of a graph: boxes (`nodes`), what flows between them (`edges`), opened modules (`groups`).

    In a notebook it shows itself. The statistics are those of the moment in which it was made.
    """

    title: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    groups: tuple[Group, ...]

    def to_svg(self) -> str:
        """The picture; tooltips hold what does not fit into the boxes."""
        return draw(self.title, self.nodes, self.edges, self.groups)

    def to_dot(self) -> str:
        """The graph in the language of Graphviz, with opened modules as clusters."""
        lines = ["digraph {", "  node [shape=box, style=filled, fontname=Helvetica, fontsize=11];"]
        lines.append(f"  label={_quoted([self.title])};")
        lines += self._cluster(None, "  ")
        lines += [
            f"  {edge.source} -> {edge.target} [tooltip={_quoted(map(str, edge.shapes))}];"
            for edge in self.edges
        ]
        return "\n".join([*lines, "}", ""])

    def save(self, path: str | Path) -> None:
        """Write a file whose suffix says the format: .svg or .dot. Raises ValueError at any other."""
        path = Path(path)
        if path.suffix not in (".svg", ".dot"):
            raise ValueError(f"a graph is saved as .svg or .dot; got {path.name!r}")
        path.write_text(self.to_svg() if path.suffix == ".svg" else self.to_dot(), encoding="utf-8")

    def find(self, path: str) -> Node:
        """The first node with this path or label. Raises KeyError when there is none."""
        for node in self.nodes:
            if path in (node.path, node.label):
                return node
        near = nearest(path, [name for node in self.nodes for name in (node.path, node.label)])
        raise KeyError(f"no node {path!r} in this graph" + (f"; the nearest is {near!r}" if near else ""))

    def _repr_svg_(self) -> str:
        return self.to_svg()

    def __repr__(self) -> str:
        return f"Graph({self.title}: {len(self.nodes)} nodes, {len(self.edges)} edges)"

    def _cluster(self, group: str | None, indent: str) -> Iterator[str]:
        for inner in self.groups:
            if inner.parent == group:
                yield f"{indent}subgraph cluster_{inner.id} {{"
                yield f"{indent}  label={_quoted([inner.label])};"
                yield from self._cluster(inner.id, indent + "  ")
                yield f"{indent}}}"
        for node in self.nodes:
            if node.group == group:
                label = _quoted([node.label, *node.lines(), *([node.alarm] if node.alarm else [])])
                colour = "#fdeaea" if node.alarm else FILLS[node.kind][0]
                tooltip = _quoted(node.details())
                yield f'{indent}{node.id} [label={label}, fillcolor="{colour}", tooltip={tooltip}];'


def graph(loss: Tensor, expand: str | Sequence[str] = (), depth: int = 1, gradients: bool = False) -> Graph:
    """The graph of ops behind `loss`, before backward frees it, with the modules that they ran in as boxes.

    A loss that was computed within `use_formulas()` has the ops of the formulas, otherwise those that training runs.

    Args:
        loss: the Tensor to draw the graph of.
        expand: paths of modules to open into their parts, such as `"blocks.0.attention"`; what a path leads
            through is opened too.
        depth: how many levels of modules are opened: 0 shows a model as one box, 1 its parts.
        gradients: compute the gradients of everything shown, for their statistics; nothing is stored in `.grad`.
            Otherwise those that are in `.grad` already are shown. It needs a loss of one element, and runs the
            backward hooks of modules.

    Raises:
        RuntimeError: no graph leads to `loss`, or it was freed by a backward pass.
        ValueError: a path in `expand` is no module that ran; `gradients` with more than one element.

    Example:
        graph(loss, expand="blocks.0", gradients=True).save("graph.svg")
    """
    if loss.op is None:
        raise RuntimeError(
            "no graph leads to this Tensor; compute it outside no_grad() from something that requires a gradient"
        )
    tensors = ancestors(loss)
    paths = (expand,) if isinstance(expand, str) else tuple(expand)
    names = _Names(tensors, whole=depth == 0 and not paths)
    root = _collapsed(tensors, names, max(depth, 1), names.opened(paths))
    if sum(1 for _ in root.boxes()) > MOST_NODES:
        root.fold()
    return _Drawing(loss, root, names, gradients).graph()


def _quoted(lines: Iterable[str]) -> str:
    """Lines as a string of DOT, each aligned to the left."""
    escaped = [line.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") for line in lines]
    return '"' + "".join(line + "\\l" for line in escaped) + '"'


class _Names:
    """The paths of modules and parameters, from the one module that everything ran in, if there is one.

    With `whole`, or where several models are in the graph, paths begin with the name of the model's class.
    """

    def __init__(self, tensors: Sequence[Tensor], whole: bool) -> None:
        stacks = {id(tensor): _op(tensor).modules for tensor in tensors}
        roots = list({id(stack[0]): stack[0] for stack in stacks.values() if stack}.values())
        self.skip = 1 if len(roots) == 1 and not whole else 0
        self.roots: dict[int, str] = {}
        for root in roots:
            name = type(root).__name__
            same = sum(1 for other in self.roots.values() if other.partition("#")[0] == name)
            self.roots[id(root)] = f"{name}#{same + 1}" if same else name
        self.parameters: dict[int, str] = {}
        for root in roots:
            for path, parameter in root.named_parameters():
                self.parameters.setdefault(id(parameter), self._from(root, path))
        self.known: dict[tuple[int, ...], str] = {}
        self.modules: dict[str, tuple[str, ...]] = {}  # with the paths that lead there
        for stack in {tuple(map(id, stack)): stack for stack in stacks.values()}.values():
            leading = tuple(self.path(stack[:length]) for length in range(self.skip + 1, len(stack) + 1))
            for i, path in enumerate(leading):
                self.modules[path] = leading[: i + 1]

    def stack(self, op: Op) -> tuple[Module, ...]:
        """The modules that the op ran in and that have a place in the drawing."""
        return op.modules[self.skip :]

    def path(self, stack: Sequence[Module]) -> str:
        """The path of the last of the modules."""
        key = tuple(map(id, stack))
        if key not in self.known:
            self.known[key] = self._from(stack[0], path_of(stack))
        return self.known[key]

    def opened(self, expand: Sequence[str]) -> set[str]:
        """The paths to open, with those that lead to them."""
        opened: set[str] = set()
        for path in expand:
            if path not in self.modules:
                hint = did_you_mean(path, self.modules, f"there are: {', '.join(self.modules) or 'none'}")
                raise ValueError(f"expand={path!r} is no module that an op of this graph ran in; {hint}")
            opened.update(self.modules[path])
        return opened

    def _from(self, root: Module, path: str) -> str:
        return path if self.skip else ".".join(filter(None, (self.roots[id(root)], path)))


class _Box:
    """Ops that are drawn as one node."""

    def __init__(self, kind: Kind, parent: _Opened, path: str, module: Module | None) -> None:
        self.kind, self.parent, self.path, self.module = kind, parent, path, module
        self.tensors: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.parameters: list[Tensor] = []
        self.constants: list[tuple[int, str]] = []
        self.fed = False  # whether another box leads here


class _Opened:
    """A module, or the whole graph, that is drawn as a frame around its parts, in the order in which they ran."""

    def __init__(self, parent: _Opened | None, path: str, module: Module | None) -> None:
        self.parent, self.path, self.module = parent, path, module
        self.members: list[_Box | _Opened] = []

    def boxes(self) -> Iterator[_Box]:
        for member in self.members:
            if isinstance(member, _Opened):
                yield from member.boxes()
            else:
                yield member

    def groups(self) -> Iterator[_Opened]:
        """Those inside, outer ones before inner ones."""
        for member in self.members:
            if isinstance(member, _Opened):
                yield member
                yield from member.groups()

    def fold(self) -> None:
        """Make one box of ops in a row. An interval of the order in which they ran closes no cycle."""
        folded: list[_Box | _Opened] = []
        for member in self.members:
            if isinstance(member, _Opened):
                member.fold()
            elif (
                member.kind == "op" and folded and isinstance(folded[-1], _Box) and folded[-1].module is None
            ):
                folded[-1].kind = "ops"
                folded[-1].tensors += member.tensors
                continue
            folded.append(member)
        self.members = folded

    def lineage(self) -> list[_Opened]:
        """This and all around it, innermost first."""
        return [self, *(self.parent.lineage() if self.parent else [])]


def _collapsed(tensors: Sequence[Tensor], names: _Names, depth: int, opened: set[str]) -> _Opened:
    """The boxes: one for each call of a module that stays closed, and one for each other op.

    A call is recognised by its ops following each other, which also keeps the graph of boxes free of cycles when a
    module is called several times.
    """
    root = _Opened(None, "", None)
    for tensor in tensors:
        parent, stack = root, names.stack(_op(tensor))
        offset = len(_op(tensor).modules) - len(stack)
        for level, module in enumerate(stack, 1):
            last = parent.members[-1] if parent.members else None
            if last is None or last.module is not module:
                path = names.path(_op(tensor).modules[: offset + level])
                if level < depth or path in opened:
                    last = _Opened(parent, path, module)
                else:
                    last = _Box("module", parent, path, module)
                parent.members.append(last)
            if isinstance(last, _Box):
                last.tensors.append(tensor)
                break
            parent = last
        else:
            box = _Box("op", parent, parent.path, None)
            box.tensors.append(tensor)
            parent.members.append(box)
    return root


class _Drawing:
    """Turns boxes into nodes and edges, and leaves into nodes or into lines on the box that uses them."""

    def __init__(self, loss: Tensor, root: _Opened, names: _Names, gradients: bool) -> None:
        self.loss, self.root, self.names = loss, root, names
        self.boxes = list(root.boxes())
        self.owner = {id(tensor): box for box in self.boxes for tensor in box.tensors}
        self.owner[id(loss)].outputs.append(loss)
        self.leaves: dict[int, Tensor] = {}
        self.users: dict[int, list[_Box]] = {}
        self.flows: dict[tuple[str, str], list[tuple[Tensor, int]]] = {}
        self.ids = {id(item): f"n{i}" for i, item in enumerate(self.boxes)}
        self.group_ids = {id(group): f"g{i}" for i, group in enumerate(root.groups())}
        self._follow_inputs()
        self.shown = [leaf for leaf in self.leaves.values() if self._settled(leaf)]
        self.ids |= {id(leaf): f"n{i}" for i, leaf in enumerate(self.shown, len(self.boxes))}
        self.computed = self._gradients() if gradients else None

    def graph(self) -> Graph:
        """The nodes, edges and groups."""
        self._connect()
        calls: Counter[str] = Counter()
        groups = []
        for group in self.root.groups():
            assert group.parent is not None
            label = _local(group.path, group.parent) + _call(calls, group.path)
            groups.append(Group(self.group_ids[id(group)], group.path, label, self._group(group.parent)))
        nodes = [self._node(box, calls) for box in self.boxes] + [self._leaf(leaf) for leaf in self.shown]
        edges = []
        for (source, target), uses in self.flows.items():
            shapes = tuple({id(tensor): tensor.shape for tensor, _ in uses}.values())
            positions = tuple(position for _, position in uses if position >= 0)
            edges.append(Edge(source, target, shapes, positions, len(uses) if positions else 1))
        parameters = [leaf for leaf in self.leaves.values() if isinstance(leaf, Parameter)]
        title = f"{self.loss.name or _op(self.loss).name}: {len(self.owner):,} ops"
        if parameters:
            title += f", {len(parameters)} parameters of {sum(leaf.size for leaf in parameters):,} numbers"
        return Graph(title, tuple(nodes), tuple(edges), tuple(groups))

    def _follow_inputs(self) -> None:
        """Find the leaves and their users, and what each box makes for others."""
        for box in self.boxes:
            for tensor in box.tensors:
                for x in _op(tensor).inputs:
                    if x.op is None:
                        self.leaves[id(x)] = x
                        users = self.users.setdefault(id(x), [])
                        if not users or users[-1] is not box:
                            users.append(box)
                        box.fed |= x.requires_grad and not isinstance(x, Parameter)
                        continue
                    source = self.owner[id(x)]
                    if source is not box:
                        box.fed = True
                        if not any(x is output for output in source.outputs):
                            source.outputs.append(x)

    def _settled(self, leaf: Tensor) -> bool:
        """Whether a leaf is a node of its own; otherwise it goes into the box that uses it."""
        if len(self.users[id(leaf)]) > 1 or leaf.name is not None:
            return True
        (box,) = self.users[id(leaf)]
        if isinstance(leaf, Parameter):
            if box.kind != "op":
                box.parameters.append(leaf)
            return box.kind == "op"
        if leaf.requires_grad:
            return True
        if leaf.size == 1:
            if box.kind == "op":
                inputs = _op(box.tensors[0]).inputs
                number = f"{leaf.item():.6g}" if leaf.dtype.kind == "f" else str(leaf.item())
                box.constants += [(i, number) for i, x in enumerate(inputs) if x is leaf]
            return False
        # A mask inside a module is its own affair; the data that it begins with is not.
        return box.kind == "op" or not box.fed

    def _connect(self) -> None:
        for box in self.boxes:
            for tensor in box.tensors:
                for position, x in enumerate(_op(tensor).inputs):
                    source = self.ids.get(id(x if x.op is None else self.owner[id(x)]))
                    target = self.ids[id(box)]
                    if source is not None and source != target:
                        use = (x, position if box.kind == "op" else -1)
                        self.flows.setdefault((source, target), []).append(use)

    def _gradients(self) -> dict[int, Statistics]:
        if self.loss.size != 1:
            raise ValueError(
                f"gradients=True needs a loss of one element; this Tensor has shape {self.loss.shape}"
            )
        wanted = {*self.leaves, *(id(output) for box in self.boxes for output in box.outputs)}
        cotangent = current.xp.ones_like(self.loss.data)
        return {
            id(tensor): Statistics.of(gradient)
            for tensor, gradient in propagate(self.loss, cotangent, retain_graph=True)
            if id(tensor) in wanted
        }

    def _part(self, tensor: Tensor, name: str) -> Part:
        if self.computed is not None:
            gradient = self.computed.get(id(tensor))
        else:
            gradient = None if tensor.grad is None else Statistics.of(tensor.grad)
        return Part(name, tensor.shape, str(tensor.dtype), Statistics.of(tensor.data), gradient)

    def _node(self, box: _Box, calls: Counter[str]) -> Node:
        ops = tuple(_op(tensor).name for tensor in box.tensors)
        box.outputs.sort(key=lambda tensor: _op(tensor).sequence)
        if box.kind == "module":
            label = _local(box.path, box.parent) + _call(calls, box.path)
        elif box.kind == "op":
            name = box.tensors[0].name
            label = ops[0] if name is None else f"{name} = {ops[0]}"
        else:
            label = f"{len(ops):,} ops"
        return Node(
            self.ids[id(box)], box.kind, box.path, label, ops,
            tuple(self._part(output, output.name or _op(output).name) for output in box.outputs),
            tuple(self._part(leaf, _local(self._leaf_path(leaf), box)) for leaf in box.parameters),
            formula_of(_op(box.tensors[0])) if box.kind == "op" else "",
            tuple(box.constants), self._group(box.parent),
        )  # fmt: skip

    def _leaf(self, leaf: Tensor) -> Node:
        kind: Kind = "constant"
        if leaf.requires_grad:
            kind = "parameter" if isinstance(leaf, Parameter) else "input"
        lineages = [box.parent.lineage() for box in self.users[id(leaf)]]
        around = next(group for group in lineages[0] if all(group in lineage for lineage in lineages))
        path = self._leaf_path(leaf)
        name = _local(path, around) or kind
        return Node(
            self.ids[id(leaf)], kind, path, name, (), (self._part(leaf, name),), group=self._group(around)
        )

    def _leaf_path(self, leaf: Tensor) -> str:
        return leaf.name or self.names.parameters.get(id(leaf), "")

    def _group(self, group: _Opened) -> str | None:
        return self.group_ids.get(id(group))


def _op(tensor: Tensor) -> Op:
    assert tensor.op is not None
    return tensor.op


def _local(path: str, around: _Opened | _Box) -> str:
    """A path as seen from the module around it."""
    return path.removeprefix(around.path + ".") if around.path else path


def _call(calls: Counter[str], path: str) -> str:
    """What tells the calls of one module apart."""
    calls[path] += 1
    return f" (call {calls[path]})" if calls[path] > 1 else ""
