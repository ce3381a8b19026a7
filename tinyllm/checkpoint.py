"""Checkpoints: a folder that transformers opens, written whole or not at all, verified when it is read.

    config.json, model.safetensors, tokenizer.json, tokenizer_config.json    what transformers reads
    training/optimizer.safetensors, training/state.json                      what a run needs to go on
    training/manifest.json                                                   size and SHA-256 of each file

A run keeps its checkpoints as `checkpoints/step-00000250`, and names two of them by links: `latest` and
`best`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.numpy

from tinyllm import backend
from tinyllm.config import StrPath, read_json
from tinyllm.errors import InputError
from tinyllm.interop import llama
from tinyllm.nn import ModelConfig, TransformerLM
from tinyllm.tokenizer import Tokenizer, load_tokenizer

MANIFEST = "training/manifest.json"
STATE = "training/state.json"
OPTIMIZER = "training/optimizer.safetensors"
LINKS = ("latest", "best")
_SET_ASIDE = "before-rollback-"


@dataclass
class TrainingState:
    """What a run needs beside the model to go on: optimizer arrays, and plain values that JSON can hold."""

    arrays: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


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
        "config.json": _json_bytes(llama.config_to_json(model.config)),
        "model.safetensors": safetensors.numpy.save(parameters, metadata={"format": "pt"}),
        "tokenizer.json": _json_bytes(tokenizer.to_json()),
        "tokenizer_config.json": _json_bytes({"tokenizer_class": "PreTrainedTokenizerFast"}),
    }
    if training is not None:
        arrays = {name: backend.to_numpy(array) for name, array in training.arrays.items()}
        files[OPTIMIZER] = safetensors.numpy.save(arrays)
        files[STATE] = _json_bytes(training.values)
    manifest = {name: {"size": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    files[MANIFEST] = _json_bytes({"files": manifest})
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        (temporary / "training").mkdir(parents=True)
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _flush_folder(temporary / "training")
        _flush_folder(temporary)
        os.rename(temporary, target)
        _flush_folder(target.parent)
    except OSError as error:
        raise InputError(f"{target}: the checkpoint cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load(path: StrPath) -> tuple[TransformerLM, Tokenizer]:
    """The model and tokenizer of a checkpoint, of a run (its best checkpoint), or of a folder of transformers.

    Raises InputError, in one line, when something is missing, damaged or not supported.
    """
    folder = find(path, ("best", "latest"))
    verify(folder)
    model, tokenizer = _load_model(folder), load_tokenizer(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; "
            "they do not belong together"
        )
    return model, tokenizer


def load_training(path: StrPath) -> TrainingState:
    """The training state of a checkpoint; raises InputError when it has none or it is damaged."""
    folder = Path(path)
    verify(folder)
    if not (folder / STATE).exists():
        raise InputError(f"{folder}: holds no training state, so training cannot go on from it")
    return TrainingState(_load_arrays(folder / OPTIMIZER), read_json(folder / STATE))


def find(path: StrPath, links: tuple[str, ...] = LINKS) -> Path:
    """The checkpoint that `path` is, or the first of `links` that the run at `path` has."""
    folder = Path(path)
    if _is_checkpoint(folder):
        return folder
    for link in links:
        target = read_link(folder, link)
        if target is not None and _is_checkpoint(target):
            return target
    if found := checkpoints(folder):
        return found[-1]  # a crash came between the checkpoint and the link to it
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; give a run or a checkpoint that `tinyllm train` wrote")
    raise InputError(f"{folder}: no checkpoint here; give a run or a checkpoint that `tinyllm train` wrote")


def _is_checkpoint(folder: Path) -> bool:
    """Whether this is a checkpoint, be it a damaged one."""
    return (folder / "config.json").exists() or (folder / "training").exists()


def verify(folder: Path) -> None:
    """Check every file against the manifest; raises InputError naming the damaged file.

    A folder without training/, as transformers writes it, has no manifest and is not checked.
    """
    if not (folder / MANIFEST).parent.exists():
        return
    content = _read(folder / MANIFEST)
    try:
        files = json.loads(content)["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
        complete = expected.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        complete = False
    if not complete:
        raise InputError(f"{folder / MANIFEST}: damaged; use another checkpoint")
    for name, (size, sha256) in expected.items():
        content = _read(folder / name)
        if len(content) != size or _sha256(content) != sha256:
            raise InputError(
                f"{folder / name}: damaged, its SHA-256 is not the one it was written with; use another checkpoint"
            )


def point(run: Path, link: str, target: Path) -> None:
    """Make `run/link` name the checkpoint `target`, in one step."""
    temporary = run / f".{link}.tmp"
    relative = os.path.relpath(target, run)
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.symlink(relative, temporary, target_is_directory=True)
        except OSError:  # a file system or a user without symbolic links: a file that holds the path
            temporary.write_text(relative, encoding="utf-8")
        os.replace(temporary, run / link)
    except OSError as error:
        raise InputError(f"{run / link}: cannot be written: {error.strerror or error}") from None


def read_link(run: Path, link: str) -> Path | None:
    """The checkpoint that `run/link` names, or None."""
    path = run / link
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        return run / path.read_text(encoding="utf-8", errors="replace").strip()
    return None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def scheduled(run: Path, every: int) -> list[Path]:
    """The checkpoints of a run whose step is a multiple of `every`, oldest first."""
    found = [(folder, folder.name.removeprefix("step-")) for folder in checkpoints(run)]
    return [folder for folder, step in found if step.isdecimal() and int(step) % every == 0]


def prune(run: Path, keep: int = 1, every: int = 1) -> None:
    """Delete the checkpoints of a run but the newest `keep` of a multiple of `every`, and those that a link names.

    Deletes what a crash left, too.
    """
    kept = {target.resolve() for target in (read_link(run, link) for link in LINKS) if target is not None}
    kept.update(folder.resolve() for folder in scheduled(run, every)[-keep:])
    folders = [*checkpoints(run), *(run / "checkpoints").glob(f"{_SET_ASIDE}*")]
    unneeded = [folder for folder in folders if folder.resolve() not in kept]
    for folder in [*unneeded, *(run / "checkpoints").glob(".step-*.tmp")]:
        shutil.rmtree(folder, ignore_errors=True)


def go_back(run: Path, target: Path) -> None:
    """Make `target` the latest checkpoint of a run again, and delete the newer ones.

    The best one is kept, under another name, because training will come to its step again.
    """
    point(run, "latest", target)
    best = read_link(run, "best")
    if best is not None and best.name.startswith("step-") and best.name > target.name and best.exists():
        aside = best.with_name(_SET_ASIDE + best.name)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(best, aside)
        except OSError as error:
            raise InputError(f"{best}: cannot be renamed: {error.strerror or error}") from None
        point(run, "best", aside)
    remove_after(run, target)


def remove_after(run: Path, target: Path) -> None:
    """Delete the checkpoints that are newer than `target`: a crash left them without a link."""
    for folder in checkpoints(run):
        if folder.name > target.resolve().name:
            shutil.rmtree(folder, ignore_errors=True)


def remove_run(run: Path) -> None:
    """Delete the checkpoints of a run and the links to them."""
    for link in LINKS:
        (run / link).unlink(missing_ok=True)
    if (run / "checkpoints").exists():
        shutil.rmtree(run / "checkpoints")


def _load_model(folder: Path) -> TransformerLM:
    content = read_json(folder / "config.json")
    external = _load_arrays(folder / "model.safetensors")
    try:
        config = llama.config_from_json(content)
        arrays = {llama.to_internal(name): array for name, array in external.items()}
        _check_size(config, arrays)
        model = TransformerLM(config)
        if config.tie_embeddings:
            arrays.pop("head.weight", None)  # some writers store the shared matrix twice
        model.load_state_dict(arrays)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None
    return model.eval()


def _check_size(config: ModelConfig, arrays: Mapping[str, Any]) -> None:
    """Refuse a config of a larger model than the file holds before memory is taken for it."""
    layers = {name.split(".")[1] for name in arrays if name.startswith("blocks.")}
    if len(layers) != config.num_layers:
        raise InputError(
            f"config.json says {config.num_layers} layers, model.safetensors holds {len(layers)}"
        )
    if config.num_parameters > sum(array.size for array in arrays.values()):
        raise InputError("config.json describes a larger model than model.safetensors holds")


def _load_arrays(path: Path) -> dict[str, Any]:
    try:
        arrays: dict[str, Any] = safetensors.numpy.load(_read(path))
    except Exception as error:  # the library raises several unrelated types for damaged files
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable safetensors file: {error}") from None
    return arrays


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: missing; use another checkpoint") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
