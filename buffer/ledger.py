"""The ledger: the durable fate of every prompt instance of a run, in SQLite.

Every method is one transaction. In WAL mode with ``synchronous=NORMAL`` it takes some 0.05 ms, a few ms when SQLite
folds its log into the file, and survives the death of the process. `commit` runs with ``FULL``: it waits for the disk
(about 10 ms) and makes everything before it survive a power loss. That is short enough for an event loop, so nothing
here is asynchronous. One process writes (`buffer.lock`); others may read meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from buffer import schema
from buffer.audit import Audit, audit_run
from buffer.schema import State
from slime.errors import LedgerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One row of the ledger: a prompt at its place in the run."""

    ordinal: int
    prompt_uid: str
    epoch: int
    attempt: int
    state: State
    step: int | None
    """The training step it is packed into."""
    reason: str
    """Why it was dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A point the run can be continued from."""

    step: int
    checkpoint: str
    state: dict[str, Any]


class Ledger:
    """Opens ``ledger.sqlite`` in the run directory, or creates it.

    Raises:
        LedgerError: from every method: the file cannot be read or written (a full disk), or the move is illegal.
            What was recorded before stands, and the failed call has changed nothing.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "ledger.sqlite"
        run_dir.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self._path, isolation_level=None, timeout=30.0)
        with self._reporting():
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._db.execute("PRAGMA journal_mode = WAL")
                schema.create(self._db)
            schema.check(self._db, self._path)
            self._db.execute("PRAGMA synchronous = NORMAL")
            row = self._db.execute("SELECT coalesce(max(ordinal) + 1, 0) FROM instances").fetchone()
            self._next_ordinal: int = row[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @property
    def next_ordinal(self) -> int:
        """The number of the instance that `issue` takes next: all before it have a fate or are on their way to one."""
        return self._next_ordinal

    def bind(self, key: str, value: str) -> None:
        """Tie the ledger to a fact of the run, such as the fingerprint of its prompts.

        Raises:
            LedgerError: it is tied to another value: what is recorded was made under that one.
        """
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
            (bound,) = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if bound != value:
            raise LedgerError(
                f"{self._path}: the {key} of this run changed: it began with ({bound}) and now has ({value}). "
                "Restore what it began with, or start anew in another run_dir."
            )

    def issue(self, prompt_uid: str, *, ordinal: int, epoch: int) -> None:
        """Record that a prompt takes the next place in the run."""
        if ordinal != self._next_ordinal:
            raise LedgerError(f"{self._path}: cannot issue ordinal {ordinal}; the next is {self._next_ordinal}")
        with self._transaction():
            self._db.execute(
                "INSERT INTO instances (ordinal, prompt_uid, epoch, attempt, state) VALUES (?, ?, ?, 0, ?)",
                (ordinal, prompt_uid, epoch, State.ISSUED),
            )
            self._record([(ordinal, 0)], State.ISSUED)
        self._next_ordinal += 1

    def start(self, ordinal: int, *, attempt: int) -> bool:
        """A rollout worker took the instance.

        Like `generated`, `graded`, `drop` and `requeue` it returns False for a report of an older attempt or one that
        is recorded already: that is counted as an event, and the caller discards what came with it.
        """
        return self._advance(ordinal, attempt, State.RUNNING)

    def generated(self, ordinal: int, *, attempt: int) -> bool:
        """Its samples are there."""
        return self._advance(ordinal, attempt, State.GENERATED)

    def graded(self, ordinal: int, *, attempt: int) -> bool:
        """Its samples have verdicts and are to be trained."""
        return self._advance(ordinal, attempt, State.GRADED)

    def drop(self, ordinal: int, *, attempt: int, reason: str) -> bool:
        """It will not be trained, for this reason, for good."""
        return self._advance(ordinal, attempt, State.DROPPED, detail=reason)

    def requeue(self, ordinal: int, *, attempt: int, reason: str) -> bool:
        """Give this attempt up: the instance waits to be issued again under the next one."""
        return self._advance(ordinal, attempt, schema.REQUEUED, detail=reason)

    def pack(self, ordinals: Sequence[int], *, step: int) -> None:
        """Make graded instances the batch of a step, all or none."""
        last = self.last_commit()
        if last is not None and step <= last.step:
            raise LedgerError(f"{self._path}: cannot pack into step {step}: step {last.step} is committed already")
        with self._transaction():
            for instance in [self._instance(ordinal) for ordinal in ordinals]:
                self._check_move(instance, State.PACKED)
                self._move([(instance.ordinal, instance.attempt)], State.PACKED, step=step)

    def commit(self, step: int, *, checkpoint: str, state: dict[str, Any]) -> None:
        """Commit everything packed up to `step` and make `checkpoint` the current one: the commit point of the run.

        The checkpoint must be on disk before. Until this returns the previous commit is the one that a run continues
        from; afterwards this one is.
        """
        body = json.dumps(state, allow_nan=False)
        with self._transaction(durable=True):
            last = self.last_commit()
            if last is not None and step <= last.step:
                raise LedgerError(f"{self._path}: cannot commit step {step} after step {last.step}")
            self._db.execute("INSERT INTO commits VALUES (?, ?, ?, ?)", (step, checkpoint, body, time.time()))
            packed = self._db.execute(
                "SELECT step, ordinal, attempt FROM instances WHERE state = 'packed' AND step <= ? ORDER BY ordinal",
                (step,),
            ).fetchall()
            for packed_step, ordinal, attempt in packed:
                self._move([(ordinal, attempt)], State.COMMITTED, step=packed_step)

    def last_commit(self) -> Commit | None:
        """What a run continues from; None when nothing is committed yet."""
        return next(iter(self.commits()), None)

    def commits(self) -> list[Commit]:
        """All commits, newest first."""
        with self._reporting():
            rows = self._db.execute("SELECT step, checkpoint, state FROM commits ORDER BY step DESC").fetchall()
        return [Commit(step=step, checkpoint=checkpoint, state=json.loads(state)) for step, checkpoint, state in rows]

    def revert(self, step: int, *, reason: str) -> None:
        """Go back to the commit of `step`: later ones are void, and what they committed waits to be issued again."""
        with self._transaction(durable=True):
            rows = self._db.execute(
                "SELECT ordinal, attempt FROM instances WHERE state = 'committed' AND step > ?", (step,)
            ).fetchall()
            self._move(rows, schema.REVERTED, detail=reason)
            self._db.execute("DELETE FROM commits WHERE step > ?", (step,))

    def recover(self) -> list[Instance]:
        """Requeue all that was on its way when the previous process ended. Returns what waits, in order of issue.

        A packed instance is requeued too: its step was not committed, so the weights that trained on it are gone.
        """
        with self._transaction():
            rows = self._db.execute(
                "SELECT ordinal, attempt FROM instances WHERE state IN ('running', 'generated', 'graded', 'packed')"
            ).fetchall()
            self._move(rows, schema.RECOVERED)
        return list(self._instances("WHERE state = 'issued' ORDER BY ordinal"))

    def instances(self) -> Iterator[Instance]:
        """Every instance, in order of issue."""
        return self._instances("ORDER BY ordinal")

    def counts(self) -> dict[State, int]:
        """How many instances stand where; states without any are there with 0."""
        with self._reporting():
            found = dict(self._db.execute("SELECT state, count(*) FROM instances GROUP BY state"))
        return {state: found.get(state, 0) for state in State}

    def drop_reasons(self) -> dict[str, int]:
        """How many instances were dropped for which reason."""
        with self._reporting():
            return dict(
                self._db.execute(
                    "SELECT reason, count(*) FROM instances WHERE state = 'dropped' GROUP BY reason"
                ).fetchall()
            )

    def audit(self) -> Audit:
        """Hold every fate against the event log; see `buffer.audit`."""
        return audit_run(self._path.parent)

    def _advance(self, ordinal: int, attempt: int, event: str, *, detail: str = "") -> bool:
        with self._transaction():
            instance = self._instance(ordinal)
            if attempt < instance.attempt:
                self._record([(ordinal, attempt)], schema.STALE, detail=event)
                return False
            if attempt == instance.attempt and instance.state in schema.REPEATS.get(event, ()):
                self._record([(ordinal, attempt)], schema.REPEATED, detail=event)
                return False
            if attempt > instance.attempt:
                raise LedgerError(f"{self._path}: {_name(instance)} has had no attempt {attempt}")
            self._check_move(instance, event)
            self._move([(ordinal, attempt)], event, detail=detail)
            return True

    def _check_move(self, instance: Instance, event: str) -> None:
        legal = schema.MAY_COME_FROM[event]
        if instance.state not in legal:
            raise LedgerError(
                f"{self._path}: {_name(instance)} is {instance.state} and cannot become {event}: "
                f"that takes {' or '.join(sorted(legal))}"
            )

    def _move(self, rows: Iterable[tuple[int, int]], event: str, *, step: int | None = None, detail: str = "") -> None:
        """Write the new state of ``(ordinal, attempt)`` rows and the event of each, inside the caller's transaction."""
        again = event in schema.ISSUED_AGAIN
        state, reason = (State.ISSUED, "") if again else (State(event), detail)
        moved = [(ordinal, attempt + again) for ordinal, attempt in rows]
        self._db.executemany(
            "UPDATE instances SET state = ?, step = ?, reason = ?, attempt = ? WHERE ordinal = ?",
            [(state, step, reason, attempt, ordinal) for ordinal, attempt in moved],
        )
        self._record(moved, event, step=step, detail=detail)

    def _record(
        self, rows: Iterable[tuple[int, int]], event: str, *, step: int | None = None, detail: str = ""
    ) -> None:
        now = time.time()
        self._db.executemany(
            "INSERT INTO events (time, ordinal, attempt, event, step, detail) VALUES (?, ?, ?, ?, ?, ?)",
            [(now, ordinal, attempt, event, step, detail) for ordinal, attempt in rows],
        )

    def _instance(self, ordinal: int) -> Instance:
        found = list(self._instances("WHERE ordinal = ?", ordinal))
        if not found:
            raise LedgerError(f"{self._path}: no instance {ordinal} was issued; the last is {self._next_ordinal - 1}")
        return found[0]

    def _instances(self, where: str, *values: Any) -> Iterator[Instance]:
        columns = "ordinal, prompt_uid, epoch, attempt, state, step, reason"
        for ordinal, uid, epoch, attempt, state, step, reason in self._db.execute(
            f"SELECT {columns} FROM instances {where}", values
        ):
            yield Instance(
                ordinal=ordinal,
                prompt_uid=uid,
                epoch=epoch,
                attempt=attempt,
                state=State(state),
                step=step,
                reason=reason,
            )

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[None]:
        with self._reporting():
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with self._db:  # commits, or rolls back when anything raises
                self._db.execute("BEGIN IMMEDIATE")
                yield

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(
                f"{self._path}: SQLite says: {error}. If the disk is full, make room and give the same command again: "
                "nothing recorded is lost. If the file is damaged, restore it from a copy, or choose another run_dir."
            ) from error


def _name(instance: Instance) -> str:
    return f"instance {instance.ordinal} (prompt {instance.prompt_uid}, attempt {instance.attempt})"
