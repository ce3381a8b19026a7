"""Text from files, and windows: nothing lost, nothing seen twice, every position resumable."""

import bz2
import codecs
import gzip
import io
import lzma
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm.data import (
    IGNORE_INDEX,
    BatchSampler,
    RandomOffsets,
    RandomWindows,
    SequentialWindows,
    SlidingWindows,
    embedded_corpus,
    read_text,
    split_by_position,
)
from tinyllm.system.errors import InputError
from tinyllm.system.text_files import text_of

SAMPLERS: list[type[BatchSampler]] = [RandomWindows, RandomOffsets]
quick = settings(deadline=None, max_examples=60)


# ---- Text --------------------------------------------------------------------------------------


def test_one_file_comes_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "any.name"
    path.write_bytes("\ufeffline\r\n é\U0001f600\ufeff".encode())
    assert read_text(path, newlines="keep") == "line\r\n é\U0001f600\ufeff"
    assert read_text(path) == "line\n é\U0001f600\ufeff"
    assert read_text(str(path)) == read_text([path])


def test_folder_and_files_are_joined_in_order(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "b",
        "a/z.md": "az\n",
        "a/y.PY": "ay",
        "a.rst": "rst",
        "empty.py": "",
        "image.png": "png",
        ".hidden.txt": "hidden",
        ".git/c.txt": "git",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "folder.txt").mkdir()
    assert read_text(tmp_path) == "ay\naz\nrst\nb"
    assert read_text([tmp_path / "image.png", tmp_path / "a"]) == "png\nay\naz\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"text\0", "a NUL byte at byte 4"),
        ("text".encode("utf-16"), "a NUL byte at byte 3"),
        (b"\xef\xbb\xbfte\xffxt", "byte 0xff at byte 5"),
        (b"cut \xf0\x9f", "byte 0xf0 at byte 4"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    good, bad = tmp_path / "a.txt", tmp_path / "bad.txt"
    good.write_text("good")
    bad.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_text([good, bad])
    assert str(error.value).startswith(f"{bad}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


KINDS = {
    "gzip": (gzip.compress(b"text" * 99), "it is a gzip file: unpack it first (gunzip)"),
    "bzip2": (bz2.compress(b"text" * 99), "it is a bzip2 file"),
    "xz": (lzma.compress(b"text" * 99), "it is an xz file"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "it is a PDF: take the text out of it first"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "it is a PNG image"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF", "it is a JPEG image"),
    "UTF-16": ("text".encode("utf-16"), "it is UTF-16: convert it"),
    "UTF-16 of letters alone": (codecs.BOM_UTF16_LE + "\u4e00\u4e01".encode("utf-16-le"), "it is UTF-16"),
    "UTF-16, big endian": (codecs.BOM_UTF16_BE + "text".encode("utf-16-be"), "it is UTF-16"),
    "UTF-32": ("text".encode("utf-32"), "it is UTF-32: convert it"),
    "Parquet": (b"PAR1\x15\x04\x15\0", "it is a Parquet file"),
    "NumPy": (b"\x93NUMPY\x01\0v\0{", "it is an array of NumPy"),
    "SentencePiece": (b"\n\x0e\n\x05<unk>\x15\0\0", "a tokenizer's .model is no text to read"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [8, 1 << 16])
def test_what_is_no_text_is_named_for_what_it_is(kind: str, block: int) -> None:
    content, words = KINDS[kind]
    with pytest.raises(InputError) as error:
        list(text_of(io.BytesIO(content), "x.model" if kind == "SentencePiece" else "x.txt", block))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with zipfile.ZipFile(tmp_path / "zip.txt", "w") as archive:
        archive.write(tmp_path / "a.txt")
    with tarfile.open(tmp_path / "tar.txt", "w") as tar:
        tar.add(tmp_path / "a.txt")
    for name in ("zip", "tar"):
        with pytest.raises(InputError, match=f"it is a {name} archive"):
            read_text(tmp_path / f"{name}.txt")


@pytest.mark.parametrize(
    "text", ["BZh, GIF8, %PDF and PAR1 are magic", "%PDF-1.4 begins a PDF", "RIFF", "PK"]
)
def test_a_text_that_begins_like_another_file_is_a_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_a_byte_order_mark_is_dropped_and_bytes_are_named_wherever_a_block_ends(size: int) -> None:
    content = b"\xef\xbb\xbf\xc3\xa9\xef\xbb\xbfab"
    assert "".join(text_of(io.BytesIO(content), "x", size)) == "\xe9\ufeffab"
    for bad, position in ((content + b"\xff", 10), (b"\xef\xbb\xbf\xff", 3), (b"\xc3\xa9\xf0\x9f", 2)):
        with pytest.raises(InputError, match=f"at byte {position}$|at byte {position};"):
            list(text_of(io.BytesIO(bad), "x", size))


def test_what_a_folder_holds_and_what_was_left_out_is_said(tmp_path: Path) -> None:
    for name in (
        "a.txt",
        "b/c.md",
        "b/d.png",
        "e.PNG",
        "f.png",
        "g.png",
        ".hidden.txt",
        ".git/h.txt",
        "README",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "here").symlink_to(tmp_path / "b")
    said: list[str] = []
    assert read_text(tmp_path, said.append) == "text\ntext"
    assert said == [
        "2 files, 9 characters; left out: 4 .png (d.png, e.PNG, f.png, ...), 2 hidden (.git, .hidden.txt), "
        "1 link to a folder (here), 1 without an ending (README), 1 empty (empty.txt)"
    ]
    said.clear()
    read_text([tmp_path / "a.txt"], said.append)
    assert said == ["1 file, 4 characters"]
    (tmp_path / ".git/h.txt").rename(tmp_path / ".git/.h")
    with pytest.raises(InputError, match=r"no text in this folder: .*; it holds 1 hidden \(\.h\)"):
        read_text(tmp_path / ".git")


class Typed(io.BytesIO):
    """What a terminal gives: at each Ctrl-D a read comes back, and the next would wait for the person."""

    ended = False

    def read(self, size: int | None = -1) -> bytes:
        assert not self.ended, "asked for a second Ctrl-D"
        self.ended = True
        return super().read(size)


def test_what_is_typed_is_asked_for_and_read_to_its_first_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.TextIOWrapper(Typed(b"one\ntwo\n"))
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert read_text("-") == "one\ntwo\n"
    assert capsys.readouterr().err == "standard input: type the text; Ctrl-D on a line of its own ends it\n"


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbft\xc3\xa9xt\r\n")))
    assert read_text("-") == "t\xe9xt\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfet\0")))
    with pytest.raises(InputError, match=r"standard input: .*it is UTF-16"):
        read_text(["-"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(InputError, match="standard input is empty"):
        read_text("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        read_text("-")


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="no text in this folder"):
        read_text(tmp_path)
    with pytest.raises(InputError, match="give a file or a folder"):
        read_text([])


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match=r"a\.txt: cannot be read: Permission denied"):
        read_text(tmp_path / "a.txt")


def test_embedded_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    text = embedded_corpus()
    assert len(text) > 300_000
    assert text == embedded_corpus()
    assert '"assert" statement' in text
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="--data FILE"):
        embedded_corpus()


# ---- Windows that are not random ---------------------------------------------------------------


def test_split_is_by_position_and_copies_nothing() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    train, validation = split_by_position(tokens, 0.25)
    assert train.tolist() == list(range(7))
    assert validation.tolist() == [7, 8, 9]
    assert train.base is tokens
    assert validation.base is tokens
    assert len(split_by_position(tokens, 0.0)[0]) == 10
    for fraction in [1.0, -0.1, float("nan")]:
        with pytest.raises(InputError, match="validation_fraction"):
            split_by_position(tokens, fraction)


@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 20))
@quick
def test_sliding_windows_are_all_that_fit(size: int, context_length: int, stride: int) -> None:
    tokens = np.arange(100, 100 + size, dtype=np.uint16)
    starts = [s for s in range(0, size, stride) if s + context_length + 1 <= size]
    if not starts:
        with pytest.raises(InputError, match="too short"):
            SlidingWindows(tokens, context_length, stride)
        return
    windows = SlidingWindows(tokens, context_length, stride)
    assert len(windows) == len(list(windows)) == len(starts)
    for start, (inputs, targets) in zip(starts, windows, strict=True):
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.tolist() == list(range(100 + start, 100 + start + context_length))
        assert targets.tolist() == [token + 1 for token in inputs]
    assert windows[-1][0][0] == 100 + starts[-1]
    with pytest.raises(IndexError):
        windows[len(starts)]


