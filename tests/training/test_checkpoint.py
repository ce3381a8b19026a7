"""Checkpoints: exact, whole or absent, and every damage is one clear line."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from support.faults import KILLED, KINDS, OPERATIONS, Faults, in_fork

from tinyllm import InputError
from tinyllm.autograd.tensor import Tensor
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.nn import Parameter
from tinyllm.system import storage
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.checkpoints import checkpoint, keeping
from tinyllm.training.checkpoints.checkpoint import TrainingState
from tinyllm.training.config import TrainConfig
from tinyllm.training.trainer import Trainer

TOKENIZER = CharTokenizer("\n abcdé")
CONFIG = ModelConfig(
    vocab_size=7, context_length=8, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=16
)
VARIANTS = {
    "qwen3": CONFIG,
    "llama": replace(CONFIG, qk_norm=False),
    "tied": replace(CONFIG, tie_embeddings=True),
    "other widths": replace(CONFIG, head_dim=6, intermediate_size=10, rope_theta=123.0, norm_eps=1e-3),
    "own": replace(CONFIG, position_encoding="none", dropout=0.25, init_scale=0.5, vocab_size=20),
}
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training/manifest.json",
    "training/optimizer.safetensors",
    "training/state.json",
)


def training_state() -> TrainingState:
    rng = np.random.default_rng(3)
    return TrainingState(
        {"a.m": rng.standard_normal((3, 2)).astype(np.float32), "b.v": np.zeros(0, dtype=np.float32)},
        {"step": 5, "loss": 0.1 + 0.2, "nested": {"é": [1, None, True]}},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "saved", TransformerLM(CONFIG, 1), TOKENIZER, training_state())


def refused(action: Callable[[], Any], *parts: str) -> None:
    """`action` raises an InputError of one line with all `parts` in it."""
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    for part in parts:
        assert part in message, message


# ---- What is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_round_trip_keeps_every_bit(tmp_path: Path, config: ModelConfig) -> None:
    model = TransformerLM(config, seed=4)
    for parameter in model.parameters():
        parameter.data[...] = np.random.default_rng(parameter.size).standard_normal(parameter.shape)
    model.norm.weight.data[:4] = [0.0, -0.0, 1e-45, 3e38]  # zeros of both signs, a subnormal number
    path = checkpoint.save(tmp_path / "x", model, TOKENIZER, training_state())
    assert sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()) == sorted(FILES)
    loaded, tokenizer = keeping.load(path)
    assert loaded.config == config
    assert not loaded.training
    assert tokenizer.to_json() == TOKENIZER.to_json()
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype
        assert array.tobytes() == theirs[name].tobytes()
    assert (loaded.head.weight is loaded.embedding.weight) == config.tie_embeddings
    state = checkpoint.load_training(path)
    assert state.values == training_state().values
    assert state.arrays.keys() == training_state().arrays.keys()
    for name, array in training_state().arrays.items():
        assert state.arrays[name].tobytes() == array.tobytes()
        assert state.arrays[name].shape == array.shape


def test_the_same_state_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoint.save(tmp_path / name, TransformerLM(CONFIG, 1), TOKENIZER, training_state())
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(("kind", "qk_norm"), [("qwen3", True), ("llama", False)])
def test_names_and_shapes_are_those_of_transformers(tmp_path: Path, kind: str, qk_norm: bool) -> None:
    config = replace(CONFIG, qk_norm=qk_norm, rope_theta=500.0, norm_eps=1e-5)
    path = checkpoint.save(tmp_path / "x", TransformerLM(config), TOKENIZER)
    content = json.loads((path / "config.json").read_text())
    expected = {
        "model_type": kind,
        "architectures": ["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
        "vocab_size": 7,
        "hidden_size": 16,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    assert {key: content[key] for key in expected} == expected
    assert content["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}
    D, F = 16, config.intermediate_size
    shapes = {"model.embed_tokens.weight": (7, D), "model.norm.weight": (D,), "lm_head.weight": (7, D)}
    for i in range(2):
        layer = {
            "input_layernorm": (D,),
            "self_attn.q_proj": (16, D),
            "self_attn.k_proj": (8, D),
            "self_attn.v_proj": (8, D),
            "self_attn.o_proj": (D, 16),
            "post_attention_layernorm": (D,),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        if qk_norm:
            layer |= {"self_attn.q_norm": (4,), "self_attn.k_norm": (4,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    arrays = safetensors.numpy.load_file(path / "model.safetensors")
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert b'"format":"pt"' in (path / "model.safetensors").read_bytes()[:200]  # transformers asks for it
    assert not (path / "training" / "state.json").exists()


def test_a_model_that_transformers_cannot_express_says_so(tmp_path: Path) -> None:
    model = TransformerLM(replace(CONFIG, position_encoding="none"))
    path = checkpoint.save(tmp_path / "x", model, TOKENIZER)
    content = json.loads((path / "config.json").read_text())
    assert content["model_type"] == "tinyllm"
    assert "architectures" not in content


def test_a_folder_of_transformers_without_training_is_read(saved: Path) -> None:
    shutil.rmtree(saved / "training")
    content = json.loads((saved / "config.json").read_text())
    del content["tinyllm"], content["num_key_value_heads"]
    content["num_attention_heads"] = 4
    content["some_new_key"] = {"ignored": 1}
    content["num_key_value_heads"] = 2
    (saved / "config.json").write_text(json.dumps(content))
    model, _ = keeping.load(saved)
    assert model.config.qk_norm
    refused(lambda: checkpoint.load_training(saved), "no training state")


# ---- What is refused before it is written -------------------------------------------------------


def rng_array(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def append_a_block(model: TransformerLM) -> None:
    model.blocks.append(TransformerLM(CONFIG, 5).blocks[0])


def remove_a_block(model: TransformerLM) -> None:
    del model.blocks[0]


def enlarge_the_head(model: TransformerLM) -> None:
    model.head.weight = Parameter(rng_array(9, 16))


def add_a_bias(model: TransformerLM) -> None:
    model.head.bias = Parameter(rng_array(7))


def remove_the_norms_of_heads(model: TransformerLM) -> None:
    for block in model.blocks:
        block.attention.query_norm = block.attention.key_norm = None


def widen_one_feed_forward(model: TransformerLM) -> None:
    wide = TransformerLM(replace(CONFIG, intermediate_size=24))
    model.blocks[1].feed_forward = wide.blocks[1].feed_forward


def share_a_module(model: TransformerLM) -> None:
    model.blocks[1].feed_forward = model.blocks[0].feed_forward


def share_a_parameter(model: TransformerLM) -> None:
    model.blocks[1].attention.key.weight = model.blocks[1].attention.value.weight


def share_memory(model: TransformerLM) -> None:
    model.head.weight.data = model.embedding.weight.data[:]


def put_an_array(model: TransformerLM) -> None:
    model.norm.weight = np.full(16, 2.0)  # type: ignore[assignment]


def put_a_tensor(model: TransformerLM) -> None:
    model.norm.weight = Tensor(np.ones(16, dtype=np.float32), requires_grad=True)  # type: ignore[assignment]


def put_integers(model: TransformerLM) -> None:
    model.norm.weight.data = np.ones(16, dtype=np.int64)


def put_long_doubles(model: TransformerLM) -> None:
    model.astype(np.longdouble)


def mix_dtypes(model: TransformerLM) -> None:
    model.norm.weight.data = np.ones(16)


def put_nan_into_the_config(model: TransformerLM) -> None:
    object.__setattr__(model.config, "norm_eps", math.nan)


def put_a_number_for_yes_into_the_config(model: TransformerLM) -> None:
    model.config = replace(model.config, qk_norm=1)  # type: ignore[arg-type]


def put_a_fraction_into_the_config(model: TransformerLM) -> None:
    model.config = replace(model.config, context_length=64.0)  # type: ignore[arg-type]


@dataclass(frozen=True)
class OwnConfig(ModelConfig):
    window: int = 5


def put_a_field_into_the_config(model: TransformerLM) -> None:
    model.config = OwnConfig(**vars(model.config))


CHANGES: dict[Callable[[TransformerLM], None], str] = {
    append_a_block: "the config says 2 layers, the weights are of 3",
    remove_a_block: "the config says 2 layers, the weights are of 1",
    enlarge_the_head: "'head.weight' has shape (9, 16), the model needs (7, 16)",
    add_a_bias: "unknown: 'head.bias'",
    remove_the_norms_of_heads: "missing: 'blocks.0.attention.query_norm.weight'",
    widen_one_feed_forward: "'blocks.1.feed_forward.gate.weight' has shape (24, 16), the model needs (48, 16)",
    share_a_module: "missing: 'blocks.1.feed_forward.gate.weight'",
    share_a_parameter: "missing: 'blocks.1.attention.value.weight'",
    share_memory: "'head.weight' and 'embedding.weight' are two parameters in the same memory",
    put_an_array: "norm.weight is of class ndarray, where a Parameter must stand",
    put_a_tensor: "norm.weight is of class Tensor, where a Parameter must stand",
    put_integers: "'norm.weight' is of int64; weights must be floating-point numbers",
    put_long_doubles: "there are 'head.weight' of float128",
    mix_dtypes: "'head.weight' of float32, 'norm.weight' of float64",
    put_nan_into_the_config: "norm_eps=nan",
    put_a_number_for_yes_into_the_config: "qk_norm must be true or false, got 1",
    put_a_field_into_the_config: "config.json would not describe it",
    put_a_fraction_into_the_config: "context_length must be an integer, got 64.0",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_load_would_refuse_is_not_saved(tmp_path: Path, change: Callable[[TransformerLM], None]) -> None:
    """Nor trained: the Trainer refuses it before any work, if it is to keep checkpoints."""
    model = TransformerLM(replace(CONFIG), 1)
    checkpoint.require_loadable(model, TOKENIZER)
    change(model)
    refused(lambda: checkpoint.save(tmp_path / "x", model, TOKENIZER, training_state()), CHANGES[change])
    tokens = np.arange(100, dtype=np.uint16) % 7
    train = TrainConfig(steps=1, batch_size=1, threads=1)
    refused(lambda: Trainer(model, TOKENIZER, tokens, tokens, train, tmp_path), CHANGES[change])
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_load_would_refuse_is_not_saved(tmp_path: Path) -> None:
    class Own(CharTokenizer):
        def to_json(self) -> dict[str, Any]:
            return {**super().to_json(), "model": {"type": "Own"}}

    class Forgetful(CharTokenizer):
        def to_json(self) -> dict[str, Any]:
            return {**super().to_json(), "forgotten": 5}

    model = TransformerLM(CONFIG, 1)
    larger = CharTokenizer("abcdefgh")
    for tokenizer, message in (
        (larger, "the tokenizer has 8 tokens, the model 7"),
        (Own("abc"), "the tokenizer's model type is 'Own'"),
        (Forgetful("abc"), "this Forgetful would be another one"),
    ):
        refused(lambda tokenizer=tokenizer: checkpoint.save(tmp_path / "x", model, tokenizer), message)  # type: ignore[misc]
    state = TrainingState({}, {"callbacks": {"Own": {"mean": np.float32(5)}}})
    refused(lambda: checkpoint.save(tmp_path / "x", model, TOKENIZER, state), "JSON cannot hold", "float32")
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_load_would_refuse_is_not_saved(tmp_path: Path) -> None:
    arrays = {f"{number:0100}": np.zeros(0, dtype=np.float32) for number in range(40_000)}
    state = TrainingState(arrays, {})
    refused(
        lambda: checkpoint.save(tmp_path / "x", TransformerLM(CONFIG), TOKENIZER, state), "the header has"
    )
    assert list(tmp_path.iterdir()) == []


# ---- What is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True], ids=["head = embedding", "embedding = head"])
def test_a_tie_made_by_hand_is_saved_as_one(tmp_path: Path, reverse: bool) -> None:
    model = TransformerLM(CONFIG, 1)
    if reverse:
        model.embedding.weight = model.head.weight
    else:
        model.head.weight = model.embedding.weight
    path = checkpoint.save(tmp_path / "x", model, TOKENIZER)
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in safetensors.numpy.load_file(path / "model.safetensors")
    loaded, _ = keeping.load(path)
    assert loaded.head.weight is loaded.embedding.weight
    assert loaded.head.weight.data.tobytes() == model.head.weight.data.tobytes()
    tokens = np.arange(6).reshape(2, 3)
    assert loaded(tokens).data.tobytes() == model.eval()(tokens).data.tobytes()


def test_a_tie_undone_by_hand_is_saved_as_none(tmp_path: Path) -> None:
    model = TransformerLM(replace(CONFIG, tie_embeddings=True), 1)
    model.head.weight = Parameter(model.embedding.weight.data + 1)
    loaded, _ = keeping.load(checkpoint.save(tmp_path / "x", model, TOKENIZER))
    assert not loaded.config.tie_embeddings
    for name, array in model.state_dict().items():
        assert loaded.state_dict()[name].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("dtype", "loads_as"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_a_dtype_is_written_and_no_bit_is_lost(tmp_path: Path, dtype: str, loads_as: str) -> None:
    model = TransformerLM(replace(CONFIG, tie_embeddings=True), 1).astype(np.float64)
    for parameter in model.parameters():
        parameter.data[...] = rng_array(*parameter.shape, dtype=np.float64)
    model.astype(dtype)
    path = checkpoint.save(tmp_path / "x", model, TOKENIZER)
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == dtype
    loaded, _ = keeping.load(path)
    assert loaded.head.weight is loaded.embedding.weight
    for name, array in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == loads_as
        assert np.array_equal(loaded.state_dict()[name], array)


def test_arrays_in_any_layout_are_saved_as_their_values(tmp_path: Path) -> None:
    model = TransformerLM(CONFIG, 1)
    expected = {name: array.copy() for name, array in model.state_dict().items()}
    model.embedding.weight.data = np.asfortranarray(expected["embedding.weight"])
    model.head.weight.data = np.ascontiguousarray(expected["head.weight"][::-1])[::-1]
    query = model.blocks[0].attention.query.weight
    query.data = np.repeat(query.data, 2, axis=1)[:, ::2]
    model.norm.weight.data = np.broadcast_to(np.float32(2), 16)
    expected["norm.weight"][...] = 2
    moment = rng_array(3, 2)
    state = TrainingState(
        {"a.m": np.asfortranarray(moment), "b.v": moment[::-1, ::-1], "c": moment[0, 0]}, {}
    )
    path = checkpoint.save(tmp_path / "x", model, TOKENIZER, state)
    arrays = checkpoint.load_training(path).arrays
    assert np.array_equal(arrays["a.m"], moment)
    assert np.array_equal(arrays["b.v"], moment[::-1, ::-1])
    assert arrays["c"].shape == ()
    loaded, _ = keeping.load(path)
    for name, array in loaded.state_dict().items():
        assert array.tobytes() == expected[name].tobytes()


# ---- Damage ------------------------------------------------------------------------------------


def load_all(path: Path) -> None:
    keeping.load(path)
    checkpoint.load_training(path)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(saved: Path, file: str) -> None:
    (saved / file).unlink()
    refused(lambda: load_all(saved), str(saved) if file == "config.json" else str(saved / file))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
def test_a_file_that_was_cut_off_is_named(saved: Path, file: str, keep: float) -> None:
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: int(len(content) * keep)])
    refused(lambda: load_all(saved), str(saved / file), "damaged")


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_is_found(saved: Path, file: str) -> None:
    content = (saved / file).read_bytes()
    rng = np.random.default_rng(1)
    for position in {0, len(content) - 2, *rng.integers(0, len(content), 6).tolist()}:
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(0, 7))
        (saved / file).write_bytes(bytes(flipped))
        if file == "training/manifest.json":
            # White space, or a name that is not checked, may change without harm.
            with contextlib.suppress(InputError):
                load_all(saved)
        else:
            refused(lambda: load_all(saved), str(saved / file), "damaged")


def test_a_file_that_is_a_folder(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors").mkdir()
    refused(lambda: load_all(saved), "model.safetensors", "damaged: Is a directory")


HOSTILE_JSON = [
    "", "{", "null", "[]", "5", '"text"', "{}", "[[[[", "\x00", "1e999", "NaN", '{"files": 5}', '{"files": []}',
    '{"files": {"config.json": 5}}', '{"files": {"config.json": {"size": 1e999, "sha256": 1}}}',
    '{"files": {"config.json": {"size": null, "sha256": null}}}', "[" * 100_000, "9" * 5000, '{"a": 1, "a": 2}',
    '{"files": {}}',
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE_JSON, ids=range(len(HOSTILE_JSON)))
@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "training/manifest.json"])
def test_json_of_any_kind_is_refused(saved: Path, file: str, content: str, manifest: bool) -> None:
    if not manifest and file == "training/manifest.json":
        content += " "
    elif not manifest:
        shutil.rmtree(saved / "training")
    (saved / file).write_text(content)
    refused(lambda: keeping.load(saved), file)


CONFIG_CHANGES: list[dict[str, Any]] = [
    {"hidden_size": "16"},
    {"hidden_size": None},
    {"hidden_size": 16.0},
    {"hidden_size": True},
    {"hidden_size": -16},
    {"hidden_size": 32},
    {"hidden_size": 10**30},
    {"hidden_size": 2**30},
    {"vocab_size": 10**12},
    {"vocab_size": 2**31 - 1},
    {"vocab_size": 6},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": [2]},
    {"num_attention_heads": 2**30},
    {"num_attention_heads": 0},
    {"head_dim": 2**30},
    {"intermediate_size": 2**30},
    {"rms_norm_eps": "small"},
    {"tie_word_embeddings": 1},
    {"model_type": "bert"},
    {"model_type": ["qwen3"]},
    {"model_type": "llama"},
    {"hidden_act": "gelu"},
    {"attention_bias": True},
    {"rope_scaling": {"type": "linear"}},
    {"rope_parameters": {"rope_type": "yarn"}},
    {"tinyllm": 5},
    {"tinyllm": {"hidden_sise": 5}},
    {"tinyllm": {"qk_norm": "yes"}},
    {"tinyllm": {"position_encoding": "sinus"}},
]


@pytest.mark.parametrize("change", CONFIG_CHANGES, ids=str)
def test_a_config_that_does_not_fit_is_refused(saved: Path, change: dict[str, Any]) -> None:
    shutil.rmtree(saved / "training")
    content = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**content, **change}))
    refused(lambda: keeping.load(saved), str(saved))


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("model.norm.weight"),
        lambda arrays: arrays.update({"model.norm.wait": arrays.pop("model.norm.weight")}),
        lambda arrays: arrays.update({"model.norm.weight": np.ones(17, dtype=np.float32)}),
        lambda arrays: arrays.update({"extra": np.ones(1, dtype=np.float32)}),
        lambda arrays: arrays.update({"model.layers.7.input_layernorm.weight": np.ones(16)}),
        lambda arrays: arrays.update({"model.layers.x.input_layernorm.weight": np.ones(16)}),
        lambda arrays: arrays.clear(),
    ],
)
def test_arrays_that_do_not_fit_are_refused(saved: Path, change: Any) -> None:
    shutil.rmtree(saved / "training")
    arrays = safetensors.numpy.load_file(saved / "model.safetensors")
    change(arrays)
    safetensors.numpy.save_file(arrays, saved / "model.safetensors")
    refused(lambda: keeping.load(saved), str(saved))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\xff" * 8,
        b"\x00" * 8,
        (100).to_bytes(8, "little") + b"{}",
        b"\x02" + b"\x00" * 7 + b"[]",
    ],
)
def test_files_that_are_no_safetensors(saved: Path, content: bytes) -> None:
    shutil.rmtree(saved / "training")
    (saved / "model.safetensors").write_bytes(content)
    refused(lambda: keeping.load(saved), "model.safetensors")


def test_a_tokenizer_of_another_model_is_refused(saved: Path) -> None:
    shutil.rmtree(saved / "training")
    (saved / "tokenizer.json").write_text(json.dumps(CharTokenizer("abcdefghij").to_json()))
    refused(lambda: keeping.load(saved), "10 tokens, the model 7")


def test_a_manifest_names_size_and_digest_of_every_other_file(saved: Path) -> None:
    files = json.loads((saved / "training/manifest.json").read_text())["files"]
    assert sorted([*files, "training/manifest.json"]) == sorted(FILES)
    for name, entry in files.items():
        content = (saved / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


# ---- Interrupted saves -------------------------------------------------------------------------


def fail_on_call(original: Any, number: int, error: BaseException) -> Any:
    calls = 0

    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return original(*args, **kwargs)

    return replacement


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
@pytest.mark.parametrize(
    ("function", "number"),
    [("os.fsync", 1), ("os.fsync", 3), ("os.replace", 1), ("builtins.open", 1), ("builtins.open", 4)],
)
def test_a_save_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, error: BaseException
) -> None:
    model = TransformerLM(CONFIG)
    with monkeypatch.context() as patch:
        original = open if function == "builtins.open" else getattr(os, function.removeprefix("os."))
        patch.setattr(function, fail_on_call(original, number, error))
        if error is FULL:
            refused(
                lambda: checkpoint.save(tmp_path / "x", model, TOKENIZER, training_state()),
                str(tmp_path / "x"),
                "No space left on device",
            )
        else:
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path / "x", model, TOKENIZER, training_state())
    assert list(tmp_path.iterdir()) == []
    keeping.load(checkpoint.save(tmp_path / "x", model, TOKENIZER, training_state()))


@pytest.fixture(params=[True, False], ids=["names are exchanged", "two renames"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With a system that exchanges two names in one step, and without."""
    if not request.param:
        monkeypatch.setattr(storage, "exchange", fail_on_call(None, 1, OSError(errno.ENOSYS, "no such call")))
    return bool(request.param)


