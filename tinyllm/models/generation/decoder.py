"""A TransformerLM on plain arrays, for one growing sequence: what `generate` runs when nobody watches the modules."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tinyllm import backend, nn
from tinyllm.autograd.mode import current_mode, no_grad
from tinyllm.backend import current
from tinyllm.models.transformer import TransformerBlock, TransformerLM
from tinyllm.nn.attention import HeadNorm
from tinyllm.ops.fast.activation import FastSwiglu
from tinyllm.ops.fast.norm import FastRootMeanSquareNorm
from tinyllm.ops.fast.products import row_sum
from tinyllm.ops.fast.rotary import rotate, rotation_tables
from tinyllm.ops.fast.tiled_attention import causal_scores
from tinyllm.system.cores import cores_allowed, each_on_a_core, threads_allowed

if TYPE_CHECKING:
    from tinyllm.models import TransformerBlock, TransformerLM

# Tokens of a prompt that are read together: more compute more scores in vain, and fewer make thin products.
_FEWEST, _MOST = 100, 256
# Outputs that `pack` copies together: their rows stay in cache, which makes it several times faster.
_PACKED_TOGETHER = 64
# The classes of modules that a Decoder knows; it knows no subclass.
_MODULES = {
    TransformerLM, TransformerBlock, nn.MultiHeadAttention, nn.FeedForward, nn.Linear, nn.RMSNorm, HeadNorm,
    nn.Embedding, nn.Dropout, nn.PositionEncoding, nn.RotaryEmbedding,
}  # fmt: skip


class Decoder:
    """The logits after the newest token of one sequence, which grows from call to call.

    It computes what the model computes in evaluation, from the same weights, in the same order. A single new token
    takes a few large products and many small array operations, and outside a graph the small ones cost half. The
    weights must not change while it is used.

    Args:
        model: one that `supports` accepts. capacity: tokens that there is room for; None: context_length.

    Example:
        >>> model = tinyllm.TransformerLM(tinyllm.ModelConfig(vocab_size=10), seed=1)
        >>> decoder = Decoder(model)
        >>> decoder([1, 2, 3]).shape, decoder([4]).shape, decoder.length
        ((10,), (10,), 4)
    """

    def __init__(self, model: TransformerLM, capacity: int | None = None) -> None:
        config = model.config
        self.embedding = model.embedding
        self.capacity = config.context_length if capacity is None else capacity
        self.length = 0
        """How many tokens it has seen; set it to 0 to begin anew."""
        self.layers = [_Layer(block, self.capacity) for block in model.blocks]
        self.norm = _Norm(model.norm)
        self.head = _Products(model.head)
        self.tables = None
        if isinstance(model.position, nn.RotaryEmbedding):
            template = current.xp.empty((self.capacity, 1, config.head_dim), dtype=model.head.weight.dtype)
            self.tables = rotation_tables(template, 0, config.rope_theta, axis=-3)  # (capacity, 1, K) each

    def pack(self) -> None:
        """Copy the matrices into the layout that single tokens are fastest with, worth it from some 30 of them on."""
        for products in (self.head, *(products for layer in self.layers for products in layer.products())):
            products.pack()

    @property
    def is_packed(self) -> bool:
        """Whether `pack` was called."""
        return self.head.packed is not None

    def __call__(self, tokens: Sequence[int]) -> Any:
        """The logits (V,) after the last of `tokens`, which follow those of the calls before.

        A long prompt is read in parts, several at once where there are several cores.

        Raises ValueError when there is no room for them, IndexError for an id that is not in the vocabulary.
        """
        end = self.length + len(tokens)
        if end > self.capacity:
            raise ValueError(f"there is room for {self.capacity} tokens; got {end}")
        with no_grad():
            x = self.embedding(backend.asarray(tokens)).data  # (T, D)
        parts = _parts(self.length, end, len(self.layers))

        def read(part: _Part) -> None:
            with part.ended():
                rows = slice(part.here.start - self.length, part.here.stop - self.length)
                newest = self._read(x[rows], part)
                if part.is_last:
                    part.logits = self.head(self.norm(newest))

        each_on_a_core(read, parts)
        self.length = end
        return parts[-1].logits[0]

    def _read(self, x: Any, part: _Part) -> Any:
        """Read the tokens of a part, whose embeddings are x (R, D); returns what became of the last of them, (1, D)."""
        for number, layer in enumerate(self.layers):
            q = self._remember(layer, layer.attention_norm(x), part.here)  # (G, H/G, R, K)
            part.wait(number)
            if layer is self.layers[-1]:
                # Nothing looks at what the last layer makes of the other tokens.
                x, q = x[-1:], q[:, :, -1:]
                if not part.is_last:
                    break
            seen = slice(0, part.here.stop)
            attended = _attend(q, layer.keys[:, seen], layer.values[:, seen])
            x += layer.output(attended.transpose(2, 0, 1, 3).reshape((len(x), -1)))
            x += layer.feed_forward(layer.feed_forward_norm(x))
        return x

    def _remember(self, layer: _Layer, x: Any, here: slice) -> Any:
        """Keep the keys and values of the tokens at `here`. x: (R, D) -> their queries, (G, H/G, R, K)."""
        R, K, G = x.shape[0], layer.head_dim, layer.keys.shape[0]
        projected = layer.query_key_value(x).reshape((R, -1, K))
        heads, v = projected[:, :-G], projected[:, -G:]  # (R, H + G, K), (R, G, K)
        if layer.head_norm is not None:
            heads = layer.head_norm(heads)
        if self.tables is not None:
            cos, sin = self.tables
            heads = rotate(heads, cos[here], sin[here])
        layer.keys[:, here] = heads[:, -G:].swapaxes(0, 1)
        layer.values[:, here] = v.swapaxes(0, 1)
        return heads[:, :-G].reshape((R, G, -1, K)).transpose(1, 2, 0, 3)


class _Part:
    """Tokens of a prompt that are read together. They look at those of the parts before, layer by layer.

    here: where the tokens are in the sequence. layers: of the model. before: the part before, None for the first.
    """

    def __init__(self, here: slice, layers: int, before: _Part | None, is_last: bool) -> None:
        self.here, self.before, self.is_last = here, before, is_last
        self.logits: Any = None
        """After the last token of the prompt, (1, V)."""
        self._remembered = [] if is_last else [threading.Event() for _ in range(layers)]

    def wait(self, layer: int) -> None:
        """This part has kept its keys and values of a layer; wait until all parts before have, too."""
        if self.before is not None:
            self.before._remembered[layer].wait()
        if not self.is_last:
            self._remembered[layer].set()

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """After this nobody waits for this part, whether it was read or failed."""
        try:
            yield
        finally:
            for event in self._remembered:
                event.set()


def _parts(start: int, end: int, layers: int) -> list[_Part]:
    """The tokens from `start` to `end` in parts of about the same length, for each core as many."""
    T, cores = end - start, cores_allowed()
    count = max(1, min(T // _FEWEST, cores * math.ceil(T / (cores * _MOST))))
    parts: list[_Part] = []
    for number in range(count):
        here = slice(start + T * number // count, start + T * (number + 1) // count)
        parts.append(_Part(here, layers, parts[-1] if parts else None, number == count - 1))
    return parts


def _attend(q: Any, keys: Any, values: Any) -> Any:
    """softmax(Q K^T / sqrt(K)) V of the newest R tokens. q: (G, h, R, K), keys, values: (G, S, K) -> (G, h, R, K)."""
    xp = current.xp
    G, h, R, K = q.shape
    p = (q * K**-0.5).reshape((G, h * R, K)) @ keys.swapaxes(1, 2)  # (G, h R, S)
    if R > 1:
        p.reshape((G, h, R, -1))[..., -R:] += causal_scores(R, R, 0, p.dtype, xp)
    p -= p.max(axis=-1, keepdims=True)
    xp.exp(p, out=p)
    attended = p @ values
    attended /= row_sum(p)
    return attended.reshape(q.shape)


class _Products:
    """x W^T for several linear layers that share their input, side by side. x: (R, inputs) -> (R, all outputs)."""

    def __init__(self, *layers: nn.Linear) -> None:
        self.matrices = [layer.weight.data.T for layer in layers]
        ends = itertools.accumulate(matrix.shape[1] for matrix in self.matrices)
        self.columns = [slice(end - m.shape[1], end) for m, end in zip(self.matrices, ends, strict=True)]
        self.packed: Any = None

    def pack(self) -> None:
        """Join the matrices into one that lies in memory input by input: a single row reads it 1.5 times as fast."""
        packed = self._empty(self.matrices[0].shape[0])
        for matrix, columns in zip(self.matrices, self.columns, strict=True):
            for start in range(0, matrix.shape[1], _PACKED_TOGETHER):
                part = matrix[:, start : start + _PACKED_TOGETHER]
                packed[:, columns][:, start : start + part.shape[1]] = part
        self.packed = packed

    def __call__(self, x: Any) -> Any:
        if self.packed is not None:
            return x @ self.packed
        if len(self.matrices) == 1:
            return x @ self.matrices[0]
        y = self._empty(x.shape[0])
        for matrix, columns in zip(self.matrices, self.columns, strict=True):
            current.xp.matmul(x, matrix, out=y[:, columns])
        return y

    def _empty(self, rows: int) -> Any:
        return current.xp.empty((rows, self.columns[-1].stop), dtype=self.matrices[0].dtype)


class _Norm:
    """RMSNorm of an array by the weight of a module."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        self.op, self.weight = FastRootMeanSquareNorm(norm.eps), norm.weight.data

    def __call__(self, x: Any) -> Any:
        if x.shape[0] > 1:
            return self.op.forward(x, self.weight)
        # The same for a single row, without arrays of one element, which cost more than the row does.
        (row,) = x
        y = x * (row @ row / len(row) + self.op.eps) ** -0.5
        y *= self.weight
        return y


