"""What the ledger says of an instance, as values; and how they are read from its tables."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from buffer.policy import Versions
from buffer.schema import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One row of the ledger: a prompt at its place in the run."""

    ordinal: int
    prompt_uid: str
    epoch: int
    attempt: int
    state: State
    position: int | None
    """Its place in the order of prompts; None for one that was pushed from outside."""
    step: int | None
    """The training step it is packed into."""
    reason: str
    """Why it was dropped."""
    versions: Versions | None
    """The weights that sampled its tokens; while it runs, those that were published when it was admitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a graded group was worth, trained or not."""

    num_samples: int
    """Those with a score."""
    num_passed: int
    reward_mean: float | None
    response_tokens_mean: float

    def row(self) -> tuple[int, int, float | None, float]:
        return self.num_samples, self.num_passed, self.reward_mean, self.response_tokens_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """A group that was rolled out elsewhere, of any prompt."""

    prompt_uid: str
    request: str
    """A name for the request that brought it, by which `Ledger.of_request` finds it again."""
    payload: bytes
    versions: Versions
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of an instance's life."""

    time: float
    attempt: int
    event: str
    step: int | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A point the run can be continued from."""

    step: int
    checkpoint: str
    state: dict[str, Any]


def select_instances(db: sqlite3.Connection, where: str, *values: Any) -> Iterator[Instance]:
    """The rows of `instances` that a clause of SQL selects; `values` are its parameters."""
    columns = "ordinal, prompt_uid, epoch, position, attempt, state, step, reason, oldest_version, newest_version"
    for ordinal, uid, epoch, position, attempt, state, step, reason, oldest, newest in db.execute(
        f"SELECT {columns} FROM instances {where}", values
    ):
        yield Instance(
            ordinal=ordinal,
            prompt_uid=uid,
            epoch=epoch,
            position=position,
            attempt=attempt,
            state=State(state),
            step=step,
            reason=reason,
            versions=None if oldest is None else Versions(oldest=oldest, newest=newest),
        )


def select_events(db: sqlite3.Connection, ordinal: int) -> list[Event]:
    """The life of an instance, in order."""
    rows = db.execute(
        "SELECT time, attempt, event, step, detail FROM events WHERE ordinal = ? ORDER BY seq", (ordinal,)
    )
    return [
        Event(time=when, attempt=attempt, event=event, step=step, detail=detail)
        for when, attempt, event, step, detail in rows
    ]
