"""One checkpoint: a folder that transformers opens, written whole or not at all, verified when it is read.

config.json, model.safetensors, tokenizer.json, tokenizer_config.json    what transformers reads
training/optimizer.safetensors, training/state.json                      what a run needs to go on
training/manifest.json                                                   size and SHA-256 of each file
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tinyllm import backend
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.formats import hugging_face
from tinyllm.models.formats.safetensors_reader import read_safetensors
from tinyllm.nn.state import require_fit
from tinyllm.system import storage
from tinyllm.system.errors import InputError, NoSpaceError, UnreadableError
from tinyllm.system.json_files import parse_json
from tinyllm.system.storage import StrPath
from tinyllm.system.text_files import LARGEST_FILE
from tinyllm.system.wording import shown
from tinyllm.tokenizer import Tokenizer, parse_tokenizer

CONFIG = "config.json"
MODEL = "model.safetensors"
TOKENIZER = "tokenizer.json"
MANIFEST = "training/manifest.json"
STATE = "training/state.json"
OPTIMIZER = "training/optimizer.safetensors"
NEEDED = (CONFIG, MODEL, TOKENIZER)
FILES = (*NEEDED, "tokenizer_config.json", OPTIMIZER, STATE)
ELSEWHERE = "; use another checkpoint"


@dataclass
class TrainingState:
    """What a run needs beside the model to go on: optimizer arrays, and plain values that JSON can hold."""

    arrays: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


# ---- Writing -----------------------------------------------------------------------------------


def save(
    path: StrPath, model: TransformerLM, tokenizer: Tokenizer, training: TrainingState | None = None
) -> Path:
    """Write a checkpoint folder; a crash leaves the folder whole, or as it was before.

    A checkpoint that is there is replaced. Raises InputError, before anything is written, for what `load` would refuse
    (see `require_loadable`) and for a folder that holds anything else, and when the folder cannot be written.
    """
    target = Path(path)
    require_loadable(model, tokenizer)
    _require_replaceable(target)
    parameters = {
        hugging_face.to_external(name, model.config): array for name, array in model.state_dict().items()
    }
    files = {
        CONFIG: _config_bytes(model),
        MODEL: _safetensors_bytes(parameters),
        TOKENIZER: _json_bytes(tokenizer.to_json()),
        "tokenizer_config.json": _json_bytes(_tokenizer_config(tokenizer)),
    }
    if training is not None:
        files[OPTIMIZER] = _safetensors_bytes(training.arrays)
        files[STATE] = _json_bytes(training.values)
    manifest = {name: {"size": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    files[MANIFEST] = _json_bytes({"files": manifest})
    written = Checkpoint(target, files)
    written.weights()
    if training is not None:
        written.training()
    temporary = storage.temporary_name(target)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "training").mkdir(parents=True)
        for name, content in files.items():
            storage.write_new(temporary / name, content)
        storage.flush_folder(temporary / "training")
        storage.flush_folder(temporary)
        storage.replace_folder(temporary, target)
        storage.flush_folder(target.parent)
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
        raise kind(f"{target}: the checkpoint cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def require_loadable(model: TransformerLM, tokenizer: Tokenizer) -> None:
    """Raise InputError for a model and a tokenizer that `load` would refuse, or make another model of.

    A checkpoint holds the parameters of a TransformerLM of `model.config`, all of one floating-point dtype, each in
    memory of its own; the head may be tied to the embedding.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(
            f"a checkpoint holds a tokenizer, got {shown(tokenizer)}; to save without one: "
            "tinyllm.save(model.state_dict(), path)"
        )
    if not isinstance(model, TransformerLM):
        raise InputError(
            f"a checkpoint holds a TransformerLM, got a {type(model).__name__}; of any other module, "
            "tinyllm.save(model.state_dict(), path)"
        )
    config = model.current_config
    arrays = model.state_dict()
    try:
        _check_weights(config, arrays)
        dtypes = {str(array.dtype): name for name, array in arrays.items()}
        if len(dtypes) > 1 or not dtypes.keys() <= {"float16", "float32", "float64"}:
            found = ", ".join(f"{name!r} of {dtype}" for dtype, name in dtypes.items())
            raise InputError(
                f"one dtype, float16, float32 or float64, for all; there are {found}; use model.astype"
            )
        first: dict[int, str] = {}
        for name, array in arrays.items():
            place = array.ctypes.data if isinstance(array, np.ndarray) else id(array)
            other = first.setdefault(place, name)
            if other != name:
                raise InputError(
                    f"{name!r} and {other!r} are two parameters in the same memory; share the Parameter"
                )
        if hugging_face.config_from_json(parse_json(_config_bytes(model), CONFIG)) != config:
            raise InputError("config.json would not describe it")
        check_vocabulary(config, tokenizer)
    except InputError as error:
        raise InputError(
            f"not saved, because it could not be loaded: {error}; a checkpoint holds each parameter of "
            "TransformerLM(model.config) under its name (head.weight may be embedding.weight)"
        ) from None
    _require_readable(tokenizer)


