"""The client against services that drop replies, are away, are full or are no service at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from buffer.service.client import HttpBuffer
from slime.errors import BufferFull, DataError, Fenced, LedgerError, NoAnswer, SlimeError, StorageError

Answer = bytes | None
"""What is sent back; None drops the connection without a word."""


def http(status: int, body: str = "", *, headers: str = "") -> bytes:
    kind = "Content-Type: application/json\r\n" if body else ""
    return f"HTTP/1.1 {status} X\r\n{kind}{headers}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def refusal(status: int, error: str, *, headers: str = "") -> bytes:
    return http(status, f'{{"error": "{error}", "message": "said so"}}', headers=headers)


STATS = http(
    200,
    '{"version": 0, "num_waiting": 0, "num_running": 1, "num_ready": 0, "num_packed": 0, "num_committed": 0, '
    '"capacity": 0, "dropped": {}, "num_requeued": 0, "num_stale": 0, "idle_s": 99.0, "summary": "all asleep"}',
)


@asynccontextmanager
async def answering(*answers: Answer) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that gives these answers in turn, the last one for ever. Yields its URL and what it was sent."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                content = await reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)
                answer = answers[min(len(requests), len(answers) - 1)]
                requests.append(head + content)
                if answer is None:
                    return
                writer.write(answer)
                await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests
    finally:
        server.close()


def client(url: str, **options: float) -> HttpBuffer:
    return HttpBuffer(url, run="run-1", token="secret", **{"patience_s": 5.0, **options})


async def test_a_lost_reply_and_a_busy_service_are_asked_again_with_the_same_words() -> None:
    """Pins: a retry under another name, which the service cannot know for one."""
    busy = refusal(503, "StorageError", headers="Retry-After: 0\r\n")
    lease = (
        '{"ordinal": 3, "attempt": 1, "epoch": 0, "prompt": {"uid": "ab", "text": "1 + 1"}, "has_partial": false, '
        '"lease_s": null}'
    )
    answers = (None, busy, http(503), http(204), None, http(200, lease))
    async with answering(*answers) as (url, requests), client(url) as buffer:
        got = await buffer.admit()
    assert (got.ordinal, got.attempt, got.prompt.text) == (3, 1, "1 + 1")
    assert len(requests) == 6
    assert len(set(requests)) == 1
    assert b"authorization: bearer secret" in requests[0].lower()


@pytest.mark.parametrize(
    ("status", "error"),
    [(409, LedgerError), (409, Fenced), (422, DataError), (429, BufferFull), (503, StorageError)],
)
async def test_what_the_service_refuses_with_is_raised_as_what_it_is(status: int, error: type[SlimeError]) -> None:
    async with answering(refusal(status, error.__name__)) as (url, requests), client(url, patience_s=0.1) as buffer:
        with pytest.raises(error, match="said so") as raised:
            await buffer.stats()
    assert type(raised.value) is error
    assert len(requests) == 1 or status in (429, 503), "what will not change is not asked again"


async def test_the_client_comes_again_when_it_was_told_to() -> None:
    """Pins: clients that hammer a service which asked for a pause."""
    full = refusal(429, "BufferFull", headers="Retry-After: 1\r\n")
    loop = asyncio.get_running_loop()
    async with answering(full, STATS) as (url, _), client(url) as buffer:
        since = loop.time()
        assert (await buffer.stats()).num_running == 1
    assert loop.time() - since >= 1.0


@pytest.mark.parametrize("answer", [None, http(503), http(500, "<html>"), http(404, "nothing here")])
async def test_a_service_that_does_not_answer_is_named_and_the_outcome_is_called_unknown(answer: Answer) -> None:
    """Pins: a client that waits for ever, and one that takes "no reply" for "did not happen"."""
    async with answering(answer) as (url, _), client(url, patience_s=0.2) as buffer:
        with pytest.raises(NoAnswer, match="did not answer") as raised:
            await buffer.published(0)
    assert f"{url}/runs/run-1" in str(raised.value)


async def test_nobody_listens() -> None:
    async with answering(None) as (url, _):
        pass
    async with client(url, patience_s=0.1) as buffer:
        with pytest.raises(NoAnswer, match="ConnectError"):
            await buffer.stats()


@pytest.mark.parametrize("body", ['{"version": "new"}', "[]", "}{"])
async def test_an_answer_of_another_program_is_refused(body: str) -> None:
    async with answering(http(200, body)) as (url, _), client(url) as buffer:
        with pytest.raises(DataError, match="no Stats"):
            await buffer.stats()


async def test_a_trainer_for_whom_nothing_moves_says_what_it_waits_for() -> None:
    """Pins: a trainer that waits all night for workers which are gone."""
    consumer = http(200, '{"consumer": 1, "last_commit": null}')
    async with answering(consumer, http(204), STATS) as (url, _), client(url, stall_timeout_s=0.0) as buffer:
        with pytest.raises(SlimeError, match="stands still: all asleep"):
            await buffer.take(2, step=1)
