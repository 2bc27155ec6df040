"""`slime bench buffer` and `slime bench buffer-chaos`: the data buffer beside what it is built from.

Rounds of both sides alternate, and medians are compared: the machine may be shared, and its noise meets both alike.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import shutil
import sqlite3
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import httpx
from fastapi import FastAPI

from buffer import schema
from buffer.chaos.run import run_chaos
from buffer.chaos.service_process import ServiceProcess
from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.payload import encode
from buffer.policy import Policy
from buffer.prompts.index import open_index
from buffer.prompts.order import PromptOrder
from buffer.prompts.sources import IndexedPrompts
from buffer.service import bodies
from buffer.service.app import ServedRun, create_app
from buffer.service.client import HttpBuffer
from slime.errors import SlimeError
from slime.types import Group, Prompt, Sample, Score

PUSH_LIMIT, REQUEST_LIMIT, CLAIM_LIMIT, IDLE_LIMIT, MEMORY_LIMIT = 0.5, 0.7, 4.0, 0.01, 200
NUM_ROUNDS = 9
GROUPS_PER_BATCH = 64
BATCHES_PER_ROUND = 4
SAMPLES_PER_GROUP = 8
TOKENS_PER_SAMPLE = 1024
REQUESTS_PER_ROUND = 100
REQUEST_ROUNDS = 25
"""More than of the others: a round takes a third of a second, which a disk that catches up can take whole."""
CLAIMS_PER_ROUND = 200
FEW_PROMPTS = 1_000
NUM_QUEUED = 100_000
IDLE_S = 10.0
UNBOUNDED = 1_000_000
"""Groups a step: nothing waits for admission."""


def bench_buffer(*, num_prompts: int) -> None:
    """Measure everything, and print each figure with its limit.

    Args:
        num_prompts: rows of the larger of the two prompt files.
    """
    for measure in (bench_pushes, bench_requests, bench_idle, bench_memory, partial(bench_claims, num_prompts)):
        with tempfile.TemporaryDirectory() as scratch:
            asyncio.run(measure(Path(scratch)))


def bench_chaos(*, num_kills: int, seed: int) -> None:
    """Kill the service `num_kills` times, and check what clients saw against the ledger.

    Raises:
        SlimeError: a promise was broken; names the directory with the history and the ledger, which is kept.
    """
    directory = Path(tempfile.mkdtemp(prefix="slime-chaos-"))
    click.echo(f"seed           {seed:10d}")
    with click.progressbar(length=num_kills, label="kills") as progress:
        report = asyncio.run(run_chaos(directory, seed=seed, num_kills=num_kills, on_kill=lambda: progress.update(1)))
    click.echo(str(report))
    if report.problems:
        shown = "\n".join(report.problems[:20])
        raise SlimeError(f"seed {seed}, {directory / 'history.jsonl'}: the buffer broke its promises:\n{shown}")
    shutil.rmtree(directory)


def a_group(uid: str, *, num_samples: int, num_tokens: int) -> Group:
    """Of weights that version 0 is."""
    samples = []
    for index in range(num_samples):
        sample = Sample(prompt_uid=uid, index=index, rollout_id=f"{uid}/{index}", response="r" * num_tokens)
        sample.append(range(num_tokens), logprobs=[-0.5] * num_tokens, version=0)
        sample.verdict = Score(value=float(index % 2))
        samples.append(sample)
    return Group(prompt=Prompt(uid=uid, text=uid), ordinal=0, epoch=0, attempt=0, samples=samples)


def open_buffer(ledger: Ledger, prompts: PromptOrder, *, recover: bool = False) -> LocalBuffer:
    policy = Policy(groups_per_step=UNBOUNDED, num_steps=UNBOUNDED)
    return LocalBuffer(ledger, prompts, policy, recover=recover)


def some_prompts() -> PromptOrder:
    return PromptOrder([Prompt(uid=f"{i:016x}", text=str(i)) for i in range(FEW_PROMPTS)], seed=0)


async def alternate(*sides: Callable[[int], Awaitable[None]], num_rounds: int = NUM_ROUNDS) -> list[float]:
    """The median time of a round of each side, in seconds. Each is told the round's number; the first warms up."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(num_rounds + 1):
        for side, own in zip(sides, times, strict=True):
            start = time.perf_counter()
            await side(number)
            own.append(time.perf_counter() - start)
    return [median(own[1:]) for own in times]


