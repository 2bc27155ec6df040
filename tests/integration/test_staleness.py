"""A run whose generation goes on under training, on the real stack: devices take turns, requests wait and continue."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from buffer.books.reading import read_ledger
from buffer.difficulty import Difficulty
from tests.integration.task import Training, audit, make_task, rows, samples

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
NUM_STEPS = 4
OPTIONS = (
    "buffer.max_staleness=1",
    'buffer.filter=["not_aborted", "informative"]',
    "rollout.max_response_tokens=48",
    "profile.engine.max_running_requests=6",  # of 32 samples that are out: some are halfway whenever a step is full
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    task = make_task(tmp_path_factory.mktemp("task"))
    with Training(task, task.parent / "run", *OPTIONS) as run:
        assert run.wait() == 0, run.text()
        yield run


def test_every_trained_token_is_within_the_bound_and_every_group_has_one_fate(finished: Training) -> None:
    """Pins: a bound that holds for fakes and not for the versions that engines report."""
    with read_ledger(finished.run_dir) as ledger:
        committed = ledger.execute(
            "SELECT step - 1 - oldest_version FROM instances WHERE state = 'committed'"
        ).fetchall()
    assert len(committed) == NUM_STEPS * 4
    assert {staleness for (staleness,) in committed} == {0, 1}
    for step in range(1, NUM_STEPS + 1):
        versions = {span["version"] for sample in samples(finished.run_dir, step) for span in sample["versions"]}
        assert versions <= {step - 2, step - 1}
    result = audit(finished.run_dir)
    assert result.holds, str(result)
    assert result.num_committed == NUM_STEPS * 4
    assert set(result.dropped) <= {"prompt_too_long", "equal_rewards"}
    assert result.num_requeued == 0, "a paused engine gives nothing back"


def test_a_request_that_is_running_when_a_step_is_full_goes_on_with_the_new_weights(finished: Training) -> None:
    """Pins: work that is thrown away at every publish, or an engine that answers with mixed weights under one name."""
    trained = [sample for step in range(1, NUM_STEPS + 1) for sample in samples(finished.run_dir, step)]
    mixed = [sample for sample in trained if len(sample["versions"]) > 1]
    assert mixed
    for sample in mixed:
        old, new = sample["versions"]
        assert (new["version"], new["start"], new["end"]) == (old["version"] + 1, old["end"], len(sample["tokens"]))


def test_the_statistics_of_the_run_hold_every_judged_group(finished: Training) -> None:
    """Pins: pass statistics of the trained groups alone, which make every problem look of medium difficulty."""
    with read_ledger(finished.run_dir) as ledger:
        judged = ledger.execute(
            "SELECT prompt_uid, sum(num_samples), sum(num_passed) FROM outcomes GROUP BY prompt_uid"
        ).fetchall()
    with Difficulty(finished.run_dir / "difficulty.sqlite", read_only=True) as difficulty:
        for uid, num_samples, num_passed in judged:
            record = difficulty.get(uid)
            assert record is not None
            assert (record.num_samples, record.num_passed) == (num_samples, num_passed)
    steps = [row for row in rows(finished.run_dir) if "time/step_s" in row]
    assert sum(row["survivorship/dispatched_groups"] for row in steps) >= NUM_STEPS * 4
    assert all("loss/importance_capped_share" in row for row in steps), "old tokens are weighted"
