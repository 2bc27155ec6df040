"""The one training loop, and the rollouts that feed it.

      ┌──────────── admit ◀── buffer ◀── put (graded, kept or dropped), requeue (cut off) ──┐
      ▼                         │ take: a full step, in order of issue                      │
    dispatch: a task a lease    ▼                                                           │
      generate ─▶ grade ─▶ keep?│────────────────────────────────────────────────────────────┘
                                ▼
    train: evaluate ─▶ take ─▶ build_batch ─▶ train_step ─▶ report ─▶ commit ─▶ publish ─▶ published(version)

`dispatch` waits for admission: woken by `published`, and by a drop, whose place goes to another prompt. How many groups
are out at a time is the buffer's to say alone. `train` waits for a full step, woken by `put`; meanwhile the engines
also answer the evaluation of the same weights. With max_staleness = 0 admission opens only when a version is published,
so generation and training alternate; a larger bound overlaps them. Nothing here knows Ray, SGLang or Megatron.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from slime.errors import PromptError, StopRun
from slime.protocols import Buffer, Placement, Publisher, Trainer
from slime.types import Group, Lease, Metrics, Status, TrainBatch

T = TypeVar("T")


class Rollout(Protocol):
    """Generates the samples of a leased prompt."""

    async def generate(self, lease: Lease) -> Group: ...


class BuildBatch(Protocol):
    """Groups of a step → what the trainer trains."""

    def __call__(self, groups: Sequence[Group], *, version: int) -> TrainBatch: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The parts of a run, as protocols. slime.run puts the real ones in, tests put in fakes."""

    num_steps: int
    groups_per_step: int
    commit_every: int
    buffer: Buffer
    rollout: Rollout
    grade: Callable[[Group], Awaitable[Group]]
    keep: Callable[[Group], str]
    build_batch: BuildBatch
    trainer: Trainer
    placement: Placement
    publisher: Publisher
    commit: Callable[[int], Awaitable[None]]
    """Make everything up to a step durable: checkpoint, then ledger. Does nothing where that is done."""
    evaluate: Callable[[int], Coroutine[Any, Any, None]]
    """Evaluate the engines' weights after a step, where that is due."""
    on_phase: Callable[[str], None]
    on_step: Callable[[int, Sequence[Group], Metrics], None]
    continue_aborted: bool = True
    """A group with samples that were stopped from outside is put back and continued, not graded."""


async def run_loop(run: Run, *, first_step: int, stop: asyncio.Event) -> None:
    """Train from `first_step` to the end, on what is rolled out beside it.

    Raises:
        StopRun: `stop` was set; what was trained is committed.
        SlimeError: the first failure of any rollout or of training; the others are cancelled.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            rollouts = tasks.create_task(dispatch(run), name="rollouts")
            await train(run, first_step=first_step, stop=stop)
            rollouts.cancel()
    except BaseExceptionGroup as failures:
        first = first_failure(failures)
        if isinstance(first, StopRun):
            async with run.placement.training():
                await run.commit(run.trainer.version)
        raise first from None


async def dispatch(run: Run) -> None:
    """Roll out every lease the buffer gives, side by side; for ever."""
    async with asyncio.TaskGroup() as rollouts:
        while True:
            lease = await run.buffer.admit()
            rollouts.create_task(roll_out(run, lease), name=f"instance {lease.ordinal}")


async def roll_out(run: Run, lease: Lease) -> None:
    """Generate, grade, hand in."""
    try:
        group = await run.rollout.generate(lease)
    except PromptError as unusable:
        await run.buffer.drop(lease, reason=unusable.reason)
        return
    if run.continue_aborted and any(sample.status is Status.ABORTED for sample in group.samples):
        await run.buffer.requeue(lease, reason="aborted", partial=group)
        return
    await run.buffer.generated(lease)
    group = await run.grade(group)
    reason = run.keep(group)
    await run.buffer.put(lease, group, keep=not reason, reason=reason)


async def train(run: Run, *, first_step: int, stop: asyncio.Event) -> None:
    """Take, train, report, commit, publish, step by step.

    A step is reported before it is committed: killed in between, a run takes it again and reports it again, while a
    commit without its report would leave a hole. Its times reach back to the report before.
    """
    clock = Clock(run.on_phase)
    with clock("publish"):
        published = await _publish(run)
    full_at = time.perf_counter()
    for step in range(first_step, run.num_steps + 1):
        with clock("eval"):
            await unless(stop, run.evaluate(step - 1))
        with clock("generate"):
            groups = await unless(stop, run.buffer.take(run.groups_per_step, step=step))
        since, full_at = full_at, time.perf_counter()
        speed = {"rollout/tokens_per_s": _num_tokens(groups) / (full_at - since)}
        batch = run.build_batch(groups, version=run.trainer.version)
        async with run.placement.training():
            with clock("train"):
                trained = await run.trainer.train_step(batch)
            run.on_step(step, groups, published | speed | trained | clock.metrics())
            clock = Clock(run.on_phase)
            with clock("commit"):
                if step % run.commit_every == 0 or step == run.num_steps:
                    await run.commit(step)
        with clock("publish"):
            published = await _publish(run)
    await unless(stop, run.evaluate(run.num_steps))


async def _publish(run: Run) -> Metrics:
    async with run.placement.publishing():
        metrics = await run.publisher.publish(run.trainer.version)
    await run.buffer.published(run.trainer.version)
    return metrics


def _num_tokens(groups: Sequence[Group]) -> int:
    return sum(sample.num_response_tokens for group in groups for sample in group.samples)


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, or raise StopRun as soon as `stop` is set."""
    if stop.is_set():
        work.close()
        raise StopRun("asked to stop")
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise StopRun("asked to stop")
        return await task
    finally:
        task.cancel()
        stopped.cancel()
        await asyncio.wait({task, stopped})  # what is cancelled may still have to close what it opened


def first_failure(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that began it; a task group wraps even a single one."""
    first = failures.exceptions[0]
    return first_failure(first) if isinstance(first, BaseExceptionGroup) else first


class Clock:
    """Where a step's time goes: ``with clock("train")`` adds to ``time/train_s``."""

    def __init__(self, on_phase: Callable[[str], None]) -> None:
        self._on_phase = on_phase
        self._start = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._on_phase(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[phase] = self._spent.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> Metrics:
        """``time/<phase>_s`` for every phase, and ``time/step_s`` in all."""
        spent = {f"time/{phase}_s": seconds for phase, seconds in self._spent.items()}
        return spent | {"time/step_s": time.perf_counter() - self._start}
