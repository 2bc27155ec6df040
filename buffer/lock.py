"""One run a directory: an exclusive lock that ends with the process, however that ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

from slime.errors import LedgerError


class RunLock:
    """``with RunLock(run_dir):`` holds ``run.lock`` in the run directory.

    It is a `flock`, which the kernel drops when the process dies, so a file left over locks nothing and is never
    removed (removing it would let two runs lock two files of one name).

    Raises:
        LedgerError: another run holds it; the message names that run's process and start. Or the directory cannot be
            written.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = (run_dir / "run.lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise LedgerError(
                f"run_dir = {run_dir}: no directory to write to ({error}). "
                "Choose another run_dir, or make this one a directory that this user may write to."
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with self._file:
                self._refuse()
        self._file.truncate(0)
        holder = {"pid": os.getpid(), "started": datetime.now().isoformat(" ", "seconds"), "host": socket.gethostname()}
        self._file.write(json.dumps(holder))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _refuse(self) -> NoReturn:
        self._file.seek(0)
        holder = _parse(self._file.read())
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('started', '?')}"
        raise LedgerError(
            f"{self._run_dir}: another run holds this directory: {who}. "
            "Wait for it or end it (if that process is gone, one it started still lives), or choose another run_dir."
        )


def _parse(text: str) -> dict[str, Any]:
    try:
        holder = json.loads(text)
    except json.JSONDecodeError:  # read between its holder's truncate and write
        return {}
    return holder if isinstance(holder, dict) else {}
