"""`slime audit`: hold where every instance stands against how it came there.

The event log is replayed on its own, with the legal moves of `buffer.schema`, and its end compared with the table of
instances.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from buffer import schema
from buffer.books.reading import read_ledger
from buffer.schema import State

IN_FLIGHT = (State.ISSUED, State.RUNNING, State.GENERATED, State.GRADED, State.PACKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRow:
    """An instance as its table has it."""

    ordinal: int
    attempt: int
    state: str
    step: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """One entry of the log."""

    ordinal: int
    attempt: int
    event: str
    step: int | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The books of a run: ``num_issued = num_committed + sum(dropped) + sum(in_flight)``, or `problems` says why
    not."""

    num_issued: int
    """Instances the log saw issued."""
    num_committed: int
    dropped: dict[str, int]
    """By reason."""
    in_flight: dict[str, int]
    """By state."""
    num_requeued: int
    num_stale: int
    """Results of older attempts, and results sent twice: discarded."""
    lost: tuple[int, ...]
    """Issued by the log and not in the table, or graded and without its samples."""
    duplicated: tuple[int, ...]
    """Committed twice, or committed and dropped."""
    unaccounted: tuple[int, ...]
    """In the table with another state, attempt, step or reason than the log leads to, or skipped by the numbering."""
    problems: tuple[str, ...] = ()
    """Everything that does not add up, in words; the first hundred."""

    @property
    def holds(self) -> bool:
        """Whether everything adds up."""
        return not (self.lost or self.duplicated or self.unaccounted or self.problems)

    def __str__(self) -> str:
        dropped = ", ".join(f"{_shown(reason)} {count}" for reason, count in sorted(self.dropped.items()))
        in_flight = ", ".join(f"{state} {count}" for state, count in self.in_flight.items())
        lines = [
            f"issued {self.num_issued} = committed {self.num_committed} + dropped {sum(self.dropped.values())}"
            f" + in flight {sum(self.in_flight.values())}" + (f" ({in_flight})" if in_flight else ""),
            f"lost {len(self.lost)} duplicated {len(self.duplicated)} unaccounted {len(self.unaccounted)}",
            f"dropped: {dropped or 'none'}; requeued {self.num_requeued}, late results discarded {self.num_stale}",
        ]
        return "\n".join([*lines, *(f"problem: {_shown(problem)}" for problem in self.problems)])


def audit_run(run_dir: Path) -> Audit:
    """Audit the ledger of a run, which may be going on meanwhile.

    Raises:
        LedgerError: there is no ledger, or it cannot be read.
    """
    with read_ledger(run_dir) as db:
        instances = [
            InstanceRow(ordinal=ordinal, attempt=attempt, state=state, step=step, reason=reason)
            for ordinal, attempt, state, step, reason in db.execute(
                "SELECT ordinal, attempt, state, step, reason FROM instances ORDER BY ordinal"
            )
        ]
        events = (
            EventRow(ordinal=ordinal, attempt=attempt, event=event, step=step, detail=detail)
            for ordinal, attempt, event, step, detail in db.execute(
                "SELECT ordinal, attempt, event, step, detail FROM events ORDER BY seq"
            )
        )
        commits = [step for (step,) in db.execute("SELECT step FROM commits ORDER BY step")]
        damage = [line for (line,) in db.execute("PRAGMA quick_check") if line != "ok"]
        audit = audit_history(instances, events, commits=commits, damage=[*damage, *_too_stale(db)])
        return replace(audit, lost=tuple(sorted({*audit.lost, *_without_samples(db)})))


