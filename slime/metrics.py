"""What a run measures: one JSON object a step in ``metrics.jsonl``, and the same as TensorBoard files.

Names are ``area/thing[_unit]``: ``reward/mean``, ``eval/held_out/pass@1``, ``time/step_s``. A user's own numbers are
the parts of a Score, logged as ``reward_part/<part>`` and ``eval/<set>/<part>``.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from slime.errors import DataError

FILE_NAME = "metrics.jsonl"


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All rows, one a step in order of step; rows written for the same step are merged. Missing numbers are NaN.

    A torn last line, as a killed run leaves it, is passed over.

    Raises:
        DataError: any other line is not a row.
    """
    path = run_dir / FILE_NAME
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(_whole_lines(path), start=1):
        row = _parse(line, path=path, number=number)
        numbers = {name: math.nan if value is None else value for name, value in row.items()}
        steps.setdefault(row["step"], {}).update(numbers)
    return [steps[step] for step in sorted(steps)]


def evaluated_steps(run_dir: Path) -> set[int]:
    """Steps whose weights have been evaluated."""
    return {row["step"] for row in read(run_dir) if any(name.startswith("eval/") for name in row)}


class MetricsLog:
    """Appends the rows of one run directory. Use as a context manager, or `close` it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        run_dir.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._rewrite(_whole_lines(self._path))
        self._events = _EventFile(run_dir / "tensorboard")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the row of `step`. NaN and infinities are written as null, since JSON has no word for them."""
        now = time.time()
        row = {"step": step, "time": now, **{name: float(value) for name, value in metrics.items()}}
        with self._path.open("ab") as file:
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        self._events.add(step, metrics, now=now)

    def truncate(self, step: int) -> None:
        """Forget every row after `step`, the last committed one: a run that continues takes those steps again."""
        lines = _whole_lines(self._path)
        kept = [
            line
            for number, line in enumerate(lines, start=1)
            if _parse(line, path=self._path, number=number)["step"] <= step
        ]
        if len(kept) < len(lines):
            self._rewrite(kept)
        self._events.restart(step + 1)

    def close(self) -> None:
        self._events.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rewrite(self, lines: list[bytes]) -> None:
        """Replace the file in one rename, so that a crash leaves the old rows or the wanted ones."""
        partial = self._path.with_suffix(".jsonl.tmp")
        with partial.open("wb") as file:
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self._path)


class _EventFile:
    """TensorBoard's own writer, which needs no torch. Imported late: it brings numpy and protobuf along."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(directory))

    def add(self, step: int, metrics: Mapping[str, float], *, now: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(wall_time=now, step=step, summary=Summary(value=values)))
        self._writer.flush()

    def restart(self, step: int) -> None:
        """Tell TensorBoard to drop what earlier files hold from `step` on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        log = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=log))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of the file without a torn last one; none if there is no file."""
    with contextlib.suppress(FileNotFoundError):
        *lines, _torn = path.read_bytes().split(b"\n")
        return [line for line in lines if line]
    return []


def _parse(line: bytes, *, path: Path, number: int) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as cause:
        raise DataError(
            f"{path}, line {number}: {cause}. Expected one JSON object a step. "
            "Remove the line, or move the file away to start its record afresh."
        ) from cause
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise DataError(
            f"{path}, line {number}: got {line[:80]!r}, expected an object with a whole number under 'step'. "
            "Remove the line, or move the file away to start its record afresh."
        )
    return row
