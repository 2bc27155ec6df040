"""What is trained against what was dispatched: planted biases are found, and chance is not taken for one."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from buffer.ledger import Ledger
from buffer.policy import Versions
from buffer.records import Outcome
from slime.survivorship import Decided, Judged, Survivorship, biases, metrics, together

DECODED = Versions(oldest=0, newest=0)


def judged(length: float, *, num_passed: int = 2) -> Judged:
    return Judged(num_samples=4, num_passed=num_passed, response_tokens=length)


def choose(rng: random.Random, *, drop: Callable[[float], float], num_groups: int = 512) -> Decided:
    """Groups whose lengths spread as real ones do, each dropped with a probability that may depend on its length."""
    lengths = [rng.lognormvariate(5, 0.7) for _ in range(num_groups)]
    dropped = [length for length in lengths if rng.random() < drop(length)]
    left = Counter(lengths) - Counter(dropped)
    return Decided(
        trained=[judged(length) for length in left.elements()],
        dropped=[judged(length) for length in dropped],
        reasons=Counter({"equal_rewards": len(dropped)}),
    )


def test_a_filter_that_looks_at_no_length_is_not_accused() -> None:
    """Pins a warning that cries wolf: 2,000 windows of chance alone, half of them small."""
    rng = random.Random(0)
    for trial in range(2000):
        share = rng.uniform(0.05, 0.95)
        window = choose(rng, drop=lambda length: share, num_groups=512 if trial % 2 else 100)  # noqa: B023
        assert biases(window) == {}


@pytest.mark.parametrize("seed", range(20))
def test_a_filter_that_drops_the_long_ones_is_named_with_its_reason(seed: int) -> None:
    """Pins the silent failure of every system in the field: what goes missing is the long and hard."""
    window = choose(random.Random(seed), drop=lambda length: 0.9 if length > 200 else 0.05)
    found = biases(window)
    assert set(found) == {"length", "long"}
    assert "shorter than of all judged ones" in found["length"]
    assert "equal_rewards" in found["length"]
    assert "longest responses" in found["long"]


@pytest.mark.parametrize("seed", range(20))
def test_a_filter_that_drops_the_short_ones_is_named_too(seed: int) -> None:
    """Pins an answer length that grows because the short answers are all right and teach nothing."""
    window = choose(random.Random(seed), drop=lambda length: 0.9 if length < 150 else 0.05)
    found = biases(window)
    assert set(found) == {"length"}
    assert "longer than of all judged ones" in found["length"]


def test_too_few_groups_say_nothing() -> None:
    """Pins an accusation after one step."""
    few = Decided(trained=[judged(10.0)] * 31, dropped=[judged(1000.0)] * 31)
    enough = Decided(trained=[judged(10.0)] * 32, dropped=[judged(1000.0)] * 32)
    assert biases(few) == {}
    assert set(biases(enough)) == {"length", "long"}


def test_prompts_that_never_reach_a_verdict_are_missed() -> None:
    """Pins: every prompt above the context is dropped, and the curves look the same."""
    trained = [judged(10.0 + i % 7) for i in range(200)]
    window = Decided(trained=trained, dropped=[], reasons=Counter({"prompt_too_long": 40}), num_never_graded=40)
    assert "prompt_too_long 40" in biases(window)["never_graded"]
    assert "17% of the last 240 groups" in biases(window)["never_graded"]
    assert biases(Decided(trained=trained, dropped=[], num_never_graded=20)) == {}


def test_the_metrics_of_a_step_compare_all_judged_groups_with_the_trained() -> None:
    decided = Decided(
        trained=[judged(10.0, num_passed=1), judged(20.0, num_passed=3)],
        dropped=[judged(90.0, num_passed=0)],
        reasons=Counter({"equal_rewards": 1, "prompt_too_long": 1}),
        num_never_graded=1,
    )
    assert metrics(decided) == {
        "survivorship/dispatched_groups": 4,
        "survivorship/dispatched_response_tokens_mean": 40,
        "survivorship/trained_response_tokens_mean": 15,
        "survivorship/dispatched_pass_rate": 4 / 12,
        "survivorship/trained_pass_rate": 4 / 8,
        "survivorship/never_graded_share": 0.25,
        "survivorship/dropped/equal_rewards": 1,
        "survivorship/dropped/prompt_too_long": 1,
    }
    nothing = metrics(Decided(trained=[], dropped=[]))
    assert math.isnan(nothing["survivorship/trained_pass_rate"]), "0.0 would be drawn as a collapse"


def test_reasons_that_a_hook_makes_up_do_not_become_a_metric_each() -> None:
    """Pins a metrics file that grows by a column a group, and names that break a reader of it."""
    reasons = Counter({f"mean {i / 100}": 1 for i in range(100)} | {"given up after 9 attempts: engine died": 5})
    names = {name for name in metrics(Decided(trained=[], dropped=[], reasons=reasons)) if "/dropped/" in name}
    assert len(names) == 9
    assert "survivorship/dropped/given_up_after_9_attempts" in names
    assert "survivorship/dropped/other" in names


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path) as ledger:
        yield ledger


def hand_in(ledger: Ledger, *, length: float, drop: str = "", graded: bool = True) -> int:
    ordinal = ledger.issue("uid", epoch=0, position=None)
    ledger.start(ordinal, attempt=0)
    outcome = Outcome(num_samples=4, num_passed=1, reward_mean=0.25, response_tokens_mean=length) if graded else None
    if drop:
        ledger.drop(ordinal, attempt=0, reason=drop, outcome=outcome)
    else:
        ledger.graded(ordinal, attempt=0, payload=b"", versions=DECODED, outcome=outcome)
    return ordinal


def test_every_group_is_counted_in_the_step_that_decides_it(ledger: Ledger, tmp_path: Path) -> None:
    """Pins: a group that waits for the next step and looks lost in this one, and a drop that is counted twice."""
    survivorship = Survivorship(tmp_path, step=0)
    first, waits = hand_in(ledger, length=10), hand_in(ledger, length=70)
    hand_in(ledger, length=40, drop="equal_rewards")
    hand_in(ledger, length=0, drop="prompt_too_long", graded=False)
    ledger.pack([first], step=1)
    one, warnings = survivorship.step(1)
    assert warnings == []
    assert one["survivorship/dispatched_groups"] == 3
    assert one["survivorship/dispatched_response_tokens_mean"] == 25
    assert one["survivorship/trained_response_tokens_mean"] == 10
    assert one["survivorship/length_ratio"] == 10 / 25
    ledger.commit(1, checkpoint="c", state={})
    hand_in(ledger, length=40, drop="equal_rewards")
    ledger.pack([waits], step=2)
    two, _ = survivorship.step(2)
    assert two["survivorship/dispatched_groups"] == 2
    assert two["survivorship/trained_response_tokens_mean"] == 70
    assert two["survivorship/length_ratio"] == 40 / 40, "over both steps"


def test_a_continued_run_counts_what_was_decided_since_its_last_commit(ledger: Ledger, tmp_path: Path) -> None:
    """Pins drops that no row of the metrics has, because the row that had them is taken again."""
    first = hand_in(ledger, length=10)
    hand_in(ledger, length=40, drop="equal_rewards")
    ledger.pack([first], step=1)
    ledger.commit(1, checkpoint="c", state={})
    hand_in(ledger, length=50, drop="equal_rewards")
    second = hand_in(ledger, length=20)
    ledger.pack([second], step=2)
    Survivorship(tmp_path, step=1).step(2)
    ledger.recover()
    ledger.pack([second], step=2)
    again, _ = Survivorship(tmp_path, step=1).step(2)
    assert again["survivorship/dispatched_groups"] == 2
    assert again["survivorship/dropped/equal_rewards"] == 1


def test_each_kind_of_bias_is_told_once(ledger: Ledger, tmp_path: Path) -> None:
    """Pins a screen full of the same sentence."""
    survivorship = Survivorship(tmp_path, step=0)
    told = []
    for step in range(1, 5):
        for i in range(16):
            hand_in(ledger, length=100 + i, drop="too_long")
        ledger.pack([hand_in(ledger, length=10 + i) for i in range(16)], step=step)
        told.append(len(survivorship.step(step)[1]))
    assert told == [0, 2, 0, 0]


def test_a_window_is_the_sum_of_its_steps() -> None:
    steps = [Decided(trained=[judged(1.0)], dropped=[judged(2.0)] * i, reasons=Counter(a=i)) for i in range(3)]
    assert together(steps) == Decided(trained=[judged(1.0)] * 3, dropped=[judged(2.0)] * 3, reasons=Counter(a=3))
