"""build_batch: what every token weighs, and that no packing changes it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.errors import HookError
from slime.types import Failed, Group, MicroBatch, Status, TrainBatch
from tests.builders import make_batch, make_group, make_sample
from trainer.batch import Aggregation


def microbatches(batch: TrainBatch) -> list[MicroBatch]:
    return [mb for ranks in batch.updates for mbs in ranks for mb in mbs]


def trained_tokens(batch: TrainBatch) -> Counter[tuple[object, ...]]:
    """Every trained token with all that its gradient depends on but the rest of its sequence."""
    return Counter(
        (tuple(mb.tokens[start : t + 1]), mb.targets[t], mb.weights[t], mb.advantages[t], mb.rollout_logprobs[t])
        for mb in microbatches(batch)
        for start, end in zip(mb.cu_seqlens, mb.cu_seqlens[1:], strict=False)
        for t in range(start, end)
        if mb.weights[t] > 0
    )


lengths = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=5), min_size=1, max_size=6)


def groups_of(response_lengths: list[list[int]]) -> list[Group]:
    """Groups with distinct tokens, so that tokens can be told apart after packing."""
    return [
        Group(
            prompt=make_group(uid=f"p{g}").prompt,
            ordinal=g,
            epoch=0,
            attempt=0,
            samples=[
                make_sample(
                    prompt_uid=f"p{g}",
                    index=i,
                    prompt_tokens=[1000 * g + 7, 7],
                    response_tokens=[100 * i + t for t in range(length)],
                    logprobs=[-0.01 * (t + 1) for t in range(length)],
                    reward=float(i % 3),
                )
                for i, length in enumerate(row)
            ],
        )
        for g, row in enumerate(response_lengths)
    ]


@given(rows=lengths, num_ranks=st.integers(1, 4), budget=st.integers(1, 120), seed=st.randoms())
def test_packing_ranks_budget_and_order_do_not_change_what_is_trained(rows, num_ranks, budget, seed) -> None:  # type: ignore[no-untyped-def]
    """Pins tokens lost, trained twice or weighed by the micro-batch they landed in."""
    groups = groups_of(rows)
    reference = trained_tokens(make_batch(groups, tokens_per_microbatch=10**6))
    shuffled = seed.sample(groups, len(groups))
    batch = make_batch(shuffled, num_ranks=num_ranks, tokens_per_microbatch=budget)
    assert trained_tokens(batch) == reference
    assert reference.total() == sum(map(sum, rows))


@given(rows=lengths, num_ranks=st.integers(1, 4), budget=st.integers(1, 120))
def test_every_rank_gets_equally_many_microbatches_within_the_budget(rows, num_ranks, budget) -> None:  # type: ignore[no-untyped-def]
    """Pins a rank that waits for ever in a collective, and a budget that is exceeded though it need not be."""
    for ranks in make_batch(groups_of(rows), num_ranks=num_ranks, tokens_per_microbatch=budget).updates:
        assert len(ranks) == num_ranks
        assert len({len(mbs) for mbs in ranks}) == 1
        assert len(ranks[0]) >= 1
        for mb in (mb for mbs in ranks for mb in mbs):
            assert mb.num_tokens <= budget or len(mb.cu_seqlens) == 2
            assert mb.cu_seqlens[-1] == mb.num_tokens > 0


@given(rows=lengths, aggregation=st.sampled_from(["sequence", "token", "prompt"]))
def test_mean_aggregations_weigh_one_in_total(rows, aggregation) -> None:  # type: ignore[no-untyped-def]
    """Pins a learning rate that silently depends on the batch."""
    batch = make_batch(groups_of(rows), aggregation=aggregation)
    total = sum(mb.weights.sum(dtype=np.float64) for mb in microbatches(batch))
    assert total == pytest.approx(1.0 if any(map(sum, rows)) else 0.0, rel=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("sequence", [1 / (3 * 2), 1 / (3 * 6), 1 / (3 * 4)]),
        ("token", [1 / 12, 1 / 12, 1 / 12]),
        ("prompt", [1 / (2 * 8), 1 / (2 * 8), 1 / (2 * 4)]),
        ("constant", [1 / (3 * 100), 1 / (3 * 100), 1 / (3 * 100)]),
    ],
)
def test_each_aggregation_weighs_a_token_by_its_formula(aggregation: Aggregation, weights: list[float]) -> None:
    """Pins the denominators: rollouts, tokens, prompts, constant."""
    batch = make_batch(groups_of([[2, 6], [4]]), aggregation=aggregation)
    by_prompt = {
        (mb.tokens[start], end - start): mb.weights[start + 1]
        for mb in microbatches(batch)
        for start, end in zip(mb.cu_seqlens, mb.cu_seqlens[1:], strict=False)
    }
    assert [by_prompt[7, 4], by_prompt[7, 8], by_prompt[1007, 6]] == pytest.approx(weights, rel=1e-6)


def test_segments_of_a_rollout_share_the_weight_of_one_rollout() -> None:
    """Pins a rollout that counts as often as it has segments."""
    group = make_group([0.0, 1.0])
    group.samples.append(make_sample(index=1, reward=1.0, response_tokens=[8] * 6))
    weights = {
        end - start: mb.weights[start + 2]
        for mb in microbatches(make_batch([group]))
        for start, end in zip(mb.cu_seqlens, mb.cu_seqlens[1:], strict=False)
    }
    assert weights == pytest.approx({5: 1 / (2 * 8), 9: 1 / (2 * 8)})


def test_arrays_are_aligned_with_the_position_that_predicts() -> None:
    """Pins an off-by-one that trains each token with its neighbour's log-prob."""
    sample = make_sample(prompt_tokens=[5, 6], response_tokens=[8, 9, 10], logprobs=[-0.1, -0.2, -0.3], temperature=0.7)
    group = Group(prompt=make_group().prompt, ordinal=0, epoch=0, attempt=0, samples=[sample])
    (mb,) = microbatches(make_batch([group], advantages=lambda groups: [[2.0]], aggregation="token"))
    assert mb.tokens.tolist() == [5, 6, 8, 9, 10]
    assert mb.targets.tolist() == [6, 8, 9, 10, 0]
    assert mb.positions.tolist() == [0, 1, 2, 3, 4]
    assert mb.weights == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])
    assert mb.rollout_logprobs == pytest.approx([0, -0.1, -0.2, -0.3, 0])
    assert mb.advantages.tolist() == [2.0] * 5
    assert mb.temperatures == pytest.approx([0.7] * 5)
    assert mb.old_logprobs is None


