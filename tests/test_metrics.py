"""The record of a run: what a crash leaves, what a continued run forgets, what TensorBoard reads."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slime.errors import DataError
from slime.metrics import MetricsLog, read


def scalars(run_dir: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_rows_come_back_as_written_with_numpy_numbers_and_nan(tmp_path: Path) -> None:
    """Pins NaN tokens in the file: they are not JSON, and every other reader of the file would stumble."""
    with MetricsLog(tmp_path) as log:
        log.write(1, {"reward/mean": 0.5, "loss/policy": math.nan, "loss/grad_norm": math.inf})
        log.write(2, {"reward/mean": np.float32(0.75), "rollout/groups": np.int64(16)})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines] == [1, 2]
    assert json.loads(lines[0])["loss/policy"] is None
    first, second = read(tmp_path)
    assert first["reward/mean"] == 0.5
    assert math.isnan(first["loss/policy"])
    assert math.isnan(first["loss/grad_norm"])
    assert (second["reward/mean"], second["rollout/groups"]) == (0.75, 16)


def test_rows_of_the_same_step_are_one_row(tmp_path: Path) -> None:
    """Pins an evaluation that is logged after its step and would count as a step of its own."""
    with MetricsLog(tmp_path) as log:
        log.write(1, {"reward/mean": 0.5})
        log.write(1, {"eval/held_out/pass@1": 0.25})
    (row,) = read(tmp_path)
    assert (row["reward/mean"], row["eval/held_out/pass@1"]) == (0.5, 0.25)


def test_a_torn_last_line_is_passed_over_and_repaired(tmp_path: Path) -> None:
    """Pins the row after a crash being glued to half a row: both would be lost, and the file unreadable."""
    with MetricsLog(tmp_path) as log:
        log.write(1, {"reward/mean": 0.5})
        log.write(2, {"reward/mean": 0.6})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole) - whole.index(b"\n")):
        path.write_bytes(whole[:-cut])
        assert [row["step"] for row in read(tmp_path)] == [1]
        with MetricsLog(tmp_path) as log:
            log.write(2, {"reward/mean": 0.7})
        assert [(row["step"], row["reward/mean"]) for row in read(tmp_path)] == [(1, 0.5), (2, 0.7)]


def test_a_broken_line_inside_is_reported_with_its_place(tmp_path: Path) -> None:
    """Pins silently skipping rows that are not the crash's torn tail."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n')
    with pytest.raises(DataError, match=r"line 2: got b'\[2\]'.*whole number under 'step'"):
        read(tmp_path)


def test_a_continued_run_forgets_the_steps_after_its_commit(tmp_path: Path) -> None:
    """Pins steps that were taken twice showing twice, in the file and in TensorBoard."""
    with MetricsLog(tmp_path) as log:
        for step in range(6):
            log.write(step, {"reward/mean": step / 10})
    with MetricsLog(tmp_path) as log:
        log.truncate(3)
        assert [row["step"] for row in read(tmp_path)] == [0, 1, 2, 3]
        log.write(4, {"reward/mean": 0.9})
    assert [(row["step"], row["reward/mean"]) for row in read(tmp_path)][-2:] == [(3, 0.3), (4, 0.9)]
    assert scalars(tmp_path, "reward/mean") == pytest.approx({0: 0, 1: 0.1, 2: 0.2, 3: 0.3, 4: 0.9})
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_without_metrics_reads_as_empty(tmp_path: Path) -> None:
    """Pins `slime report` on a run that has only just begun."""
    assert read(tmp_path) == []
    with MetricsLog(tmp_path / "run") as log:
        log.truncate(0)
    assert read(tmp_path / "run") == []
