"""The file of a ledger: opening it, transactions, and the facts of the run that it is tied to."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from buffer import schema
from slime.errors import LedgerError, StorageError

LOOK_EVERY_S = 1.0
"""A look at where the file is costs as much as a small write."""


class LedgerFile:
    """``ledger.sqlite`` in the run directory, created where there is none. A context manager.

    Args:
        lock_timeout_s: how long to wait for a process that has locked the file, such as a backup.

    Raises:
        LedgerError: it is no ledger, or one of another version.
        StorageError: from every method too: the file cannot be read or written. The failed call has changed nothing.
    """

    def __init__(self, run_dir: Path, *, lock_timeout_s: float = 30.0) -> None:
        self._path = run_dir / "ledger.sqlite"
        run_dir.mkdir(parents=True, exist_ok=True)
        with self._reporting():
            self._db = sqlite3.connect(self._path, isolation_level=None, timeout=lock_timeout_s)
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._db.execute("PRAGMA journal_mode = WAL")
                schema.create(self._db)
            schema.check(self._db, self._path)
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._identity, self._seen = _identity(self._path), time.monotonic()
            self._depth, self._durable = 0, False
            self._reread()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make one transaction of several moves: they happen all or none, and cost one commit."""
        with self._transaction():
            yield

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

    def remember(self, key: str, value: str) -> None:
        """Keep a fact of the run that changes, such as the version that is published."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def recall(self, key: str) -> str | None:
        """What was kept last; None when nothing was."""
        with self._reporting():
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else None

    def _reread(self) -> None:
        """Learn again what is kept in memory of the tables: called after opening, and after a rollback."""

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[None]:
        if self._depth:  # part of a larger one, which commits or rolls back everything
            yield
            return
        with self._reporting():
            if durable or time.monotonic() > self._seen + LOOK_EVERY_S:
                self._check_in_place()
            if durable != self._durable:
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            self._depth += 1
            try:
                with self._db:  # commits, or rolls back when anything raises
                    self._db.execute("BEGIN IMMEDIATE")
                    yield
            except BaseException:
                self._reread()
                raise
            finally:
                self._depth -= 1

    def _check_in_place(self) -> None:
        """A file that was removed or replaced still takes every write, and all of them are gone at the end."""
        if _identity(self._path) != self._identity:
            raise StorageError(
                f"{self._path}: was removed or replaced while it was in use. End this process and move the file back "
                "to continue, or start anew in another run_dir."
            )
        self._seen = time.monotonic()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: SQLite says: {error}. {_remedy(error)}") from error


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _remedy(error: sqlite3.Error) -> str:
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:  # the rest says which kind of it
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return (
                "Another process holds the file, a backup or a shell: end that one, and give the same command again: "
                "nothing recorded is lost."
            )
        case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR:
            return "If the disk is full, make room and give the same command again: nothing recorded is lost."
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return "Make the file and its directory writable, or choose another run_dir: nothing recorded is lost."
        case _:
            return "Restore the file from a copy, or choose another run_dir."