@functools.lru_cache(maxsize=1)  # reading a large one takes a second, and none changes
def _require_readable(tokenizer: Tokenizer) -> None:
    content = _json_bytes(tokenizer.to_json())
    if parse_tokenizer(parse_json(content, TOKENIZER), TOKENIZER).to_json() != tokenizer.to_json():
        raise InputError(
            f"not saved, because this {type(tokenizer).__name__} would be another one when it is loaded"
        )


def _require_replaceable(folder: Path) -> None:
    """Raise InputError when something else than a checkpoint would be lost."""
    if folder.is_symlink():
        raise InputError(f"{folder}: a link cannot be replaced by a checkpoint; give the folder itself")
    others = [
        path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()
    ]
    others = [path for path in others if path.as_posix() not in (*FILES, MANIFEST)]
    if others:
        raise InputError(
            f"{folder}: holds {others[0]}, which is no part of a checkpoint; give another folder"
        )


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, str]:
    """What transformers reads beside tokenizer.json: its class, and the token that fills up the shorter of a batch.

    A special token has to serve, because transformers takes the padding token for a special one: text that has it would
    get other ids, and it would be left out of decoded text. Its model has no row for one that is added.
    """
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    special = list(tokenizer.special_tokens)
    meant = [token for token in special if "pad" in token.lower()] or special
    return {**config, "pad_token": meant[0]} if meant else config


def _config_bytes(model: TransformerLM) -> bytes:
    dtype = model.embedding.weight.dtype
    return _json_bytes(hugging_face.config_to_json(model.current_config, str(dtype)))


