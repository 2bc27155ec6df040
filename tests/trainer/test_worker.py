"""Training steps of real ranks, against independent references and against each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime.config import LossConfig, OptimizerConfig
from slime.errors import CheckpointError, HookError
from slime.types import Group, TrainBatch
from slime.weights import read_manifest
from tests.builders import make_batch, make_group, make_model, make_sample
from tests.trainer.ranks import Ranks, gradients, optimizer_state, save_to_a_full_disk, weights, with_old_logprobs
from trainer.sft import SftRow, build_sft_batch
from trainer.worker import TrainWorker, WorkerSpec

pytestmark = pytest.mark.stack

NO_CLIP = OptimizerConfig(lr=1e-3, clip_grad=1e9, weight_decay=0.1)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(2)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen3", dtype="float32")


@pytest.fixture(scope="module")
def bf16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", tie=False)


def fp32(model: Path, **spec: Any) -> WorkerSpec:
    return WorkerSpec(**{"model_path": model, "optimizer": NO_CLIP, "num_updates": 10, "precision": "fp32", **spec})


def groups(seed: int = 0) -> list[Group]:
    """Unequal groups of sequences of unequal length, at several temperatures."""
    chance = np.random.default_rng(seed)
    made = []
    for g, num_samples in enumerate((3, 5, 2, 4)):
        group = make_group([], uid=f"p{g}", ordinal=g)
        for i in range(num_samples):
            length = int(chance.integers(1, 20))
            sample = make_sample(
                prompt_uid=f"p{g}",
                index=i,
                prompt_tokens=chance.integers(0, 128, 2 + g).tolist(),
                response_tokens=chance.integers(0, 128, length).tolist(),
                logprobs=(chance.normal(-4.5, 1.0, length)).tolist(),
                reward=float(chance.integers(0, 3)),
                temperature=(1.0, 0.7)[g % 2],
            )
            group.samples.append(sample)
        made.append(group)
    return made


def batch(of: Sequence[Group] | None = None, **options: Any) -> TrainBatch:
    return make_batch(of or groups(), **options)


def by_rank(batch: TrainBatch) -> list[Any]:
    return [list(updates) for updates in zip(*batch.updates, strict=True)]


def step(ranks: Ranks, batch: TrainBatch, method: Any = TrainWorker.train_step) -> dict[str, float]:
    """One step on all ranks, whose metrics must agree."""
    metrics = ranks.each(method, by_rank(batch))
    assert all(m == metrics[0] for m in metrics)
    return dict(metrics[0])


def reference_gradient(
    model: Path, groups: Sequence[Group], config: LossConfig, *, offset: float
) -> tuple[float, dict[str, np.ndarray]]:
    """The GRPO loss written out token by token in float64, on transformers' model."""
    import torch
    import transformers

    policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    num_rollouts = sum(len(group.samples) for group in groups)
    for group in groups:
        rewards = np.array([s.reward for s in group.samples])
        for sample in group.samples:
            equal = (rewards == rewards[0]).all()
            advantage = 0.0 if equal else (sample.reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
            logits = policy(torch.tensor([sample.tokens])).logits[0] / sample.temperature
            of_sample = torch.zeros((), dtype=torch.float64)
            for t, trained in enumerate(sample.loss_mask):
                if trained:
                    logprob = torch.log_softmax(logits[t - 1], dim=-1)[sample.tokens[t]]
                    ratio = torch.exp(logprob - (sample.rollout_logprobs[t] + offset))
                    clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
                    loss = max(-ratio * advantage, -clipped * advantage)
                    if config.dual_clip and advantage < 0:
                        loss = min(loss, -config.dual_clip * advantage)
                    if config.importance_cap:
                        loss = loss * min(np.exp(offset), config.importance_cap)
                    of_sample = of_sample + loss
            total = total + of_sample / sum(sample.loss_mask) / num_rollouts
    total.backward()
    named = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return total.item(), {name: gradient.numpy() for name, gradient in named.items()}


@pytest.mark.parametrize(
    ("config", "offset"),
    [
        (LossConfig(), 0.0),
        (LossConfig(clip_low=0.1, clip_high=0.5, dual_clip=1.5, importance_cap=2.0), -0.3),
        (LossConfig(importance_cap=1.1), 0.3),
    ],
    ids=["default", "dual clip", "capped"],
)
def test_the_gradient_of_a_grpo_step_equals_float64(
    ranks: Ranks, model: Path, config: LossConfig, offset: float
) -> None:
    """Pins every silent mistake from groups to gradient: alignment, temperature, denominators, packing, clipping."""
    expected_loss, expected = reference_gradient(model, groups(), config, offset=offset)
    ranks.start(fp32(model, loss=config))
    micro_batches = with_old_logprobs(batch().updates[0][0], offset=offset)
    assert len(micro_batches) > 2
    ((loss, got),) = ranks.call(gradients, micro_batches)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.linalg.norm(got[name] - gradient) < 1e-5 * np.linalg.norm(gradient), name


def test_micro_batches_packing_and_order_do_not_change_loss_and_gradient(ranks: Ranks, model: Path) -> None:
    """Pins a gradient divided by the number of micro-batches, sequences that see their neighbours, NaN from filler."""
    ranks.start(fp32(model))
    whole = batch(tokens_per_microbatch=10**6).updates[0][0]
    assert len(whole) == 1
    ((loss, gradient),) = ranks.call(gradients, with_old_logprobs(whole, offset=0.1))
    splits = [batch(tokens_per_microbatch=budget).updates[0][0] for budget in (1, 40)]
    splits.append(batch(groups()[::-1], tokens_per_microbatch=90).updates[0][0])
    splits.append([mb for mbs in batch(num_ranks=16, tokens_per_microbatch=90).updates[0] for mb in mbs])
    assert any(not mb.weights.any() for mb in splits[-1])
    for split in splits:
        ((split_loss, split_gradient),) = ranks.call(gradients, with_old_logprobs(split, offset=0.1))
        assert split_loss == pytest.approx(loss, rel=1e-5)
        for name, expected in gradient.items():
            assert np.linalg.norm(split_gradient[name] - expected) < 1e-5 * np.linalg.norm(expected), name


def floats(bits: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([array.view(np.float32).ravel() for _, array in sorted(bits.items())])


def test_two_ranks_take_the_same_steps_as_one(ranks: Ranks, model: Path) -> None:
    """Pins gradients averaged over ranks, which Adam hides and the norm does not, and metrics of one rank only."""
    results = []
    for world_size in (1, 2):
        ranks.start(fp32(model), world_size=world_size)
        metrics = [
            step(ranks, batch(groups(seed), num_ranks=world_size, updates_per_step=seed + 1)) for seed in range(3)
        ]
        results.append((metrics, [floats(answer) for answer in ranks.call(weights)]))
    (one, (alone,)), (two, (first, second)) = results
    for expected, got in zip(one, two, strict=True):
        assert got == pytest.approx(expected, rel=2e-4, abs=1e-6)
    assert (first == second).all()
    moved = np.abs(alone - floats_of(model)).max()
    assert moved > 1e-3
    assert np.abs(first - alone).max() < 0.01 * moved


def floats_of(model: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return np.concatenate([array.ravel() for _, array in sorted(load_file(model / "model.safetensors").items())])


def test_ranks_continue_bit_for_bit_from_a_checkpoint_in_new_processes(
    ranks: Ranks, bf16_model: Path, tmp_path: Path
) -> None:
    """Pins masters, moments, step counts or the learning rate lost on the way: the second step after it tells."""
    optimizer = OptimizerConfig(lr=1e-3, schedule="cosine", min_lr_ratio=0.1, warmup_steps=2)
    spec = WorkerSpec(model_path=bf16_model, optimizer=optimizer, num_updates=6)
    ranks.start(spec, world_size=2)
    for seed in range(2):
        step(ranks, batch(groups(seed), num_ranks=2))
    ranks.call(TrainWorker.save, str(tmp_path))
    expected = [step(ranks, batch(groups(seed), num_ranks=2)) for seed in (2, 3)]
    after = ranks.call(weights), ranks.call(optimizer_state)

    fresh = Ranks(2)
    try:
        fresh.start(spec, world_size=2)
        fresh.call(TrainWorker.load, str(tmp_path))
        assert [step(fresh, batch(groups(seed), num_ranks=2)) for seed in (2, 3)] == expected
        resumed = fresh.call(weights), fresh.call(optimizer_state)
    finally:
        fresh.close()
    for got, kept in zip(resumed[0], after[0], strict=True):
        assert all((got[name] == kept[name]).all() for name in kept)
    for got, kept in zip(resumed[1], after[1], strict=True):
        assert all((a == b).all() for a, b in zip(got, kept, strict=True))


def test_a_checkpoint_taken_before_the_first_step_loads(ranks: Ranks, model: Path, tmp_path: Path) -> None:
    """Pins an optimizer without state, which Megatron cannot save."""
    ranks.start(fp32(model))
    ranks.call(TrainWorker.save, str(tmp_path))
    expected = step(ranks, batch())
    ranks.call(TrainWorker.load, str(tmp_path))
    assert step(ranks, batch()) == expected


def test_a_directory_that_is_no_checkpoint_is_an_error_with_a_name(ranks: Ranks, model: Path, tmp_path: Path) -> None:
    """Pins a run that goes on from random weights, or ends in a torch exception that is no Exception."""
    ranks.start(fp32(model))
    with pytest.raises(CheckpointError, match="does not load"):
        ranks.call(TrainWorker.load, str(tmp_path))


def test_a_save_that_fails_is_an_error_with_a_name_and_training_goes_on(
    ranks: Ranks, model: Path, tmp_path: Path
) -> None:
    """Pins torch's CheckpointException, which is no Exception and would end the process without a word."""
    ranks.start(fp32(model))
    with pytest.raises(CheckpointError, match=r"saving to .* failed: .*Free space"):
        ranks.call(save_to_a_full_disk, str(tmp_path))
    assert step(ranks, batch())["loss/skipped_updates"] == 0


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(
    ranks: Ranks, bf16_model: Path, world_size: int, poison: float
) -> None:
    """Pins one bad token that turns all weights into NaN, or moments that remember it."""
    ranks.start(WorkerSpec(model_path=bf16_model, optimizer=NO_CLIP, num_updates=4), world_size=world_size)
    step(ranks, batch(num_ranks=world_size))
    before = ranks.call(weights), ranks.call(optimizer_state)
    poisoned = batch(num_ranks=world_size)
    rows = poisoned.updates[0][0]
    rows[0] = replace(rows[0], advantages=np.full_like(rows[0].advantages, poison))
    assert step(ranks, poisoned)["loss/skipped_updates"] == 1
    after = ranks.call(weights), ranks.call(optimizer_state)
    for got, kept in zip(after[0], before[0], strict=True):
        assert all((got[name] == kept[name]).all() for name in kept)
    for got, kept in zip(after[1], before[1], strict=True):
        assert all((a == b).all() for a, b in zip(got, kept, strict=True))
    assert step(ranks, batch(num_ranks=world_size))["loss/skipped_updates"] == 0


def test_mismatch_is_zero_against_the_trainers_own_logprobs_and_measured_otherwise(ranks: Ranks, model: Path) -> None:
    """Pins a difference measured against the wrong tokens, and one that is always zero."""
    ranks.start(fp32(model))
    ((micro_batches,),) = batch().updates
    (own,) = ranks.call(TrainWorker.logprobs, micro_batches)
    same = [
        replace(mb, rollout_logprobs=np.where(mb.weights > 0, logprobs, 0).astype(np.float32))
        for mb, logprobs in zip(micro_batches, own, strict=True)
    ]
    metrics = step(ranks, TrainBatch(updates=[[same]], metrics={}))
    assert metrics["mismatch/logprob_abs_max"] < 1e-5
    assert metrics["loss/ratio_mean"] == pytest.approx(1, abs=1e-6)
    ranks.start(fp32(model))
    shifted = [replace(mb, rollout_logprobs=mb.rollout_logprobs - np.float32(0.5) * (mb.weights > 0)) for mb in same]
    metrics = step(ranks, TrainBatch(updates=[[shifted]], metrics={}))
    assert metrics["mismatch/logprob_abs_mean"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["mismatch/kl"] == pytest.approx(np.exp(0.5) - 1.5, abs=1e-5)
    assert metrics["mismatch/known_share"] == 1


def test_tokens_of_unknown_probability_train_on_policy_and_are_not_metered(ranks: Ranks, model: Path) -> None:
    """Pins a NaN that skips every update with pushed conversations, and zeros that make the mismatch look small."""
    ranks.start(fp32(model, loss=LossConfig(importance_cap=1.5)))
    ((micro_batches,),) = batch().updates
    (own,) = ranks.call(TrainWorker.logprobs, micro_batches)
    off = [
        np.where(mb.weights > 0, own_T - 0.5, 0).astype(np.float32)
        for mb, own_T in zip(micro_batches, own, strict=True)
    ]
    told = [replace(mb, rollout_logprobs=off_T) for mb, off_T in zip(micro_batches, off, strict=True)]
    unknown = [
        replace(mb, rollout_logprobs=np.where(np.arange(len(off_T)) % 2, np.nan, off_T).astype(np.float32))
        for mb, off_T in zip(told, off, strict=True)
    ]
    metrics = step(ranks, TrainBatch(updates=[[unknown]], metrics={}))
    assert metrics["loss/skipped_updates"] == 0
    assert 0 < metrics["mismatch/known_share"] < 1
    assert metrics["mismatch/logprob_abs_mean"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["loss/importance_capped_share"] == pytest.approx(metrics["mismatch/known_share"]), "exp(0.5) > 1.5"


def test_later_updates_of_a_step_are_off_policy(ranks: Ranks, model: Path) -> None:
    """Pins old log-probs recomputed after the first update: the ratio would be one for ever and nothing clipped."""
    ranks.start(fp32(model, optimizer=OptimizerConfig(lr=0.05, clip_grad=1e9)))
    metrics = step(ranks, batch(groups()[:2] * 2, updates_per_step=2))
    assert metrics["loss/clip_share"] > 0.05


def test_sft_learns_the_response(ranks: Ranks, model: Path) -> None:
    """Pins a loss with the wrong sign or on the wrong tokens."""
    ranks.start(fp32(model, optimizer=OptimizerConfig(lr=3e-3), num_updates=100))
    rows = [SftRow(prompt_tokens=[5, 6, i], response_tokens=[10 + i, 20 + i]) for i in range(8)]
    data = build_sft_batch(rows, num_ranks=1, tokens_per_microbatch=30)
    losses = [step(ranks, data, TrainWorker.sft_step)["loss/sft"] for _ in range(20)]
    assert losses[0] == pytest.approx(np.log(128), rel=0.2)
    assert losses[-1] < 0.5 * losses[0]


def test_staged_and_exported_weights_are_the_trained_ones(ranks: Ranks, bf16_model: Path, tmp_path: Path) -> None:
    """Pins engines that run weights of before the step, or tensors under their neighbours' names."""
    import transformers

    ranks.start(WorkerSpec(model_path=bf16_model, optimizer=NO_CLIP, num_updates=4), world_size=2)
    step(ranks, batch(num_ranks=2))
    path, other = ranks.call(TrainWorker.stage_weights, str(tmp_path / "staged"))
    assert other == ""
    manifest = read_manifest(Path(path))
    data = np.fromfile(manifest.file, dtype=np.uint8)
    (trained, _) = ranks.call(weights)
    assert {entry.name for entry in manifest.tensors} == trained.keys()
    for entry in manifest.tensors:
        raw = data[entry.offset : entry.offset + entry.num_bytes]
        assert raw.tobytes() == trained[entry.name].tobytes()
    ranks.call(TrainWorker.export, str(tmp_path / "exported"))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert all((exported[name].view(dtype=bits_dtype()).numpy() == bits).all() for name, bits in trained.items())


def bits_dtype() -> Any:
    import torch

    return torch.int16


HOOK = """
def reinforce(logprobs, entropy, inputs):
    return -logprobs * inputs.advantages, {"loss/mine": entropy.detach()}

def a_scalar(logprobs, entropy, inputs):
    return (-logprobs * inputs.advantages).sum(), {}
"""


def test_a_users_loss_replaces_the_built_in_one(ranks: Ranks, model: Path, tmp_path: Path) -> None:
    """Pins a hook that is loaded and not used. On policy the gradient of REINFORCE is that of the clipped loss."""
    (tmp_path / "mine.py").write_text(HOOK)
    ranks.start(fp32(model))
    ((_, expected),) = ranks.call(gradients, batch().updates[0][0])
    ranks.start(fp32(model, loss="./mine.py:reinforce", base_dir=tmp_path))
    ((_, got),) = ranks.call(gradients, batch().updates[0][0])
    for name, gradient in expected.items():
        assert np.linalg.norm(got[name] - gradient) < 1e-5 * np.linalg.norm(gradient), name
    assert step(ranks, batch())["loss/mine"] > 0


def test_a_users_loss_that_returns_a_scalar_is_told_what_to_return(ranks: Ranks, model: Path, tmp_path: Path) -> None:
    """Pins a scalar that is broadcast over the row and trained at a wrong scale."""
    (tmp_path / "mine.py").write_text(HOOK)
    ranks.start(fp32(model, loss="./mine.py:a_scalar", base_dir=tmp_path))
    with pytest.raises(HookError, match="one loss a position"):
        step(ranks, batch())
