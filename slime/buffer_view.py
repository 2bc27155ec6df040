"""What `slime buffer` prints. Uids, reasons and samples may come from outside: all of it is made printable first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from buffer.books.lives import Graded, Life
from buffer.books.stats import Stats
from buffer.difficulty import Pools
from buffer.records import Event
from slime.text import clock, printable
from slime.types import Prompt
from slime.view import prompt_text

HIDDEN_WHEN_ZERO = ("filtered", "requeued", "recovered", "reverted", "late")
MAX_REASONS = 8
"""Reasons that are listed by name."""


def stats_json(stats: Stats, pools: Pools | None) -> str:
    """One line of ASCII, which no terminal obeys."""
    told = {**asdict(stats), "pools": asdict(pools) if pools else None}
    return json.dumps(told).replace("\x7f", "\\u007f")


def print_stats(stats: Stats, pools: Pools | None, *, title: str, console: Console | None = None) -> None:
    """A table: a number and what it is made of in each row."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, count, words in [*_stats_rows(stats), *([_pools_row(pools)] if pools else [])]:
        if count or name not in HIDDEN_WHEN_ZERO:
            table.add_row(name, f"{count:,}", Text(words))
    console = console or Console()
    console.print(Text(printable(title), style="bold"), table)


def _stats_rows(stats: Stats) -> list[tuple[str, int, str]]:
    states, longest = stats.states, stats.longest_running
    running = f"{states['generated']:,} of them are graded now" if states["generated"] else ""
    if longest:
        since = f"longest: instance {longest.ordinal}, attempt {longest.attempt}, {clock(longest.running_s)}"
        running = "; ".join(filter(None, [running, since]))
    bound = "" if stats.max_staleness is None else f"; the bound is {stats.max_staleness}"
    ages = ", ".join(f"{age}: {count:,}" for age, count in stats.staleness.items())
    last = "nothing is committed yet" if stats.last_step is None else f"the last is of step {stats.last_step}"
    megabytes = f"samples of {stats.num_payloads:,} groups {stats.payload_bytes / 1e6:,.1f} MB"
    return [
        ("issued", stats.num_issued, f"from the run's prompts {stats.num_admitted:,}, pushed {stats.num_pushed:,}"),
        ("waiting", stats.num_waiting, f"to be issued again, {stats.num_partial:,} of them with partial samples"),
        ("running", stats.num_running, running),
        ("ready", stats.num_ready, "graded, and in no step yet"),
        ("packed", states["packed"], "in steps that are not committed"),
        ("committed", states["committed"], f"staleness {ages}{bound}" if ages else ""),
        ("dropped", states["dropped"], _reasons(stats.dropped)),
        ("filtered", stats.num_filtered, "of the dropped: after they were graded"),
        ("requeued", sum(stats.requeues.values()), _reasons(stats.requeues)),
        ("recovered", stats.num_recovered, "attempts that ended with their process"),
        ("reverted", stats.num_reverted, "whose checkpoint was torn"),
        ("late", stats.num_late, "results of older attempts, or sent twice: discarded"),
        ("commits", stats.num_commits, last),
        ("bytes", stats.ledger_bytes, megabytes),
    ]


def _pools_row(pools: Pools) -> tuple[str, int, str]:
    bands = [f"up to {end:g}: {count:,}" if end else f"0: {count:,}" for end, count in pools.bands.items()]
    words = f"judged, by pass@{pools.k} {', '.join(bands)}; with fewer samples {pools.num_unknown:,}"
    return "prompts", sum(pools.bands.values()) + pools.num_unknown, words


def _reasons(counts: Mapping[str, int]) -> str:
    """The most frequent first."""
    shown = [f"{printable(reason, limit=80)} {count:,}" for reason, count in list(counts.items())[:MAX_REASONS]]
    more = sum(list(counts.values())[MAX_REASONS:])
    return ", ".join([*shown, *([f"others {more:,}"] if more else [])])


def print_lives(lives: list[Life], *, prompt: Prompt | None = None, console: Console | None = None) -> None:
    """One after the other: what it is, what happened to it, what it was worth, what was sampled.

    Args:
        prompt: theirs, where no sample tells it.
    """
    console = console or Console()
    if asked := _asked(lives, prompt):
        console.print(Text(f"asked: {printable(asked)}"), soft_wrap=True)
    for life in lives:
        console.print(Text("\n").join(_life_lines(life)), soft_wrap=True)
        console.print()


def _life_lines(life: Life) -> list[Text]:
    instance, samples = life.instance, life.samples
    origin = (
        "pushed" if instance.position is None else f"place {instance.position} in the order, epoch {instance.epoch}"
    )
    head = f"instance {instance.ordinal}  prompt {printable(instance.prompt_uid)}  {origin}"
    lines = [Text(head, style="bold"), Text(_standing(life))]
    lines += [Text(f"  {_event(event)}") for event in life.events]
    lines += [Text(_graded(graded)) for graded in life.graded]
    lines += [Text.assemble("  ", (_sample(sample), "bright_black"), "  ", _response(sample)) for sample in samples]
    if not samples:
        lines.append(Text("its samples are not at hand", style="bright_black"))
    return lines


def _asked(lives: list[Life], prompt: Prompt | None) -> str:
    """All lives that are shown together are of one prompt."""
    for life in lives:
        for sample in life.samples:
            return prompt_text(sample["prompt"])
    return prompt_text(prompt.messages or prompt.text) if prompt else ""


def _standing(life: Life) -> str:
    instance = life.instance
    words = [f"{instance.state}, attempt {instance.attempt}"]
    if instance.step is not None:
        words.append(f"step {instance.step}")
    if instance.reason:
        words.append(f"reason: {printable(instance.reason)}")
    if instance.versions:
        words.append(f"versions {instance.versions.oldest} to {instance.versions.newest}")
    return ", ".join(words)


def _event(event: Event) -> str:
    when = datetime.fromtimestamp(event.time).isoformat(sep=" ", timespec="milliseconds")
    step = "" if event.step is None else f"step {event.step}"
    words = [when, f"attempt {event.attempt}", event.event, step, printable(event.detail)]
    return "  ".join(filter(None, words))


def _graded(graded: Graded) -> str:
    mean = "no reward" if graded.reward_mean is None else f"reward mean {graded.reward_mean:.3f}"
    fate = f", refused: {printable(graded.dropped)}" if graded.dropped else ""
    return (
        f"attempt {graded.attempt} was graded: {graded.num_passed} of {graded.num_samples} passed, {mean}, "
        f"{graded.response_tokens_mean:.1f} tokens{fate}"
    )


def _sample(sample: Mapping[str, Any]) -> str:
    reward = "no reward" if sample["reward"] is None else f"reward {sample['reward']:g}"
    return f"{sample['index']}  {reward}  {sample['status']}  {sum(sample['loss_mask'])} tokens"


def _response(sample: Mapping[str, Any]) -> str:
    return printable(sample["response"], limit=100)
