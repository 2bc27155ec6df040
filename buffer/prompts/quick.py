"""What an index needs of a row, at some 3 µs a row: its hashes, without building a `Prompt`.

Only rows that leave no doubt are read here. For every other one `quick_identity` returns None, and the caller reads it
with `buffer.prompts.rows` and `buffer.prompts.dataset`, which know all that JSON may hold and can word what is wrong
with it. Where both read a row, they agree; a test asserts it over rows of every shape.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Any

import orjson

Identity = tuple[bytes, bytes, str | None]
"""``(uid, question, id)``: 8 bytes of BLAKE2b over what is asked and its label, 8 over what is asked, the row's id."""

_KEYS = frozenset(("messages", "text", "label", "tags", "metadata", "id"))
_KEY = re.compile(rb'"[ \t\r\n]*:')
_MAX_DEPTH = 8
_PLAIN = (str, int, bool)
"""Values that orjson writes as `json.dumps` does. Floats are not among them: 1e16 and 1e+16."""


def quick_identity(line: bytes, *, require_label: bool) -> Identity | None:
    """The identity of a row of JSON, or None where the row is not plain enough to be sure of it."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if type(row) is not dict or not row.keys() <= _KEYS or None in row.values():
        return None
    label = row.get("label")
    if label is None and require_label:
        return None
    asked = _asked(row)
    if asked is None or not _is_labelled_plainly(label) or not _has_valid_extras(row):
        return None
    if rb'\\"' in line or len(_KEY.findall(line.replace(rb"\"", b""))) != _num_keys(row, depth=0):
        return None  # a key twice, of which orjson keeps the last; or a quote that may or may not end a string
    uid = _digest(asked, label)
    return uid, uid if label is None else _digest(asked, None), str(row["id"]) if "id" in row else None


def _asked(row: dict[str, Any]) -> Any:
    text, messages = row.get("text"), row.get("messages")
    if messages is None:
        return text if type(text) is str and text and not text.isspace() else None
    if text is not None or type(messages) is not list or not messages:
        return None
    for message in messages:
        if type(message) is not dict or not message.get("role") or not message.get("content"):
            return None
        if not all(type(value) is str for value in message.values()):
            return None
    return messages


def _is_labelled_plainly(label: Any) -> bool:
    if type(label) is list:
        return all(type(value) in _PLAIN for value in label)
    return label is None or type(label) in _PLAIN


def _has_valid_extras(row: dict[str, Any]) -> bool:
    if "tags" in row and not (type(row["tags"]) is list and all(type(tag) is str for tag in row["tags"])):
        return False
    if "metadata" in row and type(row["metadata"]) is not dict:
        return False
    return "id" not in row or (type(row["id"]) in (str, int) and row["id"] != "")


def _num_keys(value: Any, *, depth: int) -> int:
    """Keys in all objects of a value; negative where it is nested deeper than is worth following."""
    if type(value) is dict:
        count = len(value)
        value = value.values()
    elif type(value) is list:
        count = 0
    else:
        return 0
    if depth == _MAX_DEPTH:
        return -(2**40)
    for inner in value:
        if type(inner) is dict or type(inner) is list:
            count += _num_keys(inner, depth=depth + 1)
    return count


def _digest(asked: Any, label: Any) -> bytes:
    """As `buffer.prompts.dataset.prompt_uid`."""
    return blake2b(orjson.dumps([asked, label], option=orjson.OPT_SORT_KEYS), digest_size=8).digest()
