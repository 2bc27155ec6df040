"""Waking those who wait: for the next change of any kind, after which they look again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from slime.errors import StopRun


class Changes:
    """The changes of a buffer.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self._next = asyncio.Event()
        self.closed = False

    @property
    def idle_s(self) -> float:
        """Since anything changed."""
        return self._clock() - self._last

    def notify(self) -> None:
        """Something changed: wake all."""
        self._last = self._clock()
        self._next.set()
        self._next = asyncio.Event()

    def close(self) -> None:
        """End every wait, now and later."""
        self.closed = True
        self.notify()

    async def wait(self, *, timeout_s: float | None = None) -> None:
        """Wait for the next change. Whoever has looked and not awaited since misses none.

        Raises:
            TimeoutError: nothing has changed for so long.
            StopRun: the buffer was closed.
        """
        if not self.closed:
            async with asyncio.timeout(timeout_s):
                await self._next.wait()
        if self.closed:
            raise StopRun("the buffer was closed")
