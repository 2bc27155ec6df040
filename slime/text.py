"""Numbers of a run, and what a model wrote, as short plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

SPARKS = "▁▂▃▄▅▆▇█"
STEP_PARTS = ("generate", "train", "publish", "commit", "eval", "other")
"""What a step's time goes to: ``time/<part>_s``; ``other`` is what ``time/step_s`` leaves over."""

LEAST_SHARE = 0.015


def printable(text: str, *, limit: int = 400) -> str:
    """`text` on one line, cut after `limit` characters, with everything unprintable escaped.

    What a model wrote is hostile: control characters would drive the terminal, bidirectional ones reorder its line.
    """
    cut = text if len(text) <= limit else text[:limit] + "…"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)


def sparkline(values: Sequence[float], *, width: int) -> str:
    """All values as at most `width` bars, each a mean, between the least and the largest; NaN is a gap."""
    bounds = [round(i * len(values) / width) for i in range(width + 1)] if len(values) > width else []
    shown = [fmean(values[start:end]) for start, end in pairwise(bounds)] or values
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return " " * len(shown)
    low, span = min(finite), max(finite) - min(finite)

    def bar(value: float) -> str:
        share = (value - low) / span if span else 0.5
        return SPARKS[round(share * (len(SPARKS) - 1))]

    return "".join(bar(value) if math.isfinite(value) else " " for value in shown)


def time_shares(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Share of the rows' time that each of STEP_PARTS took; empty if nothing was timed."""
    spent = {part: total(rows, f"time/{part}_s") for part in STEP_PARTS if part != "other"}
    whole = max(total(rows, "time/step_s"), sum(spent.values()))
    if not whole:
        return {}
    shares = {part: seconds / whole for part, seconds in spent.items()}
    return {**shares, "other": 1 - sum(shares.values())}


def percentages(shares: Mapping[str, float]) -> str:
    """``generate 55%, train 40%``, without what is hardly there."""
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= LEAST_SHARE)


def clock(seconds: float) -> str:
    """``3:07`` or ``1:03:07``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def total(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """Sum over the rows that have the number."""
    return sum(value for row in rows if math.isfinite(value := row.get(name, 0.0)))


def series(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """The number in every row that has it."""
    return [row[name] for row in rows if name in row]
