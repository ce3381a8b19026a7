"""Learning merges: the same ones as the textbook's way, from the same counts, however the text is given."""

import multiprocessing
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm.system.errors import InputError
from tinyllm.tokenizer import BPETokenizer
from tinyllm.tokenizer import pretokenize as pretokenize_module
from tinyllm.tokenizer.bpe import reference
from tinyllm.tokenizer.bpe import sources as sources_module
from tinyllm.tokenizer.bpe.training import PieceCounts, count_pieces, learn_merges
from tinyllm.tokenizer.patterns import PATTERNS, Pattern

pytestmark = pytest.mark.filterwarnings("ignore::tinyllm.tokenizer.VocabularyWarning")

MANY = 4 * settings().max_examples
WHOLE = r"[\s\S]+"  # a text is one piece

small_texts = st.one_of(
    st.text("a", max_size=40),
    st.text("ab", max_size=40),
    st.text("ab ", max_size=60),
    st.text("aé中😀", max_size=30),
    st.text("ab\0", max_size=40),
    st.lists(st.sampled_from(["aaaa", "abab", "ab", "ba", " ", "é", "aaaaaaaaaaaaaaaaab"]), max_size=15).map(
        "".join
    ),
)
any_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
names = st.sampled_from(sorted(PATTERNS))


def pieces_of(texts: Sequence[str], expression: str, special: Sequence[str] = ()) -> Counter[bytes]:
    """The pieces of the texts and their numbers, by the expression itself."""
    counts: Counter[bytes] = Counter()
    for text in texts:
        for part in regex.split("|".join(map(regex.escape, special)), text) if special else [text]:
            counts.update(piece.encode() for piece in regex.findall(expression, part))
    return counts


def counted(texts: Sequence[str], pattern: Pattern, workers: int = 1) -> PieceCounts:
    return count_pieces([[text] for text in texts if text], pattern, workers)


def merges_of(tokenizer: BPETokenizer) -> list[tuple[int, int]]:
    return [(tokenizer.vocab[left], tokenizer.vocab[right]) for left, right in tokenizer.merges]


# ---- Counting ----------------------------------------------------------------------------------


@given(texts=st.lists(st.one_of(small_texts, any_texts), max_size=4), name=names)
@settings(max_examples=MANY)
@example(["\0" * 8, "\0" * 8 + "a", "\0" * 16, "\0" * 17], "gpt2")
@example(["\0", "\0\0", "a\0", "a", "a" * 8, "a" * 8 + "\0"], "llama3")
@example(["a" * 15, "a" * 16, "a" * 17, "b" * 100, "b" * 100, "a" * 7, "a" * 8, "a" * 9], "o200k")
@example(["中" * 5, "中" * 6, "\U0010ffff" * 4, "\U0010ffff" * 2], "gpt4")
def test_counts(texts: list[str], name: str) -> None:
    assert counted(texts, Pattern(name)).as_dict() == pieces_of(texts, PATTERNS[name])


def test_counts_that_are_added_up_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PieceCounts, "_PENDING", 3)
    texts = [f"word{i % 7} anotherword{i % 5} andaverylongwordthatistoolong{i % 3}" for i in range(50)]
    assert counted(texts, Pattern("gpt2")).as_dict() == pieces_of(texts, PATTERNS["gpt2"])


def test_counts_of_many_distinct_pieces() -> None:
    """So many that pieces of all lengths meet in one sort."""
    texts = [
        " ".join(f"{'xyz' * (i % 6)}{i * 7919 % 100_003:x}".translate(LETTERS) for i in range(20_000))
    ] * 2
    counts = counted(texts, Pattern("llama3")).as_dict()
    assert len(counts) > 19_000
    assert counts == pieces_of(texts, PATTERNS["llama3"])


LETTERS = str.maketrans("0123456789", "qrstuvwxyz")  # numbers would be cut after three digits


# ---- Merges ------------------------------------------------------------------------------------


@given(
    texts=st.lists(small_texts, min_size=1, max_size=4),
    name=st.sampled_from(["llama3", "gpt2", WHOLE]),
    num_merges=st.integers(0, 40),
    min_frequency=st.integers(1, 4),
)
@settings(max_examples=3 * MANY)
@example(["aaaa"], WHOLE, 5, 1)
@example(["a" * 31, "a" * 17, "ba" * 9], WHOLE, 20, 1)
@example(["abcabc", "ab", "bc", "abc"], WHOLE, 10, 1)
def test_merges_equal_the_reference(texts: list[str], name: str, num_merges: int, min_frequency: int) -> None:
    pattern = Pattern(name)
    pieces = pieces_of(texts, pattern.expression)
    expected = reference.train(pieces, num_merges, min_frequency)
    assert learn_merges(counted(texts, pattern), num_merges, min_frequency) == expected


