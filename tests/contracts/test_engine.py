"""The contract of slime.protocols.RolloutEngine, run over every implementation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from slime.errors import EngineError
from slime.protocols import RolloutEngine
from slime.testing import FakeEngine
from tests.builders import make_model
from tests.rollout.engines import make_engine, stage, tensors_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENGINES: list[object] = [
    pytest.param(lambda model, directory: FakeEngine(), id="fake"),
    pytest.param(lambda model, directory: make_engine(model, directory), id="sglang", marks=pytest.mark.stack),
]
"""``(model directory, directory to write to) -> engine``: add an implementation here."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES)
async def engine(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RolloutEngine]:
    make: Callable[[Path, Path], RolloutEngine] = request.param
    engine = make(model, tmp_path_factory.mktemp("engine"))
    try:
        assert (await engine.start()).startswith("http://127.0.0.1:")
        yield engine
    finally:
        await engine.close()


async def test_pause_publish_resume_can_be_repeated(engine: RolloutEngine, model: Path, tmp_path: Path) -> None:
    """Pins that an update leaves nothing open behind it: the second one would be refused."""
    manifest = stage(tensors_of(model), tmp_path / "staged")
    for version in (1, 2):
        await engine.pause()
        await engine.load_weights(manifest, version=version)
        await engine.resume()


async def test_a_turn_of_the_devices_is_offload_onload_publish_onload(
    engine: RolloutEngine, model: Path, tmp_path: Path
) -> None:
    """Pins the colocated sequence, and that giving or taking twice is harmless."""
    manifest = stage(tensors_of(model), tmp_path / "staged")
    await engine.pause()
    await engine.offload()
    await engine.offload()
    await engine.onload(what="weights")
    await engine.onload(what="weights")
    await engine.load_weights(manifest, version=3)
    await engine.onload(what="kv_cache")
    await engine.resume()


async def test_only_known_memory_can_be_taken_back(engine: RolloutEngine) -> None:
    """Pins that a misspelt tag is an error here and does not kill a scheduler."""
    with pytest.raises(ValueError, match="kv_cash"):
        await engine.onload(what="kv_cash")


async def test_weights_are_loaded_into_a_paused_engine_only(engine: RolloutEngine, model: Path, tmp_path: Path) -> None:
    """Pins that no step runs on a mixture of old and new weights."""
    manifest = stage(tensors_of(model), tmp_path / "staged")
    with pytest.raises(EngineError, match="pause"):
        await engine.load_weights(manifest, version=4)


async def test_weights_that_cannot_be_read_are_refused_until_good_ones_are_loaded(
    engine: RolloutEngine, model: Path, tmp_path: Path
) -> None:
    """Pins that a failed publish never ends in a resumed engine."""
    await engine.pause()
    with pytest.raises(EngineError):
        await engine.load_weights(str(tmp_path / "missing" / "manifest.json"), version=5)
    with pytest.raises(EngineError):
        await engine.resume()
    await engine.load_weights(stage(tensors_of(model), tmp_path / "staged"), version=5)
    await engine.resume()


async def test_closing_twice_is_harmless(engine: RolloutEngine) -> None:
    """Pins that the way out after a failure can close what is closed. Runs last: the module's engine is gone then."""
    await engine.close()
    await engine.close()
