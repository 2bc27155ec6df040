from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from rollout.client import GenerationClient
from rollout.engine import SGLangEngine
from tests.builders import make_model
from tests.rollout.engines import TOKEN, make_engine

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another policy of the same shape: what a trainer would publish."""
    return make_model(tmp_path_factory.mktemp("other_model"), seed=1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[SGLangEngine, str]]:
    """One running engine and its URL, shared: tests that load other weights put the first ones back."""
    engine = make_engine(model, tmp_path_factory.mktemp("engine"), sglang={"log_level": "debug"})
    try:
        yield engine, await engine.start()
    finally:
        await engine.close()


@pytest_asyncio.fixture(loop_scope="module")
async def client(engine: tuple[SGLangEngine, str]) -> AsyncIterator[GenerationClient]:
    async with GenerationClient([engine[1]], token=TOKEN, timeout_s=120) as client:
        yield client
