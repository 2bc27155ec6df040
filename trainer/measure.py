"""Numbers about a step that do not depend on how it was split: from positions to one value, the same on every rank.

A name ending in ``_max`` is reduced by maximum over the trained tokens, ``loss/total`` by sum, every other by mean; the
``mismatch/`` ones by mean over the trained tokens whose rollout told a log-prob.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

from slime.types import Metrics

TOTAL = "loss/total"
COUNT = "num_trained_tokens"
KNOWN = "mismatch/known_share"


def mismatch(old_logprobs_T: Tensor, rollout_logprobs_T: Tensor) -> dict[str, Tensor]:
    """How far the trainer's log-probs are from the engine's, in nats, at each position.

    ``mismatch/kl`` averages to the k3 estimate of KL(rollout || train) (http://joschu.net/blog/kl-approx.html).

    Args:
        rollout_logprobs_T: NaN where the rollout told none; there is no difference there, and it counts in no mean.
    """
    known_T = ~rollout_logprobs_T.isnan()
    difference_T = torch.where(known_T, old_logprobs_T - rollout_logprobs_T, 0.0)
    return {
        KNOWN: known_T.float(),
        "mismatch/logprob_abs_mean": difference_T.abs(),
        "mismatch/logprob_abs_max": difference_T.abs(),
        "mismatch/kl": difference_T.expm1() - difference_T,
    }


def over_trained_tokens(measured: Mapping[str, Tensor], *, weights_T: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Reduce a micro-batch's positions to float64 scalars that `reduce_over_ranks` understands."""
    trained_T = weights_T > 0
    sums = {COUNT: trained_T.sum().double(), TOTAL: loss.detach().double()}
    for name, values_T in measured.items():
        kept = torch.where(trained_T, values_T.detach().double(), 0.0)
        sums[name] = kept.max() if name.endswith("_max") else kept.sum()
    return sums


def reduce_over_ranks(sums: Sequence[Mapping[str, Tensor]], *, group: distributed.ProcessGroup) -> Metrics:
    """One value a name, from the scalars of all micro-batches (at least one, all with the same names) of all ranks."""
    largest = {name: torch.stack([s[name] for s in sums]).max() for name in sums[0] if name.endswith("_max")}
    summed = {name: torch.stack([s[name] for s in sums]).sum() for name in sums[0] if name not in largest}
    largest = _all_reduce(largest, op=distributed.ReduceOp.MAX, group=group)
    summed = _all_reduce(summed, op=distributed.ReduceOp.SUM, group=group)
    count = max(1.0, float(summed.pop(COUNT)))
    total = {TOTAL: float(summed.pop(TOTAL))}
    means = {name: float(value) / count for name, value in summed.items()}
    if known := means.get(KNOWN):
        means |= {
            name: value / known for name, value in means.items() if name.startswith("mismatch/") and name != KNOWN
        }
    return total | means | {name: float(value) for name, value in largest.items()}


def _all_reduce(
    values: dict[str, Tensor], *, op: distributed.ReduceOp.RedOpType, group: distributed.ProcessGroup
) -> dict[str, Tensor]:
    if not values:
        return values
    stacked = torch.stack(list(values.values()))
    distributed.all_reduce(stacked, op=op, group=group)
    return dict(zip(values, stacked.unbind(), strict=True))
