"""Tokens a second of the whole rollout path, against a bare HTTP client with the same requests to the same engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import orjson

from rollout.client import GenerationClient, request_body
from rollout.rollout import Rollout
from rollout.tokenizer import Tokenizer
from slime.config import RolloutConfig
from slime.types import Lease, Prompt

LIMIT = 0.90
"""The rollout path is expected to reach this share of the bare client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBench:
    """Medians over the repeats."""

    rollout_tokens_per_s: float
    """Rollout.generate: tokenising, requests, checks, decoding, samples."""
    bare_tokens_per_s: float
    ratio: float
    """First over second; see LIMIT."""


async def bench_rollout(
    url: str,
    *,
    token: str,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    repeats: int = 5,
    timeout_s: float = 600.0,
) -> RolloutBench:
    """Measure both, alternating, after one discarded round of each.

    Args:
        url: of one engine.
        token: its bearer token.
        tokenizer: of the model it serves.
        prompts: all are rolled out at once, `config.samples_per_prompt` samples each.
        config: lengths and temperature.
        repeats: measured rounds of each.
        timeout_s: deadline of one request.
    """
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    bodies = [
        request_body(
            tokenizer.encode_prompt(prompt),
            max_new_tokens=config.max_response_tokens,
            temperature=config.temperature,
            num_samples=config.samples_per_prompt,
            seeds=None,
            stop_token_ids=tokenizer.eos_token_ids,
        )
        for prompt in prompts
    ]
    ours: list[float] = []
    bare: list[float] = []
    async with (
        GenerationClient([url], token=token, timeout_s=timeout_s) as client,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers, timeout=timeout) as session,
    ):
        rollout = Rollout(client, tokenizer, config=config, seed=0, deterministic=False)
        for _ in range(repeats + 1):
            bare.append(await _bare_rate(session, url, bodies))
            ours.append(await _rollout_rate(rollout, prompts))
    return _medians(ours[1:], bare[1:])


async def _rollout_rate(rollout: Rollout, prompts: Sequence[Prompt]) -> float:
    leases = [Lease(ordinal=i, epoch=0, attempt=0, prompt=prompt) for i, prompt in enumerate(prompts)]
    start = time.perf_counter()
    groups = await asyncio.gather(*map(rollout.generate, leases))
    elapsed_s = time.perf_counter() - start
    return sum(sample.num_response_tokens for group in groups for sample in group.samples) / elapsed_s


async def _bare_rate(session: aiohttp.ClientSession, url: str, bodies: Sequence[bytes]) -> float:
    async def post(body: bytes) -> bytes:
        async with session.post(url + "/generate", data=body) as response:
            response.raise_for_status()
            return await response.read()

    start = time.perf_counter()
    contents = await asyncio.gather(*map(post, bodies))
    elapsed_s = time.perf_counter() - start
    replies = [reply for content in contents for reply in _as_list(orjson.loads(content))]
    num_tokens: int = sum(reply["meta_info"]["completion_tokens"] for reply in replies)
    return num_tokens / elapsed_s


def _as_list(reply: object) -> list[dict[str, dict[str, int]]]:
    return reply if isinstance(reply, list) else [reply]  # type: ignore[list-item]  # a lone sample is not wrapped


def _medians(ours: list[float], bare: list[float]) -> RolloutBench:
    """Medians of each, and of the ratio of neighbouring rounds: load from elsewhere then falls out."""
    return RolloutBench(
        rollout_tokens_per_s=sorted(ours)[len(ours) // 2],
        bare_tokens_per_s=sorted(bare)[len(bare) // 2],
        ratio=sorted(a / b for a, b in zip(ours, bare, strict=True))[len(ours) // 2],
    )
