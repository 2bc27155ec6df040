"""The clients of a chaos run: rollout workers, pushers and consumers that misbehave at random, and write it all down.

    worker:    admit, sometimes twice ─▶ (dies) │ drop │ requeue │ put, sometimes twice
    pusher:    push one group or a few, again until it is known what became of them
    consumer:  consume ─▶ published ─▶ [take ─▶ commit ─▶ published] × n ─▶ dies between take and commit
                  └─ meanwhile, or afterwards, the one that died says its last words

All are tasks of one event loop with one history. Which version the engines answer as they know from `Fleet.version`,
which the consumer sets once the buffer has acknowledged it. A refusal is an answer like any other; a call that gives up
for want of one leaves its operation unknown, and whoever made it goes on with other work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from random import Random

from buffer.chaos.history import History, fingerprint
from buffer.payload import encode
from buffer.service.client import HttpBuffer
from slime.errors import BufferFull, LedgerError, NoAnswer, SlimeError, StorageError
from slime.types import Group, Lease, Prompt, Sample, Score

GROUPS_PER_STEP = 4
MAX_STALENESS = 1
LEASE_S = 0.15
"""Shorter than most lives of the service, each of which begins all leases anew: what dead workers had comes back."""


@dataclass(slots=True, kw_only=True)
class Fleet:
    """What the clients of one run share."""

    connect: Callable[[], HttpBuffer]
    history: History
    rng: Random
    version: int = 0
    """What the engines answer as."""
    num_steps: int = 0
    """Commits that were acknowledged."""
    num_dead_consumers: int = 0
    buffer: HttpBuffer = field(init=False)
    _names: Iterator[int] = field(default_factory=count)
    _stepped: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        self.buffer = self.connect()

    def name(self, what: str) -> str:
        """One that nobody has had."""
        return f"{what}-{next(self._names)}"

    async def committed(self) -> None:
        """A commit was acknowledged."""
        async with self._stepped:
            self.num_steps += 1
            self._stepped.notify_all()

    async def steps(self, num_steps: int) -> None:
        """Wait for so many acknowledged commits."""
        async with self._stepped:
            await self._stepped.wait_for(lambda: self.num_steps >= num_steps)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability


@contextmanager
def answered() -> Iterator[None]:
    """Go on after a refusal, or when no answer came in time: the history has it."""
    try:
        yield
    except StorageError:
        raise  # nobody harms the disk
    except LedgerError:
        pass


def rolled_out(prompt: Prompt, *, version: int, rng: Random, ordinal: int = 0, attempt: int = 0) -> Group:
    """A group like no other, of a few samples."""
    samples = []
    for index in range(rng.randint(2, 4)):
        sample = Sample(prompt_uid=prompt.uid, index=index, rollout_id=f"{prompt.uid}/{index}")
        sample.append([1, 2])
        drawn = [rng.randrange(1 << 31) for _ in range(rng.randint(1, 40))]
        sample.append(drawn, logprobs=[-rng.randrange(1 << 10) / 64 for _ in drawn], version=version)
        sample.verdict = Score(value=float(rng.randrange(2)))
        samples.append(sample)
    return Group(prompt=prompt, ordinal=ordinal, epoch=0, attempt=attempt, samples=samples)


async def roll_out(fleet: Fleet) -> None:
    """A rollout worker, for ever."""
    while True:
        with answered():
            await _roll_out_one(fleet)


async def _roll_out_one(fleet: Fleet) -> None:
    request = fleet.name("admit")
    for _ in range(1 + fleet.chance(0.1)):
        with fleet.history.operation("admit", request=request) as call:
            lease = await fleet.buffer.admit(request=request)
            call.ok(ordinal=lease.ordinal, attempt=lease.attempt)
    said = {"ordinal": lease.ordinal, "attempt": lease.attempt}
    match fleet.rng.choices(("die", "drop", "requeue", "put"), (3, 5, 5, 87))[0]:
        case "die":
            return  # its lease ends, and somebody else gets the instance
        case "drop":
            with fleet.history.operation("drop", **said) as call:
                await fleet.buffer.drop(lease, reason="filtered")
                call.ok()
        case "requeue":
            with fleet.history.operation("requeue", **said) as call:
                await fleet.buffer.requeue(lease, reason="engine died")
                call.ok()
        case _:
            await _put(fleet, lease)


async def _put(fleet: Fleet, lease: Lease) -> None:
    version = fleet.version
    await asyncio.sleep(fleet.rng.expovariate(100))
    if fleet.chance(0.02):
        await asyncio.sleep(2 * LEASE_S)
    group = rolled_out(lease.prompt, version=version, rng=fleet.rng, ordinal=lease.ordinal, attempt=lease.attempt)
    for _ in range(1 + fleet.chance(0.1)):
        with fleet.history.operation(
            "put", ordinal=lease.ordinal, attempt=lease.attempt, uid=lease.prompt.uid, samples=fingerprint(group),
            version=version,
        ) as call:  # fmt: skip
            await fleet.buffer.put(lease, group, keep=True)
            call.ok()


async def push(fleet: Fleet) -> None:
    """A pusher, for ever."""
    while True:
        version = fleet.version
        groups = {}
        for _ in range(fleet.rng.randint(1, 3)):
            name = fleet.name("push")
            groups[name] = rolled_out(Prompt(uid=name, text=name), version=version, rng=fleet.rng)
        while groups:
            groups = await _push(fleet, groups, version=version)
            await asyncio.sleep(fleet.rng.expovariate(2 if groups else 20))


async def _push(fleet: Fleet, groups: dict[str, Group], *, version: int) -> dict[str, Group]:
    """Returns the groups to push again: there was no room for them, or nobody knows what became of them."""
    calls = {
        name: fleet.history.begin(
            "push", request=f"push:{name}", uid=group.prompt.uid, samples=fingerprint(group), version=version
        )
        for name, group in groups.items()
    }
    try:
        answers = await fleet.buffer.push_batch([(name, encode(group)) for name, group in groups.items()])
    except NoAnswer:
        return groups
    again = {}
    for (name, group), answer in zip(groups.items(), answers, strict=True):
        if not isinstance(answer, SlimeError):
            calls[name].ok(ordinal=answer)
            continue
        calls[name].refused(answer)
        if isinstance(answer, BufferFull):
            again[name] = group
    return again


async def consume(fleet: Fleet) -> None:
    """One consumer after the other, for ever. Each dies with a step in hand, and says its last words later."""
    dead: _Consumer | None = None
    async with fleet.connect() as first, fleet.connect() as second:
        while True:
            buffer = second if dead and dead.buffer is first else first
            with answered():
                consumer, _ = await asyncio.gather(_take_over(fleet, buffer), _last_words(dead, late=False))
                await _last_words(dead, late=True)
                await consumer.train()
                dead = consumer


async def _take_over(fleet: Fleet, buffer: HttpBuffer) -> _Consumer:
    with fleet.history.operation("consume") as call:
        answer = await buffer.consume()
        call.ok(consumer=answer.consumer)
    step = answer.last_commit.step if answer.last_commit else 0
    return _Consumer(fleet=fleet, buffer=buffer, number=answer.consumer, step=step, talks_late=fleet.chance(0.5))


async def _last_words(dead: _Consumer | None, *, late: bool) -> None:
    """Of a consumer that was thought dead: it commits the step it had in hand, with a connection of its own."""
    if dead and dead.talks_late == late:
        with answered():
            await dead.commit()


@dataclass(slots=True, kw_only=True)
class _Consumer:
    """One incarnation of the trainer."""

    fleet: Fleet
    buffer: HttpBuffer
    number: int
    step: int
    """The last one it has taken, or continues from."""
    talks_late: bool
    """Whether its last words come when the next one has begun, or while that takes over."""

    async def train(self) -> None:
        """Until it dies."""
        await self._publish()
        while True:
            self.step += 1
            await self._take()
            if self.fleet.chance(0.15):
                self.fleet.num_dead_consumers += 1
                return
            if self.fleet.chance(0.7):
                await self.commit()
            await self._publish()

    async def _publish(self) -> None:
        await self.buffer.published(self.step)
        self.fleet.version = self.step

    async def _take(self) -> None:
        with self.fleet.history.operation("take", consumer=self.number, step=self.step) as call:
            groups = await self.buffer.take(GROUPS_PER_STEP, step=self.step)
            call.ok(groups=[[group.ordinal, group.attempt, fingerprint(group)] for group in groups])

    async def commit(self) -> None:
        """Commit all it has taken, under a name that tells who did."""
        checkpoint = f"step_{self.step}-of-{self.number}"
        with self.fleet.history.operation(
            "commit", consumer=self.number, step=self.step, checkpoint=checkpoint
        ) as call:
            await self.buffer.commit(self.step, checkpoint=checkpoint, state={})
            call.ok()
        await self.fleet.committed()
