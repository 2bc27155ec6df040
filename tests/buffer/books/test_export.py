"""`slime buffer export`: every row once, whole files only, and memory that does not grow."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from buffer.books.export import Exported, Format, What, export_run
from buffer.ledger import Ledger
from buffer.samples import encode_line
from buffer.schema import State
from slime.errors import ConfigError, DataError
from tests.buffer.example_run import HOSTILE, make_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def rows_of(run_dir: Path, what: What, *, format: Format = "jsonl", states: tuple[State, ...] = ()) -> list[Any]:
    output = run_dir.parent / f"out.{format}"
    done = export_run(run_dir, output, what=what, format=format, states=states, force=True)
    rows = (
        pq.read_table(output).to_pylist()
        if format == "parquet"
        else [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    )
    assert done.num_rows == len(rows)
    return rows


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_every_instance_is_one_row(run_dir: Path, form: Format) -> None:
    """Pins rows that are left out, and columns that are mixed up. Read with nothing of ours."""
    rows = rows_of(run_dir, "instances", format=form)
    assert [row["ordinal"] for row in rows] == list(range(10))
    told = {key: rows[2][key] for key in rows[2] if not key.startswith("time_")}
    assert told == {
        "ordinal": 2,
        "prompt_uid": "a2",
        "epoch": 0,
        "position": 2,
        "attempt": 0,
        "state": "committed",
        "step": 2,
        "reason": "",
        "oldest_version": 0,
        "newest_version": 0,
        "request": None,
    }
    assert rows[3]["reason"] == HOSTILE
    assert (rows[6]["position"], rows[6]["request"]) == (None, "push/6")
    assert all(row["time_issued"] <= row["time_moved"] for row in rows)


def test_samples_are_those_of_committed_groups_and_those_the_ledger_keeps(run_dir: Path) -> None:
    """Pins a group that is exported twice, from the ledger and from the file of a step that is not committed."""
    rows = rows_of(run_dir, "samples")
    assert [(row["ordinal"], row["index"], row["step"], row["state"]) for row in rows] == [
        (ordinal, index, step, state)
        for ordinal, step, state in [
            (0, 1, "committed"),
            (1, 1, "committed"),
            (2, 2, "committed"),
            (5, 3, "packed"),
            (6, None, "graded"),
            (8, None, "issued"),
        ]
        for index in (0, 1)
    ]
    assert rows[1]["response"] == f"it is {HOSTILE}"


def test_samples_are_the_same_in_both_formats(run_dir: Path) -> None:
    """Pins tokens or log-probabilities that lose digits on the way into columns."""
    plain, columns = rows_of(run_dir, "samples"), rows_of(run_dir, "samples", format="parquet")
    for row in columns:
        for key in ("prompt", "label", "verdict", "metadata"):
            row[key] = json.loads(row[key])
    assert columns == plain


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_outcomes_are_graded_attempts_trained_or_not(run_dir: Path, form: Format) -> None:
    """Pins refused groups missing: whoever looks for a bias of the filters would not find it."""
    rows = rows_of(run_dir, "outcomes", format=form)
    assert sorted((row["ordinal"], row["num_passed"], row["state"]) for row in rows) == [
        (0, 1, "committed"),
        (1, 1, "committed"),
        (2, 1, "committed"),
        (3, 0, "dropped"),
        (5, 1, "packed"),
        (6, 1, "graded"),
    ]
    assert {row["dropped"] for row in rows} == {"", HOSTILE}


@pytest.mark.parametrize("what", ["instances", "samples", "outcomes"])
def test_only_the_states_that_were_asked_for_are_exported(run_dir: Path, what: What) -> None:
    states = (State.COMMITTED, State.PACKED)
    for chosen in (states, states[:1], states[1:]):
        found = {row["state"] for row in rows_of(run_dir, what, states=chosen)}
        assert found == {state.value for state in chosen}


def test_samples_of_a_void_step_are_left_out_and_missing_files_are_counted(run_dir: Path) -> None:
    """Pins answers exported as trained that no weights know of, and silence about those that are gone."""
    with Ledger(run_dir) as ledger:
        ledger.revert(1, reason="torn")
    (run_dir / "rollouts" / "step_000001.jsonl").unlink()
    output = run_dir.parent / "out"
    done = export_run(run_dir, output, what="samples", states=[State.COMMITTED])
    assert done == Exported(num_rows=0, num_missing=2)


def test_nothing_in_the_file_drives_a_terminal(run_dir: Path) -> None:
    """Pins a control character that `cat` hands to the terminal. Every byte below 0x20 but the line break is one."""
    output = run_dir.parent / "out"
    for what in ("instances", "samples", "outcomes"):
        export_run(run_dir, output, what=what, force=True)
        assert not {chr(n) for n in (*range(10), *range(11, 32), *range(127, 160))} & set(output.read_text())


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_half_a_surrogate_pair_in_an_answer_is_exported(run_dir: Path, form: Format) -> None:
    """Pins one strange answer that makes a whole run impossible to export."""
    file = run_dir / "rollouts" / "step_000002.jsonl"
    file.write_text(file.read_text().replace('"response":"r"', r'"response":"\ud800"'))
    rows = rows_of(run_dir, "samples", format=form)
    assert rows[4]["response"] in ("\ud800", r"\ud800")


def test_a_file_that_is_there_is_not_replaced(run_dir: Path) -> None:
    """Pins hours of someone's work overwritten by a default name."""
    output = run_dir.parent / "out"
    output.write_text("mine")
    with pytest.raises(ConfigError, match=r"is there already\. Name another .*--force"):
        export_run(run_dir, output)
    assert output.read_text() == "mine"


