"""`slime buffer`: look into a run's ledger, take it elsewhere, serve it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from slime.cli_options import run_options

if TYPE_CHECKING:
    from buffer.books.export import Format, What

STATES = ("issued", "running", "generated", "graded", "packed", "committed", "dropped")


@click.group("buffer")
def buffer_group() -> None:
    """Look into the data buffer of a run, which may be going on; or serve one.

    \b
    slime buffer stats runs/demo                  where its instances stand
    slime buffer show runs/demo 17                the whole life of instance 17
    """


@buffer_group.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--pass-k", "k", default=1, show_default=True, type=click.IntRange(1), help="Pool prompts by pass@K.")
@click.option("--json", "as_json", is_flag=True, help="One object, for programs.")
def stats(run_dir: Path, k: int, as_json: bool) -> None:
    """Count the instances of RUN_DIR by state, drop reason and staleness, and its prompts by difficulty."""
    from buffer.books.stats import read_pools, read_stats
    from slime.buffer_view import print_stats, stats_json

    read, pools = read_stats(run_dir), read_pools(run_dir, k=k)
    if as_json:
        click.echo(stats_json(read, pools))
    else:
        print_stats(read, pools, title=str(run_dir))


@buffer_group.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("uid")
def show(run_dir: Path, uid: str) -> None:
    """Tell the whole life of the instances of one prompt of RUN_DIR.

    UID is the prompt's uid or the beginning of it, an instance's number, or uid:number.
    """
    from buffer.books.lives import read_lives
    from slime.buffer_prompts import prompt_of
    from slime.buffer_view import print_lives

    lives = read_lives(run_dir, uid)
    prompt = None if any(life.samples for life in lives) else prompt_of(run_dir, lives[0].instance)
    print_lives(lives, prompt=prompt)


@buffer_group.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--what", type=click.Choice(["instances", "samples", "outcomes"]), default="instances", show_default=True,
    help="A row an instance, a sample, or a graded attempt.",
)  # fmt: skip
@click.option("--format", "form", type=click.Choice(["jsonl", "parquet"]), default="jsonl", show_default=True)
@click.option("--state", "states", type=click.Choice(STATES), multiple=True, help="Only these; repeatable.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Default: <run>_<what>.<format> here.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def export(run_dir: Path, what: What, form: Format, states: tuple[str, ...], output: Path | None, force: bool) -> None:
    """Write the instances, samples or outcomes of RUN_DIR to a file."""
    from buffer.books.export import export_run
    from buffer.schema import State

    output = output or Path(f"{run_dir.resolve().name}_{what}.{form}")
    chosen = [State(state) for state in states]
    done = export_run(run_dir, output, what=what, format=form, states=chosen, force=force)
    click.echo(f"{output}: {done.num_rows} {what}")
    if done.num_missing:
        click.echo(f"{done.num_missing} committed groups are not in {run_dir / 'rollouts'} any more", err=True)


@buffer_group.command()
@run_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=0, show_default="a free one", help="Port to listen on.")
@click.option("--token-file", type=click.Path(path_type=Path), help="Where the bearer token is, or is written to.")
def serve(
    file: Path, profile: str | None, assignments: tuple[str, ...], host: str, port: int, token_file: Path | None
) -> None:
    """Serve the buffer of the run that FILE (a run file) describes, over HTTP, for processes elsewhere."""
    from slime.config import RunConfig
    from slime.config_file import load_config

    config = load_config(file, RunConfig, profile=profile, assignments=assignments)
    from slime.serving import serve_run

    serve_run(config, base_dir=file.parent.resolve(), host=host, port=port, token_file=token_file)