async def bench_pushes(scratch: Path) -> None:
    """Batches of pushed groups against the same rows written by SQLite's executemany, in the same batches."""
    token = secrets.token_hex(16)
    groups = [
        encode(a_group(f"{i:016x}", num_samples=SAMPLES_PER_GROUP, num_tokens=TOKENS_PER_SAMPLE))
        for i in range(GROUPS_PER_BATCH)
    ]

    async def push(by: Callable[[list[tuple[str, bytes]]], Awaitable[Any]], number: int) -> None:
        for batch in range(BATCHES_PER_ROUND):
            await by([(f"{number}-{batch}-{i}", group) for i, group in enumerate(groups)])

    async def write(db: sqlite3.Connection, number: int) -> None:
        for batch in range(BATCHES_PER_ROUND):
            write_raw(db, groups, first=(number * BATCHES_PER_ROUND + batch) * GROUPS_PER_BATCH)

    with (
        Ledger(scratch / "ours") as ledger,
        closing(raw_ledger(scratch / "raw.sqlite")) as raw,
        process(partial(make_app, scratch, token=token), scratch) as service,
    ):
        local = open_buffer(ledger, some_prompts())
        async with HttpBuffer(f"http://127.0.0.1:{await service.port()}", run="run", token=token) as remote:
            for buffer in (local, remote):
                await buffer.published(0)
            times_s = await alternate(partial(push, local.push), partial(push, remote.push_batch), partial(write, raw))
    ours, http, plain = (GROUPS_PER_BATCH * BATCHES_PER_ROUND / time_s for time_s in times_s)
    size = f"in batches of {GROUPS_PER_BATCH}, {len(groups[0]) / 1024:.0f} KiB each"
    click.echo(f"push           {ours:10,.0f} groups/s, checked and recorded, {size}")
    click.echo(f"push over HTTP {http:10,.0f} groups/s, the same, from another process; {http / plain:.2f} of SQLite's")
    click.echo(f"raw SQLite     {plain:10,.0f} groups/s, the same rows in the same batches")
    click.echo(f"ratio          {ours / plain:10.2f}   (limit: at least {PUSH_LIMIT:.2f})")


