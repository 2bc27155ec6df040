"""The ledger: the durable fate of every prompt instance of a run, in SQLite.

Every method is one transaction, or part of the one that `together` holds open. In WAL mode with ``synchronous=NORMAL``
it takes some 0.05 ms, a few ms when SQLite folds its log into the file, and survives the death of the process. `commit`
runs with ``FULL``: it waits for the disk (about 10 ms) and makes everything before it survive a power loss. That is
short enough for an event loop, so nothing here is asynchronous. One process writes (`buffer.lock`); others may read
meanwhile.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from buffer import schema
from buffer.books.audit import Audit, audit_run
from buffer.policy import Versions
from buffer.records import Commit, Instance, Outcome, Pushed, select_instances
from buffer.schema import State
from buffer.storage import LedgerFile
from slime.errors import LedgerError

_INSERT_EVENT = "INSERT INTO events (time, ordinal, attempt, event, step, detail) VALUES (?, ?, ?, ?, ?, ?)"
_INSERT_OUTCOME = (
    "INSERT OR IGNORE INTO outcomes (ordinal, attempt, prompt_uid, version, num_samples, num_passed, reward_mean, "
    "response_tokens_mean, dropped) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


class Ledger(LedgerFile):
    """The moves of prompt instances, and what is known of each.

    Raises:
        LedgerError: from every method: the move is illegal, or (StorageError) the file cannot be written, as when the
            disk is full. What was recorded before stands, and the failed call has changed nothing.
    """

    def _reread(self) -> None:
        last = "SELECT coalesce(max(ordinal) + 1, 0), coalesce(max(position) + 1, 0) FROM instances"
        ordinal, position = self._db.execute(last).fetchone()
        self._next_ordinal: int = ordinal
        self._next_position: int = position

    @property
    def next_ordinal(self) -> int:
        """The number of the instance that `issue` takes next: all before it have a fate or are on their way to one."""
        return self._next_ordinal

    @property
    def next_position(self) -> int:
        """The place in the order of prompts that is issued next."""
        return self._next_position

    def issue(self, prompt_uid: str, *, epoch: int, position: int | None, request: str | None = None) -> int:
        """Record that a prompt takes the next place in the run. Returns its ordinal.

        Args:
            position: its place in the order of prompts; None for a prompt that is pushed from outside.
            request: a name for the request that asked for it, by which `of_request` finds it again.
        """
        ordinal = self._next_ordinal
        with self._transaction():
            self._db.execute(
                "INSERT INTO instances (ordinal, prompt_uid, epoch, position, attempt, state, request) "
                "VALUES (?, ?, ?, ?, 0, ?, ?)",
                (ordinal, prompt_uid, epoch, position, State.ISSUED, request),
            )
            self._record([(ordinal, 0)], State.ISSUED)
        self._next_ordinal += 1
        if position is not None:
            self._next_position = position + 1
        return ordinal

    def push(self, groups: Sequence[Pushed]) -> list[int]:
        """Record groups that were rolled out elsewhere, as issued, run and graded at once. Returns their ordinals.

        For each, the same rows are written as by `issue`, `start` and `graded`.
        """
        now = time.time()
        ordinals = list(range(self._next_ordinal, self._next_ordinal + len(groups)))
        with self._transaction():
            self._db.executemany(
                "INSERT INTO instances (ordinal, prompt_uid, epoch, attempt, state, oldest_version, newest_version, "
                "request) VALUES (?, ?, 0, 0, 'graded', ?, ?, ?)",
                [
                    (ordinal, group.prompt_uid, group.versions.oldest, group.versions.newest, group.request)
                    for ordinal, group in zip(ordinals, groups, strict=True)
                ],
            )
            self._db.executemany(
                "INSERT INTO payloads VALUES (?, ?)",
                [(ordinal, group.payload) for ordinal, group in zip(ordinals, groups, strict=True)],
            )
            self._db.executemany(
                _INSERT_EVENT,
                [
                    (now, ordinal, 0, event, None, "")
                    for ordinal in ordinals
                    for event in (State.ISSUED, State.RUNNING, State.GRADED)
                ],
            )
            self._db.executemany(
                _INSERT_OUTCOME,
                [
                    (ordinal, 0, group.prompt_uid, group.versions.oldest, *group.outcome.row(), "")
                    for ordinal, group in zip(ordinals, groups, strict=True)
                    if group.outcome
                ],
            )
        self._next_ordinal += len(groups)
        return ordinals

    def ordinal_of(self, request: str) -> int | None:
        """The instance that an earlier request of this name was answered with, by its number."""
        with self._reporting():
            row = self._db.execute("SELECT ordinal FROM instances WHERE request = ?", (request,)).fetchone()
        return row[0] if row else None

    def of_request(self, request: str) -> Instance | None:
        """The instance that an earlier request of this name was answered with."""
        with self._reporting():
            return next(select_instances(self._db, "WHERE request = ?", request), None)

    def start(self, ordinal: int, *, attempt: int, version: int = 0, request: str | None = None) -> bool:
        """A rollout worker took the instance, with the request of this name, when `version` was published.

        Like `generated`, `graded`, `drop` and `requeue` it returns False for a report of an older attempt or one that
        is recorded already: that is counted as an event, and the caller discards what came with it.
        """
        with self._transaction():
            started = self._advance(ordinal, attempt, State.RUNNING)
            if started:
                self._db.execute("UPDATE instances SET request = NULL WHERE request = ?", (request,))
                self._db.execute(
                    "UPDATE instances SET request = ?, oldest_version = ?, newest_version = ? WHERE ordinal = ?",
                    (request, version, version, ordinal),
                )
            return started

    def generated(self, ordinal: int, *, attempt: int) -> bool:
        """Its samples are there."""
        return self._advance(ordinal, attempt, State.GENERATED)

    def graded(
        self, ordinal: int, *, attempt: int, payload: bytes, versions: Versions, outcome: Outcome | None = None
    ) -> bool:
        """Its samples have verdicts and are to be trained: `payload` keeps them until they are."""
        with self._transaction():
            graded = self._advance(ordinal, attempt, State.GRADED)
            if graded:
                self._db.execute("INSERT OR REPLACE INTO payloads VALUES (?, ?)", (ordinal, payload))
                self._db.execute(
                    "UPDATE instances SET oldest_version = ?, newest_version = ? WHERE ordinal = ?",
                    (versions.oldest, versions.newest, ordinal),
                )
                self._note(ordinal, attempt, outcome, version=versions.oldest)
            return graded

    def drop(self, ordinal: int, *, attempt: int, reason: str, outcome: Outcome | None = None) -> bool:
        """It will not be trained, for this reason, for good."""
        with self._transaction():
            dropped = self._advance(ordinal, attempt, State.DROPPED, detail=reason)
            if dropped:
                self._forget([ordinal])
                self._note(ordinal, attempt, outcome, dropped=reason)
            return dropped

    def requeue(self, ordinal: int, *, attempt: int, reason: str, partial: bytes | None = None) -> bool:
        """Give this attempt up: the instance waits to be issued again under the next one.

        Args:
            partial: samples the next attempt begins with.
        """
        with self._transaction():
            requeued = self._advance(ordinal, attempt, schema.REQUEUED, detail=reason)
            if requeued:
                self._forget([ordinal])
                if partial is not None:
                    self._db.execute("INSERT INTO payloads VALUES (?, ?)", (ordinal, partial))
            return requeued

    def num_requeues(self, ordinal: int) -> int:
        """How often an instance was given back, by whatever process."""
        with self._reporting():
            (count,) = self._db.execute(
                "SELECT count(*) FROM events WHERE ordinal = ? AND event = ?", (ordinal, schema.REQUEUED)
            ).fetchone()
        return int(count)

    def payload(self, ordinal: int) -> bytes | None:
        """The samples of a graded or packed instance, or those a waiting or running one begins with."""
        with self._reporting():
            row = self._db.execute("SELECT body FROM payloads WHERE ordinal = ?", (ordinal,)).fetchone()
        return row[0] if row else None

    def _forget(self, ordinals: Iterable[int]) -> None:
        self._db.executemany("DELETE FROM payloads WHERE ordinal = ?", [(ordinal,) for ordinal in ordinals])

    def _note(
        self, ordinal: int, attempt: int, outcome: Outcome | None, *, version: int | None = None, dropped: str = ""
    ) -> None:
        if outcome is None:
            return
        prompt_uid = self.instance(ordinal).prompt_uid
        self._db.execute(_INSERT_OUTCOME, (ordinal, attempt, prompt_uid, version, *outcome.row(), dropped))

    def pack(self, ordinals: Sequence[int], *, step: int) -> None:
        """Make graded instances the batch of a step, all or none."""
        last = self.last_commit()
        if last is not None and step <= last.step:
            raise LedgerError(f"{self._path}: cannot pack into step {step}: step {last.step} is committed already")
        with self._transaction():
            for instance in [self.instance(ordinal) for ordinal in ordinals]:
                self._check_move(instance, State.PACKED)
                self._move([(instance.ordinal, instance.attempt)], State.PACKED, step=step)

    def release(self) -> list[Instance]:
        """Unpack every step that is not committed: whoever trained it is gone. Returns what is graded again."""
        with self._transaction():
            packed = list(select_instances(self._db, "WHERE state = 'packed' ORDER BY ordinal"))
            self._move([(instance.ordinal, instance.attempt) for instance in packed], schema.RELEASED)
        return packed

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
            self._forget(ordinal for _, ordinal, _ in packed)

    def next_consumer(self) -> int:
        """The incarnation of a new consumer: counts from 1, and no number is given twice."""
        with self._transaction():
            (number,) = self._db.execute(
                "INSERT INTO meta VALUES (?, '1') ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1 "
                "RETURNING CAST(value AS INTEGER)",
                (schema.CONSUMER,),
            ).fetchone()
        return int(number)

    def last_commit(self) -> Commit | None:
        """What a run continues from; None when nothing is committed yet."""
        return next(iter(self.commits(limit=1)), None)

    def commits(self, *, limit: int = -1) -> list[Commit]:
        """All commits, or the last so many; newest first."""
        query = "SELECT step, checkpoint, state FROM commits ORDER BY step DESC LIMIT ?"
        with self._reporting():
            rows = self._db.execute(query, (limit,)).fetchall()
        return [Commit(step=step, checkpoint=checkpoint, state=json.loads(state)) for step, checkpoint, state in rows]

    def revert(self, step: int, *, reason: str) -> None:
        """Go back to the commit of `step`: later ones are void, and what they committed waits to be issued again."""
        with self._transaction(durable=True):
            rows = self._db.execute(
                "SELECT ordinal, attempt FROM instances WHERE state = 'committed' AND step > ?", (step,)
            ).fetchall()
            self._move(rows, schema.REVERTED, detail=reason)
            self._db.execute("DELETE FROM commits WHERE step > ?", (step,))

    def recover(self) -> None:
        """Requeue all that the previous process had in hand when it ended, and unpack what it had not committed.

        What is graded stays: its samples are in the ledger, and as good as before.
        """
        with self._transaction():
            rows = self._db.execute(
                "SELECT ordinal, attempt FROM instances WHERE state IN ('running', 'generated')"
            ).fetchall()
            self._move(rows, schema.RECOVERED)
            self.release()

    def open_instances(self) -> Iterator[Instance]:
        """Every instance that is neither committed nor dropped, in order of issue."""
        return select_instances(self._db, "WHERE state NOT IN ('committed', 'dropped') ORDER BY ordinal")

    def partial_ordinals(self) -> set[int]:
        """The instances to be issued again that have samples to begin with."""
        with self._reporting():
            rows = self._db.execute(
                "SELECT ordinal FROM payloads JOIN instances USING (ordinal) WHERE state = 'issued'"
            ).fetchall()
        return {ordinal for (ordinal,) in rows}

    def instances(self) -> Iterator[Instance]:
        """Every instance, in order of issue."""
        return select_instances(self._db, "ORDER BY ordinal")

    def instances_of(self, prompt_uid: str) -> list[Instance]:
        """Every instance of a prompt, in order of issue."""
        return list(select_instances(self._db, "WHERE prompt_uid = ? ORDER BY ordinal", prompt_uid))

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
        """Hold every fate against the event log; see `buffer.books.audit`."""
        return audit_run(self._path.parent)

    def _advance(self, ordinal: int, attempt: int, event: str, *, detail: str = "") -> bool:
        with self._transaction():
            instance = self.instance(ordinal)
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
        state, reason = (schema.leads_to(event), "" if again else detail)
        moved = [(ordinal, attempt + again) for ordinal, attempt in rows]
        self._db.executemany(
            "UPDATE instances SET state = ?, step = ?, reason = ?, attempt = ? WHERE ordinal = ?",
            [(state, step, reason, attempt, ordinal) for ordinal, attempt in moved],
        )
        if again:
            self._db.executemany(
                "UPDATE instances SET oldest_version = NULL, newest_version = NULL WHERE ordinal = ?",
                [(ordinal,) for ordinal, _ in moved],
            )
        self._record(moved, event, step=step, detail=detail)

    def _record(
        self, rows: Iterable[tuple[int, int]], event: str, *, step: int | None = None, detail: str = ""
    ) -> None:
        now = time.time()
        self._db.executemany(
            _INSERT_EVENT,
            [(now, ordinal, attempt, event, step, detail) for ordinal, attempt in rows],
        )

    def instance(self, ordinal: int) -> Instance:
        """Where one stands."""
        found = list(select_instances(self._db, "WHERE ordinal = ?", ordinal))
        if not found:
            raise LedgerError(f"{self._path}: no instance {ordinal} was issued; the last is {self._next_ordinal - 1}")
        return found[0]


def _name(instance: Instance) -> str:
    return f"instance {instance.ordinal} (prompt {instance.prompt_uid}, attempt {instance.attempt})"
