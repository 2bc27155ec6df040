"""Prompt files: what is accepted, and that everything else is named by file, line and what would be right."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buffer.prompts.dataset import prompt_uid, read_sft_rows
from buffer.prompts.index import open_index
from buffer.prompts.rows import MAX_LINE_BYTES
from buffer.prompts.sources import IndexedPrompts
from slime.errors import DataError
from slime.types import Prompt

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""

GOOD = b'{"text": "1 + 1 =", "label": "2"}\n'


def write(tmp_path: Path, content: bytes, name: str = "prompts.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def read_prompts(path: Path, *, require_label: bool = True) -> list[Prompt]:
    """In file order."""
    return list(IndexedPrompts(open_index(path, require_label=require_label), in_file_order=True))


def row(**keys: Any) -> bytes:
    return json.dumps({"text": "1 + 2 =", "label": "3"} | keys).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "place", "got"),
    [
        (GOOD + b'{"text": "a" "label": "2"}\n', "line 2, column 14", "broken JSON"),
        (GOOD + b"\n\n" + b'{"text": "a", "label": "2"\n', "line 4, column", "broken JSON"),
        (GOOD + b'{"text": "cut o', "line 2, column 10", "broken JSON"),
        (b'{"text": "a\x00", "label": "2"}\n', "line 1, column 12", "NUL byte"),
        (GOOD + b"\x00" * 512, "line 2, column 1", "NUL byte"),
        (GOOD + b'{"text": "caf\xe9", "label": "2"}\n', "line 2, byte 14", "0xe9, which is not UTF-8"),
        ('{"text": "a", "label": "2"}'.encode("utf-16"), "line 1, byte 1", "0xff, which is not UTF-8"),
        (b"[\n" + GOOD + b"]\n", "line 1, column 2", "broken JSON"),
        (b'["1 + 1 =", "2"]\n', "line 1, column 1", "a list where an object"),
        (b'"1 + 1 ="\n', "line 1", "a string where an object"),
        (b"null\n", "line 1", "null where an object"),
        (b'{"text": "a", "label": NaN}\n', "line 1, column 24", "NaN, which JSON does not have"),
        (b'{"text": "a", "label": -Infinity}\n', "line 1, column 24", "-Infinity"),
        (b'{"text": "a", "label": 1, "label": 2}\n', "line 1, column 15", "the key 'label' twice"),
        (b'{"text": "a", "label": ' + b"[" * 100_000 + b"\n", "line 1", "beyond the parser's limits"),
        (b'{"text": "a", "label": ' + b"1" * 5000 + b"}\n", "line 1", "beyond the parser's limits"),
        (b'{"text": "a", "label": "\\ud800"}\n', "line 1, column 25", "half a surrogate pair"),
        (row(metadata={"note": "a\udfffb"}), "line 1, column", "half a surrogate pair (\\udfff)"),
        (b"{}\n", "line 1", "neither 'messages' nor 'text'"),
        (row(text=None), "line 1", "neither 'messages' nor 'text'"),
        (row(messages=[{"role": "user", "content": "a"}]), "line 1", "both 'messages' and 'text'"),
        (row(label=None), "line 1", "no 'label'"),
        (GOOD + row(lable="3"), "line 2", "unknown key 'lable'. Did you mean 'label'?"),
        (row(difficulty=3), "line 1", "unknown key 'difficulty'"),
        (row(text=""), "line 1", "'text' must be"),
        (row(text=" \n"), "line 1", "'text' must be"),
        (row(text=7), "line 1", "'text' must be a string that is not empty; got a number, 7"),
        (row(text=None, messages="hello"), "line 1", "'messages' must be a list"),
        (row(text=None, messages=[]), "line 1", "'messages' must be a list"),
        (row(text=None, messages=["hello"]), "line 1", "'messages[0]' must be an object"),
        (row(text=None, messages=[{"role": "user"}]), "line 1", "'messages[0].content' must be a string"),
        (row(text=None, messages=[{"role": 1, "content": "a"}]), "line 1", "'messages[0].role' must be a string"),
        (row(tags="algebra"), "line 1", "'tags' must be a list of strings"),
        (row(tags=[1]), "line 1", "'tags' must be a list of strings"),
        (row(metadata=[1]), "line 1", "'metadata' must be an object"),
        (row(id=1.5), "line 1", "'id' must be a string or a whole number"),
        (row(id=True), "line 1", "'id' must be a string or a whole number"),
        (row(id="x") + row(text="another", id="x"), "line 2", "the id 'x', which is also the id of"),
        (row(id=7) + row(text="another", id="7"), "line 2", "the id '7', which is also the id of"),
        (b"", "", "no rows"),
        (b"\xef\xbb\xbf\n\r\n  \n", "", "no rows"),
    ],
)
def test_a_broken_row_is_refused_by_file_and_line(tmp_path: Path, content: bytes, place: str, got: str) -> None:
    """Pins: a row that is skipped or guessed at, and a message that does not say where to look or what to do."""
    path = write(tmp_path, content)
    with pytest.raises(DataError) as refused:
        read_prompts(path)
    message = str(refused.value)
    assert message.startswith(f"{path}, {place}" if place else str(path))
    assert got in message
    assert ", or " in message or "belongs under 'metadata'" in message, "a message gives two ways out"
    assert len(message) < 600 + len(str(path)) * 2


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD + row(),
        GOOD.replace(b"\n", b"\r\n") + row().replace(b"\n", b"\r\n"),
        b"\n" + GOOD + b"  \n\r\n" + row() + b"\n\n",
        GOOD + row().rstrip(b"\n"),
    ],
    ids=["byte order mark", "CRLF", "empty lines", "no line break at the end"],
)
def test_what_editors_do_to_files_is_accepted(tmp_path: Path, content: bytes) -> None:
    """Pins: a carriage return or a byte order mark that ends up in a prompt or in its uid."""
    plain = read_prompts(write(tmp_path, GOOD + row(), "plain.jsonl"))
    assert read_prompts(write(tmp_path, content)) == plain
    assert [prompt.text for prompt in plain] == ["1 + 1 =", "1 + 2 ="]


def test_line_separators_inside_strings_do_not_split_rows(tmp_path: Path) -> None:
    """Pins: a reader that splits lines at U+2028 or U+0085, as str.splitlines does."""
    text = "a\u2028b\u2029c\u0085d\x0be\x1cf"
    path = write(tmp_path, json.dumps({"text": text, "label": 1}, ensure_ascii=False).encode() + b"\n")
    assert read_prompts(path)[0].text == text


def test_every_key_of_a_row_arrives(tmp_path: Path) -> None:
    """Pins: a key that is accepted and then forgotten."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2 =", "name": "ann"}]
    path = write(
        tmp_path, row(text=None, messages=messages, label={"answer": 3}, tags=["sum"], metadata={"level": 2}, id="q1")
    )
    (prompt,) = read_prompts(path)
    assert prompt.messages == tuple(messages)
    assert prompt.text == ""
    assert prompt.label == {"answer": 3}
    assert prompt.tags == ("sum",)
    assert prompt.metadata == {"level": 2, "id": "q1"}


