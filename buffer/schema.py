"""The tables of ``ledger.sqlite``, the states of a prompt instance and the moves between them.

    issued → running → generated → graded → packed(step) → committed(step)
      │         └──────────┴─ dropped(reason)
      └─ dropped(reason), when given up while it waits to be issued again
    running, generated, graded ─ requeued → issued, with the next attempt
    running, generated ─ recovered → issued, with the next attempt, after the process that had it ended
    packed ─ released → graded, when the step it was packed into will not be committed
    committed ─ reverted → issued, with the next attempt, when the checkpoint of that commit turned out torn

`instances` holds where each one stands; `events` how it came there, and nothing is ever changed in it.
`buffer.books.audit` holds the two against each other. `payloads` holds the samples of what is graded or packed, and of
what waits to be continued; `outcomes` what every graded attempt was worth, trained or not.
"""

from __future__ import annotations

import sqlite3
from enum import StrEnum
from pathlib import Path

from slime.errors import LedgerError

VERSION = 2
APPLICATION_ID = 0x736C696D  # "slim": tells a ledger from any other SQLite file


class State(StrEnum):
    """Where a prompt instance stands."""

    ISSUED = "issued"
    RUNNING = "running"
    GENERATED = "generated"
    GRADED = "graded"
    PACKED = "packed"
    COMMITTED = "committed"
    DROPPED = "dropped"


MAX_STALENESS = "max_staleness"
"""Key of `meta`: the bound the run was begun with."""
CONSUMER = "consumer"
"""Key of `meta`: the incarnation of the last consumer."""
RUN = "run"
"""Key of `meta`: a random name, by which files that outlive the run know its ledger."""
PUBLISHED = "published"
"""Key of `meta`: JSON list of the consumer that published last and the version that the engines answer as."""

REQUEUED = "requeued"
"""Event: back to ISSUED with the next attempt."""
RECOVERED = "recovered"
"""Event: the same, because the process that had it ended."""
REVERTED = "reverted"
"""Event: the same, because the checkpoint it was committed with is torn: no weights know of it any more."""
RELEASED = "released"
"""Event: back to GRADED, because the step it was packed into will not be committed."""
ISSUED_AGAIN = frozenset({REQUEUED, RECOVERED, REVERTED})
STALE = "stale"
"""Event: a result of an older attempt came in and was discarded."""
REPEATED = "repeated"
"""Event: a result that is already recorded came in again and was discarded."""

MAY_COME_FROM: dict[str, frozenset[State]] = {
    State.RUNNING: frozenset({State.ISSUED}),
    State.GENERATED: frozenset({State.RUNNING}),
    State.GRADED: frozenset({State.RUNNING, State.GENERATED}),
    RELEASED: frozenset({State.PACKED}),
    State.PACKED: frozenset({State.GRADED}),
    State.COMMITTED: frozenset({State.PACKED}),
    State.DROPPED: frozenset({State.ISSUED, State.RUNNING, State.GENERATED}),
    REQUEUED: frozenset({State.RUNNING, State.GENERATED, State.GRADED}),
    RECOVERED: frozenset({State.RUNNING, State.GENERATED}),
    REVERTED: frozenset({State.COMMITTED}),
}
"""Every legal move, by the event it is recorded as."""


def leads_to(event: str) -> str:
    """The state after a move."""
    return State.ISSUED if event in ISSUED_AGAIN else State.GRADED if event == RELEASED else event


REPEATS: dict[str, frozenset[State]] = {
    State.GENERATED: frozenset({State.GENERATED}),
    State.GRADED: frozenset({State.GRADED, State.PACKED, State.COMMITTED}),
    State.DROPPED: frozenset({State.DROPPED}),
}
"""Where the same result of the same attempt, sent again because its answer got lost, is no error."""

_TABLES = f"""
CREATE TABLE instances (
    ordinal INTEGER PRIMARY KEY,
    prompt_uid TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    position INTEGER,
    attempt INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ({", ".join(f"'{state}'" for state in State)})),
    step INTEGER,
    reason TEXT NOT NULL DEFAULT '',
    oldest_version INTEGER,
    newest_version INTEGER,
    request TEXT
);
CREATE INDEX packed_instances ON instances (step) WHERE state = 'packed';
CREATE INDEX instances_of_prompts ON instances (prompt_uid);
CREATE UNIQUE INDEX instances_of_requests ON instances (request) WHERE request IS NOT NULL;
CREATE TABLE payloads (ordinal INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE outcomes (
    seq INTEGER PRIMARY KEY,
    ordinal INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    prompt_uid TEXT NOT NULL,
    version INTEGER,
    num_samples INTEGER NOT NULL,
    num_passed INTEGER NOT NULL,
    reward_mean REAL,
    response_tokens_mean REAL NOT NULL,
    dropped TEXT NOT NULL,
    UNIQUE (ordinal, attempt)
);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    ordinal INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    event TEXT NOT NULL,
    step INTEGER,
    detail TEXT NOT NULL DEFAULT ''
);
CREATE TRIGGER events_stay BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_stand BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE INDEX events_of_instances ON events (ordinal);
CREATE TABLE commits (step INTEGER PRIMARY KEY, checkpoint TEXT NOT NULL, state TEXT NOT NULL, time REAL NOT NULL);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO meta VALUES ('{RUN}', lower(hex(randomblob(8))));
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
"""


def create(db: sqlite3.Connection) -> None:
    """Make the tables, all or none."""
    db.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")


def check(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that is no ledger, or one of another version.

    Raises:
        LedgerError: with what was found and what this slime reads.
    """
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise LedgerError(f"{path}: got a SQLite file that is no ledger. Move it away, or choose another run_dir.")
    if version != VERSION:
        raise LedgerError(
            f"{path}: got a ledger of version {version}; this slime reads version {VERSION}. "
            "Continue the run with the slime that began it, or choose another run_dir."
        )
