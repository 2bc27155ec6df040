"""Pacing, fencing and the ends of waits in the buffer of one process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.payload import encode, summarise
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from slime.errors import DataError, LedgerError, SlimeError, StopRun, StorageError
from slime.types import Group, Lease
from tests.builders import make_group, make_prompt, make_sample


def order(count: int = 11, *, seed: int = 0) -> PromptOrder:
    return PromptOrder([make_prompt(f"{i:016x}", text=f"{i} + 1 =") for i in range(count)], seed=seed)


def group_of(lease: Lease, *, version: int = 0) -> Group:
    samples = [make_sample(prompt_uid=lease.prompt.uid, index=i, version=version) for i in range(2)]
    return Group(prompt=lease.prompt, ordinal=lease.ordinal, epoch=lease.epoch, attempt=lease.attempt, samples=samples)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path) as ledger:
        yield ledger


def open_buffer(ledger: Ledger, **options: Any) -> LocalBuffer:
    bounds = {
        name: options.pop(name)
        for name in ("groups_per_step", "num_steps", "max_staleness", "wait_for_stragglers")
        if name in options
    }
    return LocalBuffer(ledger, order(), Policy(**{"groups_per_step": 4, "num_steps": 10, **bounds}), **options)


async def pause(rng: random.Random, *, most: int = 6) -> None:
    """Let others run for a while, so that calls interleave in an order the seed decides."""
    for _ in range(rng.randint(0, most)):
        await asyncio.sleep(0)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(8))
async def test_no_group_is_ever_trained_older_than_the_bound(ledger: Ledger, max_staleness: int, seed: int) -> None:
    """Pins: a straggler trained too old, one lost for being too old, a step that is short, and a run that does not end.

    Workers take random times, drop, give back, hand in twice and late; the bound, the books and the count must hold.
    """
    rng = random.Random(seed)
    steps, per_step, version = 6, 4, 0
    buffer = open_buffer(ledger, num_steps=steps, max_staleness=max_staleness)
    trained: list[int] = []
    most_out = 0

    async def worker() -> None:
        nonlocal most_out
        while True:
            lease = await buffer.admit()
            born = version
            most_out = max(most_out, buffer.state().num_running + buffer.state().num_ready)
            await pause(rng, most=40 if rng.random() < 0.1 else 6)
            fate = rng.random()
            if fate < 0.1:
                await buffer.requeue(lease, reason="engine died")
                await buffer.put(lease, group_of(lease, version=born), keep=True)
            elif fate < 0.2:
                await buffer.drop(lease, reason="too long")
            else:
                await buffer.generated(lease)
                await pause(rng)
                for _ in range(rng.randint(1, 2)):
                    await buffer.put(lease, group_of(lease, version=born), keep=fate < 0.9, reason="flat")

    async def train() -> None:
        nonlocal version
        await buffer.published(0)
        for step in range(1, steps + 1):
            groups = await buffer.take(per_step, step=step)
            assert len(groups) == per_step
            assert [group.ordinal for group in groups] == sorted(group.ordinal for group in groups)
            for group in groups:
                assert version - min(sample.oldest_version for sample in group.samples) <= max_staleness
            trained.extend(group.ordinal for group in groups)
            await pause(rng, most=30)
            await buffer.commit(step, checkpoint=f"step_{step}", state={})
            version = step
            await buffer.published(version)

    workers = [asyncio.ensure_future(worker()) for _ in range(per_step * (max_staleness + 2))]
    try:
        await asyncio.wait_for(train(), 60)
    finally:
        for task in workers:
            task.cancel()
        ended = await asyncio.gather(*workers, return_exceptions=True)
    assert {type(end) for end in ended} == {asyncio.CancelledError}
    assert most_out <= per_step * (max_staleness + 1)
    assert len(trained) == len(set(trained)) == steps * per_step
    audit = ledger.audit()
    assert audit.holds, str(audit)
    assert audit.num_committed == steps * per_step
    assert not audit.in_flight, "a run that ended has nothing left on its way"
    assert audit.num_stale == buffer.state().num_stale
    assert audit.dropped == buffer.state().dropped


async def test_a_group_too_old_is_requeued_and_not_lost(ledger: Ledger) -> None:
    """Pins: the slow, hard prompt that is thrown away for being slow."""
    buffer = open_buffer(ledger, max_staleness=1, wait_for_stragglers=False)
    await buffer.published(0)
    leases = [await buffer.admit() for _ in range(8)]
    for lease in leases[1:5]:
        await buffer.put(lease, group_of(lease), keep=True)
    await buffer.take(4, step=1)
    await buffer.published(1)
    await buffer.published(2)
    await buffer.put(leases[0], group_of(leases[0], version=0), keep=True)
    await buffer.put(leases[5], group_of(leases[5], version=1), keep=True)
    assert [group.ordinal for group in await buffer.take(1, step=2)] == [5]
    again = await buffer.admit()
    assert (again.ordinal, again.attempt) == (0, 1)
    assert buffer.state().num_requeued == 1


async def test_an_instance_given_back_too_often_is_dropped_with_its_reason(ledger: Ledger) -> None:
    """Pins: one prompt that kills every engine, for ever."""
    buffer = open_buffer(ledger, max_requeues=2)
    await buffer.published(0)
    for attempt in range(3):
        lease = await buffer.admit()
        assert (lease.ordinal, lease.attempt) == (0, attempt)
        await buffer.requeue(lease, reason="engine died")
    assert buffer.state().dropped == {"given up after 3 attempts: engine died": 1}
    assert (await buffer.admit()).ordinal == 1
    assert ledger.audit().holds


async def test_given_back_instances_come_before_new_ones_in_order_of_issue(ledger: Ledger) -> None:
    buffer = open_buffer(ledger)
    await buffer.published(0)
    leases = [await buffer.admit() for _ in range(4)]
    for index in (3, 0, 2):
        await buffer.requeue(leases[index], reason="engine died")
    assert [(await buffer.admit()).ordinal for _ in range(3)] == [0, 2, 3]


async def test_a_run_whose_groups_are_all_dropped_ends_with_the_reasons(ledger: Ledger) -> None:
    """Pins: a run that generates for ever because its filter keeps nothing."""
    buffer = open_buffer(ledger, max_drops_in_a_row=20)
    await buffer.published(0)

    async def worker() -> None:
        while True:
            lease = await buffer.admit()
            await buffer.put(lease, group_of(lease), keep=False, reason="all rewards equal")

    for _ in range(3):  # 45 drops in all, of which never 20 in a row
        for _ in range(15):
            await buffer.drop(await buffer.admit(), reason="too long")
        lease = await buffer.admit()
        await buffer.put(lease, group_of(lease), keep=True)
    task = asyncio.ensure_future(worker())
    with pytest.raises(
        DataError, match=r"last 2\d groups were all dropped: all rewards equal \(2\d\).*Loosen buffer\.filter"
    ):
        await asyncio.wait_for(buffer.take(4, step=1), 30)
    task.cancel()


async def test_a_run_whose_groups_are_all_too_old_ends_too(ledger: Ledger) -> None:
    """Pins: an engine stuck on old weights that uses up prompt after prompt, each group kept and then given up."""
    buffer = open_buffer(ledger, max_drops_in_a_row=20)
    await buffer.published(0)
    await buffer.published(1)

    async def worker() -> None:
        while True:
            lease = await buffer.admit()
            await buffer.put(lease, group_of(lease, version=0), keep=True)

    task = asyncio.ensure_future(worker())
    with pytest.raises(DataError, match=r"last 2\d groups were all dropped: given up after 9 attempts: too_old"):
        await asyncio.wait_for(buffer.take(4, step=1), 30)
    task.cancel()


async def test_a_publish_that_is_not_recorded_did_not_happen(ledger: Ledger) -> None:
    """Pins: instances admitted at a version that a restarted service knows nothing of."""
    buffer = open_buffer(ledger)
    await buffer.published(0)
    ledger._db.execute("PRAGMA query_only = 1")
    with pytest.raises(StorageError, match="writable"):
        await buffer.published(1)
    assert buffer.state().version == 0
    ledger._db.execute("PRAGMA query_only = 0")
    await buffer.published(1)
    assert buffer.state().version == 1


async def test_a_run_that_stands_still_says_what_it_waits_for(ledger: Ledger) -> None:
    """Pins: a hang without a word."""
    now = 100.0
    buffer = open_buffer(ledger, stall_timeout_s=0.05, clock=lambda: now)
    await buffer.published(0)
    leases = [await buffer.admit() for _ in range(4)]
    await buffer.put(leases[0], group_of(leases[0]), keep=True)
    await buffer.generated(leases[2])
    now = 225.0
    with pytest.raises(SlimeError) as stalled:
        await buffer.take(4, step=7)
    message = str(stalled.value)
    assert "step 7 waits for 4 groups; 1 ready; 3 running" in message
    assert (
        "1 (generating, attempt 0, 125 s), 2 (grading, attempt 0, 125 s), 3 (generating, attempt 0, 125 s)" in message
    )
    assert "4 admitted, up to 4 at version 0" in message
    assert buffer.describe().startswith("no step waits; 1 ready")


async def test_moves_put_the_deadline_off(ledger: Ledger) -> None:
    """Pins: a deadline on a whole step, which a large batch on a slow machine would miss while it is getting on."""
    buffer = open_buffer(ledger, stall_timeout_s=2.0)
    await buffer.published(0)
    leases = [await buffer.admit() for _ in range(4)]
    take = asyncio.ensure_future(buffer.take(4, step=1))
    for lease in leases:
        await asyncio.sleep(0.6)
        await buffer.put(lease, group_of(lease), keep=True)
    assert len(await take) == 4


async def test_a_long_list_of_running_instances_is_cut(ledger: Ledger) -> None:
    buffer = open_buffer(ledger, groups_per_step=100)
    await buffer.published(0)
    for _ in range(100):
        await buffer.admit()
    assert "and 92 more" in buffer.describe()
    assert len(buffer.describe()) < 800


async def test_closing_ends_every_wait_and_keeps_the_instances(ledger: Ledger) -> None:
    buffer = open_buffer(ledger)
    await buffer.published(0)
    for _ in range(4):
        await buffer.admit()
    calls = [asyncio.ensure_future(call) for call in (buffer.admit(), buffer.take(4, step=1))]
    await asyncio.sleep(0)
    buffer.close()
    ended = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
    assert [type(end) for end in ended] == [StopRun, StopRun]
    with pytest.raises(StopRun):
        await buffer.admit()
    assert ledger.audit().in_flight == {"running": 4}


async def test_a_group_of_another_lease_is_refused(ledger: Ledger) -> None:
    """Pins: a generate hook that mixes up its groups and trains an answer under another prompt's reward."""
    buffer = open_buffer(ledger)
    await buffer.published(0)
    one, two = await buffer.admit(), await buffer.admit()
    with pytest.raises(LedgerError, match="for the lease of"):
        await buffer.put(one, group_of(two), keep=True)
    empty = group_of(one)
    empty.samples.clear()
    with pytest.raises(LedgerError, match="has no sampled tokens"):
        await buffer.put(one, empty, keep=True)
    await buffer.put(one, group_of(one), keep=True)
    with pytest.raises(LedgerError, match="is graded and cannot become dropped"):
        await buffer.drop(one, reason="on second thoughts")
    assert buffer.state().num_ready == 1


