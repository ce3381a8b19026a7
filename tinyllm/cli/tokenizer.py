"""`tinyllm tokenizer`: train a tokenizer, use it, and look at what it makes of a text."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tinyllm.cli.flags import add_flags, given_flags
from tinyllm.data import read_text
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError
from tinyllm.system.progress import print_status
from tinyllm.system.settings import check_bounds, field, from_mapping
from tinyllm.system.text_files import STANDARD_INPUT, blocks, counted, find_text_files
from tinyllm.system.wording import shown
from tinyllm.tokenizer import BPETokenizer, Tokenizer, VocabularyWarning, inspection, load_tokenizer
from tinyllm.tokenizer.base import FILE_NAME, file_for
from tinyllm.tokenizer.inspection import TextStatistics
from tinyllm.tokenizer.patterns import PATTERNS, chosen_pattern
from tinyllm.training.checkpoints import keeping

# Black on pale colours, which can be read whatever the terminal's own colours are.
_COLOURS = tuple(f"\033[38;5;16;48;5;{background}m" for background in (153, 157, 229, 217, 183))
_RESET = "\033[0m"

_ROWS = 10  # of the longest tokens
_EXAMPLES = 12  # of tokens that are never used
_MOST_SCRIPTS = 12


@dataclass(frozen=True)
class TrainFlags:
    """The flags of `tinyllm tokenizer train` that have one value."""

    vocab_size: int = field(32768, "tokens in all, the 256 bytes and the special tokens among them")
    out: str = field(FILE_NAME, "the file to write, or a folder for it")
    pattern: str = field(
        "llama3", f"how text is split into pieces: {', '.join(PATTERNS)}, or a regular expression"
    )
    min_frequency: int = field(2, "pairs that occur less often do not become tokens")
    workers: int = field(0, "processes; 0: one for each core", at_least=0)
    newlines: Literal["lf", "keep"] = field(
        "lf", "lf: line ends of the text become \\n, whatever they are; keep: they stay"
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class InspectFlags:
    """The flags of `tinyllm tokenizer inspect`."""

    show: int = field(0, "show so many characters of the text, with its tokens apart", at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `tokenizer` and its four commands to the commands of a parser; they are parsers of its class."""
    parser = commands.add_parser("tokenizer", help="train, use and inspect a tokenizer", allow_abbrev=False)
    ours = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = ours.add_parser(
        "train",
        help="learn byte-pair encoding from text",
        description="Learn byte-pair encoding from text, and write a tokenizer.json.",
        allow_abbrev=False,
    )
    train.add_argument("files", nargs="+", metavar="FILE", help="a text, or a folder of texts")
    add_flags(train, TrainFlags)
    train.add_argument(
        "--special",
        nargs="+",
        action="extend",
        default=[],
        metavar="TOKEN",
        help="special tokens, such as '<|endoftext|>'; they stand for themselves and are never split",
    )
    train.add_argument("--overwrite", action="store_true", help="replace the file if it exists already")
    train.set_defaults(command=train_command, parser=train)

    encode = ours.add_parser("encode", help="print the token ids of a text", allow_abbrev=False)
    _add_path(encode)
    encode.add_argument("text", nargs="?", metavar="TEXT", help="the text (default: standard input)")
    encode.add_argument("--file", metavar="FILE", help="read the text from a file")
    encode.add_argument(
        "--special",
        action=argparse.BooleanOptionalAction,
        help="special tokens in the text become their ids, or are text; without the flag such a text is refused",
    )
    encode.set_defaults(command=encode_command, parser=encode)

    decode = ours.add_parser("decode", help="print the text of token ids", allow_abbrev=False)
    _add_path(decode)
    decode.add_argument("ids", nargs="*", metavar="ID", help="the ids (default: standard input)")
    decode.set_defaults(command=decode_command, parser=decode)

    inspect = ours.add_parser(
        "inspect",
        help="show what a tokenizer is, and what it makes of a text",
        description="Show what a tokenizer is and its longest tokens; with a text, how long the tokens of that text "
        "are, in which scripts, and which tokens it never uses.",
        allow_abbrev=False,
    )
    _add_path(inspect)
    inspect.add_argument("files", nargs="*", metavar="FILE", help="a text, or a folder of texts")
    add_flags(inspect, InspectFlags)
    inspect.set_defaults(command=inspect_command, parser=inspect)


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="a tokenizer.json, a folder with one, a .model, a run or a checkpoint"
    )


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, of a folder that has one, of a checkpoint or of a run's best checkpoint.

    Raises:
        InputError: there is none, or it is damaged or not supported.
    """
    if path.is_file() or (path / FILE_NAME).exists():
        return load_tokenizer(path)
    try:
        folder = keeping.find(path, ("best", "latest"))
    except InputError:
        what = "no tokenizer.json and no checkpoint here" if path.exists() else "no such file or folder"
        raise InputError(f"{path}: {what}; give a tokenizer.json, a run or a checkpoint") from None
    return load_tokenizer(folder)


# ---- train -------------------------------------------------------------------------------------


def train_command(args: argparse.Namespace) -> None:
    """`tinyllm tokenizer train`."""
    flags = from_mapping(TrainFlags, given_flags(args, TrainFlags))
    chosen_pattern(flags.pattern)
    for token in args.special:
        _require_text(token, "--special")
    target = _free_target(flags.out, args.overwrite)
    paths = [Path(name) for name in args.files]
    _require_readable(paths)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VocabularyWarning)  # said below, with the flag to use
            tokenizer = BPETokenizer.train(
                paths,
                flags.vocab_size,
                flags.pattern,
                args.special,
                flags.min_frequency,
                flags.workers or physical_cores(),
                progress=True,
                newlines=flags.newlines,
            )
    except KeyboardInterrupt:
        print_status("stopped; nothing is written")
        raise
    tokenizer.save(target)
    print(f"{target}: {tokenizer.vocab_size:,} tokens{_why_fewer(tokenizer, flags)}")


def _why_fewer(tokenizer: Tokenizer, flags: TrainFlags) -> str:
    if tokenizer.vocab_size == flags.vocab_size:
        return ""
    asked = f", not {flags.vocab_size:,}"
    if flags.min_frequency == 1:
        return f"{asked}: no pair of tokens is left to join; more text gives more"
    return (
        f"{asked}: no pair of tokens is left that occurs {flags.min_frequency} times; more text or a lower "
        "--min-frequency gives more"
    )


def _free_target(out: str, overwrite: bool) -> Path:
    """The file that Tokenizer.save writes for `out`, once it is sure that it may and can be written."""
    target = file_for(out)
    if target.is_dir():
        raise InputError(f"{target} is a folder; give another --out")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists already; --overwrite replaces it, --out FILE writes elsewhere")
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        # Nothing stays behind, not even an empty folder when training is stopped.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written: {error.strerror or error}; give another --out"
        ) from None
    return target


def _require_readable(paths: Sequence[Path]) -> None:
    """Find a missing, empty or binary file now and not after the others have been read.

    Raises InputError that names the file.
    """
    left_out: dict[str, list[Path]] = {}
    for path in paths:
        for file in find_text_files(path, left_out):
            if file == STANDARD_INPUT:
                continue  # it can be read once
            if next(blocks(file, 1 << 12), None) is None and not path.is_dir():
                raise InputError(f"{path}: the file is empty; give a file with text")
    if left_out:
        print_status(f"left out: {counted(left_out)}")


def _require_text(argument: str, name: str) -> None:
    """Raise InputError for an argument that was not UTF-8; Python gives its bytes as halves of UTF-16 pairs."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} is {shown(argument)}, which is not UTF-8; give UTF-8 text") from None


