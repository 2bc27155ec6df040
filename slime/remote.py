"""Engines and the trainer as the loop sees them: protocols over actors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from slime.cluster import Actor
from slime.errors import EngineError
from slime.types import Metrics, MicroBatch, TrainBatch

logger = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 120.0
"""Pausing, resuming, sleeping and waking."""
STATE_TIMEOUT_S = 1800.0
"""Moving a whole model's state: publish, save, load, export."""


class RemoteEngine:
    """A RolloutEngine in an actor."""

    def __init__(self, actor: Actor, *, start_timeout_s: float) -> None:
        self._actor = actor
        self._start_timeout_s = start_timeout_s

    async def start(self) -> str:
        url: str = await self._actor.call("start", timeout_s=self._start_timeout_s + CONTROL_TIMEOUT_S)
        return url

    async def pause(self) -> None:
        await self._actor.call("pause", timeout_s=CONTROL_TIMEOUT_S)

    async def resume(self) -> None:
        await self._actor.call("resume", timeout_s=CONTROL_TIMEOUT_S)

    async def offload(self) -> None:
        await self._actor.call("offload", timeout_s=CONTROL_TIMEOUT_S)

    async def onload(self, *, what: str) -> None:
        await self._actor.call("onload", what=what, timeout_s=CONTROL_TIMEOUT_S)

    async def load_weights(self, manifest: str, *, version: int) -> None:
        await self._actor.call("load_weights", manifest, version=version, timeout_s=STATE_TIMEOUT_S)

    async def close(self) -> None:
        try:
            await self._actor.call("close", timeout_s=CONTROL_TIMEOUT_S)
        except EngineError as error:  # the way out must not hide what led here
            logger.warning("%s", error)
        finally:
            self._actor.kill()


class RemoteTrainer:
    """A Trainer over one actor a rank. Every rank takes part in every call; rank 0 answers."""

    def __init__(self, ranks: Sequence[Actor], *, step_timeout_s: float) -> None:
        self._ranks = ranks
        self._step_timeout_s = step_timeout_s
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    async def start(self, address: str) -> None:
        """Have the ranks meet at `address`, where rank 0 is, and wait until every one has loaded its model."""
        port = await self._ranks[0].call("listen", address, timeout_s=STATE_TIMEOUT_S)
        await self._all("start", address, port)

    async def train_step(self, batch: TrainBatch) -> Metrics:
        metrics: Metrics = await self._each("train_step", _by_rank(batch))
        self._version += 1
        return metrics | batch.metrics

    async def sft_step(self, batch: TrainBatch) -> Metrics:
        metrics: Metrics = await self._each("sft_step", _by_rank(batch))
        return metrics | batch.metrics

    async def stage_weights(self, directory: str) -> str:
        manifest: str = await self._all("stage_weights", directory)
        return manifest

    async def offload(self) -> None:
        await self._all("offload")

    async def onload(self) -> None:
        await self._all("onload")

    async def save(self, directory: str) -> None:
        await self._all("save", directory)

    async def load(self, directory: str, *, version: int) -> None:
        """Continue from a saved state; `version` is the number of steps it had taken."""
        await self._all("load", directory)
        self._version = version

    async def export(self, directory: str) -> None:
        await self._all("export", directory)

    async def close(self) -> None:
        for rank in self._ranks:
            rank.kill()

    async def _all(self, method: str, *args: Any) -> Any:
        answers = await asyncio.gather(*(rank.call(method, *args, timeout_s=STATE_TIMEOUT_S) for rank in self._ranks))
        return answers[0]

    async def _each(self, method: str, work: Sequence[Any]) -> Any:
        calls = (
            rank.call(method, item, timeout_s=self._step_timeout_s)
            for rank, item in zip(self._ranks, work, strict=True)
        )
        return (await asyncio.gather(*calls))[0]


def _by_rank(batch: TrainBatch) -> list[list[list[MicroBatch]]]:
    """``[update][rank][i]`` → ``[rank][update][i]``."""
    return [list(updates) for updates in zip(*batch.updates, strict=True)]
