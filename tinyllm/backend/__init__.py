"""The array library under every Tensor: NumPy, or CuPy after `use_backend("cupy")`.

`current.xp` is the module whose functions compute; write `current.xp.exp(...)`, since a value import of `xp` would
freeze the choice. `device` is CuPy, which nothing else imports; `arrays` has what neither library has a fast function
for. `kernels` makes one kernel of an elementwise function, through its source (`kernel_sources`), which comes from
running it on symbols (`tracing`). `philox` makes random masks that have the same bits everywhere.
"""

from tinyllm.backend.arrays import (
    add_at,
    cache_parts,
    clear_rows,
    joined,
    magnitude,
    scatter_add,
    selected,
    swap_halves,
)
from tinyllm.backend.current import (
    BACKENDS,
    PRECISIONS,
    Array,
    asarray,
    choose,
    free_to_read,
    ignore_non_finite,
    ignore_overflow,
    is_array,
    products_underflow,
    read,
    reads_wait,
    synchronize,
    to_numpy,
    use_backend,
    use_library,
)
from tinyllm.backend.kernels import elementwise, only_where

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Array",
    "add_at",
    "asarray",
    "cache_parts",
    "choose",
    "clear_rows",
    "elementwise",
    "free_to_read",
    "ignore_non_finite",
    "ignore_overflow",
    "is_array",
    "joined",
    "magnitude",
    "only_where",
    "products_underflow",
    "read",
    "reads_wait",
    "scatter_add",
    "selected",
    "swap_halves",
    "synchronize",
    "to_numpy",
    "use_backend",
    "use_library",
]
