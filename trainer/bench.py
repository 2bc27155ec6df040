"""How fast training is beside plain PyTorch: trained tokens a second of both, interleaved in one run.

Both sides do a forward pass, the log-probabilities of all targets, and a backward pass over the same sequences with the
same weights. Plain PyTorch is Hugging Face transformers on a right-padded batch, with the faster of its two attention
implementations for this shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from trainer.logprobs import token_logprobs
from trainer.model import DTYPES, PolicyModel, Precision, build_model, make_row

LIMIT = 0.80
"""Least ratio that is accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBench:
    """Each side's fastest round: noise only ever adds time."""

    tokens_per_s: float
    plain_tokens_per_s: float
    plain_attention: str
    """Which of transformers' implementations was the faster: ``sdpa`` or ``eager``."""

    @property
    def ratio(self) -> float:
        return self.tokens_per_s / self.plain_tokens_per_s


def bench_train(
    model: Path,
    *,
    precision: Precision = "bf16",
    num_sequences: int = 256,
    mean_length: int = 35,
    num_rounds: int = 7,
    budget_s: float = 120.0,
    seed: int = 0,
) -> TrainBench:
    """Measure a Hugging Face directory. Needs `initialize_distributed`.

    Lengths are uniform within 40 % of `mean_length`. The round that exceeds `budget_s` is the last.
    """
    policy = build_model(model, precision=precision)
    device = next(policy.parameters()).device
    plain = {name: _plain_model(model, precision, attention=name).to(device) for name in ("sdpa", "eager")}
    sequences = _sequences(policy.hf_config.vocab_size, num_sequences, mean_length, seed=seed, device=device)
    contestants = {"ours": _packed_step(policy, sequences)}
    contestants |= {name: _padded_step(module, sequences) for name, module in plain.items()}
    seconds = {name: min(times) for name, times in _interleave(contestants, num_rounds, budget_s=budget_s).items()}
    num_tokens = sum(len(sequence) for sequence in sequences)
    fastest = min(plain, key=lambda name: seconds[name])
    return TrainBench(
        tokens_per_s=num_tokens / seconds["ours"],
        plain_tokens_per_s=num_tokens / seconds[fastest],
        plain_attention=fastest,
    )


def _interleave(
    contestants: dict[str, Callable[[], None]], num_rounds: int, *, budget_s: float
) -> dict[str, list[float]]:
    """Wall times of each contestant, one after the other in every round, so that noise meets all alike."""
    for step in contestants.values():
        step()  # warms up
    times: dict[str, list[float]] = {name: [] for name in contestants}
    deadline = time.perf_counter() + budget_s
    for _ in range(num_rounds):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() > deadline:
            break
    return times


def _packed_step(policy: PolicyModel, sequences: list[Tensor]) -> Callable[[], None]:
    lengths = np.array([len(sequence) for sequence in sequences])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.concatenate([np.arange(length) for length in lengths])
    tokens = torch.cat(sequences)

    def step() -> None:
        row = make_row(cu_seqlens, positions, device=tokens.device)
        logits = policy(tokens[None], row.positions[None], attention_mask=None, packed_seq_params=row)[0]
        logprobs, _ = token_logprobs(logits, tokens.roll(-1), torch.ones(len(tokens), device=tokens.device))
        _backward(policy, logprobs)

    return step


def _padded_step(model: Any, sequences: list[Tensor]) -> Callable[[], None]:
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    targets = tokens.roll(-1, dims=1).flatten()

    def step() -> None:
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
        _backward(model, loss)

    return step


def _backward(model: torch.nn.Module, per_token: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(per_token.sum())
    if per_token.is_cuda:
        torch.cuda.synchronize()


def _sequences(
    vocab_size: int, num_sequences: int, mean_length: int, *, seed: int, device: torch.device
) -> list[Tensor]:
    random = np.random.default_rng(seed)
    spread = round(0.4 * mean_length)
    lengths = random.integers(mean_length - spread, mean_length + spread, size=num_sequences, endpoint=True)
    return [torch.from_numpy(random.integers(0, vocab_size, size=length)).to(device) for length in lengths]


def _plain_model(path: Path, precision: Precision, *, attention: str) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPES[precision], attn_implementation=attention
    )
    return model.train()
