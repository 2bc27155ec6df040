"""A prompt file read once from end to end: every row validated, and the columns of its index.

The columns are in *canonical order*, by question and uid, which does not depend on the order of rows in the file. The
questions that are held out are then its beginning, whatever the share.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from buffer.prompts.dataset import not_json, prompt_uid, repeated_id, to_prompt
from buffer.prompts.quick import Identity, quick_identity
from buffer.prompts.rows import Row, line_of, no_rows, parse_line, read_at, read_lines, read_rows
from slime.errors import DataError

UInt64 = npt.NDArray[np.uint64]

QUESTION, UID, OFFSET, LENGTH, IN_FILE_ORDER = range(5)
"""Columns: the hash of what is asked, the uid, where the row stands (bytes), and the k-th row's place in the others."""
_LONG_BYTES = 64 * 2**20
"""A file that takes seconds: whoever waits in front of a terminal sees how far it is."""
_SHOW_EVERY = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What is known of a file once it was read."""

    columns: UInt64
    """[5, num_prompts]"""
    num_duplicates: int
    """Rows left out because an earlier row poses the same problem."""


def scan(path: Path, *, require_label: bool, copy: Path | None = None) -> Scan:
    """Read every row of a prompt file.

    Args:
        copy: for ``.parquet``, where the rows are written as lines of JSON; offsets are those in it.

    Raises:
        DataError: a row is not a prompt, two rows have the same ``id``, or there are no rows.
    """
    hashes, places, named = bytearray(), array("Q"), array("Q")
    with _progress(path) as show:
        for number, offset, line in read_lines(path) if copy is None else _copied(path, copy):
            identity = quick_identity(line, require_label=require_label)
            if identity is None:
                identity = _identity(line, where=line_of(path, number), require_label=require_label)
            uid, question, name = identity
            if name is not None:
                named.extend((xxhash.xxh3_64_intdigest(name.encode()), len(places) // 2, number))
            hashes += question
            hashes += uid
            places.extend((offset, len(line)))
            if not number % _SHOW_EVERY:
                show(offset)
    if not places:
        raise no_rows(path)
    places_2N = np.ascontiguousarray(np.frombuffer(places, dtype=np.uint64).reshape(-1, 2).T)
    hashes_2N = np.ascontiguousarray(np.frombuffer(hashes, dtype=">u8").reshape(-1, 2).T, dtype=np.uint64)
    _check_ids(path, np.frombuffer(named, dtype=np.uint64).reshape(-1, 3), rows=copy or path, places_2N=places_2N)
    return _canonical(hashes_2N, places_2N)


def _identity(line: bytes, *, where: str, require_label: bool) -> Identity:
    row = parse_line(line, where=where)
    prompt = to_prompt(row, where=where, require_label=require_label)
    question = prompt_uid(messages=prompt.messages, text=prompt.text)
    name = row.get("id")
    return bytes.fromhex(prompt.uid), bytes.fromhex(question), None if name is None else str(name)


def _copied(path: Path, copy: Path) -> Iterator[tuple[int, int, bytes]]:
    """The rows of a ``.parquet`` file as `read_lines` gives those of a ``.jsonl`` file."""
    offset = 0
    try:
        with copy.open("wb") as file:
            for number, (where, row) in enumerate(read_rows(path), 1):
                line = _to_line(row, where=where)
                file.write(line)
                yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise DataError(
            f"{copy}: {error.strerror}, while the rows of {path} were copied there. Make room, or name another folder "
            "with the variable XDG_CACHE_HOME."
        ) from error


def _to_line(row: Row, *, where: str) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise not_json(error, where=where) from None


def _check_ids(path: Path, named_N3: UInt64, *, rows: Path, places_2N: UInt64) -> None:
    """Refuse an ``id`` that stands twice.

    Args:
        named_N3: for each row that has one: the id's hash, the row counted from 0, and the number of its line.
        rows: the file that `places_2N` are offsets and lengths in.
    """
    order = np.argsort(named_N3[:, 0], kind="stable")
    again = np.flatnonzero(named_N3[order[1:], 0] == named_N3[order[:-1], 0]) + 1
    for k in again[np.argsort(order[again])]:
        (_, first, first_number), (_, second, number) = (map(int, named_N3[order[i]]) for i in (k - 1, k))
        names = [parse_line(read_at(rows, *map(int, places_2N[:, row])), where="")["id"] for row in (first, second)]
        if str(names[0]) == str(names[1]):  # else two ids that have the same hash
            raise repeated_id(names[1], where=line_of(path, number), first=line_of(path, first_number))


def _canonical(hashes_2N: UInt64, places_2N: UInt64) -> Scan:
    """Order the rows by question and uid, and keep each problem once, at its first place in the file."""
    questions, uids = hashes_2N
    order = np.lexsort((uids, questions))  # stable: of equal rows the first in the file comes first
    questions, uids = questions[order], uids[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (questions[1:] != questions[:-1]) | (uids[1:] != uids[:-1])
    rows = order[is_first]
    offsets, lengths = places_2N
    columns = np.empty((5, len(rows)), dtype=np.uint64)
    columns[QUESTION], columns[UID] = questions[is_first], uids[is_first]
    columns[OFFSET], columns[LENGTH] = offsets[rows], lengths[rows]
    columns[IN_FILE_ORDER] = np.argsort(rows)
    return Scan(columns=columns, num_duplicates=len(order) - len(rows))


@contextmanager
def _progress(path: Path) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how far a long file is read; the function given takes an offset in it."""
    num_bytes = path.stat().st_size
    if num_bytes < _LONG_BYTES or not sys.stderr.isatty():
        yield lambda offset: None
        return
    from rich.console import Console  # here, because most files are short
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        total = None if path.suffix == ".parquet" else num_bytes
        task = progress.add_task(f"indexing {escape(path.name)}", total=total)
        yield lambda offset: progress.update(task, completed=offset)
