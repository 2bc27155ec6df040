"""Values become verdicts: what is a number, and what never becomes one."""

from __future__ import annotations

import datetime
import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Abstain, Failed, RewardInput, Score
from rewards.inputs import ARGUMENTS, decode_input, encode_input, reward_input
from rewards.verdict import LARGEST_REWARD, decode_verdict, encode_verdict, to_verdict
from slime.types import Prompt, Sample, Status, Verdict


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (-0.5, -0.5),
        (True, 1.0),
        (False, 0.0),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.bool_(True), 1.0),
        (Fraction(1, 4), 0.25),
        (LARGEST_REWARD, LARGEST_REWARD),
    ],
)
def test_numbers_and_bools_are_scores(value: Any, number: float) -> None:
    """Pins: an honest result refused, e.g. the bool of a comparison or a numpy scalar."""
    assert to_verdict(value) == Score(value=number)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "None of type NoneType"),
        ("1.0", "'1.0' of type str"),
        ([1.0], "[1.0] of type list"),
        ({"score": 1.0}, "of type dict"),
        ((1.0,), "of type tuple"),
        (1j, "of type complex"),
        (np.ones(2), "of type ndarray"),
        (b"1", "of type bytes"),
        (Unprintable(), "of type Unprintable"),
        (float("nan"), "nan, which is not finite"),
        (float("inf"), "inf, which is not finite"),
        (-float("inf"), "-inf, which is not finite"),
        (np.float64("nan"), "which is not finite"),
        (1e300, "larger than 1e+09"),
        (10**400, "too large for a float"),
        (Score(value=float("nan")), "nan"),
        (Score(value="1"), "'1' of type str"),  # type: ignore[arg-type]
        (Score(value=1.0, parts={"length": None}), "None of type NoneType"),  # type: ignore[dict-item]
        (Score(value=1.0, parts=[1.0]), "no dict of numbers"),  # type: ignore[arg-type]
    ],
)
def test_everything_else_is_a_failure_and_no_number(value: Any, says: str) -> None:
    """Pins: failures trained on as 0, and NaN or a huge value reaching the gradient."""
    verdict = to_verdict(value)
    assert isinstance(verdict, Failed)
    assert verdict.kind == "bad_value"
    assert says in verdict.detail
    assert "return a finite number" in verdict.detail


@settings(deadline=None, max_examples=100)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists))
def test_a_score_is_always_finite(value: Any) -> None:
    """Pins: any value at all that gets through as a reward without being a finite number."""
    verdict = to_verdict(value)
    assert isinstance(verdict, Failed) or (isinstance(verdict, Score) and math.isfinite(verdict.value))


@pytest.mark.parametrize(
    "verdict",
    [
        Score(value=0.25, parts={"format": 1.0}),
        Abstain(reason="no rule"),
        Failed(kind="judge_down", detail="HTTP 503", retryable=True),
    ],
)
def test_verdicts_of_the_users_own_survive_the_way_back(verdict: Verdict) -> None:
    """Pins: parts, reasons or kinds lost between worker and pool."""
    assert decode_verdict(json.loads(json.dumps(encode_verdict(to_verdict(verdict))))) == verdict


def test_what_a_function_sees_is_the_prompt_and_the_sample_in_plain_values() -> None:
    """Pins: fields lost or changed on the way to a worker; values of parquet files that JSON does not know."""
    prompt = Prompt(
        uid="p",
        messages=({"role": "user", "content": "1 + \ud800 \u2028 é"},),
        label=[np.int64(3), np.arange(2), datetime.date(2025, 1, 2), 10**30],
        tags=("sum",),
        metadata={"level": 1, "source": "made"},
    )
    sample = Sample(prompt_uid="p", index=0, rollout_id="p/0", response="3\n", status=Status.TRUNCATED)
    sample.append([1, 2])
    sample.append([3], logprobs=[-1.0], version=0)
    sample.metadata["level"] = 2
    seen = decode_input(json.loads(encode_input(reward_input(sample, prompt))))
    assert seen == RewardInput(
        response="3\n",
        label=[3, [0, 1], "2025-01-02", 10**30],
        messages=({"role": "user", "content": "1 + \ud800 \u2028 é"},),
        text="",
        tags=("sum",),
        metadata={"level": 2, "source": "made"},
        num_response_tokens=1,
        status=Status.TRUNCATED,
    )
    assert tuple(seen.values()) == ARGUMENTS
    assert seen.values()["sample"] is seen
