"""What docs/buffer.md shows runs against a real service, and what it says of its answers is what they are."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from buffer.books.audit import audit_run
from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from buffer.service.app import ServedRun, create_app
from buffer.service.client import HttpBuffer
from buffer.service.refusals import RESPONSES, STATUS
from buffer.service.serve import serving
from slime.errors import SlimeError
from slime.types import Message
from tests.builders import make_prompt

PAGE = (Path(__file__).parents[2] / "docs" / "buffer.md").read_text(encoding="utf-8")
TOKEN = "a-token-of-these-tests"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A run called `mine` that is served: two steps of two groups, and weights may be one version old."""

    url: str
    run_dir: Path


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    prompts = PromptOrder([make_prompt(f"{i:016x}") for i in range(7)], seed=0)
    policy = Policy(groups_per_step=2, num_steps=2, max_staleness=1)
    with Ledger(tmp_path) as ledger:
        run = ServedRun(buffer=LocalBuffer(ledger, prompts, policy, recover=False), ledger=ledger, render=render)
        app = create_app({"mine": run}, token=TOKEN)
        async with serving(app) as url:
            yield Service(url=url, run_dir=tmp_path)


def render(prompt: Sequence[Message], answers: Sequence[Message]) -> Iterator[tuple[Sequence[int], bool]]:
    """A tokenizer of one token a word."""
    for messages, sampled in ((prompt, False), (answers, True)):
        yield [len(word) for message in messages for word in message["content"].split()], sampled


def shown(kind: str) -> str:
    (block,) = re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(block)


def defined_in(kind: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(shown(kind), f"docs/buffer.md: {kind}", "exec"), names)
    return names


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_push_that_is_shown_is_taken_in_once(service: Service, tmp_path: Path) -> None:
    """Pins a body with keys that were renamed: the first thing a reader tries would be refused."""
    token_file = tmp_path / "buffer.token"
    token_file.write_text(TOKEN)
    async with HttpBuffer(service.url, run="mine", token=TOKEN) as buffer:
        await buffer.published(0)
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                "sh", "-c", shown("sh push"), stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "URL": f"{service.url}/runs/mine", "TOKEN_FILE": str(token_file)},
            )  # fmt: skip
            answer, _ = await process.communicate()
            assert answer == b'{"ordinal":0}'
        assert (await buffer.stats()).num_ready == 1


async def test_the_worker_and_the_trainer_that_are_shown_make_a_run(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pins an example that compiles and does not work with the other one."""
    work, train = defined_in("python worker")["work"], defined_in("python trainer")["train"]
    worker = asyncio.create_task(work(service.url, "mine", TOKEN))
    async with HttpBuffer(service.url, run="mine", token=TOKEN) as buffer, asyncio.timeout(30):
        await train(buffer, num_steps=2, groups_per_step=2)
    worker.cancel()
    with suppress(asyncio.CancelledError):
        await worker
    audit = audit_run(service.run_dir)
    assert (audit.holds, audit.num_committed) == (True, 4), str(audit)
    assert capsys.readouterr().out.count("training step") == 2


def answers() -> dict[str, int]:
    """Error → status, from the page's table."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    return {error: int(status) for status, error in rows}


def test_every_answer_of_the_service_is_on_the_page() -> None:
    """Pins a refusal that nobody can look up."""
    told = answers()
    assert {error: told.get(error) for error in (known.__name__ for known in STATUS if known is not SlimeError)} == {
        known.__name__: status for known, status in STATUS.items() if known is not SlimeError
    }
    assert {int(status) for status in RESPONSES} <= set(told.values())


@pytest.mark.parametrize(
    ("method", "path", "body", "error"),
    [
        ("POST", "/runs/other/admit", b'{"request": "a"}', "NotFound"),
        ("GET", "/nowhere", b"", "NotFound"),
        ("GET", "/runs/mine/admit", b"", "MethodNotAllowed"),
        ("POST", "/runs/mine/admit", b'{"request": "a", "wait_s": NaN}', "UnprocessableEntity"),
        ("POST", "/runs/mine/admit", b'{"request": "a", "wait_s": -1}', "DataError"),
        ("POST", "/runs/mine/drop", b'{"ordinal": 9, "attempt": 0, "reason": "r"}', "LedgerError"),
        ("POST", "/runs/mine/release", b'{"consumer": 7}', "Fenced"),
    ],
)
async def test_a_refusal_has_the_status_and_the_name_that_the_page_says(
    service: Service, method: str, path: str, body: bytes, error: str
) -> None:
    """Pins a client that waits for a word which is never said."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=service.url, headers=headers, trust_env=False) as http:
        answer = await http.request(method, path, content=body)
    assert (answer.status_code, answer.json()["error"]) == (answers()[error], error)


async def test_without_the_token_only_health_and_the_description_are_told(service: Service) -> None:
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as http:
        statuses = {
            path: (await http.get(path)).status_code for path in ("/health", "/openapi.json", "/runs/mine/stats")
        }
    assert statuses == {"/health": 200, "/openapi.json": 200, "/runs/mine/stats": answers()["Unauthorized"]}
