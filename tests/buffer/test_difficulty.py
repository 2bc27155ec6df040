"""Pass statistics that outlive a run: every outcome once, and an estimator that is right."""

from __future__ import annotations

import itertools
import multiprocessing
import sqlite3
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from buffer.difficulty import Difficulty, Pools, pass_at_k
from buffer.ledger import Ledger
from buffer.policy import Versions
from buffer.records import Outcome
from slime.errors import LedgerError, StorageError


def grade(ledger: Ledger, uid: str, *, num_samples: int, num_passed: int, drop: str = "", version: int = 3) -> None:
    """One instance of a prompt, judged."""
    ordinal = ledger.issue(uid, epoch=0, position=None)
    ledger.start(ordinal, attempt=0, version=version)
    outcome = Outcome(
        num_samples=num_samples, num_passed=num_passed, reward_mean=num_passed / num_samples, response_tokens_mean=5.0
    )
    if drop:
        ledger.drop(ordinal, attempt=0, reason=drop, outcome=outcome)
    else:
        versions = Versions(oldest=version, newest=version)
        ledger.graded(ordinal, attempt=0, payload=b"", versions=versions, outcome=outcome)


def totals(difficulty: Difficulty, uid: str) -> tuple[int, int, int, int]:
    record = difficulty.get(uid)
    assert record is not None
    return record.num_samples, record.num_passed, record.last_num_samples, record.last_num_passed


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_pass(num_samples: int) -> None:
    """Pins the estimator against every draw of k samples that there is."""
    for num_passed in range(num_samples + 1):
        passed = [True] * num_passed + [False] * (num_samples - num_passed)
        for k in range(1, num_samples + 1):
            draws = list(itertools.combinations(passed, k))
            expected = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(num_samples, num_passed, k) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(10**6, 1, 1), (4096, 3, 512), (100_000, 99_999, 8), (10**5, 1, 3)])
def test_pass_at_k_is_exact_for_many_samples(n: int, c: int, k: int) -> None:
    """Pins: ``1 - x`` with x just below 1, and binomials beyond a float's range."""
    fails = Fraction(1)
    for i in range(k):
        fails *= Fraction(n - c - i, n - i)
    assert pass_at_k(n, c, k) == float(1 - fails)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_of_too_few_samples_is_no_number(n: int, c: int, k: int) -> None:
    """Pins: a prompt sampled 4 times that counts as never solved in 8."""
    with pytest.raises(ValueError, match=r"pass@\d"):
        pass_at_k(n, c, k)


def test_every_outcome_counts_once_trained_or_not(tmp_path: Path) -> None:
    """Pins: statistics that grow at every restart, and ones without the groups that the filter dropped."""
    with Ledger(tmp_path) as ledger:
        grade(ledger, "a", num_samples=4, num_passed=1)
        grade(ledger, "b", num_samples=4, num_passed=0, drop="equal_rewards", version=7)
        with Difficulty(tmp_path / "d") as difficulty:
            assert [difficulty.absorb(tmp_path), difficulty.absorb(tmp_path)] == [2, 0]
        grade(ledger, "a", num_samples=3, num_passed=3, version=9)
    with Ledger(tmp_path), Difficulty(tmp_path / "d") as difficulty:
        assert [difficulty.absorb(tmp_path), difficulty.absorb(tmp_path)] == [1, 0]
        assert totals(difficulty, "a") == (7, 4, 3, 3)
        assert totals(difficulty, "b") == (4, 0, 4, 0)
        dropped, trained = difficulty.get("b"), difficulty.get("a")
        assert dropped is not None
        assert trained is not None
        assert (dropped.last_version, trained.last_version) == (7, 9)
        assert difficulty.get("c") is None


def test_runs_that_share_a_file_add_up(tmp_path: Path) -> None:
    """Pins: a watermark of one run that hides another's outcomes of the same number."""
    for name, num_passed in (("one", 1), ("two", 4)):
        with Ledger(tmp_path / name) as ledger:
            grade(ledger, "a", num_samples=4, num_passed=num_passed)
        with Difficulty(tmp_path / "d") as difficulty:
            assert difficulty.absorb(tmp_path / name) == 1
    with Difficulty(tmp_path / "d", read_only=True) as difficulty:
        assert totals(difficulty, "a") == (8, 5, 4, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "one", "two"], "nothing lies beside the file"


def _absorb_often(file: Path, run_dir: Path) -> None:
    for _ in range(10):
        with Difficulty(file) as difficulty:
            difficulty.absorb(run_dir)


def test_processes_that_absorb_the_same_ledgers_at_once_count_nothing_twice(tmp_path: Path) -> None:
    """Pins: a watermark that is read before the write lock is held."""
    for run in range(2):
        with Ledger(tmp_path / str(run)) as ledger:
            for _ in range(20):
                grade(ledger, "a", num_samples=2, num_passed=1)
    context = multiprocessing.get_context("fork")
    calls = [(tmp_path / "d", tmp_path / str(run)) for run in (0, 1, 0, 1)]
    children = [context.Process(target=_absorb_often, args=call) for call in calls]
    try:
        for child in children:
            child.start()
        for child in children:
            child.join(30)
            assert child.exitcode == 0
    finally:
        for child in children:
            child.kill()
    with Difficulty(tmp_path / "d", read_only=True) as difficulty:
        assert totals(difficulty, "a")[:2] == (80, 40)


