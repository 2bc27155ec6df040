"""The comparison with plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import make_model
from trainer.bench import bench_train


@pytest.mark.usefixtures("process_group")
def test_both_sides_are_measured(tmp_path: Path) -> None:
    """A bench that breaks is noticed only when somebody wants its number."""
    result = bench_train(make_model(tmp_path), num_sequences=3, mean_length=8, num_rounds=1)
    assert result.tokens_per_s > 0
    assert result.plain_attention in ("sdpa", "eager")
    assert result.ratio == result.tokens_per_s / result.plain_tokens_per_s
