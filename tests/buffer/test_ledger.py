"""The ledger against a model of it in memory, and its edges."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from buffer.ledger import Ledger
from buffer.policy import Versions
from slime.errors import LedgerError, StorageError


@dataclass
class Modelled:
    """What the ledger should know of one instance."""

    attempt: int = 0
    state: str = "issued"
    step: int | None = None
    reason: str = ""


LEGAL = {
    "start": {"issued"},
    "generated": {"running"},
    "graded": {"running", "generated"},
    "drop": {"issued", "running", "generated"},
    "requeue": {"running", "generated", "graded"},
}
BECOMES = {"start": "running", "generated": "generated", "graded": "graded", "drop": "dropped", "requeue": "issued"}
SENT_AGAIN = {
    "generated": {"generated"},
    "graded": {"graded", "packed", "committed"},
    "drop": {"dropped"},
}


class LedgerMachine(RuleBasedStateMachine):
    """Random calls, legal and illegal, late and repeated, with restarts in between.

    Pins: a move that is recorded and should not be, a late result that is trained, an instance that is lost, trained
    twice or packed into no step, and an audit that does not see it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.ledger = Ledger(Path(self.directory.name))
        self.model: list[Modelled] = []
        self.commits: list[int] = []
        self.stale = 0
        self.requeued = 0

    def teardown(self) -> None:
        self.ledger.close()
        self.directory.cleanup()

    @rule()
    def issue(self) -> None:
        ordinal = len(self.model)
        assert self.ledger.next_ordinal == ordinal
        assert self.ledger.issue(f"uid{ordinal}", epoch=ordinal // 3, position=ordinal) == ordinal
        self.model.append(Modelled())

    @rule()
    def a_failed_transaction(self) -> None:
        """Half of what belongs together must not stay, in the file or in memory."""
        with contextlib.suppress(ZeroDivisionError), self.ledger.together():
            self.ledger.issue("uid", epoch=0, position=len(self.model))
            self.ledger.start(len(self.model), attempt=0)
            raise ZeroDivisionError

    @precondition(lambda self: self.model)
    @rule(data=st.data(), call=st.sampled_from(sorted(LEGAL)), older=st.sampled_from([0, 0, 0, 0, 1, -1]))
    def report(self, data: st.DataObject, call: str, older: int) -> None:
        ordinal = data.draw(st.integers(0, len(self.model) - 1))
        instance = self.model[ordinal]
        attempt = instance.attempt - older
        arguments: dict[str, Any] = {"reason": f"{call} says so"} if call in ("drop", "requeue") else {}
        if call == "graded":
            arguments = {"payload": f"samples {attempt}".encode(), "versions": Versions(oldest=attempt, newest=attempt)}
        report = getattr(self.ledger, call)
        if attempt < 0:
            return
        if older == 1 or (older == 0 and instance.state in SENT_AGAIN.get(call, ())):
            assert report(ordinal, attempt=attempt, **arguments) is False
            self.stale += 1
        elif older == -1 or instance.state not in LEGAL[call]:
            with pytest.raises(LedgerError, match=f"instance {ordinal} "):
                report(ordinal, attempt=attempt, **arguments)
        else:
            assert report(ordinal, attempt=attempt, **arguments) is True
            instance.state = BECOMES[call]
            instance.reason = arguments["reason"] if call == "drop" else ""
            instance.attempt += call == "requeue"
            self.requeued += call == "requeue"

    @precondition(lambda self: self.model)
    @rule(data=st.data(), ahead=st.integers(0, 3))
    def pack(self, data: st.DataObject, ahead: int) -> None:
        step = max(self.commits, default=0) + ahead
        ordinals = data.draw(st.lists(st.integers(0, len(self.model) - 1), unique=True, min_size=1, max_size=4))
        graded = all(self.model[ordinal].state == "graded" for ordinal in ordinals)
        if not graded or (self.commits and ahead == 0):
            with pytest.raises(LedgerError, match="cannot"):
                self.ledger.pack(ordinals, step=step)
            return
        self.ledger.pack(ordinals, step=step)
        for ordinal in ordinals:
            self.model[ordinal].state, self.model[ordinal].step = "packed", step

    @rule(ahead=st.integers(0, 2))
    def commit(self, ahead: int) -> None:
        step = max(self.commits, default=0) + ahead
        if self.commits and ahead == 0:
            with pytest.raises(LedgerError, match="cannot commit"):
                self.ledger.commit(step, checkpoint="again", state={})
            return
        self.ledger.commit(step, checkpoint=f"step_{step}", state={"rng": [step, 0.5]})
        self.commits.append(step)
        for instance in self.model:
            if instance.state == "packed" and instance.step is not None and instance.step <= step:
                instance.state = "committed"

    @rule()
    def restart(self) -> None:
        """A kill leaves the same file: every call is one transaction, and none is open between two calls."""
        self.ledger.close()
        self.ledger = Ledger(Path(self.directory.name))
        self.ledger.recover()
        for instance in self.model:
            if instance.state in ("running", "generated"):
                instance.attempt, instance.state = instance.attempt + 1, "issued"
                self.requeued += 1
            if instance.state == "packed":
                instance.state, instance.step = "graded", None
        still_open = [n for n, instance in enumerate(self.model) if instance.state not in ("committed", "dropped")]
        assert [instance.ordinal for instance in self.ledger.open_instances()] == still_open

    @invariant()
    def the_ledger_is_the_model(self) -> None:
        stored = [
            Modelled(attempt=row.attempt, state=row.state.value, step=row.step, reason=row.reason)
            for row in self.ledger.instances()
        ]
        assert stored == self.model
        for row in self.ledger.instances():
            held = row.state.value in ("graded", "packed")
            assert self.ledger.payload(row.ordinal) == (f"samples {row.attempt}".encode() if held else None)
            if held:
                assert row.versions == Versions(oldest=row.attempt, newest=row.attempt)
        last = self.ledger.last_commit()
        assert (last.step if last else None) == (self.commits[-1] if self.commits else None)
        if last:
            assert (last.checkpoint, last.state) == (f"step_{last.step}", {"rng": [last.step, 0.5]})

    @invariant()
    def the_books_hold(self) -> None:
        audit = self.ledger.audit()
        states = [instance.state for instance in self.model]
        assert audit.holds, str(audit)
        assert audit.num_issued == len(self.model)
        assert audit.num_committed == states.count("committed")
        assert sum(audit.dropped.values()) == states.count("dropped")
        assert audit.num_issued == audit.num_committed + sum(audit.dropped.values()) + sum(audit.in_flight.values())
        assert (audit.num_stale, audit.num_requeued) == (self.stale, self.requeued)


TestLedgerAgainstItsModel = LedgerMachine.TestCase
TestLedgerAgainstItsModel.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with Ledger(tmp_path) as ledger:
        yield ledger


def grade(ledger: Ledger, ordinal: int) -> None:
    ledger.issue(f"uid{ordinal}", epoch=0, position=ordinal)
    ledger.start(ordinal, attempt=0)
    ledger.graded(ordinal, attempt=0, payload=b"samples", versions=Versions(oldest=0, newest=0))


def test_packing_is_all_or_nothing(ledger: Ledger) -> None:
    """Pins: a batch of which half is packed when one of its groups is not graded."""
    grade(ledger, 0)
    ledger.issue("uid1", epoch=0, position=1)
    with pytest.raises(LedgerError, match=r"instance 1 .* is issued and cannot become packed: that takes graded"):
        ledger.pack([0, 1], step=1)
    assert [instance.state.value for instance in ledger.instances()] == ["graded", "issued"]
    assert ledger.audit().holds


def test_a_commit_takes_nothing_of_later_steps(ledger: Ledger) -> None:
    """Pins: an asynchronous run that commits groups its checkpoint has not trained on yet."""
    for ordinal in range(3):
        grade(ledger, ordinal)
        ledger.pack([ordinal], step=ordinal + 1)
    ledger.commit(2, checkpoint="step_2", state={})
    assert [instance.state.value for instance in ledger.instances()] == ["committed", "committed", "packed"]
    assert [instance.ordinal for instance in ledger.release()] == [2]
    assert [ledger.payload(ordinal) for ordinal in range(3)] == [None, None, b"samples"]


def test_an_event_cannot_be_changed_or_removed(ledger: Ledger, tmp_path: Path) -> None:
    ledger.issue("uid0", epoch=0, position=0)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as other:
        for statement in ("DELETE FROM events", "UPDATE events SET attempt = 7"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                other.execute(statement)


def test_an_unknown_instance_is_named(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="no instance 4 was issued"):
        ledger.start(4, attempt=0)


def test_a_run_is_not_continued_over_other_facts(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.bind("order of prompts", "20 prompts, a")
        ledger.bind("order of prompts", "20 prompts, a")
    with Ledger(tmp_path) as ledger, pytest.raises(LedgerError, match=r"began with \(20 prompts, a\).*or start anew"):
        ledger.bind("order of prompts", "21 prompts, b")


def test_another_version_and_another_file_are_refused(tmp_path: Path) -> None:
    """Pins: a newer ledger read with today's meaning of its columns, and a foreign database filled with our tables."""
    with Ledger(tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as other:
        other.execute("PRAGMA user_version = 1")
    with pytest.raises(LedgerError, match="version 1; this slime reads version 2"):
        Ledger(tmp_path)
    for name, content in (("foreign", b""), ("text", b"this is no database, but longer than a header " * 40)):
        run_dir = tmp_path / name
        run_dir.mkdir()
        (run_dir / "ledger.sqlite").write_bytes(content)
        if not content:
            with closing(sqlite3.connect(run_dir / "ledger.sqlite")) as other:
                other.execute("CREATE TABLE theirs (x)")
        before = (run_dir / "ledger.sqlite").read_bytes()
        with pytest.raises(LedgerError, match=r"no ledger|not a database"):
            Ledger(run_dir)
        assert (run_dir / "ledger.sqlite").read_bytes() == before


FILL = """
import resource, sys
from pathlib import Path
from buffer.ledger import Ledger
from buffer.policy import Versions
from slime.errors import LedgerError, StorageError
ledger = Ledger(Path(sys.argv[1]))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
try:
    for ordinal in range(100_000):
        print(ledger.issue("uid", epoch=0, position=ordinal))
except LedgerError as error:
    assert "make room" in str(error), error
else:
    raise SystemExit("the limit never struck")
assert ledger.next_ordinal == ordinal
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
print(ledger.issue("uid", epoch=0, position=ordinal))
"""


def test_a_full_disk_loses_nothing_and_the_ledger_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """Pins: an instance that memory believes issued and the disk does not have. The limit is real."""
    child = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
    acknowledged = [int(line) for line in child.stdout.split()]
    with Ledger(tmp_path) as ledger:
        assert [instance.ordinal for instance in ledger.instances()] == acknowledged == list(range(len(acknowledged)))
        assert ledger.audit().holds


def test_a_ledger_that_is_removed_while_in_use_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins: a file without a name that takes every write, all of which are gone when the process ends."""
    monkeypatch.setattr("buffer.storage.LOOK_EVERY_S", -1.0)
    with Ledger(tmp_path) as ledger:
        ledger.issue("uid", epoch=0, position=0)
        away = (tmp_path / "ledger.sqlite").rename(tmp_path / "away")
        with pytest.raises(StorageError, match="removed or replaced"):
            ledger.issue("uid", epoch=0, position=1)
        away.rename(tmp_path / "ledger.sqlite")
        assert ledger.issue("uid", epoch=0, position=1) == 1


def test_a_locked_ledger_is_not_called_a_full_disk(tmp_path: Path) -> None:
    """Pins: a user who looks for room on the disk while a forgotten shell holds the file."""
    with Ledger(tmp_path, lock_timeout_s=0.01) as ledger, sqlite3.connect(tmp_path / "ledger.sqlite") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="Another process holds the file"):
            ledger.issue("uid", epoch=0, position=0)
    other.close()
