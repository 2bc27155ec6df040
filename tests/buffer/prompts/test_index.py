"""The index of a prompt file: made once, kept whole or not at all, and never trusted over the file."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from buffer.prompts.index import open_index
from buffer.prompts.scan import LENGTH, OFFSET
from buffer.prompts.sources import IndexedPrompts
from slime.errors import DataError

ROWS = [{"text": f"{i} + 1 =", "label": str(i + 1)} for i in range(300)]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that indices are kept in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "slime"


def jsonl(tmp_path: Path, rows: list[dict[str, Any]] = ROWS, name: str = "prompts.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(tmp_path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def texts(path: Path) -> list[str]:
    """Opened as a run does, and read."""
    return [prompt.text for prompt in IndexedPrompts(open_index(path), in_file_order=True)]


def tamper(path: Path, old: bytes, new: bytes) -> None:
    """Change a file so that neither its size nor its time shows it."""
    stat, content = path.stat(), path.read_bytes()
    assert len(old) == len(new)
    assert old in content
    path.write_bytes(content.replace(old, new))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_file_is_read_once_and_its_rows_when_they_are_asked_for(
    tmp_path: Path, kept: Path, write: Callable[[Path], Path]
) -> None:
    """Pins: a start-up that reads all rows again. Rows that were broken behind its back go unnoticed until then."""
    path = write(tmp_path)
    assert texts(path) == [row["text"] for row in ROWS]
    assert {file.suffix for file in kept.iterdir()} == ({".index", ".jsonl"} if write is parquet else {".index"})
    rows = path if write is jsonl else next(kept.glob("*.jsonl"))
    tamper(rows, b'"17 + 1 ="', b"          ")
    prompts = IndexedPrompts(open_index(path), in_file_order=True)
    assert [prompt.text for prompt in prompts[:17]] == [row["text"] for row in ROWS[:17]]
    with pytest.raises(DataError, match="the row that was indexed here is gone"):
        prompts[17]


def test_a_changed_file_is_read_again_and_replaces_its_index(tmp_path: Path, kept: Path) -> None:
    """Pins: training on rows that are gone, and a cache that grows with every version of a file."""
    path = jsonl(tmp_path)
    assert len(texts(path)) == 300
    jsonl(tmp_path, ROWS[:299])
    assert len(texts(path)) == 299
    jsonl(tmp_path, ROWS[1:])
    os.utime(path, ns=(1, 1))
    assert texts(path) == [row["text"] for row in ROWS[1:]]
    assert len(list(kept.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda path: tamper(path, b'"5 + 1 ="', b'"5 + 2 ="'),
        lambda path: tamper(path, b'"label": "6"', b'"label": "7"'),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.unlink(),
    ],
    ids=["the question", "the label", "cut off", "removed"],
)
def test_a_row_that_changes_during_a_run_ends_it(tmp_path: Path, kept: Path, change: Callable[[Path], None]) -> None:
    """Pins: a group that is trained on another problem than the ledger names; and an index that stays wrong."""
    path = jsonl(tmp_path)
    prompts = IndexedPrompts(open_index(path), in_file_order=True)
    assert prompts[5].label == "6"
    change(path)
    with pytest.raises(DataError, match=r"prompts\.jsonl, byte \d+: .*changed or removed.*Restore.*or train"):
        prompts[5]
    jsonl(tmp_path)
    os.utime(path, ns=(2, 2))
    assert texts(path) == [row["text"] for row in ROWS]
    assert len(list(kept.iterdir())) == 1


def test_a_row_that_changed_unseen_is_indexed_anew_at_the_next_start(tmp_path: Path, kept: Path) -> None:
    """Pins: an error that repeats for ever, because size and time say that the index is still right."""
    path = jsonl(tmp_path)
    prompts = IndexedPrompts(open_index(path), in_file_order=True)
    tamper(path, b'"5 + 1 ="', b'"5 + 2 ="')
    with pytest.raises(DataError):
        prompts[5]
    assert texts(path)[5] == "5 + 2 ="


def test_a_damaged_index_is_made_anew(tmp_path: Path, kept: Path) -> None:
    """Pins: a run that cannot start, or starts with other prompts, after a full disk or a power loss."""
    path = jsonl(tmp_path)
    expected = texts(path)
    (index,) = kept.iterdir()
    whole = index.read_bytes()
    damaged = [whole[:size] for size in (0, 1, 100, 4095, 4096, len(whole) - 1)] + [whole + b"\0"]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, whole.index(b"  "), 7)]
    damaged += [b"\0" * len(whole), b"[1, 2]".ljust(len(whole)), b'[{"file": 1}, ""]'.ljust(len(whole))]
    for content in damaged:
        index.write_bytes(content)
        assert texts(path) == expected
        assert index.read_bytes() == whole


@pytest.mark.parametrize("column", [OFFSET, LENGTH])
def test_a_place_that_no_file_has_ends_the_run_in_words_and_the_index_with_it(
    tmp_path: Path, kept: Path, column: int
) -> None:
    """Pins a disk that loses a sector of the index: an OverflowError at every start, for good."""
    path = jsonl(tmp_path)
    expected = texts(path)
    (index,) = kept.iterdir()
    with index.open("r+b") as file:
        file.seek(4096 + column * len(ROWS) * 8)
        file.write(b"\xff" * 8 * len(ROWS))
    with pytest.raises(DataError, match="the row that was indexed here is gone"):
        texts(path)
    assert texts(path) == expected


def test_a_lost_copy_of_parquet_is_made_anew(tmp_path: Path, kept: Path) -> None:
    """Pins: an index whose rows were cleaned away."""
    path = parquet(tmp_path)
    expected = texts(path)
    copy = next(kept.glob("*.jsonl"))
    for content in (None, b"", copy.read_bytes()[:-1]):
        copy.unlink()
        if content is not None:
            copy.write_bytes(content)
        assert texts(path) == expected


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_without_a_place_to_keep_it_an_index_is_held_in_memory(
    tmp_path: Path, kept: Path, write: Callable[[Path], Path], caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins: a read-only home that keeps a run from starting, and copies of the data that stay behind in /tmp."""
    kept.parent.write_text("a file where the folder should be")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with caplog.at_level(logging.WARNING):
        index = open_index(write(tmp_path))
    assert str(kept) in caplog.text
    assert "XDG_CACHE_HOME" in caplog.text
    assert sorted(prompt.text for prompt in IndexedPrompts(index)) == sorted(row["text"] for row in ROWS)
    del index
    gc.collect()
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_full_disk_costs_the_index_or_says_what_to_do(
    tmp_path: Path, kept: Path, write: Callable[[Path], Path], caplog: Any
) -> None:
    """Pins: half an index or half a copy left in a place that has no room."""
    path = write(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        if write is jsonl:
            assert texts(path) == [row["text"] for row in ROWS]
            assert "XDG_CACHE_HOME" in caplog.text
        else:
            with pytest.raises(DataError, match=r"while the rows of .* were copied there\. Make room, or"):
                texts(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(kept.iterdir())


def test_several_may_index_a_file_at_once(tmp_path: Path, kept: Path) -> None:
    """Pins: two starts that write over each other's index."""
    path = parquet(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: texts(path), range(16)))
    assert found == [[row["text"] for row in ROWS]] * 16
    assert sorted(file.suffix for file in kept.iterdir()) == [".index", ".jsonl"]


def test_a_kill_leaves_no_torn_index(tmp_path: Path, kept: Path) -> None:
    """Pins: a start that trusts what a killed one had begun to write."""
    path = jsonl(tmp_path)
    expected = texts(path)
    for seed in range(20):
        if not (child := os.fork()):
            while True:
                for file in kept.iterdir():
                    file.unlink(missing_ok=True)
                open_index(path)
        signal.sigtimedwait([signal.SIGCHLD], random.Random(seed).uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert texts(path) == expected


def test_the_order_of_rows_matters_only_where_it_is_asked_for(tmp_path: Path) -> None:
    """Pins: a run that cannot be continued because its file was sorted meanwhile."""
    moved = ROWS[:]
    random.Random(0).shuffle(moved)
    one, other = (open_index(jsonl(tmp_path, rows, name)) for rows, name in ((ROWS, "1.jsonl"), (moved, "2.jsonl")))
    assert one.fingerprint(in_file_order=False) == other.fingerprint(in_file_order=False)
    assert one.fingerprint(in_file_order=True) != other.fingerprint(in_file_order=True)
    assert list(IndexedPrompts(one)) == list(IndexedPrompts(other))
    assert [prompt.text for prompt in IndexedPrompts(other, in_file_order=True)] == [row["text"] for row in moved]


def test_labels_are_required_of_a_file_that_was_indexed_without(tmp_path: Path) -> None:
    """Pins: a kept index that hides the rows without a label from a later run that needs them."""
    path = jsonl(tmp_path, [{"text": "Write a poem."}])
    assert open_index(path, require_label=False).prompt(0).label is None
    with pytest.raises(DataError, match="line 1: got no 'label'"):
        open_index(path)


def test_a_broken_row_far_down_is_named_by_its_line(tmp_path: Path) -> None:
    """Pins: line numbers that are lost where rows are read in a hurry; and an index kept of a broken file."""
    path = jsonl(tmp_path, [*ROWS, {"text": "a", "label": "b", "id": 1}, {"text": "c", "label": "d", "id": "1"}])
    for _ in range(2):
        with pytest.raises(DataError, match=r"line 302: got the id '1', which is also the id of .*, line 301\."):
            open_index(path)
    path.write_bytes(path.read_bytes().replace(b'"id": 1}', b'"id": 1]'))
    with pytest.raises(DataError, match=r"line 301, column \d+: got broken JSON"):
        open_index(path)


@pytest.mark.parametrize("left_out", [[], [0], [299], [3, 4, 5, 90], list(range(40, 300))])
def test_a_view_has_what_it_does_not_leave_out(tmp_path: Path, left_out: list[int]) -> None:
    """Pins: places that shift by one past a prompt that is left out."""
    import numpy as np

    index = open_index(jsonl(tmp_path))
    for start in (0, 3):
        places = [place for place in left_out if place >= start]
        view = IndexedPrompts(index, start=start, without=np.array(places, dtype=np.uint64))
        expected = [index.prompt(place).uid for place in range(start, 300) if place not in places]
        assert [prompt.uid for prompt in view] == expected
        assert (len(view), view[-1].uid) == (len(expected), expected[-1])
        in_order = IndexedPrompts(index, start=start, without=np.array(places, dtype=np.uint64), in_file_order=True)
        assert {prompt.uid for prompt in in_order} == set(expected)
        numbers = [int(prompt.text.split()[0]) for prompt in in_order]
        assert numbers == sorted(numbers)
        with pytest.raises(IndexError):
            view[len(view)]
