"""`slime train`: the only place where the parts of a run meet.

check (seconds, nothing started) ─▶ cluster, engines and trainer side by side ─▶ last commit ─▶ loop ─▶ all closed
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from buffer.difficulty import Difficulty
from buffer.ledger import Ledger
from buffer.lock import RunLock
from rewards.pool import RewardPool
from rollout.client import GenerationClient
from rollout.rollout import Rollout
from slime.buffering import open_buffer
from slime.checkpoints import Checkpoints, export_model
from slime.cluster import Cluster
from slime.config import RunConfig
from slime.grading import Grader, first_objection, not_aborted
from slime.launch import spawn_engines, spawn_trainer, worker_spec
from slime.loop import BuildBatch, Run, first_failure, run_loop, unless
from slime.metrics import MetricsLog, evaluated_steps
from slime.placement import ColocatedPlacement
from slime.preflight import Checked, check_run, save_config
from slime.publisher import SharedMemoryPublisher, staging_directory
from slime.remote import RemoteEngine, RemoteTrainer
from slime.reporting import Reporting
from slime.serving import TOKEN_FILE, serve_beside
from slime.survivorship import Survivorship
from slime.view import RunView
from trainer.batch import build_batch

PLACEMENTS = {"colocated": ColocatedPlacement}
FORCED_EXIT = 130


def run_training(config: RunConfig, *, base_dir: Path) -> None:
    """Train as `config` says, or continue where an earlier start stopped.

    Args:
        base_dir: the run file's folder, which hooks are relative to.

    Raises:
        SlimeError: what went wrong; everything that was committed is kept.
        StopRun: a signal asked to stop; what was trained is committed.
    """
    checked = check_run(config, base_dir=base_dir)
    with RunLock(config.run_dir), ExitStack() as stack:
        save_config(config)
        ledger = stack.enter_context(Ledger(config.run_dir))
        if _is_complete(config, checked, ledger):
            click.echo(f"{config.run_dir} is complete: {config.num_steps} steps are trained. Raise num_steps to go on.")
            return
        difficulty = stack.enter_context(Difficulty(config.buffer.difficulty or config.run_dir / "difficulty.sqlite"))
        difficulty.absorb(config.run_dir)
        view = stack.enter_context(RunView(str(config.run_dir), num_steps=config.num_steps))
        log = stack.enter_context(MetricsLog(config.run_dir))
        books = Books(ledger=ledger, difficulty=difficulty, log=log)
        asyncio.run(_train(config, checked, base_dir=base_dir, books=books, view=view))


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """The files that a run records itself in."""

    ledger: Ledger
    difficulty: Difficulty
    log: MetricsLog


def _is_complete(config: RunConfig, checked: Checked, ledger: Ledger) -> bool:
    commit = ledger.last_commit()
    if commit is None or commit.step < config.num_steps:
        return False
    return commit.step > config.num_steps or not checked.split.eval or commit.step in evaluated_steps(config.run_dir)


async def _train(config: RunConfig, checked: Checked, *, base_dir: Path, books: Books, view: RunView) -> None:
    run_dir = config.run_dir.resolve()  # ranks have another working directory
    with _stop_on_signals(view) as stop:
        async with AsyncExitStack() as stack:
            view.phase("starting Ray, engines and trainer")
            processes = await unless(stop, stack.enter_async_context(_processes(config, base_dir=base_dir)))
            pool = await stack.enter_async_context(
                RewardPool(config.reward, base_dir=base_dir, log_path=config.run_dir / "logs" / "rewards.log")
            )
            client = await stack.enter_async_context(
                GenerationClient(processes.urls, token=processes.token, timeout_s=_request_timeout_s(config))
            )
            trainer = processes.trainer
            rollout = _rollout(client, config, checked)
            publisher = SharedMemoryPublisher(
                trainer=trainer, engines=processes.engines, directory=staging_directory(config.run_dir)
            )
            stack.callback(publisher.close)
            checkpoints = Checkpoints(run_dir / "checkpoints", trainer=trainer, keep=config.checkpoint.keep)
            step = await checkpoints.restore(books.ledger)
            books.log.truncate(step)
            buffer = open_buffer(config, books.ledger, checked.order, recover=True)
            if url := await stack.enter_async_context(serve_beside(config, buffer, books.ledger)):
                view.phase(f"taking rollouts at {url}; the token is in {config.run_dir / TOKEN_FILE}")
            reporting = Reporting(
                config,
                checked,
                rollout=rollout,
                pool=pool,
                survivorship=Survivorship(config.run_dir, step=step),
                difficulty=books.difficulty,
                log=books.log,
                view=view,
            )
            samples_per_step = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
            placement = PLACEMENTS[config.profile.placement.mode](engines=processes.engines, trainer=trainer)
            run = Run(
                num_steps=config.num_steps,
                groups_per_step=config.rollout.prompts_per_step,
                commit_every=config.checkpoint.every,
                buffer=buffer,
                rollout=rollout,
                grade=Grader(pool.grade, max_failure_rate=config.reward.max_failure_rate, window=samples_per_step),
                keep=first_objection(checked.filters),
                build_batch=_build_batch(config, checked),
                trainer=trainer,
                placement=placement,
                publisher=publisher,
                commit=partial(checkpoints.commit, buffer=buffer),
                evaluate=reporting.evaluate,
                on_phase=view.phase,
                on_step=reporting.step,
                continue_aborted=not_aborted not in checked.filters.values(),
            )
            await run_loop(run, first_step=step + 1, stop=stop)
            view.phase("writing the trained model")
            async with placement.training():
                await export_model(trainer, run_dir / "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """What runs beside the driver."""

    engines: list[RemoteEngine]
    urls: list[str]
    token: str
    trainer: RemoteTrainer


@asynccontextmanager
async def _processes(config: RunConfig, *, base_dir: Path) -> AsyncIterator[Processes]:
    """Start engines and trainer side by side, and end them, in this order, whatever happens between."""
    profile = config.profile
    token = secrets.token_hex(16)
    logs = (config.run_dir / "logs").resolve()
    spec = worker_spec(
        config.model.path,
        profile=profile,
        optimizer=config.trainer.optimizer,
        num_steps=config.num_steps,
        seed=config.seed,
        trainer=config.policy_trainer,
        base_dir=base_dir,
    )
    async with AsyncExitStack() as stack:
        cluster = Cluster(address=profile.placement.ray_address, num_devices=profile.num_devices, device=profile.device)
        stack.callback(cluster.close)
        engines = spawn_engines(cluster, config, log_dir=logs, token=token)
        for engine in engines:
            stack.push_async_callback(engine.close)
        try:
            async with asyncio.TaskGroup() as starts:
                ready = [starts.create_task(_start(engine, asleep=profile.device == "cuda")) for engine in engines]
                if profile.device == "cuda":  # engines measure free memory while they start, then give theirs back
                    await asyncio.gather(*ready)
                trainer = starts.create_task(spawn_trainer(cluster, spec, profile=profile))
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None
        stack.push_async_callback(trainer.result().close)
        yield Processes(engines=engines, urls=[url.result() for url in ready], token=token, trainer=trainer.result())


async def _start(engine: RemoteEngine, *, asleep: bool) -> str:
    url = await engine.start()
    if asleep:  # the first publish wakes it
        await engine.pause()
        await engine.offload()
    return url


def _request_timeout_s(config: RunConfig) -> float:
    """A request may wait for as many training steps as its tokens may be old; `take` watches that the run moves."""
    profile = config.profile
    return profile.engine.request_timeout_s + config.buffer.max_staleness * profile.trainer.step_timeout_s


def _rollout(client: GenerationClient, config: RunConfig, checked: Checked) -> Rollout:
    return Rollout(
        client,
        checked.tokenizer,
        config=config.rollout,
        seed=config.seed,
        deterministic=config.profile.engine.deterministic,
        generate=checked.generate,
    )


def _build_batch(config: RunConfig, checked: Checked) -> BuildBatch:
    return partial(
        build_batch,
        advantages=checked.advantages,
        aggregation=config.trainer.loss.aggregation,
        updates_per_step=config.trainer.updates_per_step,
        num_ranks=config.profile.trainer.num_ranks,
        tokens_per_microbatch=config.profile.trainer.tokens_per_microbatch,
        constant_tokens=config.rollout.max_response_tokens,
    )


@contextmanager
def _stop_on_signals(view: RunView) -> Iterator[asyncio.Event]:
    """The first SIGINT or SIGTERM sets the event; the second ends the process, and with it all it started, at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked() -> None:
        if stop.is_set():
            os._exit(FORCED_EXIT)
        stop.set()
        view.warn("stopping: committing what is trained; once more to leave at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