# ---- encode and decode -------------------------------------------------------------------------


def encode_command(args: argparse.Namespace) -> None:
    """`tinyllm tokenizer encode`."""
    if args.text is not None and args.file is not None:
        raise InputError("got TEXT and --file; give one of them")
    tokenizer = open_tokenizer(Path(args.path))
    if args.text is not None:
        text = args.text
        _require_text(text, "TEXT")
    else:
        text = "".join(blocks(Path(args.file))) if args.file is not None else _standard_input()
    for token in tokenizer.special_tokens if args.special is None else ():
        if token in text:
            raise InputError(
                f"the text holds the special token {token!r} at position {text.index(token)}; --special encodes "
                "it as one, --no-special as text"
            )
    print(*tokenizer.encode_document(text, bool(args.special)).tolist())


def decode_command(args: argparse.Namespace) -> None:
    """`tinyllm tokenizer decode`."""
    tokenizer = open_tokenizer(Path(args.path))
    written = " ".join(args.ids) if args.ids else _standard_input()
    text = tokenizer.decode(_ids(written, tokenizer.vocab_size))
    # What goes into a file or a pipe is the text and no more.
    end = "\n" if sys.stdout.isatty() and not text.endswith("\n") else ""
    print(text, end=end)


def _ids(written: str, vocab_size: int) -> list[int]:
    """The ids in `written`, a printed list too; raises InputError for the first that is none."""
    written = written.strip()
    if written[:1] + written[-1:] in ("[]", "()"):
        written = written[1:-1]
    ids = []
    for position, word in enumerate(filter(None, re.split(r"[\s,]+", written))):
        if not re.fullmatch(r"-?[0-9]{1,20}", word):
            raise InputError(
                f"the id at position {position} is {shown(word)}; ids are integers, with white space or commas between"
            )
        if not 0 <= int(word) < vocab_size:
            raise InputError(
                f"the id {word} at position {position} is not in the vocabulary, whose ids are 0 to {vocab_size - 1}; "
                "is it the tokenizer of this model?"
            )
        ids.append(int(word))
    return ids


def _standard_input() -> str:
    """All of standard input, read as a file is; raises InputError if it is no text, or closed."""
    return "".join(blocks(STANDARD_INPUT))


# ---- inspect -----------------------------------------------------------------------------------