@given(texts=st.lists(st.one_of(small_texts, any_texts), min_size=1, max_size=6), name=names)
@settings(max_examples=MANY)
def test_train_equals_the_reference(texts: list[str], name: str) -> None:
    """Each text is split by itself: white space at its end is not followed by the next text."""
    pieces = pieces_of(texts, PATTERNS[name])
    if not pieces:
        with pytest.raises(InputError, match="no text to learn from"):
            BPETokenizer.train(texts, 280, name)
        return
    tokenizer = BPETokenizer.train(texts, 280, name, min_frequency=1)
    assert merges_of(tokenizer) == reference.train(pieces, 24)
    tokens = [bytes([i]) for i in range(256)]
    for left, right in merges_of(tokenizer):
        tokens.append(tokens[left] + tokens[right])
    assert tokenizer.vocab == {token: id for id, token in enumerate(tokens)}


@pytest.mark.parametrize("name", PATTERNS)
def test_many_merges_of_a_longer_text(name: str) -> None:
    text = Path(sources_module.__file__).read_text(encoding="utf-8")[:6000] + "Straße 中文 中文字 Ωμέγα " * 3
    tokenizer = BPETokenizer.train([text], 256 + 150, name)
    assert len(tokenizer.merges) == 150
    assert merges_of(tokenizer) == reference.train(pieces_of([text], PATTERNS[name]), 150, 2)


def test_more_than_16_bits_of_ids() -> None:
    """Another integer type is used for ids from 32,768 and 65,536 on; what is learned is the same."""
    texts = ["abab cdcd abcd " * 3]
    pieces = counted(texts, Pattern("gpt2"))
    expected = reference.train(pieces.as_dict(), 100)
    for num_merges in (32_511, 32_512, 32_513, 65_279, 65_280, 65_281):
        assert learn_merges(pieces, num_merges, 1) == expected


def test_large_counts() -> None:
    """Counts beyond 32 bits, as in a text of terabytes."""
    pieces = PieceCounts()
    pieces.others.update({b"ab": 1 << 33, b"bc": (1 << 33) + 1, b"abc": 1, b"xy": 1 << 31, b"yz": 1 << 31})
    assert learn_merges(pieces, 6, 1) == reference.train(pieces.as_dict(), 6)
    pieces.others[b"xy"] += 1 << 33
    assert learn_merges(pieces, 1, 1) == [(ord("x"), ord("y"))]


def test_worked_example() -> None:
    """Sennrich et al.'s words: low 5 times, lower 2 times, newest 6 times, widest 3 times.

    Each word is a piece of its own, since the pattern keeps a text whole. Pairs and their counts at first:
        es 9 and st 9 (newest, widest); we 8 (lower 2, newest 6); lo 7 and ow 7 (low, lower); ne 6 and ew 6 (newest);
        wi, id, de 3 (widest); er 2 (lower).
    1. es and st tie at 9; e (101) is the smaller left token: es = 256. Of it: (es, t) 9, (w, es) 6, (d, es) 3.
       we falls to 2, that of lower; st and de are gone.
    2. est = (es, t) 9 = 257. Of it: (w, est) 6, (d, est) 3.
    3. lo and ow tie at 7; l (108) is before o (111): lo = 258. Of it: (lo, w) 7.
    4. low = (lo, w) 7 = 259. Of it: (low, e) 2. we is gone.
    5. At 6: ew (101, 119), ne (110, 101), (w, est) (119, 257). The smallest left token is e: ew = 260.
       Of it: (n, ew) 6, (ew, est) 6. ne and (w, est) are gone.
    6. (n, ew) 6 before (ew, est) 6, since n (110) is below 260: new = 261. Of it: (new, est) 6.
    7. newest = (new, est) 6 = 262.
    8. At 3: de is gone; id (105, 100), (d, est) (100, 257), wi (119, 105). d is the smallest: dest = 263.
    9. At 3: (i, dest) (105, 263), wi (119, 105): idest = 264.
    10. widest = (w, idest) 3 = 265.
    11. At 2: er (101, 114), (low, e) (259, 101): er = 266. 12. lower = (low, er) = 267.
    """
    texts = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    tokenizer = BPETokenizer.train(texts, 300, WHOLE)
    assert tokenizer.merges == [
        (b"e", b"s"),
        (b"es", b"t"),
        (b"l", b"o"),
        (b"lo", b"w"),
        (b"e", b"w"),
        (b"n", b"ew"),
        (b"new", b"est"),
        (b"d", b"est"),
        (b"i", b"dest"),
        (b"w", b"idest"),
        (b"e", b"r"),
        (b"low", b"er"),
    ]
    assert tokenizer.vocab_size == 268
    assert BPETokenizer.train(texts, 300, WHOLE, min_frequency=7).merges == tokenizer.merges[:4]
    assert BPETokenizer.train(texts, 261, WHOLE).merges == tokenizer.merges[:5]


