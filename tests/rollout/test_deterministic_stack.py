"""A real engine in deterministic mode, owned by a parent process that is killed in the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.client import Completion, GenerationClient
from slime.errors import EngineError
from tests.rollout.engines import TOKEN, reference_logprobs, worst

pytestmark = pytest.mark.stack

PARENT = """
import asyncio, sys
from pathlib import Path
from tests.rollout.engines import make_engine

async def main():
    engine = make_engine(Path(sys.argv[1]), Path(sys.argv[2]), deterministic=True)
    print(await engine.start(), engine._process.pid, engine._scratch, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
Parent = tuple[subprocess.Popen[str], str, int, Path]
"""The parent, its engine's URL and process group, and the engine's scratch directory."""

SEEDS = [1000 + i for i in range(24)]


@pytest.fixture(scope="module")
def parent(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parent]:
    directory = tmp_path_factory.mktemp("deterministic")
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model), str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )
    try:
        assert process.stdout is not None
        url, group, scratch = process.stdout.readline().split()
        yield process, url, int(group), Path(scratch)
    finally:
        process.kill()
        process.wait()


def prompt(i: int) -> list[int]:
    return [1, *(3 + (i * 31 + j * 7) % 120 for j in range(4 + i % 13))]


async def generate(url: str, *, concurrency: int) -> list[Completion]:
    async with GenerationClient([url], token=TOKEN, timeout_s=120) as client:
        turnstile = asyncio.Semaphore(concurrency)

        async def one(i: int) -> Completion:
            async with turnstile:
                (completion,) = await client.generate(prompt(i), max_new_tokens=24, temperature=1.0, seeds=[SEEDS[i]])
                return completion

        return await asyncio.gather(*map(one, range(len(SEEDS))))


def test_seeded_samples_are_bit_equal_at_every_concurrency(parent: Parent, model: Path) -> None:
    """Pins reproducible runs: tokens and log-prob bits that depend on arrival order make every rerun another run."""
    alone = asyncio.run(generate(parent[1], concurrency=1))
    together = asyncio.run(generate(parent[1], concurrency=len(SEEDS)))
    assert [(c.tokens, c.logprobs) for c in alone] == [(c.tokens, c.logprobs) for c in together]
    assert len({tuple(completion.tokens) for completion in alone}) == len(SEEDS)
    assert worst(alone[0].logprobs, reference_logprobs(model, prompt(0), alone[0].tokens)) < 0.06


def test_samples_of_a_group_differ_by_their_seeds_alone(parent: Parent) -> None:
    """Pins that seeds reach the sampler of a batched request one by one: a group of equal samples teaches nothing."""

    async def group() -> list[Completion]:
        async with GenerationClient([parent[1]], token=TOKEN, timeout_s=120) as client:
            return await client.generate(prompt(0), max_new_tokens=12, temperature=1.0, num_samples=3, seeds=[5, 6, 5])

    first, second, third = asyncio.run(group())
    assert first.tokens == third.tokens
    assert first.tokens != second.tokens


def test_a_sample_that_is_continued_draws_what_it_would_have_drawn(parent: Parent) -> None:
    """Pins that a stopped sample resumes its own draws: from their beginning, it would repeat the noise of its tokens.

    Not bit for bit: a prompt and a decoded token are computed by other kernels, and a near tie may fall otherwise.
    """

    async def rest_of(url: str, whole: Completion, i: int) -> list[int]:
        async with GenerationClient([url], token=TOKEN, timeout_s=120) as client:
            tokens = [*prompt(i), *whole.tokens[:9]]
            limit = len(whole.tokens) - 9
            (rest,) = await client.generate(tokens, max_new_tokens=limit, temperature=1.0, seeds=[SEEDS[i]])
            return [*whole.tokens[:9], *rest.tokens]

    wholes = asyncio.run(generate(parent[1], concurrency=8))
    long_ones = [(i, whole) for i, whole in enumerate(wholes) if len(whole.tokens) > 9]
    same = [asyncio.run(rest_of(parent[1], whole, i)) == whole.tokens for i, whole in long_ones]
    assert sum(same) > 0.7 * len(same)


def test_the_engine_dies_with_its_killed_parent_and_leaves_nothing_behind(parent: Parent) -> None:
    """Pins that kill -9 of a run leaves no server holding memory, ports or shared memory. Runs last."""
    process, url, group, scratch = parent
    members = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if group_of(pid) == group]
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in members)
    shared = [Path(path) for path in set(re.findall(r"/dev/shm/sglang_\S+", maps))]
    assert len(members) >= 2
    assert [path.exists() for path in (*shared, scratch)] == [True, True]
    with contextlib.ExitStack() as stack:
        watched = [stack.enter_context(open(os.pidfd_open(pid), "rb", closefd=True)) for pid in members]
        process.kill()
        process.wait()
        for pidfd in watched:
            assert select.select([pidfd], [], [], 20)[0], "a process of the engine outlived its parent by 20 s"
    assert [path.exists() for path in (*shared, scratch)] == [False, False]
    with pytest.raises(EngineError, match="is gone"):
        asyncio.run(generate(url, concurrency=1))


def group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
