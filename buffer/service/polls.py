"""Long polls: requests that wait for work, each no longer than its client and the service are there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from slime.errors import StopRun

T = TypeVar("T")


class Polls:
    """The open polls of a service.

    Args:
        max_wait_s: of any of them, whatever its client asks for.
    """

    def __init__(self, *, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._open: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def wait(self, request: Request, work: Coroutine[Any, Any, T], *, wait_s: float) -> T | None:
        """The result of `work`; None when it is cancelled, because the time is up or the client is gone.

        Raises:
            StopRun: the service ends.
            SlimeError: what `work` raised.
        """
        task = asyncio.ensure_future(work)
        self._open.add(task)
        gone = asyncio.ensure_future(request.receive())  # the body is read: what comes is the disconnection
        try:
            await asyncio.wait({task, gone}, timeout=min(wait_s, self._max_wait_s), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._open.discard(task)
            gone.cancel()
            task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            return task.result()
        if self._closed:
            raise StopRun("the service ends. Ask again when it is back, under the same name")
        return None

    def close(self) -> None:
        """End all of them."""
        self._closed = True
        for task in self._open:
            task.cancel()
