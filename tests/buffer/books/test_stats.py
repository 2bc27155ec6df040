"""The counts of `slime buffer stats` against a ledger that was written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from buffer.books.lives import read_lives
from buffer.books.stats import read_pools, read_stats
from buffer.difficulty import Difficulty
from buffer.ledger import Ledger
from slime.errors import DataError
from tests.buffer.example_run import HOSTILE, make_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def test_every_count_is_that_of_the_ledger(run_dir: Path) -> None:
    """Pins a number that is read from the wrong column: nobody would notice."""
    stats = read_stats(run_dir)
    assert stats.states == {
        "issued": 1,
        "running": 1,
        "generated": 1,
        "graded": 1,
        "packed": 1,
        "committed": 3,
        "dropped": 2,
    }
    assert (stats.num_issued, stats.num_waiting, stats.num_running, stats.num_ready) == (10, 1, 2, 1)
    assert (stats.num_admitted, stats.num_pushed, stats.num_partial) == (9, 1, 1)
    assert (stats.dropped, stats.num_filtered) == ({HOSTILE: 1, "prompt_too_long": 1}, 1)
    assert stats.requeues == {"aborted": 1, "engine died": 1}
    assert (stats.num_late, stats.num_recovered, stats.num_reverted) == (1, 0, 0)
    assert (stats.staleness, stats.max_staleness) == ({0: 2, 1: 1}, 1)
    assert (stats.num_commits, stats.last_step) == (2, 2)
    assert stats.num_payloads == 3
    assert 0 < stats.payload_bytes < stats.ledger_bytes == (run_dir / "ledger.sqlite").stat().st_size


def test_the_instance_that_runs_longest_is_named(run_dir: Path) -> None:
    """Pins a stalled run that shows its newest instance, or the time since an earlier attempt."""
    (nine,), (seven,) = read_lives(run_dir, "9"), read_lives(run_dir, "7")
    (began,), again = ([event.time for event in life.events if event.event == "running"] for life in (nine, seven))
    longest = read_stats(run_dir).longest_running
    assert longest is not None
    first, attempt = (7, 1) if again[1] < began else (9, 0)
    assert (longest.ordinal, longest.attempt) == (first, attempt)


def test_what_a_restart_and_a_torn_checkpoint_gave_back_is_counted(run_dir: Path) -> None:
    """Pins work that is done twice and shows nowhere."""
    with Ledger(run_dir) as ledger:
        ledger.recover()
        ledger.revert(1, reason="torn")
    stats = read_stats(run_dir)
    assert (stats.num_recovered, stats.num_reverted, stats.last_step) == (2, 1, 1)
    assert stats.longest_running is None


def test_a_ledger_without_anything_has_stats(tmp_path: Path) -> None:
    """Pins a maximum over no rows."""
    Ledger(tmp_path).close()
    stats = read_stats(tmp_path)
    assert (stats.num_issued, stats.last_step, stats.max_staleness, stats.staleness) == (0, None, None, {})


def test_a_run_that_goes_on_is_counted_as_it_stands(tmp_path: Path) -> None:
    """Pins a snapshot that is taken without the log, and sees nothing of what a live run has written."""
    with Ledger(tmp_path) as ledger:
        ledger.issue("u", epoch=0, position=0)
        assert read_stats(tmp_path).num_issued == 1
        ledger.issue("u", epoch=1, position=1)
        assert read_stats(tmp_path).num_issued == 2


def test_prompts_are_pooled_from_the_file_that_the_run_names(run_dir: Path, tmp_path: Path) -> None:
    """Pins pools of another file than the one the run writes: its own by default, else the one in its configuration."""
    assert read_pools(run_dir, k=1) is None
    (run_dir / "config.json").write_text(json.dumps({"buffer": {"difficulty": None}}))
    for place in ("difficulty.sqlite", "shared.sqlite"):
        with Difficulty(tmp_path / place) as difficulty:
            difficulty.absorb(run_dir)
    pools = read_pools(run_dir, k=2)
    assert pools is not None
    assert {end: count for end, count in pools.bands.items() if count} == {0.0: 1, 1.0: 5}
    (run_dir / "config.json").write_text(json.dumps({"buffer": {"difficulty": str(tmp_path / "shared.sqlite")}}))
    (tmp_path / "difficulty.sqlite").unlink()
    assert read_pools(run_dir, k=2) == pools


@pytest.mark.parametrize("text", ["{torn", "[]", "{}", '{"buffer": 3}'])
def test_a_damaged_configuration_is_named(run_dir: Path, text: str) -> None:
    (run_dir / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config.json: got no configuration of a run"):
        read_pools(run_dir, k=1)
