"""Connections as such: whoever says nothing keeps no place for ever."""

from __future__ import annotations

import asyncio

import pytest

from buffer.service.app import create_app
from buffer.service.serve import serving
from tests.served import TOKEN

HEALTH = b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n"


@pytest.mark.parametrize("said", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nX: ", HEALTH, HEALTH + b"GET /hea"])
async def test_a_connection_that_asks_nothing_is_closed(said: bytes) -> None:
    """Pins a thousand connections that were opened and forgotten: everybody else is refused until the service ends."""
    async with serving(create_app({}, token=TOKEN), silence_s=1) as url, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(said)
        answer = await reader.read()
        writer.close()
    assert answer.count(b"200 OK") == said.count(HEALTH)
