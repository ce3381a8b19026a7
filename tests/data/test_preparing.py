"""Preparing text: what is written is what encode_document gives, whatever stops it and however many do it."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.faults import KILLED, Faults, in_fork

from tinyllm import InputError
from tinyllm.data import preparing, survey
from tinyllm.data.documents import Document, documents_of
from tinyllm.data.preparing import Outcome, PrepareConfig
from tinyllm.data.shards import Prepared, open_prepared
from tinyllm.system.errors import NoSpaceError
from tinyllm.system.lock import FolderLock
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer

SEPARATOR = "<|endoftext|>"
BETWEEN = "\n%%\n"
LETTERS = "abcdefgh  \n\n'éß中😀12"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tasks and documents so small that a few kB of text have many."""
    monkeypatch.setattr(preparing, "_TASK_BYTES", 700)
    monkeypatch.setattr(
        PrepareConfig,
        "reading",
        property(lambda self: preparing.Reading(self.field, self.newlines, self.separator, 150)),
    )
    monkeypatch.chdir(tmp_path)


def random_documents(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    longest = [400 if i % 10 == 0 else 60 for i in range(count)]
    texts = ["".join(rng.choice(list(LETTERS), rng.integers(1, most))) for most in longest]
    texts[3] = f"a{SEPARATOR}b"
    return texts


def write(path: Path, documents: list[str]) -> Path:
    path.write_text(BETWEEN.join(documents), encoding="utf-8")
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    write(folder / "a.txt", random_documents(80))
    write(folder / "b.txt", random_documents(80, 1))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    BPETokenizer.train(random_documents(50, 2), 300, special_tokens=[SEPARATOR]).save(path)
    return path


def config_of(text: Path, tokenizer: Path | None, out: str = "out", **others: Any) -> PrepareConfig:
    settings: dict[str, Any] = {"validation_fraction": 0.2, "threads": 1, "separator": BETWEEN, **others}
    return PrepareConfig((str(text),), out, str(tokenizer) if tokenizer else None, **settings)


def prepare(config: PrepareConfig, said: list[str] | None = None, **others: Any) -> Outcome:
    settings = {"shard_tokens": 500, "flush_seconds": 0.0, **others}
    return preparing.prepare(config, say=[].append if said is None else said.append, **settings)


def files(out: str | Path) -> dict[str, bytes]:
    """What is in a folder, without the lock."""
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.name != ".lock"}


