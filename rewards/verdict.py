"""From what a reward function returned to a verdict, and verdicts as JSON. Nothing that went wrong becomes a number."""

from __future__ import annotations

import numbers
import reprlib
from typing import Any

import numpy as np

from slime.types import Abstain, Failed, Score, Verdict

LARGEST_REWARD = 1e9
"""A larger magnitude is a mistake, and its variance would overflow the trainer's float32."""
ADVICE = "return a finite number, a bool, Score(value=...) or Abstain(reason=...)"


def to_verdict(value: Any) -> Verdict:
    """The verdict that a returned value means.

    A real number (numpy's too) or a bool is a Score; Score, Abstain and Failed stand as they are, once checked.
    Everything else, None, text, NaN and infinity first of all, is ``Failed(kind="bad_value")``.
    """
    try:
        if isinstance(value, Score):
            return Score(value=_number(value.value), parts=_parts(value.parts))
        if isinstance(value, Abstain):
            return Abstain(reason=str(value.reason))
        if isinstance(value, Failed):
            return Failed(kind=str(value.kind), detail=str(value.detail), retryable=bool(value.retryable))
        return Score(value=_number(value))
    except OverflowError:
        return Failed(kind="bad_value", detail=f"got a number too large for a float; {ADVICE}")
    except (TypeError, ValueError) as problem:
        return Failed(kind="bad_value", detail=f"got {problem}; {ADVICE}")


def _number(value: Any) -> float:
    if isinstance(value, bool | np.bool_):
        return float(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{_shown(value)} of type {type(value).__name__}")
    number = float(value)
    if not abs(number) <= LARGEST_REWARD:  # so that NaN does not pass
        raise ValueError(f"{_shown(value)}, which is not finite or larger than {LARGEST_REWARD:g}")
    return number


def _parts(parts: Any) -> dict[str, float]:
    if not hasattr(parts, "items"):
        raise TypeError(f"Score.parts = {_shown(parts)}, which is no dict of numbers")
    return {str(name): _number(value) for name, value in parts.items()}


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except Exception:  # a repr of the user's; that it fails must not cost the worker
        return "a value"


def encode_verdict(verdict: Verdict) -> dict[str, Any]:
    """Plain values for JSON."""
    match verdict:
        case Score(value=value, parts=parts):
            return {"score": value, "parts": dict(parts)}
        case Abstain(reason=reason):
            return {"abstain": reason}
        case Failed(kind=kind, detail=detail, retryable=retryable):
            return {"failed": kind, "detail": detail, "retryable": retryable}


def decode_verdict(body: dict[str, Any]) -> Verdict:
    """The inverse of `encode_verdict`."""
    match body:
        case {"score": value, "parts": parts}:
            return Score(value=value, parts=parts)
        case {"abstain": reason}:
            return Abstain(reason=reason)
        case {"failed": kind, "detail": detail, "retryable": retryable}:
            return Failed(kind=kind, detail=detail, retryable=retryable)
    raise ValueError(f"no verdict: {body!r}")
