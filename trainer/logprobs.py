"""Log-probabilities and entropies of a packed row, without a second copy of its logits.

T positions, V vocabulary entries. With z = logits / temperature and p = softmax(z):

    logprob_t = z[t, target_t] - logsumexp(z_t)      d logprob_t / dz = onehot(target_t) - p_t
    entropy_t = -p_t · log p_t                       d entropy_t / dz = -p_t (log p_t + entropy_t)

Both passes go over the logits in chunks of rows in fp32, and the backward pass computes p again: kept between the two
are the logits themselves and two numbers a position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 18
"""fp32 bytes of one chunk on a CPU: it stays in the cache of a core."""
CUDA_CHUNK_BYTES = 1 << 28
"""On a device, where few large kernels are faster."""


def token_logprobs(logits_TV: Tensor, targets_T: Tensor, temperatures_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, both fp32 [T], in nats.

    Args:
        logits_TV: bf16 or fp32. A vocabulary padded by the model must be cut to its true size first.
        targets_T: int64 in [0, V).
        temperatures_T: what the sampler divided the logits by.
    """
    logprobs_T, entropy_T = _TokenLogprobs.apply(logits_TV, targets_T, temperatures_T)  # type: ignore[no-untyped-call]
    return logprobs_T, entropy_T


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, temperatures_T: Tensor) -> tuple[Tensor, Tensor]:
        num_tokens = len(targets_T)
        logprobs_T, entropy_T, logsumexp_T = logits_TV.new_empty(3, num_tokens, dtype=torch.float32).unbind()
        for rows in _chunks(logits_TV):
            z_CV = _scaled(logits_TV[rows], temperatures_T[rows])
            logsumexp_T[rows] = torch.logsumexp(z_CV, dim=-1)
            logp_CV = z_CV.sub_(logsumexp_T[rows, None])
            logprobs_T[rows] = logp_CV.gather(1, targets_T[rows, None]).squeeze(1)
            entropy_T[rows] = -torch.linalg.vecdot(logp_CV.exp(), logp_CV)
        ctx.save_for_backward(logits_TV, targets_T, temperatures_T, logsumexp_T, entropy_T)
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        grad_logprobs_T, grad_entropy_T = grads
        logits_TV, targets_T, temperatures_T, logsumexp_T, entropy_T = ctx.saved_tensors
        if grad_logprobs_T is None:
            grad_logprobs_T = torch.zeros_like(logsumexp_T)
        grad_TV = torch.empty_like(logits_TV)
        for rows in _chunks(logits_TV):
            logp_CV = _scaled(logits_TV[rows], temperatures_T[rows]).sub_(logsumexp_T[rows, None])
            p_CV = logp_CV.exp()
            grad_C1 = grad_logprobs_T[rows, None]
            if grad_entropy_T is not None:
                grad_z_CV = logp_CV.add_(entropy_T[rows, None]).mul_(p_CV).mul_(-grad_entropy_T[rows, None])
                grad_z_CV.sub_(p_CV.mul_(grad_C1))
            else:
                grad_z_CV = p_CV.mul_(-grad_C1)
            grad_z_CV.scatter_add_(1, targets_T[rows, None], grad_C1)
            grad_TV[rows] = grad_z_CV.div_(temperatures_T[rows, None])
        return grad_TV, None, None


def _scaled(logits_CV: Tensor, temperatures_C: Tensor) -> Tensor:
    return logits_CV.float() / temperatures_C[:, None]


def _chunks(logits_TV: Tensor) -> Iterator[slice]:
    limit_bytes = CUDA_CHUNK_BYTES if logits_TV.is_cuda else CHUNK_BYTES
    size = max(1, limit_bytes // (4 * logits_TV.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits_TV), size))
