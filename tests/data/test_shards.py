"""Token shards: indexed as the array that they are, and what is wrong with a folder is said."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tinyllm import InputError
from tinyllm.data import is_prepared, open_prepared, preparing
from tinyllm.data.preparing import PrepareConfig
from tinyllm.data.shards import TokenShards, npy_header
from tinyllm.tokenizer import BPETokenizer, ByteTokenizer

SHARD = 37
SEPARATOR = "<|endoftext|>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of many small shards, and of a tokenizer whose tokens are the bytes."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    documents = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 60)))) for _ in range(60)]
    (folder / "text.txt").write_text("|".join(documents))
    tokenizer = BPETokenizer({bytes([i]): i for i in range(256)}, [], special_tokens={SEPARATOR: 256})
    tokenizer.save(folder / "tokenizer.json")
    config = PrepareConfig(
        (str(folder / "text.txt"),),
        str(folder / "out"),
        str(folder / "tokenizer.json"),
        separator="|",
        validation_fraction=0.3,
        threads=1,
    )
    preparing.prepare(config, say=lambda line: None, shard_tokens=SHARD)
    return folder / "out"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def joined(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split, as NumPy reads its files."""
    return np.concatenate([np.load(file) for file in sorted(folder.glob(f"{split}-0*.npy"))])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_shards_are_one_array(made: Path, split: str) -> None:
    shards: TokenShards = getattr(open_prepared(made), split)
    tokens = joined(made, split)
    assert len(tokens) > 3 * SHARD
    assert (len(shards), shards.shape, shards.size, shards.ndim) == (
        len(tokens),
        tokens.shape,
        len(tokens),
        1,
    )
    assert shards.dtype == tokens.dtype == np.uint16
    np.testing.assert_array_equal(np.asarray(shards), tokens)
    assert list(shards) == tokens.tolist()
    rng = np.random.default_rng(1)
    for shape in [(), (5,), (3, 4), (2, 3, 4), (0,), (2, 0)]:
        for low in (0, -len(tokens)):
            positions = rng.integers(low, len(tokens), shape)
            found = shards[positions]
            np.testing.assert_array_equal(found, tokens[positions])
            assert found.dtype == tokens.dtype
    for start in range(-3, len(tokens) + 3):
        assert shards[start : start + SHARD + 5].tolist() == tokens[start : start + SHARD + 5].tolist()
        if -3 <= start < len(tokens):
            assert shards[start] == tokens[start]
    for boundary in range(SHARD, len(tokens) - SHARD, SHARD):
        for first, last in ((-3, -1), (-3, 0), (-3, 1), (0, 1), (0, SHARD - 1), (0, SHARD), (-SHARD, SHARD)):
            positions = boundary + np.array([first, last])
            np.testing.assert_array_equal(shards[positions], tokens[positions])
    assert shards[:].tolist() == tokens.tolist()
    assert shards[-5:].tolist() == tokens[-5:].tolist()
    shards[: 2 * SHARD][:] = 7  # a copy
    assert shards[:5].tolist() == tokens[:5].tolist()


def test_positions_that_are_none_are_refused(made: Path) -> None:
    shards = open_prepared(made).train
    for outside in (len(shards), -len(shards) - 1, [0, len(shards)]):
        with pytest.raises(IndexError, match="outside"):
            shards[outside]
    for other in (slice(0, 10, 2), 1.5, np.zeros(len(shards), bool), "a"):
        with pytest.raises(TypeError):
            shards[other]


def test_documents_begin_at_separators(made: Path) -> None:
    for split in ("train", "validation"):
        shards: TokenShards = getattr(open_prepared(made), split)
        np.testing.assert_array_equal(shards.document_starts, np.flatnonzero(joined(made, split) == 256))
        assert shards.document_starts.dtype == np.int64


