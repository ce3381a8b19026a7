"""A graph of matrices: linear regression, with broadcasting, and gradients of gradients."""

import numpy as np

from tinyllm import Tensor, gradients

rng = np.random.default_rng(0)
true_weight = np.array([[2.0], [-1.0], [0.5]])
x = Tensor(rng.normal(size=(64, 3)))  # (N, D)
y = Tensor(x.numpy() @ true_weight + 0.3 + rng.normal(scale=0.01, size=(64, 1)))  # (N, 1)

weight = Tensor(np.zeros((3, 1)), requires_grad=True)
bias = Tensor(np.zeros(1), requires_grad=True)

for step in range(200):
    prediction = x @ weight + bias  # the bias (1,) is broadcast to (N, 1), and its gradient summed back
    loss = ((prediction - y) ** 2).mean()
    loss.backward()
    for parameter in (weight, bias):
        parameter.data -= 0.1 * parameter.grad
        parameter.grad = None
    if step % 50 == 0:
        print(f"step {step:3}  loss {loss.item():.6f}")

print("weight", weight.data.ravel().round(3), " true", true_weight.ravel())
print("bias  ", bias.data.round(3), " true [0.3]")
assert np.allclose(weight.data, true_weight, atol=0.02)

# The gradient is a Tensor with a graph of its own when create_graph is set, and can be differentiated again.
z = Tensor(0.7, requires_grad=True, dtype="float64")
(first,) = gradients(np.sin(z) * z, [z], create_graph=True)
(second,) = gradients(first, [z])
print(f"(z sin z)'' at 0.7: {second:.12f}, by hand {2 * np.cos(0.7) - 0.7 * np.sin(0.7):.12f}")
assert np.isclose(second, 2 * np.cos(0.7) - 0.7 * np.sin(0.7), rtol=1e-14)
