"""The array library under every Tensor: NumPy, or CuPy after `use_backend("cupy")`.

`current.xp` is the module whose functions compute; write `current.xp.exp(...)`, since a value import of `xp` would
freeze the choice. `device` is CuPy, which nothing else imports; `arrays` has what neither library has a fast function
for; `cuda` answers what programs written for torch ask. `kernels` makes one kernel of an elementwise function, through
its source (`kernel_sources`), which comes from running it on symbols (`tracing`). `philox` makes random masks that have
the same bits everywhere; `drawing` has the generator of those who give none.
"""

from tinyllm.backend import cuda
from tinyllm.backend.arrays import (
    add_at,
    cache_parts,
    clear_rows,
    concatenate_last,
    scatter_add,
    selected,
    swap_halves,
)
from tinyllm.backend.current import (
    BACKENDS,
    PRECISIONS,
    Array,
    HostArray,
    asarray,
    choose,
    ignore_non_finite,
    ignore_overflow,
    is_array,
    is_asynchronous,
    products_underflow,
    read,
    synchronize,
    to_numpy,
    to_numpy_without_waiting,
    use_backend,
    use_library,
)
from tinyllm.backend.drawing import default_generator, manual_seed
from tinyllm.backend.kernels import elementwise, masked_updates

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Array",
    "HostArray",
    "add_at",
    "asarray",
    "cache_parts",
    "choose",
    "clear_rows",
    "concatenate_last",
    "cuda",
    "default_generator",
    "elementwise",
    "ignore_non_finite",
    "ignore_overflow",
    "is_array",
    "is_asynchronous",
    "manual_seed",
    "masked_updates",
    "products_underflow",
    "read",
    "scatter_add",
    "selected",
    "swap_halves",
    "synchronize",
    "to_numpy",
    "to_numpy_without_waiting",
    "use_backend",
    "use_library",
]
