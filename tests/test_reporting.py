"""What a run shows of itself must never be what ends it."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from buffer.difficulty import Difficulty
from buffer.ledger import Ledger
from buffer.policy import Versions
from buffer.records import Outcome
from slime.config import RunConfig
from slime.metrics import MetricsLog, read
from slime.reporting import Reporting
from slime.survivorship import Survivorship
from slime.view import RunView
from tests.builders import make_group


class Parts:
    """A reporting over real files, without engines and rewards."""

    def __init__(self, run_dir: Path, stack: ExitStack) -> None:
        self.run_dir = run_dir
        self.ledger = stack.enter_context(Ledger(run_dir))
        self.difficulty = stack.enter_context(Difficulty(run_dir / "difficulty.sqlite"))
        self.output = io.StringIO()
        parts: dict[str, Any] = dict(run_dir=run_dir, model={"path": "m"}, data={"train": "t"}, reward={"fn": "exact"})
        self.reporting = Reporting(
            RunConfig.model_validate(parts),
            SimpleNamespace(on_step=None, split=SimpleNamespace(eval=())),  # type: ignore[arg-type]
            rollout=None,  # type: ignore[arg-type]
            pool=SimpleNamespace(grade=None, metrics=dict),  # type: ignore[arg-type]
            survivorship=Survivorship(run_dir, step=0),
            difficulty=self.difficulty,
            log=stack.enter_context(MetricsLog(run_dir)),
            view=RunView("run", num_steps=2, console=Console(file=self.output, width=400)),
        )

    def step(self, step: int) -> None:
        ordinal = self.ledger.issue("p0", epoch=0, position=None)
        self.ledger.start(ordinal, attempt=0)
        outcome = Outcome(num_samples=2, num_passed=1, reward_mean=0.5, response_tokens_mean=2.0)
        self.ledger.graded(ordinal, attempt=0, payload=b"", versions=Versions(oldest=0, newest=0), outcome=outcome)
        self.ledger.pack([ordinal], step=step)
        self.reporting.step(step, [make_group(ordinal=ordinal)], {"reward/mean": 0.5})


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with ExitStack() as stack:
        yield Parts(tmp_path, stack)


def test_a_step_is_written_with_its_survivors_and_its_passes(parts: Parts) -> None:
    parts.step(1)
    (row,) = read(parts.run_dir)
    assert (row["reward/mean"], row["survivorship/trained_pass_rate"]) == (0.5, 0.5)
    record = parts.difficulty.get("p0")
    assert record is not None
    assert (record.num_samples, record.num_passed) == (2, 1)


def test_pass_statistics_that_another_run_holds_wait_for_the_next_step(parts: Parts) -> None:
    """Pins a run that dies because another one that shares its statistics is slow, and statistics with a hole."""
    parts.difficulty._db.execute("PRAGMA busy_timeout = 10")
    holder = sqlite3.connect(parts.run_dir / "difficulty.sqlite", isolation_level=None)
    try:
        holder.execute("BEGIN EXCLUSIVE")
        parts.step(1)
    finally:
        holder.close()
    assert "warning: the pass statistics of this step are not written yet" in parts.output.getvalue()
    parts.step(2)
    record = parts.difficulty.get("p0")
    assert record is not None
    assert (record.num_samples, record.num_passed) == (4, 2)