def raw_ledger(path: Path) -> sqlite3.Connection:
    """The ledger's tables and pragmas without the ledger."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    schema.create(db)
    return db


def write_raw(db: sqlite3.Connection, groups: Sequence[bytes], *, first: int) -> None:
    """The rows of a batch of pushes, in one transaction."""
    now, ordinals = time.time(), range(first, first + len(groups))
    tables: dict[str, list[tuple[Any, ...]]] = {
        "instances (ordinal, prompt_uid, epoch, attempt, state, oldest_version, newest_version, request)": [
            (ordinal, f"{i:016x}", 0, 0, "graded", 0, 0, f"raw/{ordinal}") for i, ordinal in enumerate(ordinals)
        ],
        "payloads (ordinal, body)": list(zip(ordinals, groups, strict=True)),
        "events (time, ordinal, attempt, event, step, detail)": [
            (now, ordinal, 0, event, None, "") for ordinal in ordinals for event in ("issued", "running", "graded")
        ],
        "outcomes (ordinal, attempt, prompt_uid, version, num_samples, num_passed, reward_mean, response_tokens_mean, "
        "dropped)": [
            (ordinal, 0, f"{i:016x}", 0, SAMPLES_PER_GROUP, SAMPLES_PER_GROUP // 2, 0.5, TOKENS_PER_SAMPLE, "")
            for i, ordinal in enumerate(ordinals)
        ],
    }
    db.execute("BEGIN IMMEDIATE")
    for table, rows in tables.items():
        db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
    db.execute("COMMIT")


def make_app(directory: Path, *, token: str) -> FastAPI:
    """A service with room for all that is pushed."""
    ledger = Ledger(directory / "run")
    buffer = open_buffer(ledger, some_prompts())
    return create_app({"run": ServedRun(buffer=buffer, ledger=ledger)}, token=token)


def make_echo_app() -> FastAPI:
    """A plain FastAPI app that checks a body with pydantic, and sends it back."""
    app = FastAPI()

    @app.post("/echo")
    async def echo(body: bodies.PushBody) -> bodies.PushBody:
        return body

    return app


@contextmanager
def process(make: Callable[[], FastAPI], scratch: Path) -> Iterator[ServiceProcess]:
    service = ServiceProcess(make, log=scratch / "log")
    try:
        yield service
    finally:
        service.kill()


async def bench_requests(scratch: Path) -> None:
    """One pushed group a request, in the ledger before it is answered, against an echo of the same body."""
    token = secrets.token_hex(16)
    with (
        process(partial(make_app, scratch, token=token), scratch) as service,
        process(make_echo_app, scratch) as echo_service,
    ):
        url, echo_url = f"http://127.0.0.1:{await service.port()}", f"http://127.0.0.1:{await echo_service.port()}"
        async with HttpBuffer(url, run="run", token=token) as buffer, httpx.AsyncClient() as client:
            await buffer.published(0)
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

            async def send(to: str, number: int) -> None:
                for i in range(REQUESTS_PER_ROUND):
                    content = push_body(f"{number}-{i}").model_dump_json()
                    (await client.post(to, content=content, headers=headers)).raise_for_status()

            sides = partial(send, f"{url}/runs/run/push"), partial(send, f"{echo_url}/echo")
            ours_s, echo_s = await alternate(*sides, num_rounds=REQUEST_ROUNDS)
    size = len(push_body("0").model_dump_json()) / 1024
    click.echo(f"durable push   {REQUESTS_PER_ROUND / ours_s:10,.0f} requests/s, one group of {size:.1f} KiB JSON each")
    click.echo(f"plain echo     {REQUESTS_PER_ROUND / echo_s:10,.0f} requests/s, FastAPI and pydantic, the same body")
    click.echo(f"ratio          {echo_s / ours_s:10.2f}   (limit: at least {REQUEST_LIMIT:.2f})")


def push_body(request: str) -> bodies.PushBody:
    """A group of two short samples."""
    samples = [
        bodies.PushedSample(
            tokens=list(range(64)), loss_mask=[0] * 32 + [1] * 32, logprobs=[-0.5] * 64, version=0, reward=reward
        )
        for reward in (0.0, 1.0)
    ]
    return bodies.PushBody(request=request, prompt=bodies.PushedPrompt(text=request), samples=samples)


async def bench_idle(scratch: Path) -> None:
    """The processor time of a service that clients wait for, and that has nothing for them."""
    token = secrets.token_hex(16)
    with process(partial(make_app, scratch, token=token), scratch) as service:
        url = f"http://127.0.0.1:{await service.port()}"
        async with HttpBuffer(url, run="run", token=token) as buffer:
            waits = [asyncio.create_task(buffer.admit()) for _ in range(8)]
            waits.append(asyncio.create_task(buffer.take(4, step=1)))  # type: ignore[arg-type]
            await asyncio.sleep(1.0)
            before_s = cpu_s(service.pid)
            await asyncio.sleep(IDLE_S)
            used = (cpu_s(service.pid) - before_s) / IDLE_S
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)
    click.echo(f"idle           {used:10.2%} of a core, over {IDLE_S:.0f} s with 9 clients waiting")
    click.echo(f"limit          {IDLE_LIMIT:10.2%}")


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def bench_memory(scratch: Path) -> None:
    """What a prompt costs that was given back and waits to be admitted again, in a service that was started anew."""
    with Ledger(scratch) as ledger:
        prompts = some_prompts()
        with ledger.together():
            for position in range(NUM_QUEUED):
                epoch, prompt = prompts.prompt_at(position)
                ordinal = ledger.issue(prompt.uid, epoch=epoch, position=position)
                ledger.start(ordinal, attempt=0)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            buffer = open_buffer(ledger, prompts, recover=True)
            gc.collect()
            used = (tracemalloc.get_traced_memory()[0] - before) / NUM_QUEUED
        finally:
            tracemalloc.stop()
        if buffer.state().num_waiting != NUM_QUEUED:
            raise SlimeError(f"{NUM_QUEUED} prompts should wait: {buffer.describe()}")
    click.echo(f"memory         {used:10.0f} bytes a queued prompt, over {NUM_QUEUED:,} that wait to be issued again")
    click.echo(f"limit          {MEMORY_LIMIT:10.0f}")


async def bench_claims(num_prompts: int, scratch: Path) -> None:
    """An admission with its write, from a file of many prompts against one from a file of few."""
    with cache_in(scratch):
        many, few = indexed(scratch / "many.jsonl", num_prompts), indexed(scratch / "few.jsonl", FEW_PROMPTS)
    with Ledger(scratch / "many") as many_ledger, Ledger(scratch / "few") as few_ledger:
        buffers = [open_buffer(many_ledger, many), open_buffer(few_ledger, few)]
        for buffer in buffers:
            await buffer.published(0)

        async def claim(buffer: LocalBuffer, number: int) -> None:
            for _ in range(CLAIMS_PER_ROUND):
                await buffer.admit()

        many_s, few_s = await alternate(*(partial(claim, buffer) for buffer in buffers))
    click.echo(f"claim          {many_s / CLAIMS_PER_ROUND * 1e6:10,.0f} µs, of {num_prompts:,} prompts")
    click.echo(f"claim          {few_s / CLAIMS_PER_ROUND * 1e6:10,.0f} µs, of {FEW_PROMPTS:,} prompts")
    click.echo(f"ratio          {many_s / few_s:10.2f}   (limit: at most {CLAIM_LIMIT:.2f})")


@contextmanager
def cache_in(directory: Path) -> Iterator[None]:
    """Keep indices there: those of a file that is gone are of no use to anybody."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(directory)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def indexed(path: Path, num_prompts: int) -> PromptOrder:
    """A file of so many short prompts, indexed."""
    with path.open("w") as file:
        file.writelines(f'{{"text": "{i} + 1 =", "label": "{i + 1}"}}\n' for i in range(num_prompts))
    start = time.perf_counter()
    index = open_index(path)
    made_s = time.perf_counter() - start
    click.echo(f"index          {num_prompts / made_s:10,.0f} rows/s, of {num_prompts:,} rows, the first time only")
    return PromptOrder(IndexedPrompts(index), seed=0)
