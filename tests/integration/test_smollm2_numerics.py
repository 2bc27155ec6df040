"""SmolLM2's real weights on natural text: SGLang, Megatron and transformers compute one model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch

from rollout.tokenizer import Tokenizer
from tests.examples.loading import EXAMPLES
from tests.rollout.engines import TOKEN, make_engine

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
MODEL = EXAMPLES / "smollm2" / "model"
TEXT = """\
The lighthouse keeper had not seen a ship for eleven days. Every evening he climbed the hundred and twelve steps, wiped
the salt from the glass, lit the lamp, and wrote one line into the book: wind from the west, sea rough, nothing to
report. On the twelfth day he wrote the line before he climbed the stairs, because he was sure of it. That night a small
boat came in under the light. Its skipper, an old woman with a dog, asked him why the book already said that nothing had
happened. He thought about it for a while. Then he crossed out the line, made some tea for both of them, and asked her
where she had come from. She had sailed from an island in the north, she said, where people count the days by the whales
that pass, and a day without a whale is not a day at all.
"""


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    subprocess.run([sys.executable, EXAMPLES / "smollm2" / "prepare.py"], check=True, timeout=280)
    return Tokenizer(str(MODEL)).encode(TEXT)


def transformers_logprobs(tokens: list[int], dtype: torch.dtype) -> np.ndarray:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)
    return logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def megatron_logprobs(tokens: list[int]) -> np.ndarray:
    from trainer.logprobs import token_logprobs
    from trainer.model import build_model, make_row

    model = build_model(MODEL, precision="bf16")
    positions = np.arange(len(tokens))
    row = make_row(np.array([0, len(tokens)]), positions, device=torch.device("cpu"))
    ids = torch.tensor(tokens)
    with torch.no_grad():
        logits = model(ids[None], torch.from_numpy(positions)[None], None, packed_seq_params=row)[0]
        logprobs, _ = token_logprobs(logits, ids.roll(-1), torch.ones(len(tokens)))
    return logprobs[:-1].numpy()


async def sglang_logprobs(tokens: list[int], directory: Path) -> np.ndarray:
    engine = make_engine(MODEL, directory)
    try:
        url = await engine.start()
        body = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session,
            session.post(f"{url}/generate", json=body) as response,
        ):
            reply = await response.json()
    finally:
        await engine.close()
    return np.array([logprob for logprob, *_ in reply["meta_info"]["input_token_logprobs"][1:]])


async def test_all_agree_on_natural_text_within_the_noise_of_bf16(
    tokens: list[int], tmp_path: Path, process_group: None
) -> None:
    """BF16 itself moves log-probs; an engine that moves them further computes something else."""
    exact = transformers_logprobs(tokens, torch.float32)
    noise = np.abs(transformers_logprobs(tokens, torch.bfloat16) - exact).mean()
    megatron, sglang = megatron_logprobs(tokens), await sglang_logprobs(tokens, tmp_path)
    off = {"megatron": np.abs(megatron - exact).mean(), "sglang": np.abs(sglang - exact).mean()}
    apart = np.abs(megatron - sglang).mean()
    print(f"mean |logprob difference|: bf16 noise {noise:.4f}, {off}, sglang to megatron {apart:.4f}")
    assert 0.0 < noise < 0.1
    assert max(off.values()) < 1.5 * noise
    assert apart < 2.0 * noise
