"""Whole runs on the real Ray, Megatron-core and SGLang, through the command line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.task import Training, audit, make_task, rows, samples

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
NUM_STEPS = 4


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def finished(task: Path) -> Iterator[Training]:
    """A run that nothing disturbed."""
    with Training(task, task.parent / "finished") as run:
        assert run.wait() == 0, run.text()
        yield run


def test_a_run_trains_every_step_on_policy_and_accounts_for_every_prompt(finished: Training) -> None:
    """The loop, the version handshake and the ledger hold together on the real stack."""
    steps = [row for row in rows(finished.run_dir) if "time/step_s" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(row["staleness/max"] == 0 for row in steps)
    assert all(row["loss/skipped_updates"] == 0 for row in steps)
    assert [row["step"] for row in rows(finished.run_dir) if "eval/held_out/pass@1" in row] == [0, 2, 4]
    for step in range(1, NUM_STEPS + 1):
        spans = [span for sample in samples(finished.run_dir, step) for span in sample["versions"]]
        assert {span["version"] for span in spans} == {step - 1}, "the engine itself says which weights answered"
    result = audit(finished.run_dir)
    assert result.holds
    assert result.num_committed == NUM_STEPS * 4
    assert set(result.dropped) == {"prompt_too_long"}, "counted and skipped"


def test_engine_and_trainer_agree_on_the_probability_of_every_token(finished: Training) -> None:
    """A publish that loses a tensor, or a temperature applied on one side only, shows here first."""
    for row in rows(finished.run_dir):
        if "mismatch/logprob_abs_mean" in row:
            assert row["mismatch/logprob_abs_mean"] < 0.03


def test_a_run_killed_three_times_ends_with_the_same_samples_and_weights_bit_for_bit(
    task: Path, finished: Training
) -> None:
    """`kill -9` of the driver: nothing is lost, nothing is trained twice, and the run ends where it would have.

    The first dies over a rollout, the second with its checkpoint written and not committed, the third with its commit
    written and not published.
    """
    run_dir = task.parent / "killed"
    for crash in ("12 before", "commit before", "commit after"):
        with Training(task, run_dir, crash=crash) as run:
            assert run.wait() == -signal.SIGKILL, run.text()
            run.wait_for_engines_to_end()
        assert audit(run_dir).holds
    with Training(task, run_dir) as run:
        assert run.wait() == 0, run.text()
    result = audit(run_dir)
    assert result.holds
    assert result.num_committed == NUM_STEPS * 4
    for step in range(1, NUM_STEPS + 1):
        ours, theirs = samples(run_dir, step), samples(finished.run_dir, step)
        assert [(s["tokens"], s["logprobs"]) for s in ours] == [(s["tokens"], s["logprobs"]) for s in theirs]
    for weights in (finished.run_dir / "model").glob("*.safetensors"):
        assert (run_dir / "model" / weights.name).read_bytes() == weights.read_bytes()


def test_ctrl_c_commits_what_is_trained_and_the_same_command_goes_on(task: Path) -> None:
    """A run that is stopped between checkpoints must not lose the steps since the last one; a second run is refused."""
    run_dir = task.parent / "stopped"
    with Training(task, run_dir, "checkpoint.every=100", "num_steps=5000") as run:
        run.wait_for_step(1)
        with Training(task, run_dir) as second:
            assert second.wait() == 1
            assert f"process {run.process.pid}" in second.text()
        run.interrupt()
        assert run.wait() == 130, run.text()
    committed = audit(run_dir)
    assert committed.holds
    assert committed.num_committed >= 4
    last = max(row["step"] for row in rows(run_dir) if "time/step_s" in row)
    assert (run_dir / f"checkpoints/step_{last:06d}").is_dir()
    with Training(task, run_dir, "checkpoint.every=100", "num_steps=5000") as run:
        run.wait_for_step(last + 1)
        run.interrupt()
        run.interrupt()
        assert run.wait() == 130, run.text()
        run.wait_for_engines_to_end()
    steps = [row["step"] for row in rows(run_dir) if "time/step_s" in row]
    assert steps == list(range(1, len(steps) + 1)), "the run went on where it had stopped"
    assert audit(run_dir).holds, "twice leaves at once, and the books are right"
