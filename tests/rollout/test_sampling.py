"""Seeded sampling, the function put into SGLang's sampler on CPUs."""

from __future__ import annotations

import torch

from rollout.rollout import sample_seed
from rollout.sglang_plugin import sample_with_seed


def draw(logprobs_BV: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return sample_with_seed(lambda: None, logprobs_BV, seeds, positions)[:, 0]


def test_draws_follow_the_distribution() -> None:
    """Pins that seeds replace randomness and nothing else: a biased draw would be a policy nobody trained."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    num = 200_000
    seeds = torch.arange(num) * 7919 % 2**31
    tokens = draw(probabilities.log().expand(num, -1), seeds, torch.arange(num) % 97)
    shares = torch.bincount(tokens, minlength=5) / num
    standard_error = (probabilities * (1 - probabilities) / num).sqrt()
    assert ((shares - probabilities).abs() <= 4.5 * standard_error).all(), shares


def test_neighbouring_positions_of_one_seed_are_independent() -> None:
    """Pins that the noise of a token does not follow from the one before: correlated noise repeats phrases."""
    num = 100_000
    uniform = torch.full((num, 4), 0.25).log()
    seeds = torch.arange(num)
    first, second = draw(uniform, seeds, torch.full((num,), 10)), draw(uniform, seeds, torch.full((num,), 11))
    pairs = torch.bincount(first * 4 + second, minlength=16) / num
    assert (pairs - 1 / 16).abs().max() < 4.5 * (1 / 16 * 15 / 16 / num) ** 0.5


def test_a_draw_does_not_depend_on_who_else_is_in_the_batch() -> None:
    """Pins that arrival order leaves no trace."""
    torch.manual_seed(0)
    logprobs = torch.randn(64, 50).log_softmax(-1)
    seeds, positions = torch.arange(64) + 5, torch.arange(64) % 9
    together = draw(logprobs, seeds, positions)
    alone = torch.cat([draw(logprobs[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(64)])
    assert torch.equal(together, alone)


def test_seeds_are_stable_and_differ_in_every_part() -> None:
    """Pins that another process or machine draws the same tokens, and that no two samples share their noise."""
    assert sample_seed(0, "p", salt="epoch 0", index=0) == 632563777
    keys = [(run, uid, salt, i) for run in (0, 1) for uid in "pq" for salt in ("epoch 0", "epoch 1") for i in (0, 1)]
    seeds = {sample_seed(run, uid, salt=salt, index=i) for run, uid, salt, i in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**31 for seed in seeds)