def test_a_second_save_replaces_the_first(saved: Path, exchanges: bool) -> None:
    model = TransformerLM(replace(CONFIG, num_layers=1), 9)
    checkpoint.save(saved, model, TOKENIZER)
    loaded, _ = keeping.load(saved)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, array in model.state_dict().items():
        assert loaded.state_dict()[name].tobytes() == array.tobytes()
    refused(lambda: checkpoint.load_training(saved), "no training state")  # that of the first is gone
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


@pytest.mark.forks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_second_save_that_fails_leaves_one_of_the_two(saved: Path, operation: str, kind: str) -> None:
    """An error or a kill at each operation: under the name there is the old checkpoint or the new one, whole."""
    seeds = (1, 9)
    both = [TransformerLM(CONFIG, seed).embedding.weight.data.tobytes() for seed in seeds]

    def save_again(number: int) -> None:
        with Faults(operation, number, kind) as faults, contextlib.suppress(InputError):
            checkpoint.save(saved, TransformerLM(CONFIG, 9), TOKENIZER, training_state())
        if faults.calls < number:
            raise ValueError("there is no such call")

    for number in range(1, 20):
        checkpoint.save(saved, TransformerLM(CONFIG, 1), TOKENIZER, training_state())
        code = in_fork(lambda number=number: save_again(number))  # type: ignore[misc]
        load_all(saved)
        assert keeping.load(saved)[0].embedding.weight.data.tobytes() in both
        if code not in (0, KILLED):
            break
        assert (code == KILLED) == kind.startswith("kill")
    assert number == {"write_bytes": 8, "flush_file": 8, "flush_folder": 4, "exchange": 2}.get(operation, 1)