def test_another_process_opens_its_own_maps(made: Path) -> None:
    shards = open_prepared(made).train
    before = len(pickle.dumps(shards))
    tokens = shards[:]
    assert len(pickle.dumps(shards)) == before
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(shards))[:], tokens)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
@pytest.mark.parametrize("length", [0, 1, 1 << 24, 1 << 40])
def test_headers_are_those_of_numpy(tmp_path: Path, dtype: type, length: int) -> None:
    file = tmp_path / "a.npy"
    np.lib.format.open_memmap(file, "w+", dtype, (min(length, 10),))
    header = npy_header(np.dtype(dtype), min(length, 10))
    assert file.read_bytes()[: len(header)] == header
    assert len(npy_header(np.dtype(dtype), length)) == len(header)


# ---- What is wrong ----


def test_a_damaged_shard_is_found_when_it_is_first_read(folder: Path) -> None:
    digest = open_prepared(folder).train.digest
    file = folder / "train-00001.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    train = open_prepared(folder).train
    assert train.digest == digest  # of the index
    train[:SHARD]
    with pytest.raises(InputError, match=r"train-00001\.npy: damaged.*--overwrite"):
        train[SHARD]
    with pytest.raises(InputError, match=r"train-00001\.npy: damaged"):
        train.check()


def test_a_damaged_list_of_documents_is_found(folder: Path) -> None:
    file = folder / "validation-documents.npy"
    content = bytearray(file.read_bytes())
    content[130] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"validation-documents\.npy: damaged"):
        _ = open_prepared(folder).validation.document_starts


def test_a_missing_or_cut_file_is_found_at_once(folder: Path) -> None:
    file = folder / "train-00002.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-2])
    with pytest.raises(InputError, match=r"train-00002\.npy: \d+ bytes, and \d+ by the index"):
        open_prepared(folder)
    file.unlink()
    with pytest.raises(InputError, match=r"train-00002\.npy: missing"):
        open_prepared(folder)


def test_a_shard_of_another_text_is_found(folder: Path) -> None:
    shutil.copy(folder / "train-00001.npy", folder / "train-00000.npy")
    with pytest.raises(InputError, match=r"train-00000\.npy: damaged, or of another text or tokenizer"):
        open_prepared(folder).train[0]


def test_another_tokenizer_is_found(folder: Path) -> None:
    ByteTokenizer().save(folder / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json: not the tokenizer that made these tokens"):
        open_prepared(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        open_prepared(folder)


def test_a_damaged_index_is_one_line(folder: Path) -> None:
    file = folder / "index.json"
    content = file.read_text()
    file.write_text(content[:-20])
    with pytest.raises(InputError, match="not valid JSON"):
        open_prepared(folder)
    index = json.loads(content)
    for key in ("format", "version", "dtype", "shard_tokens", "tokenizer", "splits"):
        file.write_text(json.dumps({name: value for name, value in index.items() if name != key}))
        with pytest.raises(InputError, match=f"index.json: lacks '{key}'"):
            open_prepared(folder)
        for wrong in (None, [], -1, 0, "other", {}):
            file.write_text(json.dumps({**index, key: wrong}))
            with pytest.raises(InputError):
                open_prepared(folder)
    train = index["splits"]["train"]
    for key in train:
        for wrong in (None, [], -1, "other", {}, [{}], [{"file": "../a.npy"}], 1 << 70):
            index["splits"]["train"] = {**train, key: wrong}
            file.write_text(json.dumps(index))
            if key in ("characters", "bytes") and wrong == 1 << 70:
                continue  # nothing says how many there are
            with pytest.raises(InputError):
                open_prepared(folder)


def test_what_is_no_prepared_folder_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    assert is_prepared(folder)
    assert not is_prepared(tmp_path)
    assert not is_prepared(tmp_path / "none")
    with pytest.raises(InputError, match="no such folder"):
        open_prepared(tmp_path / "none")
    with pytest.raises(InputError, match=r"not prepared: no index\.json"):
        open_prepared(tmp_path)