def test_characters_beyond_the_first_plane_may_be_spelt_as_pairs(tmp_path: Path) -> None:
    """Pins: a check on half pairs that refuses whole ones, which is how json.dumps writes every emoji."""
    path = write(tmp_path, row(text="\N{GRINNING FACE} = ?"))
    assert b"\\ud83d\\ude00" in path.read_bytes()
    assert read_prompts(path)[0].text == "\N{GRINNING FACE} = ?"


def test_whole_numbers_of_any_size_stay_exact(tmp_path: Path) -> None:
    """Pins: a parser that turns a long answer into a float, so that the right answer is marked wrong."""
    path = write(tmp_path, row(label=2**200 + 1))
    assert read_prompts(path)[0].label == 2**200 + 1


def test_labels_may_be_absent_where_no_reward_needs_them(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"text": "Write a poem."}\n')
    assert read_prompts(path, require_label=False)[0].label is None


def test_the_same_problem_twice_is_kept_once_and_counted(tmp_path: Path) -> None:
    """Pins: a duplicate that counts double in training; tags and metadata do not make another problem."""
    path = write(tmp_path, row() + GOOD + row(tags=["again"], metadata={"page": 2}) + row(label="4"))
    assert [(prompt.text, prompt.label, prompt.tags) for prompt in read_prompts(path)] == [
        ("1 + 2 =", "3", ()),
        ("1 + 1 =", "2", ()),
        ("1 + 2 =", "4", ()),
    ]
    assert open_index(path).num_duplicates == 1


