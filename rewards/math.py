"""Built-in reward "math": 1.0 if the response's answer is mathematically equal to the label, else 0.0.

math-verify extracts and compares: numbers, fractions, roots, sets, intervals, tuples, matrices, equations; in LaTeX in
``\\boxed{}`` or ``$...$``, or a plain number. Only the end of the response, after the last ``</think>``, is read. The
last box counts, but boxes less than 70 characters apart are one answer of several parts: ``\\boxed{1}, \\boxed{2}`` is
not 2. A response without an answer that parses is 0.0; a label that does not parse is a mistake in the data and raises.

The parser builds sympy expressions from a grammar. Where it falls back to Python's own (plain arithmetic), the text has
been matched to digits and operators, so nothing that a model wrote is executed. It can still cost any time
(``9^{9^9}``): the library's own alarms are off, because they cannot interrupt C code and they turn time-outs into wrong
answers; the pool's `timeout_s` kills and says so.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import math_verify

MAX_CHARACTERS = 4000
"""The final answer stands at the end, and hostile text costs quadratic time: 16 000 characters of ``\\(`` take 19 s."""
ENVIRONMENTS = ("$", "\\(", "\\[", "\\boxed")

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every start that its alarms are off


def score(response: str, label: Any) -> float:
    """1.0 or 0.0.

    Raises:
        ValueError: the label is missing, or holds nothing that math-verify can parse.
    """
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ValueError(f"the label {label!r} is no mathematics: it has to be text or a number")
    wanted = _parsed_label(str(label))
    text = response.rpartition("</think>")[2][-MAX_CHARACTERS:]
    answer = math_verify.parse(text, parsing_timeout=None)
    return float(math_verify.verify(wanted, answer, timeout_seconds=None))


@functools.lru_cache(maxsize=1024)  # a group's samples share their label
def _parsed_label(label: str) -> list[Any]:
    text = label if any(mark in label for mark in ENVIRONMENTS) else f"\\boxed{{{label}}}"
    parsed: list[Any] = math_verify.parse(text, parsing_timeout=None)
    if not parsed:
        raise ValueError(f'the label {label!r} is no mathematics that "math" can compare with; use "exact" for text')
    return parsed
