"""The curves of a run as one picture, and its summary as text, from ``metrics.jsonl`` alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from slime.errors import DataError
from slime.metrics import read
from slime.text import LEAST_SHARE, STEP_PARTS, percentages, printable, series, time_shares, total

Rows = Sequence[Mapping[str, float]]

PICTURE = "report.png"
NUM_COLUMNS = 4
INK, FAINT, GRID = "#1f2933", "#7b8794", "#e8ebef"
COLOURS = ("#2563eb", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#a3aab4")
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#cbd2d9",
    "axes.grid": True,
    "axes.labelcolor": FAINT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.labelcolor": FAINT,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}
SMOOTHED_STEPS = 9
"""Width of the running mean drawn over a noisy curve."""
EVAL_MEASURES = {"reward_mean", "response_tokens_mean", "failures"}
"""What an evaluation measures beside pass@k; its other numbers are parts of the user's score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes: curves of the same unit."""

    title: str
    curves: Mapping[str, str]
    """Label → metric."""
    is_share: bool = False
    """Between 0 and 1."""
    is_noisy: bool = True
    """A running mean is drawn over it."""


def write_report(run_dir: Path) -> Path:
    """Draw ``report.png`` into the run directory.

    Raises:
        DataError: nothing has been measured yet.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = _rows(run_dir)
    panels = _panels(rows)
    with_time = bool(time_shares(rows))
    num_rows = math.ceil((len(panels) + with_time) / NUM_COLUMNS)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(19, 1.3 + 3.7 * num_rows), dpi=120, facecolor="white")
        figure.subplots_adjust(
            left=0.04, right=0.985, bottom=0.2 / num_rows, top=1 - 1.35 / (1.3 + 3.7 * num_rows), wspace=0.2, hspace=0.45
        )
        _header(figure, run_dir, rows)
        for place, panel in enumerate(panels, start=1):
            _draw(figure.add_subplot(num_rows, NUM_COLUMNS, place), panel, rows)
        if with_time:
            _draw_time(figure.add_subplot(num_rows, NUM_COLUMNS, len(panels) + 1), rows)
        figure.savefig(run_dir / PICTURE)
    return run_dir / PICTURE


def summary(run_dir: Path) -> str:
    """A few lines: steps, time, speed, and how far every evaluated number came.

    Raises:
        DataError: nothing has been measured yet.
    """
    rows = _rows(run_dir)
    lines = [f"{run_dir}: {_pace(rows)}"]
    for name in _eval_names(rows):
        values = _points(rows, name)
        (_, first), (_, last) = values[0], values[-1]
        best_step, best = max(values, key=lambda point: point[1])
        lines.append(f"  {_label(name):<24} {first:.3f} -> {last:.3f}   highest {best:.3f} after step {best_step}")
    if rewards := [value for _, value in _points(rows, "reward/mean")]:
        few = min(10, len(rewards))
        first, last = fmean(rewards[:few]), fmean(rewards[-few:])
        lines.append(f"  {'reward':<24} {first:.3f} -> {last:.3f}   means of the first and last {few} steps")
    if shares := percentages(time_shares(rows)):
        lines.append(f"  {'time':<24} {shares}")
    return "\n".join(lines)


def _rows(run_dir: Path) -> Rows:
    rows = read(run_dir)
    if not rows:
        raise DataError(
            f"{run_dir}: no step has been recorded there (metrics.jsonl is missing or empty). "
            "Name the run directory of a run that has begun to train, or wait for its first step."
        )
    return rows


def _panels(rows: Rows) -> list[Panel]:
    """What there is to draw, in reading order: does it learn, how, and is it healthy."""
    evaluated = _eval_names(rows)
    passes = {_label(name): name for name in evaluated if "/pass@" in name}
    parts = {_label(name): name for name in evaluated if _is_part(name)}
    wanted = [
        Panel(title="Held-out", curves=passes, is_share=True, is_noisy=False),
        Panel(title="Training reward", curves={"": "reward/mean"}),
        Panel(title="Parts of the score, held-out", curves=parts, is_noisy=False),
        Panel(title="Response length, tokens", curves={"": "rollout/response_tokens_mean"}),
        Panel(title="Engine and trainer disagree, |Δ logprob|", curves={"": "mismatch/logprob_abs_mean"}),
        Panel(title="Gradient norm", curves={"": "loss/grad_norm"}),
        Panel(title="Entropy, nats a token", curves={"": "loss/entropy"}),
    ]
    drawn = []
    for panel in wanted:
        curves = {label: name for label, name in panel.curves.items() if _points(rows, name)}
        if curves:
            is_share = panel.is_share or (panel.curves is parts and _are_shares(rows, curves.values()))
            drawn.append(Panel(title=panel.title, curves=curves, is_share=is_share, is_noisy=panel.is_noisy))
    return drawn
