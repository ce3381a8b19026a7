"""The fast forms of ops, which training runs in place of the formulas beside this folder; one file a subject.

Each computes what its formula does, with every trick; its docstring says which. `use_formulas()` leaves them out.
"""

from tinyllm.ops.fast import activation, attention, lookup, loss, norm, products, rotary  # noqa: F401 (register themselves)

__all__: list[str] = []
