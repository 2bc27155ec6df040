"""Commits: what is on disk, what the ledger says, and what a run continues from."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from slime.checkpoints import Checkpoints
from slime.errors import CheckpointError
from slime.testing import FakeRollout, FakeTrainer
from slime.types import TrainBatch
from tests.builders import make_prompt

NUM_STEPS = 6


class Scene:
    """A run of fakes over a real ledger and real checkpoint directories."""

    def __init__(self, run_dir: Path, ledger: Ledger) -> None:
        self.root = run_dir / "checkpoints"
        self.ledger = ledger
        self.trainer = FakeTrainer()
        self.checkpoints = Checkpoints(self.root, trainer=self.trainer, keep=2)
        self.order = PromptOrder([make_prompt(f"{i:016x}") for i in range(50)], seed=0)

    async def open(self) -> int:
        step = await self.checkpoints.restore(self.ledger)
        self.buffer = LocalBuffer(self.ledger, self.order, Policy(groups_per_step=2, num_steps=NUM_STEPS))
        await self.buffer.published(step)
        self.rollout = FakeRollout(num_samples=2, version=lambda: self.trainer.version)
        return step

    async def step(self, *, commit: bool = True) -> None:
        for _ in range(2):
            lease = await self.buffer.admit()
            await self.buffer.put(lease, await self.rollout.generate(lease), keep=True)
        step = self.trainer.version + 1
        await self.buffer.take(2, step=step)
        await self.trainer.train_step(TrainBatch(updates=[], metrics={}))
        if commit:
            await self.checkpoints.commit(step, buffer=self.buffer)
        await self.buffer.published(step)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Ledger(tmp_path) as ledger:
        yield Scene(tmp_path, ledger)


def reopened(scene: Scene) -> Scene:
    return Scene(scene.root.parent, scene.ledger)


async def test_a_run_continues_from_its_last_commit_with_the_samples_that_came_after(scene: Scene) -> None:
    """The step after the last commit is trained by weights that are gone: it must be taken again, not counted."""
    await scene.open()
    await scene.step()
    await scene.step(commit=False)
    again = reopened(scene)
    assert await again.open() == 1
    assert again.trainer.version == 1
    assert again.buffer.state().num_ready == 2
    assert again.ledger.audit().holds


async def test_only_so_many_checkpoints_are_kept(scene: Scene) -> None:
    """A long run must not fill the disk."""
    await scene.open()
    for _ in range(4):
        await scene.step()
    assert sorted(path.name for path in scene.root.iterdir()) == ["step_000003", "step_000004"]


async def test_a_checkpoint_that_was_never_committed_is_removed(scene: Scene) -> None:
    """Killed between the directory's rename and the ledger's transaction: the transaction is what counts."""
    await scene.open()
    await scene.step()
    await scene.step()
    scene.ledger.revert(1, reason="as if the second transaction had not happened")
    again = reopened(scene)
    assert await again.open() == 1
    assert [path.name for path in again.root.iterdir()] == ["step_000001"]
    await again.step()
    assert again.ledger.audit().holds


async def test_a_torn_checkpoint_costs_the_steps_since_the_one_before(scene: Scene) -> None:
    """A flipped bit must neither be trained on nor end the run for good, and the books must still hold."""
    await scene.open()
    for _ in range(3):
        await scene.step()
    (scene.root / "step_000003/state.json").write_text("9")
    again = reopened(scene)
    assert await again.open() == 2
    assert again.trainer.version == 2
    assert again.ledger.audit().holds
    assert again.buffer.state().num_waiting == 2, "what the void commit had is issued again"
    await again.step()
    result = again.ledger.audit()
    assert result.holds
    assert result.num_committed == 6


async def test_without_a_whole_checkpoint_the_run_does_not_begin_anew(scene: Scene) -> None:
    """Starting from scratch in silence would throw away the run."""
    await scene.open()
    for _ in range(2):
        await scene.step()
    for path in scene.root.glob("*/state.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="No checkpoint in"):
        await reopened(scene).open()


class _BigTrainer(FakeTrainer):
    async def save(self, directory: str) -> None:
        await super().save(directory)
        await asyncio.to_thread((Path(directory) / "weights").write_bytes, b"x" * 10_000_000)


async def test_a_full_disk_at_a_commit_keeps_the_commit_before(scene: Scene) -> None:
    """Half a checkpoint must not become the current one, and the ledger must not count its steps."""
    await scene.open()
    await scene.step()
    scene.trainer = _BigTrainer()
    scene.trainer.version = 1
    scene.checkpoints._trainer = scene.trainer
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, hard))
    try:
        with pytest.raises(CheckpointError, match="step_000002"):
            await scene.step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in scene.root.iterdir()] == ["step_000001"]
    again = reopened(scene)
    assert await again.open() == 1
    assert again.ledger.audit().holds


async def test_checkpoints_outlive_a_ledger_that_was_lost(scene: Scene, tmp_path: Path) -> None:
    """Pins a run whose ledger was deleted by mistake: every checkpoint was removed as one that was never committed."""
    await scene.open()
    await scene.step()
    with Ledger(tmp_path / "another") as empty, pytest.raises(CheckpointError, match="was lost or replaced"):
        await scene.checkpoints.restore(empty)
    assert await reopened(scene).open() == 1
