"""Group-relative advantages (GRPO, arXiv 2402.03300 section 4.1).

For the rewards r of one group of rollouts, ``A_i = (r_i - mean(r)) / (std(r) + 1e-6)`` with the unbiased standard
deviation; ``norm="mean"`` leaves out the division (Dr. GRPO, arXiv 2503.20783), which agentic runs prefer. Statistics
are taken by group over rollouts: segments that share a `rollout_id` count once, samples without a score not at all.
A group of one, or of equal rewards, teaches nothing and gives zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np

from slime.config import AdvantageConfig
from slime.protocols import AdvantageHook
from slime.types import Group, Score

EPSILON = 1e-6
"""Added to the standard deviation."""


def make_advantage(config: AdvantageConfig) -> AdvantageHook:
    """The advantage function that a run's configuration names."""
    return partial(group_advantages, norm=config.norm)


def group_advantages(groups: Sequence[Group], *, norm: Literal["std", "mean"] = "std") -> list[list[float]]:
    """One advantage for each sample of each group, in their order; 0.0 for a sample without a score."""
    return [_one_group(group, norm=norm) for group in groups]


def rollout_rewards(group: Group) -> dict[str, float]:
    """The reward of every scored rollout of a group, by rollout id.

    Segments of one rollout carry the rollout's reward; the last one scored stands for all.
    """
    return {s.rollout_id: s.verdict.value for s in group.samples if isinstance(s.verdict, Score)}


def _one_group(group: Group, *, norm: Literal["std", "mean"]) -> list[float]:
    by_rollout = rollout_rewards(group)
    rewards = np.array(list(by_rollout.values()), dtype=np.float64)
    # Equality is asked of the rewards: the mean of equal numbers may differ from them in the last bit, and the division
    # by a standard deviation near zero would make that an advantage.
    if len(rewards) < 2 or (rewards == rewards[0]).all():
        return [0.0] * len(group.samples)
    scale = float(rewards.std(ddof=1)) + EPSILON if norm == "std" else 1.0
    advantages = dict(zip(by_rollout, ((rewards - rewards.mean()) / scale).tolist(), strict=True))
    return [advantages[s.rollout_id] if isinstance(s.verdict, Score) else 0.0 for s in group.samples]
