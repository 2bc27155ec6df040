"""The demo around its commands: what it prints at the end, and what it does with an earlier demo."""

import json
import sys
from pathlib import Path

import pytest

from slime.metrics import MetricsLog
from tests.examples.loading import EXAMPLES, load


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class, loaded as its script is run: with its folder on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "reasoning"))
    monkeypatch.delitem(sys.modules, "prepare", raising=False)
    return load(EXAMPLES / "reasoning" / "demo.py").Demo


def noted(run_dir: Path, *, seed: int, seconds: float) -> None:
    (run_dir / "setup").mkdir(parents=True)
    (run_dir / "setup" / "demo.json").write_text(json.dumps({"seed": seed, "seconds": seconds}))


def test_it_ends_with_how_far_pass_at_1_came_and_where_the_picture_is(
    demo: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pins a rise that is counted from another evaluation than the warm start's, and time that a restart forgets."""
    noted(tmp_path, seed=0, seconds=390.0)
    with MetricsLog(tmp_path) as log:
        log.write(0, {"eval/held_out/pass@1": 0.269})
        log.write(1, {"reward/mean": 0.3, "time/step_s": 2.0})
        log.write(20, {"reward/mean": 0.5, "time/step_s": 2.0, "eval/held_out/pass@1": 0.6})
        log.write(40, {"reward/mean": 0.5, "time/step_s": 2.0, "eval/held_out/pass@1": 0.532})
    demo(tmp_path, seed=0).conclude()
    line, picture = capsys.readouterr().out.splitlines()[-2:]
    assert line == "demo: held-out pass@1 0.269 -> 0.532 in 40 steps, 6.5 min"
    assert picture == f"demo: curves in {tmp_path / 'report.png'}"


def test_a_demo_of_another_seed_is_moved_aside_and_the_same_is_kept(demo: type, tmp_path: Path) -> None:
    """Pins a run of one seed going on with the data of another, and an earlier run being overwritten."""
    run_dir = tmp_path / "demo"
    noted(run_dir, seed=0, seconds=390.0)
    assert demo(run_dir, seed=0).seconds == 390.0
    assert demo(run_dir, seed=1).seconds == 0.0
    assert not run_dir.exists()
    (aside,) = tmp_path.glob("demo-seed0-*")
    assert json.loads((aside / "setup" / "demo.json").read_text())["seconds"] == 390.0
