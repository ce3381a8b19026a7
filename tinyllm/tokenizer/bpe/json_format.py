"""tokenizer.json of byte-level byte-pair encoding, as the tokenizers library of Hugging Face writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllm.system.errors import InputError
from tinyllm.system.wording import shown
from tinyllm.tokenizer.byte_level import to_bytes, to_characters
from tinyllm.tokenizer.patterns import PATTERNS

# Parts of tokenizer.json that we do not do, with the values that mean that they are not used.
_UNUSED: dict[str, tuple[Any, ...]] = {"normalizer": (None,)}
_UNUSED_IN_MODEL: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}


@dataclass(frozen=True)
class Content:
    """What a tokenizer.json says, with tokens as bytes."""

    vocab: Mapping[bytes, int]
    merges: Sequence[tuple[bytes, bytes]]
    pattern: str
    special_tokens: Mapping[str, int]
    ignore_merges: bool = False


def to_json(content: Content) -> dict[str, Any]:
    """The JSON object of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": content.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    added = [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, id in sorted(content.special_tokens.items(), key=lambda item: item[1])
    ]
    vocabulary = sorted(content.vocab.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": content.ignore_merges,
            "vocab": {to_characters(token): id for token, id in vocabulary},
            "merges": [[to_characters(left), to_characters(right)] for left, right in content.merges],
        },
    }


def from_json(content: Mapping[str, Any]) -> Content:
    """What the JSON object of a tokenizer.json says.

    Raises:
        InputError: it is damaged, or asks for something other than byte-level byte-pair encoding.
    """
    model = content.get("model")
    if not isinstance(model, dict):
        raise InputError(f"model must be an object, got {shown(model)}")
    for where, mapping, unused in (("", content, _UNUSED), ("model.", model, _UNUSED_IN_MODEL)):
        for key, values in unused.items():
            if mapping.get(key) not in values:
                raise InputError(f"{where}{key} is {shown(mapping[key])}, which is not supported")
    ignore_merges = model.get("ignore_merges", False)
    if not isinstance(ignore_merges, bool):
        raise InputError(f"model.ignore_merges must be true or false, got {shown(ignore_merges)}")
    special = _added_tokens(content.get("added_tokens") or [])
    vocab = parse_vocab(model.get("vocab"), special)
    return Content(
        vocab,
        parse_merges(model.get("merges")),
        _pattern(content.get("pre_tokenizer")),
        special,
        ignore_merges,
    )


def _added_tokens(added: Any) -> dict[str, int]:
    special: dict[str, int] = {}
    if not isinstance(added, list):
        raise InputError(f"added_tokens must be a list, got {shown(added)}")
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise InputError(f"added_tokens holds {shown(token)}; each must be an object with a content")
        for key in ("lstrip", "rstrip", "single_word"):
            if token.get(key):
                raise InputError(
                    f"the added token {shown(token['content'])} has {key}, which is not supported"
                )
        if not token.get("special"):
            raise InputError(
                f"the added token {shown(token['content'])} is not special; only special ones are supported"
            )
        if token["content"] in special:
            raise InputError(f"the added token {shown(token['content'])} stands twice")
        special[token["content"]] = token.get("id")  # type: ignore[assignment]
    return special


def parse_vocab(vocab: Any, special: Mapping[str, int]) -> dict[bytes, int]:
    """The ids of the tokens of a vocabulary in GPT-2's alphabet, but for the special ones."""
    if not isinstance(vocab, dict) or not vocab:
        raise InputError(f"the vocabulary must be an object of tokens and ids, got {shown(vocab)}")
    result: dict[bytes, int] = {}
    for token, id in vocab.items():
        if token in special and special[token] == id:
            continue
        try:
            result[to_bytes(token)] = id
        except ValueError:
            raise InputError(
                f"the token {shown(token)} of the vocabulary is not written in GPT-2's characters for bytes"
            ) from None
    return result


def parse_merges(merges: Any) -> list[tuple[bytes, bytes]]:
    """Merges written as "left right" or as [left, right], in GPT-2's alphabet."""
    if not isinstance(merges, list):
        raise InputError(f"merges must be a list, got {shown(merges)}")
    result: list[tuple[bytes, bytes]] = []
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) and t for t in pair):
            raise InputError(f"merge {rank} must be two tokens, got {shown(merge)}")
        try:
            result.append((to_bytes(pair[0]), to_bytes(pair[1])))
        except ValueError:
            raise InputError(
                f"merge {rank}, {shown(merge)}, is not written in GPT-2's characters for bytes"
            ) from None
    return result


def _pattern(pre_tokenizer: Any) -> str:
    """The expression that the pre-tokenizer splits by."""
    if not isinstance(pre_tokenizer, dict):
        raise InputError(f"pre_tokenizer must be an object, got {shown(pre_tokenizer)}")
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise InputError(f"pre_tokenizer is {shown(pre_tokenizer)}; it must be a list of steps")
    *splits, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise InputError(
            f"pre_tokenizer ends with {shown(last)}; supported: ByteLevel without add_prefix_space"
        )
    if not splits and last.get("use_regex", True):
        return PATTERNS["gpt2"]
    if len(splits) == 1 and not last.get("use_regex", True):
        split = splits[0]
        pattern = split.get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        plain = split.get("behavior") == "Isolated" and not split.get("invert")
        if split.get("type") == "Split" and plain and isinstance(expression, str):
            return expression
    raise InputError(
        f"pre_tokenizer is {shown(pre_tokenizer)}; supported: one Split by an expression, isolated, and ByteLevel"
    )
