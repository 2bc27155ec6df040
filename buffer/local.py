"""The buffer of a run: the policy decides, the ledger records, and whoever waits is woken.

    rollout workers ── admit ─▶ lease ── put, drop, requeue ─▶ ledger ─▶ policy ─▶ wake
                                                                             │
    training ── published(version), take ◀───────────── groups ◀─────────────┘
             └─ commit ─▶ ledger

Whoever waits (`admit` for room, `take` for a full step) waits for the next change of any kind and looks again. A move
is in the ledger before it is in memory: a failed write has changed nothing. Nothing but the waits awaits anything, so
no move can be seen half done.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from buffer import schema
from buffer.changes import Changes
from buffer.drops import Drops
from buffer.intake import ANY_MODEL, Attempt, Intake, ModelLimits, Result
from buffer.leases import Leases
from buffer.ledger import Ledger
from buffer.payload import Summary, decode, encode, inspect, summarise, versions_of
from buffer.policy import Policy, Versions
from buffer.prompts.order import PromptOrder
from buffer.records import Instance, Pushed
from buffer.restore import restore
from buffer.schema import State
from slime.errors import BufferFull, DataError, Fenced, LedgerError, SlimeError, StorageError
from slime.types import Group, Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferState:
    """Where everything stands, in counts."""

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
    capacity: int
    """How many more may be admitted now."""
    dropped: dict[str, int]
    """By reason, over the whole run."""
    num_requeued: int
    """By this process."""
    num_stale: int
    """Late or repeated results this process discarded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A packed group: its place in the run, and its samples as bytes."""

    ordinal: int
    epoch: int
    attempt: int
    payload: bytes


class LocalBuffer:
    """`slime.protocols.Buffer` over a ledger and an order of prompts, in one process.

    Opening it continues the run the ledger has: what was on its way is admitted again first, in order of issue, and
    what was graded is trained as it is.

    Args:
        policy: admission and its bounds; `buffer.policy` explains them.
        pass_reward: a sample passes when its reward reaches this; for the statistics of difficulty.
        limits: of the model that is trained; a group beyond them is refused.
        max_requeues: an instance given back more often than this is dropped, so that one bad prompt or a dead engine
            cannot turn for ever.
        max_drops_in_a_row: the run ends when so many groups in a row are dropped; 64 steps' worth by default.
        stall_timeout_s: `take` gives up when nothing was admitted, put, dropped or requeued for so long. Longer than
            the longest rollout and its reward.
        recover: whoever had leases and packed groups is gone, and they are given out again. False in a service, whose
            clients outlive it.
        clock: seconds that only grow.

    Raises:
        LedgerError: the ledger was begun with other prompts, another seed, shuffle or staleness bound.
    """

    def __init__(
        self,
        ledger: Ledger,
        prompts: PromptOrder,
        policy: Policy,
        *,
        pass_reward: float = 1.0,
        limits: ModelLimits = ANY_MODEL,
        max_requeues: int = 8,
        max_drops_in_a_row: int | None = None,
        stall_timeout_s: float = 1800.0,
        recover: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        ledger.bind("order of prompts", prompts.fingerprint)
        ledger.bind(schema.MAX_STALENESS, str(policy.max_staleness))
        self._ledger = ledger
        self._policy = policy
        self._max_requeues = max_requeues
        self._stall_timeout_s = stall_timeout_s

        self._changes = Changes(clock=clock)
        self._leases = Leases(ledger, prompts, policy, clock=clock)
        self._intake = Intake(ledger, policy, pass_reward=pass_reward, limits=limits)
        self._num_requeued = 0
        self._num_stale = 0
        self._taking = ""
        self._consumer = self._publisher = 0
        if recover:
            ledger.recover()
        else:
            self._consumer = int(ledger.recall(schema.CONSUMER) or 0)
            self._publisher, policy.version = json.loads(ledger.recall(schema.PUBLISHED) or "[0, null]")
        restore(ledger, policy, self._leases)
        self._drops = Drops(ledger.drop_reasons(), max_in_a_row=max_drops_in_a_row or 64 * policy.groups_per_step)

    async def admit(self, *, request: str | None = None) -> Lease:
        """Wait until the staleness bound allows one more group, and lease the next prompt instance.

        The wait itself has no deadline: it ends with the next publish, and `take` watches that the run moves.

        Args:
            request: a name for this request; sent again under the same name it gets the same lease.

        Raises:
            LedgerError: what the request of this name was answered with is handed in already.
            StopRun: the buffer was closed.
        """
        await asyncio.sleep(0)  # a worker that drops one prompt after the other would not let anyone else run
        if request is not None and (known := self._leases.of_request(request)):
            return known
        while self._changes.closed or not self._policy.capacity:
            await self._changes.wait()
            if request is not None and (known := self._leases.of_request(request)):  # asked twice at once
                return known
        with self._ledger.together():
            lease = self._leases.make_next()
            begun = versions_of(lease.partial.samples) if lease.partial else None
            oldest = min((self._policy.version or 0, *(begun or ())))
            self._ledger.start(lease.ordinal, attempt=lease.attempt, version=oldest, request=request)
        self._policy.admit(lease.ordinal, lease.attempt, oldest=oldest)
        self._leases.add(lease)
        self._changes.notify()
        return lease

    async def generated(self, lease: Attempt) -> bool:
        """All samples are there and go to be graded. Only for the record: `put` may follow `admit` directly.

        Returns:
            Like `put_payloads`, `drop` and `requeue_payload`, False for an attempt that is over.
        """
        recorded = self._recorded(self._ledger.generated(lease.ordinal, attempt=lease.attempt))
        if recorded:
            self._leases.is_graded_next(lease.ordinal)
        return recorded

    async def put(self, lease: Lease, group: Group, *, keep: bool, reason: str = "") -> None:
        """Hand in a graded group, to be trained if `keep`, else dropped on record for `reason`.

        A group of an older attempt, or one handed in before, is recorded as such and discarded.

        Raises:
            LedgerError: the group is not of this lease, or holds tokens of weights that were not published yet.
        """
        if (group.ordinal, group.attempt) != (lease.ordinal, lease.attempt):
            raise LedgerError(
                f"got group {group.id} (attempt {group.attempt}) for the lease of {lease.prompt.uid}:{lease.ordinal} "
                f"(attempt {lease.attempt}). Return the group built for this lease, or drop the lease."
            )
        reason = "" if keep else reason or "filtered"
        payload = encode(group) if keep else b""
        result = Result(ordinal=lease.ordinal, attempt=lease.attempt, payload=payload, drop=reason)
        (answer,) = self._hand_in([result], summarise=lambda _: summarise(group))
        if isinstance(answer, SlimeError):
            raise answer

    async def put_payloads(self, results: Sequence[Result]) -> list[bool | SlimeError]:
        """`put`, of the bytes that `buffer.payload` describes. One transaction, so that many cost little more than one.

        Returns:
            One answer a result: whether it was recorded, False when it was discarded (of an older attempt, or handed in
            before), or why it was refused: DataError when it is no group, LedgerError as `put`.
        """
        return self._hand_in(results, summarise=lambda result: inspect(result.payload))

    async def push(
        self, groups: Sequence[tuple[str, bytes]], *, summarise: Callable[[bytes], Summary] = inspect
    ) -> list[int | SlimeError]:
        """Take in graded groups that nobody was leased: rolled out elsewhere, of any prompt. Each is trained once.

        Args:
            groups: ``(request, payload)`` each. Sent again under the same request's name a group changes nothing.
            summarise: checks a payload and summarises it; for a caller that has encoded it there is nothing to check.

        Returns:
            One answer a group: the ordinal of its instance, or why it was not taken in: DataError when it is no group,
            LedgerError for tokens of weights that were not published yet or are too old already, and BufferFull when
            the staleness bound admits no more at this weight version.
        """
        answers: dict[str, int | SlimeError] = {}
        accepted: dict[str, Pushed] = {}
        coming: Counter[int] = Counter()
        for request, payload in groups:
            if request in answers or request in accepted:
                continue
            if (known := self._ledger.ordinal_of(request)) is not None:
                answers[request] = known
                continue
            try:
                accepted[request] = self._intake.pushed(request, payload, summarise(payload), coming=coming)
                coming[accepted[request].versions.oldest] += 1
            except (DataError, LedgerError) as refused:
                answers[request] = refused
        ordinals = self._ledger.push(list(accepted.values()))
        for ordinal, (request, group) in zip(ordinals, accepted.items(), strict=True):
            answers[request] = ordinal
            self._policy.push(ordinal, versions=group.versions)
        self._changes.notify()
        return [answers[request] for request, _ in groups]

    async def push_in_turn(self, request: str, payload: bytes, *, summary: Summary) -> int | SlimeError:
        """`push` of one group, which waits for room where that would refuse it as BufferFull."""
        while True:
            (answer,) = await self.push([(request, payload)], summarise=lambda _: summary)
            if not isinstance(answer, BufferFull):
                return answer
            await self._changes.wait()

    async def drop(self, lease: Attempt, *, reason: str) -> bool:
        """The instance yields nothing: record why. Its place is given to another prompt."""
        recorded = self._ledger.drop(lease.ordinal, attempt=lease.attempt, reason=reason)
        return self._ended(lease.ordinal, recorded=recorded, drop=reason)

    async def requeue(self, lease: Lease, *, reason: str, partial: Group | None = None) -> None:
        """This attempt failed for no fault of the prompt (an engine died): issue the instance again, before new ones.

        Args:
            partial: samples the next attempt begins with; it is issued before those that begin anew.
        """
        await self.requeue_payload(lease, reason=reason, partial=None if partial is None else encode(partial))

    async def requeue_payload(self, lease: Attempt, *, reason: str, partial: bytes | None = None) -> bool:
        """`requeue`, with `partial` as bytes.

        Raises:
            DataError: they are no group.
            LedgerError: they are of another prompt or of weights that were not published yet, or the group of this
                attempt is handed in.
        """
        instance = self._ledger.instance(lease.ordinal)
        if (instance.state, instance.attempt) == (State.GRADED, lease.attempt):
            raise LedgerError(
                f"instance {lease.ordinal} cannot be given back: the group of its attempt {lease.attempt} is handed "
                "in. Admit the next one, or drop groups before they are handed in."
            )
        if partial is not None:
            self._intake.check_partial(lease.ordinal, inspect(partial))
        return self._requeue(lease.ordinal, lease.attempt, reason=reason, partial=partial)

    async def take(self, num_groups: int, *, step: int) -> list[Group]:
        """Wait for `num_groups` groups and pack them into `step`. Returns them in order of issue, however they came in.

        A group that became older than `max_staleness` while it waited is requeued, not trained. Asked again for a step
        that is packed already, it returns the same groups.

        Raises:
            LedgerError: so many groups are never out at a time.
            DataError: too many groups in a row were dropped.
            SlimeError: nothing has moved for `stall_timeout_s`; the message says what is waited for.
            StopRun: the buffer was closed.
        """
        return [_group(taken) for taken in await self.take_payloads(num_groups, step=step)]

    async def take_payloads(self, num_groups: int, *, step: int, consumer: int | None = None) -> list[Taken]:
        """`take`, as bytes.

        Args:
            consumer: who takes; see `check_consumer`.

        Raises:
            Fenced: another consumer took over, before or while this one waited.
        """
        self._taking = f"step {step} waits for {num_groups} groups"
        try:
            while not (ordinals := self._packed_into(step)):
                if consumer is not None:
                    self.check_consumer(consumer)
                if ordinals := self._fit(num_groups):
                    self._ledger.pack(ordinals, step=step)
                    self._policy.pack(ordinals, step=step)
                    break
                self._drops.check()
                await self._moved()
        finally:
            self._taking = ""
        return [self._taken(ordinal) for ordinal in ordinals]

    def consume(self) -> int:
        """Let a new consumer take over: what is packed and not committed is released, and goes to it.

        Returns:
            Its incarnation. `check_consumer` fences whoever came before.
        """
        with self._ledger.together():
            consumer = self._ledger.next_consumer()
            released = self._ledger.release()
        self._consumer = consumer
        self._released(released)
        return consumer

    def release(self) -> int:
        """Give back what is packed and not committed, to be taken again. Returns how many groups."""
        released = self._ledger.release()
        self._released(released)
        return len(released)

    def check_consumer(self, incarnation: int) -> None:
        """Refuse a consumer that another has taken over from.

        Raises:
            Fenced: it is not the last one.
        """
        if incarnation != self._consumer:
            raise Fenced(
                f"consumer {incarnation} is not the one that trains now, {self._consumer or 'none'}. End this process, "
                "or let it take over as a new consumer: it continues from the last commit."
            )

    def leases(self) -> list[Lease]:
        """What is out, in order of issue."""
        return list(self._leases)

    def expire(self, lease: Attempt) -> None:
        """Requeue a lease whose holder is silent; what the holder still hands in is discarded."""
        self._requeue(lease.ordinal, lease.attempt, reason="lease_expired")

    def leased(self, lease: Attempt) -> Lease | None:
        """The lease of this attempt while it is out."""
        return self._leases.of(lease)

    async def published(self, version: int) -> None:
        """Engines now answer as `version`: admission may go on.

        A new consumer begins with the weights of the last commit, which may be older than what its predecessor had
        published: what is running is then requeued, because no tokens of those weights can be trained any more.

        Raises:
            LedgerError: they answered as a newer one before.
        """
        fell_back = self._publisher != self._consumer and version < (self._policy.version or 0)
        if not fell_back:
            self._policy.check_publish(version)
        self._ledger.remember(schema.PUBLISHED, json.dumps([self._consumer, version]))
        self._publisher, self._policy.version = self._consumer, version
        if fell_back:
            for ordinal, running in sorted(self._policy.running.items()):
                self._requeue(ordinal, running.attempt, reason="weights_lost")
        self._changes.notify()

    async def commit(self, step: int, *, checkpoint: str, state: dict[str, Any]) -> None:
        """One atomic, durable transaction: everything packed up to `step` is committed and `checkpoint` is current.

        Asked again for the last step with the same checkpoint, because the answer got lost, it changes nothing.

        Raises:
            LedgerError: the step is committed already, with another checkpoint, or a later one is.
        """
        last = self._ledger.last_commit()
        if last is not None and (last.step, last.checkpoint) == (step, checkpoint):
            return
        self._ledger.commit(step, checkpoint=checkpoint, state=state)
        self._policy.commit(step)

    def close(self) -> None:
        """End every wait with StopRun. What is on its way stays in the ledger for the next start."""
        self._changes.close()

    def state(self) -> BufferState:
        """Where everything stands, in counts."""
        policy = self._policy
        return BufferState(
            version=policy.version,
            num_waiting=len(policy.waiting),
            num_running=len(policy.running),
            num_ready=len(policy.ready),
            num_packed=len(policy.packed),
            num_committed=policy.num_committed,
            capacity=policy.capacity,
            dropped=dict(self._drops.by_reason),
            num_requeued=self._num_requeued,
            num_stale=self._num_stale,
        )

    @property
    def idle_s(self) -> float:
        """Since anything moved."""
        return self._changes.idle_s

    def describe(self) -> str:
        """Who waits for what, oldest first, for the watchdog and for error messages."""
        policy = self._policy
        version = policy.version
        room = "before the first publish" if version is None else f"up to {policy.limit} at version {version}"
        return (
            f"{self._taking or 'no step waits'}; {len(policy.ready)} ready; {len(self._leases)} running: "
            f"{self._leases.describe()}; {policy.num_admitted} admitted, {room}; "
            f"{len(policy.waiting)} waiting to be issued again; nothing moved for {self.idle_s:.0f} s"
        )

    # What follows is bookkeeping; nothing in it awaits but `_moved`.

    def _taken(self, ordinal: int) -> Taken:
        payload = self._ledger.payload(ordinal)
        if payload is None:
            raise LedgerError(f"the samples of instance {ordinal} are missing. Look at the run with `slime audit`.")
        instance = self._ledger.instance(ordinal)
        return Taken(ordinal=ordinal, epoch=instance.epoch, attempt=instance.attempt, payload=payload)

    def _hand_in(self, results: Sequence[Result], *, summarise: Callable[[Result], Summary]) -> list[bool | SlimeError]:
        """Everything is recorded in one transaction, and only then seen by the policy."""
        answers: list[bool | SlimeError] = []
        versions: dict[int, Versions | None] = {}
        with self._ledger.together():
            for result in results:
                try:
                    summary = summarise(result)
                    answers.append(self._intake.record(result, summary))
                    versions[result.ordinal] = summary.versions
                except StorageError:
                    raise
                except (DataError, LedgerError) as refused:
                    answers.append(refused)
        for result, answer in zip(results, answers, strict=True):
            if not isinstance(answer, SlimeError):
                self._ended(result.ordinal, recorded=answer, drop=result.drop, versions=versions[result.ordinal])
        return answers

    def _ended(self, ordinal: int, *, recorded: bool, drop: str = "", versions: Versions | None = None) -> bool:
        """A lease ended: its group is ready, or dropped."""
        if recorded:
            self._leases.end(ordinal)
            if drop:
                self._policy.drop(ordinal)
                self._drops.add(drop)
            else:
                assert versions is not None
                self._policy.put(ordinal, versions=versions)
                if not self._policy.why_unfit(versions):  # else it comes back, and is dropped in the end
                    self._drops.end_row()
        return self._recorded(recorded)

    def _recorded(self, recorded: bool) -> bool:
        self._num_stale += not recorded
        self._changes.notify()
        return recorded

    def _released(self, instances: Sequence[Instance]) -> None:
        for instance in instances:
            assert instance.versions is not None
            self._policy.release(instance.ordinal, versions=instance.versions)
        self._changes.notify()

    def _requeue(self, ordinal: int, attempt: int, *, reason: str, partial: bytes | None = None) -> bool:
        num_requeues = self._ledger.num_requeues(ordinal) + 1
        given_up = num_requeues > self._max_requeues or self._ledger.instance(ordinal).position is None
        partial = None if given_up else partial
        with self._ledger.together():
            requeued = self._ledger.requeue(ordinal, attempt=attempt, reason=reason, partial=partial)
            if requeued and given_up:
                reason = f"given up after {num_requeues} attempts: {reason}"
                self._ledger.drop(ordinal, attempt=attempt + 1, reason=reason)
        if not self._recorded(requeued):
            return False
        self._leases.end(ordinal)
        self._num_requeued += 1
        if given_up:
            self._policy.give_up(ordinal)
            self._drops.add(reason)
        else:
            self._policy.requeue(ordinal, attempt=attempt + 1, partial=partial is not None)
        return True

    def _packed_into(self, step: int) -> list[int]:
        return sorted(ordinal for ordinal, packed_step in self._policy.packed.items() if packed_step == step)

    def _fit(self, num_groups: int) -> list[int]:
        for ordinal, reason in self._policy.unfit().items():
            group = _group(self._taken(ordinal))
            part = self._leases.fit_part(group)
            self._requeue(ordinal, group.attempt, reason=reason, partial=encode(part) if part else None)
        return self._policy.select(num_groups)

    async def _moved(self) -> None:
        try:
            await self._changes.wait(timeout_s=self._stall_timeout_s)
        except TimeoutError:
            raise SlimeError(
                f"the run stands still: {self.describe()}. Look at the last lines of the engines and rewards "
                "in logs/, or allow more time if one rollout may take so long."
            ) from None


def _group(taken: Taken) -> Group:
    return decode(taken.payload, ordinal=taken.ordinal, epoch=taken.epoch, attempt=taken.attempt)
