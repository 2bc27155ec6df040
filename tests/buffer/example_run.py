"""A run directory with instances in every state, as a run leaves it behind."""

from __future__ import annotations

from pathlib import Path

from buffer.ledger import Ledger
from buffer.payload import encode, summarise
from buffer.policy import Versions
from buffer.records import Outcome, Pushed
from buffer.samples import write_samples
from slime.types import Group
from tests.builders import make_group

HOSTILE = "\x1b[2J\x9b31m\u202elost 0\nissued 9"
"""Clears the screen, colours it, reverses the line and begins another."""


def make_run(run_dir: Path) -> Path:
    """Closed as a run that was stopped closes it.

    ====  ==========  =======================================================================
    0, 1  committed   in step 1, by version 0
    2     committed   in step 2, by version 1, with tokens of version 0
    3     dropped     by a filter, with a reason that is hostile
    4     dropped     while it ran
    5     packed      into step 3
    6     graded      pushed from outside
    7     running     at attempt 1, after its engine died; a late result of attempt 0 came in
    8     issued      again, with a partial sample
    9     generated
    ====  ==========  =======================================================================
    """
    with Ledger(run_dir) as ledger:
        ledger.bind("max_staleness", "1")
        for ordinal in (0, 1, 2, 3, 4, 5):
            _begin(ledger, ordinal)
        groups = {n: example_group(n, version=0) for n in (0, 1, 2)} | {5: example_group(5, version=2)}
        for ordinal, group in groups.items():
            _grade(ledger, group, ordinal=ordinal)
        ledger.drop(3, attempt=0, reason=HOSTILE, outcome=_outcome(0))
        ledger.drop(4, attempt=0, reason="prompt_too_long")
        for step, ordinals in ((1, [0, 1]), (2, [2])):
            ledger.pack(ordinals, step=step)
            write_samples(run_dir, [groups[n] for n in ordinals], step=step)
            ledger.commit(step, checkpoint=f"step_{step}", state={})
        ledger.pack([5], step=3)
        write_samples(run_dir, [groups[5]], step=3)
        pushed = example_group(6, version=1)
        ledger.push([
            Pushed(
                prompt_uid="b6", request="push/6", payload=encode(pushed), versions=Versions(1, 1), outcome=_outcome(1)
            )
        ])  # fmt: skip
        for ordinal in (7, 8, 9):
            _begin(ledger, ordinal)
        ledger.requeue(7, attempt=0, reason="engine died")
        ledger.start(7, attempt=1)
        ledger.graded(7, attempt=0, payload=b"late", versions=Versions(0, 0))
        ledger.requeue(8, attempt=0, reason="aborted", partial=encode(example_group(8, version=1)))
        ledger.generated(9, attempt=0)
    return run_dir


def example_group(ordinal: int, *, version: int) -> Group:
    """Two samples, one of which passes and drives the terminal."""
    group = make_group([0.0, 1.0], uid=uid_of(ordinal), ordinal=ordinal, version=version)
    group.samples[1].response = f"it is {HOSTILE}"
    group.samples[1].metadata = {"source": [1, None]}
    return group


def uid_of(ordinal: int) -> str:
    """Of instances 0 to 5 the uids begin with "a", of later ones with "b"."""
    return f"{'a' if ordinal < 6 else 'b'}{ordinal}"


def _begin(ledger: Ledger, ordinal: int) -> None:
    assert ledger.issue(uid_of(ordinal), epoch=0, position=ledger.next_position) == ordinal
    ledger.start(ordinal, attempt=0)


def _grade(ledger: Ledger, group: Group, *, ordinal: int) -> None:
    versions = summarise(group).versions
    assert versions is not None
    ledger.graded(ordinal, attempt=0, payload=encode(group), versions=versions, outcome=_outcome(1))


def _outcome(num_passed: int) -> Outcome:
    return Outcome(num_samples=2, num_passed=num_passed, reward_mean=num_passed / 2, response_tokens_mean=2.0)
