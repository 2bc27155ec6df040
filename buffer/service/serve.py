"""Serving a buffer: beside a training run in its event loop, or as a process of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from buffer.service.app import close_app
from slime.errors import ConfigError

MAX_CONNECTIONS = 1024
"""More are answered with 503 at once."""
SILENCE_S = 75
"""A connection on which no whole request begins for so long is closed: silent ones would hold all places for ever."""
_GRACE_S = 5
"""What is being answered when the service ends may take so long."""


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are for the process that the server runs in."""
        yield


class _Connection(H11Protocol):
    """Closes itself when the next request, or the rest of its headers, does not come; uvicorn sees to bodies alone."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._overdue:
            self._overdue.cancel()

    def _watch(self) -> None:
        waits = self.conn.their_state is h11.IDLE
        if waits and not self._overdue:
            self._overdue = self.loop.call_later(self.timeout_keep_alive, self.transport.close)
        elif self._overdue and not waits:
            self._overdue.cancel()
            self._overdue = None


@asynccontextmanager
async def serving(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, silence_s: int = SILENCE_S
) -> AsyncIterator[str]:
    """Serve an app of `buffer.service.app` in the running event loop. Yields its URL; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be listened on.
        SlimeError: the server ended before it was asked to.
    """
    listener = listen(host, port)
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            http=_Connection,
            ws="none",
            server_header=False,
            timeout_keep_alive=silence_s,
            timeout_graceful_shutdown=_GRACE_S,
            limit_concurrency=MAX_CONNECTIONS,
        )
    )
    caller = asyncio.current_task()
    task = asyncio.create_task(server.serve(sockets=[listener]), name="buffer service")
    asked = False

    def ended(_: asyncio.Task[None]) -> None:
        if not asked and caller is not None:
            caller.cancel("the buffer service ended")

    task.add_done_callback(ended)
    try:
        yield f"http://{_in_url(host)}:{listener.getsockname()[1]}"
    finally:
        asked = True
        close_app(app)
        server.should_exit = True
        await asyncio.wait({task})
        listener.close()
    task.result()


async def serve_until_stopped(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, ready: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is told the URL."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        async with serving(app, host=host, port=port) as url:
            ready(url)
            await stop.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def read_or_make_token(path: Path) -> str:
    """The token in a file of its owner's alone; made there when there is none, and kept for the next start.

    Raises:
        ConfigError: others may read the file, or it holds no token.
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"{path}: got {error.strerror}. Name a token file in a directory you may write to.") from None
    with path.open() as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        token = file.read(4096).strip()
    if mode & 0o077:
        raise ConfigError(f"{path}: others may read this token (mode {mode:o}). `chmod 600` it, or name another file.")
    if len(token) < 16:
        raise ConfigError(f"{path}: got no token of at least 16 characters. Remove the file to have one made.")
    return token


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With its protocol named, asyncio sends at once (TCP_NODELAY); without, every answer waits 40 ms.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror}. Choose another port, or 0 for a free one; and an "
            "address of this machine as the host."
        ) from None
    return listener


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
