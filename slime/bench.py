"""`slime bench`: slime beside the limit of the machine, both measured in one run.

Ratios, not times: the machine may be shared, and its noise meets both sides alike.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rollout.engine import SGLangEngine
from slime.config import EngineConfig, Profile, RolloutConfig
from slime.config_file import load_profile
from slime.publisher import staging_directory
from slime.types import Prompt

if TYPE_CHECKING:
    from torch.nn import Module

TINY = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2}
MEDIUM = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
PUBLISH_ROUNDS = 5


def run_bench(what: str, *, model: Path | None) -> None:
    """Measure ``rollout``, ``train`` or ``publish`` on this machine's profile and print the ratio with its limit.

    Args:
        model: a Hugging Face directory; by default a random one, tiny but for ``publish`` (126 M parameters).
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    profile = load_profile(None)
    with tempfile.TemporaryDirectory() as scratch:
        shape = MEDIUM if what == "publish" else TINY
        path = model or random_model(Path(scratch) / "model", **shape)
        match what:
            case "rollout":
                asyncio.run(_rollout(path, profile, log_path=Path(scratch) / "engine.log"))
            case "train":
                _train(path, profile)
            case _:
                asyncio.run(_publish(path, profile, scratch=Path(scratch)))


def random_model(path: Path, **shape: int) -> Path:
    """A Qwen3 with random weights and a tokenizer of whole numbers, as a Hugging Face directory."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "<e>", "+", "=", *map(str, range(187))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<e>")
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(words),
        num_key_value_heads=1 if shape["num_attention_heads"] % 3 else 3,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=2,
        **shape,
    )
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def _engine(model: Path, profile: Profile, *, log_path: Path, token: str) -> SGLangEngine:
    config = EngineConfig(max_running_requests=profile.engine.max_running_requests, sglang=profile.engine.sglang)
    threads = profile.threads_per_process
    return SGLangEngine(
        str(model), config=config, device=profile.device, threads=threads, log_path=str(log_path), token=token, index=0
    )


async def _rollout(model: Path, profile: Profile, *, log_path: Path) -> None:
    from rollout.bench import LIMIT, bench_rollout
    from rollout.tokenizer import Tokenizer

    token = secrets.token_hex(16)
    engine = _engine(model, profile, log_path=log_path, token=token)
    try:
        url = await engine.start()
        prompts = [Prompt(uid=str(i), text=f"{i} + {i + 1} = {i + 2} + {i + 3} =") for i in range(16)]
        config = RolloutConfig(samples_per_prompt=16, max_response_tokens=32)
        result = await bench_rollout(url, token=token, tokenizer=Tokenizer(str(model)), prompts=prompts, config=config)
    finally:
        await engine.close()
    click.echo(f"rollout path   {result.rollout_tokens_per_s:10,.0f} tokens/s")
    click.echo(f"bare client    {result.bare_tokens_per_s:10,.0f} tokens/s, same engine, same requests")
    click.echo(f"ratio          {result.ratio:10.2f}   (limit: at least {LIMIT:.2f})")


def _train(model: Path, profile: Profile) -> None:
    from trainer.bench import LIMIT, bench_train

    _alone(profile)
    result = bench_train(model)
    click.echo(f"trainer        {result.tokens_per_s:10,.0f} tokens/s, forward + backward of one packed batch")
    click.echo(
        f"plain PyTorch  {result.plain_tokens_per_s:10,.0f} tokens/s, transformers with {result.plain_attention}"
    )
    click.echo(f"ratio          {result.ratio:10.2f}   (limit: at least {LIMIT:.2f})")


def _alone(profile: Profile) -> None:
    """Make this process the only training rank."""
    import torch

    from trainer.model import initialize_distributed, local_device

    torch.set_num_threads(profile.threads_per_process)
    device = local_device(profile.device)
    initialize_distributed(rank=0, world_size=1, address="127.0.0.1", port=0, timeout_s=60, seed=0, device=device)


async def _publish(model: Path, profile: Profile, *, scratch: Path) -> None:
    from trainer.model import build_model

    _alone(profile)
    policy = build_model(model, precision="bf16")
    token = secrets.token_hex(16)
    engine = _engine(model, profile, log_path=scratch / "engine.log", token=token)
    with _staging(scratch) as directory:
        try:
            await engine.start()
            rounds = [await _publish_once(engine, policy, directory, version=i) for i in range(PUBLISH_ROUNDS)]
        finally:
            await engine.close()
    num_bytes = rounds[0][0]
    stage_s, load_s, copy_s = (min(times) for times in list(zip(*rounds, strict=True))[1:])
    size = f"{num_bytes / 2**20:,.0f} MiB"
    click.echo(f"stage          {stage_s * 1e3:10.1f} ms   {size} with a checksum of every tensor")
    click.echo(f"load           {load_s * 1e3:10.1f} ms   pause, verify, load, resume")
    click.echo(f"copy           {copy_s * 1e3:10.1f} ms   a plain write of the same bytes")
    click.echo(f"ratio          {(stage_s + load_s) / copy_s:10.1f}   publish / copy (one copy is the limit: 1.0)")


async def _publish_once(
    engine: SGLangEngine, policy: Module, directory: Path, *, version: int
) -> tuple[int, float, float, float]:
    from slime.weights import read_manifest
    from trainer.hf_io import named_hf_tensors
    from trainer.staging import time_stage

    stage_s, copy_s = time_stage(lambda: named_hf_tensors(policy), directory=directory)
    manifest = directory / "manifest.json"
    start = time.perf_counter()
    await engine.pause()
    await engine.load_weights(str(manifest), version=version)
    await engine.resume()
    return read_manifest(manifest).num_bytes, stage_s, time.perf_counter() - start, copy_s


@contextmanager
def _staging(scratch: Path) -> Iterator[Path]:
    import shutil

    directory = staging_directory(scratch)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
