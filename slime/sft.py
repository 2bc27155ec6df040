"""`slime sft`: supervised fine-tuning with the trainer that RL uses."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from math import nan

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from buffer.prompts.dataset import read_sft_rows
from rollout.tokenizer import Tokenizer
from slime.cluster import Cluster
from slime.config import SftRunConfig
from slime.errors import ConfigError, DataError
from slime.launch import spawn_trainer, worker_spec
from trainer.hf_config import read_model_config
from trainer.megatron_options import check_megatron_options
from trainer.sft import SftRow, build_sft_batch

logger = logging.getLogger(__name__)


def run_sft(config: SftRunConfig) -> None:
    """Fine-tune and write a Hugging Face directory.

    Raises:
        SlimeError: what is wrong with the model, the data or the run.
    """
    if config.sft.output.exists():
        raise ConfigError(
            f"sft.output = {config.sft.output}: exists already.\nRemove it, or give another with --set sft.output=PATH."
        )
    read_model_config(config.model.path)
    check_megatron_options(config.profile.trainer.megatron)
    rows = _tokenize(config)
    asyncio.run(_fine_tune(config, rows))


def _tokenize(config: SftRunConfig) -> list[SftRow]:
    tokenizer = Tokenizer(str(config.model.path))
    end = [tokenizer.eos_token_ids[0]]
    rows = [
        SftRow(prompt_tokens=tokenizer.encode_prompt(row.prompt), response_tokens=tokenizer.encode(row.response) + end)
        for row in read_sft_rows(config.sft.data)
    ]
    fitting = [row for row in rows if len(row.prompt_tokens) + len(row.response_tokens) <= tokenizer.max_length]
    if len(fitting) < len(rows):
        logger.warning("left out %d of %d rows: longer than the model's context", len(rows) - len(fitting), len(rows))
    if not fitting:
        raise DataError(
            f"{config.sft.data}: none of its {len(rows)} rows fits the model's context of {tokenizer.max_length} "
            "tokens.\nShorten the rows, or use a model with a longer context."
        )
    return fitting


async def _fine_tune(config: SftRunConfig, rows: Sequence[SftRow]) -> None:
    profile = config.profile
    spec = worker_spec(
        config.model.path,
        profile=profile,
        optimizer=config.sft.optimizer,
        num_steps=config.sft.num_steps,
        seed=config.seed,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with AsyncExitStack() as stack:
        progress = stack.enter_context(Progress(*columns))
        task = progress.add_task("sft: starting", total=config.sft.num_steps)
        cluster = Cluster(
            address=profile.placement.ray_address, num_devices=profile.trainer.num_ranks, device=profile.device
        )
        stack.callback(cluster.close)
        trainer = await spawn_trainer(cluster, spec, profile=profile)
        stack.push_async_callback(trainer.close)
        batches = _batches(rows, size=config.sft.batch_size, seed=config.seed)
        for _, batch in zip(range(config.sft.num_steps), batches, strict=False):
            metrics = await trainer.sft_step(
                build_sft_batch(
                    batch,
                    num_ranks=profile.trainer.num_ranks,
                    tokens_per_microbatch=profile.trainer.tokens_per_microbatch,
                )
            )
            progress.update(task, advance=1, description=f"sft: loss {metrics.get('loss/sft', nan):.3f}")
        await trainer.export(str(config.sft.output))
    progress.console.print(f"sft: {config.sft.num_steps} steps; model in {config.sft.output}", soft_wrap=True)


def _batches(rows: Sequence[SftRow], *, size: int, seed: int) -> Iterator[list[SftRow]]:
    """Batches without end, each epoch in an order of its own; an epoch's last rows open the next batch."""
    order: list[int] = []
    epoch = 0
    while True:
        while len(order) < size:
            following = list(range(len(rows)))
            random.Random(f"{seed}/{epoch}").shuffle(following)
            order += following
            epoch += 1
        yield [rows[index] for index in order[:size]]
        order = order[size:]