def test_a_run_of_equal_tokens() -> None:
    """aaaaa: aa is at four places, and merging from the left makes aa aa a.

    Then (aa, a) and (aa, aa) occur once each, and (aa, a) = (256, 97) has the smaller right token.
    """
    assert BPETokenizer.train(["aaaaa"], 300, WHOLE, min_frequency=1).merges == [
        (b"a", b"a"),
        (b"aa", b"a"),
        (b"aa", b"aaa"),
    ]


# ---- How the text is given ---------------------------------------------------------------------

TEXTS = [
    "The quick brown fox, the lazy dog. ",
    "don't  do\n\nthat; I'LL see 12345 things\n",
    "中文字 中文 Ωμέγα é e\u0301 \U0001f469\u200d\U0001f4bb ",
    "the the the fox fox dog\n \n",
]


@given(st.permutations(TEXTS))
def test_order_of_texts_does_not_matter(texts: list[str]) -> None:
    assert BPETokenizer.train(texts, 300).merges == BPETokenizer.train(TEXTS, 300).merges


@pytest.mark.parametrize("name", ["gpt4", "o200k", WHOLE])
def test_processes_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    texts = [text * n for n in range(1, 8) for text in TEXTS]
    expected = BPETokenizer.train(texts, 330, name)
    assert BPETokenizer.train(texts, 330, name, workers=2).merges == expected.merges
    for size in (1, 7, 100):
        monkeypatch.setattr(sources_module, "CHUNK", size)
        monkeypatch.setattr(pretokenize_module, "CHUNK", size)
        monkeypatch.setattr(pretokenize_module.chunks, "__defaults__", (size,))
        assert BPETokenizer.train(texts, 330, name).merges == expected.merges
    assert BPETokenizer.train(texts, 330, name, workers=2).merges == expected.merges


