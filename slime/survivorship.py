"""What is dispatched against what is trained: filters, failures and deadlines choose, and a run should know how.

A group is *decided* when it is packed into a step or dropped; the numbers of a step are over the groups decided since
the step before. Groups that wait to be trained are counted when they are, so that a slow one is not mistaken for a
lost one.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pvariance

from buffer.books.reading import read_ledger
from slime.types import Metrics

WINDOW_STEPS = 16
"""Steps that a bias is looked for in."""
MIN_GROUPS = 32
"""Fewer groups of a kind say nothing about it."""
LENGTH_BIAS = 0.2
NEVER_GRADED_SHARE = 0.1
LONG_DROP_RATIO = 1.5
SIGMAS = 4.0
"""By chance alone a warning comes once in 16,000 looks at independent windows."""
MAX_REASONS = 8
"""Reasons that get a metric of their own; a hook may make up one for every group."""

_TRAINED = """
SELECT num_samples, num_passed, response_tokens_mean
FROM instances JOIN outcomes USING (ordinal, attempt) WHERE state = 'packed' AND step = ?
"""
_DROPPED = """
SELECT events.detail, num_samples, num_passed, response_tokens_mean FROM events LEFT JOIN outcomes
ON outcomes.seq = (SELECT max(seq) FROM outcomes WHERE outcomes.ordinal = events.ordinal)
WHERE events.seq > ? AND events.seq <= ? AND event = 'dropped'
"""
_PACKED_BEFORE = "SELECT seq FROM events WHERE event = 'packed' AND step <= ? ORDER BY seq DESC LIMIT 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A group with verdicts."""

    num_samples: int
    num_passed: int
    response_tokens: float
    """Mean over its samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """The groups decided in some steps."""

    trained: Sequence[Judged]
    dropped: Sequence[Judged]
    """After their verdicts."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Of all that were dropped, judged or not."""
    num_never_graded: int = 0
    """Dropped before a verdict."""

    @property
    def judged(self) -> Sequence[Judged]:
        return [*self.trained, *self.dropped]

    @property
    def num_dispatched(self) -> int:
        return len(self.trained) + len(self.dropped) + self.num_never_graded


