"""A tiny task for whole runs through the command line, and the means to start, watch and end one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from buffer.books.audit import Audit, audit_run
from slime.publisher import staging_directory
from tests.builders import make_model

SLIME = [str(Path(sys.executable).with_name("slime"))]
CRASHING = [sys.executable, "-m", "tests.integration.crashing"]
START_TIMEOUT_S = 240.0
END_TIMEOUT_S = 30.0

RUN_FILE = """\
num_steps = 4
run_dir = "unset"
[model]
path = "model"
[data]
train = "data.jsonl"
held_out = 0.2
[rollout]
prompts_per_step = 4
samples_per_prompt = 4
max_response_tokens = 8
[reward]
fn = "./reward.py:score"
[trainer.optimizer]
lr = 1e-3
[eval]
every = 2
num_prompts = 4
samples_per_prompt = 2
[checkpoint]
every = 2
"""
PROFILE = """\
[engine]
deterministic = true
[engine.sglang]
max_total_tokens = 4096
[trainer]
tokens_per_microbatch = 256
"""
REWARD = """\
def score(sample):
    return float(sum(map(ord, sample.response)) % 2)
"""


def make_task(directory: Path) -> Path:
    """A folder with run file, profile, model, data and reward. Returns the run file."""
    make_model(directory / "model")
    rows = [{"text": f"{a} + {b} =", "label": str(a + b)} for a in range(3) for b in range(4)]
    rows.append({"text": "1 + " * 300 + "1 =", "label": "301"})
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "reward.py").write_text(REWARD)
    (directory / "profile.toml").write_text(PROFILE)
    (directory / "run.toml").write_text(RUN_FILE)
    return directory / "run.toml"


class Training:
    """One `slime train` process in a session of its own; `crash` tells `tests.integration.crashing` where it dies."""

    def __init__(
        self, run_file: Path, run_dir: Path, *assignments: str, profile: Path | None = None, crash: str = ""
    ) -> None:
        self.run_dir = run_dir
        options = [f"run_dir={run_dir}", *assignments]
        self.output = run_dir.with_name(f"{run_dir.name}.{time.monotonic_ns()}.out")
        self.scratch = Path(tempfile.mkdtemp(prefix="slime-test-"))
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(CRASHING + crash.split() if crash else SLIME),
                    "train",
                    str(run_file),
                    "--profile",
                    str(profile or run_file.with_name("profile.toml")),
                ]
                + [word for option in options for word in ("--set", option)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.scratch)},
                start_new_session=True,
            )

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self.process.returncode not in (0, 1):  # one that was refused leaves another's weights alone
            shutil.rmtree(staging_directory(self.run_dir), ignore_errors=True)

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(START_TIMEOUT_S)

    def wait_for_step(self, step: int) -> None:
        """Return as soon as the metrics of a step are written."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not any("time/step_s" in row and row["step"] >= step for row in rows(self.run_dir)):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def wait_for_engines_to_end(self) -> None:
        """Return when every engine has cleaned up after itself, which is the last thing it does."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while left := list(self.scratch.glob("slime-engine-*")):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)

    def interrupt(self) -> None:
        """Ctrl-C: a terminal sends it to the driver and to whatever shares its process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def text(self) -> str:
        """What it printed."""
        return self.output.read_text(errors="replace")


def rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def samples(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()]


def audit(run_dir: Path) -> Audit:
    return audit_run(run_dir)
