"""`slime buffer show`: everything that is known of a prompt's instances."""

from __future__ import annotations

import difflib
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from buffer.books.reading import read_ledger
from buffer.payload import decode
from buffer.records import Event, Instance, select_events, select_instances
from buffer.samples import iter_samples, sample_record, written_steps
from buffer.schema import State
from slime.errors import LedgerError

MAX_NAMED = 5
"""Uids that an error names."""
MAX_COMPARED = 20_000
"""Uids that a misspelt one is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """What an attempt was worth, trained or not."""

    attempt: int
    num_samples: int
    num_passed: int
    reward_mean: float | None
    response_tokens_mean: float
    dropped: str
    """Why a filter refused it; "" when it was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One instance: where it stands, how it came there, and what is left of its samples."""

    instance: Instance
    events: tuple[Event, ...]
    graded: tuple[Graded, ...]
    samples: tuple[Mapping[str, Any], ...]
    """Records as `buffer.samples` writes them: from the ledger while the samples are in it, then from ``rollouts/``."""


def read_lives(run_dir: Path, name: str) -> list[Life]:
    """The instances that `name` means, in order of issue.

    Args:
        name: a prompt's uid or the beginning of one, an ordinal, or ``uid:ordinal``.

    Raises:
        LedgerError: it means none, or the beginning is that of several uids; the message names some. Otherwise as
            `buffer.books.reading.read_ledger`.
        DataError: a file of samples is damaged.
    """
    name = name.encode("utf-8", "backslashreplace").decode()  # an argument that is not UTF-8 is no uid, and no crash
    with read_ledger(run_dir) as db:
        return [_life(db, instance, run_dir=run_dir) for instance in _find(db, name, run_dir=run_dir)]


def _find(db: sqlite3.Connection, name: str, *, run_dir: Path) -> list[Instance]:
    uid, _, ordinal = name.rpartition(":")
    found = _instances(db, "prompt_uid = ?", name)
    if not found and _is_number(name):
        found = _instances(db, "ordinal = CAST(? AS INTEGER)", name)
    if not found and _is_number(ordinal):
        found = _instances(db, "ordinal = CAST(? AS INTEGER) AND prompt_uid = ?", ordinal, uid)
    return found or _instances(db, "prompt_uid = ?", _completed(db, name, run_dir=run_dir))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _completed(db: sqlite3.Connection, beginning: str, *, run_dir: Path) -> str:
    """The one uid that begins so."""
    rows = db.execute(
        "SELECT DISTINCT prompt_uid FROM instances WHERE prompt_uid BETWEEN ? AND ? ORDER BY prompt_uid LIMIT ?",
        (beginning, beginning + chr(0x10FFFF), MAX_NAMED + 1),  # by the index, not by LIKE
    )
    uids = [uid for (uid,) in rows]
    if not uids:
        _refuse(db, beginning, run_dir=run_dir)
    if len(uids) > 1:
        some = ", ".join(map(repr, uids[:MAX_NAMED])) + (" and more" if len(uids) > MAX_NAMED else "")
        raise LedgerError(f"{run_dir}: several uids begin with {beginning!r}: {some}. Give more of it, or an ordinal.")
    return str(uids[0])


def _refuse(db: sqlite3.Connection, name: str, *, run_dir: Path) -> NoReturn:
    (last,) = db.execute("SELECT max(ordinal) FROM instances").fetchone()
    if last is None:
        raise LedgerError(
            f"{run_dir}: got {name!r}, and nothing is issued yet. Let the run begin, or name another one."
        )
    rows = db.execute("SELECT DISTINCT prompt_uid FROM instances LIMIT ?", (MAX_COMPARED,))
    near = difflib.get_close_matches(name.partition(":")[0], [uid for (uid,) in rows])
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "`slime buffer export` lists all."
    raise LedgerError(
        f"{run_dir}: no instance of {name!r} was issued. {hint} Give a uid, its beginning, or an ordinal up to {last}."
    )


def _instances(db: sqlite3.Connection, where: str, *values: str) -> list[Instance]:
    return list(select_instances(db, f"WHERE {where} ORDER BY ordinal", *values))


def _life(db: sqlite3.Connection, instance: Instance, *, run_dir: Path) -> Life:
    graded = db.execute(
        "SELECT attempt, num_samples, num_passed, reward_mean, response_tokens_mean, dropped FROM outcomes "
        "WHERE ordinal = ? ORDER BY attempt",
        (instance.ordinal,),
    )
    return Life(
        instance=instance,
        events=tuple(select_events(db, instance.ordinal)),
        graded=tuple(
            Graded(
                attempt=attempt,
                num_samples=num_samples,
                num_passed=num_passed,
                reward_mean=reward_mean,
                response_tokens_mean=response_tokens_mean,
                dropped=dropped,
            )
            for attempt, num_samples, num_passed, reward_mean, response_tokens_mean, dropped in graded
        ),
        samples=tuple(_samples(db, instance, run_dir=run_dir)),
    )


def _samples(db: sqlite3.Connection, instance: Instance, *, run_dir: Path) -> list[dict[str, Any]]:
    ordinal, step = instance.ordinal, instance.step or 0
    kept = db.execute("SELECT body FROM payloads WHERE ordinal = ?", (ordinal,)).fetchone()
    if kept:
        group = decode(kept[0], ordinal=ordinal, epoch=instance.epoch, attempt=instance.attempt)
        return [sample_record(group, sample, step=step) for sample in group.samples]
    if instance.state != State.COMMITTED or step not in written_steps(run_dir):
        return []
    written = (record for record in iter_samples(run_dir, step=step) if record.get("ordinal") == ordinal)
    return [record for record in written if record.get("attempt") == instance.attempt]
