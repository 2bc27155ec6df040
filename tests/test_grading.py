"""Verdicts on groups, and evaluation: a failure is never a number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from slime.errors import HookError, PromptError, RewardError
from slime.evaluation import Evaluator
from slime.grading import FILTERS, Grader, first_objection, informative, no_verdicts, not_aborted, not_truncated
from slime.types import Abstain, Failed, Group, Prompt, Sample, Score, Status, Verdict
from tests.builders import make_group, make_prompt, make_sample

FAILED = Failed(kind="timeout", detail="./reward.py:score took longer than 10 s")


def grader(verdicts: Sequence[Verdict], *, max_failure_rate: float = 0.2, window: int = 64) -> Grader:
    async def grade(samples: Sequence[Sample], prompt: Prompt) -> list[Verdict]:
        return [verdicts[sample.index % len(verdicts)] for sample in samples]

    return Grader(grade, max_failure_rate=max_failure_rate, window=window)


async def test_a_sample_without_a_verdict_leaves_the_group_and_becomes_no_zero() -> None:
    """A timeout that counts as reward 0 teaches the policy to avoid whatever is slow to grade."""
    group = await grader([Score(value=1.0), FAILED, Abstain(reason="unclear"), Score(value=0.0)])(make_group([0.0] * 4))
    assert [sample.reward for sample in group.samples] == [1.0, 0.0]
    assert no_verdicts(group) == ""


async def test_a_group_with_one_verdict_left_is_dropped() -> None:
    """One sample alone has no advantage; trained, it would only cost tokens."""
    group = await grader([Score(value=1.0), FAILED, FAILED, FAILED], max_failure_rate=1.0)(make_group([0.0] * 4))
    assert no_verdicts(group) == "too_few_verdicts"


async def test_a_reward_that_mostly_fails_stops_the_run_and_says_how() -> None:
    """The rest of the samples is a biased sample: training on it would be training on rubbish."""
    judge = grader([FAILED, Score(value=1.0)])
    for _ in range(7):  # too few to speak of a rate
        await judge(make_group([0.0] * 4))
    with pytest.raises(RewardError, match=r"50% of the last 32 samples.*timeout") as error:
        await judge(make_group([0.0] * 4))
    assert "max_failure_rate" in str(error.value)


async def test_now_and_then_a_failure_costs_its_sample_and_not_the_run() -> None:
    """One hung sample in fifty must not end a long run, however early it comes."""
    verdicts: list[Verdict] = [FAILED, *[Score(value=1.0)] * 15]
    judge = grader(verdicts)
    for _ in range(20):
        assert len((await judge(make_group([0.0] * 16))).samples) == 15


def test_equal_rewards_are_what_the_informative_filter_drops() -> None:
    """They give every sample advantage 0."""
    assert informative(make_group([1.0, 1.0])) == "equal_rewards"
    assert informative(make_group([1.0, 0.0])) == ""


def ended(*statuses: Status) -> Group:
    group = make_group([0.0] * len(statuses))
    for sample, status in zip(group.samples, statuses, strict=True):
        sample.status = status
    return group


def test_a_group_is_truncated_when_more_than_half_of_it_was_cut() -> None:
    """Pins: half a group of long and right answers that goes because the other half was too long."""
    cut, whole = Status.TRUNCATED, Status.COMPLETED
    assert [not_truncated(ended(*statuses)) for statuses in ((cut, whole), (cut, cut, whole), (whole, whole))] == [
        "", "truncated", "",
    ]  # fmt: skip


def test_one_sample_that_was_stopped_from_outside_makes_a_group_aborted() -> None:
    assert not_aborted(ended(Status.COMPLETED, Status.ABORTED)) == "aborted"
    assert not_aborted(ended(Status.COMPLETED, Status.TRUNCATED)) == ""


def test_of_several_filters_the_first_to_object_gives_the_reason() -> None:
    """Pins what the ledger counts: one reason a group, in the order of the run file, and verdicts before all."""
    cut = ended(Status.TRUNCATED, Status.TRUNCATED)
    names = ("all", "informative", "not_truncated")
    assert first_objection({name: FILTERS[name] for name in names})(cut) == "equal_rewards"
    assert first_objection({name: FILTERS[name] for name in reversed(names)})(cut) == "truncated"
    assert first_objection(FILTERS)(ended(Status.COMPLETED)) == "too_few_verdicts"
    assert first_objection({"all": FILTERS["all"]})(cut) == ""


def test_a_filter_that_fails_or_returns_no_string_is_named() -> None:
    """Pins ``return True`` for "keep", which would drop every group for the reason True."""
    with pytest.raises(HookError, match=r"\./f\.py:a returned True: expected a string"):
        first_objection({"./f.py:a": lambda group: True})(make_group([0.0, 1.0]))  # type: ignore[dict-item, return-value]
    with pytest.raises(HookError, match=r"\./f\.py:b raised ZeroDivisionError"):
        first_objection({"./f.py:b": lambda group: 1 / 0})(make_group([0.0, 1.0]))  # type: ignore[dict-item, return-value]


class _Rollout:
    async def sample(self, prompt: Prompt, *, num_samples: int, temperature: float, seed_salt: str) -> list[Sample]:
        if prompt.uid == "long":
            raise PromptError("too long")
        return [make_sample(prompt_uid=prompt.uid, index=i, reward=None) for i in range(num_samples)]


async def test_pass_at_k_counts_judged_samples_only_and_leaves_out_what_cannot_run() -> None:
    """An overlong held-out prompt must not end the run, and a reward that fails must not look like a wrong answer."""
    table = {
        "solved": [Score(value=1.0, parts={"think": 1.0}), Score(value=0.0, parts={"think": 0.0})],
        "failed": [FAILED, Score(value=0.0, parts={"think": 0.0})],
    }

    async def grade(samples: Sequence[Sample], prompt: Prompt) -> list[Verdict]:
        return list(table[prompt.uid])

    prompts = [make_prompt(uid) for uid in ("solved", "failed", "long")]
    evaluator = Evaluator(
        _Rollout(), grade, prompts, samples_per_prompt=2, temperature=1.0, pass_reward=1.0, concurrency=2
    )
    metrics, groups = await evaluator()
    assert metrics["eval/held_out/pass@1"] == pytest.approx(1 / 3)
    assert metrics["eval/held_out/pass@2"] == 0.5
    assert metrics["eval/held_out/think"] == pytest.approx(1 / 3)
    assert (metrics["eval/held_out/failures"], metrics["eval/held_out/skipped_prompts"]) == (1, 1)
    assert [len(group) for group in groups] == [2, 2, 0]


async def test_an_evaluation_without_any_verdict_is_no_number() -> None:
    """0.0 would be drawn as a collapse."""

    async def grade(samples: Sequence[Sample], prompt: Prompt) -> list[Verdict]:
        return [FAILED] * len(samples)

    evaluator = Evaluator(
        _Rollout(), grade, [make_prompt("p")], samples_per_prompt=2, temperature=1.0, pass_reward=1.0, concurrency=2
    )
    metrics, _ = await evaluator()
    assert math.isnan(metrics["eval/held_out/pass@1"])
