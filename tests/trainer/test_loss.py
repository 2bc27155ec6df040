"""The policy loss, term by term, against its formula in plain Python."""

import math

import pytest
import torch

from slime.config import LossConfig
from trainer.loss import LossInputs, make_loss, sft_loss
from trainer.measure import mismatch, over_trained_tokens


def inputs(advantage: float, *, old: float = -1.0, rollout: float = -1.0) -> LossInputs:
    return LossInputs(
        weights=torch.ones(1),
        advantages=torch.tensor([advantage]),
        rollout_logprobs=torch.tensor([rollout]),
        old_logprobs=torch.tensor([old]),
        cu_seqlens=torch.tensor([0, 1]),
    )


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.2, 0.79, 1.0, 1.27, 1.3, 5.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("importance_cap", [None, 2.0])
@pytest.mark.parametrize("drift", [-0.5, 1.5])
def test_loss_and_gradient_follow_the_formula(
    advantage: float, ratio: float, dual_clip: float | None, importance_cap: float | None, drift: float
) -> None:
    """Pins the sign, the asymmetric clip, the dual clip on the wrong side, an importance weight with a gradient."""
    config = LossConfig(dual_clip=dual_clip, importance_cap=importance_cap)
    logprob = torch.tensor([-1.0 + math.log(ratio)], requires_grad=True)
    loss, _ = make_loss(config)(logprob, torch.zeros(1), inputs(advantage, rollout=-1.0 - drift))
    loss.sum().backward()

    weight = 1.0 if importance_cap is None else min(math.exp(drift), importance_cap)
    clipped = min(max(ratio, 0.8), 1.28)
    unclipped_counts = -ratio * advantage >= -clipped * advantage
    expected, slope = (-ratio * advantage, -ratio * advantage) if unclipped_counts else (-clipped * advantage, 0.0)
    if dual_clip is not None and advantage < 0 and expected > -dual_clip * advantage:
        expected, slope = -dual_clip * advantage, 0.0
    assert loss.item() == pytest.approx(weight * expected, rel=1e-5)
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(weight * slope, rel=1e-5, abs=1e-6)


def test_metrics_count_trained_tokens_only() -> None:
    """Pins prompt tokens and padding that dilute every mean and hide the largest difference."""
    weights = torch.tensor([0.0, 0.5, 0.1, 0.0])
    old, rollout = torch.tensor([9.0, -1.0, -2.0, 9.0]), torch.tensor([0.0, -1.5, -2.25, 0.0])
    sums = over_trained_tokens(mismatch(old, rollout), weights_T=weights, loss=torch.tensor(1.0))
    assert sums["num_trained_tokens"] == 2
    assert sums["mismatch/logprob_abs_mean"] == pytest.approx(0.75)
    assert sums["mismatch/logprob_abs_max"] == 0.5
    assert sums["mismatch/kl"] == pytest.approx(sum(math.exp(d) - 1 - d for d in (0.5, 0.25)))


def test_sft_loss_is_the_negative_log_likelihood() -> None:
    """Pins the sign."""
    loss, _ = sft_loss(torch.tensor([-0.5]), torch.zeros(1), inputs(0.0))
    assert loss.tolist() == [0.5]
