"""Shared by tests that run Megatron in their own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


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
