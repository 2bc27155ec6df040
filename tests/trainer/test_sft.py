"""SFT batches: every response token once, at equal weight."""

import numpy as np
import pytest

from trainer.sft import SftRow, build_sft_batch


def test_response_tokens_share_the_weight_and_prompts_have_none() -> None:
    """Pins training on the prompt, and the first response token that is skipped."""
    rows = [SftRow(prompt_tokens=[5, 6], response_tokens=[8, 9]), SftRow(prompt_tokens=[7], response_tokens=[8])]
    ((ranks,),) = [build_sft_batch(rows, num_ranks=1, tokens_per_microbatch=100).updates]
    (mb,) = ranks[0]
    assert mb.tokens.tolist() == [5, 6, 8, 9, 7, 8]
    assert mb.targets.tolist() == [6, 8, 9, 0, 8, 0]
    assert mb.weights == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3, 0])
    assert (mb.temperatures == 1).all()


@pytest.mark.parametrize(("num_ranks", "budget"), [(1, 1000), (1, 8), (3, 8)])
def test_every_split_weighs_one_in_total(num_ranks: int, budget: int) -> None:
    """Pins a loss that is a mean of means."""
    rows = [SftRow(prompt_tokens=[1] * (i % 3), response_tokens=[2] * i) for i in range(9)]
    batch = build_sft_batch(rows, num_ranks=num_ranks, tokens_per_microbatch=budget)
    weights = np.concatenate([mb.weights for mbs in batch.updates[0] for mb in mbs])
    assert weights.sum() == pytest.approx(1)
    assert (weights > 0).sum() == batch.metrics["batch/trained_tokens"]
    assert batch.metrics["batch/left_out_samples"] == 1
