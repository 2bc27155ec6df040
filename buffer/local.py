"""The buffer inside one process: pacing, fencing and the ledger, for one event loop.

    rollout workers ── admit() ──▶ waits for room   woken by published(), drop, requeue, close
                    ── put(), drop(), requeue() ──▶ ledger, then memory
    training        ── take() ───▶ waits for groups woken by put(), close; gives up when nothing moves for too long
                    ── published(), commit() ──▶ ledger, then memory

Every method runs to its end without an await but for the two waits, so no lock is needed: what one method changes, no
other sees half. The ledger is written first: when that fails (a full disk), memory has not changed either.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from buffer.ledger import Instance, Ledger
from buffer.order import PromptOrder
from buffer.schema import State
from slime.errors import DataError, LedgerError, SlimeError, StopRun
from slime.types import Group, Lease

MAX_SHOWN = 8
"""Instances that `describe` lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferState:
    """Counts for the live view."""

    version: int | None
    """What the engines answer as; None before the first publish."""
    num_waiting: int
    """Requeued, to be admitted again first."""
    num_running: int
    num_ready: int
    """Graded, kept, and not taken yet."""
    num_packed: int
    """Taken and not committed yet."""
    num_committed: int
    dropped: dict[str, int]
    """By reason, over the whole run."""
    num_requeued: int
    """By this process."""
    num_stale: int
    """Late or repeated results this process discarded."""


@dataclass(slots=True, kw_only=True)
class _Running:
    lease: Lease
    since: float
    doing: str = "generating"


