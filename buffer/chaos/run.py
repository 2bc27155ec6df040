"""The buffer under chaos: its service is killed over and over, replies are lost, consumers die; then the books are held
against what everybody saw.

    clients (`buffer.chaos.clients`) ──▶ proxy, which loses replies ──▶ service ─▶ ledger
       │                                                                  ▲
       └─▶ history ─▶ checker ◀─ ledger                    kill -9, at random moments, and a new one

Every choice is drawn from the seed. The moments are not: what is killed in its midst differs from run to run.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from fastapi import FastAPI

from buffer.chaos.checker import check_history
from buffer.chaos.clients import GROUPS_PER_STEP, LEASE_S, MAX_STALENESS, Fleet, consume, push, roll_out
from buffer.chaos.history import History, read_history
from buffer.chaos.proxy import Proxy
from buffer.chaos.service_process import ServiceProcess
from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from buffer.service.app import ServedRun, create_app
from buffer.service.client import HttpBuffer
from slime.errors import SlimeError
from slime.types import Prompt

RUN = "run"
NUM_PROMPTS = 50
NUM_WORKERS = 4
NUM_PUSHERS = 2
MEAN_LIFE_S = 0.35
"""Of a service that listens."""
STILLBORN_RATE = 0.15
"""Probability that a service is killed while it starts, which takes it a tenth of a second."""
DROP_RATE = 0.05
PATIENCE_S = 0.3
"""Of a client: short enough that some operations stay unknown."""
LIVENESS_S = 30.0
"""After the last kill a step has to be committed within this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosReport:
    """What happened, and that it had an effect."""

    num_kills: int
    num_stillborn: int
    num_lost_replies: int
    num_dead_consumers: int
    num_operations: int
    num_unknown: int
    """Operations of which nobody knows whether they happened, but the ledger."""
    num_refused: int
    num_steps: int
    """Committed."""
    problems: tuple[str, ...]
    """What the checker found; none when all promises were kept."""

    def __str__(self) -> str:
        return (
            f"{self.num_kills} kills, {self.num_stillborn} of them while it started; "
            f"{self.num_lost_replies} replies lost; {self.num_dead_consumers} consumers dead between take and commit; "
            f"{self.num_operations} operations, {self.num_unknown} of them unknown and {self.num_refused} refused; "
            f"{self.num_steps} steps committed; {len(self.problems)} promises broken"
        )


def make_app(directory: Path, *, token: str) -> FastAPI:
    """The service: a run of few prompts, small steps and short leases."""
    ledger = Ledger(directory)
    prompts = PromptOrder([Prompt(uid=f"{i:016x}", text=f"{i} + 1 =") for i in range(NUM_PROMPTS)], seed=0)
    policy = Policy(groups_per_step=GROUPS_PER_STEP, num_steps=1_000_000, max_staleness=MAX_STALENESS)
    buffer = LocalBuffer(ledger, prompts, policy, recover=False, max_drops_in_a_row=1_000_000)
    return create_app({RUN: ServedRun(buffer=buffer, ledger=ledger, lease_s=LEASE_S)}, token=token)


async def run_chaos(
    directory: Path, *, seed: int, num_kills: int, on_kill: Callable[[], None] = lambda: None
) -> ChaosReport:
    """Kill the service `num_kills` times, and check the history, which is left in ``history.jsonl`` in `directory`.

    Args:
        directory: new and empty.

    Raises:
        SlimeError: the service did not start, failed with a traceback, or nothing was committed after the last kill.
    """
    rng, token = Random(seed), secrets.token_hex(16)
    start = partial(ServiceProcess, partial(make_app, directory, token=token), log=directory / "service.log")
    with History(directory / "history.jsonl") as history:
        async with Proxy(rng=rng, drop_rate=DROP_RATE) as proxy:
            connect = partial(HttpBuffer, proxy.url, run=RUN, token=token, patience_s=PATIENCE_S)
            fleet = Fleet(connect=connect, history=history, rng=rng)
            async with fleet.buffer, asyncio.TaskGroup() as tasks:
                clients = [
                    tasks.create_task(client(fleet), name=client.__name__)
                    for client in (*[roll_out] * NUM_WORKERS, *[push] * NUM_PUSHERS, consume)
                ]
                num_stillborn = await _kill_often(start, proxy, num_kills=num_kills, rng=rng, on_kill=on_kill)
                await _go_on(start, proxy, fleet)
                for client in clients:
                    client.cancel()
    _check_log(directory / "service.log")
    lines = (directory / "history.jsonl").read_text().splitlines()
    operations = read_history(lines)
    problems = check_history(operations, directory, groups_per_step=GROUPS_PER_STEP, max_staleness=MAX_STALENESS)
    return ChaosReport(
        num_kills=num_kills,
        num_stillborn=num_stillborn,
        num_lost_replies=proxy.num_dropped,
        num_dead_consumers=fleet.num_dead_consumers,
        num_operations=len(operations),
        num_unknown=sum(operation.ended is None for operation in operations),
        num_refused=sum(operation.is_refused for operation in operations),
        num_steps=fleet.num_steps,
        problems=tuple(problems),
    )


async def _kill_often(
    start: Callable[[], ServiceProcess], proxy: Proxy, *, num_kills: int, rng: Random, on_kill: Callable[[], None]
) -> int:
    """Returns how many services were killed while they started."""
    num_stillborn = 0
    for _ in range(num_kills):
        service = start()
        proxy.upstream = None
        try:
            if rng.random() < STILLBORN_RATE:
                await asyncio.sleep(rng.uniform(0, 0.1))
                num_stillborn += 1
            else:
                proxy.upstream = await service.port()
                await asyncio.sleep(rng.expovariate(1 / MEAN_LIFE_S))
        finally:
            service.kill()
        on_kill()
    return num_stillborn


async def _go_on(start: Callable[[], ServiceProcess], proxy: Proxy, fleet: Fleet) -> None:
    """Let the run recover from the last kill; then kill the service a last time, amid its work."""
    service = start()
    try:
        proxy.upstream = await service.port()
        async with asyncio.timeout(LIVENESS_S):
            await fleet.steps(fleet.num_steps + 2)
    except TimeoutError:
        stats = await fleet.buffer.stats()
        raise SlimeError(f"no step was committed for {LIVENESS_S:.0f} s after the last kill: {stats.summary}") from None
    finally:
        service.kill()


def _check_log(path: Path) -> None:
    log = path.read_text()
    if "Traceback" in log:
        raise SlimeError(f"the service failed, and not because it was killed:\n{log[-4000:]}")
