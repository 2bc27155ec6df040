"""The picture and the summary of a run."""

import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from slime.errors import DataError
from slime.metrics import MetricsLog
from slime.report import summary, write_report


def record(run_dir: Path, rows: dict[int, dict[str, float]]) -> Path:
    with MetricsLog(run_dir) as log:
        for step, metrics in rows.items():
            log.write(step, metrics)
    return run_dir


def trained(step: int) -> dict[str, float]:
    return {
        "reward/mean": 0.3 + step / 50,
        "reward_part/think": 0.5,
        "rollout/response_tokens_mean": 10.0 + step,
        "rollout/tokens_per_s": 2000.0,
        "mismatch/logprob_abs_mean": 0.005,
        "loss/grad_norm": math.nan if step == 3 else 0.6,
        "time/generate_s": 1.0,
        "time/train_s": 0.5,
        "time/step_s": 2.0,
    }


def evaluated(passed: float, think: float) -> dict[str, float]:
    return {
        "eval/held_out/pass@1": passed,
        "eval/held_out/pass@8": 0.9,
        "eval/held_out/think": think,
        "eval/held_out/failures": 0.0,
        "eval/held_out/response_tokens_mean": 12.0,
    }


def test_the_summary_says_how_far_the_run_came(tmp_path: Path) -> None:
    """Pins first, last and best being mixed up, and steps counted from evaluations."""
    rows = {
        0: evaluated(0.25, 0.4),
        **{step: trained(step) for step in range(1, 21)},
        10: {**trained(10), **evaluated(0.75, 0.9)},
        20: {**trained(20), **evaluated(0.5, 1.0)},
    }
    lines = summary(record(tmp_path, rows)).splitlines()
    assert lines[0] == f"{tmp_path}: 20 steps in 0.7 min, 2.0 s a step, 2,000 tokens/s generated"
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "pass@1 0.250 -> 0.500 highest 0.750 after step 10",
        "pass@8 0.900 -> 0.900 highest 0.900 after step 0",
        "think 0.400 -> 1.000 highest 1.000 after step 20",
        "reward 0.410 -> 0.610 means of the first and last 10 steps",
        "time generate 50%, train 25%, other 25%",
    ]


@pytest.mark.parametrize(
    "rows",
    [
        {0: evaluated(0.25, 0.4), **{step: trained(step) for step in range(1, 21)}, 21: evaluated(0.5, 1.0)},
        {0: evaluated(0.25, 0.4)},
        {1: trained(1)},
        {3: {"reward/mean": math.nan, "time/step_s": math.nan}},
        {1: {"reward_part/$a_{$\x1b": 1.0, "eval/held_out/$a_{$\x1b": -3.0, "eval/pass@1": 0.5, "time/step_s": 0.0}},
    ],
    ids=["whole", "only evaluated", "one step", "nothing finite", "odd names"],
)
def test_whatever_a_run_has_recorded_is_drawn(tmp_path: Path, rows: dict[int, dict[str, float]]) -> None:
    """Pins a picture that fails on short, unfinished or odd records; its pixels show that something is drawn."""
    picture = write_report(record(tmp_path, rows))
    assert picture == tmp_path / "report.png"
    assert imread(picture).std() > 0.005
    assert summary(tmp_path)


def test_a_run_that_has_recorded_nothing_is_an_error_that_says_so(tmp_path: Path) -> None:
    """Pins an empty picture for a misspelt directory."""
    with pytest.raises(DataError, match=r"no step has been recorded"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no step has been recorded"):
        summary(tmp_path)
    assert not (tmp_path / "nowhere").exists()