def test_the_uid_is_of_the_content_and_stays_what_it_is() -> None:
    """Pins: a uid that changes between releases, and with it every held-out set. The values are b2sum's."""
    assert prompt_uid(text="1 + 2 =", label="3") == "d7c896206e530ad7"
    assert prompt_uid(messages=[{"role": "user", "content": "1 + 2 ="}], label=3) == "d89bd8d0070b4012"
    assert prompt_uid(messages=[{"content": "a", "role": "user"}]) == prompt_uid(
        messages=[{"role": "user", "content": "a"}]
    )


@UNHURRIED
@given(st.text(), st.text(), st.text(), st.text())
def test_different_problems_have_different_uids(text: str, label: str, other_text: str, other_label: str) -> None:
    """Pins: a hash over joined strings, in which ("a", "bc") and ("ab", "c") collide."""
    same = (text, label) == (other_text, other_label)
    assert (prompt_uid(text=text, label=label) == prompt_uid(text=other_text, label=other_label)) == same


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "prompts.jsonl")
    with pytest.raises(DataError, match=r"no such file. Did you mean prompts\.jsonl\?"):
        read_prompts(tmp_path / "promts.jsonl")
    with pytest.raises(DataError, match="no such directory"):
        read_prompts(tmp_path / "nowhere" / "prompts.jsonl")
    with pytest.raises(DataError, match="got a directory"):
        read_prompts(tmp_path)


def test_another_kind_of_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ends in '\.csv'.*\.jsonl and \.parquet"):
        read_prompts(write(tmp_path, b"text,label\n", "prompts.csv"))


@pytest.mark.parametrize("target", ["/dev/null", "nowhere.jsonl"])
def test_what_is_there_and_no_file_is_not_called_missing(tmp_path: Path, target: str) -> None:
    """Pins "no such file. Did you mean prompts.jsonl?" for a device, a pipe or a broken link of that very name."""
    path = tmp_path / "prompts.jsonl"
    path.symlink_to(target)
    with pytest.raises(DataError, match=r"prompts\.jsonl: got (no file that|a link that leads nowhere)"):
        read_prompts(path)


def test_a_row_that_no_later_parser_reads_is_refused_with_its_line(tmp_path: Path) -> None:
    """Pins a prompt that is rolled out and then ends the run when its group is read back, at every start."""
    deep = b'{"text": "2 + 2 =", "label": ' + b"[" * 100 + b"]" * 100 + b"}\n"
    with pytest.raises(DataError, match=r"line 2.*nested more than 100 deep"):
        read_prompts(write(tmp_path, GOOD + deep))
    assert len(read_prompts(write(tmp_path, GOOD + deep.replace(b"[[", b"[", 1).replace(b"]]", b"]", 1)))) == 2


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"text": "')
        file.truncate(MAX_LINE_BYTES + 1024)
    with pytest.raises(DataError, match="line 2: got more than 64 MiB without a line break"):
        read_prompts(path)


def write_parquet(tmp_path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), tmp_path / "prompts.parquet")
    return tmp_path / "prompts.parquet"


