"""The history checker: a clean run passes, and every violation that is planted is found."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from buffer.chaos.checker import check_history
from buffer.chaos.history import History, fingerprint, read_history
from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.payload import decode, encode
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from slime.errors import Fenced
from slime.types import Group, Lease, Score
from tests.builders import make_group, make_prompt

GROUPS_PER_STEP = 2
Line = dict[str, Any]


class Recorded:
    """A client of every kind, and the history of what it saw."""

    def __init__(self, buffer: LocalBuffer, history: History) -> None:
        self.buffer = buffer
        self.history = history

    async def rollout(self, *, version: int) -> None:
        """One attempt is given back, the next handed in twice; another prompt is dropped."""
        failed = await self._admit(f"failed {version}")
        with self.history.operation("requeue", ordinal=failed.ordinal, attempt=failed.attempt) as call:
            await self.buffer.requeue(failed, reason="engine died")
            call.ok()
        lease = await self._admit(f"admit {version}")
        group = make_group(uid=lease.prompt.uid, ordinal=lease.ordinal, version=version)
        group.attempt = lease.attempt
        for _ in range(2):
            said = dict(uid=lease.prompt.uid, samples=fingerprint(group), version=version)
            with self.history.operation("put", ordinal=lease.ordinal, attempt=lease.attempt, **said) as call:
                await self.buffer.put(lease, group, keep=True)
                call.ok()
        dropped = await self._admit(f"dropped {version}")
        with self.history.operation("drop", ordinal=dropped.ordinal, attempt=dropped.attempt) as call:
            await self.buffer.drop(dropped, reason="filtered")
            call.ok()

    async def _admit(self, request: str) -> Lease:
        with self.history.operation("admit", request=request) as call:
            lease = await self.buffer.admit(request=request)
            call.ok(ordinal=lease.ordinal, attempt=lease.attempt)
        return lease

    async def push(self, request: str, *, version: int) -> None:
        group = make_group(uid=f"{version + 100:016x}", version=version)
        said = dict(uid=group.prompt.uid, samples=fingerprint(group), version=version)
        with self.history.operation("push", request=request, **said) as call:
            (answer,) = await self.buffer.push([(request, encode(group))])
            if isinstance(answer, Exception):
                raise answer
            call.ok(ordinal=answer)

    def consume(self) -> int:
        with self.history.operation("consume") as call:
            consumer = self.buffer.consume()
            call.ok(consumer=consumer)
        return consumer

    async def take(self, *, consumer: int, step: int) -> list[Group]:
        with self.history.operation("take", consumer=consumer, step=step) as call:
            self.buffer.check_consumer(consumer)
            groups = await self.buffer.take(GROUPS_PER_STEP, step=step)
            call.ok(groups=[[group.ordinal, group.attempt, fingerprint(group)] for group in groups])
        return groups

    async def commit(self, *, consumer: int, step: int) -> None:
        checkpoint = f"step_{step} of {consumer}"
        with self.history.operation("commit", consumer=consumer, step=step, checkpoint=checkpoint) as call:
            self.buffer.check_consumer(consumer)
            await self.buffer.commit(step, checkpoint=checkpoint, state={})
            call.ok()


async def a_run(directory: Path) -> None:
    """Two steps by one consumer, a take-over, a late word of the first, a step by the second; more is ready."""
    prompts = PromptOrder([make_prompt(f"{i:016x}", text=f"{i} + 1 =") for i in range(5)], seed=0)
    with Ledger(directory) as ledger, History(directory / "history.jsonl") as history:
        clients = Recorded(LocalBuffer(ledger, prompts, Policy(groups_per_step=2, num_steps=9)), history)
        first = clients.consume()
        for step in (1, 2):
            await clients.buffer.published(step - 1)
            await clients.rollout(version=step - 1)
            await clients.push(f"push {step}", version=step - 1)
            await clients.take(consumer=first, step=step)
            await clients.commit(consumer=first, step=step)
        await clients.buffer.published(2)
        await clients.rollout(version=2)
        await clients.push("push 3", version=2)
        await clients.take(consumer=first, step=3)
        second = clients.consume()
        with pytest.raises(Fenced):
            await clients.commit(consumer=first, step=3)
        await clients.take(consumer=second, step=3)
        await clients.take(consumer=second, step=3)
        await clients.commit(consumer=second, step=3)
        await clients.buffer.published(3)
        await clients.push("push 4", version=3)


@pytest.fixture
async def run_dir(tmp_path: Path) -> Path:
    await a_run(tmp_path)
    return tmp_path


def check(run_dir: Path, lines: list[str] | None = None) -> list[str]:
    lines = (run_dir / "history.jsonl").read_text().splitlines() if lines is None else lines
    return check_history(read_history(lines), run_dir, groups_per_step=GROUPS_PER_STEP, max_staleness=0)


def test_a_run_that_kept_its_promises_passes(run_dir: Path) -> None:
    """Pins a checker that cries wolf: its findings would be filtered until none is read."""
    assert check(run_dir) == []


def test_operations_without_an_end_may_have_happened(run_dir: Path) -> None:
    """Pins a checker that calls every lost reply a lost group. What the consumer trained it must have been told."""
    lines = (run_dir / "history.jsonl").read_text().splitlines()
    told = {number for number, line in records(lines) if line.get("do") in ("take", "consume")}
    lines = [line for (number, record), line in zip(records(lines), lines, strict=True)
             if record["is"] != "ok" or number in told]  # fmt: skip
    assert check(run_dir, lines) == []


def records(lines: list[str]) -> Iterator[tuple[int, Line]]:
    for line in lines:
        record = json.loads(line)
        yield record["op"], record


def changed(run_dir: Path, kind: str, change: Callable[[Line, Line], None], *, number: int = 0) -> list[str]:
    """The history, with the `number`-th acknowledged operation of a kind told otherwise."""
    lines = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    ends = {line["op"]: line for line in lines if line["is"] == "ok"}
    said = [line for line in lines if line["is"] == "invoke" and line["do"] == kind and line["op"] in ends][number]
    change(said, ends[said["op"]])
    return [json.dumps(line) for line in lines]


def refused(said: Line, end: Line) -> None:
    end.clear()
    end.update({"op": said["op"], "is": "fail", "error": "LedgerError"})


LIES: dict[str, tuple[str, int, Callable[[Line, Line], None], str]] = {
    "an acknowledged push is lost": ("push", 0, lambda said, end: said.update(request="gone"), "push gone: ackn"),
    "a push is answered with another instance": ("push", 0, lambda said, end: end.update(ordinal=77), "instance .77."),
    "a refused push is there": ("push", 3, refused, "push push 4: refused, and on record"),
    "a push nobody made": ("push", 3, lambda said, end: said.update(uid="other"), "pushed by 0 requests"),
    "one request has two leases": ("admit", 2, lambda said, end: said.update(request="admit 0"), "admit 0: answ"),
    "one lease goes to two requests": ("admit", 1, lambda said, end: end.update(attempt=0), "attempt 0: leased to"),
    "an acknowledged put is lost": ("put", 0, lambda said, end: said.update(ordinal=70), "put of instance 70"),
    "an acknowledged drop is lost": ("drop", 0, lambda said, end: said.update(attempt=7), "drop of instance"),
    "an acknowledged requeue is lost": ("requeue", 0, lambda said, end: said.update(attempt=3), "requeue of instance"),
    "waiting samples are others": ("push", 3, lambda said, end: said.update(samples="x"), "its samples are not those"),
    "trained samples are others": ("push", 0, lambda said, end: said.update(samples="x"), "trained on samples that"),
    "a group is too old": ("push", 2, lambda said, end: said.update(version=0), "trained 2 versions after"),
    "consumers count backwards": ("consume", 1, lambda said, end: end.update(consumer=0), "consumer 0 took over after"),
    "an old consumer is answered": ("take", 3, lambda said, end: said.update(consumer=1), "after consumer 2 took over"),
    "an acknowledged commit is lost": ("commit", 1, lambda said, end: said.update(checkpoint="x"), "x at step 2: ackn"),
    "a commit nobody asked for": ("commit", 1, lambda said, end: said.update(checkpoint="x"), "nobody asked for it"),
    "a refused commit is there": ("commit", 0, refused, "step_1 of 1 at step 1: refused, and on record"),
    "a take is answered in two ways": ("take", 4, lambda said, end: end["groups"].pop(), "answered in different ways"),
    "a consumer trained other groups": ("take", 0, lambda said, end: end["groups"].pop(), "step 1: trained"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_what_clients_saw_and_the_ledger_does_not_have_is_found(lie: str, run_dir: Path) -> None:
    """Pins a rule of the checker that never fires: a thousand kills would prove nothing."""
    kind, number, change, found = LIES[lie]
    problems = "\n".join(check(run_dir, changed(run_dir, kind, change, number=number)))
    assert re.search(found, problems), problems


def test_a_group_that_two_consumers_trained_and_committed_is_found(run_dir: Path) -> None:
    """Pins: two incarnations that each train the same samples, and a ledger that tells of the last one only."""

    def take_the_same(said: Line, end: Line) -> None:
        lines = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
        end["groups"] = next(line["groups"] for line in lines if "groups" in line)

    problems = check(run_dir, changed(run_dir, "take", take_the_same, number=1))
    assert any("trained in step 1 of consumer 1 and step 2 of consumer 1" in problem for problem in problems)


DAMAGE = {
    "a group is lost": ("DELETE FROM instances WHERE request = 'push 4'", "push 4: acknowledged as instance"),
    "a push is there twice": (
        "INSERT INTO instances SELECT 90, prompt_uid, 0, NULL, 0, 'graded', NULL, '', 3, 3, NULL FROM instances "
        "WHERE request = 'push 4'",
        "pushed by 1 requests, and on record 2 times",
    ),
    "a group moves to another step": (
        "UPDATE instances SET step = 2 WHERE ordinal = (SELECT min(ordinal) FROM instances WHERE step = 1)",
        "step 1: committed with 1 groups of 2",
    ),
    "a step loses its groups": ("UPDATE instances SET state = 'dropped' WHERE step = 2", "step 2: committed with 0"),
    "a step is another's": ("UPDATE commits SET checkpoint = 'x' WHERE step = 3", "step 3: trained .*, and committed"),
    "samples are damaged": ("UPDATE payloads SET body = substr(body, 2)", "its samples are not those"),
    "samples are gone": ("DELETE FROM payloads", "lost 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_the_ledger_lost_or_made_up_is_found(damage: str, run_dir: Path) -> None:
    """Pins the same, from the other side: clients tell the truth, and the ledger does not."""
    change, found = DAMAGE[damage]
    with closing(sqlite3.connect(run_dir / "ledger.sqlite", isolation_level=None)) as db:
        db.execute(change)
    problems = "\n".join(check(run_dir))
    assert re.search(found, problems), problems


def test_a_fingerprint_changes_with_everything_that_is_trained() -> None:
    """Pins a comparison of groups that would not see a token, a log-probability or a reward change."""
    same, others = make_group(), [make_group() for _ in range(5)]
    others[0].samples[0].tokens[-1] += 1
    others[1].samples[0].rollout_logprobs[-1] -= 1e-6
    others[2].samples[0].loss_mask[-1] = 0
    others[3].samples[0].verdict = Score(value=0.5)
    others[4].samples.pop()
    assert len({fingerprint(group) for group in (same, make_group(), *others)}) == 6
    carried = decode(encode(same), ordinal=5, epoch=1, attempt=2)
    assert fingerprint(carried) == fingerprint(same), "whatever instance it is an attempt at"