@given(st.integers(2, 80), st.integers(1, 20), st.integers(1, 6))
@quick
def test_sequential_windows_predict_each_token_once(size: int, context_length: int, batch: int) -> None:
    tokens = np.arange(100, 100 + size, dtype=np.uint16)
    windows = SequentialWindows(tokens, context_length, batch)
    batches = list(windows)
    assert len(windows) == len(batches)
    assert windows.num_windows == sum(len(inputs) for inputs, _ in batches)
    seen = []
    for inputs, targets in batches:
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == context_length
        assert 1 <= len(inputs) <= batch
        real = targets != IGNORE_INDEX
        assert (inputs[real] + 1 == targets[real]).all()
        assert (inputs[~real] == 0).all()
        assert real[:, 0].all()  # no row of filling only
        seen += targets[real].tolist()
    assert all(len(inputs) == batch for inputs, _ in batches[:-1])
    assert seen == list(range(101, 100 + size))
    assert windows.num_targets == len(seen)


# ---- Samplers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_batches_are_shifted_windows(cls: type[BatchSampler], dtype: type) -> None:
    tokens: npt.NDArray[Any] = np.arange(100, dtype=dtype)
    sampler = cls(tokens, context_length=7, batch_size=5, seed=1)
    for _ in range(10):
        inputs, targets = next(sampler)
        assert inputs.shape == targets.shape == (5, 7)
        assert inputs.dtype == targets.dtype == np.int64
        np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(7))
        np.testing.assert_array_equal(targets, inputs + 1)
        inputs[:] = -1  # the caller's own: neither the targets nor the text change
        assert targets.min() > 0
    np.testing.assert_array_equal(tokens, np.arange(100))


