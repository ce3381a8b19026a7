"""One checkpoint: a folder that transformers opens, written whole or not at all, verified when it is read.

config.json, model.safetensors, tokenizer.json, tokenizer_config.json    what transformers reads
training/optimizer.safetensors, training/state.json                      what a run needs to go on
training/manifest.json                                                   size and SHA-256 of each file
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.numpy

from tinyllm import backend
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.formats import hugging_face as llama
from tinyllm.models.formats.safetensors_reader import read_safetensors
from tinyllm.system import storage
from tinyllm.system.errors import InputError, NoSpaceError, UnreadableError
from tinyllm.system.settings import LARGEST_FILE, StrPath, parse_json
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
    """Write a checkpoint folder; a crash leaves the folder whole or absent.

    Raises InputError when the folder exists or cannot be written.
    """
    target = Path(path)
    parameters = {
        llama.to_external(name): backend.to_numpy(array) for name, array in model.state_dict().items()
    }
    files = {
        CONFIG: _json_bytes(llama.config_to_json(model.config)),
        MODEL: safetensors.numpy.save(parameters, metadata={"format": "pt"}),
        TOKENIZER: _json_bytes(tokenizer.to_json()),
        "tokenizer_config.json": _json_bytes({"tokenizer_class": "PreTrainedTokenizerFast"}),
    }
    if training is not None:
        arrays = {name: backend.to_numpy(array) for name, array in training.arrays.items()}
        files[OPTIMIZER] = safetensors.numpy.save(arrays)
        files[STATE] = _json_bytes(training.values)
    manifest = {name: {"size": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    files[MANIFEST] = _json_bytes({"files": manifest})
    temporary = storage.temporary_name(target)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "training").mkdir(parents=True)
        for name, content in files.items():
            storage.write_new(temporary / name, content)
        storage.flush_folder(temporary / "training")
        storage.flush_folder(temporary)
        storage.rename(temporary, target)
        storage.flush_folder(target.parent)
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
        raise kind(f"{target}: the checkpoint cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


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
        """The model, in evaluation mode; raises InputError when the files do not describe one that we have."""
        content = parse_json(self.files[CONFIG], self.folder / CONFIG)
        external = self._arrays(MODEL)
        try:
            config = llama.config_from_json(content)
            arrays = {llama.to_internal(name): array for name, array in external.items()}
            _check_size(config, arrays)
            model = TransformerLM(config)
            if config.tie_embeddings:
                arrays.pop("head.weight", None)  # some writers store the shared matrix twice
            model.load_state_dict(arrays)
        except ValueError as error:
            raise InputError(f"{self.folder}: {error}") from None
        return model.eval()

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


def _check_size(config: ModelConfig, arrays: Mapping[str, Any]) -> None:
    """Refuse a config of a larger model than the file holds before memory is taken for it."""
    layers = {name.split(".")[1] for name in arrays if name.startswith("blocks.")}
    if len(layers) != config.num_layers:
        raise InputError(
            f"config.json says {config.num_layers} layers, model.safetensors holds {len(layers)}"
        )
    if config.num_parameters > sum(array.size for array in arrays.values()):
        raise InputError("config.json describes a larger model than model.safetensors holds")
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise InputError(f"{name} is of {array.dtype}; weights must be floating-point numbers")


def load_training(path: StrPath) -> TrainingState:
    """The training state of a checkpoint; raises InputError when it has none or it is damaged."""
    return read(path).training()


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a checkpoint, be it a damaged one."""
    return (folder / CONFIG).exists() or (folder / "training").exists()
