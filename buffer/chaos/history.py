"""What clients saw of a buffer, operation by operation; `buffer.chaos.checker` holds it against the ledger.

    {"op": 7, "is": "invoke", "do": "push", "request": "p1-3", ...}      before it is sent, with what was said
    {"op": 7, "is": "ok", "ordinal": 12}                                 it happened, with what was answered
    {"op": 7, "is": "fail", "error": "BufferFull"}                       it was refused, and did not happen

An operation without an end is unknown: its reply never came, and it may have happened or not. Such a history, and what
can be concluded from it, is Jepsen's idea (https://github.com/jepsen-io/jepsen).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from slime.errors import BufferFull, DataError, Fenced, LedgerError, SlimeError
from slime.types import Group, Sample

REFUSALS = (LedgerError, BufferFull, Fenced, DataError)
"""These alone, and none of their other subclasses: a StorageError may come from a transaction that reached the disk."""
Said = Mapping[str, Any]
"""JSON values by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call of a client, from its beginning to what became of it."""

    kind: str
    """admit, put, push, drop, requeue, consume, take or commit."""
    said: Said
    began: int
    """Line of the history: an operation that ended before another began happened before it."""
    ended: int | None = None
    """None when nobody knows whether it happened."""
    answer: Said | None = None
    """None when it was refused, and while it is unknown."""
    error: str | None = None
    """The class of the error it was refused with."""

    @property
    def is_ok(self) -> bool:
        return self.answer is not None

    @property
    def is_refused(self) -> bool:
        return self.error is not None


class History:
    """Writes operations down as they happen, as JSON lines. All clients of one event loop share it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self._num_operations = 0
        self.num_ok = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def begin(self, kind: str, **said: Any) -> Call:
        """Record that a client is about to call."""
        number, self._num_operations = self._num_operations, self._num_operations + 1
        self._write(op=number, **{"is": "invoke"}, do=kind, **said)
        return Call(self, number)

    @contextmanager
    def operation(self, kind: str, **said: Any) -> Iterator[Call]:
        """Record what happens inside as one call, and a refusal as its end.

        Anything else that is raised leaves the operation unknown.
        """
        call = self.begin(kind, **said)
        try:
            yield call
        except SlimeError as error:
            if type(error) in REFUSALS:
                call.refused(error)
            raise

    def end(self, number: int, what: str, **told: Any) -> None:
        self.num_ok += what == "ok"
        self._write(op=number, **{"is": what}, **told)

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")


@dataclass(frozen=True, slots=True)
class Call:
    """An operation that has begun."""

    history: History
    number: int

    def ok(self, **answer: Any) -> None:
        """It happened, and this was the answer."""
        self.history.end(self.number, "ok", **answer)

    def refused(self, error: SlimeError) -> None:
        """It did not happen."""
        self.history.end(self.number, "fail", error=type(error).__name__)


def read_history(lines: Sequence[str]) -> list[Operation]:
    """The operations of a history, in the order in which they began."""
    operations: dict[int, Operation] = {}
    for place, line in enumerate(lines):
        record: dict[str, Any] = json.loads(line)
        number, what = record.pop("op"), record.pop("is")
        match what:
            case "invoke":
                operations[number] = Operation(kind=record.pop("do"), said=record, began=place)
            case "ok":
                operations[number] = replace(operations[number], ended=place, answer=record)
            case _:
                operations[number] = replace(operations[number], ended=place, error=record["error"])
    return list(operations.values())


def fingerprint(group: Group) -> str:
    """Hash of all that is trained: the prompt and every sample, with log-probabilities in float32 as they are stored.

    It does not go through `buffer.payload`, so that it also notices what that loses.
    """
    content = [group.prompt.uid, [_record(sample) for sample in group.samples]]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def _record(sample: Sample) -> dict[str, Any]:
    return {**asdict(sample), "rollout_logprobs": np.array(sample.rollout_logprobs, dtype=np.float32).tolist()}