async def test_a_push_that_waits_gets_its_turn_beside_workers_that_take_every_place(ledger: Ledger) -> None:
    """Pins: pushes into a run that trains refused for ever, because its own workers are always there first."""
    buffer = open_buffer(ledger)
    await buffer.published(0)
    for _ in range(3):
        await buffer.admit()

    async def drop_everything() -> None:
        while True:
            await buffer.drop(await buffer.admit(), reason="too long")
            await buffer.admit()

    group = make_group(uid="pushed")
    worker = asyncio.ensure_future(drop_everything())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not buffer.state().capacity
    pushed = asyncio.ensure_future(buffer.push_in_turn("mine", encode(group), summary=summarise(group)))
    await asyncio.sleep(0)
    assert not pushed.done()
    await buffer.drop(buffer.leases()[0], reason="too long")
    await buffer.drop(buffer.leases()[0], reason="too long")
    async with asyncio.timeout(10):
        ordinal = await pushed
    worker.cancel()
    assert isinstance(ordinal, int)
    assert ledger.instance(ordinal).state == "graded"


async def test_a_packed_group_cannot_be_given_back(ledger: Ledger) -> None:
    """Pins: a group that is in a batch and generated again."""
    buffer = open_buffer(ledger, groups_per_step=1)
    await buffer.published(0)
    lease = await buffer.admit()
    await buffer.put(lease, group_of(lease), keep=True)
    await buffer.take(1, step=1)
    with pytest.raises(LedgerError, match="is packed and cannot become requeued"):
        await buffer.requeue(lease, reason="engine died")


