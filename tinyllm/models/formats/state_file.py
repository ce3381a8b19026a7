"""`save` and `load` of Tensors in dictionaries and lists, such as state_dicts: one safetensors file, never pickle.

A dictionary of arrays is a plain safetensors file under their names. Of anything else the arrays are named by their
paths, and the structure stands as JSON in the metadata: {"tensor": name}, {"dict": {...}}, lists, numbers and text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tinyllm import backend
from tinyllm.autograd.tensor import Tensor
from tinyllm.models.formats.safetensors_reader import read_safetensors_with_metadata
from tinyllm.nn import Module
from tinyllm.system import storage
from tinyllm.system.errors import InputError
from tinyllm.system.storage import StrPath

_STRUCTURE = "tinyllm.structure"


def save(obj: Any, path: StrPath) -> None:
    """Write Tensors and arrays, in dictionaries and lists, with numbers and text, to a file, whole or not at all.

        tinyllm.save(model.state_dict(), "model.safetensors")
        tinyllm.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 20}, "run.safetensors")

    Raises InputError for what is nothing of these, and when the file cannot be written.
    """
    arrays: dict[str, Any] = {}
    structure = _taken_apart(obj, "", arrays)
    metadata = {"format": "pt"}  # transformers asks for it
    if not isinstance(obj, Mapping) or structure != {"dict": {name: {"tensor": name} for name in arrays}}:
        metadata[_STRUCTURE] = json.dumps(structure)
    content = safetensors.numpy.save(
        {name: np.asarray(array, order="C") for name, array in arrays.items()}, metadata
    )
    try:
        storage.replace(Path(path), content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _taken_apart(value: Any, path: str, arrays: dict[str, Any]) -> Any:
    """The structure of `value` as JSON can say it; its arrays are put into `arrays`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor) or hasattr(value, "dtype"):
        if path in arrays:
            raise InputError(f"not saved, because two arrays would be called {path!r}")
        arrays[path] = backend.to_numpy(value.data if isinstance(value, Tensor) else value)
        return {"tensor": path}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InputError("not saved, because only text can be a key of a dictionary")
        below = f"{path}." if path else ""
        return {"dict": {key: _taken_apart(item, f"{below}{key}", arrays) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        below = f"{path}." if path else ""
        return [_taken_apart(item, f"{below}{i}", arrays) for i, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    hint = "; save its state_dict()" if isinstance(value, Module) else ""
    raise InputError(
        f"not saved, because {path or 'it'} is of class {type(value).__name__}: Tensors, arrays, numbers, text, and "
        f"dictionaries and lists of them can be saved{hint}"
    )


def load(path: StrPath) -> Any:
    """What `save` wrote: Tensors in the same dictionaries and lists (tuples are lists). Other safetensors files too.

    Raises InputError for a file that cannot be read, or is damaged.
    """
    try:
        arrays, metadata = read_safetensors_with_metadata(storage.read_file(Path(path)))
        tensors = {name: Tensor(np.array(array)) for name, array in arrays.items()}
        if _STRUCTURE not in metadata:
            return tensors
        return _put_together(json.loads(metadata[_STRUCTURE]), tensors)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: {error}") from None


def _put_together(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(structure, list):
        return [_put_together(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if "tensor" in structure:
        return tensors[structure["tensor"]]
    return {key: _put_together(item, tensors) for key, item in structure["dict"].items()}
