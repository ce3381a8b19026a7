"""The strategies: what they draw is valid and of every kind, failures shrink to the smallest, health is good."""

import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

import tinyllm
from tinyllm import InputError, Tensor, ops
from tinyllm.models import POSITION_ENCODINGS, ModelConfig, TransformerLM
from tinyllm.testing import gradcheck
from tinyllm.testing import strategies as t

QUICK = settings(max_examples=2000, derandomize=True, deadline=None, database=None)


def smallest(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool] = lambda _: True) -> Any:
    return find(strategy, condition, settings=QUICK)


def occurs(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool]) -> None:
    """Some example meets the condition; find raises NoSuchExample otherwise."""
    find(strategy, condition, settings=settings(QUICK, phases=[Phase.generate]))


# ---- Health under the default profile ----------------------------------------------------------

ALL = {
    "arrays": t.arrays(),
    "arrays of every layout": t.arrays(dtype=t.floating_dtypes(), layouts=tuple(t.LAYOUTS)),
    "shapes": t.shapes(),
    "broadcastable_shapes": t.broadcastable_shapes(4),
    "reduction_axes": t.shapes().flatmap(t.reduction_axes),
    "indices": t.shapes().flatmap(t.indices),
    "einsums": t.einsums(),
    "model_configs": t.model_configs(dropout=True),
    "token_batches": t.token_batches(11),
    "texts": t.texts(),
}


@pytest.mark.parametrize("name", ALL)
def test_health_is_good_under_the_default_profile(name: str) -> None:
    default = settings.get_profile("default")
    assert default.suppress_health_check == ()
    assert set(HealthCheck) > set()

    @settings(default, derandomize=True, database=None, deadline=None)  # a busy machine may miss a deadline
    @given(ALL[name])
    def test(value: Any) -> None:
        pass

    test()


# ---- Arrays ------------------------------------------------------------------------------------


@given(t.arrays(low=-0.1, high=0.7, dtype=t.floating_dtypes(), layouts=tuple(t.LAYOUTS)))
def test_arrays_are_in_range_and_of_the_dtype(x: Any) -> None:
    assert isinstance(x, np.ndarray)
    assert x.dtype in (np.float32, np.float64)
    assert x.ndim <= 3
    if x.size:
        assert -0.1 <= float(x.min()) <= float(x.max()) <= 0.7
        tiny = np.abs(x[x != 0])
        assert (tiny >= np.finfo(x.dtype).tiny).all()


def test_arrays_have_every_layout() -> None:
    everything = t.arrays(t.shapes(2, 2, 2, 3), layouts=tuple(t.LAYOUTS))
    occurs(everything, lambda x: x.flags.c_contiguous and x.flags.writeable)
    occurs(everything, lambda x: not x.flags.c_contiguous and x.flags.f_contiguous)
    occurs(everything, lambda x: not x.flags.c_contiguous and not x.flags.f_contiguous and min(x.strides) > 0)
    occurs(everything, lambda x: min(x.strides) < 0)
    occurs(everything, lambda x: not x.flags.writeable)


@given(t.arrays(dtype=t.floating_dtypes()), st.sampled_from(sorted(t.LAYOUTS)))
@example(np.zeros(()), "reversed")
def test_a_layout_keeps_values(x: Any, layout: str) -> None:
    arranged = t.LAYOUTS[layout](x)
    assert arranged.shape == x.shape
    assert arranged.dtype == x.dtype
    np.testing.assert_array_equal(arranged, x)


def test_arrays_shrink_to_the_smallest_failing_shape() -> None:
    np.testing.assert_array_equal(smallest(t.arrays()), np.zeros(()))
    np.testing.assert_array_equal(smallest(t.arrays(), lambda x: x.ndim == 2), np.zeros((0, 0)))
    np.testing.assert_array_equal(smallest(t.arrays(), lambda x: x.size >= 2), np.zeros(2))
    np.testing.assert_array_equal(smallest(t.arrays(), lambda x: (x > 0.5).any()), np.array(1.0))
    found = smallest(t.arrays(layouts=tuple(t.LAYOUTS)), lambda x: x.size >= 2)
    assert found.flags.c_contiguous
    assert found.flags.writeable

    # What a wrong gradient shrinks to: a function that is wrong for two axes or more.
    def is_wrong(x: Any) -> bool:
        return not np.array_equal(x, x.T)

    found = smallest(t.arrays(t.shapes(1, 3, 1)), is_wrong)
    assert found.shape in ((1, 2), (2, 1))


def test_arrays_refuse_an_unknown_layout() -> None:
    for layouts in (("sideways",), ()):
        with pytest.raises(InvalidArgument, match="choose among contiguous, transposed"):
            find(t.arrays(layouts=layouts), lambda _: True)


# ---- Shapes, axes, indices ---------------------------------------------------------------------


@given(t.broadcastable_shapes(3))
def test_shapes_broadcast(drawn: t.BroadcastableShapes) -> None:
    assert len(drawn.input_shapes) == 3
    assert np.broadcast_shapes(*drawn.input_shapes) == drawn.result_shape


