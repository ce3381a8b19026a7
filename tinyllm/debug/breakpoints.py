"""Breakpoints on ops and modules by name, for whatever debugger `breakpoint()` starts."""

from __future__ import annotations
import __future__

import ast
import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from tinyllm.autograd.mode import Observer, module_stack, observe
from tinyllm.autograd.tensor import REGISTRY
from tinyllm.nn import Module
from tinyllm.system.wording import did_you_mean

METHODS = ("forward", "backward", "reference")
_FUTURE_FLAGS = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


@contextlib.contextmanager
def break_on(*places: str) -> Iterator[None]:
    """Within this context, stop in the user's debugger inside the named ops and modules.

    Args:
        places: `"softmax.backward"` or `"softmax.forward"` for an op, `"softmax"` for both, or the path of a
            module in the model that is called, such as `"blocks.2.attention"`.

    The debugger is the one that `breakpoint()` starts (`PYTHONBREAKPOINT` chooses it), and it stops in the frame
    of the op or module itself, on the first line, where the names are those of the formula.

    Raises:
        ValueError: a place that is neither an op nor, once a model is called, a module in it.

    Example:
        with break_on("softmax.backward"):
            loss.backward()
    """
    with contextlib.ExitStack() as stack:
        paths = []
        for place in places:
            op, _, method = place.partition(".")
            there = [name for name in METHODS if hasattr(REGISTRY.get(op), name)]
            if op in REGISTRY and method in ("", *there):
                for name in (method,) if method else METHODS[:2]:
                    stack.enter_context(_replaced(REGISTRY[op], name))
            elif op in REGISTRY:
                raise ValueError(f"op {op!r} has no method {method!r}; there are: {', '.join(there)}")
            else:
                paths.append(place)
        if paths:
            stack.enter_context(observe(_ModuleBreakpoints(paths, stack)))
        yield


class _ModuleBreakpoints(Observer):
    """Puts breakpoints on modules when the model that they are part of is called."""

    def __init__(self, paths: list[str], stack: contextlib.ExitStack) -> None:
        self.paths, self.stack = paths, stack
        self.prepared: set[int] = set()

    def enter_module(self, module: Any) -> None:
        if len(module_stack.get()) > 1 or id(module) in self.prepared:
            return
        self.prepared.add(id(module))
        modules = dict(module.named_modules())
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
    try:
        source = inspect.getsource(function)
    except OSError as error:
        raise ValueError(
            f"{function.__qualname__} has no source file, so no breakpoint can be put into it"
        ) from error
    # A method is indented. Its indentation stays, because strings in it may have lines of their own.
    indented = source[:1].isspace()
    tree = ast.parse("if True:\n" + source if indented else source)
    definition = tree.body[0].body[0] if isinstance(tree.body[0], ast.If) else tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    stop = ast.parse("breakpoint()").body[0]
    # On the line of `def`, so that the first statement is a new line, at which a debugger stops.
    for node in ast.walk(stop):
        ast.copy_location(node, definition)
    has_docstring = ast.get_docstring(definition) is not None
    definition.body.insert(1 if has_docstring else 0, stop)
    ast.increment_lineno(tree, code.co_firstlineno - 1 - indented)
    # Names of an enclosing scope, `super()`'s __class__ among them, stay free in a function inside another, and
    # private names (`self.__p`) are those of a class of the same name.
    enclosing = ast.parse(
        f"def enclosing({', '.join(code.co_freevars)}):\n class {_owner(function)}: pass"
    ).body[0]
    assert isinstance(enclosing, ast.FunctionDef)
    owner = enclosing.body[0]
    assert isinstance(owner, ast.ClassDef)
    owner.body = [definition]
    tree.body = [enclosing]
    ast.fix_missing_locations(tree)
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
