"""examples/reasoning: its problems, its model and its reward."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from buffer.prompts.dataset import prompt_uid, read_sft_rows
from buffer.prompts.split import load_split
from rewards import RewardInput
from slime.config import DataConfig
from slime.hooks import load_hook
from slime.types import Score, Status
from tests.examples.loading import EXAMPLES, load

FOLDER = EXAMPLES / "reasoning"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    return load(FOLDER / "prepare.py")


@pytest.fixture(scope="module")
def prepared(prepare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("reasoning")
    prepare.prepare(output, seed=0, num_problems=600, num_examples=2000)
    return output


def test_problems_have_the_answer_that_their_text_has(prepared: Path) -> None:
    """Pins labels of other problems: the run would train on noise, and only look as if the model could not learn."""
    rows = [json.loads(line) for line in (prepared / "data" / "train.jsonl").read_text().splitlines()]
    assert len({row["text"] for row in rows}) == 600
    for row in rows:
        question = row["text"].removesuffix(" =")
        assert eval(question) == int(row["label"])
        assert row["tags"] == [f"{len(question.split()) // 2 + 1} terms"]


def test_no_held_out_problem_is_among_the_worked_examples(prepared: Path) -> None:
    """Pins a leak: held-out pass@1 would measure memory of the warm start."""
    split = load_split(DataConfig(train=prepared / "data" / "train.jsonl", held_out=0.1))
    held_out = {prompt.text for prompt in split.eval}
    assert len(held_out) > 30
    assert all(int(prompt_uid(text=text), 16) < 0.1 * 2**64 for text in held_out)
    shown = {row.prompt.text for row in read_sft_rows(prepared / "data" / "sft.jsonl")}
    assert not shown & held_out
    assert shown <= {prompt.text for prompts in split.train for prompt in prompts}


def test_worked_examples_are_as_their_shares_say(prepare: ModuleType, prepared: Path) -> None:
    """Pins a warm start that thinks too seldom, or whose thoughts are all wrong: GRPO would have nothing to find."""
    rows = [json.loads(line) for line in (prepared / "data" / "sft.jsonl").read_text().splitlines()]
    thoughts = [row for row in rows if row["response"].startswith("think ")]
    assert len(thoughts) / len(rows) == pytest.approx(prepare.THINK_SHARE, abs=0.05)

    def right(row: dict[str, str]) -> bool:
        return eval(row["text"].removesuffix(" =")) == int(row["response"].rpartition("answer ")[2])

    blurted = [row for row in rows if row not in thoughts]
    assert sum(map(right, thoughts)) / len(thoughts) > 0.75
    assert sum(map(right, blurted)) / len(blurted) == pytest.approx(0.5, abs=0.08)


def test_the_tokenizer_gives_one_token_a_word_and_begins_prompts(prepare: ModuleType, prepared: Path) -> None:
    """Pins a prompt without <s> (the policy would start from a distribution that the warm start never saw), <s> inside
    an answer, and words that become <pad>."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared / "model" / "random")
    for row in map(json.loads, (prepared / "data" / "sft.jsonl").read_text().splitlines()[:200]):
        prompt = tokenizer.encode(row["text"])
        response = tokenizer.encode(row["response"], add_special_tokens=False)
        words = ["<s>", *row["text"].split()]
        assert prompt == [prepare.WORDS.index(word) for word in words]
        assert response == [prepare.WORDS.index(word) for word in row["response"].split()]
        ended = [*response, tokenizer.eos_token_id]
        assert tokenizer.decode(ended, skip_special_tokens=True) == row["response"]


def test_a_seed_repeats_its_model_and_data_and_no_other_does(prepare: ModuleType, tmp_path: Path) -> None:
    """Pins a demo that cannot be repeated, and seeds that are all the same experiment."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        prepare.prepare(tmp_path / name, seed=seed, num_problems=50, num_examples=20)
    for file in ("data/train.jsonl", "data/sft.jsonl", "model/random/model.safetensors"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b
        assert a != c


def test_thoughts_go_on_from_what_they_wrote(prepare: ModuleType) -> None:
    """Pins worked examples whose steps do not follow from each other: they would teach not to read them."""
    rng = random.Random(0)
    for _ in range(200):
        problem = prepare.draw(rng)
        first, *steps, last = (step.split() for step in prepare.think(problem, rng=rng).split(" ; "))
        total = str(problem.terms[0])
        for step in (first[1:], *steps):
            assert step[0] == total
            total = step[-1]
        assert last == ["answer", total]


@pytest.mark.parametrize(
    ("response", "status", "value", "think"),
    [
        ("answer 5", "completed", 1, 0),
        ("think 3 + 4 = 7 ; 7 - 2 = 5 ; answer 5", "completed", 1, 1),
        ("think 3 + 4 = 8 ; 8 - 2 = 5 ; answer 5", "completed", 1, 1),
        ("answer 6", "completed", 0, 0),
        ("answer 5", "truncated", 0, 0),
        ("think 3 + 4 = 7 ; 7 - 2 = 5 ;", "truncated", 0, 1),
        ("answer 5 answer 6", "completed", 0, 0),
        ("5", "completed", 0, 0),
        ("answer", "completed", 0, 0),
        ("", "completed", 0, 0),
        ("answer 55", "completed", 0, 0),
    ],
)
def test_only_a_finished_right_answer_is_rewarded(response: str, status: str, value: float, think: float) -> None:
    """Pins lenient rewards that a policy finds: cut answers, several answers, a number without an end."""
    score = load_hook("./reward.py:score", base_dir=FOLDER, what="reward.fn", arguments=("sample",))
    sample = RewardInput(
        response=response,
        label="5",
        messages=(),
        text="3 + 4 - 2 =",
        tags=(),
        metadata={},
        num_response_tokens=3,
        status=Status(status),
    )
    assert score(sample) == Score(value=value, parts={"think": think})
