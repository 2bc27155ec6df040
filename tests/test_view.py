"""The view of a run, on a terminal and without one."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from buffer.samples import write_samples
from slime.errors import DataError
from slime.types import Abstain
from slime.view import Example, RunView, print_samples
from tests.builders import make_group

STEP = {
    "reward/mean": 0.5,
    "rollout/response_tokens_mean": 21.3,
    "rollout/tokens_per_s": 2310.0,
    "time/generate_s": 1.2,
    "time/train_s": 0.8,
    "time/step_s": 2.0,
}


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def play(view: RunView, clock: Clock) -> None:
    """A short run."""
    view.phase("starting engine")
    clock.seconds = 12
    view.evaluated(0, {"eval/held_out/pass@1": 0.269, "eval/held_out/think": 0.38})
    for step in (1, 2, 3):
        clock.seconds += 2
        view.phase(f"generating step {step}")
        view.step(step, {**STEP, "reward/mean": step / 10})
    example = Example(prompt="3 + 4 =", response="[bold]answer[/bold]\x1b[2J 7", reward=1.0)
    view.evaluated(3, {"eval/held_out/pass@1": 0.532}, example=example)
    view.warn("2 samples got no verdict")


def test_without_a_terminal_every_event_is_one_plain_line() -> None:
    """Pins cursor movements and wrapped lines in log files, and a silent run."""
    out, clock = io.StringIO(), Clock()
    with RunView("runs/demo", num_steps=80, console=Console(file=out, width=40), now=clock) as view:
        play(view, clock)
    assert out.getvalue().splitlines() == [
        "[0:00] starting engine ...",
        "[0:12] evaluation after step 0  held_out/pass@1 0.269  held_out/think 0.380",
        "[0:14] generating step 1 ...",
        "[0:14] step 1/80  reward 0.100  21.3 tokens  2,310 tokens/s  2.0 s  (generate 60%, train 40%)",
        "[0:16] step 2/80  reward 0.200  21.3 tokens  2,310 tokens/s  2.0 s  (generate 60%, train 40%)",
        "[0:18] step 3/80  reward 0.300  21.3 tokens  2,310 tokens/s  2.0 s  (generate 60%, train 40%)",
        "[0:18] evaluation after step 3  held_out/pass@1 0.532",
        r"[0:18]   3 + 4 = -> [bold]answer[/bold]\x1b[2J 7  (reward 1)",
        "[0:18] warning: 2 samples got no verdict",
    ]


def test_on_a_terminal_a_panel_shows_the_run() -> None:
    """Pins the panel losing a number, and a response that is taken for markup or drives the terminal."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), force_terminal=True, width=100)
    view = RunView("runs/demo", num_steps=80, console=console, now=clock)
    with view:
        play(view, clock)
        clock.seconds += 5
        panel = Console(file=out, width=100)
        panel.print(view.render())
    text = out.getvalue()
    for words in (
        "runs/demo",
        "step 3/80",
        "2:34 to go",
        "0.300  ▁▅█  from 0.100",
        "held-out pass@1  0.532  ▁█  from 0.269",
        "2,310 tokens/s",
        "generate 60%  train 40%",
        "generating step 3  0:05",
        r"3 + 4 = [bold]answer[/bold]\x1b[2J 7  reward 1",
        "2 samples got no verdict",
        "0:23",
    ):
        assert words in text
    assert "\x1b[2J" not in text


@pytest.mark.parametrize("width", [20, 60, 200])
def test_the_panel_fits_any_width(width: int) -> None:
    """Pins a narrow terminal breaking the frame, line by line."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=width)
    view = RunView("runs/demo", num_steps=80, console=Console(file=io.StringIO()), now=clock)
    console.print(view.render())
    play(view, clock)
    console.print(view.render())
    assert max(map(len, out.getvalue().splitlines())) <= width


def test_the_terminal_is_given_back_when_the_run_fails() -> None:
    """Pins a hidden cursor and a running redraw thread after an error."""
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="utf-8", write_through=True), force_terminal=True)
    with pytest.raises(RuntimeError, match="boom"), RunView("run", num_steps=1, console=console):
        raise RuntimeError("boom")
    hide, show = b"\x1b[?25l", b"\x1b[?25h"
    assert raw.getvalue().rindex(show) > raw.getvalue().rindex(hide)


def test_a_terminal_without_unicode_gets_plain_lines_that_it_can_show() -> None:
    """Pins a run that dies of UnicodeEncodeError because of what its model wrote."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    with RunView("run", num_steps=1, console=Console(file=file, force_terminal=True, color_system=None)) as view:
        view.warn("数 answered")
    assert raw.getvalue().decode("ascii").splitlines() == [r"[0:00] warning: \u6570 answered"]


def test_a_continued_run_with_missing_and_unfinished_numbers_is_shown() -> None:
    """Pins a division by zero on the first step after a restart, and NaN breaking the panel."""
    clock = Clock()
    view = RunView("run", num_steps=80, console=Console(file=io.StringIO()), now=clock)
    view.step(41, {"reward/mean": math.nan, "time/step_s": math.nan})
    Console(file=io.StringIO()).print(view.render())
    view.step(42, {})
    out = io.StringIO()
    Console(file=out, width=80).print(view.render())
    assert "step 42/80" in out.getvalue()


def test_samples_are_printed_as_text_that_drives_nothing(tmp_path: Path) -> None:
    """Pins a stored response that clears the screen of whoever reads it, or that is taken for markup."""
    group = make_group([0.0, 1.0, 0.5], uid="p7")
    group.samples[0].response = "first line\n[red]second\x1b[2J line"
    group.samples[1].verdict = Abstain(reason="no answer")
    write_samples(tmp_path, [group], step=1)
    write_samples(tmp_path, [group], step=12)
    out = io.StringIO()
    print_samples(tmp_path, step=None, limit=2, console=Console(file=out, width=30))
    assert out.getvalue().splitlines() == [
        "step 12  p7/0  reward 0  completed",
        "1 + 2 =",
        "first line",
        r"[red]second\x1b[2J line",
        "",
        "step 12  p7/1  no reward  completed",
        "1 + 2 =",
        "r",
        "",
    ]


def test_samples_of_a_step_that_was_not_written_are_an_error(tmp_path: Path) -> None:
    """Pins silence for a misspelt directory or step."""
    with pytest.raises(DataError, match="no samples of step 0"):
        print_samples(tmp_path, step=None, limit=1)
