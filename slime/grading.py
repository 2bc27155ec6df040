"""From samples to verdicts, and which groups are trained: the policy on failures, and the built-in filters."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

from slime.errors import HookError, RewardError, boundary
from slime.protocols import FilterHook
from slime.types import Failed, Group, Prompt, Sample, Score, Status, Verdict

MIN_JUDGED = 32
"""Samples judged before the failure rate may stop a run: fewer say nothing about a rate."""


class Grader:
    """Grades a group and takes out the samples without a score: a smaller group, never an invented number.

    Args:
        grade: the verdicts of a prompt's samples.
        max_failure_rate: highest share of Failed among the last `window` samples.
        window: samples the rate is measured over, usually those of one step.
    """

    def __init__(
        self,
        grade: Callable[[Sequence[Sample], Prompt], Awaitable[list[Verdict]]],
        *,
        max_failure_rate: float,
        window: int,
    ) -> None:
        self._grade = grade
        self._max_failure_rate = max_failure_rate
        self._failed: deque[bool] = deque(maxlen=max(window, MIN_JUDGED))

    async def __call__(self, group: Group) -> Group:
        """The group with verdicts, and without the samples that got no score.

        Raises:
            RewardError: too many verdicts failed; training on what is left would be training on rubbish.
        """
        verdicts = await self._grade(group.samples, group.prompt)
        for sample, verdict in zip(group.samples, verdicts, strict=True):
            sample.verdict = verdict
        self._watch(verdicts)
        group.samples = [sample for sample in group.samples if isinstance(sample.verdict, Score)]
        return group

    def _watch(self, verdicts: Sequence[Verdict]) -> None:
        failures = [verdict for verdict in verdicts if isinstance(verdict, Failed)]
        self._failed.extend(isinstance(verdict, Failed) for verdict in verdicts)
        rate = sum(self._failed) / len(self._failed)
        if failures and len(self._failed) >= MIN_JUDGED and rate > self._max_failure_rate:
            raise RewardError(
                f"{rate:.0%} of the last {len(self._failed)} samples got no verdict "
                f"(reward.max_failure_rate = {self._max_failure_rate:.0%}); the last: {failures[-1].kind}: "
                f"{failures[-1].detail}\nMend the reward function, or raise reward.max_failure_rate or timeout_s."
            )


def no_verdicts(group: Group) -> str:
    """Why a group whose samples mostly got no score is dropped: one sample alone has no advantage."""
    return "too_few_verdicts" if len(group.samples) < 2 else ""


def informative(group: Group) -> str:
    """Equal rewards give every sample advantage 0 and teach nothing."""
    return "equal_rewards" if len({sample.reward for sample in group.samples}) < 2 else ""


def not_truncated(group: Group) -> str:
    """Where most answers were cut, what is compared is how they were cut."""
    num_cut = sum(sample.status is Status.TRUNCATED for sample in group.samples)
    return "truncated" if 2 * num_cut > len(group.samples) else ""


def not_aborted(group: Group) -> str:
    """An answer that was stopped from outside was judged before its end."""
    return "aborted" if any(sample.status is Status.ABORTED for sample in group.samples) else ""


def keep_all(group: Group) -> str:
    """Trains every group."""
    return ""


FILTERS: Mapping[str, FilterHook] = {
    "all": keep_all,
    "informative": informative,
    "not_truncated": not_truncated,
    "not_aborted": not_aborted,
}
"""The built-in filters of graded groups, by the name that ``buffer.filter`` gives them."""


def first_objection(filters: Mapping[str, FilterHook]) -> FilterHook:
    """One filter of several, by name: the reason of the first that drops a group.

    Raises, when it is called:
        HookError: a filter failed, or returned something else than a string.
    """

    def keep(group: Group) -> str:
        if reason := no_verdicts(group):
            return reason
        return next((reason for name, choose in filters.items() if (reason := _ask(choose, group, name=name))), "")

    return keep


def _ask(choose: FilterHook, group: Group, *, name: str) -> str:
    with boundary(HookError, f"buffer.filter {name}"):
        reason = choose(group)
    if not isinstance(reason, str):
        raise HookError(
            f"buffer.filter {name} returned {reason!r}: expected a string.\n"
            'Return "" to keep the group, or the reason to drop it.'
        )
    return reason
