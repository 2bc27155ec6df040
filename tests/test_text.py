"""Small pieces of text: nothing a model writes may drive the terminal."""

import math

import pytest

from slime.text import clock, percentages, printable, sparkline, time_shares


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b31m\x00", r"\x9b31m\x00"),
        ("half \ud800", r"half \ud800"),
        ("a\u2028b\u200bc", r"a\u2028b\u200bc"),
        ("für 3 × 4 − 数", "für 3 × 4 − 数"),
        ("[red]x[/red]", "[red]x[/red]"),
    ],
)
def test_what_would_drive_a_terminal_is_escaped(hostile: str, shown: str) -> None:
    """Pins a response that clears the screen, sets the title or hides what it says."""
    assert printable(hostile) == shown
    assert printable(hostile).isprintable()


def test_long_text_is_cut() -> None:
    """Pins a runaway answer filling the terminal."""
    assert printable("ab" * 500, limit=5) == "ababa…"


def test_a_sparkline_spans_its_values_and_shows_the_whole_history() -> None:
    """Pins a flat line drawn for a rising curve, and the beginning being lost on long runs."""
    assert sparkline([0.0, 0.5, 1.0], width=8) == "▁▅█"
    assert sparkline([0.3, 0.3], width=8) == "▅▅"
    assert sparkline([0.0, math.nan, 1.0], width=8) == "▁ █"
    assert sparkline([math.nan], width=8) == " "
    assert sparkline([], width=8) == ""
    long = sparkline([0.0] * 50 + [1.0] * 50, width=10)
    assert long == "▁▁▁▁▁█████"


def test_shares_of_time_add_up_to_one() -> None:
    """Pins time that no phase accounts for going unseen, and an unfinished number spoiling the sum."""
    rows = [
        {"time/generate_s": 2.0, "time/train_s": 1.0, "time/step_s": 4.0},
        {"time/generate_s": 2.0, "time/publish_s": math.nan, "time/step_s": 4.0},
    ]
    shares = time_shares(rows)
    assert sum(shares.values()) == pytest.approx(1)
    assert (shares["generate"], shares["train"], shares["other"]) == pytest.approx((0.5, 0.125, 0.375))
    assert percentages(shares) == "generate 50%, train 12%, other 38%"
    assert time_shares([{}]) == {}


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (187.4, "3:07"), (3787, "1:03:07"), (-1, "0:00")])
def test_a_clock_reads_minutes_and_seconds(seconds: float, shown: str) -> None:
    """Pins 59.6 s shown as 0:60, and hours running over."""
    assert clock(seconds) == shown
    assert clock(59.6) == "1:00"