async def test_more_groups_than_are_ever_out_are_refused(ledger: Ledger) -> None:
    """Pins: a take that can never be met and waits all the same."""
    with pytest.raises(LedgerError, match="5 groups are asked for, but at most 4"):
        await open_buffer(ledger).take(5, step=1)


async def test_versions_only_grow(ledger: Ledger) -> None:
    buffer = open_buffer(ledger)
    await buffer.published(3)
    with pytest.raises(LedgerError, match="version 2 was published after version 3"):
        await buffer.published(2)


async def test_a_failed_write_changes_nothing_in_memory(ledger: Ledger, tmp_path: Path) -> None:
    """Pins: memory and ledger apart after a full disk. The failure is SQLite's own: the file may not grow."""
    buffer = open_buffer(ledger, groups_per_step=10_000)
    await buffer.published(0)
    (num_pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count = {num_pages}")
    num_admitted = 0

    async def admit_until_full() -> None:
        nonlocal num_admitted
        for num_admitted in range(10_000):  # noqa: B007
            await buffer.admit()

    with pytest.raises(LedgerError, match="full"):
        await admit_until_full()
    assert 0 < num_admitted == buffer.state().num_running
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    lease = await buffer.admit()
    assert lease.ordinal == num_admitted
    assert ledger.audit().holds


def test_a_run_is_not_continued_over_other_prompts(ledger: Ledger) -> None:
    """Pins: ordinals that name other problems after the prompt file was edited."""
    open_buffer(ledger)
    for changed in (order(12), order(seed=1)):
        with pytest.raises(LedgerError, match="the order of prompts of this run changed"):
            LocalBuffer(ledger, changed, Policy(groups_per_step=4, num_steps=10))


async def test_a_continued_run_counts_what_the_first_process_did(tmp_path: Path) -> None:
    """Pins: a live view and an admission that start from zero after a restart."""
    with Ledger(tmp_path) as ledger:
        buffer = open_buffer(ledger)
        await buffer.published(0)
        leases = [await buffer.admit() for _ in range(4)]
        await buffer.drop(leases[0], reason="flat")
        leases.append(await buffer.admit())
        for lease in leases[1:]:
            await buffer.put(lease, group_of(lease), keep=True)
        await buffer.take(4, step=1)
        await buffer.commit(1, checkpoint="step_1", state={})
        await buffer.published(1)
        await buffer.admit()
        before = buffer.state()
    with Ledger(tmp_path) as ledger:
        after = open_buffer(ledger).state()
    assert (after.num_committed, after.dropped) == (before.num_committed, before.dropped) == (4, {"flat": 1})
    assert (before.num_running, after.num_waiting) == (1, 1)