def test_broadcastable_shapes_stretch_and_shrink() -> None:
    def lengths(drawn: t.BroadcastableShapes) -> set[int]:
        return {len(shape) for shape in drawn.input_shapes}

    occurs(t.broadcastable_shapes(), lambda drawn: len(lengths(drawn)) == 2)
    occurs(
        t.broadcastable_shapes(),
        lambda drawn: drawn.input_shapes[0] == (1, drawn.result_shape[-1]) if drawn.result_shape else False,
    )
    assert smallest(t.broadcastable_shapes()).input_shapes == ((), ())
    found = smallest(t.broadcastable_shapes(), lambda drawn: drawn.input_shapes[0] != drawn.result_shape)
    assert sum(map(len, found.input_shapes)) <= 2


@given(st.data(), t.arrays())
def test_axes_reduce(data: st.DataObject, x: Any) -> None:
    axis = data.draw(t.reduction_axes(x.shape))
    ours = ops.sum(Tensor(x), axis).numpy()
    np.testing.assert_allclose(ours, x.sum(axis=axis), rtol=1e-12, atol=1e-300)


def test_axes_are_of_every_kind() -> None:
    axes = t.reduction_axes((2, 3, 4))
    for kind in (
        lambda a: a is None,
        lambda a: isinstance(a, int) and a >= 0,
        lambda a: isinstance(a, int) and a < 0,
        lambda a: a == (),
        lambda a: isinstance(a, tuple) and len(a) == 3,
        lambda a: isinstance(a, tuple) and a != () and min(a) < 0 <= max(a),
    ):
        occurs(axes, kind)
    assert smallest(axes) is None
    assert smallest(axes, lambda a: isinstance(a, int)) == 0
    assert smallest(axes, lambda a: isinstance(a, tuple)) == ()
    assert smallest(t.reduction_axes((2, 3), min_axes=1), lambda a: isinstance(a, tuple)) == (0,)
    assert smallest(t.reduction_axes((), min_axes=1)) is None


def test_axes_come_in_every_form() -> None:
    axes = t.reduction_axes((2, 3, 4), forms=tuple(t.INTEGER_FORMS))
    for kind in (int, np.int8, np.int64, np.uint8, np.ndarray):
        occurs(axes, lambda axis, kind=kind: type(axis) is kind)  # type: ignore[misc]
        occurs(axes, lambda axis, kind=kind: isinstance(axis, tuple) and kind in map(type, axis))  # type: ignore[misc]
    occurs(axes, lambda axis: isinstance(axis, list) and len(axis) > 1)
    assert smallest(axes) is None


def test_einsums_broadcast_and_shrink() -> None:
    def broadcast(drawn: tuple[str, list[tuple[int, ...]]]) -> bool:
        terms = drawn[0].split("->")[0].split(",")
        labels = [
            (label, n)
            for term, shape in zip(terms, drawn[1], strict=True)
            for label, n in zip(term, shape, strict=True)
        ]
        return "->" in drawn[0] and any((label, 1) in labels and n > 1 for label, n in labels)

    occurs(t.einsums(), broadcast)
    assert smallest(t.einsums()) == ("", [()])


@given(st.data(), t.shapes(max_axes=4))
def test_indices_are_valid(data: st.DataObject, shape: tuple[int, ...]) -> None:
    x = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    index = data.draw(t.indices(shape, forms=tuple(t.INDEX_FORMS)))
    np.testing.assert_array_equal(ops.getitem(Tensor(x), index).numpy(), x[index])


def parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def kinds(index: Any) -> set[str]:
    return {
        f"{part.dtype.kind}{part.ndim}" if isinstance(part, np.ndarray) else type(part).__name__
        for part in parts(index)
    }


def test_indices_are_of_every_kind() -> None:
    drawn = t.indices((2, 3, 4))
    for kind in ("slice", "int", "ellipsis", "NoneType", "i0", "i1", "i2", "b1", "b3"):
        occurs(drawn, lambda index, kind=kind: kind in kinds(index))  # type: ignore[misc]
    occurs(
        drawn, lambda index: sum(isinstance(part, np.ndarray) and part.ndim > 0 for part in parts(index)) == 2
    )
    occurs(drawn, lambda index: any(type(part) is int and part < 0 for part in parts(index)))
    occurs(
        drawn, lambda index: any(isinstance(part, slice) and (part.step or 1) < 0 for part in parts(index))
    )
    occurs(
        drawn,
        lambda index: any(isinstance(p, np.ndarray) and len(set(p.flat)) < p.size for p in parts(index)),
    )


def test_indices_come_in_every_form() -> None:
    drawn = t.indices((2, 3, 4), forms=tuple(t.INDEX_FORMS))
    for kind in ("list", "tuple", "memoryview", "deque", "int8"):
        occurs(drawn, lambda index, kind=kind: kind in kinds(index))  # type: ignore[misc]


def test_indices_shrink() -> None:
    assert smallest(t.indices((2, 3))) == ()
    found = smallest(t.indices((3, 3)), lambda index: "i1" in kinds(index))
    assert len(parts(found)) == 1
    assert found[0].size <= 1
    repeated = smallest(
        t.indices((3, 3)),
        lambda index: any(
            isinstance(p, np.ndarray) and len(set(p.flat)) < p.size and p.dtype.kind == "i"
            for p in parts(index)
        ),
    )
    np.testing.assert_array_equal(repeated[0], [0, 0])


