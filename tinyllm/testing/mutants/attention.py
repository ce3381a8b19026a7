"""Mistakes in attention, its mask, its heads, rotary positions and the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinyllm import backend, ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend import Array, current
from tinyllm.nn import KeyValueCache, MultiHeadAttention, PositionEncoding, RotaryEmbedding, attention, layers
from tinyllm.nn.attention import HeadNorm
from tinyllm.ops import heads, rotary
from tinyllm.ops.fast import rotary as rope
from tinyllm.ops.fast.attention import ScaledDotProductAttention
from tinyllm.testing.mutants.planting import mutant

# ---- The attention op --------------------------------------------------------------------------

_init = ScaledDotProductAttention.__init__
_backward = ScaledDotProductAttention.backward


@mutant(ScaledDotProductAttention, "__init__")
def attention_not_scaled(
    self: Any,
    causal: bool = False,
    mask: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_key: Any = None,
) -> None:
    """Scores are not divided by sqrt(d). They grow with the width of a head, softmax saturates, and gradients vanish
    in wide heads; in narrow ones, training is a little worse and nothing else."""
    _init(self, causal, mask, 1.0 if scale is None else scale, dropout_p, dropout_key)


@mutant(ScaledDotProductAttention, "backward")
def attention_query_gradient_not_scaled(self: Any, gradient: Any) -> Any:
    """The forward divides by sqrt(d), and the backward does not do so for the queries: their gradient is sqrt(d) times
    too large."""
    gradient_q, gradient_k, gradient_v = _backward(self, gradient)
    return gradient_q / self.factor, gradient_k, gradient_v


@mutant(ScaledDotProductAttention, "backward")
def attention_key_gradient_scaled_twice(self: Any, gradient: Any) -> Any:
    """The kept queries are scaled already, and the gradient of the keys, which is formed from them, is scaled once
    more."""
    gradient_q, gradient_k, gradient_v = _backward(self, gradient)
    return gradient_q, gradient_k * self.factor, gradient_v


def _written_out(self: Any, gradient: Any, mean: bool = True, drop_values: bool = True) -> Any:
    """The backward once more, plainly; without `mean`, the softmax's off-diagonal part is left out; without
    `drop_values`, the dropout of the probabilities that the values are summed with."""
    B, H, T, K = self.q.shape
    _, G, S, _ = self.k.shape
    p = self.p.reshape(B, G, H // G * T, S)
    keep = 1 if self.keep is None else self.keep.reshape(p.shape)
    gradient = gradient.reshape(B, G, H // G * T, gradient.shape[-1])
    gradient_v = (p * keep if drop_values else p).swapaxes(-1, -2) @ gradient
    gradient_p = gradient @ self.v.swapaxes(-1, -2) * keep
    average = (p * gradient_p).sum(axis=-1, keepdims=True) if mean else 0
    gradient_scores = p * (gradient_p - average)
    gradient_q = (gradient_scores @ self.k * self.factor).reshape(B, H, T, K)
    return gradient_q, gradient_scores.swapaxes(-1, -2) @ self.q.reshape(B, G, H // G * T, K), gradient_v


@mutant(ScaledDotProductAttention, "backward")
def attention_backward_without_the_mean(self: Any, gradient: Any) -> Any:
    """The softmax inside attention is differentiated element by element: dS = P dP, without -P sum(P dP)."""
    return _written_out(self, gradient, mean=False)


@mutant(ScaledDotProductAttention, "backward")
def attention_key_and_value_gradients_swapped(self: Any, gradient: Any) -> Any:
    """The gradients of keys and values are returned in the wrong order. Their shapes are the same, so nothing
    complains."""
    gradient_q, gradient_k, gradient_v = _backward(self, gradient)
    return (gradient_q, gradient_v, gradient_k) if gradient_k.shape == gradient_v.shape else (
        gradient_q, gradient_k, gradient_v
    )  # fmt: skip


@mutant(ScaledDotProductAttention, "backward")
def attention_value_gradient_ignores_dropout(self: Any, gradient: Any) -> Any:
    """The gradient of the values is formed with the probabilities before dropout, where those after it were used."""
    return _written_out(self, gradient, drop_values=False)


# ---- The attention module ----------------------------------------------------------------------


def attend(
    self: MultiHeadAttention,
    x: Tensor,
    cache: Any,
    rotate_keys: bool = True,
    rotate_values: bool = False,
    norm_after_rotation: bool = False,
    tiled_heads: bool = False,
    merge_without_transpose: bool = False,
    visible: Callable[[int, int], Array] = lambda T, S: np.tri(T, S, S - T, dtype=bool),
) -> Tensor:
    """The module's forward once more, with the mistakes that its arguments name; without any it is the same.

    visible: from the numbers of queries T and keys S, which query sees which key, (T, S).
    """
    offset = 0 if cache is None else cache.length

    def placed(x: Tensor, norm: HeadNorm | None) -> Tensor:
        if norm_after_rotation and norm is not None:
            return ops.rms_norm(self.position.heads(x, self.head_dim, offset), norm.weight, norm.eps)
        return self.heads(x, norm, offset)

    def unplaced(x: Tensor, norm: HeadNorm | None) -> Tensor:
        x = ops.split_heads(x, self.head_dim)
        return x if norm is None else ops.rms_norm(x, norm.weight, norm.eps)

    q = placed(self.query(x), self.query_norm)  # (B, H, T, K)
    k = (placed if rotate_keys else unplaced)(self.key(x), self.key_norm)  # (B, G, T, K)
    v = (placed if rotate_values else unplaced)(self.value(x), None)
    if cache is not None:
        all_keys, all_values = cache.append(k.data, v.data)
        k, v = Tensor(all_keys), Tensor(all_values)
    if tiled_heads:
        heads = np.tile(np.arange(k.shape[1]), q.shape[1] // k.shape[1])
        k, v = k[:, heads], v[:, heads]
    mask = backend.asarray(visible(q.shape[2], k.shape[2]))
    attended = ops.scaled_dot_product_attention(q, k, v, mask=mask)
    B, H, T, K = attended.shape
    return self.output(
        attended.reshape(B, T, H * K) if merge_without_transpose else ops.merge_heads(attended)
    )


@mutant(MultiHeadAttention, "forward")
def keys_used_before_rope(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """Queries are rotated and keys are not. Scores then depend on the position of the query instead of on the
    distance: a text that begins a few tokens later is read in another way."""
    return attend(self, x, cache, rotate_keys=False)


@mutant(MultiHeadAttention, "forward")
def values_rotated_too(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """RoPE is applied to the values as well. What attention reads then depends on where it stood; the model learns
    around it, a little worse."""
    return attend(self, x, cache, rotate_values=True)


@mutant(MultiHeadAttention, "forward")
def qk_norm_after_rope(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """Queries and keys are normalised after their rotation instead of before. With weights of ones both are the same,
    so that nothing shows before training has moved them."""
    return attend(self, x, cache, norm_after_rotation=True)


@mutant(MultiHeadAttention, "forward")
def grouped_heads_tiled(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """Key heads are repeated with tile (0 1 0 1) instead of repeat (0 0 1 1): query head h uses key head h mod G. A
    model trained this way works; weights from elsewhere give nonsense."""
    return attend(self, x, cache, tiled_heads=True)


@mutant(MultiHeadAttention, "forward")
def heads_merged_without_transpose(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """(B, H, T, K) is reshaped to (B, T, H K) without exchanging H and T first: the shape fits, and positions see
    pieces of other positions, those after them among them."""
    return attend(self, x, cache, merge_without_transpose=True)


@mutant(MultiHeadAttention, "forward")
def causal_mask_forgotten(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """No causal mask: every position sees the whole window. The training loss is wonderful."""
    return attend(self, x, cache, visible=lambda T, S: np.ones((T, S), dtype=bool))


@mutant(MultiHeadAttention, "forward")
def mask_sees_one_token_ahead(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """The causal mask is off by one: each position sees the token after it, which is the one that it must predict.
    The training loss falls to nearly zero, and generated text is nonsense."""
    return attend(self, x, cache, visible=lambda T, S: np.tri(T, S, S - T + 1, dtype=bool))


@mutant(MultiHeadAttention, "forward")
def mask_hides_the_token_itself(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """The causal mask is off by one the other way: a position does not see itself, and the first sees nothing."""
    return attend(self, x, cache, visible=lambda T, S: np.tri(T, S, S - T - 1, dtype=bool))


@mutant(MultiHeadAttention, "forward")
def mask_ignores_the_cache(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """The causal mask of T new queries and S cached keys begins at the first key instead of at S - T. Training is
    right; with a cache, a new token sees the first key alone."""
    return attend(self, x, cache, visible=lambda T, S: np.tri(T, S, dtype=bool))


@mutant(MultiHeadAttention, "forward")
def mask_transposed(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """The mask is the upper triangle: each position sees itself and what comes after it, not what came before."""
    return attend(self, x, cache, visible=lambda T, S: ~np.tri(T, S, S - T - 1, dtype=bool))


@mutant(heads.SplitHeads, "forward")
def heads_split_in_the_wrong_order(self: Any, x: Any) -> Any:
    """The last axis of the values is cut into heads as if it were laid out (K, H) instead of (H, K): features of all
    heads are mixed. A model trained this way works; weights from elsewhere give nonsense."""
    B, T, width = x.shape
    return x.reshape((B, T, self.head_dim, width // self.head_dim)).transpose((0, 3, 1, 2))


@mutant(MultiHeadAttention, "heads")
def qk_norm_never_applied(self: Any, x: Tensor, norm: Any, offset: int) -> Tensor:
    """The norms of queries and keys are made, saved and loaded, and never called: their weights get no gradient."""
    return _heads(self, x, None, offset)


_heads = MultiHeadAttention.heads


@mutant(rope.RotaryHeads, "forward")
def head_norm_weight_not_swapped(self: Any, x: Any, weight: Any = None) -> Any:
    """The weight of the norm is put into the table of the sines without exchanging its halves: each feature's partner
    is scaled with the weight of the feature itself. With weights of ones nothing shows."""
    y = _rotary_forward(self, x, weight)
    if weight is None:
        return y
    swapped = backend.swap_halves(self.x * self.inv_rms)
    wrong = self.sin * (weight - backend.swap_halves(weight))
    return y + (swapped * wrong).transpose((0, 2, 1, 3))


_rotary_forward = rope.RotaryHeads.forward
_rotary_backward = rope.RotaryHeads.backward


@mutant(rope.RotaryHeads, "backward")
def head_norm_weight_gradient_before_the_rotation_back(self: Any, gradient: Any) -> Any:
    """The gradient of the norm's weight is formed with the gradient of the rotated heads, which is not yet rotated
    back. At position 0 both are the same."""
    results = _rotary_backward(self, gradient)
    if self.weight is None:
        return results
    product = gradient.transpose((0, 2, 1, 3)) * self.x * self.inv_rms
    return results[0], product.reshape((-1, self.head_dim)).sum(axis=0)


# ---- Rotary positions --------------------------------------------------------------------------


@mutant(rope, "rotation_tables")
def rope_turns_the_other_way(*arguments: Any, **keywords: Any) -> Any:
    """The sine has the wrong sign: positions are rotated backwards. Scores still depend on the distance, so a model
    trained this way works; weights from elsewhere see the text mirrored."""
    cos, sin = _rotation_tables(*arguments, **keywords)
    return cos, -sin


_rotation_tables = rope.rotation_tables


@mutant(rope.FastRope, "backward")
def rope_backward_not_inverted(self: Any, gradient: Any) -> Any:
    """The gradient is rotated forwards once more instead of back: it points twice the angle away from where it should,
    a little at early positions and anywhere at late ones."""
    return rope.rotate(gradient, self.cos, self.sin)


@mutant(rotary.Rope, "__init__")
def rope_exponent_without_the_two(self: Any, offset: int, theta: float, *more: Any, **named: Any) -> None:
    """Frequencies are theta^(-i/K) instead of theta^(-2i/K): all wavelengths are too short, as if theta were its square
    root."""
    _rope_init(self, offset, theta**0.5, *more, **named)


_rope_init = rotary.Rope.__init__
_position_heads = RotaryEmbedding.heads


@mutant(RotaryEmbedding, "heads")
def rope_offset_ignored(
    self: Any, x: Tensor, head_dim: int, offset: int, weight: Any = None, eps: float = 0.0
) -> Tensor:
    """Positions are counted from 0 in every call. Training is right; in decoding with a cache each new token believes
    that it is the first."""
    return _position_heads(self, x, head_dim, 0, weight, eps)


@mutant(RotaryEmbedding, "heads")
def rope_theta_of_the_config_ignored(
    self: Any, x: Tensor, head_dim: int, offset: int, weight: Any = None, eps: float = 0.0
) -> Tensor:
    """The base of the frequencies is always 10000, whatever the config says: a model that was trained with another
    base reads nonsense."""
    return ops.rotary_heads(x, head_dim, weight, eps, offset)


@mutant(RotaryEmbedding, "heads")
def position_always_zero(
    self: Any, x: Tensor, head_dim: int, offset: int, weight: Any = None, eps: float = 0.0
) -> Tensor:
    """Every token is told that it stands at position 0, so that nothing is rotated: the model sees a bag of words,
    but for what the causal mask gives away."""
    return PositionEncoding.heads(self, x, head_dim, offset, weight, eps)


@mutant(RotaryEmbedding, "heads")
def rope_pairs_neighbours(
    self: Any, x: Tensor, head_dim: int, offset: int, weight: Any = None, eps: float = 0.0
) -> Tensor:
    """Pairs are neighbours (x_0, x_1) as in the paper, instead of (x_0, x_(K/2)) as in Llama's half rotation. Each is
    right by itself; weights trained with one give nonsense with the other."""
    order = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    x = PositionEncoding.heads(self, x, head_dim, offset, weight, eps)
    return ops.rope(x[..., order], offset, self.theta)[..., np.argsort(order)]


# ---- The cache ---------------------------------------------------------------------------------

_append = KeyValueCache.append


@mutant(KeyValueCache, "append")
def cache_not_extended(self: Any, keys: Any, values: Any) -> Any:
    """The cache does not count what it holds: each new token overwrites the one before, and all stand at position
    0."""
    result = _append(self, keys, values)
    self.length = 0
    return result


@mutant(KeyValueCache, "append")
def cache_prepends(self: Any, keys: Any, values: Any) -> Any:
    """New keys and values are put before the old ones. One token at a time still sees all of them; the mask of several
    at once hides the wrong ones."""
    T = keys.shape[2]
    return tuple(np.concatenate([a[:, :, -T:], a[:, :, :-T]], axis=2) for a in _append(self, keys, values))


@mutant(KeyValueCache, "append")
def cache_keeps_keys_as_values(self: Any, keys: Any, values: Any) -> Any:
    """A slip of the pen stores the keys in both arrays. The shapes are the same, and generation with a cache repeats
    itself."""
    all_keys, _ = _append(self, keys, keys)
    return all_keys, all_keys


@mutant(KeyValueCache, "append")
def cache_returns_the_new_alone(self: Any, keys: Any, values: Any) -> Any:
    """The cache stores everything and returns only what is new: each token attends to itself alone."""
    _append(self, keys, values)
    return current.xp.array(keys), current.xp.array(values)


# ---- Inference ---------------------------------------------------------------------------------

_infer_attention = attention.infer_attention
_infer_side_by_side = layers.infer_side_by_side


@mutant(attention, "infer_attention")
def inferred_scores_not_scaled(q: Any, keys: Any, values: Any) -> Any:
    """What generates does not divide scores by sqrt(d), and what is trained does: text is more certain of itself than
    the model is."""
    return _infer_attention(q * q.shape[-1] ** 0.5, keys, values)


@mutant(attention, "infer_attention")
def inference_forgets_the_first_token(q: Any, keys: Any, values: Any) -> Any:
    """The first of the keys and values that were kept is left out as soon as there are others."""
    kept = slice(1 if q.shape[3] == 1 and keys.shape[2] > 1 else 0, None)
    return _infer_attention(q, keys[:, :, kept], values[:, :, kept])


@mutant(layers, "infer_side_by_side")
def inferred_projections_in_the_wrong_order(x: Any, *projections: Any) -> Any:
    """The projections of a single token lie in another order than they are read in: queries are used as keys."""
    y = _infer_side_by_side(x, *projections)
    if len(projections) != 3 or x.shape[1] > 1:
        return y
    query, key = (layer.weight.shape[0] for layer in projections[:2])
    return current.xp.concatenate(
        [y[..., query : query + key], y[..., :query], y[..., query + key :]], axis=-1
    )
