"""Prompt files become `Prompt`s, and files for `slime sft` become `SftRow`s.

A row has ``messages`` or ``text``, and optionally ``label``, ``tags``, ``metadata`` and ``id``; other keys are
refused, because a misspelt one would otherwise be ignored. A key whose value is null counts as absent.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from buffer.prompts.rows import Row, describe, read_rows
from slime.errors import DataError
from slime.types import Message, Prompt

KEYS = ("messages", "text", "label", "tags", "metadata", "id")
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SftRow:
    """One example of supervised fine-tuning."""

    prompt: Prompt
    response: str


def prompt_uid(*, messages: Sequence[Message] = (), text: str = "", label: Any = None) -> str:
    """The uid of a problem: 16 hex digits of a BLAKE2b hash over what is asked and what is right.

    Tags and metadata do not enter: they describe the problem and may be edited in the middle of a project.

    Raises:
        TypeError, ValueError: a value is not JSON (a date, NaN), or holds half a surrogate pair.
    """
    asked: Any = [dict(message) for message in messages] if messages else text
    content = _CANONICAL.encode([asked, label])
    return hashlib.blake2b(content.encode("utf-8"), digest_size=8).hexdigest()


def to_prompt(row: Row, *, where: str, require_label: bool = True) -> Prompt:
    """The prompt of one row that stands at `where`.

    Raises:
        DataError: the row is not a prompt.
    """
    prompt = _prompt(row, where=where, keys=KEYS)
    if require_label and prompt.label is None:
        raise DataError(
            f"{where}: got no 'label'. Add the right answer to the row, or set data.require_label = false "
            "for a reward that needs none."
        )
    return prompt


def not_json(error: Exception, *, where: str) -> DataError:
    """What to raise where the row at `where` holds a date, NaN or the like."""
    return DataError(
        f"{where}: got a value that JSON does not have ({error}). "
        "Write it as a plain string or number, or remove the row."
    )


def repeated_id(name: Any, *, where: str, first: str) -> DataError:
    """What to raise where the row at `where` has the id of the one at `first`."""
    return DataError(
        f"{where}: got the id {name!r}, which is also the id of {first}. "
        "Give each row an id of its own, or leave 'id' out: slime tells problems apart by content."
    )


def read_sft_rows(path: Path) -> list[SftRow]:
    """Read a file for `slime sft`: prompts with their ``response``. Equal rows are kept: a file may weigh its examples.

    Raises:
        DataError: a row is not a prompt, has no response, or two rows have the same ``id``.
    """
    rows = []
    places: dict[str, str] = {}
    for where, row in read_rows(path):
        prompt = _prompt(row, where=where, keys=(*KEYS, "response"))
        response = row.get("response")
        if not isinstance(response, str) or not response:
            _refuse(where, "response", response, right="a string that is not empty")
        if (name := row.get("id")) is not None and (first := places.setdefault(str(name), where)) != where:
            raise repeated_id(name, where=where, first=first)
        rows.append(SftRow(prompt=prompt, response=response))
    return rows


def _prompt(row: Row, *, where: str, keys: Sequence[str]) -> Prompt:
    row = {key: value for key, value in row.items() if value is not None}
    _check_keys(row, where=where, keys=keys)
    messages = _messages(row["messages"], where=where) if "messages" in row else ()
    text = row.get("text", "")
    if "text" in row and (not isinstance(text, str) or not text.strip()):
        _refuse(where, "text", text, right="a string that is not empty")
    return Prompt(
        uid=_uid(where, messages=messages, text=text, label=row.get("label")),
        messages=messages,
        text=text,
        label=row.get("label"),
        tags=_tags(row.get("tags", []), where=where),
        metadata=_metadata(row, where=where),
    )


def _check_keys(row: Row, *, where: str, keys: Sequence[str]) -> None:
    for key in row.keys() - set(keys):
        near = difflib.get_close_matches(key, keys, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"A row has {', '.join(map(repr, keys))}."
        raise DataError(f"{where}: got the unknown key {key!r}. {hint} Data of your own belongs under 'metadata'.")
    if ("messages" in row) == ("text" in row):
        got = "both 'messages' and 'text'" if "text" in row else "neither 'messages' nor 'text'"
        raise DataError(
            f"{where}: got {got}. Give 'messages' for a chat template, or 'text' to be tokenised as it stands."
        )


def _messages(value: Any, *, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        _refuse(where, "messages", value, right='a list such as [{"role": "user", "content": "1 + 2 ="}]')
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            _refuse(where, f"messages[{i}]", message, right='an object such as {"role": "user", "content": "1 + 2 ="}')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str) or not message[key]:
                _refuse(where, f"messages[{i}].{key}", message.get(key), right="a string that is not empty")
    return tuple(value)


def _tags(value: Any, *, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        _refuse(where, "tags", value, right='a list of strings such as ["algebra"]')
    return tuple(value)


def _metadata(row: Row, *, where: str) -> Mapping[str, Any]:
    """The row's ``metadata``, with its ``id`` added, so that rewards and sample files show it."""
    metadata, name = row.get("metadata", {}), row.get("id")
    if not isinstance(metadata, dict):
        _refuse(where, "metadata", metadata, right='an object such as {"source": "textbook"}')
    if name is None:
        return metadata
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        _refuse(where, "id", name, right="a string or a whole number")
    return {**metadata, "id": name}


def _uid(where: str, *, messages: Sequence[Message], text: str, label: Any) -> str:
    try:
        return prompt_uid(messages=messages, text=text, label=label)
    except (TypeError, ValueError) as error:
        raise not_json(error, where=where) from None


def _refuse(where: str, key: str, value: Any, *, right: str) -> NoReturn:
    shown = describe(value) if value is None or isinstance(value, list | dict) else f"{describe(value)}, {value!r:.60}"
    raise DataError(f"{where}: '{key}' must be {right}; got {shown}. Correct the row, or remove it.")
