"""What is trained and what is evaluated never overlap, whatever happens to the files."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.prompts.dataset import prompt_uid
from buffer.prompts.split import Split, load_split
from slime.config import DataConfig
from slime.errors import DataError
from slime.types import Prompt


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"{i} + 1 =", "label": str(i + 1)} for i in range(start, start + count)]


def trained(split: Split) -> list[Prompt]:
    return [prompt for prompts in split.train for prompt in prompts]


def question(prompt: Prompt) -> int:
    """What decides, written down a second time."""
    return int(prompt_uid(text=prompt.text), 16)


@settings(max_examples=25, deadline=None)
@given(random=st.randoms(use_true_random=False), share=st.floats(0.05, 0.9), num_more=st.integers(0, 100))
def test_held_out_prompts_stay_held_out_when_rows_move_or_come(
    tmp_path_factory: pytest.TempPathFactory, random: random.Random, share: float, num_more: int
) -> None:
    """Pins: a split by position or by a shuffle of all rows, which moves trained problems into the evaluation set."""
    folder = tmp_path_factory.mktemp("moved")
    before = load_split(DataConfig(train=write(folder / "a.jsonl", rows(100)), held_out=share))
    more = rows(100 + num_more)
    random.shuffle(more)
    after = load_split(DataConfig(train=write(folder / "b.jsonl", more), held_out=share))
    assert {prompt.uid for prompt in before.eval} <= {prompt.uid for prompt in after.eval}
    assert {prompt.uid for prompt in trained(before)} <= {prompt.uid for prompt in trained(after)}
    assert len(trained(after)) + len(after.eval) == len(more)
    assert [question(prompt) for prompt in after.eval] == sorted(question(prompt) for prompt in after.eval)
    assert all(question(prompt) < share * 2**64 for prompt in after.eval)
    assert all(question(prompt) >= share * 2**64 for prompt in trained(after))


def test_the_held_out_share_is_about_what_was_asked(tmp_path: Path) -> None:
    """Pins: a threshold on a part of the hash that is not uniform. 5 standard deviations, with fixed questions."""
    path = write(tmp_path / "train.jsonl", rows(10_000))
    for share in (0.01, 0.1, 0.5, 0.9):
        expected, deviation = 10_000 * share, (10_000 * share * (1 - share)) ** 0.5
        split = load_split(DataConfig(train=path, held_out=share), num_eval=1)
        assert abs(10_000 - len(split.train[0]) - expected) < 5 * deviation


def test_only_as_many_prompts_are_read_for_evaluation_as_are_asked_for(tmp_path: Path) -> None:
    """Pins: a tenth of ten million rows in memory, of which 128 are evaluated; and ones that change with the number."""
    path = write(tmp_path / "train.jsonl", rows(300))
    every = load_split(DataConfig(train=path, held_out=0.5))
    first = load_split(DataConfig(train=path, held_out=0.5), num_eval=7)
    assert first.eval == every.eval[:7]
    assert load_split(DataConfig(train=path, held_out=0.5), num_eval=0).eval == ()
    assert len(first.train[0]) == len(every.train[0]) == 300 - len(every.eval)


def test_nothing_evaluated_is_trained_under_another_label_or_twice(tmp_path: Path, caplog: Any) -> None:
    """Pins: an evaluation question that is trained on because its training row differs in the label, or comes twice."""
    train = write(tmp_path / "train.jsonl", [*rows(10), *rows(2), {"text": "0 + 1 =", "label": "one"}])
    evaluation = write(tmp_path / "eval.jsonl", [*rows(3), *rows(1)])
    for shuffle in (True, False):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            split = load_split(DataConfig(train=train, eval=evaluation, shuffle=shuffle), num_eval=2)
        texts = [prompt.text for prompt in trained(split)]
        assert (sorted(texts) if shuffle else texts) == [f"{i} + 1 =" for i in range(3, 10)]
        assert len(split.eval) == 2
        assert (split.num_duplicates, split.num_leaked) == (3, 4)
        assert "3 duplicate rows and 4 training rows" in caplog.text


def test_a_question_with_two_labels_falls_on_one_side(tmp_path: Path) -> None:
    """Pins: the leak by label, in a split by hash, within a file and between two."""
    one, two = (
        [{"text": f"{i} + 1 =", "label": label} for i in range(200) for label in labels] for labels in ("ab", "c")
    )
    sources = [{"path": write(tmp_path / "1.jsonl", one)}, {"path": write(tmp_path / "2.jsonl", two)}]
    split = load_split(DataConfig(train=sources, held_out=0.3))
    assert not {prompt.text for prompt in trained(split)} & {prompt.text for prompt in split.eval}
    assert len(trained(split)) + len(split.eval) == 600


def test_a_prompt_that_two_sources_share_is_evaluated_once(tmp_path: Path) -> None:
    """Pins: a held-out set in which the prompts of one source count double; trained, they may, by their weights."""
    sources = [{"path": write(tmp_path / name, rows(count))} for name, count in (("1.jsonl", 100), ("2.jsonl", 150))]
    split = load_split(DataConfig(train=sources, held_out=0.3))
    alone = load_split(DataConfig(train=sources[1:], held_out=0.3))
    assert split.eval == alone.eval
    assert trained(split)[-len(trained(alone)) :] == trained(alone)


def test_a_source_adds_its_tags(tmp_path: Path) -> None:
    """Pins: tags that are lost, or that stand twice where a row has them already."""
    tagged = [row | {"tags": ["sum", "easy"]} for row in rows(1)]
    source = {"path": write(tmp_path / "train.jsonl", tagged), "tags": ["easy", "first"]}
    (prompt,) = trained(load_split(DataConfig(train=[source])))
    assert prompt.tags == ("sum", "easy", "first")


def test_unshuffled_prompts_come_in_file_order_without_those_held_out(tmp_path: Path) -> None:
    """Pins: a curriculum that is written as a file and trained in the order of hashes."""
    path = write(tmp_path / "train.jsonl", rows(200))
    split = load_split(DataConfig(train=path, held_out=0.3, shuffle=False))
    evaluated = {prompt.text for prompt in split.eval}
    assert [prompt.text for prompt in trained(split)] == [
        row["text"] for row in rows(200) if row["text"] not in evaluated
    ]


def test_a_side_without_prompts_is_refused(tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", rows(3))
    with pytest.raises(DataError, match=r"held out 0 of 3 prompts.*Raise data\.held_out, or give"):
        load_split(DataConfig(train=few, held_out=0.0001))
    for train in (few, [{"path": write(tmp_path / "more.jsonl", rows(5))}, {"path": few}]):
        with pytest.raises(DataError, match=r"few\.jsonl: got no prompt to train on.*Add prompts, or lower"):
            load_split(DataConfig(train=train, eval=few))


def test_no_evaluation_set_is_fine_when_none_is_asked_for(tmp_path: Path) -> None:
    split = load_split(DataConfig(train=write(tmp_path / "train.jsonl", rows(3))))
    assert (len(trained(split)), split.eval) == (3, ())
