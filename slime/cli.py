"""The command line. Nothing heavy is imported before a command has read its configuration."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import click

from slime.buffer_cli import buffer_group
from slime.cli_options import run_options
from slime.errors import SlimeError, StopRun

PACKAGES = ("slime", "rollout", "trainer", "buffer", "rewards")


class _Group(click.Group):
    """Reports SlimeError as a message, without a traceback: it already says what to do."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            _refuse_shadows()
            return super().invoke(ctx)
        except StopRun:
            sys.exit(130)
        except SlimeError as error:
            click.secho(f"{type(error).__name__}: ", fg="red", bold=True, nl=False, err=True)
            click.echo(str(error), err=True)
            sys.exit(1)


def _refuse_shadows() -> None:
    home = Path(__file__).parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).parent if spec and spec.origin else None
        if found != home / name:
            raise SlimeError(
                f"`import {name}` finds {found}, not slime's own {home / name}.\n"
                "Rename that file or folder, or start slime from another directory."
            )


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="slime-rl", prog_name="slime")
def main() -> None:
    """Asynchronous RL post-training for language models.

    \b
    slime train examples/reasoning/run.toml       train; the same command continues a stopped run
    slime report runs/demo                        draw its curves
    """


@main.command()
@run_options
def train(file: Path, profile: str | None, assignments: tuple[str, ...]) -> None:
    """Train with reinforcement learning, as FILE (a run file) says."""
    from slime.config import RunConfig
    from slime.config_file import load_config

    config = load_config(file, RunConfig, profile=profile, assignments=assignments)
    from slime.run import run_training

    run_training(config, base_dir=file.parent.resolve())


@main.command()
@run_options
def sft(file: Path, profile: str | None, assignments: tuple[str, ...]) -> None:
    """Fine-tune on given answers, as FILE says, and write a Hugging Face directory."""
    from slime.config import SftRunConfig
    from slime.config_file import load_config

    config = load_config(file, SftRunConfig, profile=profile, assignments=assignments)
    from slime.sft import run_sft

    run_sft(config)


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
def report(run_dir: Path) -> None:
    """Draw the curves of RUN_DIR as a picture and print a summary."""
    from slime.report import summary, write_report

    click.echo(summary(run_dir))
    click.echo(f"curves: {write_report(run_dir)}")


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--step", type=int, help="Default: the last step.")
@click.option("--limit", default=8, show_default=True, help="Samples to print.")
def view(run_dir: Path, step: int | None, limit: int) -> None:
    """Print the samples of RUN_DIR as text."""
    from slime.view import print_samples

    print_samples(run_dir, step=step, limit=limit)


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
def audit(run_dir: Path) -> None:
    """Account for every prompt RUN_DIR issued; exits with 1 if the sums do not hold."""
    from buffer.books.audit import audit_run

    result = audit_run(run_dir)
    click.echo(str(result))
    sys.exit(0 if result.holds else 1)


main.add_command(buffer_group)


@main.command()
@click.argument("what", type=click.Choice(["rollout", "train", "publish", "buffer", "buffer-chaos"]))
@click.option("--model", type=click.Path(path_type=Path), help="Hugging Face directory. Default: a tiny random one.")
@click.option("--prompts", default=10_000_000, show_default=True, help="buffer: rows of the large prompt file.")
@click.option("--kills", default=1_000, show_default=True, help="buffer-chaos: how often the service is killed.")
@click.option("--seed", default=0, show_default=True, help="buffer-chaos: of every choice.")
def bench(what: str, model: Path | None, prompts: int, kills: int, seed: int) -> None:
    """Measure slime against the limit of the machine, both in one run.

    \b
    rollout, train, publish     engines, trainer, and the weights' way between them
    buffer                      the data buffer against SQLite and a plain web service
    buffer-chaos                no figures: kill the buffer's service over and over, and check what clients saw
    """
    match what:
        case "buffer":
            from slime.buffer_bench import bench_buffer

            bench_buffer(num_prompts=prompts)
        case "buffer-chaos":
            from slime.buffer_bench import bench_chaos

            bench_chaos(num_kills=kills, seed=seed)
        case _:
            from slime.bench import run_bench

            run_bench(what, model=model)