class Survivorship:
    """Reads the ledger once a step, from where it stopped the step before.

    Args:
        run_dir: of the run; its ledger may be open meanwhile.
        step: the last committed step: what was decided since then counts in the next.
    """

    def __init__(self, run_dir: Path, *, step: int) -> None:
        self._run_dir = run_dir
        self._window: deque[Decided] = deque(maxlen=WINDOW_STEPS)
        self._warned: set[str] = set()
        with read_ledger(run_dir) as db:
            self._seq = _one(db, _PACKED_BEFORE, step) if step else 0

    def step(self, step: int) -> tuple[Metrics, list[str]]:
        """Metrics of a step that is packed and not committed yet, and warnings; each kind of warning comes once.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        with read_ledger(self._run_dir) as db:
            last = _one(db, "SELECT coalesce(max(seq), 0) FROM events")
            decided = _decided(db, step=step, after=self._seq, up_to=last)
        self._seq = last
        self._window.append(decided)
        window = together(self._window)
        new = {kind: text for kind, text in biases(window).items() if kind not in self._warned}
        self._warned.update(new)
        return metrics(decided) | _ratios(window), list(new.values())


def metrics(decided: Decided) -> Metrics:
    """``survivorship/...`` of the groups decided in a step; NaN for a mean of nothing."""
    return {
        "survivorship/dispatched_groups": float(decided.num_dispatched),
        "survivorship/dispatched_response_tokens_mean": _mean_length(decided.judged),
        "survivorship/trained_response_tokens_mean": _mean_length(decided.trained),
        "survivorship/dispatched_pass_rate": _pass_rate(decided.judged),
        "survivorship/trained_pass_rate": _pass_rate(decided.trained),
        "survivorship/never_graded_share": decided.num_never_graded / max(1, decided.num_dispatched),
        **{f"survivorship/dropped/{name}": float(count) for name, count in _named(decided.reasons).items()},
    }


def biases(window: Decided) -> dict[str, str]:
    """What the groups of a window say about the choice among them, in plain words by kind; {} for nothing.

    ``length``: the mean response length of the trained groups is more than LENGTH_BIAS away from that of all judged
    ones. ``long``: of the quarter with the longest responses LONG_DROP_RATIO times as large a share was dropped as of
    the others. Both only where a choice that looks at no length would come as far in one case of 16,000: n groups drawn
    from N without replacement have a mean with the variance ``s²/n · (N - n)/(N - 1)``, s² being that of the N.
    ``never_graded``: more than NEVER_GRADED_SHARE of the groups were dropped before they had a verdict.
    All three need MIN_GROUPS of what they compare.
    """
    found = {"length": _length_bias(window), "long": _long_bias(window), "never_graded": _never_graded(window)}
    return {kind: text for kind, text in found.items() if text}


def together(steps: Sequence[Decided]) -> Decided:
    """The groups of several steps."""
    return Decided(
        trained=[group for step in steps for group in step.trained],
        dropped=[group for step in steps for group in step.dropped],
        reasons=sum((step.reasons for step in steps), Counter()),
        num_never_graded=sum(step.num_never_graded for step in steps),
    )


def _decided(db: sqlite3.Connection, *, step: int, after: int, up_to: int) -> Decided:
    rows = db.execute(_DROPPED, (after, up_to)).fetchall()
    dropped = [_judged(*outcome) for _, *outcome in rows if outcome[0] is not None]
    return Decided(
        trained=[_judged(*outcome) for outcome in db.execute(_TRAINED, (step,))],
        dropped=dropped,
        reasons=Counter(reason for reason, *_ in rows),
        num_never_graded=len(rows) - len(dropped),
    )


def _judged(num_samples: int, num_passed: int, response_tokens: float) -> Judged:
    return Judged(num_samples=num_samples, num_passed=num_passed, response_tokens=response_tokens)


def _one(db: sqlite3.Connection, query: str, *values: int) -> int:
    row = db.execute(query, values).fetchone()
    return int(row[0]) if row else 0


def _ratios(window: Decided) -> Metrics:
    """Trained ÷ dispatched over the window: 1 where nothing is chosen."""
    return {"survivorship/length_ratio": _mean_length(window.trained) / (_mean_length(window.judged) or math.nan)}


def _length_bias(window: Decided) -> str:
    lengths, trained = _lengths(window.judged), _lengths(window.trained)
    if min(len(trained), len(window.dropped)) < MIN_GROUPS:
        return ""
    all_mean, trained_mean = fmean(lengths), fmean(trained)
    left_out = (len(lengths) - len(trained)) / (len(lengths) - 1)
    sigma = math.sqrt(pvariance(lengths) / len(trained) * left_out)
    away = trained_mean - all_mean
    if abs(away) <= LENGTH_BIAS * all_mean or abs(away) <= SIGMAS * sigma:
        return ""
    return (
        f"responses of the trained groups are {abs(away) / all_mean:.0%} {'shorter' if away < 0 else 'longer'} than of "
        f"all judged ones ({trained_mean:.0f} and {all_mean:.0f} tokens on average, over {len(lengths)} groups); "
        f"dropped were {_listed(window.reasons)}"
    )


def _long_bias(window: Decided) -> str:
    """The number of dropped ones among the n longest of N is hypergeometric, when length plays no part."""
    lengths = sorted(_lengths(window.judged))
    total, num_dropped = len(lengths), len(window.dropped)
    if min(total - num_dropped, num_dropped) < MIN_GROUPS:
        return ""
    limit = lengths[total * 3 // 4]
    num_long = sum(length >= limit for length in lengths)
    if num_long == total:
        return ""
    num_long_dropped = sum(length >= limit for length in _lengths(window.dropped))
    share = num_long / total
    sigma = math.sqrt(num_dropped * share * (1 - share) * (total - num_dropped) / (total - 1))
    if num_long_dropped - num_dropped * share <= SIGMAS * sigma:
        return ""
    long_rate, other_rate = num_long_dropped / num_long, (num_dropped - num_long_dropped) / (total - num_long)
    if long_rate <= LONG_DROP_RATIO * other_rate:
        return ""
    return (
        f"of the groups with the longest responses ({limit:.0f} tokens on average and more) {long_rate:.0%} were "
        f"dropped, of the others {other_rate:.0%} (over {total} groups); dropped were {_listed(window.reasons)}"
    )


def _never_graded(window: Decided) -> str:
    share = window.num_never_graded / max(1, window.num_dispatched)
    if window.num_never_graded < MIN_GROUPS or share <= NEVER_GRADED_SHARE:
        return ""
    return (
        f"{share:.0%} of the last {window.num_dispatched} groups were dropped before they had a verdict: nothing is "
        f"learned from their prompts; dropped were {_listed(window.reasons)}"
    )


def _lengths(groups: Sequence[Judged]) -> list[float]:
    return [group.response_tokens for group in groups]


def _mean_length(groups: Sequence[Judged]) -> float:
    return fmean(_lengths(groups)) if groups else math.nan


def _pass_rate(groups: Sequence[Judged]) -> float:
    num_samples = sum(group.num_samples for group in groups)
    return sum(group.num_passed for group in groups) / num_samples if num_samples else math.nan


def _named(reasons: Counter[str]) -> Counter[str]:
    """Counts by what can be a metric's name; rare reasons as ``other``."""
    named: Counter[str] = Counter()
    for reason, count in reasons.items():
        named[re.sub(r"\W+", "_", reason.split(":")[0])[:40]] += count
    common = Counter(dict(named.most_common(MAX_REASONS)))
    other = (named - common).total()
    return common + Counter({"other": other})


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in _named(reasons).most_common(3))
