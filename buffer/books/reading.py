"""The ledger as it stands at one moment, for commands that only look: of a run that goes on, was killed, or is over.

Nothing is written, and nothing is left beside the file. SQLite's own read-only mode would leave two files beside an
archived ledger, and cannot open one in a directory that may not be written; so a ledger that no process has open (it
has no ``-wal`` file) is read as immutable, and afterwards held against what it was before.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from buffer import schema
from slime.errors import LedgerError, StorageError

LOCK_TIMEOUT_S = 5.0
"""How long a reader waits for a process that keeps all others out."""


@contextmanager
def read_ledger(run_dir: Path) -> Iterator[sqlite3.Connection]:
    """One snapshot of a run's ledger, however long the reading takes.

    Raises:
        LedgerError: there is no ledger, the file is none or of another version, or a run was started meanwhile.
        StorageError: it is damaged, locked, or cannot be opened.
    """
    path = run_dir / "ledger.sqlite"
    try:
        before = _stamp(path)
    except OSError as error:
        raise LedgerError(
            f"{path}: no such ledger ({error.strerror}). Name a run directory, or start the run that makes it."
        ) from None
    is_open = path.with_name("ledger.sqlite-wal").exists()
    uri = f"{path.absolute().as_uri()}?mode=ro" + ("" if is_open else "&immutable=1")
    try:
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=LOCK_TIMEOUT_S)) as db:
            db.execute("BEGIN")
            schema.check(db, path)
            yield db
    except sqlite3.Error as error:
        _check_unchanged(path, before=before, is_open=is_open)
        raise StorageError(f"{path}: SQLite says: {error}. {_remedy(error)}") from error
    _check_unchanged(path, before=before, is_open=is_open)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _check_unchanged(path: Path, *, before: tuple[int, int], is_open: bool) -> None:
    if not is_open and _stamp(path) != before:
        raise LedgerError(
            f"{path}: a run was started on it while it was read. Give the same command again, or read a copy."
        )


def _remedy(error: sqlite3.Error) -> str:
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:  # the rest says which kind of it
        case sqlite3.SQLITE_BUSY:
            return "End the process that has locked it, or read a copy of the directory."
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return "Make the directory readable and writable, or read a copy of all its ledger.sqlite* files elsewhere."
        case sqlite3.SQLITE_NOTADB:
            return "Name a directory whose ledger.sqlite a run has written, or restore the file from a copy."
        case _:
            return "Restore it from a copy, or try `sqlite3 ledger.sqlite .recover`."
