"""The command line: help at once, and nothing heavy before the configuration is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from slime.cli import main

HEAVY = ["torch", "ray", "sglang", "megatron", "transformers", "numpy", "pydantic"]


def imported_by(code: str) -> list[str]:
    probe = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    result: list[str] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_help_imports_nothing_heavy() -> None:
    """`slime --help` answers at once because of this; a time would only measure the machine."""
    assert imported_by("from slime.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass") == []


def test_a_mistake_in_the_run_file_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    """Half a minute of imports before `unknown key` would make every typo cost half a minute."""
    (tmp_path / "run.toml").write_text("nonsense = 1\n")
    code = f"from slime.cli import main\ntry: main(['train', {str(tmp_path / 'run.toml')!r}])\nexcept SystemExit: pass"
    assert set(imported_by(code)) <= {"pydantic", "numpy"}


@pytest.mark.parametrize("command", ["train", "sft", "report", "view", "audit", "bench"])
def test_every_command_explains_itself(command: str) -> None:
    """A command without help is one that nobody finds."""
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 4


@pytest.mark.parametrize("command", ["report", "view", "audit"])
def test_a_directory_that_is_no_run_is_refused_with_a_message(command: str, tmp_path: Path) -> None:
    """A traceback about a missing file says nothing about what to give instead."""
    result = CliRunner().invoke(main, [command, str(tmp_path / "nowhere")])
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "nowhere" in result.output


def test_a_package_that_shadows_ours_is_named(tmp_path: Path) -> None:
    """A rewards.py on PYTHONPATH would otherwise be imported in place of ours, and fail far away."""
    (tmp_path / "rewards.py").write_text("")
    done = subprocess.run(
        [Path(sys.executable).with_name("slime"), "audit", "x"],
        capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr
