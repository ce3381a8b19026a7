"""`tinyllm.save` and `tinyllm.load` of any state: what comes back, what is refused, and that no half file is left."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import tinyllm
from tinyllm import InputError, Tensor, nn, optim
from tinyllm.system import storage


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, Tensor | np.ndarray):
        values = np.array(expected.data) if isinstance(expected, Tensor) else expected
        return (
            isinstance(found, Tensor) and found.dtype == values.dtype and np.array_equal(found.data, values)
        )
    return type(found) is type(expected) and bool(found == expected)


def test_a_state_dict_is_a_plain_file_of_its_names(tmp_path: Path) -> None:
    tinyllm.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net.register_buffer("seen", tinyllm.tensor([True, False]))
    tinyllm.save(net.state_dict(), tmp_path / "net.pt")
    plain = safetensors.numpy.load_file(tmp_path / "net.pt")
    assert set(plain) == {"0.weight", "0.bias", "2.weight", "2.bias", "seen"}
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    other.register_buffer("seen", tinyllm.tensor([False, False]))
    other.load_state_dict(tinyllm.load(tmp_path / "net.pt"))
    for name, array in net.state_dict().items():
        assert array.tobytes() == other.state_dict()[name].tobytes() == plain[name].tobytes()


def test_a_training_loop_goes_on_where_it_was(tmp_path: Path) -> None:
    """Model, optimizer and schedule through one file: the same bits as without."""
    x, y = np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)

    def new() -> tuple[Any, Any, Any]:
        tinyllm.manual_seed(4)
        net = nn.Linear(3, 3)
        optimizer = optim.AdamW(net.parameters(), lr=0.05)
        return net, optimizer, optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)

    def go_on(net: Any, optimizer: Any, schedule: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            ((net(Tensor(x)) - Tensor(y)) ** 2).mean().backward()
            optimizer.step()
            schedule.step()

    whole, first, second = new(), new(), new()
    go_on(*whole, 7)
    go_on(*first, 3)
    tinyllm.save({name: part.state_dict() for name, part in zip("abc", first, strict=True)}, tmp_path / "run")
    saved = tinyllm.load(tmp_path / "run")
    for name, part in zip("abc", second, strict=True):
        part.load_state_dict(saved[name])
    go_on(*second, 4)
    assert second[0].weight.data.tobytes() == whole[0].weight.data.tobytes()
    assert second[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]


STRUCTURES: dict[str, Any] = {
    "nested": {"a": [np.arange(3), {"b": Tensor([1.5, 2.0])}], "c": (1, 2.5, None, "text", True), "d": {}},
    "of a tensor alone": Tensor(np.float64(3.25)),
    "list": [np.zeros((0, 3), dtype=np.float32), np.array(True), np.float32(0.5).item()],
    "numbers alone": {"step": 7, "loss": float("inf")},
    "dots in names": {"a.b": np.ones(2), "a": {"c": np.zeros(1)}},
    "layouts": {"T": np.arange(6.0).reshape(2, 3).T, "big": np.arange(3, dtype=">i4").astype("i4")},
    "words of the file": {"dict": np.ones(1), "tensor": {"dict": 3, "tensor": "x"}},
}


@pytest.mark.parametrize("value", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_what_is_saved_comes_back(value: Any, tmp_path: Path) -> None:
    tinyllm.save(value, tmp_path / "file")
    assert same(tinyllm.load(tmp_path / "file"), value)
    tinyllm.save({"x": np.ones(1)}, tmp_path / "file")  # over it
    assert list(tinyllm.load(tmp_path / "file")) == ["x"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nn.Linear(2, 2), r"is of class Linear: .*; save its state_dict\(\)"),
        ({"a": {"b": {1, 2}}}, "a.b is of class set"),
        ({1: np.ones(1)}, "only text can be a key"),
        ({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, "two arrays would be called 'a.b'"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(
    value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        tinyllm.save(value, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tinyllm.save([np.ones(3)], tmp_path / "file")
    before = (tmp_path / "file").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(InputError, match="file: cannot be written: No space left on device"):
        tinyllm.save([np.zeros(3)], tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == before


@pytest.mark.parametrize(
    "structure", ["{", "5[", '{"tensor": "y"}', '{"tensor": ["x"]}', '{"dict": 3}', "{}", "[" * 100_000]
)
def test_a_damaged_structure_is_refused_in_one_line(structure: str, tmp_path: Path) -> None:
    content = safetensors.numpy.save({"x": np.ones(1)}, {"tinyllm.structure": structure})
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match="file: damaged") as error:
        tinyllm.load(tmp_path / "file")
    assert "\n" not in str(error.value)


def test_pickles_and_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\x80\x04K\x01." + b" " * 30)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        tinyllm.load(tmp_path / "file")
    (tmp_path / "json").write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match="not a readable safetensors file"):
        tinyllm.load(tmp_path / "json")
