"""Shared by all tests: a cache of their own, and a process group for those that run Megatron in their own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever is cached, here and in child processes, goes with the tests' other files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A world of one rank."""
    import torch
    import torch.distributed as dist

    from trainer.model import initialize_distributed

    torch.set_num_threads(1)
    initialize_distributed(
        rank=0, world_size=1, address="127.0.0.1", port=0, timeout_s=60, seed=1, device=torch.device("cpu")
    )
    yield
    dist.destroy_process_group()
