"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """FILE, --profile and --set: a run file and what changes it."""
    for decorate in (
        click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override one key; repeatable."),
        click.option("--profile", metavar="NAME|FILE", help="Where it runs: cpu, 1gpu, 8gpu or a TOML file."),
        click.argument("file", type=click.Path(path_type=Path)),
    ):
        command = decorate(command)
    return command
