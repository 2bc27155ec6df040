"""Bad input is found before anything heavy starts: a clear message, exit status 1, and nothing written."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from slime.cli import main
from tests.integration.task import make_task

Change = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("good")).parent


@pytest.fixture
def task(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "task"))


def remove_data(task: Path) -> list[str]:
    (task / "data.jsonl").unlink()
    return ["data.jsonl", "no such file"]


def break_a_line(task: Path) -> list[str]:
    with (task / "data.jsonl").open("a") as file:
        file.write('{"text": "1 + 1 =", "label": }\n')
    return ["data.jsonl, line 14, column 30"]


def drop_a_label(task: Path) -> list[str]:
    with (task / "data.jsonl").open("a") as file:
        file.write('{"text": "1 + 1 + 1 ="}\n')
    return ["data.jsonl, line 14", "label", "require_label"]


def repeat_an_id(task: Path) -> list[str]:
    rows = [{"text": f"{i} =", "label": "1", "id": "same"} for i in range(2)]
    (task / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data.jsonl, line 2", "same"]


def remove_weights(task: Path) -> list[str]:
    (task / "model/model.safetensors").unlink()
    return [str(task / "model"), "safetensors"]


def unknown_family(task: Path) -> list[str]:
    path = task / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    return ["mamba", "llama", "qwen3"]


def no_model_but_a_script(task: Path) -> list[str]:
    shutil.rmtree(task / "model")
    (task / "prepare.py").write_text("")
    return [str(task / "model"), "prepare.py"]


def misspelt_reward(task: Path) -> list[str]:
    (task / "reward.py").write_text("def scores(sample):\n    return 1.0\n")
    return ["reward.py", "score", "scores"]


def reward_wants_more(task: Path) -> list[str]:
    (task / "reward.py").write_text("def score(sample, tokenizer):\n    return 1.0\n")
    return ["tokenizer"]


def reward_does_not_import(task: Path) -> list[str]:
    (task / "reward.py").write_text("import nonsense_module\n\ndef score(sample):\n    return 1.0\n")
    return ["nonsense_module", "reward.py"]


def unknown_engine_option(task: Path) -> list[str]:
    text = (task / "profile.toml").read_text()
    (task / "profile.toml").write_text(text.replace("max_total_tokens", "max_total_tokenz"))
    return ["max_total_tokenz", "max_total_tokens"]


def misspelt_filter(task: Path) -> list[str]:
    with (task / "run.toml").open("a") as file:
        file.write('[buffer]\nfilter = ["all", "not_trunkated"]\n')
    return ['buffer.filter = "not_trunkated"', "Did you mean not_truncated?"]


MISTAKES: list[Change] = [
    remove_data,
    break_a_line,
    drop_a_label,
    repeat_an_id,
    remove_weights,
    unknown_family,
    no_model_but_a_script,
    misspelt_reward,
    reward_wants_more,
    reward_does_not_import,
    unknown_engine_option,
    misspelt_filter,
]


@pytest.mark.parametrize("change", MISTAKES, ids=lambda change: change.__name__)
def test_bad_input_is_refused_before_anything_starts(task: Path, change: Change) -> None:
    """An hour of start-up on a cluster, and then a typo: the message must come at once and say what to do."""
    expected = change(task)
    output = start(task)
    for text in expected:
        assert text in output
    assert not (task / "run").exists()


@pytest.mark.parametrize(
    ("key", "named"), [("profile.engine.base_port", "base_port"), ("profile.buffer_port", "listen")]
)
def test_a_port_that_is_taken_is_named(task: Path, key: str, named: str) -> None:
    """Otherwise the run fails a minute later, the engine with somebody else's message."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        output = start(task, f"{key}={port}")
    assert f"port {port}" in output
    assert named in output


def test_a_run_is_not_continued_with_another_configuration(task: Path) -> None:
    """Half a run with one learning rate and half with another is neither."""
    run_dir = task / "run"
    run_dir.mkdir()
    remove_data(task)
    start(task)
    from slime.config import RunConfig
    from slime.config_file import load_config

    config = load_config(task / "run.toml", RunConfig, profile="cpu", assignments=[f"run_dir={run_dir}"])
    (run_dir / "config.json").write_text(config.model_dump_json())
    output = start(task, "trainer.optimizer.lr=0.5", "num_steps=9")
    assert "trainer.optimizer.lr: 0.001 -> 0.5" in output
    assert "num_steps" not in output, "more steps are the same run"


def start(task: Path, *assignments: str) -> str:
    words = [word for option in (f"run_dir={task / 'run'}", *assignments) for word in ("--set", option)]
    result = CliRunner().invoke(
        main, ["train", str(task / "run.toml"), "--profile", str(task / "profile.toml"), *words]
    )
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


def test_a_run_directory_that_cannot_be_one_is_named(task: Path) -> None:
    """A traceback out of pathlib does not say which key to change."""
    (task / "run").write_text("a file")
    output = start(task)
    assert "run_dir" in output
    assert str(task / "run") in output
