"""The policy against a model in memory: random histories, and an oracle that schedules instead of counting."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from buffer.policy import Policy, Versions
from slime.errors import LedgerError


class Waits(NamedTuple):
    """A waiting instance of the model; tuples of them sort as they are to be issued."""

    begins_anew: bool
    ordinal: int
    attempt: int
    oldest: int | None


def can_all_be_trained(oldest: list[int], *, next_version: int, per_step: int, num_steps: int, bound: int) -> bool:
    """Earliest deadline first: the steps of version `next_version` and later take `per_step` groups each."""
    due = sorted(version + bound for version in oldest)
    steps = [next_version + place // per_step for place in range(len(due))]
    return all(version <= last and version < num_steps for version, last in zip(steps, due, strict=True))


class PolicyMachine(RuleBasedStateMachine):
    """A run: workers admit, hand in, drop and give back in any order; steps are taken, trained and published."""

    @initialize(
        per_step=st.integers(1, 4),
        num_steps=st.integers(1, 8),
        bound=st.integers(0, 3),
        oversample=st.none() | st.floats(1, 2),
        wait=st.booleans(),
    )
    def begin(self, per_step: int, num_steps: int, bound: int, oversample: float | None, wait: bool) -> None:
        self.policy = Policy(
            groups_per_step=per_step,
            num_steps=num_steps,
            max_staleness=bound,
            oversample=oversample,
            wait_for_stragglers=wait,
        )
        self.next_ordinal = 0
        self.version: int | None = None
        self.trained: list[int] = []
        self.running: dict[int, tuple[int, int]] = {}
        self.ready: dict[int, tuple[Versions, int]] = {}
        self.waiting: list[Waits] = []
        self.step: list[int] = []
        self.continued = False

    @property
    def next_version(self) -> int:
        """The weights that the next step trains."""
        return (self.version or 0) + bool(self.step)

    @property
    def out(self) -> list[int]:
        """The oldest tokens of every group that no step has yet."""
        running = [oldest for oldest, _ in self.running.values()]
        return running + [entry[0].oldest for ordinal, entry in self.ready.items() if ordinal not in self.step]

    def has_room(self, oldest: int) -> bool:
        """Whether one more group whose oldest tokens are of this version can be trained in time with all the others."""
        policy, out = self.policy, [*self.out, oldest]
        if self.version is None or (
            policy.oversample is not None and len(out) > math.ceil(policy.oversample * policy.groups_per_step)
        ):
            return False
        return can_all_be_trained(
            out,
            next_version=self.next_version,
            per_step=policy.groups_per_step,
            num_steps=policy.num_steps,
            bound=policy.max_staleness,
        )

    @precondition(lambda self: self.version is None)
    @rule()
    def publish_first(self) -> None:
        assert self.policy.capacity == 0
        self.version = 0
        self.policy.publish(0)

    @precondition(lambda self: self.policy.capacity > 0)
    @rule()
    def admit(self) -> None:
        assert self.version is not None
        first = min(self.waiting, default=None)
        waiting = self.policy.next_waiting()
        if first is None:
            assert waiting is None
            first = Waits(begins_anew=True, ordinal=self.next_ordinal, attempt=0, oldest=None)
            self.next_ordinal += 1
        else:
            assert waiting is not None
            assert (waiting.ordinal, waiting.attempt) == (first.ordinal, first.attempt)
            self.waiting.remove(first)
        self.policy.admit(first.ordinal, first.attempt, oldest=first.oldest)
        oldest = self.version if first.oldest is None else first.oldest
        self.continued |= oldest < self.version
        self.running[first.ordinal] = oldest, first.attempt

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        assert self.version is not None
        ordinal = data.draw(st.sampled_from(sorted(self.running)))
        oldest, attempt = self.running.pop(ordinal)
        oldest = data.draw(st.integers(oldest, self.version))
        versions = Versions(oldest=oldest, newest=data.draw(st.integers(oldest, self.version)))
        self.policy.put(ordinal, versions=versions)
        self.ready[ordinal] = versions, attempt

    @precondition(lambda self: self.version is not None)
    @rule(age=st.integers(0, 3))
    def push(self, age: int) -> None:
        assert self.version is not None
        oldest = self.version - age
        if oldest < 0 or age > self.policy.max_staleness or not self.policy.room(oldest):
            return
        versions = Versions(oldest=oldest, newest=self.version)
        self.policy.push(self.next_ordinal, versions=versions)
        self.ready[self.next_ordinal] = versions, 0
        self.next_ordinal += 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        ordinal = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[ordinal]
        self.policy.drop(ordinal)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), partial=st.booleans())
    def requeue(self, data: st.DataObject, partial: bool) -> None:
        ordinal = data.draw(st.sampled_from(sorted(self.running)))
        oldest, attempt = self.running.pop(ordinal)
        self.policy.requeue(ordinal, attempt=attempt + 1, partial=partial)
        self.waiting.append(
            Waits(begins_anew=not partial, ordinal=ordinal, attempt=attempt + 1, oldest=oldest if partial else None)
        )

    @precondition(lambda self: self.ready and not self.step)
    @rule()
    def take(self) -> None:
        """What the buffer does when a step is asked for: old ones go back, then a step is formed, or not yet."""
        policy = self.policy
        for ordinal, reason in policy.unfit().items():
            assert reason == "too_old"
            assert not policy.wait_for_stragglers or self.continued, "pacing alone keeps every group young enough"
            _, attempt = self.ready.pop(ordinal)
            policy.requeue(ordinal, attempt=attempt + 1, partial=False)
            self.waiting.append(Waits(begins_anew=True, ordinal=ordinal, attempt=attempt + 1, oldest=None))
        chosen = policy.select(policy.groups_per_step)
        if not chosen:
            assert len(self.ready) < policy.groups_per_step or (policy.wait_for_stragglers and self.running)
            return
        assert len(chosen) == policy.groups_per_step
        assert chosen == sorted(chosen), "in order of issue"
        youngest_taken = max(self.ready[ordinal][0].oldest for ordinal in chosen)
        left = [versions.oldest for ordinal, (versions, _) in self.ready.items() if ordinal not in chosen]
        assert all(youngest_taken <= oldest for oldest in left), "the oldest tokens are trained first"
        policy.pack(chosen, step=self.next_version + 1)
        self.step = chosen

    @precondition(lambda self: self.step)
    @rule()
    def release(self) -> None:
        for ordinal in self.step:
            self.policy.release(ordinal, versions=self.ready[ordinal][0])
        self.step = []

    @precondition(lambda self: self.step)
    @rule()
    def train(self) -> None:
        assert self.version is not None
        for ordinal in self.step:
            versions, _ = self.ready.pop(ordinal)
            assert self.version - versions.oldest <= self.policy.max_staleness, "trained too old"
        self.trained += self.step
        assert sorted(self.policy.commit(self.version + 1)) == self.step
        self.step = []
        self.version += 1
        self.policy.publish(self.version)

    @invariant()
    def everything_is_where_the_model_has_it(self) -> None:
        policy = getattr(self, "policy", None)
        if policy is None:
            return
        assert {ordinal: entry.attempt for ordinal, entry in policy.running.items()} == {
            ordinal: attempt for ordinal, (_, attempt) in self.running.items()
        }
        assert set(policy.ready) == set(self.ready) - set(self.step)
        assert set(policy.packed) == set(self.step)
        assert {entry.ordinal for entry in policy.waiting} == {entry.ordinal for entry in self.waiting}
        assert policy.num_committed == len(self.trained) == len(set(self.trained))
        assert policy.num_admitted <= policy.num_steps * policy.groups_per_step

    @invariant()
    def there_is_room_exactly_where_a_schedule_exists(self) -> None:
        policy = getattr(self, "policy", None)
        if policy is None or self.version is None or self.continued or not policy.wait_for_stragglers:
            return  # without these, a group may be late already, whatever else is admitted
        for age in range(min(policy.max_staleness, self.version) + 1):
            assert (policy.room(self.version - age) > 0) == self.has_room(self.version - age)
        assert (policy.capacity > 0) == self.has_room(self.version)


TestPolicy = PolicyMachine.TestCase
TestPolicy.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_more_groups_than_can_ever_be_out_are_refused() -> None:
    """Pins: a step that waits for ever."""
    with pytest.raises(LedgerError, match="at most 8 are out"):
        Policy(groups_per_step=4, num_steps=2, max_staleness=1).select(9)


def test_engines_do_not_go_back_to_older_weights() -> None:
    """Pins: samples of an older version admitted as if they were new."""
    policy = Policy(groups_per_step=1, num_steps=2)
    policy.publish(1)
    with pytest.raises(LedgerError, match="after version 1"):
        policy.publish(0)


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        (None, "nothing_sampled"),
        (Versions(oldest=5, newest=6), "weights_lost"),
        (Versions(oldest=3, newest=5), "too_old"),
        (Versions(oldest=4, newest=5), ""),
    ],
)
def test_tokens_that_may_not_be_trained_have_a_reason(versions: Any, reason: str) -> None:
    """Pins: tokens of weights that no checkpoint has, trained after a resume."""
    assert Policy(groups_per_step=1, num_steps=9, max_staleness=1, version=5).why_unfit(versions) == reason