def _shown(text: str) -> str:
    """On one line of a terminal: reasons come from hooks and over HTTP, and must not pass for lines of the audit."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _too_stale(db: sqlite3.Connection) -> list[str]:
    """Committed groups older than the bound: step n is taken by version n - 1."""
    rows = db.execute(
        "SELECT ordinal, step - 1 - oldest_version AS staleness FROM instances, meta WHERE state = 'committed' "
        "AND key = ? AND staleness > CAST(value AS INTEGER) ORDER BY ordinal",
        (schema.MAX_STALENESS,),
    )
    return [f"instance {ordinal}: trained {staleness} versions after its oldest token" for ordinal, staleness in rows]


def _without_samples(db: sqlite3.Connection) -> list[int]:
    rows = db.execute(
        "SELECT ordinal FROM instances LEFT JOIN payloads USING (ordinal) "
        "WHERE state IN ('graded', 'packed') AND body IS NULL"
    )
    return [ordinal for (ordinal,) in rows]


def audit_history(
    instances: Iterable[InstanceRow], events: Iterable[EventRow], *, commits: Iterable[int], damage: Iterable[str] = ()
) -> Audit:
    """Compare a table with its log; pure. `commits` are the committed steps, `damage` what SQLite itself found."""
    table = {row.ordinal: row for row in instances}
    replay = _Replay()
    for event in events:
        replay.apply(event)
    problems = [*damage, *replay.problems, *_check_steps(table.values(), last=max(commits, default=None))]
    lost = tuple(sorted(replay.rows.keys() - table.keys()))
    numbered = sorted(table.keys() | set(range(max(table, default=-1) + 1)) - set(lost))
    unaccounted = tuple(n for n in numbered if n not in table or table[n] != replay.rows.get(n))
    return Audit(
        num_issued=len(replay.rows),
        num_committed=sum(row.state == State.COMMITTED for row in table.values()),
        dropped=dict(Counter(row.reason for row in table.values() if row.state == State.DROPPED)),
        in_flight={state: n for state in IN_FLIGHT if (n := sum(row.state == state for row in table.values()))},
        num_requeued=replay.num_requeued,
        num_stale=replay.num_stale,
        lost=lost,
        duplicated=tuple(sorted(replay.duplicated)),
        unaccounted=unaccounted,
        problems=tuple(problems[:100]),
    )


@dataclass(slots=True)
class _Replay:
    """The log, applied event by event."""

    rows: dict[int, InstanceRow] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    duplicated: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    num_requeued: int = 0
    num_stale: int = 0

    def apply(self, event: EventRow) -> None:
        if event.event in (schema.STALE, schema.REPEATED):
            self.num_stale += 1
            return
        self._check(event)
        self._count_ends(event)
        again = event.event in schema.ISSUED_AGAIN
        self.num_requeued += again
        self.rows[event.ordinal] = InstanceRow(
            ordinal=event.ordinal,
            attempt=event.attempt,
            state=schema.leads_to(event.event),
            step=event.step,
            reason="" if again else event.detail,
        )

    def _check(self, event: EventRow) -> None:
        before = self.rows.get(event.ordinal)
        if before is None:
            legal, came_from = event.event == State.ISSUED and event.attempt == 0, "nothing"
        else:
            attempt = before.attempt + (event.event in schema.ISSUED_AGAIN)
            legal = before.state in schema.MAY_COME_FROM.get(event.event, ()) and event.attempt == attempt
            came_from = f"{before.state}, attempt {before.attempt}"
        if not legal:
            self.problems.append(
                f"instance {event.ordinal}: {event.event} at attempt {event.attempt} came after {came_from}"
            )

    def _count_ends(self, event: EventRow) -> None:
        if event.event == schema.REVERTED:
            self.ended.pop(event.ordinal, None)
        if event.event in (State.COMMITTED, State.DROPPED):
            if event.ordinal in self.ended and State.COMMITTED in (event.event, self.ended[event.ordinal]):
                self.duplicated.add(event.ordinal)
            self.ended[event.ordinal] = event.event


def _check_steps(rows: Iterable[InstanceRow], *, last: int | None) -> list[str]:
    """Committed means trained in a step that is committed; packed means in one that is not yet."""
    problems = []
    for row in rows:
        if row.state == State.COMMITTED and (last is None or row.step is None or row.step > last):
            problems.append(f"instance {row.ordinal}: committed in step {row.step}, but the last commit is {last}")
        if row.state == State.PACKED and (row.step is None or (last is not None and row.step <= last)):
            problems.append(f"instance {row.ordinal}: still only packed into step {row.step}, which is committed")
    return problems