@pytest.mark.parametrize("cls", SAMPLERS)
def test_memory_mapped_tokens(cls: type[BatchSampler], tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    plain, from_disk = (cls(source, 8, 4, 0) for source in (tokens, mapped))
    assert np.shares_memory(from_disk.tokens, mapped)
    for step in range(3):
        for left, right in zip(plain.batch(step), from_disk.batch(step), strict=True):
            np.testing.assert_array_equal(left, right)
            assert type(right) is np.ndarray
    assert type(next(iter(SequentialWindows(mapped, 8, 4)))[0]) is np.ndarray
    assert type(SlidingWindows(mapped, 8)[3][1]) is np.ndarray


def starts_of_epochs(sampler: RandomWindows, epochs: int) -> npt.NDArray[np.int64]:
    """(epochs, windows_per_epoch) starts, read from batches, where tokens are positions."""
    steps = -(-epochs * sampler.windows_per_epoch // sampler.batch_size)
    starts = np.concatenate([sampler.batch(step)[0][:, 0] for step in range(steps)])
    starts = starts[: epochs * sampler.windows_per_epoch]
    return starts.reshape(epochs, sampler.windows_per_epoch)


@given(st.integers(2, 90), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**32 - 1))
@quick
def test_an_epoch_shows_each_window_once(size: int, context: int, batch: int, seed: int) -> None:
    if size < context + 1:
        return
    sampler = RandomWindows(np.arange(size), context, batch, seed)
    assert sampler.windows_per_epoch >= 1
    # At most one whole window less than would fit from the start.
    assert sampler.windows_per_epoch >= (size - 1) // context - 1
    for epoch in np.sort(starts_of_epochs(sampler, 3), axis=1):
        assert epoch[0] >= 0
        assert epoch[-1] + context + 1 <= size
        assert (np.diff(epoch) == context).all()


@pytest.mark.parametrize("size", [5, 8, 9, 23, 24, 25])
def test_every_token_is_a_target_in_some_epoch(size: int) -> None:
    sampler = RandomWindows(np.arange(size), 4, 3, 0)
    seen = {int(token) for step in range(200) for token in sampler.batch(step)[1].ravel()}
    assert seen == set(range(1, size))


def test_epochs_differ_in_offset_and_order() -> None:
    # 1009 tokens are 63 whole windows with nothing over: the offset must be free all the same.
    epochs = starts_of_epochs(RandomWindows(np.arange(1009), 16, 7, 3), 20)
    assert len({int(offset) for offset in epochs.min(axis=1)}) > 5
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 20
    other = starts_of_epochs(RandomWindows(np.arange(1009), 16, 7, 4), 20)
    assert (epochs != other).any()


def test_random_offsets_reach_every_start_evenly() -> None:
    sampler = RandomOffsets(np.arange(20), 4, 100, 0)
    counts = Counter(int(s) for step in range(40) for s in sampler.batch(step)[0][:, 0])
    assert sorted(counts) == list(range(16))  # the last window ends at the last token
    assert 180 < min(counts.values()) <= max(counts.values()) < 320  # 250 expected
    assert (sampler.batch(0)[0] != sampler.batch(1)[0]).any()
    assert (sampler.batch(0)[0] != RandomOffsets(np.arange(20), 4, 100, 1).batch(0)[0]).any()


@pytest.mark.parametrize("cls", SAMPLERS)
@given(
    st.integers(20, 90),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(0, 60), min_size=1, max_size=8),
)
@quick
def test_a_batch_depends_on_its_step_alone(
    cls: type[BatchSampler], size: int, context: int, batch: int, steps: list[int]
) -> None:
    """Asked for in any order, a batch is what iterating gives."""
    iterating = cls(np.arange(size), context, batch, 0)
    in_order = [next(iterating) for _ in range(61)]
    jumping = cls(np.arange(size), context, batch, 0)
    for step in steps:
        np.testing.assert_array_equal(jumping.batch(step), in_order[step])
    assert jumping.step == 0


