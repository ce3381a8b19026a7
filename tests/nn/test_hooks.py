"""Hooks of modules: when they run, what they are told, and what they may change, as in torch."""

from typing import Any

import numpy as np
import pytest

from tinyllm import Tensor, gradients, no_grad, ops
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import Embedding, Linear, Module


class Product(Module):
    """x y, with both inputs positional."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


class First(Module):
    """x + 1: the output does not depend on y."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 1


def double_module() -> Linear:
    layer = Linear(2, 2, bias=False, rng=np.random.default_rng(0))
    layer.weight.data = np.array([[2.0, 0.0], [0.0, 3.0]])
    return layer


def x64(*values: float) -> Tensor:
    return Tensor(np.array(values, dtype=np.float64), requires_grad=True)


def test_forward_hooks_run_in_order_and_see_inputs_and_output() -> None:
    layer, seen = double_module(), []
    for name in ("first", "second"):
        layer.register_forward_hook(lambda *told, name=name: seen.append((name, *told)))
    x = x64(1, 1)
    out = layer(x)
    assert [entry[0] for entry in seen] == ["first", "second"]
    for _, module, inputs, output in seen:
        assert module is layer
        assert inputs == (x,)
        assert output is out


def test_what_a_forward_hook_returns_is_the_output_for_the_next_hook_and_the_caller() -> None:
    layer, seen = double_module(), []
    layer.register_forward_hook(lambda module, inputs, output: output * 10)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.data.tolist()))
    x = x64(1, 1)
    out = layer(x)
    assert out.data.tolist() == [20, 30]
    assert seen == [[20, 30]]
    out.sum().backward()
    assert x.grad.tolist() == [20, 30], "the replaced output is in the graph"


def test_removed_hooks_do_not_run_and_the_others_still_do() -> None:
    layer, seen = double_module(), []
    removers = [
        layer.register_forward_hook(lambda *told: seen.append("a")),
        layer.register_forward_hook(lambda *told: seen.append("b")),
        layer.register_full_backward_hook(lambda *told: seen.append("c")),
        layer.register_full_backward_hook(lambda *told: seen.append("d")),
    ]
    removers[0]()
    removers[2]()
    layer(x64(1, 1)).sum().backward()
    assert seen == ["b", "d"]
    removers[1]()
    removers[1]()
    removers[3]()
    layer(x64(1, 1)).sum().backward()
    assert seen == ["b", "d"]


def test_hooks_belong_to_one_module() -> None:
    hooked, other, seen = double_module(), double_module(), []
    hooked.register_forward_hook(lambda *told: seen.append(told))
    hooked.register_full_backward_hook(lambda *told: seen.append(told))
    other(x64(1, 1)).sum().backward()
    assert seen == []


def test_backward_hooks_are_told_the_gradients_of_inputs_and_output() -> None:
    module, seen = Product(), []
    module.register_full_backward_hook(lambda *told: seen.append(told))
    x, y, constant = x64(2, 3), x64(5, 7), Tensor(np.array([1.0, 1.0]))
    (module(x, y) * Tensor(np.array([1.0, 10.0]))).sum().backward()
    (told_module, inputs, outputs) = seen.pop()
    assert told_module is module
    assert [g.tolist() for g in inputs] == [[5, 70], [2, 30]]
    assert [g.tolist() for g in outputs] == [[1, 10]]
    module(constant, y).sum().backward()
    ((_, inputs, _),) = seen
    assert inputs[0] is None, "an input that requires no gradient"
    assert inputs[1].tolist() == [1, 1]


def test_backward_hooks_run_in_order_and_once_for_each_call() -> None:
    layer, seen = double_module(), []
    layer.register_full_backward_hook(lambda *told: seen.append("a"))
    layer.register_full_backward_hook(lambda *told: seen.append("b"))
    x = x64(1, 1)
    (layer(x) + layer(x)).sum().backward()
    assert seen == ["a", "b", "a", "b"]
    assert x.grad.tolist() == [4, 6]


