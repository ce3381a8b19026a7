"""Random graphs of all registered ops have PyTorch's values and gradients, to 1e-9 in float64.

About 330 graphs, the same in every run. The thorough run draws more than 2,000 new ones:

    TINYLLM_PROFILE=thorough python -m pytest tests/interop/test_random_graphs.py
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllm.autograd.registry import REGISTRY
from tinyllm.autograd.tensor import Op

torch = pytest.importorskip("torch", reason="needs the interop-test extra")

from random_graphs import ENTRIES, Coverage, DisagreementError, check_graph, chooser  # noqa: E402 (needs torch)

THOROUGH = settings.get_current_profile_name() == "thorough"
GRAPHS = 2000 if THOROUGH else 300


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """These tensors are too small for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_table_covers_exactly_the_registry() -> None:
    missing, unknown = set(REGISTRY) - set(ENTRIES), set(ENTRIES) - set(REGISTRY)
    assert not missing, f"add to ENTRIES in random_graphs.py how to apply {sorted(missing)} here and in torch"
    assert not unknown, f"{sorted(unknown)} are registered no more; take them out of ENTRIES"


@pytest.mark.parametrize("first", ENTRIES)
def test_values_and_gradients_agree_with_torch(first: str) -> None:
    coverage = Coverage()

    @settings(
        max_examples=math.ceil(GRAPHS / len(ENTRIES)),
        deadline=None,
        derandomize=not THOROUGH,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        check_graph(lambda options: data.draw(st.sampled_from(options)), first, coverage)

    check()
    assert coverage.forward[first] > 0
    assert coverage.backward[first] > 0


def test_every_op_occurs_with_sharing_and_broadcasting() -> None:
    coverage = Coverage()
    for number, first in enumerate(ENTRIES):
        for seed in (2 * number, 2 * number + 1):
            check_graph(chooser(seed), first, coverage)
    assert coverage.graphs == 2 * len(REGISTRY)
    assert set(coverage.forward) == set(REGISTRY)
    assert set(coverage.backward) == set(REGISTRY)
    assert coverage.shared == coverage.graphs
    assert coverage.broadcasts > coverage.graphs / 2


def check_several(first: str) -> None:
    """Some graphs have a gradient of zero at an op, such as a softmax over one element; not all of these."""
    for seed in range(12):
        check_graph(chooser(seed), first, Coverage())


@pytest.mark.parametrize("name", ENTRIES)
def test_a_backward_that_is_off_by_a_millionth_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op: type[Op] = REGISTRY[name]
    factor = 1.00001 if name == "cast" else 1.000001  # a float32 gradient is compared to a millionth

    def wrong(backward: Callable[[Op, Any], Any]) -> Callable[[Op, Any], Any]:
        def call(self: Op, gradient: Any) -> Any:
            results = backward(self, gradient)
            results = results if isinstance(results, tuple) else (results,)
            return tuple(None if result is None else result * factor for result in results)

        return call

    for form in {op, op.fast_form or op}:
        monkeypatch.setattr(form, "backward", wrong(form.backward))
    with pytest.raises(DisagreementError, match="gradient of"):
        check_several(name)


def test_values_that_differ_are_reported_with_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY["tanh"], "forward", lambda self, x: np.tanh(x) * 1.000001)
    with pytest.raises(DisagreementError, match=r"values of t1: largest difference(.|\n)*t1 = tanh\(t0\)"):
        check_graph(lambda options: options[0], "tanh", Coverage())