def test_samples_without_a_score_are_left_out_of_batch_and_denominators() -> None:
    """Pins failed rewards that dilute the step or are trained as zeros."""
    group = make_group([0.0, 1.0, 1.0])
    group.samples[2].verdict = Failed(kind="raised", detail="boom")
    batch = make_batch([group])
    assert trained_tokens(batch) == trained_tokens(make_batch([make_group([0.0, 1.0])]))
    assert batch.metrics["batch/left_out_samples"] == 1


def test_a_step_with_nothing_to_train_still_gives_every_rank_a_microbatch() -> None:
    """Pins a rank without work, and a division by a count of zero."""
    group = make_group([0.0, 1.0], response_tokens=[])
    ((ranks),) = make_batch([group], num_ranks=2).updates
    assert [[mb.weights.tolist() for mb in mbs] for mbs in ranks] == [[[0.0]], [[0.0]]]


def test_updates_take_whole_groups_in_order_with_their_own_denominators() -> None:
    """Pins a second update that is trained at half its weight."""
    batch = make_batch(groups_of([[2], [3], [4]]), updates_per_step=2, aggregation="token")
    trained = [
        sorted(mb.tokens[s] for mbs in ranks for mb in mbs for s in mb.cu_seqlens[:-1]) for ranks in batch.updates
    ]
    assert trained == [[7, 1007], [2007]]
    assert [sum(mb.weights.sum() for mbs in ranks for mb in mbs) for ranks in batch.updates] == pytest.approx([1, 1])


def test_metrics_tell_what_the_groups_are_like() -> None:
    """Pins numbers that look right on a balanced batch only."""
    groups = [make_group([0.0, 1.0], version=3), make_group([1.0, 1.0, 1.0], uid="p1", version=5)]
    groups[0].samples[0].append([4, 4, 4], logprobs=[-1.0] * 3, version=4)
    groups[0].samples[0].status = Status.TRUNCATED
    metrics = make_batch(groups, version=5).metrics
    assert metrics["reward/mean"] == pytest.approx(4 / 5)
    assert metrics["batch/informative_share"] == 0.5
    assert metrics["rollout/response_tokens_mean"] == pytest.approx((5 + 4 * 2) / 5)
    assert metrics["rollout/response_tokens_max"] == 5
    assert metrics["rollout/truncated_share"] == pytest.approx(1 / 5)
    assert (metrics["staleness/max"], metrics["staleness/mean"]) == (2, pytest.approx(4 / 5))
    assert metrics["batch/trained_tokens"] == 13


@pytest.mark.parametrize(
    ("returned", "message"), [([[1.0]], "groups of"), ([[1.0, float("nan")]], "finite")], ids=["shape", "nan"]
)
def test_an_advantage_hook_that_answers_wrongly_is_named(returned: list[list[float]], message: str) -> None:
    """Pins a hook whose NaN would skip every update without a word."""
    with pytest.raises(HookError, match=message):
        make_batch([make_group([0.0, 1.0])], advantages=lambda groups: returned)
