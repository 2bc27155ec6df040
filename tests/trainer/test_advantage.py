"""Group advantages against statistics written out by hand."""

import statistics

import pytest

from slime.types import Abstain, Failed
from tests.builders import make_group, make_sample
from trainer.advantage import group_advantages


def test_the_advantage_is_the_reward_in_unbiased_standard_deviations_from_the_groups_mean() -> None:
    """Pins the biased deviation and the batch-wide mean, which both train without an error."""
    groups = [make_group([0.0, 1.0, 1.0, 3.0]), make_group([10.0, 20.0], uid="p1")]
    for group, advantages in zip(groups, group_advantages(groups), strict=True):
        rewards = [s.reward for s in group.samples]
        mean, std = statistics.mean(rewards), statistics.stdev(rewards)
        assert advantages == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], rel=1e-12)


def test_norm_mean_leaves_out_the_division() -> None:
    """Pins an option that is read but does nothing."""
    assert group_advantages([make_group([0.0, 1.0, 5.0])], norm="mean") == [[-2.0, -1.0, 3.0]]


@pytest.mark.parametrize("rewards", [[1.0], [0.1, 0.1, 0.1], [0.7] * 7], ids=str)
def test_a_group_that_teaches_nothing_gives_exactly_zero(rewards: list[float]) -> None:
    """Pins rounding noise blown up by the division: the mean of three times 0.1 is not 0.1."""
    assert group_advantages([make_group(rewards)]) == [[0.0] * len(rewards)]


def test_segments_of_one_rollout_count_once() -> None:
    """Pins a rollout of many segments dragging its group's mean towards itself."""
    group = make_group([0.0, 1.0])
    segments = [make_sample(index=1, reward=1.0) for _ in range(3)]
    group.samples.extend(segments)
    plain = group_advantages([make_group([0.0, 1.0])])[0]
    assert group_advantages([group])[0] == [plain[0], *[plain[1]] * 4]


def test_a_sample_without_a_score_is_neither_a_zero_nor_part_of_the_mean() -> None:
    """Pins failures that become rewards."""
    group = make_group([0.0, 1.0, None, None])  # type: ignore[list-item]
    group.samples[2].verdict = Failed(kind="timeout", detail="10 s")
    group.samples[3].verdict = Abstain(reason="no label")
    assert group_advantages([group])[0] == [*group_advantages([make_group([0.0, 1.0])])[0], 0.0, 0.0]