def test_parquet_and_jsonl_give_the_same_prompts(tmp_path: Path) -> None:
    """Pins: nulls that parquet fills in becoming part of a message, and with it of the prompt's uid."""
    one = {"messages": [{"role": "user", "content": "1 + 2 ="}], "label": "3", "tags": ["sum"]}
    two = {"messages": [{"role": "user", "content": "a", "name": "ann"}], "label": "4", "metadata": {"level": "2"}}
    jsonl = write(tmp_path, json.dumps(one).encode() + b"\n" + json.dumps(two).encode())
    columns = {key: [one.get(key), two.get(key)] for key in ("messages", "label", "tags")}
    levels = pa.array([None, [("level", "2")]], pa.map_(pa.string(), pa.string()))
    parquet = write_parquet(tmp_path, {**columns, "metadata": levels})
    assert read_prompts(parquet) == read_prompts(jsonl)


def test_a_bad_parquet_file_is_refused_by_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts\.parquet, row 2: got no 'label'"):
        read_prompts(write_parquet(tmp_path, {"text": ["a", "b"], "label": ["1", None]}))
    with pytest.raises(DataError, match="row 1: got the unknown key 'prompt'"):
        read_prompts(write_parquet(tmp_path, {"prompt": ["a"]}))
    with pytest.raises(DataError, match="row 1: got a value that JSON does not have"):
        read_prompts(write_parquet(tmp_path, {"text": ["a"], "label": [datetime.date(2020, 1, 1)]}))
    with pytest.raises(DataError, match="row 1: got a value that JSON does not have"):
        read_prompts(write_parquet(tmp_path, {"text": ["a"], "label": [float("nan")]}))
    with pytest.raises(DataError, match="no rows"):
        read_prompts(write_parquet(tmp_path, {"text": pa.array([], pa.string())}))


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    """Pins a row of which the last of two columns wins, in silence."""
    path = tmp_path / "prompts.parquet"
    columns = [pa.array([value]) for value in ("1 + 1 =", "2 + 2 =", "2")]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text", "label"]), path)
    with pytest.raises(DataError, match="'text' twice"):
        read_prompts(path)


def test_a_torn_parquet_file_is_refused(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path, {"text": ["a"] * 100, "label": ["1"] * 100}).read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        with pytest.raises(DataError, match="not whole parquet"):
            read_prompts(write(tmp_path, whole[:size], "torn.parquet"))


def test_sft_rows_have_a_prompt_and_a_response(tmp_path: Path) -> None:
    path = write(tmp_path, row(response="3") + row(response="3") + row(response="three", label=None))
    rows = read_sft_rows(path)
    assert [(row.prompt.text, row.response) for row in rows] == [
        ("1 + 2 =", "3"),
        ("1 + 2 =", "3"),
        ("1 + 2 =", "three"),
    ]


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (row(), "line 1: 'response' must be a string that is not empty; got null"),
        (row(response=""), "line 1: 'response' must be"),
        (row(response=["3"]), "line 1: 'response' must be"),
        (row(respons="3"), "line 1: got the unknown key 'respons'. Did you mean 'response'?"),
        (row(response="3", id="a") + row(response="3", id="a"), "line 2: got the id 'a'"),
    ],
)
def test_a_broken_sft_row_is_refused(tmp_path: Path, content: bytes, got: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as refused:
        read_sft_rows(path)
    assert got in str(refused.value)


@UNHURRIED
@given(st.binary(max_size=200))
def test_no_bytes_end_in_anything_but_prompts_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    """Pins: a file that ends the run with a traceback of ours instead of the user's line number."""
    path = write(tmp_path_factory.mktemp("fuzz"), content)
    with pytest.raises(DataError):
        read_prompts(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["text", "messages", "label", "tags", "metadata", "id"])


@UNHURRIED
@given(st.lists(st.dictionaries(KEYS, JSON, max_size=4), max_size=3))
def test_no_json_ends_in_anything_but_prompts_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    """The same, past the parser: well-formed rows of every shape."""
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path = write(tmp_path_factory.mktemp("rows"), content)
    try:
        index = open_index(path, require_label=False)
    except DataError:
        return
    assert len(index) + index.num_duplicates == len(rows)
    assert all(prompt.text.strip() or prompt.messages for prompt in IndexedPrompts(index))
