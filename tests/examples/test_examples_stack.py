"""Every example takes a step on the real stack, by the commands that its README gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slime.metrics import read
from tests.examples.loading import EXAMPLES, load

pytestmark = pytest.mark.stack
SMALL_EVAL = ("--set=eval.num_prompts=4", "--set=eval.samples_per_prompt=2")


def slime(*arguments: str) -> str:
    """Run one command as a user does, and return what it printed."""
    command = [Path(sys.executable).with_name("slime"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_thinking_pays_from_random_weights_to_a_report(tmp_path: Path) -> None:
    """Pins an example whose commands do not fit together: file names, paths, vocabulary, the end of an answer."""
    load(EXAMPLES / "reasoning" / "prepare.py").prepare(tmp_path, seed=0, num_problems=200, num_examples=200)
    data, random, warm = tmp_path / "data", tmp_path / "model" / "random", tmp_path / "model" / "warm"
    places = (f"--set=model.path={random}", f"--set=sft.data={data / 'sft.jsonl'}", f"--set=sft.output={warm}")
    slime("sft", str(EXAMPLES / "reasoning" / "sft.toml"), *places, "--set=sft.num_steps=3")
    run_dir = tmp_path / "run"
    places = (f"--set=run_dir={run_dir}", f"--set=model.path={warm}", f"--set=data.train={data / 'train.jsonl'}")
    slime("train", str(EXAMPLES / "reasoning" / "run.toml"), *places, *SMALL_EVAL, "--set=num_steps=1")
    before, after = read(run_dir)
    assert "eval/held_out/think" in before
    assert after["mismatch/logprob_abs_mean"] < 0.03
    assert "pass@1" in slime("report", str(run_dir))
    assert (run_dir / "report.png").is_file()


def test_smollm2_trains_on_its_real_weights(tmp_path: Path) -> None:
    """Pins the pretrained path: chat template, conversion, and both engines computing the same model."""
    folder = EXAMPLES / "smollm2"
    subprocess.run([sys.executable, folder / "prepare.py"], check=True, timeout=280)
    small = ("--set=rollout.prompts_per_step=2", "--set=rollout.samples_per_prompt=4", "--set=num_steps=1")
    same_tokens = "--set=profile.engine.deterministic=true"  # a mean over a hundred tokens depends on which they are
    slime("train", str(folder / "run.toml"), f"--set=run_dir={tmp_path}", *SMALL_EVAL, *small, same_tokens)
    _, after = read(tmp_path)
    assert after["mismatch/logprob_abs_mean"] < 0.03
