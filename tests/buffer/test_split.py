"""What is trained and what is evaluated never overlap, and the order of training is a function of the seed."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from buffer.dataset import prompt_uid
from buffer.order import PromptOrder
from buffer.split import is_held_out, load_split
from slime.config import DataConfig
from slime.errors import DataError
from slime.types import Prompt


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"{i} + 1 =", "label": str(i + 1)} for i in range(start, start + count)]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(uid=prompt_uid(text=f"{i} + 1 ="), text=f"{i} + 1 =") for i in range(count)]


def test_held_out_prompts_stay_held_out_when_rows_move_or_come(tmp_path: Path) -> None:
    """Pins: a split by position or by a shuffle of all rows, which moves trained problems into the evaluation set."""
    before = load_split(DataConfig(train=write(tmp_path / "a.jsonl", rows(500)), held_out=0.1))
    more = rows(700)
    random.Random(0).shuffle(more)
    after = load_split(DataConfig(train=write(tmp_path / "b.jsonl", more), held_out=0.1))
    assert {prompt.uid for prompt in before.eval} <= {prompt.uid for prompt in after.eval}
    assert not {prompt.uid for prompt in before.train} & {prompt.uid for prompt in after.eval}
    assert [prompt.uid for prompt in after.eval] == sorted(prompt.uid for prompt in after.eval)


def test_the_held_out_share_is_about_what_was_asked() -> None:
    """Pins: a threshold on a part of the hash that is not uniform. 5 standard deviations, with fixed uids."""
    uids = [prompt.uid for prompt in prompts(10_000)]
    for share in (0.01, 0.1, 0.5, 0.9):
        expected, deviation = 10_000 * share, (10_000 * share * (1 - share)) ** 0.5
        assert abs(sum(is_held_out(uid, share=share) for uid in uids) - expected) < 5 * deviation
    assert not any(is_held_out(uid, share=0.0) for uid in uids)


def test_nothing_evaluated_is_trained_under_another_label_or_twice(tmp_path: Path, caplog: Any) -> None:
    """Pins: an evaluation question that is trained on because its training row differs in the label, or comes twice."""
    train = write(tmp_path / "train.jsonl", [*rows(10), *rows(2), {"text": "0 + 1 =", "label": "one"}])
    evaluation = write(tmp_path / "eval.jsonl", [*rows(3), *rows(1)])
    with caplog.at_level(logging.WARNING):
        split = load_split(DataConfig(train=train, eval=evaluation))
    assert [prompt.text for prompt in split.train] == [f"{i} + 1 =" for i in range(3, 10)]
    assert len(split.eval) == 3
    assert (split.num_duplicates, split.num_leaked) == (3, 4)
    assert "3 duplicate rows and 4 training rows" in caplog.text


def test_a_question_with_two_labels_falls_on_one_side(tmp_path: Path) -> None:
    """Pins: the leak by label, in a split by hash."""
    both = [{"text": f"{i} + 1 =", "label": label} for i in range(200) for label in ("a", "b")]
    split = load_split(DataConfig(train=write(tmp_path / "train.jsonl", both), held_out=0.3))
    assert not {prompt.text for prompt in split.train} & {prompt.text for prompt in split.eval}
    assert split.num_leaked > 0
    assert len(split.train) + len(split.eval) + split.num_leaked == 400


def test_a_side_without_prompts_is_refused(tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", rows(3))
    with pytest.raises(DataError, match=r"held out 0 of 3 prompts.*Raise data\.held_out, or give"):
        load_split(DataConfig(train=few, held_out=0.0001))
    with pytest.raises(DataError, match=r"no prompt to train on.*Add prompts, or lower"):
        load_split(DataConfig(train=few, eval=few))


def test_no_evaluation_set_is_fine_when_none_is_asked_for(tmp_path: Path) -> None:
    split = load_split(DataConfig(train=write(tmp_path / "train.jsonl", rows(3))))
    assert (len(split.train), split.eval) == (3, ())


def test_each_epoch_visits_every_prompt_once_in_an_order_of_its_own() -> None:
    """Pins: an order that repeats each epoch, or drops and doubles prompts at the seam of two epochs."""
    order = PromptOrder(prompts(50), seed=3)
    visited = [order.prompt_at(ordinal) for ordinal in range(150)]
    for epoch in range(3):
        part = visited[epoch * 50 : (epoch + 1) * 50]
        assert {number for number, _ in part} == {epoch}
        assert Counter(prompt.uid for _, prompt in part) == Counter(prompt.uid for prompt in prompts(50))
    orders = {tuple(prompt.uid for _, prompt in visited[start : start + 50]) for start in (0, 50, 100)}
    assert len(orders) == 3


def test_the_order_depends_on_the_seed_and_not_on_the_file_or_on_who_asked_before() -> None:
    """Pins: a continued run that visits other prompts than the one that was not stopped."""
    straight = [PromptOrder(prompts(50), seed=3).prompt_at(ordinal) for ordinal in range(150)]
    shuffled = prompts(50)
    random.Random(1).shuffle(shuffled)
    jumping = PromptOrder(shuffled, seed=3)
    asked = list(range(150))
    random.Random(2).shuffle(asked)
    found = {ordinal: jumping.prompt_at(ordinal) for ordinal in asked}
    assert [found[ordinal] for ordinal in range(150)] == straight
    other = PromptOrder(prompts(50), seed=4)
    assert [other.prompt_at(ordinal) for ordinal in range(50)] != straight[:50]


def test_the_order_stays_what_it_is() -> None:
    """Pins: a run that a newer slime or NumPy continues in another order. Splitmix64 by hand, in Python's integers."""

    def mix(value: int) -> int:
        mask = 2**64 - 1
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    seed, epoch = 7, 1
    salt = mix((mix(seed) + epoch) % 2**64)
    expected = sorted(prompts(20), key=lambda prompt: mix(int(prompt.uid, 16) ^ salt))
    order = PromptOrder(prompts(20), seed=seed)
    assert [order.prompt_at(20 + position)[1] for position in range(20)] == expected
    assert mix(0) == 0xE220A8397B1DCDAF, "the first output of the published generator for seed 0"


def test_unshuffled_prompts_come_in_file_order() -> None:
    order = PromptOrder(prompts(3), seed=1, shuffle=False)
    assert [order.prompt_at(ordinal)[1].text for ordinal in range(4)] == ["0 + 1 =", "1 + 1 =", "2 + 1 =", "0 + 1 ="]


def test_the_fingerprint_changes_exactly_when_an_ordinal_may() -> None:
    """Pins: a run continued over other prompts, whose ordinals then name other problems than those recorded."""
    one = PromptOrder(prompts(20), seed=1).fingerprint
    assert PromptOrder(prompts(20)[::-1], seed=1).fingerprint == one
    assert PromptOrder(prompts(21), seed=1).fingerprint != one
    assert PromptOrder(prompts(20), seed=2).fingerprint != one
    in_file_order = PromptOrder(prompts(20), seed=1, shuffle=False).fingerprint
    assert in_file_order != one
    assert PromptOrder(prompts(20)[::-1], seed=1, shuffle=False).fingerprint != in_file_order
    assert PromptOrder(prompts(20), seed=2, shuffle=False).fingerprint == in_file_order


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no prompts to order"):
        PromptOrder([], seed=0)