def _safetensors_bytes(arrays: Mapping[str, Any]) -> bytes:
    # The library writes the memory of an array as it lies there, which is its values in the order of C alone.
    in_order = {name: np.asarray(backend.to_numpy(array), order="C") for name, array in arrays.items()}
    return safetensors.numpy.save(in_order, metadata={"format": "pt"})  # transformers asks for the format


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    except (TypeError, ValueError) as error:
        raise InputError(f"not saved, because JSON cannot hold it: {error}") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- Reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint, read once and found to be those that were written."""

    folder: Path
    files: Mapping[str, bytes]
    passed_over: tuple[str, ...] = ()
    """Of the run's checkpoints that would have come first, what is wrong with each."""

    def model(self) -> TransformerLM:
        """The model, in evaluation mode: in float64 where the file has that, otherwise in float32.

        Raises InputError when the files do not describe one that we have.
        """
        config, arrays = self.weights()
        model = TransformerLM(config)
        if any(array.dtype == np.float64 for array in arrays.values()):
            model.astype(np.float64)
        model.load_state_dict(arrays)
        return model.eval()

    def weights(self) -> tuple[ModelConfig, dict[str, Any]]:
        """The config and the arrays by our names, found to make a model together; they are views of the file."""
        content = parse_json(self.files[CONFIG], self.folder / CONFIG)
        external = self._arrays(MODEL)
        try:
            config = hugging_face.config_from_json(content)
            arrays = {hugging_face.to_internal(name, config): array for name, array in external.items()}
            if config.tie_embeddings:
                arrays.pop("head.weight", None)  # some writers store the shared matrix twice
            _check_weights(config, arrays)
        except ValueError as error:
            raise InputError(f"{self.folder}: {error}") from None
        return config, arrays

    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises InputError for a kind that we do not have."""
        path = self.folder / TOKENIZER
        return parse_tokenizer(parse_json(self.files[TOKENIZER], path), path)

    def training(self) -> TrainingState:
        """The training state; raises InputError when there is none."""
        if STATE not in self.files:
            raise InputError(f"{self.folder}: holds no training state, so training cannot go on from it")
        return TrainingState(self._arrays(OPTIMIZER), parse_json(self.files[STATE], self.folder / STATE))

    def _arrays(self, name: str) -> dict[str, Any]:
        try:
            return dict(read_safetensors(self.files[name]))
        except InputError as error:
            raise InputError(f"{self.folder / name}: not a readable safetensors file: {error}") from None


def read(path: StrPath) -> Checkpoint:
    """Read and verify one checkpoint folder.

    A folder without training/, as transformers writes it, has no manifest: its files are taken as they are. Raises
    InputError, in one line, naming the file that is missing or damaged.
    """
    folder = Path(path)
    if not (folder / MANIFEST).parent.exists():
        largest = {CONFIG: LARGEST_FILE, TOKENIZER: LARGEST_FILE}
        return Checkpoint(folder, {name: _read(folder / name, largest.get(name)) for name in NEEDED})
    files: dict[str, bytes] = {}
    for name, (size, sha256) in _manifest(folder).items():
        content = _read(folder / name, size)
        if len(content) != size or _sha256(content) != sha256:
            raise InputError(
                f"{folder / name}: damaged, its SHA-256 is not the one it was written with{ELSEWHERE}"
            )
        files[name] = content
    return Checkpoint(folder, files)


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file. No other names than ours: they could lead to any file of the machine."""
    path = folder / MANIFEST
    try:
        files = parse_json(_read(path, 1 << 16), path)["files"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
        training = {OPTIMIZER, STATE} & expected.keys()
        whole = {*FILES} >= expected.keys() >= {*NEEDED} and len(training) != 1
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, InputError) and not path.is_file():
            raise
        whole = False
    if not whole:
        raise InputError(f"{path}: damaged{ELSEWHERE}")
    return expected


def _read(path: Path, largest: int | None = None) -> bytes:
    try:
        return storage.read_file(path, largest)
    except FileNotFoundError:
        raise InputError(f"{path}: missing{ELSEWHERE}") from None
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP):
            raise InputError(f"{path}: damaged: {error.strerror or error}") from None
        raise UnreadableError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_weights(config: ModelConfig, arrays: Mapping[str, Any]) -> None:
    """Refuse arrays that are not those of a model of this config, before memory is taken for it."""
    layers = {name.split(".")[1] for name in arrays if name.startswith("blocks.")}
    # First, because it may be a billion, whose names take more memory than there is.
    if len(layers) != config.num_layers:
        raise InputError(f"the config says {config.num_layers} layers, the weights are of {len(layers)}")
    require_fit(config.parameter_shapes(), arrays)


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise InputError for a tokenizer with more tokens than the model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; they do not "
            "belong together"
        )


def load_training(path: StrPath) -> TrainingState:
    """The training state of a checkpoint; raises InputError when it has none or it is damaged."""
    return read(path).training()


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a checkpoint, be it a damaged one."""
    return (folder / CONFIG).exists() or (folder / "training").exists()
