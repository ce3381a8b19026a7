"""What programs written for torch say of devices. Here arrays lie where `use_backend` says, all of them."""

from __future__ import annotations

from typing import Any

import numpy

from tinyllm.backend import current


def is_available() -> bool:
    """Whether arrays lie on a CUDA device, as after `use_backend("cupy")`."""
    return current.xp is not numpy


def here() -> str:
    """Where all arrays lie: "cpu" or "cuda"."""
    return "cuda" if is_available() else "cpu"


def require_here(device: str | None) -> None:
    """Raise ValueError unless arrays lie on `device`: "cpu", "cuda" or "cuda:0"; None is any."""
    if device is not None and device.partition(":")[0] != here():
        raise ValueError(
            f"device={device!r}; all arrays are on {here()!r}: tinyllm.use_backend chooses, before they are made"
        )


def wanted_dtype(*targets: Any) -> Any:
    """The dtype that torch's `to(*targets)` converts to, or None; raises ValueError for another device."""
    dtype = None
    for target in targets:
        if isinstance(target, str) and target.partition(":")[0] in ("cpu", "cuda", "mps"):
            require_here(target)
        elif target is not None:
            dtype = numpy.dtype(target if isinstance(target, (str, type, numpy.dtype)) else target.dtype)
    return dtype
