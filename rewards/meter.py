"""What a pool's calls came to and how long they took."""

from __future__ import annotations

from collections import Counter, deque

from slime.types import Failed, Metrics, Verdict

LATENCY_WINDOW = 10_000
"""Calls that the percentiles are taken over at most."""
NAMES = {
    "timeout": "reward/timeouts",
    "raised": "reward/raised",
    "bad_value": "reward/bad_values",
    "worker_died": "reward/workers_died",
}
"""The kinds of Failed that slime itself gives, and their metrics; a kind of the user's counts as a failure only."""


class CallMeter:
    """Counts calls and failures, and keeps latencies, between two readings."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=LATENCY_WINDOW)

    def record(self, verdict: Verdict, *, seconds: float) -> None:
        """One settled call."""
        self._counts["reward/calls"] += 1
        self._seconds.append(seconds)
        if isinstance(verdict, Failed):
            self._counts["reward/failures"] += 1
            self._counts[NAMES.get(verdict.kind, "")] += 1

    def read(self) -> Metrics:
        """The metrics since the last reading."""
        seconds = sorted(self._seconds)
        metrics = {name: float(self._counts[name]) for name in ("reward/calls", "reward/failures", *NAMES.values())}
        if seconds:
            metrics["reward/latency_p50_s"] = seconds[len(seconds) // 2]
            metrics["reward/latency_p99_s"] = seconds[len(seconds) * 99 // 100]
        self._counts.clear()
        self._seconds.clear()
        return metrics
