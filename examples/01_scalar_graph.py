"""A graph of single numbers, by hand: what backward does, step by step.

L = (a b + c)^2,  so  dL/da = 2 (a b + c) b,  dL/db = 2 (a b + c) a,  dL/dc = 2 (a b + c)
"""

from tinyllm import Tensor

a = Tensor(2.0, requires_grad=True, name="a")
b = Tensor(-3.0, requires_grad=True, name="b")
c = Tensor(10.0, requires_grad=True, name="c")

product = a * b
total = product + c
loss = total**2
for tensor in (product, total, loss):
    tensor.retain_grad()  # leaves keep their gradient anyway

print("forward")
print(f"  a b       = {product.item()}")
print(f"  a b + c   = {total.item()}")
print(f"  squared   = {loss.item()}")

# Each Tensor knows the op that made it, and the op knows its inputs: that is the graph.
names = [x.name if x.op is None else x.op.name for x in total.op.inputs]
print(f"the graph: {loss.op.name} of {total.op.name} of {names}")

loss.backward()

print("backward, from the loss to the leaves")
print(f"  dL/d(a b + c) = {total.grad}   (2 times {total.item()})")
print(f"  dL/d(a b)     = {product.grad}   (a sum passes the gradient on)")
print(f"  dL/da         = {a.grad} (times b)")
print(f"  dL/db         = {b.grad}  (times a)")
print(f"  dL/dc         = {c.grad}")

assert a.grad == 2 * total.item() * b.item()
assert b.grad == 2 * total.item() * a.item()
assert c.grad == 2 * total.item()
