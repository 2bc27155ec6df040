"""The quick reader of rows and the careful one agree on every row that both read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from buffer.prompts.dataset import prompt_uid, to_prompt
from buffer.prompts.quick import Identity, quick_identity
from buffer.prompts.rows import parse_line
from slime.errors import DataError

TEXT = st.text(min_size=1, max_size=12) | st.text('ab\\":{ ', min_size=1, max_size=6)
"""The second: what looks like keys."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
MESSAGE = st.fixed_dictionaries({"role": TEXT, "content": TEXT}, optional={"name": TEXT, ": {": TEXT})
VALID = st.builds(
    lambda asked, rest: asked | rest,
    st.fixed_dictionaries({"text": TEXT})
    | st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=1, max_size=3)}),
    st.fixed_dictionaries(
        {"label": TEXT | st.integers(-(2**70), 2**70) | st.booleans() | st.lists(TEXT, max_size=2)},
        optional={
            "tags": st.lists(TEXT, max_size=2),
            "metadata": st.dictionaries(TEXT, JSON, max_size=2),
            "id": TEXT | st.integers(),
        },
    ),
)
KEYS = st.sampled_from(["text", "messages", "label", "tags", "metadata", "id", "other"])
ROW = VALID | VALID | VALID | st.builds(lambda row, key, value: row | {key: value}, VALID, KEYS, JSON)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A row in one of JSON's spellings, sometimes with a key twice or a byte astray."""
    row = draw(ROW)
    colon = draw(st.sampled_from([":", ": ", " : ", "\t:"]))
    text = json.dumps(row, ensure_ascii=draw(st.booleans()), separators=(draw(st.sampled_from([",", ", "])), colon))
    if draw(st.integers(0, 5)) == 3:
        text = text.replace("{", f'{{"{draw(st.sampled_from(sorted(row)))}"{colon}"again", ', 1)
    line = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 5)) == 3:
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.binary(max_size=2)) + line[at + draw(st.integers(0, 2)) :]
    return line + draw(st.sampled_from([b"", b"\n", b"\r\n"]))


def carefully(line: bytes, *, require_label: bool) -> Identity | None:
    try:
        row = parse_line(line, where="")
        prompt = to_prompt(row, where="", require_label=require_label)
    except DataError:
        return None
    question = prompt_uid(messages=prompt.messages, text=prompt.text)
    name = row.get("id")
    return bytes.fromhex(prompt.uid), bytes.fromhex(question), None if name is None else str(name)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(line=lines(), require_label=st.booleans())
@example(line=b'{"text": "a", "label": 1, "label": 2}', require_label=True)
@example(line=b'{"text": "a", "label": 1, "label" : 1}', require_label=True)
@example(line=b'{"text": "a", "label": 1, "label": 1, "metadata": {"x\\\\": 1}}', require_label=True)
@example(line=b'{"text": "a", "label": 1e16}', require_label=True)
@example(line=b'{"text": "a", "label": 18446744073709551616}', require_label=True)
@example(line=b'{"text": "a", "label": "\\ud800"}', require_label=True)
@example(line=b'{"text": "a", "label": "1", "metadata": {"a": {"b": 1, "b": 2}}}', require_label=True)
@example(line=b'{"text": "a", "label": "1", "metadata": {"a": NaN}}', require_label=True)
@example(line=b'{"text": "a", "label": "1", "metadata": {"a": 1e999}}', require_label=True)
@example(line=b'{"text": "\\u001c \\u0085", "label": "1"}', require_label=True)
@example(line='{"text": "\x7f\u2028\\u0001\\/", "label": "\U0001f600"}'.encode(), require_label=True)
def test_what_is_read_quickly_is_what_is_read_carefully(line: bytes, require_label: bool) -> None:
    """Pins: a wrong row that slips through because it was read in a hurry, and a uid that depends on the spelling."""
    quick = quick_identity(line, require_label=require_label)
    assert quick is None or quick == carefully(line, require_label=require_label)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "1 + 2 =", "label": "3"},
        {
            "text": 'He said: "a": 1',
            "label": 3,
            "tags": ["sum"],
            "metadata": {"page": 1.5, "of": {"book": "x"}},
            "id": 7,
        },
        {"messages": [{"role": "system", "content": "é"}, {"role": "user", "content": "x\ny"}], "label": ["3", "drei"]},
        {"text": "Write a poem."},
    ],
    ids=["short", "full", "messages", "no label"],
)
def test_ordinary_rows_are_read_quickly(row: dict[str, Any]) -> None:
    """Pins: a condition that sends every row the slow way, at a tenth of the speed."""
    quick = quick_identity(json.dumps(row).encode() + b"\n", require_label=False)
    assert quick is not None
    assert quick == carefully(json.dumps(row, ensure_ascii=False).encode(), require_label=False)