def test_a_second_backward_pass_runs_them_again_with_its_own_gradients() -> None:
    layer, seen = double_module(), []

    def halve(module: Module, inputs: Any, outputs: Any) -> Any:
        seen.append((inputs[0].tolist(), outputs[0].tolist()))
        return (inputs[0] / 2,)

    layer.register_full_backward_hook(halve)
    x = x64(1, 1)
    out = layer(x)
    assert gradients(out, [x], np.array([1.0, 1.0]), retain_graph=True)[0].tolist() == [1, 1.5]
    assert gradients(out, [x], np.array([10.0, 100.0]))[0].tolist() == [10, 150]
    assert seen == [([2, 3], [1, 1]), ([20, 300], [10, 100])]


def test_a_returned_gradient_replaces_the_one_of_the_only_input() -> None:
    layer = double_module()
    layer.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0 + 7,))
    layer.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] + 1,))
    x = x64(1, 1)
    layer(x * 3).sum().backward()
    assert x.grad.tolist() == [24, 24]
    assert layer.weight.grad.tolist() == [[3, 3], [3, 3]], "parameters get their own gradient"


def test_a_hook_may_not_replace_gradients_of_several_inputs() -> None:
    module = Product()
    module.register_full_backward_hook(lambda module, inputs, outputs: inputs)
    with pytest.raises(ValueError, match=r"exactly one input.* this call had 2"):
        module(x64(1), x64(2)).sum().backward()


def test_a_hook_returns_one_gradient_for_each_input() -> None:
    layer = double_module()
    layer.register_full_backward_hook(lambda module, inputs, outputs: ())
    with pytest.raises(ValueError, match="the hook returned 0 gradients"):
        layer(x64(1, 1)).sum().backward()


def test_an_input_that_the_output_does_not_depend_on_is_not_waited_for() -> None:
    module, seen = First(), []
    module.register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs))
    x, y = x64(1), x64(2)
    module(x, y).sum().backward()
    ((gradient_x, gradient_y),) = seen
    assert gradient_x.tolist() == [1]
    assert gradient_y is None
    assert y.grad is None


def test_hooks_run_where_no_input_requires_a_gradient() -> None:
    table, seen = Embedding(5, 2, rng=np.random.default_rng(0)), []
    table.register_full_backward_hook(lambda module, inputs, outputs: seen.append((inputs, outputs)))
    table(np.array([1, 1])).sum().backward()
    ((inputs, (output_gradient,)),) = seen
    assert inputs == ()
    assert output_gradient.tolist() == [[1, 1], [1, 1]]
    assert table.weight.grad[1].tolist() == [2, 2]


def test_without_a_graph_backward_hooks_have_nothing_to_do() -> None:
    layer, seen = double_module(), []
    layer.register_full_backward_hook(lambda *told: seen.append(told))
    with no_grad():
        out = layer(x64(1, 1))
    assert out.op is None
    assert seen == []


def test_backward_hooks_need_a_tensor_as_output() -> None:
    class Pair(Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    module = Pair()
    module.register_full_backward_hook(lambda *told: None)
    with pytest.raises(TypeError, match="one Tensor; Pair returned tuple"):
        module(x64(1))


def test_hooks_that_only_look_change_no_bit() -> None:
    tokens = np.random.default_rng(0).integers(0, 7, (2, 5))
    model = TransformerLM(
        ModelConfig(vocab_size=7, context_length=8, num_layers=2, num_heads=2, hidden_size=8), seed=0
    )
    parameters, seen = list(model.parameters()), []

    def run() -> list[Any]:
        loss = ops.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        return [loss.data, *gradients(loss, parameters)]

    before = run()
    for _, module in model.named_modules():
        module.register_forward_hook(lambda module, *told: seen.append(module))
        module.register_full_backward_hook(lambda module, *told: seen.append(module))
    after = run()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    forward, backward = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(forward) > 20
    assert sorted(map(id, forward)) == sorted(map(id, backward)), "each call has its backward"
