"""A TCP proxy that loses replies: what was asked has happened, and who asked does not know.

    client ── request ──▶ proxy ── request ──▶ service
    client ◀── reply, part of it, or none ── proxy ◀── reply ── service

One task a connection and direction. With the service gone, a connection ends as it would without the proxy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import Random
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 1 << 16


class Proxy:
    """Listens on a port of its own on 127.0.0.1, and forwards to `upstream`.

    Args:
        drop_rate: probability that a piece of a reply is cut off at a random place, and the connection with it.
    """

    def __init__(self, *, rng: Random, drop_rate: float) -> None:
        self.drop_rate = drop_rate
        self.upstream: int | None = None
        """Port of the service; None while there is none."""
        self.num_dropped = 0
        self._rng = rng
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()  # which ends what its task waits for
        await asyncio.gather(*self._connections)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with self._open(writer), suppress(OSError):  # when either side is gone
                await self._forward(reader, writer)
        finally:
            self._connections.discard(task)

    @contextmanager
    def _open(self, writer: asyncio.StreamWriter) -> Iterator[None]:
        self._writers.add(writer)
        try:
            yield
        finally:
            writer.transport.abort()
            self._writers.discard(writer)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.upstream is None:
            return
        service_reader, service_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        with self._open(service_writer):
            requests = asyncio.create_task(self._requests(reader, service_writer))
            try:
                await self._replies(service_reader, writer)
            finally:
                requests.cancel()
                await asyncio.wait({requests})

    async def _requests(self, reader: asyncio.StreamReader, service: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES):
                service.write(chunk)
                await service.drain()
            service.write_eof()

    async def _replies(self, service: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await service.read(_CHUNK_BYTES):
            if self._rng.random() < self.drop_rate:
                self.num_dropped += 1
                writer.write(chunk[: self._rng.randrange(len(chunk))])
                return
            writer.write(chunk)
            await writer.drain()
