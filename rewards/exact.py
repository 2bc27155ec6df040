"""Built-in reward "exact": 1.0 if the response's final answer equals the label, else 0.0.

The final answer is, after a leading ``...</think>`` is cut off, the first of these that is there:

1. what stands in the last ``\\boxed{...}``;
2. what stands in the last ``<answer>...</answer>``;
3. what follows the last "answer" ("answer:", "Answer is", "answer =") or GSM8K's "####", up to the end of the line;
4. the whole response.

Both sides lose outer white space, ``$``, ``*`` and a final full stop, and inner white space becomes one space; letters
keep their case. Two plain decimal numbers are compared as numbers, exactly: ``1,000`` = ``1000.0``, ``0.5`` = ``.50``.
A label is text, a number, or a list of them of which one has to match.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

BOX = "\\boxed{"
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
MARKED = re.compile(r"(?:\banswer(?:\s+is)?\s*[:=]?|####)[ \t]*([^\n]*)", re.IGNORECASE)
NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?", re.ASCII)
MAX_NUMBER_LENGTH = 100


def score(response: str, label: Any) -> float:
    """1.0 or 0.0.

    Raises:
        ValueError: the label is missing, empty or neither text nor number.
    """
    answer = final_answer(response)
    return float(any(is_same(answer, wanted) for wanted in _labels(label)))


def final_answer(response: str) -> str:
    """The part of a response that is compared; see the module's text."""
    text = response.rpartition("</think>")[2]
    if BOX in text:
        return _braced(text.rpartition(BOX)[2])
    for pattern in (TAGGED, MARKED):
        if found := pattern.findall(text):
            return str(found[-1])
    return text


def is_same(answer: str, wanted: str) -> bool:
    """Whether both are the same text or the same number, once normalised."""
    left, right = _normal(answer), _normal(wanted)
    numbers = _number(left), _number(right)
    return left == right if None in numbers else numbers[0] == numbers[1]


def _braced(text: str) -> str:
    """Up to the brace that closes the one before `text`; all of it if none does."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return text


def _normal(text: str) -> str:
    return " ".join(text.split()).strip("$* ").removesuffix(".").strip("$* ")


def _number(text: str) -> Decimal | None:
    is_number = len(text) <= MAX_NUMBER_LENGTH and NUMBER.fullmatch(text) and text[-1:].isdigit()
    return Decimal(text.replace(",", "")) if is_number else None


def _labels(label: Any) -> Iterator[str]:
    for one in label if isinstance(label, list | tuple) and label else [label]:
        if isinstance(one, bool) or not isinstance(one, str | int | float) or not str(one).strip():
            raise ValueError(f'the label {one!r} is neither text nor a number: "exact" has nothing to compare with')
        yield str(one)
