"""The audit finds every way in which the books can fail to add up: each one is made here, and it must see it."""

from __future__ import annotations

import contextlib
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from buffer.books.audit import Audit, audit_run
from buffer.ledger import Ledger
from buffer.policy import Versions
from slime.errors import LedgerError

SAMPLES: dict[str, Any] = {"payload": b"samples", "versions": Versions(oldest=0, newest=0)}
"""What `graded` is told beside the instance."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Ordinals 0 and 1 committed in step 1, 2 dropped, 3 packed into step 2, 4 running at attempt 1, 5 issued."""
    with Ledger(tmp_path) as ledger:
        for ordinal in range(6):
            ledger.issue(f"uid{ordinal}", epoch=0, position=ordinal)
        for ordinal in range(5):
            ledger.start(ordinal, attempt=0)
        for ordinal in (0, 1, 3):
            ledger.generated(ordinal, attempt=0)
            ledger.graded(ordinal, attempt=0, **SAMPLES)
        ledger.pack([0, 1], step=1)
        ledger.commit(1, checkpoint="step_1", state={})
        ledger.drop(2, attempt=0, reason="too long")
        ledger.pack([3], step=2)
        ledger.requeue(4, attempt=0, reason="engine died")
        ledger.start(4, attempt=1)
        ledger.graded(4, attempt=0, **SAMPLES)
    return tmp_path


def tamper(run_dir: Path, *statements: str) -> Audit:
    with closing(sqlite3.connect(run_dir / "ledger.sqlite", isolation_level=None)) as db:
        db.execute("DROP TRIGGER IF EXISTS events_stay")
        for statement in statements:
            db.execute(statement)
    return audit_run(run_dir)


def event(ordinal: int, attempt: int, event: str, step: str = "NULL") -> str:
    return (
        f"INSERT INTO events (time, ordinal, attempt, event, step) VALUES (0, {ordinal}, {attempt}, '{event}', {step})"
    )


def test_a_sound_ledger_adds_up(run_dir: Path) -> None:
    audit = audit_run(run_dir)
    assert audit.holds
    assert str(audit) == (
        "issued 6 = committed 2 + dropped 1 + in flight 3 (issued 1, running 1, packed 1)\n"
        "lost 0 duplicated 0 unaccounted 0\n"
        "dropped: too long 1; requeued 1, late results discarded 1"
    )


def test_an_instance_that_vanished_is_lost(run_dir: Path) -> None:
    audit = tamper(run_dir, "DELETE FROM instances WHERE ordinal = 5")
    assert (audit.lost, audit.unaccounted, audit.holds) == ((5,), (), False)


def test_a_group_committed_twice_is_duplicated(run_dir: Path) -> None:
    audit = tamper(run_dir, event(0, 0, "committed", "1"))
    assert audit.duplicated == (0,)
    assert audit.problems == ("instance 0: committed at attempt 0 came after committed, attempt 0",)


def test_a_group_both_dropped_and_committed_is_duplicated(run_dir: Path) -> None:
    audit = tamper(
        run_dir, event(2, 0, "committed", "1"), "UPDATE instances SET state = 'committed', step = 1 WHERE ordinal = 2"
    )
    assert audit.duplicated == (2,)


@pytest.mark.parametrize(
    ("statement", "ordinal"),
    [
        ("UPDATE instances SET state = 'committed', step = 1 WHERE ordinal = 5", 5),
        ("UPDATE instances SET attempt = 0 WHERE ordinal = 4", 4),
        ("UPDATE instances SET reason = 'forged' WHERE ordinal = 2", 2),
        ("UPDATE instances SET step = 7 WHERE ordinal = 3", 3),
        ("DELETE FROM events WHERE ordinal = 1", 1),
    ],
)
def test_a_fate_that_the_log_does_not_explain_is_unaccounted(run_dir: Path, statement: str, ordinal: int) -> None:
    audit = tamper(run_dir, statement)
    assert audit.unaccounted == (ordinal,)
    assert not audit.holds


def test_a_gap_in_the_numbering_is_unaccounted(run_dir: Path) -> None:
    audit = tamper(run_dir, "DELETE FROM instances WHERE ordinal = 2", "DELETE FROM events WHERE ordinal = 2")
    assert audit.unaccounted == (2,)


@pytest.mark.parametrize(
    ("forged", "said"),
    [
        (event(5, 0, "packed", "2"), "instance 5: packed at attempt 0 came after issued"),
        (event(4, 2, "graded"), "instance 4: graded at attempt 2 came after running, attempt 1"),
        (event(4, 1, "requeued"), "instance 4: requeued at attempt 1 came after running, attempt 1"),
        (event(3, 0, "issued"), "instance 3: issued at attempt 0 came after packed"),
        (event(9, 0, "running"), "instance 9: running at attempt 0 came after nothing"),
        (event(5, 0, "teleported"), "instance 5: teleported at attempt 0 came after issued"),
    ],
)
def test_an_illegal_move_in_the_log_is_a_problem(run_dir: Path, forged: str, said: str) -> None:
    assert said in "\n".join(tamper(run_dir, forged).problems)


def test_commits_and_instances_must_tell_the_same_story(run_dir: Path) -> None:
    """Pins: a checkpoint that is current while the groups it trained on would be trained again, and the reverse."""
    audit = tamper(run_dir, "INSERT INTO commits VALUES (2, 'step_2', '{}', 0)")
    assert audit.problems == ("instance 3: still only packed into step 2, which is committed",)
    with closing(sqlite3.connect(run_dir / "ledger.sqlite", isolation_level=None)) as db:
        db.execute("DELETE FROM commits")
    assert len(audit_run(run_dir).problems) == 2


def test_a_damaged_file_is_refused_or_reported(run_dir: Path) -> None:
    path = run_dir / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    page_bytes = 4096
    for page in range(1, len(content) // page_bytes):
        torn = content.copy()
        torn[page * page_bytes : page * page_bytes + 64] = b"\xff" * 64
        path.write_bytes(torn)
        with contextlib.suppress(LedgerError):
            assert not audit_run(run_dir).holds, f"page {page} was destroyed unseen"


def test_a_directory_without_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no such ledger"):
        audit_run(tmp_path)


def test_a_run_can_be_audited_while_it_writes(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.issue("uid0", epoch=0, position=0)
        assert audit_run(tmp_path).num_issued == 1
        ledger.issue("uid1", epoch=0, position=1)
        assert audit_run(tmp_path).num_issued == 2


def test_samples_that_vanished_are_lost(run_dir: Path) -> None:
    """Pins: a finished group whose tokens are gone, and a step that cannot be filled with what was acknowledged."""
    assert tamper(run_dir, "DELETE FROM payloads WHERE ordinal = 3").lost == (3,)


def test_a_group_trained_beyond_the_bound_is_a_problem(run_dir: Path) -> None:
    bound = "INSERT INTO meta VALUES ('max_staleness', '1')"
    late = "UPDATE instances SET oldest_version = -2 WHERE ordinal = 1"
    assert tamper(run_dir, bound).holds
    assert tamper(run_dir, late).problems == ("instance 1: trained 2 versions after its oldest token",)
