"""A small run that is killed at every transaction of its ledger in turn, and continued.

    python -m tests.crash_points DIRECTORY     one line of JSON a crash point

Loop, buffer, ledger, grading, batches and checkpoints are the real ones; engine and trainer are fakes that pass the
contract suites. Each run is a forked process, and the crash is SIGKILL, just before or just after the k-th commit.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from buffer.books.audit import audit_run
from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from buffer.samples import iter_samples, write_samples
from slime.checkpoints import Checkpoints
from slime.config import AdvantageConfig
from slime.errors import PromptError
from slime.grading import Grader, informative
from slime.loop import Run, run_loop
from slime.testing import FakePlacement, FakePublisher, FakeTrainer
from slime.types import Group, Lease, Metrics, Prompt, Sample, Score, Verdict
from trainer.advantage import make_advantage
from trainer.batch import build_batch

NUM_STEPS = 4
GROUPS_PER_STEP = 3
COMMIT_EVERY = 2


class CrashingLedger(Ledger):
    """Kills its process at the `crash_at`-th transaction, before or after it takes effect."""

    crash_at = -1
    crash_before = False
    num_transactions = 0

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[None]:
        outermost = not self._depth
        with super()._transaction(durable=durable):
            yield
            if outermost:
                self.num_transactions += 1
                self._crash(before=True)
        if outermost:
            self._crash(before=False)

    def _crash(self, *, before: bool) -> None:
        if self.num_transactions == self.crash_at and self.crash_before == before:
            os.kill(os.getpid(), signal.SIGKILL)


class Rollout:
    """Two samples a prompt, a function of the prompt and the weights; every seventh prompt does not fit."""

    def __init__(self, trainer: FakeTrainer) -> None:
        self._trainer = trainer

    async def generate(self, lease: Lease) -> Group:
        if int(lease.prompt.uid, 16) % 7 == 3:
            raise PromptError("too long")
        samples = [self._sample(lease, index) for index in range(2)]
        return Group(
            prompt=lease.prompt, ordinal=lease.ordinal, epoch=lease.epoch, attempt=lease.attempt, samples=samples
        )

    def _sample(self, lease: Lease, index: int) -> Sample:
        seed = f"{lease.prompt.uid} {lease.epoch} {index} {self._trainer.weights}"
        drawn = hashlib.blake2b(seed.encode(), digest_size=4).digest()
        sample = Sample(prompt_uid=lease.prompt.uid, index=index, rollout_id=f"{lease.ordinal}/{index}")
        sample.append([1, 2])
        sample.append(list(drawn), logprobs=[-byte / 256 for byte in drawn], version=self._trainer.version)
        return sample


async def grade(samples: Sequence[Sample], prompt: Prompt) -> list[Verdict]:
    return [Score(value=float(sum(sample.tokens) % 2)) for sample in samples]


async def train(run_dir: Path, ledger: Ledger) -> None:
    """The run, from its start or from where it was killed."""
    trainer, publisher = FakeTrainer(), FakePublisher()
    checkpoints = Checkpoints(run_dir / "checkpoints", trainer=trainer, keep=2)
    step = await checkpoints.restore(ledger)
    prompts = PromptOrder([Prompt(uid=f"{i:016x}", text=str(i)) for i in range(20)], seed=0)
    buffer = LocalBuffer(ledger, prompts, Policy(groups_per_step=GROUPS_PER_STEP, num_steps=NUM_STEPS))

    async def evaluate(step: int) -> None: ...

    def on_step(step: int, groups: Sequence[Group], metrics: Metrics) -> None:
        write_samples(run_dir, groups, step=step)

    run = Run(
        num_steps=NUM_STEPS,
        groups_per_step=GROUPS_PER_STEP,
        commit_every=COMMIT_EVERY,
        buffer=buffer,
        rollout=Rollout(trainer),
        grade=Grader(grade, max_failure_rate=0.2, window=6),
        keep=informative,
        build_batch=partial(
            build_batch,
            advantages=make_advantage(AdvantageConfig()),
            aggregation="sequence",
            updates_per_step=1,
            num_ranks=1,
            tokens_per_microbatch=16,
        ),
        trainer=trainer,
        placement=FakePlacement(),
        publisher=publisher,
        commit=partial(checkpoints.commit, buffer=buffer),
        evaluate=evaluate,
        on_phase=lambda phase: None,
        on_step=on_step,
    )
    await run_loop(run, first_step=step + 1, stop=asyncio.Event())


def run_once(run_dir: Path, *, crash_at: int = -1, crash_before: bool = False) -> int:
    """Run in a forked process, to the end or to its crash. Returns the number of transactions, -1 after a crash."""
    count = run_dir / "transactions"
    count.unlink(missing_ok=True)
    if not (child := os.fork()):
        status = 1
        try:
            with CrashingLedger(run_dir) as ledger:
                ledger.num_transactions = 0  # those of opening it were counted too
                ledger.crash_at, ledger.crash_before = crash_at, crash_before
                asyncio.run(train(run_dir, ledger))
                count.write_text(str(ledger.num_transactions))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return -1
    assert status == 0, f"the run failed with status {status}"
    return int(count.read_text())


def outcome(run_dir: Path) -> dict[str, Any]:
    """What a run ends with: its weights, and every trained sample."""
    last = max((run_dir / "checkpoints").glob("step_*"))
    keys = ("ordinal", "prompt_uid", "tokens", "logprobs", "reward", "versions")
    return {
        "checkpoint": last.name,
        "weights": json.loads((last / "state.json").read_text())["weights"],
        "samples": [
            [{key: row[key] for key in keys} for row in iter_samples(run_dir, step=step)]
            for step in range(1, NUM_STEPS + 1)
        ],
    }


def main(directory: Path, *, report: Callable[[dict[str, Any]], None]) -> None:
    whole = directory / "whole"
    num_transactions = run_once(whole)
    expected = outcome(whole)
    for crash_at in range(1, num_transactions + 1):
        for crash_before in (True, False):
            run_dir = directory / "crashed"
            died = run_once(run_dir, crash_at=crash_at, crash_before=crash_before) == -1
            at_crash = audit_run(run_dir)
            run_once(run_dir)
            at_end = audit_run(run_dir)
            report(
                {
                    "crash_at": crash_at,
                    "before": crash_before,
                    "died": died,
                    "audits": [str(audit) for audit in (at_crash, at_end) if not audit.holds],
                    "equal": outcome(run_dir) == expected,
                }
            )
            shutil.rmtree(run_dir)


if __name__ == "__main__":
    main(Path(sys.argv[1]), report=lambda row: print(json.dumps(row), flush=True))
