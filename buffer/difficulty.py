"""How hard each prompt is: pass statistics by content hash, in a file that outlives a run and may serve several.

    ledger of a run ── outcomes after its watermark ──▶ prompts: samples and passes, in all and in the last group
                                                    └─▶ ledgers: the watermark

Statistics and watermark move in one transaction, so every outcome counts once, however often a run is killed and
continued and whoever else writes meanwhile. A copy of a run directory has the same ledger: what it records after the
copy was made counts only beyond what the other copy was absorbed to.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from buffer import schema
from buffer.books.reading import read_ledger
from slime.errors import LedgerError, StorageError

VERSION = 1
APPLICATION_ID = 0x736C6469  # "sldi"
BUSY_TIMEOUT_S = 5.0
"""How long a write waits for another run's. Theirs take milliseconds, and block this run's event loop as long."""
BANDS = (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)

_TABLES = f"""
CREATE TABLE prompts (
    uid TEXT PRIMARY KEY,
    num_samples INTEGER NOT NULL,
    num_passed INTEGER NOT NULL,
    last_num_samples INTEGER NOT NULL,
    last_num_passed INTEGER NOT NULL,
    last_run TEXT NOT NULL,
    last_version INTEGER
) WITHOUT ROWID;
CREATE INDEX prompts_by_record ON prompts (num_samples, num_passed);
CREATE TABLE ledgers (run TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
"""
_ADD = """
INSERT INTO prompts VALUES (?1, ?2, ?3, ?2, ?3, ?4, ?5) ON CONFLICT (uid) DO UPDATE SET
    num_samples = num_samples + excluded.num_samples,
    num_passed = num_passed + excluded.num_passed,
    last_num_samples = excluded.last_num_samples,
    last_num_passed = excluded.last_num_passed,
    last_run = excluded.last_run,
    last_version = excluded.last_version
"""
_OUTCOMES = """
SELECT seq, outcomes.prompt_uid, num_samples, num_passed, coalesce(outcomes.version, instances.oldest_version)
FROM outcomes JOIN instances USING (ordinal) WHERE seq > ? ORDER BY seq
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of a prompt."""

    uid: str
    num_samples: int
    """Judged samples, over all groups of all runs."""
    num_passed: int
    last_num_samples: int
    """Those of the group absorbed last."""
    last_num_passed: int
    last_run: str
    """The ledger that group is of."""
    last_version: int | None
    """Weights of that run that sampled it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Prompts by pass@k."""

    k: int
    bands: Mapping[float, int]
    """Upper end of a band → number of prompts whose pass@k is not above it, and above the end before."""
    num_unknown: int
    """Prompts with fewer than k judged samples."""


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples passes: ``1 - C(n - c, k) / C(n, k)``.

    Chen et al., "Evaluating Large Language Models Trained on Code", 2021, eq. 1. Computed in whole numbers, so that
    only the one division rounds, also where the result is close to 0.

    Raises:
        ValueError: not ``0 <= num_passed <= num_samples`` and ``1 <= k <= num_samples``.
    """
    if not (0 <= num_passed <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"pass@{k} of {num_passed} passes in {num_samples} samples is not defined")
    ways = math.comb(num_samples, k)
    return (ways - math.comb(num_samples - num_passed, k)) / ways


class Difficulty:
    """The statistics in one file, which is created where there is none. A context manager.

    Args:
        read_only: create nothing and write nothing.

    Raises:
        LedgerError: the file is not one of these, or one of another version.
        StorageError: from every method too: it is damaged, locked for too long, or cannot be read or written.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        with self._reporting():
            mode = "ro" if read_only else "rwc"
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)
        try:
            with self._reporting():
                if not read_only:
                    self._create()
                self._check()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def absorb(self, run_dir: Path) -> int:
        """Take in every outcome of a run's ledger that is not in yet. Returns how many there were.

        Raises:
            LedgerError: there is no ledger, or it cannot be read.
        """
        with read_ledger(run_dir) as ledger, self._transaction():
            (run,) = ledger.execute("SELECT value FROM meta WHERE key = ?", (schema.RUN,)).fetchone()
            (seen,) = self._db.execute("SELECT coalesce(max(seq), 0) FROM ledgers WHERE run = ?", (run,)).fetchone()
            outcomes = ledger.execute(_OUTCOMES, (seen,)).fetchall()
            if outcomes:
                self._db.executemany(_ADD, [(uid, n, c, run, version) for _, uid, n, c, version in outcomes])
                self._db.execute("INSERT OR REPLACE INTO ledgers VALUES (?, ?)", (run, outcomes[-1][0]))
            return len(outcomes)

    def get(self, uid: str) -> Record | None:
        """What is known of a prompt; None when no group of it was ever judged."""
        with self._reporting():
            row = self._db.execute(
                "SELECT uid, num_samples, num_passed, last_num_samples, last_num_passed, last_run, last_version "
                "FROM prompts WHERE uid = ?",
                (uid,),
            ).fetchone()
        if row is None:
            return None
        names = ("uid", "num_samples", "num_passed", "last_num_samples", "last_num_passed", "last_run", "last_version")
        return Record(**dict(zip(names, row, strict=True)))

    def pools(self, *, k: int, bands: Sequence[float] = BANDS) -> Pools:
        """Count the prompts by pass@k.

        Args:
            bands: their upper ends, rising to 1: the first has pass@k = 0 exactly when its end is 0.0.
        """
        counts, num_unknown = dict.fromkeys(_checked(bands), 0), 0
        for num_samples, num_passed, count in self._records():
            if num_samples < k:
                num_unknown += count
            else:
                counts[_band(pass_at_k(num_samples, num_passed, k), bands)] += count
        return Pools(k=k, bands=counts, num_unknown=num_unknown)

    def uids(self, *, k: int, above: float = -1.0, up_to: float = 1.0) -> Iterator[str]:
        """The prompts with ``above < pass@k <= up_to``, grouped by their record."""
        for num_samples, num_passed, _ in self._records():
            if num_samples >= k and above < pass_at_k(num_samples, num_passed, k) <= up_to:
                with self._reporting():
                    yield from (
                        uid
                        for (uid,) in self._db.execute(
                            "SELECT uid FROM prompts WHERE num_samples = ? AND num_passed = ?",
                            (num_samples, num_passed),
                        )
                    )

    def _records(self) -> list[tuple[int, int, int]]:
        """``(num_samples, num_passed, number of prompts)``: few, however many prompts there are."""
        with self._reporting():
            return self._db.execute(
                "SELECT num_samples, num_passed, count(*) FROM prompts GROUP BY num_samples, num_passed"
            ).fetchall()

    def _create(self) -> None:
        """Make the tables in an empty file, unless another process does so first."""
        with self._transaction():
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _TABLES.split(";")[:-1]:  # executescript would commit in between
                    self._db.execute(statement)

    def _check(self) -> None:
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise LedgerError(
                f"{self._path}: got a SQLite file without pass statistics. Name another buffer.difficulty, or move the "
                "file away."
            )
        if version != VERSION:
            raise LedgerError(
                f"{self._path}: got pass statistics of version {version}; this slime reads version {VERSION}. Use the "
                "slime that wrote them, or name another buffer.difficulty."
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._reporting(), self._db:  # commits, or rolls back when anything raises
            self._db.execute("BEGIN IMMEDIATE")
            yield

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: SQLite says: {error}. {_remedy(error)}") from error


def _checked(bands: Sequence[float]) -> Sequence[float]:
    if list(bands) != sorted(set(bands)) or not bands or bands[0] < 0 or bands[-1] != 1.0:
        raise ValueError(f"bands = {list(bands)}: expected rising upper ends from 0 or more up to 1.0")
    return bands


def _band(value: float, bands: Sequence[float]) -> float:
    return next(end for end in bands if value <= end)


def _remedy(error: sqlite3.Error) -> str:
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:  # the rest says which kind of it
        case sqlite3.SQLITE_BUSY:
            return "Another process holds it: end that one, or give this run a buffer.difficulty of its own."
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return "Make the file and its directory accessible, or name another buffer.difficulty."
        case sqlite3.SQLITE_FULL:
            return "Make room, or name a buffer.difficulty on another disk. What was absorbed stays."
        case _:
            return "Restore it from a copy, or move it away: a new one is filled from this run's ledger."
