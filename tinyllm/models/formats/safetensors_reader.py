"""Reads the safetensors format without trusting it, and without a copy: arrays are views of the bytes.

    8 bytes          N, little-endian
    N bytes          JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {...}}
    all that follow  the arrays, without a gap; offsets count from here

Source: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllm.system.errors import InputError
from tinyllm.system.json_files import refuse_duplicates
from tinyllm.system.wording import shown

LARGEST_HEADER = 1 << 22
"""In bytes. The format allows 100 MB; the objects that JSON becomes take some twenty times its size."""
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def read_safetensors(content: bytes) -> dict[str, npt.NDArray[Any]]:
    """The arrays by name; see `read_safetensors_with_metadata`."""
    return read_safetensors_with_metadata(content)[0]


def read_safetensors_with_metadata(content: bytes) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The arrays by name, which cannot be written to, and the metadata.

    Raises InputError for anything that the format does not allow, and for a dtype that NumPy does not have.
    """
    if len(content) < 8:
        raise InputError(f"{len(content)} bytes are no safetensors file, which begins with 8 bytes of length")
    length = int.from_bytes(content[:8], "little")
    if length > min(LARGEST_HEADER, len(content) - 8):
        raise InputError(
            f"the header has {length:,} bytes, of {len(content) - 8:,} that follow and {LARGEST_HEADER:,} allowed"
        )
    header = _parse(content[8 : 8 + length])
    metadata = header.pop("__metadata__", None)
    data = memoryview(content)[8 + length :]
    entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda item: item[3:])
    arrays: dict[str, npt.NDArray[Any]] = {}
    end = 0
    for name, dtype, shape, begin, stop in entries:
        if begin != end:
            raise InputError(f"{shown(name)} begins at byte {begin}, and the array before it ends at {end}")
        if stop > len(data):
            raise InputError(f"{shown(name)} ends at byte {stop}, and the file holds {len(data)}")
        try:
            arrays[name] = np.frombuffer(data[begin:stop], dtype).reshape(shape)
        except (ValueError, OverflowError) as error:  # no bytes, with a shape that no array can have
            raise InputError(f"{shown(name)} of shape {shown(shape)}: {error}") from None
        end = stop
    if end != len(data):
        raise InputError(f"{len(data) - end} bytes follow the last array")
    return arrays, metadata if isinstance(metadata, dict) else {}


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except RecursionError:
        raise InputError("the header is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"the header is not JSON in UTF-8: {error}") from None
    if not isinstance(header, dict):
        raise InputError(f"the header must be a JSON object, got {shown(header)}")
    return header


def _entry(name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, dtype, shape, and the first byte and the one after the last, found to agree."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            f"{shown(name)} must have dtype, shape and data_offsets and nothing else, got {shown(entry)}"
        )
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise InputError(f"{shown(name)} has dtype {shown(entry['dtype'])}; supported: {', '.join(_DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise InputError(
                f"{what} of {shown(name)} must be a list of numbers from 0, got {shown(numbers)}"
            )
    if len(shape) > 32 or len(offsets) != 2:
        raise InputError(
            f"{shown(name)} has {len(shape)} dimensions and {len(offsets)} offsets; expected 2 offsets"
        )
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if offsets[1] - offsets[0] != size:
        raise InputError(
            f"{shown(name)} of shape {shown(shape)} and dtype {entry['dtype']} takes {size} bytes, its offsets "
            f"{shown(offsets)} {offsets[1] - offsets[0]}"
        )
    return name, dtype, tuple(shape), *offsets