def test_where_names_are_not_exchanged_a_save_that_fails_leaves_the_first(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "exchange", fail_on_call(None, 1, OSError(errno.EINVAL, "not here")))
    with Faults("rename", 2, "error") as faults:
        refused(lambda: checkpoint.save(saved, TransformerLM(CONFIG, 9), TOKENIZER), "cannot be written")
    assert faults.calls == 3
    load_all(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


@pytest.mark.links
def test_a_save_replaces_nothing_but_a_checkpoint(saved: Path) -> None:
    """Notes beside the weights, a run, a folder of something else, a link, a file: all stay."""
    again = lambda path: lambda: checkpoint.save(path, TransformerLM(CONFIG, 9), TOKENIZER)  # noqa: E731
    link = saved.with_name("link")
    link.symlink_to(saved)
    refused(again(link), "link", "give the folder itself")
    (saved / "training" / "notes.md").write_text("dear diary")
    refused(again(saved), str(saved), "training/notes.md", "no part of a checkpoint")
    (saved / "training" / "notes.md").unlink()
    (saved / "elsewhere").symlink_to(saved.parent)
    refused(again(saved), "holds elsewhere")
    refused(again(saved.parent), "holds")
    (saved.parent / "file").write_text("")
    refused(again(saved.parent / "file"), "file", "cannot be written")
    (saved.parent / "empty").mkdir()
    keeping.load(again(saved.parent / "empty")())


def test_a_save_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(lambda: checkpoint.save(tmp_path / "file" / "x", TransformerLM(CONFIG), TOKENIZER), "written")


# ---- Runs: links and pruning -------------------------------------------------------------------


def make_run(run: Path, steps: list[int]) -> list[Path]:
    return [
        checkpoint.save(run / "checkpoints" / f"step-{step:08}", TransformerLM(CONFIG, step), TOKENIZER)
        for step in steps
    ]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(
    params=[pytest.param(True, marks=pytest.mark.links), False], ids=["symbolic links", "folders"]
)
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With symbolic links, and on a file system without them."""
    if not request.param:

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.EPERM, "not permitted")

        monkeypatch.setattr(os, "symlink", refuse)
    return bool(request.param)


def test_links_name_checkpoints(tmp_path: Path, links: bool) -> None:
    first, second = make_run(tmp_path, [1, 2])
    for target in (first, second):
        keeping.link_to(tmp_path, "latest", target)
        found = keeping.read_link(tmp_path, "latest")
        assert found is not None
        assert found.resolve() == target.resolve()
        assert (tmp_path / "latest").is_symlink() == links
    keeping.link_to(tmp_path, "best", first)
    assert keeping.read_link(tmp_path, "other") is None

    def seed_of(model: TransformerLM) -> int:
        bits = model.embedding.weight.data.tobytes()
        return next(s for s in (1, 2) if TransformerLM(CONFIG, s).embedding.weight.data.tobytes() == bits)

    assert seed_of(keeping.load(tmp_path)[0]) == 1  # the best
    assert seed_of(keeping.load(tmp_path / "latest")[0]) == 2
    weights = (tmp_path / "best" / "model.safetensors").read_bytes()
    assert weights == (first / "model.safetensors").read_bytes()  # what transformers opens
    assert seed_of(keeping.load(tmp_path / "checkpoints" / "step-00000002")[0]) == 2
    assert keeping.find(tmp_path).resolve() == second.resolve()  # the latest
    # A run may be moved as a whole.
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    assert seed_of(keeping.load(moved)[0]) == 1
    moved.rename(tmp_path)


def test_find_without_links_takes_the_newest(tmp_path: Path) -> None:
    make_run(tmp_path, [1, 20, 3])
    assert keeping.find(tmp_path).name == "step-00000020"


def test_find_refuses_what_is_no_run(tmp_path: Path) -> None:
    refused(lambda: keeping.find(tmp_path), str(tmp_path), "no checkpoint here")
    refused(lambda: keeping.find(tmp_path / "missing"), "no such folder")
    (tmp_path / "file").write_text("text")
    refused(lambda: keeping.load(tmp_path / "file"), "no checkpoint here")
    refused(lambda: keeping.load_any(tmp_path / "file"), "not a readable safetensors file")


def test_pruning_keeps_best_latest_and_newest(tmp_path: Path, links: bool) -> None:
    made = make_run(tmp_path, [10, 20, 30, 40, 100])
    keeping.link_to(tmp_path, "best", made[1])
    keeping.link_to(tmp_path, "latest", made[3])
    leftover = tmp_path / "checkpoints" / ".step-00000050.123.tmp"
    (leftover / "training").mkdir(parents=True)
    (tmp_path / ".run.toml.123.tmp").write_text("")
    keeping.prune(tmp_path, [made[4], made[0]])
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000040", "step-00000100"]
    assert not (tmp_path / ".run.toml.123.tmp").exists()
    keeping.prune(tmp_path)
    assert names(tmp_path) == ["step-00000020", "step-00000040"]
    keeping.load(tmp_path)


def test_scheduled_checkpoints_are_whole_and_at_multiples(tmp_path: Path) -> None:
    for name in ("step-00000000", "step-00000003", "step-00000006-interrupted", "step-00000006", "step-00000007",
                 "step-00000012-interrupted", "step-x", "step-100000000", ".step-00000009.1.tmp"):  # fmt: skip
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [p.name for p in keeping.checkpoints(tmp_path)] == [
        "step-00000000", "step-00000003", "step-00000006-interrupted", "step-00000006", "step-00000007",
        "step-00000012-interrupted", "step-100000000",
    ]  # fmt: skip
    found = keeping.scheduled(tmp_path, 3)
    assert [keeping.step_of(path) for path in found] == [0, 3, 6]
    assert found[-1] == keeping.folder_of(tmp_path, 6)


def test_remove_after_and_remove_run(tmp_path: Path, links: bool) -> None:
    made = make_run(tmp_path, [1, 2, 3, 4])
    keeping.link_to(tmp_path, "latest", made[1])
    keeping.remove_after(tmp_path, keeping.find(tmp_path))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    (tmp_path / "run.toml").write_text("")
    keeping.remove_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    keeping.remove_run(tmp_path)


def test_a_link_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = make_run(tmp_path, [1])
    monkeypatch.setattr(os, "replace", fail_on_call(os.replace, 1, FULL))
    refused(lambda: keeping.link_to(tmp_path, "latest", made), "latest", "No space left")