def inspect_command(args: argparse.Namespace) -> None:
    """`tinyllm tokenizer inspect`."""
    flags = from_mapping(InspectFlags, given_flags(args, InspectFlags))
    if flags.show and not args.files:
        raise InputError("--show needs a text; give a file after PATH")
    tokenizer = open_tokenizer(Path(args.path))
    text = read_text(args.files, newlines="keep") if args.files else ""
    ids = tokenizer.encode_document(text)
    strings = inspection.token_strings(tokenizer)
    print(*_description_lines(args.path, tokenizer), sep="\n")
    if not args.files:
        longest = inspection.longest_first(strings, list(range(len(strings))))[:_ROWS]
        rows = [
            ("characters", "id", "token"),
            *((*_length_and_id(strings, id), _name(strings[id])) for id in longest),
        ]
        print("", "longest tokens", *_table(rows, left=(2,)), sep="\n")
        return
    result = inspection.statistics(tokenizer, text, ids)
    print("", *_text_lines(result), sep="\n")
    if result.scripts:
        print("", *_script_lines(result), sep="\n")
    print("", *_use_lines(result, strings), sep="\n")
    if flags.show:
        colours = _COLOURS if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ()
        print("", _marked(inspection.segments(tokenizer, ids, flags.show), colours), sep="\n")


def _description_lines(path: str, tokenizer: Tokenizer) -> Iterator[str]:
    description = inspection.describe(tokenizer)
    merges = f", {description.merges:,} merges" if description.merges else ""
    yield f"{path}: {description.kind}, {description.vocab_size:,} tokens{merges}"
    if description.pattern is not None:
        yield f"pattern: {description.pattern}"
    special = ", ".join(f"{token} ({id})" for token, id in description.special_tokens.items())
    if special or description.pattern is not None:
        yield f"special tokens: {special or 'none'}"


def _text_lines(result: TextStatistics) -> Iterator[str]:
    yield (
        f"{result.characters:,} characters, {result.bytes:,} bytes and {result.words:,} words in "
        f"{result.tokens:,} tokens"
    )
    fertility = f", {result.fertility:.2f} tokens per word" if result.words else ""
    yield (
        f"{result.characters_per_token:.2f} characters per token, {result.bytes_per_token:.2f} bytes per token"
        f"{fertility}"
    )


def _script_lines(result: TextStatistics) -> list[str]:
    rows = [("script", "characters", "share", "bytes per token", "tokens per character")]
    for script in result.scripts[:_MOST_SCRIPTS]:
        share = f"{script.characters / result.characters:.1%}"
        per_token, per_character = f"{script.bytes_per_token:.2f}", f"{script.tokens_per_character:.3f}"
        rows.append((script.name, f"{script.characters:,}", share, per_token, per_character))
    left_out = len(result.scripts) - _MOST_SCRIPTS
    return _table(rows, left=(0,)) + ([f"and {left_out} more"] if left_out > 0 else [])


def _use_lines(result: TextStatistics, strings: Sequence[bytes]) -> list[str]:
    """The longest of the tokens that are used, and some that are not."""
    used = result.used
    rows = [("characters", "id", "times", "token")]
    for id in inspection.longest_first(list(strings), used)[:_ROWS]:
        rows.append((*_length_and_id(strings, id), f"{result.counts[id]:,}", _name(strings[id])))
    tokens = {id for id, string in enumerate(strings) if string}
    unused = sorted(tokens - set(used))
    lines = ["longest tokens used", *_table(rows, left=(3,)), ""]
    lines.append(f"never used: {len(unused):,} of {len(tokens):,} tokens ({len(unused) / len(tokens):.1%})")
    # Single bytes are there for texts of any kind, so that one text does without most of them says little.
    unused.sort(key=lambda id: len(strings[id]) == 1)
    if unused:
        lines.append("such as " + "  ".join(_name(strings[id]) for id in unused[:_EXAMPLES]))
    return lines


def _length_and_id(strings: Sequence[bytes], id: int) -> tuple[str, str]:
    return f"{len(strings[id].decode('utf-8', 'replace')):,}", str(id)


def _name(token: bytes) -> str:
    """A token on one line, as Python writes it: as text, or as bytes where it ends inside a character."""
    try:
        return shown(token.decode())
    except UnicodeDecodeError:
        return shown(token)


def _table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """The rows as lines with aligned columns, numbers to the right and the columns in `left` to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _marked(segments: Iterable[str], colours: Sequence[str]) -> str:
    """The text of the tokens, each on the next of the colours; without colours, with | between them."""
    marked = []
    for i, segment in enumerate(segments):
        lines = "".join(map(_visible, segment)).split("\n")
        if colours:
            # The colour ends before the line does, or some terminals colour the rest of the line too.
            lines = [f"{colours[i % len(colours)]}{line}{_RESET}" if line else "" for line in lines]
        marked.append("\n".join(lines))
    return ("" if colours else "|").join(marked)


def _visible(character: str) -> str:
    """A character as it can be shown; line ends are marked, and what would move the cursor is escaped."""
    if character == "\n":
        return "↵\n"
    return character if character.isprintable() else character.encode("unicode_escape").decode()
