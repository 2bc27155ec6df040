"""The layout of packed rows for attention."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.model import make_row
from trainer.packed import MIN_FILL, PackedRow, pad, unpad

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any)


def row_of(lengths: list[int]) -> PackedRow:
    cu_seqlens = np.cumsum([0, *lengths])
    return make_row(cu_seqlens, np.concatenate([np.arange(n) for n in lengths]), device=torch.device("cpu"))


@settings(deadline=None)
@given(lengths)
def test_every_place_holds_a_token_of_one_sequence_in_order(lengths: list[int]) -> None:
    """A token in another sequence's batch row would be attended to by strangers."""
    plan = row_of(lengths).plan
    sequence_of = np.repeat(np.arange(len(lengths)), lengths)
    tokens, start, seen = plan.tokens.numpy(), 0, []
    for num_sequences, length in plan.buckets:
        for places in tokens[start : start + num_sequences * length].reshape(num_sequences, length):
            (sequence,) = set(sequence_of[places])
            filled = lengths[sequence]
            assert MIN_FILL * length <= filled <= length
            assert list(places[:filled]) == list(np.flatnonzero(sequence_of == sequence))
            seen.append(sequence)
        start += num_sequences * length
    assert start == len(tokens)
    assert sorted(seen) == [i for i, n in enumerate(lengths) if n]


@settings(deadline=None)
@given(lengths)
def test_unpad_undoes_pad_and_padding_has_no_gradient(lengths: list[int]) -> None:
    """A gather that is not undone mixes tokens; padding that is counted trains some tokens twice."""
    plan = row_of(lengths).plan
    x = torch.arange(1.0, sum(lengths) + 1)[:, None].requires_grad_()
    padded = pad(x, plan)
    assert torch.equal(unpad(padded, plan), x)
    weights = torch.arange(1.0, len(x) + 1)[:, None]
    (gradient,) = torch.autograd.grad((unpad(padded, plan) * weights).sum(), x)
    assert torch.equal(gradient, weights)


def test_a_row_of_similar_lengths_is_one_batch() -> None:
    """The speed on short sequences rests on few, large batches."""
    assert len(row_of([20, 19, 18, 17]).plan.buckets) == 1
    for longer, shorter in itertools.pairwise(row_of([100, 80, 64, 10, 9]).plan.buckets):
        assert longer[1] > shorter[1]
