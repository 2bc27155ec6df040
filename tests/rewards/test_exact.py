"""The built-in reward "exact"."""

from __future__ import annotations

from typing import Any

import pytest

from rewards.exact import score


@pytest.mark.parametrize(
    ("response", "label", "value"),
    [
        # where the answer stands
        ("7", "7", 1),
        ("think 3 + 4 = 7 ; answer 7", "7", 1),
        ("Answer: 7", "7", 1),
        ("The answer is 7.", "7", 1),
        ("the final answer is: **7**", "7", 1),
        ("answer 6\nno, answer 7", "7", 1),
        ("Answer: 7\nI hope this helps.", "7", 1),
        ("3 + 4 = 7\n#### 7", "7", 1),
        ("so \\boxed{7}.", "7", 1),
        ("\\boxed{6}, or rather \\boxed{7}", "7", 1),
        ("\\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}", 1),
        ("\\boxed{7", "7", 1),
        ("<answer> 7 </answer> as I said", "7", 1),
        ("<think>answer 6, \\boxed{6}</think>7", "7", 1),
        ("answer 6 </think> answer 7", "7", 1),
        ("7 is what I get", "7", 0),
        ("answer 7 or 8", "7", 0),
        ("the unanswered 7", "7", 0),
        ("", "7", 0),
        ("\\boxed{}", "7", 0),
        # text
        ("answer:  New \n", "New", 1),
        ("answer: New   York", "New York", 1),
        ("answer: new york", "New York", 0),
        ("answer: $x+1$", "x+1", 1),
        # numbers
        ("1,000", "1000", 1),
        ("1000.0", "1,000", 1),
        (".50", "0.5", 1),
        ("+7", 7, 1),
        ("-7", "7", 0),
        ("07", "7", 1),
        ("0.1", 0.1, 1),
        ("0.30000000000000004", "0.3", 0),
        ("1,00", "100", 0),
        ("7e0", "7", 0),
        ("٧", "7", 0),
        ("9" * 5000, "9" * 5000, 1),
        ("0" * 200 + "7", "7", 0),
        ("1/2", "0.5", 0),
        # several labels
        ("answer: B", ["A", "B"], 1),
        ("answer: C", ["A", "B"], 0),
        ("answer: 2", ("1", 2), 1),
    ],
)
def test_answers_are_found_and_compared_as_documented(response: str, label: Any, value: int) -> None:
    """Pins: right answers marked wrong, or wrong ones right, by a rule that the page does not tell."""
    assert score(response, label) == value


@pytest.mark.parametrize("label", [None, "", "  ", [], {"a": 1}, True, ["7", None], [""]])
def test_a_label_that_cannot_be_compared_raises(label: Any) -> None:
    """Pins: every answer marked wrong, or an empty answer right, because the data has no label."""
    with pytest.raises(ValueError, match="neither text nor a number"):
        score("8", label)