class _HeadNorm:
    """RMSNorm of each head by a weight of its own. (R, heads, K) -> (R, heads, K)."""

    def __init__(self, heads: list[HeadNorm]) -> None:
        self.op = FastRootMeanSquareNorm(heads[0].eps)
        self.weight = current.xp.stack([head.weight.data for head in heads])

    def __call__(self, x: Any) -> Any:
        return self.op.forward(x, self.weight)


class _Layer:
    """A block, and the keys and values (G, capacity, K) of the tokens that it has seen."""

    def __init__(self, block: TransformerBlock, capacity: int) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.head_dim = K = attention.head_dim
        H, G = (projection.weight.shape[0] // K for projection in (attention.query, attention.key))
        self.attention_norm, self.feed_forward_norm = (
            _Norm(block.attention_norm),
            _Norm(block.feed_forward_norm),
        )
        self.head_norm = None
        if attention.query_norm is not None and attention.key_norm is not None:
            self.head_norm = _HeadNorm([attention.query_norm] * H + [attention.key_norm] * G)
        self.query_key_value = _Products(attention.query, attention.key, attention.value)
        self.output = _Products(attention.output)
        self.gate_up = _Products(feed_forward.gate, feed_forward.up)
        self.down = _Products(feed_forward.down)
        self.keys = current.xp.empty((G, capacity, K), dtype=attention.key.weight.dtype)
        self.values = current.xp.empty_like(self.keys)

    def feed_forward(self, x: Any) -> Any:
        """SwiGLU and its projection. x: (R, D) -> (R, D)."""
        gate_up = self.gate_up(x)
        F = gate_up.shape[1] // 2
        return self.down(FastSwiglu().forward(gate_up[:, :F], gate_up[:, F:]))

    def products(self) -> Iterator[_Products]:
        """All matrices of the block."""
        yield from (self.query_key_value, self.output, self.gate_up, self.down)


def supports(model: TransformerLM) -> bool:
    """Whether a Decoder computes what calling the model would, and nobody wants to see the modules do it.

    Hooks, observers, reference mode and a debugger want to see them.
    """
    modules = [module for _, module in model.named_modules()]
    known = {type(module) for module in modules} <= _MODULES
    plain = all(module.bias is None for module in modules if isinstance(module, nn.Linear))
    hooked = any(module._forward_hooks or module._backward_hooks for module in modules)
    mode = current_mode.get()
    return known and plain and not (hooked or mode.observers or mode.formulas or _debugged())


def agrees(model: TransformerLM, tokens: Sequence[int]) -> bool:
    """Whether a Decoder and the model give the same logits after these tokens, to rounding.

    They do not where someone has changed what a module computes, which no look at their classes tells.
    """
    decoder = Decoder(model, len(tokens))
    # In one thread: others would stay awake for a while, and be in the way of those that read the prompt.
    with threads_allowed(1), no_grad():
        for token in tokens:
            mine = decoder([token])
        logits = model(backend.asarray([list(tokens)])).data[0, -1]
    difference, largest = abs(mine - logits).max(), abs(logits).max()
    return bool(difference <= 1e-3 * largest)


def _debugged() -> bool:
    """Whether a debugger follows this thread."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    return sys.gettrace() is not None or (
        monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None
    )
