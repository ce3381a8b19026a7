"""Everything public says what it does, and the examples in docstrings are true."""

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import tinyllm


def module_names() -> Iterator[str]:
    yield "tinyllm"
    for info in pkgutil.walk_packages(tinyllm.__path__, "tinyllm."):
        if not info.name.endswith("__main__"):
            yield info.name


MODULES = sorted(module_names())


def load(name: str) -> ModuleType:
    """The module; `tinyllm.models.generation.sampling` as an attribute would be the function."""
    importlib.import_module(name)
    return sys.modules[name]


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public functions and classes that a module defines, and the methods and properties of the classes."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name, value
        if inspect.isclass(value):
            for member, inner in vars(value).items():
                if isinstance(inner, staticmethod | classmethod):
                    inner = inner.__func__
                if not member.startswith("_") and (inspect.isfunction(inner) or isinstance(inner, property)):
                    yield f"{name}.{member}", getattr(value, member)


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name: str) -> None:
    module = load(name)
    assert module.__doc__, f"{name} has no docstring"
    # getdoc follows inheritance: a method that overrides one has its description.
    missing = [f"{name}.{path}" for path, value in public(module) if not inspect.getdoc(value)]
    assert not missing, missing


def doctests() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = []
    for name in MODULES:
        module = load(name)
        names = {"np": np, **vars(tinyllm.nn), **vars(tinyllm), **vars(module), "tinyllm": tinyllm}
        for test in finder.find(module, name, module, names):
            if test.examples:
                found.append(test)
    return found


DOCTESTS = doctests()


@pytest.mark.parametrize("test", DOCTESTS, ids=lambda test: test.name)
def test_examples_are_true(test: doctest.DocTest) -> None:
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    with contextlib.redirect_stdout(report), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hypothesis would rather not have .example() called in a program
        runner.run(test, out=report.write, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0, report.getvalue()


def test_there_are_examples_to_check() -> None:
    names = {test.name for test in DOCTESTS}
    assert {"tinyllm.autograd.tensor.Tensor", "tinyllm.models.generation.sampling.generate"} <= names
