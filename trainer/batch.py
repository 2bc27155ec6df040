"""From graded groups to one training step: `build_batch`.

The step's loss is ``sum(weights * per_token_loss)`` over every position of every micro-batch of every rank. The weights
hold the whole aggregation; its denominators are counted here, over an update, before anything is split. So the gradient
is the same whatever the number of ranks, the token budget, the packing or the order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from slime.errors import HookError
from slime.protocols import AdvantageHook
from slime.types import Group, Metrics, Sample, Score, Status, TrainBatch
from trainer.advantage import rollout_rewards
from trainer.packing import TrainSequence, pack

Aggregation = Literal["sequence", "token", "prompt", "constant"]
Advantages = list[list[float]]


def build_batch(
    groups: Sequence[Group],
    *,
    advantages: AdvantageHook,
    aggregation: Aggregation,
    updates_per_step: int,
    num_ranks: int,
    tokens_per_microbatch: int,
    version: int,
    constant_tokens: int | None = None,
) -> TrainBatch:
    """Turn groups into packed micro-batches for every update and rank.

    Samples without a score, and those of which nothing was sampled, are left out and count in no denominator. Whole
    groups go to an update; the first updates get one more where they do not divide evenly.

    Args:
        advantages: called once with all groups.
        version: the weights about to be trained; staleness is measured against it.
        constant_tokens: the fixed length that ``aggregation="constant"`` divides every rollout by.

    Raises:
        HookError: `advantages` returned another shape than it was given, or a number that is not finite.
    """
    values = _checked(advantages(groups), groups=groups)
    updates = []
    for part in np.array_split(np.arange(len(groups)), updates_per_step):
        sequences = _sequences(
            [groups[i] for i in part],
            advantages=[values[i] for i in part],
            aggregation=aggregation,
            constant_tokens=constant_tokens,
        )
        updates.append(pack(sequences, num_ranks=num_ranks, tokens_per_microbatch=tokens_per_microbatch))
    return TrainBatch(updates=updates, metrics=measure(groups, version=version))


def measure(groups: Sequence[Group], *, version: int) -> Metrics:
    """What the groups of a step are like: rewards over rollouts, lengths and staleness over samples."""
    samples = [sample for group in groups for sample in group.samples]
    trained = [sample for sample in samples if _is_trained(sample)]
    rewards_by_group = [list(rollout_rewards(group).values()) for group in groups]
    lengths = [sample.num_response_tokens for sample in samples]
    staleness = [version - sample.oldest_version for sample in trained]
    return {
        **_mean_std("reward", [reward for rewards in rewards_by_group for reward in rewards]),
        **_reward_parts(trained),
        "batch/informative_share": _mean([float(len(set(rewards)) > 1) for rewards in rewards_by_group]),
        "batch/left_out_samples": float(len(samples) - len(trained)),
        "batch/trained_tokens": float(sum(sum(sample.loss_mask[1:]) for sample in trained)),
        "rollout/response_tokens_mean": _mean(lengths),
        "rollout/response_tokens_max": float(max(lengths, default=0)),
        "rollout/truncated_share": _mean([float(sample.status is Status.TRUNCATED) for sample in samples]),
        "staleness/mean": _mean(staleness),
        "staleness/max": float(max(staleness, default=0)),
    }


def _is_trained(sample: Sample) -> bool:
    # The first token has no position before it that could predict it.
    return isinstance(sample.verdict, Score) and any(sample.loss_mask[1:])


def _sequences(
    groups: Sequence[Group], *, advantages: Advantages, aggregation: Aggregation, constant_tokens: int | None
) -> list[TrainSequence]:
    trained = [
        (group, sample, advantage)
        for group, row in zip(groups, advantages, strict=True)
        for sample, advantage in zip(group.samples, row, strict=True)
        if _is_trained(sample)
    ]
    weigh = _token_weight([(group, sample) for group, sample, _ in trained], aggregation, constant_tokens)
    return [_sequence(sample, advantage=advantage, weight=weigh(group, sample)) for group, sample, advantage in trained]


def _sequence(sample: Sample, *, advantage: float, weight: float) -> TrainSequence:
    """Move what belongs to token t + 1 to position t, which predicts it."""
    mask = np.array([*sample.loss_mask[1:], 0], dtype=np.float32)
    logprobs = np.array([*sample.rollout_logprobs[1:], 0.0], dtype=np.float32)
    return TrainSequence(
        tokens=np.array(sample.tokens, dtype=np.int64),
        weights=mask * np.float32(weight),
        rollout_logprobs=np.where(mask > 0, logprobs, np.float32(0)),
        advantage=advantage,
        temperature=sample.temperature,
    )


def _token_weight(
    trained: Sequence[tuple[Group, Sample]], aggregation: Aggregation, constant_tokens: int | None
) -> Callable[[Group, Sample], float]:
    """The weight of each token of a sample, from counts over the whole update."""
    in_rollout: Counter[tuple[str, str]] = Counter()
    in_group: Counter[str] = Counter()
    for group, sample in trained:
        num_tokens = sum(sample.loss_mask[1:])
        in_rollout[group.id, sample.rollout_id] += num_tokens
        in_group[group.id] += num_tokens
    match aggregation:
        case "sequence":
            return lambda group, sample: 1 / (len(in_rollout) * in_rollout[group.id, sample.rollout_id])
        case "token":
            return lambda group, sample: 1 / in_group.total()
        case "prompt":
            return lambda group, sample: 1 / (len(in_group) * in_group[group.id])
        case "constant":
            if constant_tokens is None:
                raise ValueError('aggregation "constant" needs constant_tokens, the length it divides by')
            return lambda group, sample: 1 / (len(in_rollout) * constant_tokens)


def _checked(values: Advantages, *, groups: Sequence[Group]) -> Advantages:
    got, expected = [len(row) for row in values], [len(group.samples) for group in groups]
    if got != expected:
        raise HookError(
            f"trainer.advantage.fn returned {got} advantages for groups of {expected} samples: return one list a group "
            "with one number a sample (0.0 trains nothing), or remove the key to use the built-in one"
        )
    for group, row in zip(groups, values, strict=True):
        if not all(map(math.isfinite, row)):
            raise HookError(
                f"trainer.advantage.fn returned {row} for group {group.id}: return finite numbers (0.0 trains "
                "nothing), or remove the key to use the built-in one"
            )
    return values


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _mean_std(area: str, values: Sequence[float]) -> Metrics:
    return {f"{area}/mean": _mean(values), f"{area}/std": float(np.std(values)) if values else 0.0}


def _reward_parts(samples: Sequence[Sample]) -> Metrics:
    parts: dict[str, list[float]] = {}
    for sample in samples:
        if isinstance(sample.verdict, Score):
            for name, value in sample.verdict.parts.items():
                parts.setdefault(name, []).append(value)
    return {f"reward_part/{name}": _mean(values) for name, values in sorted(parts.items())}
