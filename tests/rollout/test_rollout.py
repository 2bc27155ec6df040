"""Rollouts with a hand-written client: what becomes of completions, leases and hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rollout.client import Completion
from rollout.rollout import PromptTooLong, Rollout, Turns
from rollout.tokenizer import Tokenizer
from slime.config import RolloutConfig
from slime.errors import HookError, ModelError
from slime.types import Group, Lease, Prompt, Sample, Status, VersionSpan
from tests.builders import WORDS, make_model, make_prompt


@dataclass
class FakeClient:
    """Answers the words "3 <e>" over two weight versions and remembers what it was asked."""

    finish_reason: str = "stop"
    asked: list[dict[str, Any]] = field(default_factory=list)

    async def generate(self, prompt_tokens: Sequence[int], *, num_samples: int = 1, **options: Any) -> list[Completion]:
        self.asked.append({"prompt_tokens": list(prompt_tokens), "num_samples": num_samples, **options})
        spans = [VersionSpan(start=0, end=1, version=4), VersionSpan(start=1, end=2, version=5)]
        completion = Completion(
            tokens=[WORDS.index("3"), WORDS.index("<e>")],
            logprobs=[-0.5, -0.25],
            version_spans=spans,
            finish_reason=self.finish_reason,
            cached_tokens=0,
        )
        return [completion] * num_samples


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(make_model(tmp_path_factory.mktemp("model"))))


def make_rollout(client: FakeClient, tokenizer: Tokenizer, *, deterministic: bool = False, **options: Any) -> Rollout:
    hook = options.pop("hook", None)
    config = RolloutConfig(samples_per_prompt=3, **{"max_response_tokens": 8, **options})
    return Rollout(client, tokenizer, config=config, seed=1, deterministic=deterministic, generate=hook)  # type: ignore[arg-type]


def make_lease(**lease: Any) -> Lease:
    return Lease(**{"ordinal": 7, "epoch": 0, "attempt": 0, "prompt": make_prompt(), **lease})


async def test_a_group_has_aligned_samples_with_the_engines_spans(tokenizer: Tokenizer) -> None:
    """Pins what the trainer relies on: given tokens are masked, spans cover exactly the sampled ones."""
    group = await make_rollout(FakeClient(), tokenizer, temperature=0.8).generate(make_lease())
    prompt = tokenizer.encode_prompt(make_prompt())
    assert group.id == "p0:7"
    assert [sample.index for sample in group.samples] == [0, 1, 2]
    assert len({sample.rollout_id for sample in group.samples}) == 3
    for sample in group.samples:
        assert sample.tokens == [*prompt, WORDS.index("3"), WORDS.index("<e>")]
        assert sample.loss_mask == [0] * len(prompt) + [1, 1]
        assert sample.rollout_logprobs == [0.0] * len(prompt) + [-0.5, -0.25]
        assert [(span.start - len(prompt), span.version) for span in sample.version_spans] == [(0, 4), (1, 5)]
        assert (sample.response, sample.status, sample.temperature) == ("3", Status.COMPLETED, 0.8)


@pytest.mark.parametrize(
    ("reason", "status"), [("stop", Status.COMPLETED), ("length", Status.TRUNCATED), ("abort", Status.ABORTED)]
)
async def test_how_a_sample_ended_is_kept(tokenizer: Tokenizer, reason: str, status: Status) -> None:
    """Pins that a cut answer is not taken for a finished one."""
    group = await make_rollout(FakeClient(finish_reason=reason), tokenizer).generate(make_lease())
    assert {sample.status for sample in group.samples} == {status}


async def test_another_attempt_draws_the_same_seeds_and_another_epoch_does_not(tokenizer: Tokenizer) -> None:
    """Pins repeatability across crashes, and that the second epoch is not a copy of the first."""
    client = FakeClient()
    rollout = make_rollout(client, tokenizer, deterministic=True)
    for lease in (make_lease(), make_lease(attempt=1), make_lease(epoch=1)):
        await rollout.generate(lease)
    first, again, later = [asked["seeds"] for asked in client.asked]
    assert first == again
    assert not set(first) & set(later)
    assert len(set(first)) == 3


async def test_without_determinism_no_seed_is_sent(tokenizer: Tokenizer) -> None:
    """Pins the cheaper request."""
    client = FakeClient()
    await make_rollout(client, tokenizer).generate(make_lease())
    assert client.asked[0]["seeds"] is None


async def test_a_prompt_that_leaves_no_room_is_refused_before_it_is_sent(tokenizer: Tokenizer) -> None:
    """Pins that it is counted and skipped; the engine would cut the answer instead."""
    client = FakeClient()
    rollout = make_rollout(client, tokenizer, max_response_tokens=510)
    with pytest.raises(PromptTooLong, match=r"prompt p0 has 4 tokens.*context of 512"):
        await rollout.generate(make_lease())
    assert client.asked == []


async def test_evaluation_samples_take_their_own_number_and_temperature(tokenizer: Tokenizer) -> None:
    """Pins that evaluation is not measured at the training temperature."""
    client = FakeClient()
    samples = await make_rollout(client, tokenizer).sample(make_prompt(), num_samples=2, temperature=0.0)
    assert [sample.temperature for sample in samples] == [0.0, 0.0]
    assert client.asked[0]["temperature"] == 0.0


def begun(status: Status, *, index: int, tokenizer: Tokenizer, num_sampled: int = 2) -> Sample:
    """A sample of an earlier attempt, sampled by version 1."""
    sample = Sample(prompt_uid="p0", index=index, rollout_id=f"p0:7:0:{index}", status=status, response="1")
    sample.append(tokenizer.encode_prompt(make_prompt()))
    sample.append([WORDS.index("1")] * num_sampled, logprobs=[-1.0] * num_sampled, version=1)
    return sample


def continued(*samples: Sample) -> Lease:
    partial = Group(prompt=make_prompt(), ordinal=7, epoch=0, attempt=1, samples=list(samples))
    return make_lease(attempt=1, partial=partial)


async def test_a_partial_group_is_completed_from_what_it_has(tokenizer: Tokenizer) -> None:
    """Pins: finished answers that are sampled again, so that only short ones survive, and tokens thrown away."""
    client = FakeClient()
    finished = begun(Status.TRUNCATED, index=2, tokenizer=tokenizer)
    stopped = begun(Status.ABORTED, index=1, tokenizer=tokenizer)
    rollout = make_rollout(client, tokenizer, deterministic=True)
    group = await rollout.generate(continued(finished, stopped))
    assert [sample.index for sample in group.samples] == [0, 1, 2]
    assert group.samples[2] == finished
    prompt = tokenizer.encode_prompt(make_prompt())
    one = group.samples[1]
    assert one.tokens == [*stopped.tokens, WORDS.index("3"), WORDS.index("<e>")]
    assert [span.version for span in one.version_spans] == [1, 4, 5], "which weights sampled what stays visible"
    assert (one.response, one.status, one.loss_mask) == ("1 1 3", Status.COMPLETED, [0] * len(prompt) + [1] * 4)
    anew, goes_on = sorted(client.asked, key=lambda asked: len(asked["prompt_tokens"]))
    assert (anew["prompt_tokens"], anew["num_samples"], anew["max_new_tokens"]) == (prompt, 1, 8)
    assert (goes_on["prompt_tokens"], goes_on["max_new_tokens"]) == (stopped.tokens, 6)
    whole = FakeClient()
    await make_rollout(whole, tokenizer, deterministic=True).generate(make_lease())
    assert [*anew["seeds"], *goes_on["seeds"]] == whole.asked[0]["seeds"][:2], "the draws of the first attempt"
    assert len(stopped.tokens) == len(prompt) + 2, "the lease may be handed out again"


async def test_an_answer_stopped_at_its_limit_is_not_asked_for_more(tokenizer: Tokenizer) -> None:
    """Pins: a request for 0 tokens, which the engine refuses and which would end the run."""
    client = FakeClient()
    samples = [begun(Status.ABORTED, index=i, tokenizer=tokenizer, num_sampled=8) for i in range(3)]
    group = await make_rollout(client, tokenizer).generate(continued(*samples))
    assert {sample.status for sample in group.samples} == {Status.TRUNCATED}
    assert client.asked == []


async def test_a_hook_keeps_its_finished_samples_and_begins_aborted_ones_anew(tokenizer: Tokenizer) -> None:
    """Pins: a tool's state that nobody restored under tokens that were sampled with it."""
    filled: list[int] = []

    async def hook(prompt: Prompt, sample: Sample, client: Turns) -> None:
        filled.append(sample.index)
        sample.append(client.tokenizer.encode_prompt(prompt))
        await client.generate(sample)

    finished = begun(Status.COMPLETED, index=0, tokenizer=tokenizer)
    stopped = begun(Status.ABORTED, index=1, tokenizer=tokenizer)
    group = await make_rollout(FakeClient(), tokenizer, hook=hook).generate(continued(finished, stopped))
    assert sorted(filled) == [1, 2]
    assert group.samples[0] == finished
    assert [span.version for sample in group.samples[1:] for span in sample.version_spans] == [4, 5, 4, 5]


