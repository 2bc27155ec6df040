"""The loop, with fakes at every seam but the buffer, which is the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from buffer.books.lives import read_lives
from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from slime.errors import PromptError, RewardError, StopRun
from slime.grading import keep_all, not_aborted
from slime.loop import Run, run_loop
from slime.testing import FakePlacement, FakePublisher, FakeRollout, FakeTrainer
from slime.types import Group, Lease, Metrics, Score, Status, TrainBatch
from tests.builders import make_prompt

GROUPS_PER_STEP = 4


class Recorder:
    """Builds a run and remembers what happened in it, in order."""

    def __init__(self, ledger: Ledger, *, num_steps: int = 3, **bounds: Any) -> None:
        self.ledger = ledger
        self.events: list[str] = []
        self.trained: list[list[Group]] = []
        self.trainer = FakeTrainer()
        self.publisher = FakePublisher()
        self.placement = FakePlacement()
        prompts = [make_prompt(f"{i:016x}") for i in range(100)]
        policy = Policy(groups_per_step=GROUPS_PER_STEP, num_steps=num_steps, **bounds)
        self.buffer = LocalBuffer(ledger, PromptOrder(prompts, seed=0), policy, max_requeues=2)
        self.run = dict(
            num_steps=num_steps,
            groups_per_step=GROUPS_PER_STEP,
            commit_every=2,
            buffer=self.buffer,
            rollout=FakeRollout(num_samples=2, version=lambda: self.publisher.versions[-1]),
            grade=self.grade,
            keep=keep_all,
            build_batch=self.build_batch,
            trainer=self.trainer,
            placement=self.placement,
            publisher=self.publisher,
            commit=self.commit,
            evaluate=self.evaluate,
            on_phase=lambda phase: None,
            on_step=self.on_step,
        )

    async def start(self, *, stop: asyncio.Event | None = None, **parts: Any) -> None:
        await asyncio.wait_for(run_loop(Run(**self.run | parts), first_step=1, stop=stop or asyncio.Event()), 20)

    async def grade(self, group: Group) -> Group:
        for sample in group.samples:
            sample.verdict = Score(value=float(sample.index))
        return group

    def build_batch(self, groups: Sequence[Group], *, version: int) -> TrainBatch:
        self.trained.append(list(groups))
        return TrainBatch(updates=[], metrics={})

    async def commit(self, step: int) -> None:
        await self.buffer.commit(step, checkpoint=f"step_{step}", state={})
        self.events.append(f"commit {step}")

    async def evaluate(self, step: int) -> None:
        self.events.append(f"evaluate {step}")

    def on_step(self, step: int, groups: Sequence[Group], metrics: Metrics) -> None:
        self.events.append(f"step {step}")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path) as ledger:
        yield ledger


@pytest.fixture
def recorder(ledger: Ledger) -> Recorder:
    return Recorder(ledger)


async def test_a_step_is_trained_reported_committed_published_and_evaluated_in_this_order(recorder: Recorder) -> None:
    """A commit after the publish could lose a step that engines answer with; one before the report leaves a hole."""
    await recorder.start()
    assert recorder.events == [
        "evaluate 0", "step 1", "evaluate 1", "step 2", "commit 2", "evaluate 2", "step 3", "commit 3", "evaluate 3",
    ]  # fmt: skip
    assert recorder.publisher.versions == [0, 1, 2, 3], "published before the first rollout and after every step"
    assert recorder.placement.turns == ["publishing", *["training", "publishing"] * 3]


async def test_synchronous_training_sees_only_samples_of_its_own_version(recorder: Recorder) -> None:
    """max_staleness = 0 must mean on-policy, whatever the timing."""
    await recorder.start()
    versions = [{s.oldest_version for group in groups for s in group.samples} for groups in recorder.trained]
    assert versions == [{0}, {1}, {2}]


async def test_a_dropped_group_is_replaced_so_that_every_step_is_full(recorder: Recorder) -> None:
    """A step with fewer groups trains with a larger weight on each."""
    seen: list[int] = []

    def keep(group: Group) -> str:
        seen.append(group.ordinal)
        return "odd" if group.ordinal % 2 else ""

    await recorder.start(keep=keep)
    assert [len(groups) for groups in recorder.trained] == [GROUPS_PER_STEP] * 3
    assert recorder.ledger.drop_reasons() == {"odd": len([o for o in seen if o % 2])}
    assert recorder.ledger.audit().holds


class _RefusesOrdinals(FakeRollout):
    async def generate(self, lease: Lease) -> Group:
        if lease.ordinal in (0, 5):
            raise PromptError("too long")
        return await super().generate(lease)


async def test_an_unusable_prompt_is_dropped_on_record_and_the_run_goes_on(recorder: Recorder) -> None:
    """A prompt longer than the context must cost its place, not the run, and must be counted."""
    await recorder.start(rollout=_RefusesOrdinals(num_samples=2, version=lambda: recorder.publisher.versions[-1]))
    assert recorder.ledger.drop_reasons() == {"unusable": 2}
    assert [len(groups) for groups in recorder.trained] == [GROUPS_PER_STEP] * 3


async def test_groups_are_trained_in_order_of_issue_however_they_finish(recorder: Recorder) -> None:
    """Order of arrival is noise; a run must be repeatable."""

    class Slow(FakeRollout):
        async def generate(self, lease: Lease) -> Group:
            await asyncio.sleep(0.01 * (3 - lease.ordinal % 4))
            return await super().generate(lease)

    await recorder.start(rollout=Slow(num_samples=2, version=lambda: recorder.publisher.versions[-1]))
    assert [group.ordinal for groups in recorder.trained for group in groups] == list(range(12))


@pytest.mark.parametrize("part", ["grade", "build_batch", "evaluate", "rollout"])
async def test_a_failure_anywhere_ends_the_run_as_itself(recorder: Recorder, part: str) -> None:
    """A swallowed worker leaves a run that waits for ever."""

    async def fail(*args: Any, **kwargs: Any) -> Any:
        raise RewardError("no verdicts")

    def fail_now(*args: Any, **kwargs: Any) -> Any:
        raise RewardError("no verdicts")

    class Broken:
        generate = staticmethod(fail)

    broken: dict[str, Any] = {"grade": fail, "build_batch": fail_now, "evaluate": fail, "rollout": Broken()}
    with pytest.raises(RewardError, match="no verdicts"):
        await recorder.start(**{part: broken[part]})


def _stop_at(stop: asyncio.Event, recorder: Recorder, *, event: str) -> Callable[[int], Any]:
    async def evaluate(step: int) -> None:
        await recorder.evaluate(step)
        if recorder.events[-1] == event:
            stop.set()

    return evaluate


async def test_asked_to_stop_it_commits_what_is_trained_and_leaves(recorder: Recorder) -> None:
    """Ctrl-C must not cost the steps since the last checkpoint."""
    stop = asyncio.Event()
    with pytest.raises(StopRun):
        await recorder.start(stop=stop, evaluate=_stop_at(stop, recorder, event="evaluate 1"))
    assert recorder.events[-1] == "commit 1"
    last = recorder.ledger.last_commit()
    assert last is not None
    assert last.step == 1
    assert recorder.ledger.audit().holds


class _Paced(FakeRollout):
    """Takes turns that the lease decides, and counts how many are out."""

    def __init__(self, *, turns: Callable[[Lease], int], version: Callable[[], int]) -> None:
        super().__init__(num_samples=2, version=version)
        self._turns = turns
        self.num_out = self.most_out = 0

    async def generate(self, lease: Lease) -> Group:
        self.num_out += 1
        self.most_out = max(self.most_out, self.num_out)
        group = await super().generate(lease)
        for _ in range(self._turns(lease)):
            await asyncio.sleep(0)
        self.num_out -= 1
        return group


@pytest.mark.parametrize(
    ("bounds", "most"),
    [({"max_staleness": 0}, 4), ({"max_staleness": 1}, 8), ({"max_staleness": 1, "oversample": 1.5}, 6)],
)
async def test_as_many_groups_are_out_as_the_policy_says(ledger: Ledger, bounds: dict[str, Any], most: int) -> None:
    """Pins a number of workers that leaves engines idle below the bound, or is a second bound nobody configured."""
    recorder = Recorder(ledger, num_steps=6, **bounds)
    rollout = _Paced(turns=lambda lease: 30, version=lambda: recorder.publisher.versions[-1])
    await recorder.start(rollout=rollout)
    assert rollout.most_out == most
    staleness = [
        step - group.samples[0].oldest_version for step, groups in enumerate(recorder.trained) for group in groups
    ]
    assert max(staleness) == bounds["max_staleness"]
    assert [len(groups) for groups in recorder.trained] == [GROUPS_PER_STEP] * 6
    assert recorder.ledger.audit().holds


async def test_generation_goes_on_while_a_step_is_trained(ledger: Ledger) -> None:
    """Pins staleness that is paid for and buys no overlap."""
    recorder = Recorder(ledger, max_staleness=1)
    rollout = _Paced(
        turns=lambda lease: 5 if lease.ordinal < GROUPS_PER_STEP else 40,
        version=lambda: recorder.publisher.versions[-1],
    )
    out_while_training: list[int] = []

    class Slow(FakeTrainer):
        async def train_step(self, batch: TrainBatch) -> Metrics:
            await asyncio.sleep(0)
            out_while_training.append(rollout.num_out)
            return await super().train_step(batch)

    recorder.trainer = recorder.run["trainer"] = Slow()  # type: ignore[assignment]
    await recorder.start(rollout=rollout)
    assert out_while_training == [GROUPS_PER_STEP, GROUPS_PER_STEP, 0], "and nothing is begun that no step would train"


async def test_groups_that_finish_too_late_for_a_step_wait_for_the_next(ledger: Ledger) -> None:
    """Pins over-sampling that throws the slow ones away: with them go the long answers."""
    recorder = Recorder(ledger, num_steps=4, max_staleness=1)
    slow = {1, 2}
    rollout = _Paced(
        turns=lambda lease: 400 if lease.ordinal in slow else 5, version=lambda: recorder.publisher.versions[-1]
    )
    await recorder.start(rollout=rollout)
    first, *later = [[group.ordinal for group in groups] for groups in recorder.trained]
    assert not slow & set(first), "the step was made of those that were quicker"
    assert slow <= {ordinal for step in later for ordinal in step}
    audit = ledger.audit()
    assert audit.holds
    assert (audit.num_committed, audit.dropped, audit.num_requeued) == (16, {}, 0)


async def test_dropped_groups_are_replaced_under_overlap_too(ledger: Ledger) -> None:
    """Pins a run that starves, or over-fills, when its filter drops most of what is generated."""
    recorder = Recorder(ledger, num_steps=4, max_staleness=1, oversample=1.25)
    await recorder.start(keep=lambda group: "odd" if group.ordinal % 3 else "")
    assert [len(groups) for groups in recorder.trained] == [GROUPS_PER_STEP] * 4
    assert all(group.ordinal % 3 == 0 for groups in recorder.trained for group in groups)
    audit = ledger.audit()
    assert audit.holds
    assert audit.num_committed == 16
    assert audit.num_issued == 16 + audit.dropped["odd"] + sum(audit.in_flight.values())


class _Stopped(FakeRollout):
    """The second sample of instance 1 is stopped from outside `times` times."""

    def __init__(self, *, times: int) -> None:
        super().__init__(num_samples=2, version=lambda: 0)
        self._times = times
        self.partials: list[Group | None] = []

    async def generate(self, lease: Lease) -> Group:
        group = await super().generate(lease)
        if lease.ordinal == 1:
            self.partials.append(lease.partial)
            if lease.attempt < self._times:
                group.samples[1].status = Status.ABORTED
        return group


async def test_a_group_that_was_stopped_is_continued_and_not_graded(ledger: Ledger, tmp_path: Path) -> None:
    """Pins half an answer that is judged as a whole one, and finished samples that are thrown away with it."""
    recorder = Recorder(ledger, num_steps=1)
    rollout = _Stopped(times=2)
    await recorder.start(rollout=rollout)
    assert [group.ordinal for group in recorder.trained[0]] == [0, 1, 2, 3]
    nothing, *partials = rollout.partials
    assert nothing is None
    assert [[sample.status for sample in partial.samples] for partial in partials if partial] == [
        [Status.COMPLETED, Status.ABORTED]
    ] * 2
    (life,) = read_lives(tmp_path, "1")
    assert [event.detail for event in life.events if event.event == "requeued"] == ["aborted"] * 2


async def test_a_group_that_is_always_stopped_is_given_up(ledger: Ledger) -> None:
    """Pins one prompt that turns for ever."""
    recorder = Recorder(ledger, num_steps=1)
    await recorder.start(rollout=_Stopped(times=99))
    assert ledger.drop_reasons() == {"given up after 3 attempts: aborted": 1}
    assert [group.ordinal for group in recorder.trained[0]] == [0, 2, 3, 4]


async def test_where_a_filter_drops_stopped_groups_they_are_not_continued(ledger: Ledger) -> None:
    """Pins the filter's own reason on record, and tokens that are spent on what is dropped."""
    recorder = Recorder(ledger, num_steps=1)
    await recorder.start(rollout=_Stopped(times=99), keep=not_aborted, continue_aborted=False)
    assert ledger.drop_reasons() == {"aborted": 1}
    assert ledger.audit().num_requeued == 0
