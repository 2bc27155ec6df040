"""Losses of one token. T positions of one packed row.

A loss function returns the loss of every position; it is the worker that takes ``sum(weights * loss)``. So no loss, a
user's own included, can depend on how the batch was split.

    policy loss   max(-rho A, -clip(rho, 1 - low, 1 + high) A),   rho = exp(logprob - old_logprob)
    dual clip     for A < 0 at most -c A (arXiv 1912.09729)
    truncated importance weight    min(exp(old_logprob - rollout_logprob), C), without gradient

Clip-higher (low < high) is DAPO's, arXiv 2503.14476. There is no KL term and no reference model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from slime.config import LossConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss may know of a packed row; fp32 [T] but for `cu_seqlens`, none of it carries a gradient."""

    weights: Tensor
    """0 where nothing is trained."""
    advantages: Tensor
    rollout_logprobs: Tensor
    """As the engine reported them, or `old_logprobs` where it reported none; 0 where nothing is trained."""
    old_logprobs: Tensor
    """The trainer's own before the first update of this step."""
    cu_seqlens: Tensor
    """int64 [num_sequences + 1], for losses over whole sequences."""


TokenLoss = tuple[Tensor, Mapping[str, Tensor]]
"""Loss of every position, fp32 [T], and what else to report: [T] each, averaged over the trained tokens."""


class LossFunction(Protocol):
    """A loss, built in or a user's hook ``"./file.py:name"``."""

    def __call__(self, logprobs: Tensor, entropy: Tensor, inputs: LossInputs) -> TokenLoss:
        """`logprobs` [T] carries the gradient; so does `entropy` [T]."""
        ...


def make_loss(config: LossConfig) -> LossFunction:
    """The loss function that a run's configuration names."""
    return partial(policy_loss, config=config)


def policy_loss(logprobs: Tensor, entropy: Tensor, inputs: LossInputs, *, config: LossConfig) -> TokenLoss:
    """The clipped policy gradient loss of the module's formula."""
    advantages_T = inputs.advantages
    ratio_T = (logprobs - inputs.old_logprobs).exp()
    clipped_ratio_T = ratio_T.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss_T = torch.maximum(-ratio_T * advantages_T, -clipped_ratio_T * advantages_T)
    measured = {
        "loss/entropy": entropy.detach(),
        "loss/ratio_mean": ratio_T.detach(),
        "loss/clip_share": (-clipped_ratio_T * advantages_T > -ratio_T * advantages_T).float(),
    }
    if config.dual_clip is not None:
        bound_T = -config.dual_clip * advantages_T
        loss_T = torch.where(advantages_T < 0, torch.minimum(loss_T, bound_T), loss_T)
    if config.importance_cap is not None:
        importance_T = (inputs.old_logprobs - inputs.rollout_logprobs).exp()
        loss_T = loss_T * importance_T.clamp(max=config.importance_cap)
        measured["loss/importance_capped_share"] = (importance_T > config.importance_cap).float()
    return loss_T, measured


def sft_loss(logprobs: Tensor, entropy: Tensor, inputs: LossInputs) -> TokenLoss:
    """Negative log-likelihood."""
    return -logprobs, {"loss/entropy": entropy.detach()}