class LocalBuffer:
    """`slime.protocols.Buffer` over a ledger and an order of prompts.

    Admission: an instance is leased while ``num_admitted < (version + max_staleness + 1) * prompts_per_step``, where
    `num_admitted` counts all that are not dropped, and never more than ``num_steps * prompts_per_step``. With
    ``max_staleness = 0`` exactly one step's groups are out at any time and a dropped one is replaced at once. Nothing
    is admitted before the first `published`.

    Opening it continues the run the ledger has: what was on its way is admitted again first, in order of issue.

    Args:
        max_requeues: an instance given back more often than this is dropped, so that one bad prompt or a dead engine
            cannot turn for ever.
        max_drops_in_a_row: the run ends when so many groups in a row are dropped; 64 steps' worth by default.
        stall_timeout_s: `take` gives up when nothing was admitted, put, dropped or requeued for so long. Longer than
            the longest rollout and its reward.
        clock: seconds that only grow.

    Raises:
        LedgerError: the ledger was begun with other prompts, another seed or shuffle.
    """

    def __init__(
        self,
        ledger: Ledger,
        prompts: PromptOrder,
        *,
        prompts_per_step: int,
        num_steps: int,
        max_staleness: int = 0,
        max_requeues: int = 8,
        max_drops_in_a_row: int | None = None,
        stall_timeout_s: float = 1800.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        ledger.bind("order of prompts", prompts.fingerprint)
        self._ledger = ledger
        self._prompts = prompts
        self._prompts_per_step = prompts_per_step
        self._num_steps = num_steps
        self._max_staleness = max_staleness
        self._max_requeues = max_requeues
        self._max_drops_in_a_row = max_drops_in_a_row or 64 * prompts_per_step
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock

        self._version: int | None = None
        self._waiting: list[tuple[int, int]] = []  # heap of (ordinal, attempt)
        self._running: dict[int, _Running] = {}
        self._ready: dict[int, Group] = {}
        self._packed: dict[int, int] = {}  # ordinal → step
        self._num_committed = 0
        self._dropped: Counter[str] = Counter()
        self._drops_in_a_row: Counter[str] = Counter()
        self._requeues: Counter[int] = Counter()
        self._num_requeued = 0
        self._num_stale = 0
        self._taking = ""
        self._closed = False
        self._last_move = clock()
        self._changed = asyncio.Event()
        self._restore(ledger.recover())

    async def admit(self) -> Lease:
        """Wait until the staleness bound allows one more group, and lease the next prompt instance.

        The wait itself has no deadline: it ends with the next publish, and `take` watches that the run moves.

        Raises:
            StopRun: the buffer was closed.
        """
        await asyncio.sleep(0)  # a worker that drops one prompt after the other would not let anyone else run
        while not self._has_room():
            await self._change()
        ordinal, attempt = self._waiting[0] if self._waiting else (self._ledger.next_ordinal, 0)
        epoch, prompt = self._prompts.prompt_at(ordinal)
        if not self._waiting:
            self._ledger.issue(prompt.uid, ordinal=ordinal, epoch=epoch)
            self._waiting.append((ordinal, attempt))
        self._ledger.start(ordinal, attempt=attempt)
        heapq.heappop(self._waiting)
        lease = Lease(ordinal=ordinal, epoch=epoch, attempt=attempt, prompt=prompt)
        self._running[ordinal] = _Running(lease=lease, since=self._clock())
        self._wake()
        return lease

    async def generated(self, lease: Lease) -> None:
        """All samples are there and go to be graded. Only for the record: `put` may follow `admit` directly."""
        if self._recorded(self._ledger.generated(lease.ordinal, attempt=lease.attempt)):
            self._running[lease.ordinal].doing = "grading"

    async def put(self, lease: Lease, group: Group, *, keep: bool, reason: str = "") -> None:
        """Hand in a graded group, to be trained if `keep`, else dropped on record for `reason`.

        A group of an older attempt, or one handed in before, is recorded as such and discarded.

        Raises:
            LedgerError: the group is not of this lease.
        """
        if not keep:
            await self.drop(lease, reason=reason or "filtered")
            return
        if (group.ordinal, group.attempt, group.prompt.uid) != (lease.ordinal, lease.attempt, lease.prompt.uid):
            raise LedgerError(
                f"got group {group.id} (attempt {group.attempt}) for the lease of {lease.prompt.uid}:{lease.ordinal} "
                f"(attempt {lease.attempt}). Return the group built for this lease, or drop the lease."
            )
        if not group.samples:
            raise LedgerError(f"group {group.id} has no samples. Drop its lease with a reason instead.")
        if self._recorded(self._ledger.graded(lease.ordinal, attempt=lease.attempt)):
            del self._running[lease.ordinal]
            self._ready[lease.ordinal] = group
            self._drops_in_a_row.clear()

    async def drop(self, lease: Lease, *, reason: str) -> None:
        """The instance yields nothing: record why. Its place is given to another prompt."""
        if self._recorded(self._ledger.drop(lease.ordinal, attempt=lease.attempt, reason=reason)):
            del self._running[lease.ordinal]
            self._count_drop(reason)

    async def requeue(self, lease: Lease, *, reason: str) -> None:
        """This attempt failed for no fault of the prompt (an engine died): issue the instance again, before new
        ones."""
        self._requeue(lease.ordinal, lease.attempt, reason=reason)

    async def take(self, num_groups: int, *, step: int) -> list[Group]:
        """Wait for `num_groups` groups and pack them into `step`. Returns them in order of issue, however they came in.

        A group that became older than `max_staleness` while it waited is requeued, not trained.

        Raises:
            LedgerError: so many groups are never out at a time.
            DataError: too many groups in a row were dropped.
            SlimeError: nothing has moved for `stall_timeout_s`; the message says what is waited for.
            StopRun: the buffer was closed.
        """
        most = (self._max_staleness + 1) * self._prompts_per_step
        if num_groups > most:
            raise LedgerError(f"step {step} asks for {num_groups} groups, but at most {most} are out at a time")
        self._taking = f"step {step} waits for {num_groups} groups"
        try:
            while not self._has_ready(num_groups):
                self._check_drops()
                await self._change(timeout_s=self._stall_timeout_s)
        finally:
            self._taking = ""
        ordinals = sorted(self._ready)[:num_groups]
        self._ledger.pack(ordinals, step=step)
        self._packed.update(dict.fromkeys(ordinals, step))
        return [self._ready.pop(ordinal) for ordinal in ordinals]

    def published(self, version: int) -> None:
        """Engines now answer as `version`: admission may go on.

        Raises:
            LedgerError: they answered as a newer one before.
        """
        if self._version is not None and version < self._version:
            raise LedgerError(f"version {version} was published after version {self._version}")
        self._version = version
        self._wake()

    def commit(self, step: int, *, checkpoint: str, state: dict[str, Any]) -> None:
        """One atomic, durable transaction: everything packed up to `step` is committed and `checkpoint` is current."""
        self._ledger.commit(step, checkpoint=checkpoint, state=state)
        done = [ordinal for ordinal, packed_step in self._packed.items() if packed_step <= step]
        for ordinal in done:
            del self._packed[ordinal]
            self._requeues.pop(ordinal, None)
        self._num_committed += len(done)

    def close(self) -> None:
        """End every wait with StopRun. What is on its way stays in the ledger for the next start."""
        self._closed = True
        self._wake()

    def state(self) -> BufferState:
        """Counts for the live view."""
        return BufferState(
            version=self._version,
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_ready=len(self._ready),
            num_packed=len(self._packed),
            num_committed=self._num_committed,
            dropped=dict(self._dropped),
            num_requeued=self._num_requeued,
            num_stale=self._num_stale,
        )

    def describe(self) -> str:
        """Who waits for what, oldest first, for the watchdog and for error messages."""
        now = self._clock()
        running = sorted(self._running.values(), key=lambda entry: entry.since)
        shown = [
            f"{entry.lease.ordinal} ({entry.doing}, attempt {entry.lease.attempt}, {now - entry.since:.0f} s)"
            for entry in running[:MAX_SHOWN]
        ]
        if len(running) > MAX_SHOWN:
            shown.append(f"and {len(running) - MAX_SHOWN} more")
        room = (
            "before the first publish" if self._version is None else f"up to {self._limit()} at version {self._version}"
        )
        return (
            f"{self._taking or 'no step waits'}; {len(self._ready)} ready; {len(self._running)} running: "
            f"{', '.join(shown) or 'none'}; {self._num_admitted()} admitted, {room}; "
            f"{len(self._waiting)} waiting to be issued again; nothing moved for {now - self._last_move:.0f} s"
        )

    # What follows is bookkeeping; nothing in it awaits but `_change`.

    def _restore(self, waiting: Sequence[Instance]) -> None:
        for instance in waiting:
            _, prompt = self._prompts.prompt_at(instance.ordinal)
            if prompt.uid != instance.prompt_uid:
                raise LedgerError(
                    f"instance {instance.ordinal} was prompt {instance.prompt_uid} and would now be {prompt.uid}. "
                    "Restore the prompts and the seed the run began with, or start anew in another run_dir."
                )
        self._waiting = [(instance.ordinal, instance.attempt) for instance in waiting]  # sorted, hence a heap
        self._num_committed = self._ledger.counts()[State.COMMITTED]
        self._dropped.update(self._ledger.drop_reasons())

    def _num_admitted(self) -> int:
        return len(self._running) + len(self._ready) + len(self._packed) + self._num_committed

    def _limit(self) -> int:
        if self._version is None:
            return 0
        return min(self._version + self._max_staleness + 1, self._num_steps) * self._prompts_per_step

    def _has_room(self) -> bool:
        return not self._closed and self._num_admitted() < self._limit()

    def _recorded(self, recorded: bool) -> bool:
        self._num_stale += not recorded
        self._wake()
        return recorded

    def _requeue(self, ordinal: int, attempt: int, *, reason: str) -> None:
        if not self._recorded(self._ledger.requeue(ordinal, attempt=attempt, reason=reason)):
            return
        self._running.pop(ordinal, None)
        self._ready.pop(ordinal, None)
        self._num_requeued += 1
        self._requeues[ordinal] += 1
        if self._requeues[ordinal] > self._max_requeues:
            given_up = f"given up after {self._requeues[ordinal]} attempts: {reason}"
            self._ledger.drop(ordinal, attempt=attempt + 1, reason=given_up)
            self._count_drop(given_up)
        else:
            heapq.heappush(self._waiting, (ordinal, attempt + 1))

    def _has_ready(self, num_groups: int) -> bool:
        for group in [group for group in self._ready.values() if self._staleness(group) > self._max_staleness]:
            self._requeue(group.ordinal, group.attempt, reason="too old")
        return len(self._ready) >= num_groups

    def _staleness(self, group: Group) -> int:
        versions = [sample.oldest_version for sample in group.samples if sample.version_spans]
        return (self._version or 0) - min(versions) if versions else 0

    def _count_drop(self, reason: str) -> None:
        self._dropped[reason] += 1
        self._drops_in_a_row[reason] += 1

    def _check_drops(self) -> None:
        if self._drops_in_a_row.total() < self._max_drops_in_a_row:
            return
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self._drops_in_a_row.most_common(3))
        raise DataError(
            f"the last {self._drops_in_a_row.total()} groups were all dropped: {reasons}. "
            "Loosen buffer.filter, or give prompts that the model sometimes gets right."
        )

    def _wake(self) -> None:
        self._last_move = self._clock()
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, *, timeout_s: float | None = None) -> None:
        """Wait for the next change. The caller has just looked and not awaited since, so none is missed."""
        if not self._closed:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                raise SlimeError(
                    f"the run stands still: {self.describe()}. Look at the last lines of the engines and rewards "
                    "in logs/, or allow more time if one rollout may take so long."
                ) from None
        if self._closed:
            raise StopRun("the buffer was closed")
