"""Mistakes in the model around attention: blocks, norms, initial weights, tied embeddings, dropout."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllm import ops
from tinyllm.autograd.tensor import Tensor
from tinyllm.backend.philox import Key
from tinyllm.models import ModelConfig, TransformerBlock, TransformerLM
from tinyllm.nn import Dropout, FeedForward, Linear, Parameter, RMSNorm, layers
from tinyllm.testing.mutants.planting import mutant


@mutant(TransformerBlock, "forward")
def residual_connection_dropped(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """The feed-forward part replaces its input instead of adding to it. Shallow models still learn; in deep ones
    gradients vanish."""
    x = x + self.attention_dropout(self.attention(self.attention_norm(x), cache))
    return self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)))


@mutant(TransformerBlock, "forward")
def norm_after_instead_of_before(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """Each branch is normalised after its sum with x (post-norm, as in 2017) instead of before (pre-norm): training
    needs a warm-up, and weights from elsewhere give nonsense."""
    x = self.attention_norm(x + self.attention_dropout(self.attention(x, cache)))
    return self.feed_forward_norm(x + self.feed_forward_dropout(self.feed_forward(x)))


@mutant(TransformerBlock, "forward")
def residual_taken_after_the_norm(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """x = norm(x) is written first, and the branch is then added to the normalised x: the stream that should run
    through untouched is normalised twice in every block."""
    x = self.attention_norm(x)
    x = x + self.attention_dropout(self.attention(x, cache))
    x = self.feed_forward_norm(x)
    return x + self.feed_forward_dropout(self.feed_forward(x))


@mutant(TransformerBlock, "forward")
def branches_in_parallel(self: Any, x: Tensor, cache: Any = None, documents: Any = None) -> Tensor:
    """Both branches read the block's input (as in GPT-J), where the feed-forward should read what attention has
    added."""
    attended = self.attention(self.attention_norm(x), cache)
    return x + self.attention_dropout(attended) + self.feed_forward_dropout(
        self.feed_forward(self.feed_forward_norm(x))
    )  # fmt: skip


@mutant(TransformerLM, "hidden")
def final_norm_forgotten(self: Any, tokens: Any, cache: Any = None, documents: Any = None) -> Tensor:
    """The last norm is made, saved and loaded, and not called: its weight gets no gradient, and logits grow with
    depth."""
    norm, self.norm = self.norm, lambda x: x
    try:
        return _hidden(self, tokens, cache, documents)
    finally:
        self.norm = norm


_hidden = TransformerLM.hidden


@mutant(FeedForward, "forward")
def gate_and_up_exchanged(self: Any, x: Tensor) -> Tensor:
    """silu is applied to W_up x instead of W_gate x. A model trained this way works; weights from elsewhere give
    nonsense."""
    return self.down(ops.swiglu(self.up(x), self.gate(x)))


@mutant(RMSNorm, "forward")
def norm_weight_not_used(self: Any, x: Tensor) -> Tensor:
    """The norm does not multiply by its weight. At the beginning all weights are ones, so that nothing shows; they
    never get a gradient."""
    return ops.rms_norm(x, np.ones(self.weight.shape, dtype=self.weight.dtype), self.eps)


@mutant(RMSNorm, "__init__")
def norm_eps_of_the_config_ignored(
    self: Any, normalized_shape: int, eps: float | None = None, elementwise_affine: bool = True
) -> None:
    """eps is always 1e-6, whatever the config says: where a model was trained with a larger one, small vectors are
    scaled up too much."""
    _norm_init(self, normalized_shape, 1e-6, elementwise_affine)


_norm_init = RMSNorm.__init__
_model_init = TransformerLM.__init__


@mutant(TransformerLM, "__init__")
def head_not_tied(self: Any, config: ModelConfig, seed: Any = 0) -> None:
    """tie_embeddings copies the embedding into the head at the beginning, and then each goes its own way: twice the
    parameters, and a checkpoint that has one of them alone."""
    _model_init(self, config, seed)
    if config.tie_embeddings:
        self.head.weight = Parameter(self.embedding.weight.data.copy())


@mutant(TransformerLM, "__init__")
def tied_head_is_a_second_parameter(self: Any, config: ModelConfig, seed: Any = 0) -> None:
    """Embedding and head share one array in two parameters. The optimizer changes it twice in each step, each time
    with a part of its gradient, and decays it twice."""
    _model_init(self, config, seed)
    if config.tie_embeddings:
        self.head.weight = Parameter(self.embedding.weight.data)


@mutant(layers, "normal_parameter")
def weights_begin_with_standard_deviation_one(
    rng: np.random.Generator, shape: tuple[int, ...], std: float
) -> Any:
    """Initial weights are plain standard normal numbers: activations grow by sqrt(D) in every layer, and the first
    loss is far above log V."""
    return _normal(rng, shape, 1.0)


@mutant(layers, "normal_parameter")
def weights_begin_at_zero(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Any:
    """All weights begin at zero: the loss is exactly log V, and no gradient but the last layer's is anything but
    zero."""
    return _normal(rng, shape, 0.0)


_normal = layers.normal_parameter
_linear_init = Linear.__init__


@mutant(Linear, "__init__")
def every_layer_begins_with_the_same_weights(
    self: Any,
    in_features: int,
    out_features: int,
    bias: bool = True,
    *,
    rng: Any = None,
    init_scale: Any = None,
) -> None:
    """Each layer makes a new generator from the same seed: layers of one shape begin as copies of each other, queries
    equal keys."""
    generator = np.random.default_rng(0)
    _linear_init(self, in_features, out_features, bias, rng=generator, init_scale=init_scale)


@mutant(Linear, "__init__")
def weights_scaled_by_their_outputs(
    self: Any,
    in_features: int,
    out_features: int,
    bias: bool = True,
    *,
    rng: Any = None,
    init_scale: Any = None,
) -> None:
    """Initial weights are divided by the root of the number of outputs instead of inputs. Square matrices are right;
    wide ones shrink their input, and narrow ones blow it up."""
    scale = init_scale * (in_features / out_features) ** 0.5
    _linear_init(self, in_features, out_features, bias, rng=rng, init_scale=scale)


@mutant(ModelConfig, "residual_init_scale", property)
def residual_branches_not_scaled_down(self: Any) -> float:
    """Projections into the residual stream begin as large as all others, without 1/sqrt(2 layers): the stream's
    variance grows with depth."""
    return float(self.init_scale)


@mutant(Dropout, "active", property)
def dropout_active_in_evaluation(self: Any) -> bool:
    """Dropout forgets to ask whether it is training: evaluation and generation are random, and worse."""
    return bool(self.p > 0)


@mutant(Dropout, "active", property)
def dropout_never_active(self: Any) -> bool:
    """The test for training is the wrong way round (`not self.training`): dropout does nothing in training."""
    return bool(self.p > 0 and not self.training)


_key = Dropout.key


@mutant(Dropout, "key")
def dropout_same_mask_at_every_layer(self: Any) -> Key:
    """All dropout modules draw the same random numbers: the same features are dropped in every layer, and branches
    that should be independent are not."""
    return _key(self)._replace(stream=0)


@mutant(Dropout, "key")
def dropout_same_mask_at_every_step(self: Any) -> Key:
    """The mask does not depend on the step: the same features are dropped for ever, and a smaller model is trained."""
    return _key(self)._replace(step=0)


@mutant(Dropout, "key")
def dropout_same_mask_in_every_micro_batch(self: Any) -> Key:
    """The mask does not depend on the micro-batch: the parts of a batch are thinned out in the same way."""
    return _key(self)._replace(micro_batch=0)