def test_files_folders_and_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(TEXTS) * 20
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    half = text.index("the the", len(text) // 2)
    (folder / "below" / "a.md").write_text(text[:half], encoding="utf-8", newline="")
    (folder / "z.txt").write_text(text[half:], encoding="utf-8", newline="")
    (folder / "not.dat").write_bytes(b"\xff\x00")
    (folder / ".hidden.txt").write_bytes(b"\xff\x00")
    whole = tmp_path / "whole"
    whole.write_text(text, encoding="utf-8", newline="")
    for size in (1 << 22, 1, 2, 5, 64):
        monkeypatch.setattr(
            sources_module, "blocks", lambda file, newlines, size=size: BLOCKS(file, size, newlines)
        )
        for name in ("gpt2", "gpt4", "o200k"):
            expected = BPETokenizer.train([text], 320, name).merges
            assert BPETokenizer.train([whole], 320, name, newlines="keep").merges == expected
            in_parts = BPETokenizer.train([text[:half], text[half:]], 320, name).merges
            assert BPETokenizer.train([folder], 320, name, newlines="keep").merges == in_parts


BLOCKS = sources_module.blocks


# ---- Special tokens ----------------------------------------------------------------------------


@given(
    parts=st.lists(
        st.sampled_from(["ab", "a", " ", "<|x|>", "<|x", "|>", "<|a b|>", "<|a", " b|>"]), max_size=15
    ),
    name=names,
)
@settings(max_examples=MANY)
@example(["hi", " ", "<|a b|>"], "llama3")
@example(["a", "<|x|>", "a"], "gpt2")
def test_nothing_is_learned_from_special_tokens(parts: list[str], name: str) -> None:
    text, special = "x" + "".join(parts), ["<|x|>", "<|a b|>"]
    tokenizer = BPETokenizer.train([text], 300, name, special, min_frequency=1)
    assert merges_of(tokenizer) == reference.train(pieces_of([text], PATTERNS[name], special), 42)
    first = 256 + len(tokenizer.merges)
    assert tokenizer.special_tokens == {"<|x|>": first, "<|a b|>": first + 1}
    assert tokenizer.vocab_size == first + 2


def test_longest_special_token_is_taken() -> None:
    tokenizer = BPETokenizer.train(["x<a<ab<abx"], 300, WHOLE, ["<a", "<ab"], min_frequency=1)
    assert tokenizer.merges == []


def test_special_token_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.txt"
    text = "word <|a b|> word\n<|a b|>" * 5
    file.write_text(text, encoding="utf-8", newline="")
    expected = reference.train(pieces_of([text], PATTERNS["llama3"], ["<|a b|>"]), 10, 2)
    for size in (1, 3, 9, 16, 1000):
        monkeypatch.setattr(
            sources_module, "blocks", lambda file, newlines, size=size: BLOCKS(file, size, newlines)
        )
        tokenizer = BPETokenizer.train([file], 267, special_tokens=["<|a b|>"])
        assert merges_of(tokenizer) == expected


# ---- Errors, progress, interrupts --------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "arguments", "words"),
    [
        ([], {}, "no text to learn from"),
        ([""], {}, "no text to learn from"),
        (["", ""], {"workers": 2}, "no text to learn from"),
        (["<s><s>"], {"special_tokens": ["<s>"]}, "no text to learn from"),
        (b"text", {}, "texts must be a list of texts, got b'text'; a text is a str, a file or"),
        (None, {}, "texts must be a list of texts, got None; a text is a str"),
        (Path("no such file"), {}, "no such file"),
        (["a"], {"vocab_size": 255}, "vocab_size=255; it must be at least 256"),
        (["a"], {"vocab_size": -1}, "vocab_size=-1"),
        (["a"], {"vocab_size": 256, "special_tokens": ["<s>"]}, "at least 257"),
        (["a"], {"min_frequency": 0}, "min_frequency=0"),
        (["a"], {"special_tokens": ["<s>", "<s>"]}, "must be different"),
        (["a"], {"special_tokens": [""]}, "not empty"),
        (["a"], {"special_tokens": ["\ud800"]}, "special token|U\\+D800"),
        (["a"], {"pattern": "("}, "the pattern '\\('"),
        ([b"a"], {}, "texts holds b'a', a bytes"),
        ([None], {}, "texts holds None"),
        (["a\ud800"], {}, r"U\+D800 at position 1"),
        (["a " * 2000 + "\ud800 b"], {}, r"U\+D800 at position 4000"),
        ([Path("no such file")], {}, "no such file"),
    ],
)
def test_wrong_input(texts: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        BPETokenizer.train(texts, **{"vocab_size": 300, **arguments})
    assert "\n" not in str(error.value)


def test_wrong_files(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 x")
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name, words in [
        ("latin.txt", "not UTF-8: byte 0xe9 at byte 3"),
        ("zero.txt", "a NUL byte at byte 1"),
        ("empty.txt", "no text to learn from"),
        ("folder", "no text in this folder"),
        ("missing", "no such file"),
    ]:
        with pytest.raises(InputError, match=words):
            BPETokenizer.train([tmp_path / name], 300)
        with pytest.raises(InputError, match=words):
            BPETokenizer.train([tmp_path / name], 300, workers=2)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """Each merge and each character is told once; nothing goes to standard output."""
    told: list[int] = []
    pieces = count_pieces([["ab ab"], ["abc"]], Pattern("gpt2"), progress=told.append)
    assert sum(told) == 8
    told.clear()
    assert len(learn_merges(pieces, 3, 1, told.append)) == len(told) == 3
    assert set(told) == {1}
    BPETokenizer.train(["ab ab"], 300, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError, ZeroDivisionError])
def test_interrupt_passes_through(workers: int, error: type[BaseException]) -> None:
    """It comes out as it went in, and neither process nor thread outlives it."""

    def texts() -> Iterator[str]:
        for i in range(20):
            yield f"some text {i} " * 20_000
        raise error("stop")

    before = threading.active_count()
    with pytest.raises(error, match="stop"):
        BPETokenizer.train(texts(), 300, workers=workers)
    assert not multiprocessing.active_children()
    assert threading.active_count() == before


def test_no_process_is_left(tmp_path: Path) -> None:
    """Also where the work is done before the helper has started; asked of a fresh interpreter."""
    script = tmp_path / "script.py"
    script.write_text(
        "import gc, os\n"
        "from tinyllm.tokenizer import BPETokenizer\n"
        "def interrupted(n):\n"
        "    for i in range(n):\n"
        "        yield 'some text ' * 30000\n"
        "    raise KeyboardInterrupt\n"
        "for n in (0, 1, 40):\n"
        "    try:\n"
        "        BPETokenizer.train(interrupted(n), 260, workers=2)\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        "BPETokenizer.train(['hello hello'], 260, workers=2)\n"
        "gc.collect()\n"
        "try:\n"
        "    os.waitpid(-1, os.WNOHANG)\n"
        "except ChildProcessError:\n"
        "    print('none left')\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("none left\n", "", 0)
