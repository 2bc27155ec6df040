"""Norm, rotation, activation and short attention with hand-written gradients, for the machines without fused kernels.

Small models on a CPU are bound by passes over memory, not by arithmetic: autograd's own versions of these four make two
to four times as many. All compute in fp32 and round once. Rows are worked off in chunks that stay in a core's cache.

Shapes: N rows, H channels of a row, F half of a gated row, T tokens, h heads, d channels a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

CHUNK_NUMEL = 1 << 16
"""Elements of one chunk on a CPU: 256 KiB in fp32."""


def _chunks(x: Tensor) -> Iterator[slice]:
    """Ranges of x's first dimension."""
    rows = max(1, CHUNK_NUMEL // math.prod(x.shape[1:])) if x.device.type == "cpu" else len(x)
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def _fp32(x: Tensor) -> Tensor:
    """A copy in fp32 that may be written to."""
    return x.to(torch.float32, copy=True)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, rounded to x's dtype once."""
    y: Tensor = _RMSNorm.apply(x, weight_H, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x²) + eps), x̂ = x r and g = dy · weight: dx = r (g − x̂ mean(g x̂)), dweight = Σ dy x̂."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        x_NH = x.reshape(-1, x.shape[-1])
        y_NH = torch.empty_like(x_NH)
        scale_N1 = x.new_empty(len(x_NH), 1, dtype=torch.float32)
        weight_fp32_H = weight_H.float()
        for rows in _chunks(x_NH):
            x_CH = _fp32(x_NH[rows])
            scale_N1[rows, 0] = torch.linalg.vecdot(x_CH, x_CH).div_(x_CH.shape[1]).add_(eps).rsqrt_()
            y_NH[rows] = x_CH.mul_(scale_N1[rows]).mul_(weight_fp32_H)
        ctx.save_for_backward(x, weight_H, scale_N1)
        return y_NH.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_H, scale_N1 = ctx.saved_tensors
        x_NH, grad_NH = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        dx_NH = torch.empty_like(x_NH)
        weight_fp32_H, dweight_H = weight_H.float(), torch.zeros_like(weight_H, dtype=torch.float32)
        for rows in _chunks(x_NH):
            unit_CH, g_CH = _fp32(x_NH[rows]).mul_(scale_N1[rows]), _fp32(grad_NH[rows])
            dweight_H += torch.linalg.vecdot(g_CH, unit_CH, dim=0)
            g_CH.mul_(weight_fp32_H)
            mean_C1 = torch.linalg.vecdot(g_CH, unit_CH).div_(g_CH.shape[1])[:, None]
            dx_NH[rows] = g_CH.addcmul_(unit_CH, mean_C1, value=-1).mul_(scale_N1[rows])
        return dx_NH.view(x.shape), dweight_H.to(weight_H.dtype), None


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of x = [gate, up] along the last dimension."""
    y: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        x_NH = x.reshape(-1, x.shape[-1])
        y_NF = x_NH.new_empty(len(x_NH), x_NH.shape[1] // 2)
        for rows in _chunks(x_NH):
            gate_CF, up_CF = x_NH[rows].chunk(2, dim=1)
            y_NF[rows] = F.silu(gate_CF.float()).mul_(up_CF)
        return y_NF.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x_NH, grad_NF = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1] // 2)
        dx_NH = torch.empty_like(x_NH)
        for rows in _chunks(x_NH):
            gate_CF, up_CF = (half.float() for half in x_NH[rows].chunk(2, dim=1))
            dgate_CF, dup_CF = dx_NH[rows].chunk(2, dim=1)
            g_CF = grad_NF[rows].float()
            dup_CF.copy_(F.silu(gate_CF).mul_(g_CF))
            dgate_CF.copy_(torch.ops.aten.silu_backward(up_CF * g_CF, gate_CF))
        return dx_NH.view(x.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, h, d]: channels i and i + d/2 turn by angle i of the token; cos and sin [T, 1, d/2]."""
    y: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


class _Rotate(torch.autograd.Function):
    """Its gradient is the rotation back: the same with the sine negated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, sign=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad, *ctx.saved_tensors, sign=-1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, sign: int) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in _chunks(x):
        first, second = x[rows].float().chunk(2, dim=-1)
        y_first, y_second = y[rows].chunk(2, dim=-1)
        y_first.copy_((first * cos[rows]).addcmul_(second, sin[rows], value=-sign))
        y_second.copy_((second * cos[rows]).addcmul_(first, sin[rows], value=sign))
    return y


def short_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention that keeps its whole matrix of probabilities: for sequences too short for flash attention.

    Args:
        query: fp32 [n, L, h, d].
        key, value: fp32 [n, L, g, d]; heads ``i * h/g ...`` share key head i.
        scale: of the scores.

    Returns:
        [n, L, h, d].
    """
    y: Tensor = _ShortAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return y


class _ShortAttention(torch.autograd.Function):
    """Per key head: S = scale Q Kᵀ, P = softmax(S), O = P V, its heads' queries stacked so that no key is copied.

    dV = Pᵀ dO, dP = dO Vᵀ, dS = P (dP − Σ dP P), dQ = scale dS K, dK = scale dSᵀ Q.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        num_groups, length = key.shape[2], query.shape[1]
        q, k, v = (_by_group(x, num_groups) for x in (query, key, value))
        causal = torch.full((length, length), float("-inf"), device=q.device).triu_(1)
        scores = torch.bmm(q, k.transpose(1, 2)).view(len(k), -1, length, length).mul_(scale).add_(causal)
        probabilities = torch.softmax(scores, dim=-1).view(len(k), -1, length)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.scale, ctx.num_groups = scale, num_groups
        return _by_token(torch.bmm(probabilities, v), num_groups, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, probabilities = ctx.saved_tensors
        g = _by_group(grad, ctx.num_groups)
        dv = torch.bmm(probabilities.transpose(1, 2), g)
        dp = torch.bmm(g, v.transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, probabilities, -1, dp.dtype).mul_(ctx.scale)
        dq, dk = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q)
        length = k.shape[1]
        return *(_by_token(x, ctx.num_groups, length) for x in (dq, dk, dv)), None  # type: ignore[return-value]


def _by_group(x: Tensor, num_groups: int) -> Tensor:
    """[n, L, h, d] → [n * g, h/g * L, d]."""
    num_sequences, length, num_heads, channels = x.shape
    return x.transpose(1, 2).reshape(num_sequences * num_groups, num_heads // num_groups * length, channels)


def _by_token(x: Tensor, num_groups: int, length: int) -> Tensor:
    """The inverse of `_by_group`, as a view."""
    return x.view(len(x) // num_groups, -1, length, x.shape[-1]).transpose(1, 2)
