"""A run as one watches it: a live panel on a terminal, plain single lines anywhere else; and its samples, to be read.

The run calls `phase`, `step`, `evaluated` and `warn`; a thread of rich's redraws the panel meanwhile, so that clocks go
on while the run waits. It only reads, and what it reads is replaced in one assignment, never changed in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from buffer.samples import iter_samples, written_steps
from slime.text import clock, percentages, printable, series, sparkline, time_shares

PART_COLOURS = {
    "generate": "cyan",
    "train": "magenta",
    "publish": "blue",
    "commit": "green",
    "eval": "white",
    "other": "bright_black",
}
STEP_WORDS = {
    "reward/mean": "reward {:.3f}",
    "rollout/response_tokens_mean": "{:.1f} tokens",
    "rollout/tokens_per_s": "{:,.0f} tokens/s",
    "time/step_s": "{:.1f} s",
}
SPARK_WIDTH = 32
BAR_WIDTH = 24
NUM_WARNINGS = 3
NUM_TIMED_STEPS = 10
"""Times are means over so many last steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One answer of an evaluation, to be read."""

    prompt: str
    response: str
    reward: float


class RunView:
    """Shows one run. Use as a context manager: on a terminal the last panel stays when it ends.

    Args:
        title: names the run, e.g. its directory.
        num_steps: steps of the whole run.
        console: where to; standard output by default.
        now: a clock in seconds.
    """

    def __init__(
        self,
        title: str,
        *,
        num_steps: int,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._num_steps = num_steps
        self._console = console or Console()
        self._now = now
        self._began = now()
        self._phase, self._phase_began = "", self._began
        self._step = 0
        self._steps_at: tuple[tuple[int, float], ...] = ()
        self._rows: tuple[Mapping[str, float], ...] = ()
        self._evals: tuple[Mapping[str, float], ...] = ()
        self._example: Example | None = None
        self._warnings: tuple[str, ...] = ()
        self._live: Live | None = None
        if self._console.is_terminal and self._console.encoding.lower().startswith("utf"):
            self._live = Live(console=self._console, get_renderable=self.render, vertical_overflow="visible")

    def __enter__(self) -> RunView:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = ""
        if self._live:
            self._live.stop()

    def phase(self, text: str) -> None:
        """What the run does or waits for right now, e.g. ``starting engine``."""
        if text == self._phase:
            return
        self._phase, self._phase_began = text, self._now()
        if not self._rows:  # once steps are reported, their lines say enough
            self._line(f"{printable(text)} ...")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps of the run are done; the last one measured `metrics`."""
        self._step = step
        self._steps_at = (*self._steps_at, (step, self._now()))
        self._rows = (*self._rows, dict(metrics))
        words = [form.format(metrics[name]) for name, form in STEP_WORDS.items() if name in metrics]
        shares = percentages(time_shares([metrics]))
        self._line("  ".join([f"step {step}/{self._num_steps}", *words, *([f"({shares})"] if shares else [])]))

    def evaluated(self, step: int, metrics: Mapping[str, float], *, example: Example | None = None) -> None:
        """An evaluation of the weights after `step` steps, under the names that are logged: ``eval/<set>/pass@1``."""
        self._evals = (*self._evals, dict(metrics))
        self._example = example or self._example
        words = [f"{name.removeprefix('eval/')} {value:.3f}" for name, value in metrics.items() if "eval/" in name]
        self._line("  ".join([f"evaluation after step {step}", *words]))
        if example:
            self._line(f"  {printable(example.prompt)} -> {printable(example.response)}  (reward {example.reward:g})")

    def warn(self, text: str) -> None:
        """Something the user should know that does not end the run."""
        self._warnings = (*self._warnings, printable(text))[-NUM_WARNINGS:]
        self._line(f"warning: {printable(text)}")

    def render(self) -> RenderableType:
        """The panel."""
        return Panel(
            Group(self._progress(), Text(), self._table()),
            title=Text.assemble(("slime", "bold green"), (f"  {printable(self._title)}", "bold")),
            title_align="left",
            subtitle=Text(clock(self._now() - self._began), style="bright_black"),
            subtitle_align="right",
            border_style="bright_black",
            padding=(1, 2),
        )

    def _progress(self) -> RenderableType:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        bar = ProgressBar(total=self._num_steps, completed=self._step, complete_style="green", finished_style="green")
        line.add_row(Text(f"step {self._step}/{self._num_steps}", style="bold"), bar, Text(self._time_left()))
        return line

    def _time_left(self) -> str:
        if self._step >= self._num_steps:
            return "done"
        if len(self._steps_at) < 2:
            return ""
        (first, began), (last, ended) = self._steps_at[0], self._steps_at[-1]
        return f"{clock((ended - began) / (last - first) * (self._num_steps - last))} to go"

    def _table(self) -> RenderableType:
        rows, evals = self._rows, self._evals
        cells = {
            "reward": _curve(rows, "reward/mean", style="cyan"),
            **{_set_and_name(name): _curve(evals, name, style="green") for name in _names(evals, ending="/pass@1")},
            "response": _last(rows, "rollout/response_tokens_mean", "{:.1f} tokens"),
            "speed": _last(rows, "rollout/tokens_per_s", "{:,.0f} tokens/s"),
            "time": _time_bar(rows),
            "now": self._phase_text(),
            "example": _example_text(self._example),
            "warning": Text("\n".join(self._warnings), style="yellow"),
        }
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bright_black", no_wrap=True)
        table.add_column(overflow="fold")
        for name, cell in cells.items():
            if cell.plain:
                table.add_row(name, cell)
        return table

    def _phase_text(self) -> Text:
        if not self._phase:
            return Text()
        waited = clock(self._now() - self._phase_began)
        return Text.assemble(printable(self._phase), "  ", (waited, "bright_black"))

    def _line(self, text: str) -> None:
        """One plain line, where there is no panel. An encoding that lacks a character does not end the run."""
        if self._live:
            return
        encoding = self._console.encoding
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        self._console.print(Text(f"[{clock(self._now() - self._began)}] {shown}"), soft_wrap=True)