async def test_a_hook_takes_several_turns_and_given_tokens_are_not_trained(tokenizer: Tokenizer) -> None:
    """Pins multi-turn samples: a tool's answer carries no gradient, and the turns share one token budget."""
    client = FakeClient()

    async def two_turns(prompt: Prompt, sample: Sample, client: Turns) -> None:
        sample.append(client.tokenizer.encode_prompt(prompt))
        await client.generate(sample)
        sample.append(client.tokenizer.encode("; ="))
        await client.generate(sample)

    group = await make_rollout(client, tokenizer, hook=two_turns, max_response_tokens=6).generate(make_lease())
    assert [asked["max_new_tokens"] for asked in client.asked[:6:3]] == [6, 4]
    for sample in group.samples:
        assert sample.loss_mask == [0, 0, 0, 0, 1, 1, 0, 0, 1, 1]
        assert sample.response == "3 3"


async def test_a_hook_that_fails_or_samples_nothing_is_named(tokenizer: Tokenizer) -> None:
    """Pins that a broken hook is the user's to see and not an empty group."""

    async def broken(prompt: Prompt, sample: Sample, client: Turns) -> None:
        raise KeyError("tool")

    async def idle(prompt: Prompt, sample: Sample, client: Turns) -> None:
        sample.append([5, 6])

    with pytest.raises(HookError, match=r"\./agent\.py:run.*KeyError"):
        await make_rollout(FakeClient(), tokenizer, hook=broken, generate="./agent.py:run").generate(make_lease())
    with pytest.raises(HookError, match="sampled nothing"):
        await make_rollout(FakeClient(), tokenizer, hook=idle, generate="./agent.py:run").generate(make_lease())


def test_messages_pass_through_the_chat_template_and_text_does_not(tokenizer: Tokenizer) -> None:
    """Pins what the policy sees."""
    words = [
        WORDS[token]
        for token in tokenizer.encode_prompt(Prompt(uid="a", messages=({"role": "user", "content": "1 + 2"},)))
    ]
    assert words == ["<s>", "1", "+", "2"]
    assert [WORDS[token] for token in tokenizer.encode_prompt(Prompt(uid="b", text="1 + 2"))] == ["1", "+", "2"]


def test_every_end_token_of_the_directory_counts(tmp_path: Path) -> None:
    """Pins models whose text ends with another token than their chat; the chat's, the tokenizer's own, comes first."""
    directory = make_model(tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert Tokenizer(str(directory)).eos_token_ids == (2, 1)


def test_a_directory_without_a_tokenizer_or_config_is_a_model_error(tmp_path: Path) -> None:
    """Pins the message of a wrong model.path."""
    with pytest.raises(ModelError, match=r"config\.json"):
        Tokenizer(str(tmp_path))
