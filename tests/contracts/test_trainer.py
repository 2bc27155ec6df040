"""The contract of slime.protocols.Trainer, run over the real ranks in Ray actors and the fake."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio

from slime.cluster import Cluster
from slime.config import OptimizerConfig, Profile
from slime.launch import spawn_trainer, worker_spec
from slime.protocols import Trainer
from slime.testing import FakeTrainer
from slime.types import TrainBatch
from slime.weights import read_manifest
from tests.builders import make_group, make_model
from trainer.advantage import group_advantages
from trainer.batch import build_batch

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def batch() -> TrainBatch:
    build = partial(build_batch, aggregation="sequence", updates_per_step=1, num_ranks=1, tokens_per_microbatch=64)
    return build(
        [make_group([0.0, 1.0], uid=f"{i:016x}", ordinal=i) for i in range(2)], advantages=group_advantages, version=0
    )


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["fake", pytest.param("ranks", marks=pytest.mark.stack)]
)
async def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Trainer]:
    if request.param == "fake":
        yield FakeTrainer()
        return
    model = make_model(tmp_path_factory.mktemp("model"))
    profile = Profile()
    spec = worker_spec(model, profile=profile, optimizer=OptimizerConfig(lr=1e-3), num_steps=10, seed=0)
    cluster = Cluster(address=None, num_devices=1, device="cpu")
    try:
        ranks = await spawn_trainer(cluster, spec, profile=profile)
        yield ranks
        await ranks.close()
    finally:
        cluster.close()


async def test_the_version_counts_the_training_steps(trainer: Trainer, batch: TrainBatch) -> None:
    """Staleness is measured against it: one off, and every sample is on-policy or none."""
    before = trainer.version
    metrics = await trainer.train_step(batch)
    assert trainer.version == before + 1
    assert "loss/policy" in metrics
    assert metrics.items() >= batch.metrics.items(), "what building the batch measured is reported with the step"


async def test_weights_are_staged_where_an_engine_can_read_them(trainer: Trainer, tmp_path: Path) -> None:
    """A manifest that is not there, or of another format, fails every publish."""
    manifest = await trainer.stage_weights(str(tmp_path / "staged"))
    assert read_manifest(Path(manifest)).file.is_file()


async def test_a_saved_state_is_continued_at_its_version(trainer: Trainer, batch: TrainBatch, tmp_path: Path) -> None:
    """After a resume the version must be the checkpoint's, not a fresh count."""
    saved = trainer.version
    await trainer.save(str(tmp_path))
    await trainer.train_step(batch)
    await trainer.load(str(tmp_path), version=saved)
    assert trainer.version == saved


async def test_giving_up_the_device_and_taking_it_back_changes_nothing(trainer: Trainer, batch: TrainBatch) -> None:
    """The colocated turn: a step after it must still work."""
    await trainer.offload()
    await trainer.onload()
    await trainer.train_step(batch)


async def test_the_trained_model_is_written_as_a_directory(trainer: Trainer, tmp_path: Path) -> None:
    """What a run is for."""
    await trainer.export(str(tmp_path / "model"))
    assert (tmp_path / "model").is_dir()