@pytest.mark.parametrize("cls", SAMPLERS)
def test_resume(cls: type[BatchSampler]) -> None:
    tokens = np.arange(100)
    first, second = cls(tokens, 8, 3, 5), cls(tokens, 8, 3, 5)
    for _ in range(17):
        next(first)
    state = first.state_dict()
    assert state["step"] == 17
    second.load_state_dict(state)
    for _ in range(5):
        np.testing.assert_array_equal(next(first), next(second))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed was 1 and is 0"),
        ({"num_tokens": 99}, "num_tokens was 99 and is 100"),
        ({"context_length": 9, "batch_size": 1}, "context_length was 9 and is 8;"),
        ({"sampler": "RandomOffsets"}, "sampler was 'RandomOffsets' and is 'RandomWindows'"),
        ({"seed": None}, "seed was None"),
        ({"step": -1}, "step must be 0 or more, got -1"),
        ({"step": "3"}, "step must be 0 or more, got '3'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ],
)
def test_resume_refuses_another_run(change: dict[str, Any], words: str) -> None:
    sampler = RandomWindows(np.arange(100), 8, 3, 0)
    next(sampler)
    with pytest.raises(InputError, match=words):
        sampler.load_state_dict({**sampler.state_dict(), "step": 7, **change})
    assert sampler.step == 1


# ---- Wrong input -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7])
def test_text_shorter_than_a_window(size: int) -> None:
    tokens = np.arange(size, dtype=np.uint16)
    message = rf"validation text is too short: {size} tokens.* needs 8; lower --context-length"
    with pytest.raises(InputError, match=message):
        SlidingWindows(tokens, 7, 1, name="validation text")
    for cls in SAMPLERS:
        with pytest.raises(InputError, match=message):
            cls(tokens, 7, 2, 0, name="validation text")
        assert cls(np.arange(8), 7, 2, 0).batch(3)[1].tolist() == [list(range(1, 8))] * 2
    if size < 2:
        with pytest.raises(InputError, match="too short"):
            SequentialWindows(tokens, 7, 2)


def test_numbers_out_of_range() -> None:
    tokens = np.arange(100)
    with pytest.raises(InputError, match="stride must be at least 1, got 0; change --stride"):
        SlidingWindows(tokens, 8, 0)
    with pytest.raises(InputError, match="change --context-length"):
        SequentialWindows(tokens, 0, 1)
    for cls in SAMPLERS:
        with pytest.raises(InputError, match="change --batch-size"):
            cls(tokens, 8, -1, 0)
        for seed in [-1, 1 << 32]:
            with pytest.raises(InputError, match="change --seed"):
                cls(tokens, 8, 1, seed)
        with pytest.raises(IndexError, match="-1"):
            cls(tokens, 8, 1, 0).batch(-1)


@pytest.mark.parametrize("tokens", [np.zeros(10), np.zeros((2, 9), int), np.zeros(9, bool), "abc"])
def test_tokens_must_be_integers_in_one_dimension(tokens: Any) -> None:
    with pytest.raises(TypeError, match="tokens must be integers"):
        SlidingWindows(tokens, 2)


@pytest.mark.parametrize("before", [2, 3, 7])
@pytest.mark.parametrize("after", [1, 3, 5, 20])
def test_with_another_batch_size_no_window_of_an_epoch_comes_twice(before: int, after: int) -> None:
    first = RandomWindows(np.arange(400), 4, before, seed=3)
    shown = [row[0] for _ in range(4) for row in next(first)[0].tolist()]
    second = RandomWindows(np.arange(400), 4, after, seed=3)
    second.load_state_dict(first.state_dict())
    left = second.windows_per_epoch - second.step * after
    rest = [row[0] for _ in range(left // after) for row in next(second)[0].tolist()]
    assert len(set(shown + rest)) == len(shown) + len(rest)
    # Fewer than a batch are passed over where the first of the new batches begins.
    assert 0 <= second.windows_per_epoch - left - len(shown) < after


def test_with_another_batch_size_offsets_are_drawn_anew() -> None:
    first = RandomOffsets(np.arange(10**6), 4, 5, seed=3)
    shown = {row[0] for _ in range(6) for row in next(first)[0].tolist()}
    second = RandomOffsets(np.arange(10**6), 4, 10, seed=3)
    second.load_state_dict(first.state_dict())
    assert not shown & {row[0] for _ in range(6) for row in next(second)[0].tolist()}
