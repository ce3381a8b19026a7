"""`infer` of every module computes on arrays what its `forward` computes on Tensors."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import tinyllm.models
from tinyllm import Tensor, nn, no_grad
from tinyllm.models import ModelConfig, TransformerBlock, TransformerLM
from tinyllm.nn import (
    Dropout,
    Embedding,
    FeedForward,
    KeyValueCache,
    LayerNorm,
    Linear,
    Module,
    MultiHeadAttention,
    PositionEncoding,
    RMSNorm,
    RotaryEmbedding,
)
from tinyllm.nn.attention import HeadNorm

D, V, K = 16, 11, 4
CONFIG = ModelConfig(
    vocab_size=V, context_length=40, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=D
)


@dataclass(frozen=True)
class Example:
    """How to make a module for the tests, and what it is called with."""

    make: Callable[[np.random.Generator], Module]
    takes: str = "hidden"
    caches: int = 0


def attention(H: int, G: int, **settings: Any) -> Callable[[np.random.Generator], Module]:
    return lambda rng: MultiHeadAttention(D, H, G, K, rng, **settings)


def block(rng: np.random.Generator) -> Module:
    return TransformerBlock(CONFIG, RotaryEmbedding(), rng, layer=1)


EXAMPLES = {
    "Linear": Example(lambda rng: Linear(D, 7, bias=False, rng=rng)),
    "Linear with bias": Example(lambda rng: Linear(D, 7, rng=rng)),
    "RMSNorm": Example(lambda rng: RMSNorm(D, eps=0.1)),
    "LayerNorm": Example(lambda rng: LayerNorm(D, eps=0.1)),
    "RMSNorm with torch's eps": Example(lambda rng: RMSNorm(D)),
    "RMSNorm without a weight": Example(lambda rng: RMSNorm(D, 0.1, elementwise_affine=False)),
    "LayerNorm without a bias": Example(lambda rng: LayerNorm(D, 0.1, bias=False)),
    "LayerNorm without weights": Example(lambda rng: LayerNorm(D, elementwise_affine=False)),
    "Embedding with padding": Example(lambda rng: Embedding(V, D, padding_idx=3, rng=rng), takes="tokens"),
    "Dropout": Example(lambda rng: Dropout(0.5, stream=0)),
    "Embedding": Example(lambda rng: Embedding(V, D, rng=rng, std=1.0), takes="tokens"),
    "FeedForward": Example(lambda rng: FeedForward(D, 24, rng)),
    "MultiHeadAttention": Example(attention(4, 4), caches=1),
    "MultiHeadAttention with GQA and RoPE": Example(
        attention(4, 2, position=RotaryEmbedding(50.0)), caches=1
    ),
    "MultiHeadAttention with one key head and QK-norm": Example(
        attention(3, 1, position=RotaryEmbedding(), qk_norm=True, norm_eps=0.1), caches=1
    ),
    "TransformerBlock": Example(block, caches=1),
    "TransformerLM": Example(lambda rng: TransformerLM(CONFIG, rng), takes="tokens", caches=2),
}
TESTED_APART = {HeadNorm, PositionEncoding, RotaryEmbedding}
examples = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
packings = pytest.mark.parametrize("packed", [False, True])


def made(example: Example) -> Module:
    rng = np.random.default_rng(1)
    module = example.make(rng).eval()
    for parameter in module.parameters():  # no norm stays at ones, no bias at zeros
        parameter.data += rng.normal(0, 0.3, parameter.shape).astype(np.float32)
    return module


def drawn(example: Example, B: int, T: int) -> Any:
    rng = np.random.default_rng(2)
    if example.takes == "tokens":
        return rng.integers(0, V, (B, T))
    return rng.standard_normal((B, T, D), dtype=np.float32)


def forward(module: Module, x: Any, *caches: Any) -> Any:
    with no_grad():
        output = module(Tensor(x) if x.dtype.kind == "f" else x, *caches)
        assert isinstance(output, Tensor)
        return output.numpy()


def assert_close(found: Any, expected: Any, reference: Any) -> None:
    """Equal to the rounding of a few dozen sums of at most 40 terms in float32, one after the other."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * np.ptp(reference))


def new_caches(example: Example, capacity: int = 40) -> Any:
    caches = [KeyValueCache(capacity) for _ in range(example.caches)]
    return caches[0] if example.takes == "hidden" else caches


