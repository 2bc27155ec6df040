"""Supervised fine-tuning batches: prompt and response token ids, the mean negative log-likelihood of all responses.

The same micro-batches and the same worker as RL; only the per-token loss differs (`trainer.loss.sft_loss`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slime.types import TrainBatch
from trainer.packing import TrainSequence, pack


@dataclass(frozen=True, slots=True, kw_only=True)
class SftRow:
    """One example: the response is learned, the prompt is given."""

    prompt_tokens: Sequence[int]
    response_tokens: Sequence[int]

    @property
    def num_targets(self) -> int:
        """Response tokens that a position predicts: all, but for the first token of a sequence without a prompt."""
        return len(self.response_tokens) - (0 if self.prompt_tokens else min(1, len(self.response_tokens)))


def build_sft_batch(rows: Sequence[SftRow], *, num_ranks: int, tokens_per_microbatch: int) -> TrainBatch:
    """One update over `rows`; every response token weighs 1 / (number of response tokens in the batch).

    Rows with nothing to learn are left out.
    """
    learned = [row for row in rows if row.num_targets > 0]
    num_targets = sum(row.num_targets for row in learned)
    sequences = [_sequence(row, weight=1 / num_targets) for row in learned]
    metrics = {"batch/trained_tokens": float(num_targets), "batch/left_out_samples": float(len(rows) - len(learned))}
    packed = pack(sequences, num_ranks=num_ranks, tokens_per_microbatch=tokens_per_microbatch)
    return TrainBatch(updates=[packed], metrics=metrics)


def _sequence(row: SftRow, *, weight: float) -> TrainSequence:
    tokens = np.array([*row.prompt_tokens, *row.response_tokens], dtype=np.int64)
    weights = np.zeros(len(tokens), dtype=np.float32)
    weights[-1 - row.num_targets : -1] = weight
    return TrainSequence(tokens=tokens, weights=weights, rollout_logprobs=np.zeros(len(tokens), dtype=np.float32))
