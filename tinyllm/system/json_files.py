"""JSON files of one object: read strictly, and refused in one line when they are damaged."""

import json
from pathlib import Path
from typing import Any

from tinyllm.system.errors import InputError
from tinyllm.system.storage import StrPath
from tinyllm.system.text_files import decode, read_whole
from tinyllm.system.wording import shown

_MOST_ITEMS = 1 << 22
"""What they become takes up to 100 bytes an item, and tokenizers of 256,000 tokens have some 2 million."""


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook for json, whose default keeps the last of two equal keys and tells nobody."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} comes twice in one object")
            seen.add(key)
    return result


def parse_json(content: bytes, where: StrPath) -> dict[str, Any]:
    """The JSON object in the bytes of a file; `where` is what errors call it. Raises InputError as read_json does."""
    text = decode(content, where)
    if sum(map(text.count, ",[{")) > _MOST_ITEMS:
        raise InputError(f"{where}: not usable JSON: more than {_MOST_ITEMS:,} items")
    try:
        parsed = json.loads(text, object_pairs_hook=refuse_duplicates)
    except RecursionError:
        raise InputError(f"{where}: not usable JSON: nested too deeply") from None
    except ValueError as error:  # bad syntax, and an integer of thousands of digits
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{where}: must hold a JSON object {{...}}, got {shown(parsed)}")
    return parsed


def read_json(path: StrPath) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: no such file, unreadable, not UTF-8, bad syntax, a key given twice, nested too
            deeply, too large, or something other than an object at the top.
    """
    return parse_json(read_whole(Path(path)), path)
