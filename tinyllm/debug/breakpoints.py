"""Breakpoints on ops and modules by name, for whatever debugger `breakpoint()` starts."""

from __future__ import annotations
import __future__

import ast
import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from tinyllm.autograd.mode import module_stack, use_formulas
from tinyllm.autograd.observer import Observer, observe
from tinyllm.autograd.registry import REGISTRY, FusedOp
from tinyllm.autograd.tensor import Op
from tinyllm.nn import Module
from tinyllm.system.wording import did_you_mean

METHODS = ("forward", "backward")
_FUTURE_FLAGS = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


@contextlib.contextmanager
def break_on(*places: str, fast: bool = False) -> Iterator[None]:
    """Within this context, stop in the user's debugger inside the named ops and modules.

    Args:
        places: `"softmax.backward"` or `"softmax.forward"` for an op, `"softmax"` for both, or the path of a
            module in the model that is called, such as `"blocks.2.attention"`.
        fast: stop in the fast form that training runs, where an op has one. Otherwise everything within this context
            runs by formula, so that every op of the mathematics is stopped in, whatever training fuses.

    The debugger is the one that `breakpoint()` starts (`PYTHONBREAKPOINT` chooses it), and it stops in the frame
    of the op or module itself, on the first line, where the names are those of the formula.

    Raises:
        ValueError: a place that is neither an op nor, once a model is called, a module in it.

    Example:
        with break_on("softmax.backward"):
            loss.backward()
    """
    with contextlib.ExitStack() as stack:
        if not fast:
            stack.enter_context(use_formulas())
        paths = []
        for place in places:
            op, _, method = place.partition(".")
            if op not in REGISTRY:
                paths.append(place)
                continue
            if method not in ("", *METHODS):
                raise ValueError(f"op {op!r} has no method {method!r}; there are: {', '.join(METHODS)}")
            for name in (method,) if method else METHODS:
                stack.enter_context(_replaced(_form(REGISTRY[op], fast), name))
        if paths:
            stack.enter_context(observe(_ModuleBreakpoints(paths, stack)))
        yield


def _form(op: type[Op], fast: bool) -> type[Op]:
    """The text of an op to stop in; raises ValueError for the formula of what is fused of several."""
    if issubclass(op, FusedOp) and not fast:
        function = op.composition.function
        raise ValueError(
            f"{op.name!r} is fused of several ops, see {function.__module__}.{function.__name__}; break on one of "
            "those, or give fast=True"
        )
    return op.fast_form or op if fast else op


class _ModuleBreakpoints(Observer):
    """Puts breakpoints on modules when the model that they are part of is called."""

    def __init__(self, paths: list[str], stack: contextlib.ExitStack) -> None:
        self.paths, self.stack = paths, stack
        self.prepared: set[int] = set()

    def enter_module(self, module: Any) -> None:
        if len(module_stack.get()) > 1 or id(module) in self.prepared:
            return
        self.prepared.add(id(module))
        modules = dict(module.named_modules(remove_duplicate=False))
        for path in self.paths:
            if path not in modules:
                hint = did_you_mean(path, [*modules, *REGISTRY], "see dict(model.named_modules())")
                raise ValueError(f"{path!r} is no op, and no module of this {type(module).__name__}; {hint}")
            self.stack.enter_context(_stopping(modules[path]))


@contextlib.contextmanager
def _stopping(module: Module) -> Iterator[None]:
    own, current = vars(module).get("forward"), module.forward
    if isinstance(current, types.MethodType):
        current = types.MethodType(with_breakpoint(current.__func__), module)
    else:  # somebody put a function there
        current = with_breakpoint(current)
    module.forward = current  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


@contextlib.contextmanager
def _replaced(op: type, name: str) -> Iterator[None]:
    own = vars(op).get(name)
    setattr(op, name, with_breakpoint(getattr(op, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(op, name)
        else:
            setattr(op, name, own)


def with_breakpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with `breakpoint()` before its first statement, in the same file and on the same lines.

    The call stands in the function itself, so any debugger stops in the function's own frame, and not in a
    wrapper of ours. Raises ValueError when the source is not available.
    """
    code = function.__code__
    definition = _definition(code)
    if definition is None:
        raise ValueError(
            f"{function.__qualname__} has no `def` in a source file, so no breakpoint can be put into it"
        )
    definition.decorator_list = []
    first = 1 if ast.get_docstring(definition) is not None and len(definition.body) > 1 else 0
    first_line = definition.body[first].lineno
    # A tuple in the first line around a call in the line of `def` (in a function of one line: in another). After the
    # call pdb stops at the next line, and from Python 3.13 on at the next instruction: making the tuple is both.
    stop = ast.parse("\n" * (first_line - 1) + "(breakpoint(),)", mode="eval").body
    assert isinstance(stop, ast.Tuple)
    ast.increment_lineno(stop.elts[0], definition.lineno - first_line or 1)
    definition.body.insert(first, ast.Expr(stop))
    # Names of an enclosing scope, `super()`'s __class__ among them, stay free in a function inside another, and
    # private names (`self.__p`) are those of a class of the same name.
    enclosing = ast.parse(
        f"def enclosing({', '.join(code.co_freevars)}):\n class {_owner(function)}: pass"
    ).body[0]
    assert isinstance(enclosing, ast.FunctionDef)
    owner = enclosing.body[0]
    assert isinstance(owner, ast.ClassDef)
    owner.body = [definition]
    tree = ast.fix_missing_locations(ast.Module([enclosing], []))
    flags = code.co_flags & _FUTURE_FLAGS
    compiled = _find(compile(tree, code.co_filename, "exec", flags, dont_inherit=True), code.co_name)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in compiled.co_freevars)
    compiled = compiled.replace(co_qualname=code.co_qualname)
    result = types.FunctionType(
        compiled, function.__globals__, function.__name__, function.__defaults__, closure
    )
    result.__kwdefaults__ = function.__kwdefaults__
    result.__doc__ = function.__doc__
    return result


def _definition(code: types.CodeType) -> ast.FunctionDef | None:
    """The `def` that a function's code was made from, on the lines of its file, or None when there is none."""
    try:
        source = inspect.getsource(code)
        # A method is indented. Its indentation stays, because strings in it may have lines of their own.
        indented = source[:1].isspace()
        tree = ast.parse("if True:\n" + source if indented else source)
    except (OSError, SyntaxError):  # a lambda may be cut out of the middle of its statement
        return None
    ast.increment_lineno(tree, code.co_firstlineno - 1 - indented)
    statements = tree.body[0].body if indented and isinstance(tree.body[0], ast.If) else tree.body
    # Code of exec() has the source of `python -c` from Python 3.13 on, because both files are named "<string>".
    found = [node for node in statements if isinstance(node, ast.FunctionDef) and node.name == code.co_name]
    return found[0] if found else None


def _owner(function: Callable[..., Any]) -> str:
    """The name of the class that a method is written in."""
    names = function.__qualname__.split(".")
    return names[-2] if len(names) > 1 and names[-2].isidentifier() else "_"


def _find(code: types.CodeType, name: str) -> types.CodeType:
    """The code of function `name` inside `code`."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_name == name:
                return constant
            with contextlib.suppress(LookupError):
                return _find(constant, name)
    raise LookupError(name)
