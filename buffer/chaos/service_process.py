"""A service in a process of its own, which can be killed at any moment and is up again within a tenth of a
second.

    caller ── multiprocessing's fork server, which has imported everything ─▶ service
    caller ◀── its port, once it listens ── service ── ends when the fork server does, and that when the caller does
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

from fastapi import FastAPI

from buffer.service.serve import serving
from slime.errors import SlimeError

START_TIMEOUT_S = 60.0

_context = get_context("forkserver")


class ServiceProcess:
    """Serves an app from construction to `kill`.

    Args:
        make_app: called in the process; a function of a module, or a `functools.partial` of one.
        log: where its output is appended.
    """

    def __init__(self, make_app: Callable[[], FastAPI], *, log: Path) -> None:
        # Imports cost a second, a fork some milliseconds.
        _context.set_forkserver_preload([__name__, "buffer.service.app"])
        self._log = log
        self._receiver, sender = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_serve, args=(make_app, str(log), sender), daemon=True)
        self._process.start()
        sender.close()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    async def port(self) -> int:
        """Of 127.0.0.1, where it listens, once it does.

        Raises:
            SlimeError: it ended before, or did not listen in time.
        """
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._receiver.fileno(), told.set)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):  # Python 3.11's wait_for may miss a cancellation
                await told.wait()
            return int(self._receiver.recv())
        except (TimeoutError, EOFError):
            raise SlimeError(f"the service does not listen:\n{self._log.read_text()[-2000:]}") from None
        finally:
            loop.remove_reader(self._receiver.fileno())

    def kill(self) -> None:
        """``kill -9``, and wait until it is gone."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._receiver.close()


def _serve(make_app: Callable[[], FastAPI], log: str, sender: Connection) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    asyncio.run(_serve_for_ever(make_app, sender=sender))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


async def _serve_for_ever(make_app: Callable[[], FastAPI], *, sender: Connection) -> None:
    async with serving(make_app()) as url:
        sender.send(int(url.rsplit(":", 1)[1]))
        await asyncio.Event().wait()
