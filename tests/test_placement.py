"""Turns of the devices, and publishing to several engines: all or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.errors import EngineError
from slime.loop import first_failure
from slime.placement import ColocatedPlacement
from slime.publisher import SharedMemoryPublisher, staging_directory
from slime.testing import FakeEngine, FakeTrainer


class _Calls(FakeTrainer):
    """A trainer that writes its turns into an engine's list, so that their order can be seen."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self._calls = calls

    async def onload(self) -> None:
        self._calls.append("trainer onload")

    async def offload(self) -> None:
        self._calls.append("trainer offload")


async def test_engines_and_trainer_never_hold_all_their_memory_at_once() -> None:
    """The KV cache is the larger half: taken back before the trainer lets go, a GPU runs out."""
    engine = FakeEngine()
    placement = ColocatedPlacement(engines=[engine], trainer=_Calls(engine.calls))
    async with placement.training():
        assert engine.paused
        assert engine.calls == ["pause", "offload", "trainer onload"]
    engine.calls.clear()
    async with placement.publishing():
        assert engine.paused
    assert engine.calls == ["pause", "onload weights", "trainer offload", "onload kv_cache", "resume"]


async def test_an_engine_that_fails_to_load_keeps_all_engines_paused(tmp_path: Path) -> None:
    """Engines of two versions answering side by side would mix them within one group."""

    class Broken(FakeEngine):
        async def load_weights(self, manifest: str, *, version: int) -> None:
            raise EngineError("engine 1: checksum of lm_head.weight")

    engines = [FakeEngine(), Broken()]
    trainer = FakeTrainer()
    placement = ColocatedPlacement(engines=engines, trainer=trainer)
    publisher = SharedMemoryPublisher(trainer=trainer, engines=engines, directory=tmp_path / "staging")

    async def publish() -> None:
        async with placement.publishing():
            await publisher.publish(1)

    with pytest.raises(ExceptionGroup) as failures:
        await publish()
    assert "lm_head" in str(first_failure(failures.value))
    assert all(engine.paused for engine in engines)


async def test_a_publish_reaches_every_engine_and_leaves_no_memory_behind(tmp_path: Path) -> None:
    """Staged weights are as large as the model and lie in memory."""
    engines, trainer = [FakeEngine(), FakeEngine()], FakeTrainer()
    for engine in engines:
        await engine.pause()
    publisher = SharedMemoryPublisher(trainer=trainer, engines=engines, directory=tmp_path / "staging")
    metrics = await publisher.publish(7)
    assert [engine.version for engine in engines] == [7, 7]
    assert metrics["publish/bytes"] == 0
    publisher.close()
    assert not (tmp_path / "staging").exists()


def test_a_run_stages_in_the_same_place_at_every_start(tmp_path: Path) -> None:
    """What a killed run left in memory is overwritten, not leaked."""
    assert staging_directory(tmp_path / "a") == staging_directory(tmp_path / "b" / ".." / "a")
    assert staging_directory(tmp_path / "a") != staging_directory(tmp_path / "b")
