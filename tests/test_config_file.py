"""The configuration: every mistake is found before anything starts, and the message says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.config import RunConfig
from slime.config_file import load_config, machine_profile, shipped_profiles
from slime.errors import ConfigError

TASK = """\
run_dir = "runs/x"

[model]
path = "model"

[data]
train = "data/train.jsonl"

[reward]
fn = "exact"

[rollout]
prompts_per_step = 4
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TASK)
    return path


def test_paths_are_relative_to_the_run_file_and_the_run_directory_is_not(task: Path) -> None:
    """A run started from elsewhere would otherwise read another model."""
    config = load_config(task, RunConfig, profile="cpu")
    assert config.model.path == task.parent / "model"
    assert config.data.train[0].path == task.parent / "data/train.jsonl"
    assert config.run_dir == Path("runs/x")


def test_assignments_override_the_file_and_the_profile_and_take_bare_words(task: Path) -> None:
    """An override that is silently lost trains something else."""
    assignments = ["rollout.prompts_per_step=8", "run_dir=runs/other", "profile.engine.num_engines=2"]
    config = load_config(task, RunConfig, profile="cpu", assignments=assignments)
    assert config.rollout.prompts_per_step == 8
    assert config.run_dir == Path("runs/other")
    assert config.profile.engine.num_engines == 2
    assert config.profile.engine.sglang, "the rest of the profile is kept"


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_shipped_profile_is_valid(task: Path, name: str) -> None:
    """A profile nobody loads in a test breaks on the machine it is for."""
    assert load_config(task, RunConfig, profile=name).profile.device in ("cpu", "cuda")


def test_the_machine_chooses_a_shipped_profile() -> None:
    """The default must exist."""
    assert machine_profile() in shipped_profiles()


MISTAKES = [
    ("temprature = 2", ["run.toml:14", "unknown key rollout.temprature", "Did you mean temperature?"]),
    ("temperature = 0", ["run.toml:14", "rollout.temperature = 0", "greater than 0", "--set"]),
    ('max_response_tokens = "many"', ["rollout.max_response_tokens = 'many'", "integer"]),
    ("[rolout]\nx = 1", ["unknown key rolout", "Did you mean rollout?"]),
    ("[profile]\ndevice = 'cpu'", ["[profile] does not belong in a run file", "--profile"]),
    ("[trainer]\nupdates_per_step = 9", ["updates_per_step = 9", "prompts_per_step = 4"]),
    ("[trainer.loss]\nclip_low = 2", ["trainer.loss.clip_low = 2", "less than 1"]),
    ("x = [", ["not valid TOML"]),
]


@pytest.mark.parametrize(("line", "expected"), MISTAKES)
def test_a_mistake_in_the_file_names_file_key_value_and_a_way_out(task: Path, line: str, expected: list[str]) -> None:
    """A typo that is accepted trains with the default instead."""
    task.write_text(TASK + line + "\n")
    with pytest.raises(ConfigError) as error:
        load_config(task, RunConfig, profile="cpu")
    for text in expected:
        assert text in str(error.value)


def test_a_missing_key_is_named(task: Path) -> None:
    """The user learns which key, not which pydantic rule."""
    task.write_text(TASK.replace('fn = "exact"', ""))
    with pytest.raises(ConfigError, match=r"reward\.fn is missing"):
        load_config(task, RunConfig, profile="cpu")


def test_a_missing_file_names_its_neighbours(task: Path) -> None:
    """Most missing files are typos."""
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load_config(task.with_name("rum.toml"), RunConfig, profile="cpu")


@pytest.mark.parametrize("assignment", ["num_steps", "=3", "a b=3"])
def test_an_assignment_that_is_none_is_explained(task: Path, assignment: str) -> None:
    """`--set num_steps 5` must not be taken for something else."""
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        load_config(task, RunConfig, profile="cpu", assignments=[assignment])


def test_a_mistake_in_an_assignment_is_blamed_on_the_assignment(task: Path) -> None:
    """Blaming the file would send the user to the wrong place."""
    with pytest.raises(ConfigError, match=r"--set rollout\.temperature=-1: rollout\.temperature = -1"):
        load_config(task, RunConfig, profile="cpu", assignments=["rollout.temperature=-1"])


def test_an_unknown_profile_lists_the_known_ones(task: Path) -> None:
    """`--profile gpu` is an easy guess."""
    with pytest.raises(ConfigError, match="1gpu, 8gpu, cpu"):
        load_config(task, RunConfig, profile="gpu")


def test_prompts_come_from_one_file_or_from_weighted_ones(task: Path) -> None:
    """Pins: paths in the tables of a list that are not taken relative to the run file, or weights that are lost."""
    text = task.read_text()
    (one,) = load_config(task, RunConfig, profile="cpu").data.train
    assert (one.path, one.weight, one.tags) == (task.parent / "data/train.jsonl", 1.0, ())
    tables = '[[data.train]]\npath = "a.jsonl"\n[[data.train]]\npath = "b.parquet"\nweight = 3\ntags = ["hard"]\n'
    task.write_text(text.replace('train = "data/train.jsonl"\n', tables))
    first, second = load_config(task, RunConfig, profile="cpu").data.train
    assert (first.path, second.path, second.weight) == (task.parent / "a.jsonl", task.parent / "b.parquet", 3.0)
    assert second.tags == ("hard",)


@pytest.mark.parametrize(
    ("line", "number", "expected"),
    [
        ("wieght = 2", 11, "unknown key data.train.1.wieght (value 2).\nDid you mean weight?"),
        ("weight = 0", 11, "data.train.1.weight = 0: input should be greater than 0"),
        ("weight = 0.0001", 6, "b.jsonl has the weight 0.0001 of 1.0001 in all, and shares below 1/1024"),
    ],
)
def test_a_mistake_in_a_source_is_named(task: Path, line: str, number: int, expected: str) -> None:
    """Pins: a traceback, or a message without the place, for what stands in a list of tables."""
    tables = f'[[data.train]]\npath = "a.jsonl"\n[[data.train]]\npath = "b.jsonl"\n{line}\n'
    task.write_text(task.read_text().replace('train = "data/train.jsonl"\n', tables))
    with pytest.raises(ConfigError) as refused:
        load_config(task, RunConfig, profile="cpu")
    assert expected in str(refused.value)
    assert f"{task}:{number}" in str(refused.value)
