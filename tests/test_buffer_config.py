"""``[buffer]``: keys that only make sense together, and what they change elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.config import RunConfig
from slime.config_file import load_config
from slime.errors import ConfigError

TASK = """\
run_dir = "runs/x"
[model]
path = "model"
[data]
train = "train.jsonl"
[reward]
fn = "exact"
"""


def load(tmp_path: Path, *assignments: str) -> RunConfig:
    (tmp_path / "run.toml").write_text(TASK)
    return load_config(tmp_path / "run.toml", RunConfig, profile="cpu", assignments=list(assignments))


@pytest.mark.parametrize(
    "assignments", [["buffer.oversample=1.5"], ["buffer.oversample=2.5", "buffer.max_staleness=1"]]
)
def test_more_groups_than_the_bound_lets_be_trained_are_refused(tmp_path: Path, assignments: list[str]) -> None:
    """Pins groups that are generated only to become too old, and a key that silently does nothing."""
    with pytest.raises(ConfigError, match=r"buffer\.oversample = \d\.5 is more than buffer\.max_staleness \+ 1"):
        load(tmp_path, *assignments)


def test_as_many_groups_as_the_bound_lets_be_trained_are_taken(tmp_path: Path) -> None:
    buffer = load(tmp_path, "buffer.oversample=2.0", "buffer.max_staleness=1").buffer
    assert (buffer.oversample, buffer.max_staleness) == (2.0, 1)


@pytest.mark.parametrize(
    ("assignments", "cap"),
    [
        ([], None),
        (["buffer.max_staleness=1"], 2.0),
        (["buffer.max_staleness=1", "trainer.loss.importance_cap=5"], 5.0),
        (["trainer.loss.importance_cap=5"], 5.0),
    ],
)
def test_tokens_of_older_weights_are_weighted_unless_asked_otherwise(
    tmp_path: Path, assignments: list[str], cap: float | None
) -> None:
    """Pins off-policy tokens that are trained as if the current weights had sampled them."""
    config = load(tmp_path, *assignments)
    assert config.policy_trainer.loss.importance_cap == cap
    without = config.policy_trainer.loss.model_copy(update={"importance_cap": None})
    assert without == config.trainer.loss.model_copy(update={"importance_cap": None})


def test_filters_are_one_or_several_in_their_order(tmp_path: Path) -> None:
    assert load(tmp_path).buffer.filters == ("all",)
    several = load(tmp_path, 'buffer.filter=["not_truncated", "./f.py:a", "informative"]').buffer
    assert several.filters == ("not_truncated", "./f.py:a", "informative")


def test_a_difficulty_file_lies_beside_the_run_file(tmp_path: Path) -> None:
    """Pins statistics that two runs mean to share and do not, because they are started from different folders."""
    assert load(tmp_path, 'buffer.difficulty="shared.sqlite"').buffer.difficulty == tmp_path / "shared.sqlite"
    assert load(tmp_path).buffer.difficulty is None
