"""Storage that fails under the service: a typed refusal with its remedy, and accepted work stays."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from buffer import payload
from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from buffer.service import bodies
from buffer.service.app import ServedRun, create_app
from buffer.service.client import HttpBuffer
from buffer.service.serve import serving
from slime.errors import LedgerError, StorageError
from tests.builders import make_group, make_prompt
from tests.served import RUN, TOKEN

HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@contextmanager
def opened(run_dir: Path) -> Iterator[tuple[Ledger, LocalBuffer]]:
    with Ledger(run_dir, lock_timeout_s=0.05) as ledger:
        prompts = PromptOrder([make_prompt(f"{i:016x}", text=f"{i} + 1 =") for i in range(7)], seed=0)
        yield ledger, LocalBuffer(ledger, prompts, Policy(groups_per_step=50, num_steps=9), recover=False)


async def push(http: httpx.AsyncClient, request: str, *, num_tokens: int = 3) -> httpx.Response:
    sample = {"tokens": [7] * num_tokens, "loss_mask": [1] * num_tokens, "version": 0, "reward": 1.0}
    body = {"request": request, "prompt": {"text": "2 + 2 ="}, "samples": [sample]}
    return await http.post("push", json=body)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def full(ledger: Ledger) -> Iterator[None]:
    """As many pages as there are, and no more: what SQLite then says is what it says of a full disk."""
    (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    yield
    ledger._db.execute("PRAGMA max_page_count = 1000000")


@contextmanager
def read_only(ledger: Ledger) -> Iterator[None]:
    ledger._db.execute("PRAGMA query_only = ON")
    yield
    ledger._db.execute("PRAGMA query_only = OFF")


@pytest.mark.parametrize("trouble", ["locked", "full", "read_only"])
async def test_what_cannot_be_written_is_refused_and_goes_in_when_it_can(tmp_path: Path, trouble: str) -> None:
    """Pins: a push that is acknowledged and not on disk, one that counts twice after its retry, and a service that has
    to be started again."""
    with opened(tmp_path) as (ledger, buffer):
        await buffer.published(0)
        app = create_app({RUN: ServedRun(buffer=buffer, ledger=ledger)}, token=TOKEN)
        async with serving(app) as url, httpx.AsyncClient(base_url=f"{url}/runs/{RUN}/", headers=HEADERS) as http:
            assert (await push(http, "before")).json() == {"ordinal": 0}
            lease = (await http.post("admit", json={"request": "a"})).json()
            group = payload.encode(make_group(uid=lease["prompt"]["uid"]))
            put = f"put?ordinal={lease['ordinal']}&attempt=0"
            troubles = {
                "locked": lambda: locked(tmp_path / "ledger.sqlite"),
                "full": lambda: full(ledger),
                "read_only": lambda: read_only(ledger),
            }
            with troubles[trouble]():
                for answer in (await push(http, "during", num_tokens=100_000), await http.post(put, content=group)):
                    if trouble == "full" and answer.status_code == 200:
                        continue  # a small group may still fit
                    assert (answer.status_code, answer.json()["error"]) == (503, "StorageError"), answer.text
                    assert answer.headers["Retry-After"] == "1"
                    assert "nothing recorded is lost" in answer.json()["message"]
                assert (await http.get("stats")).json()["num_ready"] in (1, 2)
            assert (await push(http, "during", num_tokens=100_000)).json() == {"ordinal": 2}
            assert (await push(http, "before")).json() == {"ordinal": 0}
            await http.post(put, content=group)
            assert (await http.get("stats")).json()["num_ready"] == 3
        assert ledger.audit().holds, str(ledger.audit())


async def test_the_client_waits_for_storage_and_then_says_what_is_wrong(tmp_path: Path) -> None:
    """Pins: a rollout that is thrown away because a backup held the file for a second."""
    with opened(tmp_path) as (ledger, buffer):
        await buffer.published(0)
        app = create_app({RUN: ServedRun(buffer=buffer, ledger=ledger)}, token=TOKEN)
        async with serving(app) as url, HttpBuffer(url, run=RUN, token=TOKEN, patience_s=0.2) as client:
            lease = await client.admit()
            with read_only(ledger), pytest.raises(StorageError, match="writable"):
                await client.drop(lease, reason="x")
            assert await client.renew([lease]) == [True]
            assert await client.drop(lease, reason="x")


def overwrite(path: Path, *, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(b"no database at all" * 100), "not a database"),
        (lambda path: overwrite(path, at=60, content=(1).to_bytes(4, "big")), "version 1; this slime reads"),
        (lambda path: overwrite(path, at=68, content=b"abcd"), "no ledger"),
        (lambda path: overwrite(path, at=100, content=b"\xff" * 4000), "malformed|disk image"),
    ],
    ids=["another file", "older schema", "another program's", "damaged"],
)
def test_a_ledger_that_cannot_be_read_is_refused_at_the_start(tmp_path: Path, damage: object, says: str) -> None:
    """Pins: a damaged or foreign file that is taken for an empty run."""
    Ledger(tmp_path).close()
    damage(tmp_path / "ledger.sqlite")  # type: ignore[operator]
    with pytest.raises(LedgerError, match=says), opened(tmp_path):
        pass


async def test_a_batch_is_in_the_ledger_whole_or_not_at_all(tmp_path: Path) -> None:
    """Pins: memory that is ahead of a transaction which did not commit."""
    with opened(tmp_path) as (ledger, buffer):
        await buffer.published(0)
        app = create_app({RUN: ServedRun(buffer=buffer, ledger=ledger)}, token=TOKEN)
        groups = [(f"r{i}", payload.encode(make_group(uid=f"{i:016x}"))) for i in range(20)]
        async with serving(app) as url, HttpBuffer(url, run=RUN, token=TOKEN, patience_s=0.05) as client:
            with read_only(ledger), pytest.raises(StorageError):
                await client.push_batch(groups)
            assert (await client.stats()).num_ready == 0
            assert await client.push_batch(groups) == list(range(20))
            assert await client.push_batch(groups[::-1]) == list(range(20))[::-1]
            stats = await client.stats()
            assert isinstance(stats, bodies.Stats)
            assert stats.num_ready == 20
        assert ledger.audit().holds