def print_samples(run_dir: Path, *, step: int | None, limit: int, console: Console | None = None) -> None:
    """Print the first `limit` samples of `step`, by default of the last step, as text.

    Raises:
        DataError: there are no samples of that step.
    """
    console = console or Console()
    steps = written_steps(run_dir)
    step = (steps[-1] if steps else 0) if step is None else step
    for sample in islice(iter_samples(run_dir, step=step), limit):
        console.print(_sample_text(sample), soft_wrap=True)


def _sample_text(sample: Mapping[str, Any]) -> Text:
    """A line about the sample, then what was asked and what the policy answered."""
    reward = "no reward" if sample["reward"] is None else f"reward {sample['reward']:g}"
    about = f"step {sample['step']}  {sample['rollout_id']}  {reward}  {sample['status']}"
    return Text.assemble(
        (printable(about), "bold"),
        "\n",
        (_printable_lines(prompt_text(sample["prompt"])), "bright_black"),
        "\n",
        _printable_lines(sample["response"]),
        "\n",
    )


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as it is written with its samples, to be read: text as it stands, or a paragraph a turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)


def _printable_lines(text: str) -> str:
    return "\n".join(printable(line, limit=4000) for line in text.split("\n"))


def _names(rows: Sequence[Mapping[str, float]], *, ending: str) -> list[str]:
    return sorted({name for row in rows for name in row if name.endswith(ending)})


def _set_and_name(name: str) -> str:
    """``eval/held_out/pass@1`` → ``held-out pass@1``"""
    return name.removeprefix("eval/").replace("_", "-").replace("/", " ")


def _last(rows: Sequence[Mapping[str, float]], name: str, form: str) -> Text:
    values = series(rows, name)
    return Text(form.format(values[-1]) if values else "")


def _curve(rows: Sequence[Mapping[str, float]], name: str, *, style: str) -> Text:
    values = series(rows, name)
    if not values:
        return Text()
    spark = sparkline(values, width=SPARK_WIDTH)
    came = f"  from {values[0]:.3f}" if len(values) > 1 else ""
    return Text.assemble((f"{values[-1]:.3f}", "bold"), "  ", (spark, style), (came, "bright_black"))


def _time_bar(rows: Sequence[Mapping[str, float]]) -> Text:
    """Blocks in proportion to where the time went, then the words."""
    shares = time_shares(rows[-NUM_TIMED_STEPS:])
    bar = Text.assemble(*(("█" * round(share * BAR_WIDTH), PART_COLOURS[part]) for part, share in shares.items()))
    for part, share in shares.items():
        if words := percentages({part: share}):
            bar.append(f"  {words}", style=PART_COLOURS[part])
    return bar


def _example_text(example: Example | None) -> Text:
    if example is None:
        return Text()
    verdict = (f"reward {example.reward:g}", "green" if example.reward > 0 else "red")
    return Text.assemble((printable(example.prompt), "bright_black"), " ", printable(example.response), "  ", verdict)
