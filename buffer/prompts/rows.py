"""Rows of a ``.jsonl`` or ``.parquet`` file, one dictionary each, with the place they stand at for error messages.

Accepted as they come: a byte order mark, CRLF, empty lines. Everything else that is not one JSON object a line is
refused, because a row that is guessed at trains the wrong thing in silence.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from buffer.nesting import MAX_DEPTH, is_too_deep
from slime.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is refused before it is held in memory a second time."""
_BOM = b"\xef\xbb\xbf"
_EXAMPLE = '{"text": "1 + 2 =", "label": "3"}'

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield ``(where, row)`` for each row: `where` names the file and its line (``.jsonl``) or row (``.parquet``).

    Raises:
        DataError: the file is missing, of another kind, unreadable or without rows, or a line is not one JSON object.
    """
    empty = True
    for where, row in _read_parquet(path) if is_parquet(path) else _read_jsonl(path):
        empty = False
        yield where, row
    if empty:
        raise no_rows(path)


def is_parquet(path: Path) -> bool:
    """Whether a file of prompts is ``.parquet`` and not ``.jsonl``.

    Raises:
        DataError: it is missing, or of another kind.
    """
    if not path.is_file():
        _refuse_missing(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(
            f"{path}: got a file that ends in {path.suffix or 'nothing'!r}. Prompts are read from .jsonl and .parquet. "
            "Convert the file, or rename it if it is one of the two."
        )
    return path.suffix == ".parquet"


def no_rows(path: Path) -> DataError:
    """What to raise for a file without rows."""
    return DataError(f"{path}: got no rows. Write one JSON object a line, such as {_EXAMPLE}, or name another file.")


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield ``(number, offset, line)`` for each line of a ``.jsonl`` file that is not empty.

    `offset` counts bytes from the start of the file; a byte order mark is no part of the first line.

    Raises:
        DataError: the file cannot be read, or a line is too long.
    """
    try:
        file = path.open("rb", buffering=2**20)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Make it readable, or name another file.") from error
    with file:
        number = offset = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{line_of(path, number)}: got more than {MAX_LINE_BYTES // 2**20} MiB without a line break. Write "
                    "one JSON object a line, or shorten this row."
                )
            if number == 1 and line.startswith(_BOM):
                line, offset = line.removeprefix(_BOM), len(_BOM)
            if line.strip(b" \t\r\n"):
                yield number, offset, line
            offset += len(line)


def read_at(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes of a file from `offset`, fewer at its end.

    Raises:
        OSError: the file cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(file, length, offset)
    finally:
        os.close(file)


def line_of(path: Path, number: int) -> str:
    """The place of a row, for messages. `number` counts from 1."""
    return f"{path}, {'row' if path.suffix == '.parquet' else 'line'} {number}"


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, _, line in read_lines(path):
        where = line_of(path, number)
        yield where, parse_line(line, where=where)


def parse_line(line: bytes, *, where: str) -> Row:
    """One line of a ``.jsonl`` file as a row.

    Raises:
        DataError: it is not one JSON object, or holds what other programs would read in another way.
    """
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}, byte {error.start + 1}: got 0x{line[error.start]:02x}, which is not UTF-8. "
            "Save the file as UTF-8 (e.g. with `iconv -t utf-8`), or remove the line."
        ) from None
    if "\0" in text:
        _refuse_line(where, text, column=text.index("\0") + 1, got="a NUL byte (was the file cut off while written?)")
    try:
        row = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        _refuse_line(where, text, column=error.colno, got=f"broken JSON ({error.msg})")
    except _RowError as error:
        _refuse_line(where, text, column=text.find(error.token) + 1, got=str(error))
    except (RecursionError, ValueError) as error:  # nested a thousand deep, or an integer of thousands of digits
        _refuse_line(where, text, column=1, got=f"JSON beyond the parser's limits ({error})")
    if not isinstance(row, dict):
        _refuse_line(where, text, column=1, got=f"{describe(row)} where an object is needed")
    if is_too_deep(row):
        _refuse_line(where, text, column=1, got=f"JSON nested more than {MAX_DEPTH} deep")
    if "\\ud" in text.lower():
        _refuse_half_pairs(row, where=where, text=text)
    return row


def _refuse_half_pairs(row: Row, *, where: str, text: str) -> None:
    r"""JSON may spell half of a surrogate pair (``\ud800``), which is no character: no tokenizer takes it."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        _refuse_line(where, text, column=text.lower().index(half) + 1, got=f"half a surrogate pair ({half})")


class _RowError(Exception):
    """JSON that Python reads and we refuse; `token` is the text it is about."""

    def __init__(self, token: str, message: str) -> None:
        super().__init__(message)
        self.token = token


def _refuse_constant(token: str) -> NoReturn:
    raise _RowError(token, f"{token}, which JSON does not have")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RowError(json.dumps(twice, ensure_ascii=False), f"the key {twice!r} twice in one object")
    return row


def _refuse_line(where: str, text: str, *, column: int, got: str) -> NoReturn:
    around = text[max(0, column - 30) : column + 30]
    raise DataError(
        f"{where}, column {column}: got {got} near {around!r}. "
        f"Each line is one JSON object such as {_EXAMPLE}: mend the line, or remove it."
    )


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa  # here, because it takes a third of a second to import
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield line_of(path, number), _without_nulls(row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: got a file that is not whole parquet ({error}). Write it again, or give the prompts as .jsonl."
        ) from error


def _check_columns(path: Path, names: list[str]) -> None:
    """Of two columns of one name a row as a dictionary would keep the last."""
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: got the column {name!r} twice. Rename one of them, or leave it out.")


def _without_nulls(row: Row) -> Row:
    """Parquet fills what a row does not have with nulls, also in the keys of its messages: absent means absent here."""
    present = {key: value for key, value in row.items() if value is not None}
    if isinstance(present.get("messages"), list):
        present["messages"] = [
            {key: value for key, value in message.items() if value is not None}
            if isinstance(message, dict)
            else message
            for message in present["messages"]
        ]
    return present


def _refuse_missing(path: Path) -> NoReturn:
    if path.is_dir():
        raise DataError(f"{path}: got a directory. Name a .jsonl or .parquet file in it, or join its files into one.")
    if os.path.lexists(path):
        got = "no file that can be read twice" if path.exists() else "a link that leads nowhere"
        raise DataError(f"{path}: got {got}. Prompts are read in any order: write them to a file, and name that.")
    if not path.parent.is_dir():
        raise DataError(f"{path}: no such directory. Create it, or correct the path (it is relative to the run file).")
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"Did you mean {near[0]}?" if near else "Create it."
    raise DataError(f"{path}: no such file. {hint} Otherwise correct the path (it is relative to the run file).")


def describe(value: Any) -> str:
    """The kind of a JSON value, with its article, for messages."""
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