# ---- Models, tokens, texts ---------------------------------------------------------------------


@settings(max_examples=25)
@given(st.data(), t.model_configs())
def test_configs_make_models_that_run(data: st.DataObject, config: ModelConfig) -> None:
    tokens = data.draw(t.token_batches(config.vocab_size, max_length=config.context_length))
    logits = TransformerLM(config, seed=1)(tokens)
    assert logits.shape == (*tokens.shape, config.vocab_size)
    assert np.isfinite(logits.data).all()


def test_configs_are_of_every_kind_and_shrink() -> None:
    configs = t.model_configs(dropout=True)
    for name in POSITION_ENCODINGS:
        occurs(configs, lambda config, name=name: config.position_encoding == name)  # type: ignore[misc]
    occurs(configs, lambda config: config.num_kv_heads == 2 and config.num_heads == 4)
    occurs(configs, lambda config: config.tie_embeddings and config.qk_norm and config.num_layers == 2)
    occurs(configs, lambda config: config.dropout == 0.5)
    occurs(configs, lambda config: config.head_dim * config.num_heads != config.hidden_size)
    found = smallest(configs, lambda config: config.num_heads > config.num_kv_heads)
    assert (found.num_heads, found.num_kv_heads, found.num_layers, found.hidden_size) == (2, 1, 1, 1)
    assert found.vocab_size == found.context_length == found.intermediate_size == 1
    assert found.dropout == 0


def test_tokens() -> None:
    batches = t.token_batches(5, max_batch=2, max_length=3)
    occurs(batches, lambda tokens: tokens.shape == (2, 3) and tokens.max() == 4)
    np.testing.assert_array_equal(smallest(batches), [[0]])
    np.testing.assert_array_equal(smallest(batches, lambda tokens: (tokens == 3).any()), [[3]])


@given(t.texts())
def test_texts_can_be_written(text: str) -> None:
    assert text.encode("utf-8").decode("utf-8") == text


def test_texts_are_of_every_kind_and_shrink() -> None:
    texts = t.texts()
    occurs(texts, lambda text: any(ord(c) > 0xFFFF for c in text))
    occurs(texts, lambda text: any(unicodedata.combining(c) for c in text))
    occurs(texts, lambda text: "\r\n" in text)
    occurs(texts, lambda text: "\n" in text and "\u2028" in text)
    occurs(texts, lambda text: unicodedata.normalize("NFC", text) != text)
    occurs(texts, lambda text: len(text) > 10 and text.isascii())
    assert smallest(texts) == ""
    assert smallest(texts, lambda text: len(text) >= 2) == "00"
    assert smallest(texts, lambda text: any(ord(c) > 0xFFFF for c in text)) <= "\U0001ffff"


# ---- Together: a property of ops, as a user would write it -------------------------------------


@settings(max_examples=25)
@given(st.data())
def test_gradients_of_reductions_and_indices(data: st.DataObject) -> None:
    x = data.draw(t.arrays(t.shapes(min_length=1), layouts=tuple(t.LAYOUTS)))
    axis = data.draw(t.reduction_axes(x.shape))
    index = data.draw(t.indices(x.shape, forms=tuple(t.INDEX_FORMS)))
    if x[index].size:
        gradcheck(lambda x: x[index].tanh(), x, max_elements=0, projections=1)
    gradcheck(lambda x: (x * x).sum(axis), x, max_elements=0, projections=1)


# ---- Profiles and the missing library ----------------------------------------------------------


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(tinyllm.__file__).parents[1])
    variables = {name: value for name, value in os.environ.items() if name != t.PROFILE_VARIABLE}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**variables, "PYTHONPATH": root, **environment}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_profiles() -> None:
    before = settings.get_current_profile_name()
    try:
        for name, examples, derandomized in (("ci", 25, True), ("thorough", 1000, False)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(t.PROFILE_VARIABLE, name)
                assert t.register_profiles(default="default") == name
            now = settings()
            assert (now.max_examples, now.deadline, now.derandomize) == (examples, None, derandomized)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(t.PROFILE_VARIABLE, raising=False)
            assert t.register_profiles() is None
            assert settings().max_examples == 1000
            assert t.register_profiles(default="ci") == "ci"
            patch.setenv(t.PROFILE_VARIABLE, "fast")
            with pytest.raises(
                InputError, match="'fast' is no hypothesis profile; choose ci, thorough or default"
            ):
                t.register_profiles()
    finally:
        settings.load_profile(before)


def test_hypothesis_is_needed_for_strategies_alone() -> None:
    code = """
import sys
sys.modules["hypothesis"] = None
import tinyllm.testing
import tinyllm.testing.invariants
import tinyllm.testing.mutants
try:
    import tinyllm.testing.strategies
except ImportError as error:
    print(error)
"""
    result = in_new_process(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("not installed; pip install 'tinyllm-numpy[test]'")