CRASH = """
import os, signal, sys
from pathlib import Path
from buffer.difficulty import Difficulty
difficulty = Difficulty(Path(sys.argv[1]) / "d")
difficulty._db.set_trace_callback(lambda sql: sql.startswith("INSERT OR REPLACE") and os.kill(os.getpid(), 9))
difficulty.absorb(Path(sys.argv[1]))
"""


def test_a_process_killed_while_it_absorbs_leaves_all_or_nothing(tmp_path: Path) -> None:
    """Pins: statistics whose watermark was not written yet, and which count again at the next start."""
    with Ledger(tmp_path) as ledger:
        grade(ledger, "a", num_samples=4, num_passed=1)
    child = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], timeout=30, check=False)
    assert child.returncode == -9
    with Difficulty(tmp_path / "d") as difficulty:
        assert difficulty.get("a") is None
        assert difficulty.absorb(tmp_path) == 1
        assert totals(difficulty, "a") == (4, 1, 4, 1)


def test_pools_count_prompts_by_pass_at_k_and_find_the_hard_ones(tmp_path: Path) -> None:
    """Pins the second stage of GLM-4.5's curriculum: pass@8 = 0 and pass@512 > 0 must not be a band with pass@8 = 1."""
    records = {"hard": (16, 0), "rare": (1024, 1), "half": (8, 4), "easy": (8, 8), "new": (4, 4)}
    with Ledger(tmp_path) as ledger, Difficulty(tmp_path / "d") as difficulty:
        for uid, (num_samples, num_passed) in records.items():
            grade(ledger, uid, num_samples=num_samples, num_passed=num_passed)
        difficulty.absorb(tmp_path)
        assert difficulty.pools(k=8, bands=(0.0, 0.5, 0.99, 1.0)) == Pools(
            k=8, bands={0.0: 1, 0.5: 1, 0.99: 0, 1.0: 2}, num_unknown=1
        )
        assert difficulty.pools(k=1, bands=(0.0, 0.5, 0.99, 1.0)).bands == {0.0: 1, 0.5: 2, 0.99: 0, 1.0: 2}
        assert set(difficulty.uids(k=8, up_to=0.0)) == {"hard"}
        assert set(difficulty.uids(k=512, above=0.0)) == {"rare"}
        for wrong in ((), (0.5, 0.2, 1.0), (0.0, 0.5), (-0.5, 1.0)):
            with pytest.raises(ValueError, match="bands"):
                difficulty.pools(k=1, bands=wrong)


def test_files_that_are_none_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """Pins: a prompt file that is overwritten, and a run that ends with a bare SQLite error."""
    (tmp_path / "text").write_text("not a database, and longer than a header of one" * 50)
    with pytest.raises(StorageError, match=r"text.*file is not a database.*Restore it"):
        Difficulty(tmp_path / "text")
    with Ledger(tmp_path):
        pass
    with pytest.raises(LedgerError, match="without pass statistics"):
        Difficulty(tmp_path / "ledger.sqlite")
    with Difficulty(tmp_path / "d"):
        pass
    with sqlite3.connect(tmp_path / "d") as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(LedgerError, match="version 9; this slime reads version 1"):
        Difficulty(tmp_path / "d")
    for options in ({}, {"read_only": True}):
        with pytest.raises(StorageError, match="unable to open"):
            Difficulty(tmp_path / "nowhere" / "d", **options)


def test_a_file_that_may_not_be_written_is_refused_and_may_be_read(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger, Difficulty(tmp_path / "d") as difficulty:
        grade(ledger, "a", num_samples=4, num_passed=1)
        difficulty.absorb(tmp_path)
        grade(ledger, "a", num_samples=4, num_passed=1)
        with Difficulty(tmp_path / "d", read_only=True) as reader:
            assert totals(reader, "a") == (4, 1, 4, 1)
            with pytest.raises(StorageError, match=r"readonly database.*accessible"):
                reader.absorb(tmp_path)


def test_a_file_that_another_process_holds_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins: a shared file whose lock hangs a run."""
    monkeypatch.setattr("buffer.difficulty.BUSY_TIMEOUT_S", 0.1)
    with Ledger(tmp_path) as ledger, Difficulty(tmp_path / "d") as difficulty:
        grade(ledger, "a", num_samples=4, num_passed=1)
        holder = sqlite3.connect(tmp_path / "d", isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match=r"database is locked.*of its own"):
            difficulty.absorb(tmp_path)
        holder.close()
        assert difficulty.absorb(tmp_path) == 1, "what was missed is caught up"
