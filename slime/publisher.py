"""Publish: the trainer's weights into every engine, all or none."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from slime.protocols import RolloutEngine, Trainer
from slime.types import Metrics
from slime.weights import read_manifest


class SharedMemoryPublisher:
    """Trainer and engines of one host share a staging directory in memory (slime.weights).

    The trainer writes every tensor once; each engine maps the same pages, verifies every checksum and loads. Engines
    are paused by the caller (`Placement.publishing`); if one fails, none is resumed.
    """

    def __init__(self, *, trainer: Trainer, engines: Sequence[RolloutEngine], directory: Path) -> None:
        self._trainer = trainer
        self._engines = engines
        self._directory = directory

    async def publish(self, version: int) -> Metrics:
        """Stage and load all weights as `version`.

        Returns:
            Bytes moved and seconds spent, as ``publish/bytes``, ``time/publish_stage_s`` and ``time/publish_load_s``.

        Raises:
            EngineError: an engine did not load everything; engines are left paused.
        """
        start = time.perf_counter()
        manifest = await self._trainer.stage_weights(str(self._directory))
        staged = time.perf_counter()
        async with asyncio.TaskGroup() as loads:
            for engine in self._engines:
                loads.create_task(engine.load_weights(manifest, version=version))
        return {
            "publish/bytes": float(read_manifest(Path(manifest)).num_bytes),
            "time/publish_stage_s": staged - start,
            "time/publish_load_s": time.perf_counter() - staged,
        }

    def close(self) -> None:
        """Give the staging memory back."""
        shutil.rmtree(self._directory, ignore_errors=True)


def staging_directory(run_dir: Path) -> Path:
    """Where a run stages weights: in memory where the system has it, the same for every start of the run.

    The name is a function of the run directory, so that what a killed run left behind is overwritten, not leaked.
    """
    memory = Path("/dev/shm")
    root = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return root / f"slime-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]}"