def classes() -> Iterator[type[Module]]:
    """All modules of the package that have `infer` of their own."""
    known = [Module]
    for cls in known:
        known += [c for c in cls.__subclasses__() if c.__module__.startswith("tinyllm.") and c not in known]
    assert len(known) > 10
    return (cls for cls in known if cls.infer is not Module.infer)


def test_every_module_infers_and_has_an_example() -> None:
    tested = {type(made(example)) for example in EXAMPLES.values()} | TESTED_APART
    assert tested == set(classes())
    offered = [*vars(nn).values(), *vars(tinyllm.models).values()]
    modules = {x for x in offered if inspect.isclass(x) and issubclass(x, Module)}
    assert {cls for cls in modules if cls.infer is not Module.infer} <= tested


@examples
@packings
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 5), (3, 1), (2, 7), (0, 3)])
def test_infer_is_forward(example: Example, packed: bool, B: int, T: int) -> None:
    module = made(example)
    x = drawn(example, B, T)
    before = x.copy()
    inferring = module.packed() if packed else module
    found = inferring.infer(x)
    assert not isinstance(found, Tensor)
    assert_close(found, forward(module, x), forward(module, drawn(example, 2, 7)))
    assert np.array_equal(x, before), "infer changed its input"


cached = pytest.mark.parametrize(
    "example", [e for e in EXAMPLES.values() if e.caches], ids=[n for n, e in EXAMPLES.items() if e.caches]
)


@cached
@packings
@pytest.mark.parametrize("chunks", [[1] * 9, [5, 1, 3], [9], [1, 8]])
@pytest.mark.parametrize("B", [1, 3])
def test_infer_with_a_cache_goes_on_where_it_was(
    example: Example, packed: bool, chunks: list[int], B: int
) -> None:
    module = made(example)
    x = drawn(example, B, 9)
    expected = forward(module, x)
    inferring = module.packed() if packed else module
    caches, start = new_caches(example), 0
    for chunk in chunks:
        here = slice(start, start + chunk)
        found = inferring.infer(x[:, here], caches)
        assert_close(found, expected[:, here], expected)
        start += chunk
    # A later token sees those before it, by far more than the tolerance.
    alone = module.infer(x[:, -1:])
    assert np.abs(alone - expected[:, -1:]).max() > 1e-3 * np.ptp(expected)


@cached
def test_infer_and_forward_fill_the_same_cache(example: Example) -> None:
    module = made(example)
    x = drawn(example, 2, 9)
    mine, theirs = new_caches(example), new_caches(example)
    for here in (slice(0, 4), slice(4, 9)):
        module.infer(x[:, here], mine)
        forward(module, x[:, here], theirs)
    for one, other in zip(*([c] if example.takes == "hidden" else c for c in (mine, theirs)), strict=True):
        assert one.length == other.length == 9
        for a, b in zip(one.first(9), other.first(9), strict=True):
            assert_close(a, b, b)


@cached
@pytest.mark.parametrize("T", [1, 6])
def test_newest_is_the_last_position_alone(example: Example, T: int) -> None:
    module = made(example)
    x = drawn(example, 2, 3 + T)
    caches = new_caches(example)
    module.infer(x[:, :3], caches)
    found = module.infer(x[:, 3:], caches, newest=True)
    expected = forward(module, x)
    assert_close(found, expected[:, -1:], expected)


def test_many_queries_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    example = EXAMPLES["MultiHeadAttention with GQA and RoPE"]
    module = made(example)
    x = drawn(example, 2, 23)
    expected = forward(module, x)
    for queries in (1, 5, 23):
        monkeypatch.setattr("tinyllm.nn.attention._QUERIES", queries)
        assert_close(module.infer(x), expected, expected)
        cache = KeyValueCache(23)
        module.infer(x[:, :4], cache)
        assert_close(module.infer(x[:, 4:], cache), expected[:, 4:], expected)


