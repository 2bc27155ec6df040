"""Who holds the devices when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from slime.protocols import RolloutEngine, Trainer


class ColocatedPlacement:
    """Engines and trainer take turns on the same devices.

        generating ── training() ──▶ engines paused and asleep, trainer awake
                   ── publishing() ─▶ both hold weights; then the trainer sleeps, engines wake and generate

    Requests that run when engines are paused give up their KV cache, keep their tokens, and go on under the new
    weights. An engine takes its KV cache back only after the trainer has let go, so that both never hold everything at
    once.
    """

    def __init__(self, *, engines: Sequence[RolloutEngine], trainer: Trainer) -> None:
        self._engines = engines
        self._trainer = trainer

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """Engines are paused and asleep inside; they stay so until `publishing` ends."""
        await asyncio.gather(*(engine.pause() for engine in self._engines))
        await asyncio.gather(*(engine.offload() for engine in self._engines))
        await self._trainer.onload()
        yield

    @asynccontextmanager
    async def publishing(self) -> AsyncIterator[None]:
        """Engines hold weights, old ones, and are paused inside; they generate afterwards.

        An error inside leaves them paused: an engine with half an update must not answer.
        """
        await asyncio.gather(*(engine.pause() for engine in self._engines))
        await asyncio.gather(*(engine.onload(what="weights") for engine in self._engines))
        yield
        await self._trainer.offload()
        await asyncio.gather(*(engine.onload(what="kv_cache") for engine in self._engines))
        await asyncio.gather(*(engine.resume() for engine in self._engines))