def is_for_validation(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def expected(
    pieces: list[Document], tokenizer: Tokenizer, fraction: float, special_tokens: bool = True
) -> dict[str, tuple[list[int], list[int]]]:
    """The tokens and document starts of each split, by the rules, one piece at a time."""
    splits: dict[str, tuple[list[int], list[int]]] = {"train": ([], []), "validation": ([], [])}
    before = ""
    for piece in pieces:
        name = "validation" if is_for_validation(piece.text, fraction) else "train"
        tokens, starts = splits[name]
        if piece.begins or before != name:
            starts.append(len(tokens))
            if SEPARATOR in tokenizer.special_tokens:
                tokens.append(tokenizer.special_tokens[SEPARATOR])
        tokens += tokenizer.encode_document(piece.text, special_tokens).tolist()
        before = name
    return splits


def pieces_of(config: PrepareConfig) -> list[Document]:
    paths = sorted(Path(config.data[0]).iterdir())
    return [piece for path in paths for piece in documents_of(path, config.reading)]


def require_equal(prepared: Prepared, splits: dict[str, tuple[list[int], list[int]]]) -> None:
    for name, (tokens, starts) in splits.items():
        shards = getattr(prepared, name)
        assert shards[:].tolist() == tokens
        assert shards.document_starts.tolist() == starts


@pytest.mark.parametrize("special_tokens", [True, False])
def test_tokens_are_those_of_each_document(text: Path, tokenizer: Path, special_tokens: bool) -> None:
    config = config_of(text, tokenizer, special_tokens=special_tokens)
    prepared = prepare(config).prepared
    pieces = pieces_of(config)
    assert sum(not piece.begins for piece in pieces) > 10
    require_equal(prepared, expected(pieces, load_tokenizer(tokenizer), 0.2, special_tokens))
    assert len(prepared.validation.document_starts) > 10
    for shards, validation in ((prepared.train, False), (prepared.validation, True)):
        texts = [piece.text for piece in pieces if is_for_validation(piece.text, 0.2) == validation]
        assert shards.characters == sum(map(len, texts))
        assert shards.bytes == sum(len(text.encode()) for text in texts)
    assert {len(np.load(file)) for file in sorted(Path("out").glob("train-0*.npy"))[:-1]} == {500}
    assert not Path("out/unfinished.json").exists()


def test_a_tokenizer_without_a_separator(text: Path, tmp_path: Path) -> None:
    characters = CharTokenizer.train("".join(random_documents(300)) + "".join(random_documents(80, 1)))
    characters.save(tmp_path / "characters.json")
    config = config_of(text, tmp_path / "characters.json")
    require_equal(prepare(config).prepared, expected(pieces_of(config), characters, 0.2))


def test_ids_of_more_than_16_bits(text: Path, tmp_path: Path) -> None:
    vocab = {bytes([i]): i for i in range(256)} | {b"ab": 66_000, b" c": 66_001}
    large = BPETokenizer(vocab, [(b"a", b"b"), (b" ", b"c")], special_tokens={SEPARATOR: 66_002})
    large.save(tmp_path / "large.json")
    config = config_of(text, tmp_path / "large.json")
    prepared = prepare(config).prepared
    assert prepared.train.dtype == np.uint32
    assert {66_000, 66_001, 66_002} < {*prepared.train}
    require_equal(prepared, expected(pieces_of(config), large, 0.2))


def test_text_that_the_tokenizer_lacks_is_an_error_that_names_the_file(text: Path, tmp_path: Path) -> None:
    CharTokenizer("abc").save(tmp_path / "characters.json")
    with pytest.raises(InputError, match=r"a\.txt.*vocabulary"):
        prepare(config_of(text, tmp_path / "characters.json"))


def test_any_number_of_processes_writes_the_same(text: Path, tokenizer: Path) -> None:
    prepare(config_of(text, tokenizer, "one"))
    prepare(config_of(text, tokenizer, "several", threads=2))
    assert files("one") == files("several")


def test_the_split_does_not_change_when_text_is_added(text: Path, tokenizer: Path) -> None:
    def split_of(out: str) -> tuple[set[str], set[str]]:
        prepared = prepare(config_of(text, tokenizer, out)).prepared
        documents = []
        for shards in (prepared.train, prepared.validation):
            parts = np.split(shards[:], shards.document_starts[1:])
            documents.append({prepared.tokenizer.decode(part) for part in parts})
        return documents[0], documents[1]

    train, validation = split_of("before")
    write(text / "0.txt", random_documents(50, 5))
    with open(text / "b.txt", "a", encoding="utf-8") as file:
        file.write(BETWEEN + BETWEEN.join(random_documents(50, 6)))
    more_train, more_validation = split_of("after")
    assert train < more_train
    assert validation < more_validation
    assert 0.1 < len(validation) / len(train | validation) < 0.35


def test_the_fraction_zero_gives_no_validation(text: Path, tokenizer: Path) -> None:
    prepared = prepare(config_of(text, tokenizer, validation_fraction=0.0)).prepared
    assert (len(prepared.validation), prepared.validation[:].shape) == (0, (0,))
    assert len(prepared.validation.document_starts) == 0


@pytest.mark.parametrize(("fraction", "empty"), [(1e-9, "validation"), (0.999999999, "train")])
def test_an_empty_split_is_refused_and_leaves_nothing(
    text: Path, tokenizer: Path, fraction: float, empty: str
) -> None:
    with pytest.raises(InputError, match=f"none is for {empty} with --validation-fraction"):
        prepare(config_of(text, tokenizer, validation_fraction=fraction))
    assert not files("out")
    prepare(config_of(text, tokenizer))


def test_duplicates_are_dropped_as_whole_documents(text: Path, tokenizer: Path) -> None:
    documents = random_documents(80)
    once = prepare(config_of(text, tokenizer, "once", drop_duplicates=True))
    number = len(documents) - len({*documents}) + len(random_documents(80, 1))
    number -= len({*random_documents(80, 1)} - {*documents})
    assert once.dropped == number
    # The same documents again, short ones and long ones; and a long one with another end, which is another one.
    long = next(document for document in documents if len(document) > 300)
    write(text / "c.txt", [*documents, long + "x"])
    said: list[str] = []
    again = prepare(config_of(text, tokenizer, "again", drop_duplicates=True), said)
    assert again.dropped == once.dropped + len(documents)
    assert f"{again.dropped} documents came before and are dropped" in said
    for path in [text / "c.txt"]:
        write(path, [long + "x"])
    prepare(config_of(text, tokenizer, "alone", drop_duplicates=True))
    assert {name: content for name, content in files("again").items() if name.endswith(".npy")} == {
        name: content for name, content in files("alone").items() if name.endswith(".npy")
    }


# ---- Vocabularies ----


def test_a_vocabulary_is_learned_of_a_bounded_sample(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(text, None, vocab_size=280)
    learned = prepare(config).prepared.tokenizer
    training = [piece.text for piece in pieces_of(config) if not is_for_validation(piece.text, 0.2)]
    by_hand = BPETokenizer.train(
        [text + "\n" if "." in text else text for text in training], 280, special_tokens=[SEPARATOR]
    )
    assert learned.to_json() == by_hand.to_json()

    monkeypatch.setattr(survey, "MOST_SAMPLED", 2000)
    read: list[int] = []
    found = survey.survey(sorted(text.iterdir()), config.reading, False, True, 0.2, read.append)
    assert 1500 < sum(map(len, found.sample)) <= 2000
    assert {content.decode() for content in found.sample} < {*training}
    backwards = survey.survey(sorted(text.iterdir())[::-1], config.reading, False, True, 0.2, read.append)
    assert sorted(backwards.sample) == sorted(found.sample)


# ---- Stopped and continued ----


def stopped_and_continued(
    config: PrepareConfig, operation: str, number: int, kind: str, again: Callable[[], object]
) -> bool:
    """Whether a fault stopped the work, which is then done again."""
    if kind.startswith("kill"):

        def work() -> None:
            with Faults(operation, number, kind):
                prepare(config)

        code = in_fork(work)
        assert code in (0, KILLED)
        stopped = code == KILLED
    else:
        with Faults(operation, number, kind):
            try:
                prepare(config)
                return False
            except InputError as raised:
                error = raised
        assert "the same command goes on" in str(error)
        assert isinstance(error, NoSpaceError) == (kind == "no space")
        stopped = True
    if stopped:
        again()
    return stopped


@pytest.mark.forks
@pytest.mark.parametrize("kind", ["kill", "kill afterwards", "no space", "error"])
@pytest.mark.parametrize("operation", ["write_bytes", "flush_file", "rename"])
def test_stopped_anywhere_it_goes_on_to_the_same_files(
    text: Path, tokenizer: Path, operation: str, kind: str
) -> None:
    (text / "b.txt").unlink()
    write(text / "a.txt", random_documents(40))
    undisturbed = config_of(text, tokenizer, "undisturbed")
    with Faults(operation, 0, "error") as counting:
        prepare(undisturbed)
    assert counting.calls > 7
    rng = np.random.default_rng(len(operation + kind))
    numbers = {1, 2, counting.calls - 1, counting.calls, *rng.integers(4, counting.calls, 2).tolist()}
    for number in sorted(numbers):
        out = f"out{number}"
        config = config_of(text, tokenizer, out)

        def again(config: PrepareConfig = config, out: str = out) -> None:
            unfinished = Path(out, "unfinished.json").exists()
            if unfinished or not Path(out, "index.json").exists():  # the last kill may come after the end
                prepare(config)

        assert stopped_and_continued(config, operation, number, kind, again)
        found, wanted = files(out), files("undisturbed")
        assert found == wanted, number


def test_stopped_again_and_again_with_a_vocabulary_to_learn_and_duplicates(text: Path) -> None:
    settings: dict[str, Any] = {"vocab_size": 280, "drop_duplicates": True}
    prepare(config_of(text, None, "undisturbed", **settings))
    stops = 0
    for number in itertools.count(4, 3):
        try:
            with Faults("write_bytes", number, "error"):
                prepare(
                    config_of(
                        text,
                        None,
                        "out",
                        threads=1 + stops % 2 * (stops < 4),
                        **settings,
                    )
                )
            break
        except InputError:
            stops += 1
    assert stops > 3
    assert files("out") == files("undisturbed")


def test_a_killed_process_with_helpers_goes_on(text: Path, tokenizer: Path) -> None:
    """The real command, with helpers, killed from outside at a random moment."""
    prepare(config_of(text, tokenizer, "undisturbed"))
    program = (
        "import sys, os; from tinyllm.data import preparing; from tinyllm.data.preparing import PrepareConfig; "
        "preparing._TASK_BYTES = 700; from tinyllm.data.shard_writer import SplitWriter as W; old = W.append; n = [0]\n"
        "def append(self, *a):\n    n[0] += 1\n    if n[0] == 15: os.kill(os.getpid(), 9)\n    old(self, *a)\n"
        "W.append = append\n"
        "PrepareConfig.reading = property(lambda s: preparing.Reading(s.field, s.newlines, s.separator, 150))\n"
        f"preparing.prepare(PrepareConfig(({str(text)!r},), 'out', {str(tokenizer)!r}, separator={BETWEEN!r}, "
        "validation_fraction=0.2, threads=2), shard_tokens=500, flush_seconds=0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not Path("out/index.json").exists()
    with pytest.raises(InputError, match=r"out: unfinished; go on with: .*prepare --data"):
        open_prepared("out")
    said: list[str] = []
    prepare(config_of(text, tokenizer), said)
    assert any("goes on after" in line for line in said)
    assert files("out") == files("undisturbed")


def interrupted(config: PrepareConfig) -> None:
    """Stop the work in the middle."""
    with Faults("write_bytes", 30, "error"), pytest.raises(InputError):
        prepare(config)


def test_other_settings_or_files_are_told_apart(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    interrupted(config_of(text, tokenizer))
    before = files("out")
    others: dict[str, PrepareConfig] = {
        "validation_fraction=0.2, not 0.1": config_of(text, tokenizer, validation_fraction=0.1),
        "newlines='lf', not 'keep'": config_of(text, tokenizer, newlines="keep"),
        "drop_duplicates=False, not True": config_of(text, tokenizer, drop_duplicates=True),
        "vocab_size=None, not 300": config_of(text, None, vocab_size=300),
    }
    for different, config in others.items():
        with pytest.raises(
            InputError, match=f"holds unfinished work, and it was begun with {different}; .*--overwrite"
        ):
            prepare(config)
    CharTokenizer("abc").save(tmp_path / "other.json")
    with pytest.raises(InputError, match="begun with another tokenizer"):
        prepare(config_of(text, tmp_path / "other.json"))
    write(text / "c.txt", ["more"])
    with pytest.raises(InputError, match=r"c\.txt was not among its files"):
        prepare(config_of(text, tokenizer))
    (text / "c.txt").rename(tmp_path / "c.txt")
    (text / "b.txt").rename(tmp_path / "b.txt")
    with pytest.raises(InputError, match=r"b\.txt is no longer among its files"):
        prepare(config_of(text, tokenizer))
    (tmp_path / "b.txt").rename(text / "b.txt")
    status = (text / "b.txt").stat()
    os.utime(text / "b.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(InputError, match=r"b\.txt has changed since"):
        prepare(config_of(text, tokenizer))
    assert files("out") == before
    prepare(config_of(text, tokenizer), overwrite=True)
    prepare(config_of(text, tokenizer, "undisturbed"))
    assert files("out") == files("undisturbed")


def test_a_mistake_does_not_block_the_next_try(text: Path, tokenizer: Path) -> None:
    """Where neither tokens nor a vocabulary are there to lose, the folder takes another text or other settings."""
    bad = text / "0bad.txt"
    bad.write_bytes(b"text\xff")
    for learned in (tokenizer, None):
        with pytest.raises(InputError, match=r"bad\.txt: not UTF-8"):
            prepare(config_of(text, learned, vocab_size=None if learned else 280))
    bad.unlink()
    prepare(config_of(text, tokenizer))
    prepare(config_of(text, tokenizer, "undisturbed"))
    assert files("out") == files("undisturbed")


def test_a_vocabulary_that_was_learned_is_work(text: Path) -> None:
    with Faults("write_bytes", 4, "error"), pytest.raises(InputError):
        prepare(config_of(text, None, vocab_size=280))
    state = json.loads(Path("out/unfinished.json").read_text())
    assert state["tokenizer"]
    assert not state["tasks"]
    with pytest.raises(InputError, match="begun with vocab_size=280, not 281"):
        prepare(config_of(text, None, vocab_size=281))


def test_text_that_is_all_for_validation_leaves_none_to_learn_from(text: Path) -> None:
    with pytest.raises(InputError, match=r"none is for train with .* or a smaller fraction"):
        prepare(config_of(text, None, vocab_size=280, validation_fraction=0.999999999))
    assert not files("out")


def test_an_index_of_something_else_is_no_prepared_text(text: Path, tokenizer: Path) -> None:
    Path("out").mkdir()
    Path("out/index.json").write_text("{}")
    with pytest.raises(InputError, match=r"out holds something else \('index\.json'\)"):
        prepare(config_of(text, tokenizer), overwrite=True)
    assert files("out") == {"index.json": b"{}"}


def test_work_begun_with_overwrite_goes_on_with_overwrite(text: Path, tokenizer: Path) -> None:
    interrupted(config_of(text, tokenizer))
    tasks = json.loads(Path("out/unfinished.json").read_text())["tasks"]
    assert tasks > 0
    said: list[str] = []
    prepare(config_of(text, tokenizer), said, overwrite=True)
    assert any("goes on after" in line for line in said)


def test_a_folder_that_holds_something_else_is_refused(text: Path, tokenizer: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"out holds something else \('thesis.txt'\)"):
            prepare(config_of(text, tokenizer), overwrite=overwrite)
    assert files("out") == {"thesis.txt": b"mine"}


def test_a_finished_folder_is_refused_or_replaced(text: Path, tokenizer: Path) -> None:
    prepare(config_of(text, tokenizer))
    before = files("out")
    with pytest.raises(InputError, match="holds prepared text already; --overwrite replaces it"):
        prepare(config_of(text, tokenizer))
    assert files("out") == before
    (text / "b.txt").unlink()
    prepare(config_of(text, tokenizer), overwrite=True)
    prepare(config_of(text, tokenizer, "undisturbed"))
    assert files("out") == files("undisturbed")


def test_shards_that_were_cut_behind_its_back_are_refused(text: Path, tokenizer: Path) -> None:
    interrupted(config_of(text, tokenizer))
    state = json.loads(Path("out/unfinished.json").read_text())
    assert state["splits"]["train"]["tokens"] > 500
    os.truncate(sorted(Path("out").glob("train-0*.npy"))[0], 200)
    with pytest.raises(InputError, match=r"train-00000\.npy"):
        prepare(config_of(text, tokenizer))
    Path("out/tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not the one that this was begun with"):
        prepare(config_of(text, tokenizer))
    damaged = ["{", "[]", "", *(json.dumps(state | {key: -1}) for key in state)]
    damaged += [json.dumps({name: value for name, value in state.items() if name != key}) for key in state]
    damaged.append(json.dumps(state | {"tasks": state["tasks"] + 1}))
    for content in damaged:
        Path("out/unfinished.json").write_text(content)
        with pytest.raises(InputError, match="unfinished work, and it cannot be read"):
            prepare(config_of(text, tokenizer))


def test_a_file_that_changes_between_is_refused(
    text: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = preparing._tasks

    def tasks(*arguments: Any) -> Any:
        yield from original(*arguments)
        with open(text / "a.txt", "a") as file:
            file.write("more")

    monkeypatch.setattr(preparing, "_tasks", tasks)
    with pytest.raises(InputError, match="changed while they were read"):
        prepare(config_of(text, tokenizer))
    assert not Path("out/index.json").exists()


@pytest.mark.forks
def test_two_at_once_are_refused(text: Path, tokenizer: Path) -> None:
    Path("out").mkdir()
    lock = FolderLock(Path("out"))
    lock.hold()
    try:
        with pytest.raises(InputError, match=f"process {os.getpid()} prepares a text in this folder"):
            prepare(config_of(text, tokenizer))
    finally:
        lock.release()


@pytest.mark.parametrize(
    "settings", [{}, {"vocab_size": 300, "tokenizer": "a"}, {"threads": -1, "vocab_size": 300}]
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        PrepareConfig(("a",), "out", **settings)
