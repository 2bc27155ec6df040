"""Hand-written gradients against float64 autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from trainer import fused

BETWEEN_CHUNKS = fused.CHUNK_NUMEL // 64 + 7
"""Rows of 64 elements that fill one chunk and a part of the next."""

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
"""Relative, of the norm: a few roundings of the dtype."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients, the incoming gradient being the same numbers in every dtype."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    output = function(*leaves)
    output.backward(random(*output.shape, seed=99).bfloat16().to(output.dtype))
    assert all(torch.equal(leaf.detach(), x.to(dtype)) for leaf, x in zip(leaves, inputs, strict=True)), "written to"
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def check(ours: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in inputs]
    for got, expected in zip(results(ours, inputs, dtype), results(exact, inputs, torch.float64), strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@dtypes
def test_rms_norm(dtype: torch.dtype) -> None:
    """A wrong gradient trains, only worse."""

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight

    inputs = [random(BETWEEN_CHUNKS, 1, 64), 1 + random(64, seed=1)]
    check(lambda x, weight: fused.rms_norm(x, weight, 1e-3), exact, inputs, dtype)


@dtypes
def test_rms_norm_of_a_view(dtype: torch.dtype) -> None:
    """Queries and keys are slices of one tensor when they are normed."""

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        part = x[..., 16:32]
        return part * (part.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight

    inputs = [random(5, 2, 3, 48), random(16, seed=1)]
    check(lambda x, weight: fused.rms_norm(x[..., 16:32], weight, 1e-3), exact, inputs, dtype)


@dtypes
def test_swiglu(dtype: torch.dtype) -> None:
    """Gate and up exchanged would load, run and train."""

    def exact(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    check(fused.swiglu, exact, [random(BETWEEN_CHUNKS, 1, 64)], dtype)


@dtypes
def test_rotate(dtype: torch.dtype) -> None:
    """The gradient turns back: with the sign of the sine wrong, it still has the right length."""
    angles = random(BETWEEN_CHUNKS, 1, 16, seed=1).double()

    def exact(x: Tensor) -> Tensor:
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    cos, sin = angles.cos().float(), angles.sin().float()
    check(lambda x: fused.rotate(x, cos, sin), exact, [random(BETWEEN_CHUNKS, 2, 32)], dtype)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_short_attention(heads: int, groups: int) -> None:
    """Heads paired with the wrong key heads make a model that is merely bad."""

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shared = heads // groups
        key, value = (x.repeat_interleave(shared, dim=2) for x in (key, value))
        scores = torch.einsum("nqhd,nkhd->nhqk", query, key) * 0.3
        length = query.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        return torch.einsum("nhqk,nkhd->nqhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value)

    inputs = [random(5, 9, heads, 16), random(5, 9, groups, 16, seed=1), random(5, 9, groups, 16, seed=2)]
    check(lambda *x: fused.short_attention(*x, 0.3), exact, inputs, torch.float32)
