"""Packing sequences of unequal length into micro-batches of bounded size, equally many on every rank.

The loss is a plain sum over all positions of all micro-batches (`slime.types.MicroBatch.weights`), so packing decides
speed and memory and nothing else.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slime.types import Float32, Int64, MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """One sequence of L tokens; the arrays have shape [L] and belong to the position that predicts."""

    tokens: Int64
    weights: Float32
    rollout_logprobs: Float32
    advantage: float = 0.0
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.tokens)


def pack(sequences: Sequence[TrainSequence], *, num_ranks: int, tokens_per_microbatch: int) -> list[list[MicroBatch]]:
    """Micro-batches of at most `tokens_per_microbatch` tokens for every rank: ``[rank][i]``, equally many each.

    A longer sequence gets a micro-batch of its own. Where there are fewer sequences than micro-batches, the rest are
    `filler`: ranks meet in collectives and must take the same number of steps.
    """
    lengths = [len(sequence) for sequence in sequences]
    bins = _bins(lengths, capacity=tokens_per_microbatch, multiple=num_ranks)
    microbatches = [join([sequences[i] for i in sorted(members)]) if members else filler() for members in bins]
    return _deal(microbatches, num_ranks=num_ranks)


def join(sequences: Sequence[TrainSequence]) -> MicroBatch:
    """Lay sequences one after the other."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    ends = np.cumsum(lengths)
    tokens = np.concatenate([sequence.tokens for sequence in sequences])
    targets = np.append(tokens[1:], 0)
    targets[ends - 1] = 0
    return MicroBatch(
        tokens=tokens,
        targets=targets,
        positions=np.arange(len(tokens), dtype=np.int64) - np.repeat(ends - lengths, lengths),
        cu_seqlens=np.append(np.int64(0), ends),
        weights=np.concatenate([sequence.weights for sequence in sequences]),
        advantages=np.repeat(np.array([s.advantage for s in sequences], dtype=np.float32), lengths),
        rollout_logprobs=np.concatenate([sequence.rollout_logprobs for sequence in sequences]),
        old_logprobs=None,
        temperatures=np.repeat(np.array([s.temperature for s in sequences], dtype=np.float32), lengths),
    )


def filler() -> MicroBatch:
    """A micro-batch that trains nothing: one token of weight 0, because a forward pass over no token is not defined."""
    zero = np.zeros(1, dtype=np.float32)
    return join([TrainSequence(tokens=np.zeros(1, dtype=np.int64), weights=zero, rollout_logprobs=zero)])


def _bins(lengths: Sequence[int], *, capacity: int, multiple: int) -> list[list[int]]:
    """Indices in bins, their number a multiple of `multiple`; evened out where the capacity allows it."""
    tight = _first_fit(lengths, capacity=capacity)
    num_bins = max(1, -(-len(tight) // multiple)) * multiple
    even = _even(lengths, num_bins=num_bins)
    if all(len(members) <= 1 or sum(lengths[i] for i in members) <= capacity for members in even):
        return even
    return tight + [[] for _ in range(num_bins - len(tight))]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _first_fit(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """First fit decreasing: at most 11/9 of the fewest bins possible, plus one."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in _longest_first(lengths):
        fitting = next((b for b, free in enumerate(room) if lengths[i] <= free), None)
        if fitting is None:
            bins.append([i])
            room.append(capacity - lengths[i])
        else:
            bins[fitting].append(i)
            room[fitting] -= lengths[i]
    return bins


def _even(lengths: Sequence[int], *, num_bins: int) -> list[list[int]]:
    """Longest first into the emptiest bin: within 4/3 of the most even split."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, b) for b in range(num_bins)]
    for i in _longest_first(lengths):
        load, b = heapq.heappop(loads)
        bins[b].append(i)
        heapq.heappush(loads, (load + lengths[i], b))
    return bins


def _deal(microbatches: list[MicroBatch], *, num_ranks: int) -> list[list[MicroBatch]]:
    """Deal to the ranks, largest first, always to the one with the least tokens that still has room."""
    each = len(microbatches) // num_ranks
    ranks: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    for microbatch in sorted(microbatches, key=lambda mb: -mb.num_tokens):
        open_ranks = [rank for rank in ranks if len(rank) < each]
        min(open_ranks, key=lambda rank: sum(mb.num_tokens for mb in rank)).append(microbatch)
    return ranks
