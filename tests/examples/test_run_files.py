"""Every TOML file of an example is one that slime accepts."""

import tomllib
from pathlib import Path

import pytest

from slime.config import RunConfig, SftRunConfig
from slime.config_file import load_config
from tests.examples.loading import EXAMPLES

FILES = sorted(EXAMPLES.rglob("*.toml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_every_run_file_is_valid_and_says_nothing_of_devices(file: Path) -> None:
    """Pins an example that no longer fits the configuration: the first thing a newcomer would meet."""
    config = load_config(file, SftRunConfig if "sft" in tomllib.loads(file.read_text()) else RunConfig, profile="cpu")
    path = config.model.path
    assert path.is_relative_to(file.parent.resolve()), "the model lies beside the run file, wherever slime is called"
    if isinstance(config, RunConfig) and config.reward.fn.startswith("."):
        assert (file.parent / config.reward.fn.partition(":")[0]).is_file()


def test_there_are_run_files() -> None:
    """Pins the test above passing because it found nothing."""
    assert {file.parent.name for file in FILES} >= {"reasoning", "smollm2"}
