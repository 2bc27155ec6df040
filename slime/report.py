"""The curves of a run as one picture, and its summary as text, from ``metrics.jsonl`` alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes: curves of the same unit."""

    title: str
    curves: Mapping[str, str]
    """Label → metric."""
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
    is_timed = bool(time_shares(rows))
    num_rows = math.ceil((len(panels) + is_timed) / NUM_COLUMNS) or 1
    inches = 1.1 + 3.7 * num_rows
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(19, inches), dpi=120, facecolor="white")
        figure.subplots_adjust(
            left=0.04, right=0.985, bottom=0.65 / inches, top=1 - 1.5 / inches, wspace=0.2, hspace=0.5
        )
        _header(figure, run_dir, rows)
        for place, panel in enumerate(panels, start=1):
            _draw(figure.add_subplot(num_rows, NUM_COLUMNS, place), panel, rows)
        if is_timed:
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
    if ratios := [value for _, value in _points(rows, "survivorship/length_ratio") if abs(value - 1) > 0.01]:
        lines.append(f"  {'trained ÷ dispatched':<24} {fmean(ratios):.3f}   response length, {len(ratios)} steps' mean")
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
    parts = {_label(name): name for name in evaluated if _label(name) not in passes}
    panels = [
        Panel(title="Held-out problems solved", curves=passes, is_noisy=False),
        Panel(title="Training reward, mean", curves={"mean": "reward/mean"}),
        Panel(title="Held-out, parts of the score", curves=parts, is_noisy=False),
        Panel(title="Response length, tokens", curves={"mean": "rollout/response_tokens_mean"}),
        Panel(title="Engine − trainer, |Δ logprob|", curves={"mean": "mismatch/logprob_abs_mean"}),
        Panel(title="Gradient norm", curves={"norm": "loss/grad_norm"}),
        Panel(title="Entropy, nats a token", curves={"mean": "loss/entropy"}),
    ]
    return [panel for panel in panels if any(_points(rows, name) for name in panel.curves.values())]


def _draw(axes: Any, panel: Panel, rows: Rows) -> None:
    axes.set_title(panel.title)
    curves = {label: points for label, name in panel.curves.items() if (points := _points(rows, name))}
    highest = max(points[-1][1] for points in curves.values()) if len(curves) > 1 else -math.inf
    for (label, points), colour in zip(curves.items(), COLOURS, strict=False):
        steps, values = [step for step, _ in points], [value for _, value in points]
        if panel.is_noisy:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1.2)
            values = _running_mean(values)
            axes.plot(steps, values, color=colour)
        else:
            axes.plot(steps, values, color=colour, marker="o", markersize=5, clip_on=False)
            _note(axes, f"{values[0]:.3g}", steps[0], values[0], colour=colour, offset=(6, -14))
        name = "" if panel.is_noisy else f"{label}  "
        offset = (0, 8) if values[-1] >= highest else (0, -16)
        _note(axes, f"{name}{values[-1]:.3g}", steps[-1], values[-1], colour=colour, offset=offset)
    _frame(axes, rows)
    values = [value for points in curves.values() for _, value in points]
    if not panel.is_noisy and min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(0, 1.08)
    else:
        axes.margins(y=0.18)


def _note(axes: Any, text: str, x: float, y: float, *, colour: str, offset: tuple[int, int]) -> None:
    """A number beside the end of a curve, `offset` points from it."""
    place = {"xytext": offset, "textcoords": "offset points", "ha": "left" if offset[0] else "right"}
    axes.annotate(text, (x, y), **place, color=colour, fontweight="bold", annotation_clip=False, parse_math=False)


def _draw_time(axes: Any, rows: Rows) -> None:
    """Seconds of each step, stacked by what they went to."""
    axes.set_title("Time of a step, seconds")
    timed = [row for row in rows if math.isfinite(row.get("time/step_s", math.nan))]
    shares = [time_shares([row]) for row in timed]
    parts = [part for part in STEP_PARTS if time_shares(timed)[part] >= LEAST_SHARE]
    seconds = [[share[part] * row["time/step_s"] for share, row in zip(shares, timed, strict=True)] for part in parts]
    steps = [row["step"] for row in timed]
    colours = [COLOURS[STEP_PARTS.index(part)] for part in parts]
    axes.stackplot(steps, seconds, labels=parts, colors=colours, alpha=0.85, linewidth=0, step="mid")
    axes.legend(loc="upper right", ncols=2, reverse=True, frameon=True, edgecolor="none", framealpha=0.9)
    _frame(axes, rows)
    axes.set_ylim(0, 2 * median(row["time/step_s"] for row in timed))  # an evaluation may rise above it


def _frame(axes: Any, rows: Rows) -> None:
    axes.set_xlabel("step")
    axes.set_xlim(0, max(1, rows[-1]["step"]))
    axes.tick_params(length=0)
    axes.locator_params(axis="x", integer=True)


def _header(figure: Any, run_dir: Path, rows: Rows) -> None:
    inches = figure.get_figheight()
    place = {"x": 0.04, "va": "center", "parse_math": False}
    figure.text(y=1 - 0.42 / inches, s=printable(str(run_dir)), fontsize=18, fontweight="bold", **place)
    figure.text(y=1 - 0.78 / inches, s=_pace(rows), fontsize=12, color=FAINT, **place)


def _pace(rows: Rows) -> str:
    """``80 steps in 6.3 min, 4.7 s a step, 2,310 tokens/s``"""
    seconds, steps = total(rows, "time/step_s"), series(rows, "time/step_s")
    words = [f"{rows[-1]['step']:.0f} steps in {seconds / 60:.1f} min"]
    if steps:
        words.append(f"{seconds / len(steps):.1f} s a step")
    if speeds := [value for _, value in _points(rows, "rollout/tokens_per_s")]:
        words.append(f"{fmean(speeds):,.0f} tokens/s generated")
    return ", ".join(words)


def _eval_names(rows: Rows) -> list[str]:
    """Every pass@k, and every part of the user's score, that an evaluation measured at least once."""
    names = sorted({name for row in rows for name in row})
    parts = {name.removeprefix("reward_part/") for name in names if name.startswith("reward_part/")}
    evaluated = [name for name in names if name.startswith("eval/") and _points(rows, name)]
    return [name for name in evaluated if "/pass@" in name or name.split("/", maxsplit=2)[-1] in parts]


def _label(name: str) -> str:
    """``eval/held_out/pass@1`` → ``pass@1``; other sets than the held-out one keep their name."""
    return printable(name.removeprefix("eval/").removeprefix("held_out/").replace("_", " "), limit=40)


def _points(rows: Rows, name: str) -> list[tuple[float, float]]:
    """(step, value) of every row that has a finite value."""
    return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the SMOOTHED_STEPS around each value, of fewer at the ends."""
    half = SMOOTHED_STEPS // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