@pytest.mark.parametrize("offset", [0, 1, 13, 63, 64])
@pytest.mark.parametrize("T", [1, 5])
def test_positions_are_put_into_heads_as_forward_puts_them(offset: int, T: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, T, 3 * K), dtype=np.float32)
    heads = x.reshape((2, T, 3, K))
    norm = HeadNorm(K, eps=0.1)
    norm.weight.data[...] = [0.5, -1, 2, 1.5]
    for position in (PositionEncoding(), RotaryEmbedding(30.0)):
        expected = position.heads(Tensor(x), K, offset).numpy().swapaxes(1, 2)
        assert_close(position.infer(heads.copy(), offset), expected, expected)
        normed = forward_heads(norm, x, position, offset)
        assert_close(position.infer(norm.infer(heads), offset), normed, normed)


def forward_heads(norm: HeadNorm, x: Any, position: PositionEncoding, offset: int) -> Any:
    with no_grad():
        return norm(Tensor(x), position, offset).numpy().swapaxes(1, 2)


def test_kept_tables_of_rotations_follow_what_they_depend_on() -> None:
    position = RotaryEmbedding(30.0)
    x = np.random.default_rng(0).standard_normal((1, 3, 2 * 8))
    for theta, head_dim, dtype in ((30.0, 4, "f4"), (7.0, 4, "f4"), (7.0, 8, "f4"), (7.0, 8, "f8")):
        position.theta = theta
        values = x.astype(dtype)
        expected = position.heads(Tensor(values), head_dim, 5).numpy().swapaxes(1, 2)
        found = position.infer(values.reshape((1, 3, -1, head_dim)), 5)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=4 * np.finfo(dtype).eps * np.ptp(expected))


# ---- Modules of a user's own -------------------------------------------------------------------


class Doubled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Tripled(Doubled):
    """Has its own `infer`, which its subclass does not inherit."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5

    def infer(self, x: Any) -> Any:
        return x @ self.weight.data.T * 3


class Again(Tripled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(("cls", "own"), [(Doubled, False), (Tripled, True), (Again, False)])
def test_infer_belongs_to_the_class_that_defines_it(cls: type[Linear], own: bool) -> None:
    layer = cls(D, 7, bias=False, rng=np.random.default_rng(0))
    x = np.random.default_rng(1).standard_normal((2, 3, D), dtype=np.float32)
    assert layer.has_own_infer is own
    found = layer.infer(x)
    expected = forward(layer, x)
    assert_close(found, expected, expected)
    if not own:
        assert_close(layer.infer(x, newest=True), expected[:, -1:], expected)


@pytest.mark.parametrize("cls", [Doubled, Tripled, Again])
@packings
def test_parts_of_a_user_s_own_are_not_passed_by(cls: type[Linear], packed: bool) -> None:
    for name in ("query", "value", "output"):
        module = made(EXAMPLES["MultiHeadAttention with GQA and RoPE"])
        getattr(module, name).__class__ = cls
        check_inferred(module, packed)
    for name in ("gate", "down"):
        module = made(EXAMPLES["FeedForward"])
        getattr(module, name).__class__ = cls
        check_inferred(module, packed)


def check_inferred(module: Module, packed: bool) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, D), dtype=np.float32)
    expected = forward(module, x)
    assert_close((module.packed() if packed else module).infer(x), expected, expected)


def test_inferring_by_forward_records_no_graph_and_runs_hooks() -> None:
    layer = Doubled(D, 7, rng=np.random.default_rng(0))
    seen: list[Any] = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    layer.infer(np.ones((1, D), dtype=np.float32))
    (((x,), output),) = seen
    assert isinstance(x, Tensor)
    assert output.op is None


def test_a_packed_copy_shares_what_it_does_not_lay_out_and_leaves_the_model_alone() -> None:
    model = TransformerLM(CONFIG, seed=1)
    model.blocks[0].feed_forward.__class__ = type("Own", (FeedForward,), {})
    state = {name: array.copy() for name, array in model.state_dict().items()}
    places = {name: id(parameter) for name, parameter in model.named_parameters()}
    packed = model.packed()
    assert packed.blocks[0].feed_forward is model.blocks[0].feed_forward
    assert packed.embedding.weight is model.embedding.weight
    key = packed.blocks[1].attention.key.weight.data
    assert key.T.strides[1] == key.itemsize, "a row of the matrix that a single token is multiplied with"
    assert np.shares_memory(key, packed.blocks[1].attention.query.joined)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == places
    assert all(np.array_equal(array, state[name]) for name, array in model.state_dict().items())
    assert all(np.array_equal(array, state[name]) for name, array in packed.state_dict().items())
