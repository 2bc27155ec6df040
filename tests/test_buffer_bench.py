"""`slime bench buffer`: that it runs and compares what it says, not what this machine is capable of."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from buffer.ledger import Ledger
from buffer.payload import encode
from slime.buffer_bench import (
    SAMPLES_PER_GROUP,
    TOKENS_PER_SAMPLE,
    a_group,
    alternate,
    bench_claims,
    open_buffer,
    raw_ledger,
    some_prompts,
    write_raw,
)

ROWS = (
    "SELECT ordinal, prompt_uid, epoch, position, attempt, state, step, oldest_version, newest_version, request "
    "FROM instances ORDER BY ordinal",
    "SELECT ordinal, attempt, event, step, detail FROM events ORDER BY ordinal, seq",
    "SELECT * FROM payloads ORDER BY ordinal",
    "SELECT * FROM outcomes ORDER BY ordinal",
)


async def test_raw_sqlite_writes_the_rows_that_a_push_writes(tmp_path: Path) -> None:
    """Pins a ratio that flatters: SQLite made to write more than the buffer, or less."""
    groups = [
        encode(a_group(f"{i:016x}", num_samples=SAMPLES_PER_GROUP, num_tokens=TOKENS_PER_SAMPLE)) for i in range(3)
    ]
    with Ledger(tmp_path) as ledger:
        buffer = open_buffer(ledger, some_prompts())
        await buffer.published(0)
        await buffer.push([(f"raw/{i}", group) for i, group in enumerate(groups)])
    with (
        closing(raw_ledger(tmp_path / "raw.sqlite")) as raw,
        closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as ours,
    ):
        write_raw(raw, groups, first=0)
        for rows in ROWS:
            assert ours.execute(rows).fetchall() == raw.execute(rows).fetchall() != []


async def test_both_sides_take_turns() -> None:
    """Pins: noise that meets one side only."""
    turns: list[str] = []

    async def side(name: str, number: int) -> None:
        turns.append(f"{name}{number}")

    await alternate(lambda number: side("a", number), lambda number: side("b", number), num_rounds=2)
    assert turns == ["a0", "b0", "a1", "b1", "a2", "b2"]


async def test_claims_are_measured_and_no_index_is_left_in_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins a bench that breaks, which is noticed only when somebody wants its number; and 0.4 GB left behind by it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "scratch").mkdir()
    await bench_claims(2_000, tmp_path / "scratch")
    printed = capsys.readouterr().out
    assert re.search(r"claim +[\d,]+ µs, of 2,000 prompts", printed)
    assert re.search(r"ratio +\d+\.\d\d +\(limit: at most 4.00\)", printed)
    assert not (tmp_path / "cache").exists()
