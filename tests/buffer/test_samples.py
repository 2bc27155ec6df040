"""Sample files: whole, readable without us, and harmless on a terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from buffer.samples import iter_samples, write_samples, written_steps
from slime.errors import DataError
from slime.types import Abstain, Failed, Group, Prompt, Score, Status
from tests.builders import make_group, make_sample


def test_a_sample_is_written_with_everything_its_gradient_saw(tmp_path: Path) -> None:
    """Pins: a record from which a suspicious step cannot be explained. Read with nothing but the json module."""
    prompt = Prompt(uid="u", messages=({"role": "user", "content": "1 + 2 = ?"},), label="3", tags=("sum",))
    sample = make_sample(prompt_uid="u", index=1, version=4, temperature=0.7, logprobs=[-0.5, -0.25])
    sample.verdict = Score(value=0.5, parts={"think": 1.0})
    sample.metadata["note"] = "n"
    group = Group(prompt=prompt, ordinal=9, epoch=2, attempt=1, samples=[sample])
    path = write_samples(tmp_path, [group], step=12)
    assert path == tmp_path / "rollouts" / "step_000012.jsonl"
    assert json.loads(path.read_text()) == {
        "step": 12,
        "ordinal": 9,
        "epoch": 2,
        "attempt": 1,
        "prompt_uid": "u",
        "index": 1,
        "rollout_id": "u/1",
        "prompt": [{"role": "user", "content": "1 + 2 = ?"}],
        "label": "3",
        "tags": ["sum"],
        "response": "r",
        "status": "completed",
        "reward": 0.5,
        "verdict": {"is": "score", "value": 0.5, "parts": {"think": 1.0}},
        "temperature": 0.7,
        "versions": [{"start": 3, "end": 5, "version": 4}],
        "tokens": [5, 6, 7, 8, 9],
        "loss_mask": [0, 0, 0, 1, 1],
        "logprobs": [0.0, 0.0, 0.0, -0.5, -0.25],
        "metadata": {"note": "n"},
    }


def test_no_verdict_looks_like_a_reward(tmp_path: Path) -> None:
    """Pins: a failed reward that is read back as 0."""
    group = make_group([1.0, 1.0, 1.0, 0.0])
    group.samples[0].verdict = Failed(kind="timeout", detail="10 s")
    group.samples[1].verdict = Abstain(reason="no rule fits")
    group.samples[2].verdict = None
    group.samples[3].status = Status.TRUNCATED
    write_samples(tmp_path, [group], step=0)
    records = list(iter_samples(tmp_path, step=0))
    assert [record["reward"] for record in records] == [None, None, None, 0.0]
    assert [record["verdict"] for record in records] == [
        {"is": "failed", "kind": "timeout", "detail": "10 s", "retryable": False},
        {"is": "abstain", "reason": "no rule fits"},
        None,
        {"is": "score", "value": 0.0, "parts": {}},
    ]
    assert records[3]["status"] == "truncated"


@pytest.mark.parametrize(
    "text",
    [
        "plain \x1b[2J\x1b]0;title\x07 \x00 \r \x7f",
        "C1: \x9b2J \x90 \x80 \x9f",
        "neighbours that stay: \xa0 é \u0100 Â \u2028",
        "half a pair: \ud800",
        "half a pair and C1: \udc80 \x9b",
        '"quoted" \\ back',
    ],
)
def test_any_response_comes_back_and_none_commands_the_terminal(tmp_path: Path, text: str) -> None:
    """Pins: escape sequences that model output runs in the terminal of whoever looks at the file."""
    group = make_group([1.0])
    group.samples[0].response = text
    content = write_samples(tmp_path, [group], step=0).read_bytes()
    assert content.count(b"\n") == 1
    controls = {chr(c) for c in (*range(32), *range(0x7F, 0xA0))} - {"\n"}
    assert not controls & set(content.decode("utf-8"))
    assert next(iter_samples(tmp_path, step=0))["response"] == text


def test_what_json_does_not_have_is_written_all_the_same(tmp_path: Path) -> None:
    """Pins: a step that fails after it was trained because of one odd value in a sample's metadata."""
    group = make_group([1.0])
    group.samples[0].metadata.update({"path": Path("a/b"), "huge": 2**80, 3: {1, 2}})
    group.samples[0].rollout_logprobs[-1] = math.nan
    write_samples(tmp_path, [group], step=0)
    (record,) = iter_samples(tmp_path, step=0)
    assert record["metadata"]["path"] == "PosixPath('a/b')" or record["metadata"]["path"] == "a/b"
    assert record["metadata"]["huge"] == 2**80
    assert record["metadata"]["3"] == "{1, 2}"


def test_a_step_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Pins: the two tries of a step that was interrupted, mixed in one file; or a torn one under the final name."""
    write_samples(tmp_path, [make_group([1.0, 0.0]), make_group([1.0, 0.0])], step=3)
    write_samples(tmp_path, [make_group([0.5])], step=3)
    assert [record["reward"] for record in iter_samples(tmp_path, step=3)] == [0.5]
    broken = make_group([1.0, 1.0])
    broken.samples[1].verdict = object()  # type: ignore[assignment]
    with pytest.raises(TypeError):
        write_samples(tmp_path, [broken], step=3)
    assert [record["reward"] for record in iter_samples(tmp_path, step=3)] == [0.5]
    assert written_steps(tmp_path) == [3]


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no samples of step 2\. There are no steps yet"):
        list(iter_samples(tmp_path, step=2))
    for step in (1, 5):
        write_samples(tmp_path, [make_group()], step=step)
    with pytest.raises(DataError, match=r"There are steps 1 to 5 \(2 in all\)"):
        list(iter_samples(tmp_path, step=2))
