"""`slime buffer stats`: where a run's instances stand and how hard its prompts are, in numbers."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from buffer import schema
from buffer.books.reading import read_ledger
from buffer.difficulty import Difficulty, Pools
from buffer.schema import State
from slime.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class LongestRunning:
    """The instance that has been rolled out for the longest time."""

    ordinal: int
    attempt: int
    running_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts of instances, unless a name says otherwise."""

    states: dict[str, int]
    """By state; every state is there. The sum is all that were issued."""
    num_admitted: int
    """Issued from the run's prompts."""
    num_pushed: int
    """Rolled out elsewhere and pushed."""
    num_partial: int
    """Of those that wait to be issued again: with samples to begin with."""
    longest_running: LongestRunning | None
    dropped: dict[str, int]
    """By reason."""
    num_filtered: int
    """Of the dropped: graded, and then refused by a filter."""
    requeues: dict[str, int]
    """Attempts given up, by reason."""
    num_recovered: int
    """Attempts that ended with their process."""
    num_reverted: int
    """Instances issued again because the checkpoint of their commit was torn."""
    num_late: int
    """Results of an older attempt, or sent twice: acknowledged and discarded."""
    staleness: dict[int, int]
    """Committed groups by the age of their oldest token: version trained - version that sampled it."""
    max_staleness: int | None
    """The bound the run was begun with."""
    num_commits: int
    last_step: int | None
    """The last committed step."""
    num_payloads: int
    """Groups whose samples the ledger keeps: ready, packed, or to be continued."""
    payload_bytes: int
    ledger_bytes: int
    """The file and its log."""

    @property
    def num_issued(self) -> int:
        return sum(self.states.values())

    @property
    def num_waiting(self) -> int:
        """To be issued again."""
        return self.states[State.ISSUED]

    @property
    def num_running(self) -> int:
        return self.states[State.RUNNING] + self.states[State.GENERATED]

    @property
    def num_ready(self) -> int:
        """Graded, kept, and in no step yet."""
        return self.states[State.GRADED]


def read_stats(run_dir: Path) -> Stats:
    """Count what the ledger of a run has, which may be going on meanwhile.

    Raises:
        LedgerError: as `buffer.books.reading.read_ledger`.
    """
    with read_ledger(run_dir) as db:
        states = dict(db.execute("SELECT state, count(*) FROM instances GROUP BY state").fetchall())
        events = _events(db)
        num_commits, last_step = db.execute("SELECT count(*), max(step) FROM commits").fetchone()
        num_payloads, payload_bytes = db.execute(
            "SELECT count(*), coalesce(sum(length(body)), 0) FROM payloads"
        ).fetchone()
        bound = db.execute("SELECT value FROM meta WHERE key = ?", (schema.MAX_STALENESS,)).fetchone()
        return Stats(
            states={state.value: states.get(state, 0) for state in State},
            num_admitted=_one(db, "SELECT count(position) FROM instances"),
            num_pushed=_one(db, "SELECT count(*) - count(position) FROM instances"),
            num_partial=_one(db, "SELECT count(*) FROM payloads JOIN instances USING (ordinal) WHERE state = 'issued'"),
            longest_running=_longest_running(db),
            dropped=_counts(db, "SELECT reason, count(*) FROM instances WHERE state = 'dropped' GROUP BY reason"),
            num_filtered=_one(db, "SELECT count(*) FROM outcomes WHERE dropped != ''"),
            requeues={detail: count for (event, detail), count in events.items() if event == schema.REQUEUED},
            num_recovered=_total(events, schema.RECOVERED),
            num_reverted=_total(events, schema.REVERTED),
            num_late=_total(events, schema.STALE, schema.REPEATED),
            staleness=dict(
                db.execute(  # step n trains the weights of version n - 1
                    "SELECT step - 1 - oldest_version AS age, count(*) FROM instances WHERE state = 'committed' "
                    "AND oldest_version IS NOT NULL GROUP BY age ORDER BY age"
                ).fetchall()
            ),
            max_staleness=int(bound[0]) if bound else None,
            num_commits=num_commits,
            last_step=last_step,
            num_payloads=num_payloads,
            payload_bytes=payload_bytes,
            ledger_bytes=sum(file.stat().st_size for file in _files(run_dir)),
        )


def read_pools(run_dir: Path, *, k: int) -> Pools | None:
    """A run's prompts by pass@k; None while it has no pass statistics.

    Raises:
        LedgerError: as `buffer.difficulty.Difficulty`.
        DataError: ``config.json``, which says where they are, is damaged.
    """
    path = _difficulty_path(run_dir)
    if not path.is_file():
        return None
    with Difficulty(path, read_only=True) as difficulty:
        return difficulty.pools(k=k)


def _difficulty_path(run_dir: Path) -> Path:
    own, config = run_dir / "difficulty.sqlite", run_dir / "config.json"
    if not config.is_file():
        return own
    try:
        named = json.loads(config.read_text(encoding="utf-8"))["buffer"].get("difficulty")
        return Path(named) if named else own
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{config}: got no configuration of a run ({error!r}). Restore it from a copy, or move it away: the next "
            "start of the run writes it again."
        ) from None


def _files(run_dir: Path) -> list[Path]:
    return [file for name in ("ledger.sqlite", "ledger.sqlite-wal") if (file := run_dir / name).exists()]


def _one(db: sqlite3.Connection, query: str) -> int:
    (count,) = db.execute(query).fetchone()
    return int(count)


def _counts(db: sqlite3.Connection, query: str) -> dict[str, int]:
    """Names with their counts, most frequent first."""
    return dict(sorted(db.execute(query).fetchall(), key=lambda row: (-row[1], row[0])))


def _events(db: sqlite3.Connection) -> dict[tuple[str, str], int]:
    """What did not go straight on, by event and detail, most frequent first."""
    kinds = (schema.REQUEUED, schema.RECOVERED, schema.REVERTED, schema.STALE, schema.REPEATED)
    rows = db.execute(
        f"SELECT event, detail, count(*) FROM events WHERE event IN ({', '.join('?' * len(kinds))}) "
        "GROUP BY event, detail ORDER BY count(*) DESC, detail",
        kinds,
    )
    return {(event, detail): count for event, detail, count in rows}


def _total(events: dict[tuple[str, str], int], *kinds: str) -> int:
    return sum(count for (event, _), count in events.items() if event in kinds)


def _longest_running(db: sqlite3.Connection) -> LongestRunning | None:
    row = db.execute(
        "SELECT ordinal, attempt, time FROM instances JOIN events USING (ordinal, attempt) "
        "WHERE state IN ('running', 'generated') AND event = 'running' ORDER BY time LIMIT 1"
    ).fetchone()
    if row is None:
        return None
    ordinal, attempt, since = row
    return LongestRunning(ordinal=ordinal, attempt=attempt, running_s=max(0.0, time.time() - since))
