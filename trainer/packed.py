"""Packed rows: many sequences one after the other in one row, and the plan by which attention keeps them apart.

Megatron's own packed format (``thd``) loops over the sequences, for the rotary embedding in every layer and for
attention where TransformerEngine is missing. With 256 short sequences a row such loops are most of the time. Here every
step is vectorised over the row, and what depends on the row alone is computed once a row, not once a layer.

Shapes: T tokens of the row, n sequences of a bucket, L their greatest length, P places of all buckets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

MIN_FILL = 0.8
"""A sequence joins a bucket only if it fills at least this share of the bucket's length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """How a row of T tokens is laid out as padded batches, P places in all, and back."""

    buckets: tuple[tuple[int, int], ...]
    """(n, L) of each padded batch; they follow one another, ``P = sum(n * L)``."""
    tokens: Tensor
    """int64 [P]: the row's token at each place. Padding, always at the end of a sequence, repeats its last token."""
    places: Tensor
    """int64 [T]: where each token of the row is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """The rotary embedding of each token, fp32 [T, 1, d/2] both."""

    cos: Tensor
    sin: Tensor


@dataclass(kw_only=True)
class PackedRow(PackedSeqParams):  # type: ignore[misc]
    """Megatron's description of a packed row, with what our layers need.

    `qkv_format` is ``"packed"`` for them: any other word than ``"thd"`` makes Megatron treat the row as one sequence
    of T tokens, which everything but the rotary embedding and attention may do.
    """

    positions: Tensor
    """int64 [T]: position of each token in its own sequence."""
    plan: AttentionPlan
    rotation: Rotation = field(init=False)
    """Set by the model's rotary embedding when the row comes by, once for all layers."""


def make_packed_row(
    cu_seqlens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], *, device: torch.device, qkv_format: str
) -> PackedRow:
    """Describe a packed row; see `trainer.model.make_row`."""
    lengths = np.diff(cu_seqlens)
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] != len(positions) or (lengths < 0).any():
        raise ValueError(f"cu_seqlens {cu_seqlens} do not cover the {len(positions)} tokens of the row")
    # Copied: arrays out of Ray's object store are read-only, and torch's tensors cannot be.
    boundaries = torch.from_numpy(cu_seqlens.astype(np.int32)).to(device)
    return PackedRow(
        qkv_format=qkv_format,
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=int(lengths.max()),
        max_seqlen_kv=int(lengths.max()),
        positions=torch.from_numpy(np.array(positions)).to(device),
        plan=_plan(cu_seqlens[:-1], lengths, device=device),
    )


def _plan(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], *, device: torch.device) -> AttentionPlan:
    buckets: list[tuple[int, int]] = []
    tokens: list[npt.NDArray[np.int64]] = []
    is_real: list[npt.NDArray[np.bool_]] = []
    for members in _similar(lengths):
        offsets = np.arange(lengths[members].max())
        last = lengths[members, None] - 1
        buckets.append((len(members), len(offsets)))
        tokens.append((starts[members, None] + np.minimum(offsets, last)).ravel())
        is_real.append((offsets <= last).ravel())
    tokens_P, is_real_P = np.concatenate(tokens), np.concatenate(is_real)
    places_T = np.empty(lengths.sum(), dtype=np.int64)
    places_T[tokens_P[is_real_P]] = np.flatnonzero(is_real_P)
    return AttentionPlan(
        buckets=tuple(buckets),
        tokens=torch.from_numpy(tokens_P).to(device),
        places=torch.from_numpy(places_T).to(device),
    )


def _similar(lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Sequence numbers in groups of similar length: the shortest has at least MIN_FILL of the longest's."""
    descending = np.argsort(-lengths, kind="stable")
    descending = descending[lengths[descending] > 0]
    groups: list[npt.NDArray[np.int64]] = []
    while len(descending):
        fits = lengths[descending] >= MIN_FILL * lengths[descending[0]]
        groups.append(np.sort(descending[fits]))
        descending = descending[~fits]
    return groups


def pad(x: Tensor, plan: AttentionPlan) -> Tensor:
    """Rows of [T, ...] → their places in the padded batches [P, ...]."""
    padded: Tensor = _Pad.apply(x, plan)  # type: ignore[no-untyped-call]
    return padded


def unpad(x: Tensor, plan: AttentionPlan) -> Tensor:
    """The inverse of `pad`: [P, ...] → [T, ...], padding dropped."""
    packed: Tensor = _Unpad.apply(x, plan)  # type: ignore[no-untyped-call]
    return packed


class _Pad(torch.autograd.Function):
    """Padding carries no gradient: nothing reads its outputs, and causal attention keeps real queries from its keys.

    The backward pass is therefore a gather, not a scatter-add.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: AttentionPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.plan.places), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: AttentionPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padded = grad.new_zeros(len(ctx.plan.tokens), *grad.shape[1:])
        return padded.index_copy_(0, ctx.plan.places, grad), None
