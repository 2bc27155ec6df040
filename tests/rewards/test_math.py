"""The built-in reward "math", on answers whose equality is plain to a reader, and on hostile ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rewards.math import score
from rewards.pool import RewardPool
from slime.config import RewardConfig
from slime.types import Failed, Prompt, Sample, Score


@pytest.mark.parametrize(
    ("response", "label", "value"),
    [
        ("The answer is 42.", "42", 1),
        ("\\boxed{42}", 42, 1),
        ("#### 18", "18", 1),
        ("\\boxed{1,234}", "1234", 1),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1),
        ("\\boxed{\\frac12}", "\\frac{2}{4}", 1),
        ("The answer is $\\frac{2}{4}$.", "1/2", 1),
        ("\\boxed{0.333333}", "\\frac{1}{3}", 1),
        ("\\boxed{50\\%}", "0.5", 1),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1),
        ("\\boxed{\\frac{\\pi}{2}}", "\\pi/2", 1),
        ("\\boxed{2^{10}}", "1024", 1),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", 1),
        ("\\boxed{5}", "x=5", 1),
        ("so $x = 5$", "5", 1),
        ("\\boxed{\\{2,1\\}}", "\\{1,2\\}", 1),
        ("\\boxed{(1,2)}", "(1,2)", 1),
        ("\\boxed{(2,1)}", "(1,2)", 0),
        ("\\boxed{[1,2)}", "[1,2)", 1),
        ("\\boxed{[1,2]}", "[1,2)", 0),
        ("\\boxed{x \\le 3}", "x \\leq 3", 1),
        ("\\boxed{3+4i}", "3+4i", 1),
        ("\\boxed{\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", 1),
        ("\\boxed{12\\text{ cm}}", "12", 1),
        ("\\boxed{\\text{B}}", "B", 1),
        ("\\boxed{41}", "42", 0),
        ("\\boxed{-42}", "42", 0),
        ("\\boxed{0.33}", "\\frac{1}{3}", 0),
        ("\\boxed{1/0}", "5", 0),
        ("I do not know.", "42", 0),
        ("", "42", 0),
        ("\\boxed{42", "41", 0),
        ("<think>\\boxed{42}</think> \\boxed{41}", "42", 0),
        ("\\boxed{1} or \\boxed{2}", "2", 0),
        ("\\boxed{1}" + " no, that was wrong" * 10 + " \\boxed{2}", "2", 1),
    ],
)
def test_answers_are_compared_as_mathematics(response: str, label: str | int, value: int) -> None:
    """Pins: equal forms marked wrong, and different values right."""
    assert score(response, label) == value


@pytest.mark.parametrize("label", ["", "   ", None, True, ["7"], "$$"])
def test_a_label_that_is_no_mathematics_raises(label: Any) -> None:
    """Pins: every answer marked wrong because the label cannot be parsed."""
    with pytest.raises(ValueError, match="no mathematics"):
        score("\\boxed{1}", label)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # sympy's, about sums like 1 + ()
@pytest.mark.parametrize(
    "form",
    ["{}", "${}$", "\\boxed{{{}}}", "$\\text{{{}}}$", "answer: {}", "1 + {}", "\\({}\\)", "$f = {}$", "$\\sqrt{{{}}}$"],
)
def test_no_answer_is_executed(form: str, tmp_path: Path) -> None:
    """Pins: a policy that learns to run Python through the parser."""
    target = tmp_path / "executed"
    for code in (f"__import__('os').mkdir('{target}')", f"().__class__.__base__ or open('{target}','w')"):
        assert score(form.format(code), "3") == 0.0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "response",
    ["\\boxed{" * 10_000, "\\(" * 20_000, "1 " * 50_000, "\\frac{1}{" * 5000, "(" * 30_000 + "1" + ")" * 30_000],
)
def test_long_hostile_answers_are_judged_by_their_end(response: str) -> None:
    """Pins: a time-out for every long answer: without the cut, one of these takes minutes."""
    assert score(response, "3") == 0.0


async def test_an_answer_that_takes_for_ever_costs_its_own_sample() -> None:
    """Pins: a time-out turned into a wrong answer, which the library's own alarms do."""
    config = RewardConfig(fn="math", timeout_s=3.0, num_workers=1)
    answers = ["\\boxed{7}", "\\boxed{9^{9^{9^{9}}} + 0.1}", "\\boxed{7}"]
    samples = [Sample(prompt_uid="p", index=i, rollout_id=str(i), response=text) for i, text in enumerate(answers)]
    async with RewardPool(config, base_dir=Path(__file__).parent) as pool:
        first, endless, last = await pool.grade(samples, Prompt(uid="p", label="7"))
    assert (first, last) == (Score(value=1.0), Score(value=1.0))
    assert isinstance(endless, Failed)
    assert endless.kind == "timeout"