def test_an_export_that_fails_leaves_what_was_there(run_dir: Path) -> None:
    """Pins half a file under the right name, and a temporary one beside it."""
    output = run_dir.parent / "out"
    output.write_text("before")
    (run_dir / "rollouts" / "step_000002.jsonl").write_text("{torn\n")
    with pytest.raises(DataError, match="line 1: got no JSON"):
        export_run(run_dir, output, what="samples", force=True)
    assert output.read_text() == "before"
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", "run"]


def test_a_sample_that_fits_no_column_is_named(run_dir: Path) -> None:
    file = run_dir / "rollouts" / "step_000002.jsonl"
    file.write_text(file.read_text().replace('"tokens":[5,', '"tokens":["five",'))
    with pytest.raises(DataError, match="does not fit into its columns"):
        export_run(run_dir, run_dir.parent / "out", what="samples", format="parquet")


def test_a_place_that_cannot_be_written_is_named(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere/out: cannot be written: No such file or directory"):
        export_run(run_dir, run_dir / "nowhere" / "out")


def test_a_full_disk_leaves_no_file(run_dir: Path) -> None:
    """Pins a truncated export that looks whole. A limit on the size of files stands in for the disk."""
    output = run_dir.parent / "out"
    code = (
        "import resource, signal, sys; from pathlib import Path; from buffer.books.export import export_run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "export_run(Path(sys.argv[1]), Path(sys.argv[2]), what='samples')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run_dir, output], capture_output=True, text=True, timeout=60, check=False
    )
    assert "ConfigError" in done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert sorted(path.name for path in output.parent.iterdir()) == ["run"]


def test_a_live_run_goes_on_while_it_is_exported_and_is_seen_at_one_moment(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins an export that holds the run up, or that counts an instance as two things. The run moves at every row."""
    output = run_dir.parent / "out"
    with Ledger(run_dir) as ledger:

        def moving(row: Any) -> bytes:
            ledger.issue("new", epoch=0, position=ledger.next_position)
            return encode_line(row)

        monkeypatch.setattr("buffer.books.export.encode_line", moving)
        assert export_run(run_dir, output).num_rows == 10
        assert ledger.next_ordinal == 20


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    """Pins a table that is read whole: an export of a long run would end with the machine's memory."""
    peaks = []
    for num_instances in (2_000, 20_000):
        run_dir = tmp_path / str(num_instances)
        with Ledger(run_dir) as ledger, ledger.together():
            for n in range(num_instances):
                ledger.issue(f"{n:016x}", epoch=0, position=n)
        tracemalloc.start()
        assert export_run(run_dir, tmp_path / f"{num_instances}.jsonl").num_rows == num_instances
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]
