"""`slime buffer export`: a run's books as one file, for other tools.

One snapshot of the ledger is read row by row, so memory does not grow with the run, and a run that goes on meanwhile
is neither held up nor seen half way. The file appears whole or not at all.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from buffer.books.reading import read_ledger
from buffer.payload import decode
from buffer.samples import encode_line, iter_samples, sample_record, written_steps
from buffer.schema import State
from slime.errors import ConfigError, DataError

What = Literal["instances", "samples", "outcomes"]
Format = Literal["jsonl", "parquet"]
Row = dict[str, Any]

_INSTANCES = (
    "SELECT ordinal, prompt_uid, epoch, position, attempt, state, step, reason, oldest_version, newest_version, "
    "request, (SELECT min(time) FROM events AS e WHERE e.ordinal = i.ordinal) AS time_issued, "
    "(SELECT max(time) FROM events AS e WHERE e.ordinal = i.ordinal) AS time_moved "
    "FROM instances AS i WHERE state IN ({states}) ORDER BY ordinal"
)
_OUTCOMES = (
    "SELECT ordinal, outcomes.attempt, outcomes.prompt_uid, version, num_samples, num_passed, reward_mean, "
    "response_tokens_mean, dropped, state FROM outcomes JOIN instances USING (ordinal) WHERE state IN ({states}) "
    "ORDER BY seq"
)
_KEPT_SAMPLES = (
    "SELECT ordinal, epoch, attempt, step, state, body FROM payloads JOIN instances USING (ordinal) "
    "WHERE state IN ({states}) ORDER BY ordinal"
)
_AS_JSON = ("prompt", "label", "verdict", "metadata")
"""Keys of a sample that may have any shape: JSON text in a parquet file."""
_COLUMNS = {
    "instances": {
        "int64": "ordinal epoch position attempt step oldest_version newest_version",
        "string": "prompt_uid state reason request",
        "double": "time_issued time_moved",
    },
    "outcomes": {
        "int64": "ordinal attempt version num_samples num_passed",
        "string": "prompt_uid dropped state",
        "double": "reward_mean response_tokens_mean",
    },
    "samples": {
        "int64": "step ordinal epoch attempt index",
        "string": "prompt_uid rollout_id prompt label response status verdict metadata state",
        "double": "reward temperature",
    },
}
"""Columns of a parquet file by the name of their type, but for those of samples that hold lists."""
_BATCH_ROWS = {"instances": 10_000, "outcomes": 10_000, "samples": 256}
"""Rows of parquet held in memory."""


@dataclass(slots=True, kw_only=True)
class Exported:
    """What an export has written."""

    num_rows: int = 0
    num_missing: int = 0
    """Committed groups whose samples are not in ``rollouts/`` any more."""


def export_run(
    run_dir: Path,
    output: Path,
    *,
    what: What = "instances",
    format: Format = "jsonl",
    states: Sequence[State] = (),
    force: bool = False,
) -> Exported:
    """Write a file of instances, of graded attempts (outcomes), or of samples.

    Args:
        states: only of instances that stand there; of all by default.
        force: replace a file that is there.

    Raises:
        ConfigError: the file is there already, or cannot be written.
        LedgerError: as `buffer.books.reading.read_ledger`.
        DataError: a file of samples is damaged.
    """
    if output.exists() and not force:
        raise ConfigError(
            f"{output}: the file is there already. Name another with --output, or replace it with --force."
        )
    exported = Exported()
    with _replacing(output) as file, read_ledger(run_dir) as db:
        chosen = tuple(states) or tuple(State)
        match what:
            case "instances":
                rows = _table(db, _INSTANCES, chosen)
            case "outcomes":
                rows = _table(db, _OUTCOMES, chosen)
            case "samples":
                rows = _samples(db, run_dir, chosen, exported)
        counted = _counted(rows, exported)
        if format == "jsonl":
            file.writelines(encode_line(row) + b"\n" for row in counted)
        else:
            _write_parquet(file, counted, what=what)
    return exported


def _counted(rows: Iterable[Row], exported: Exported) -> Iterator[Row]:
    for row in rows:
        exported.num_rows += 1
        yield row


def _select(db: sqlite3.Connection, query: str, states: Sequence[State]) -> sqlite3.Cursor:
    return db.execute(query.format(states=", ".join("?" * len(states))), states)


def _table(db: sqlite3.Connection, query: str, states: Sequence[State]) -> Iterator[Row]:
    cursor = _select(db, query, states)
    names = [column[0] for column in cursor.description]
    for values in cursor:
        yield dict(zip(names, values, strict=True))


def _samples(db: sqlite3.Connection, run_dir: Path, states: Sequence[State], exported: Exported) -> Iterator[Row]:
    """Those of committed groups from ``rollouts/``, step by step; then those that the ledger keeps."""
    if State.COMMITTED in states:
        (exported.num_missing,) = db.execute("SELECT count(*) FROM instances WHERE state = 'committed'").fetchone()
        for step in written_steps(run_dir):
            yield from _trained(db, run_dir, step, exported)
    for ordinal, epoch, attempt, step, state, body in _select(db, _KEPT_SAMPLES, states):
        group = decode(body, ordinal=ordinal, epoch=epoch, attempt=attempt)
        for sample in group.samples:
            yield {**sample_record(group, sample, step=step or 0), "step": step, "state": state}


def _trained(db: sqlite3.Connection, run_dir: Path, step: int, exported: Exported) -> Iterator[Row]:
    """What the file of a step has of groups that the ledger says were committed in it.

    It may have others: it is written before the commit, and a step that was not committed is taken again.
    """
    last = None
    for record in iter_samples(run_dir, step=step):
        place = (record.get("ordinal"), record.get("attempt"))
        if place != last:
            committed = db.execute(
                "SELECT 1 FROM instances WHERE ordinal = ? AND attempt = ? AND step = ? AND state = 'committed'",
                (*place, step),
            ).fetchone()
            exported.num_missing -= committed is not None
            last = place
        if committed:
            yield {**record, "state": State.COMMITTED.value}


@contextmanager
def _replacing(output: Path) -> Iterator[IO[bytes]]:
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(output)
    except OSError as error:
        raise ConfigError(
            f"{output}: cannot be written: {error.strerror}. Make room or the directory writable, or name another "
            "file with --output."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _write_parquet(file: IO[bytes], rows: Iterator[Row], *, what: What) -> None:
    import pyarrow as pa  # here, because it takes a third of a second to import
    import pyarrow.parquet as pq

    columns = _columns(what)
    try:
        with pq.ParquetWriter(file, columns) as writer:
            while batch := [_flat(row) for row in islice(rows, _BATCH_ROWS[what])]:
                writer.write_table(pa.Table.from_pylist(batch, schema=columns))
    except pa.ArrowException as error:
        raise DataError(
            f"a sample does not fit into its columns ({error}). Export --format jsonl, or restore the file in "
            "rollouts/ that was changed."
        ) from error


def _columns(what: What) -> Any:
    """The schema of a parquet file; every value may be missing."""
    import pyarrow as pa

    columns = [(name, pa.type_for_alias(kind)) for kind, names in _COLUMNS[what].items() for name in names.split()]
    if what == "samples":
        span = pa.struct([(name, pa.int64()) for name in ("start", "end", "version")])
        lists = {"tokens": pa.int32(), "loss_mask": pa.uint8(), "logprobs": pa.float64(), "tags": pa.string()}
        columns += [(name, pa.list_(kind)) for name, kind in [*lists.items(), ("versions", span)]]
    return pa.schema(columns)


def _flat(row: Row) -> Row:
    """With JSON text where a key may have any shape, and no half surrogate pairs, which Arrow's strings cannot hold."""
    as_json = {key: encode_line(row[key]).decode() for key in _AS_JSON if key in row}
    return {
        key: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for key, value in (row | as_json).items()
    }
