"""One lease in, one group of samples out."""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

from rollout.client import Completion, GenerationClient
from rollout.tokenizer import Tokenizer
from slime.config import RolloutConfig
from slime.errors import HookError, PromptError, boundary
from slime.protocols import GenerateHook
from slime.types import Group, Lease, Prompt, Sample, Status

STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}
FINISHED = (Status.COMPLETED, Status.TRUNCATED)


class PromptTooLong(PromptError):  # noqa: N818  # it is what happened, like StopRun
    """A prompt and the longest allowed response do not fit into the model's context together."""

    reason = "prompt_too_long"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What a generate hook calls, made for one sample: it continues the sample, however many turns the hook takes."""

    client: GenerationClient
    tokenizer: Tokenizer
    max_response_tokens: int
    """Sampled tokens of the whole sample, over all turns."""
    seed: int | None

    async def generate(self, sample: Sample, *, max_new_tokens: int | None = None) -> Completion:
        """Sample one turn from `sample.tokens`, append it, and set the sample's status.

        Raises:
            PromptTooLong: the turn's prompt leaves no room in the context.
            EngineError: no engine answered as it should.
        """
        left = self.max_response_tokens - sample.num_response_tokens
        room = self.tokenizer.max_length - len(sample.tokens)
        limit = min(left, room, max_new_tokens or left)
        if limit < 1:
            raise PromptTooLong(
                f"prompt {sample.prompt_uid}: after {len(sample.tokens)} tokens nothing is left of the "
                f"{self.max_response_tokens} response tokens or of the context's {self.tokenizer.max_length}. Take "
                "fewer turns, or raise rollout.max_response_tokens"
            )
        (completion,) = await self.client.generate(
            sample.tokens,
            max_new_tokens=limit,
            temperature=sample.temperature,
            seeds=None if self.seed is None else [self.seed],
            stop_token_ids=self.tokenizer.eos_token_ids,
        )
        append(sample, completion)
        return completion


class Rollout:
    """Turns leases into groups.

    Args:
        client: to the engines.
        tokenizer: of the model they serve.
        config: the run's rollout table.
        seed: the run's.
        deterministic: sample from seeds that depend on (run seed, prompt, epoch, sample index) alone, so that another
            attempt gives the same tokens. Needs engines in deterministic mode.
        generate: fills one sample; by default a single turn, all samples of a group in one request.
    """

    def __init__(
        self,
        client: GenerationClient,
        tokenizer: Tokenizer,
        *,
        config: RolloutConfig,
        seed: int,
        deterministic: bool,
        generate: GenerateHook | None = None,
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._config = config
        self._seed = seed
        self._deterministic = deterministic
        self._hook = generate

    async def generate(self, lease: Lease) -> Group:
        """Roll out the leased prompt.

        Of the samples an earlier attempt left, finished ones are kept, and aborted ones go on from their tokens under
        the same seed and limits: their version spans tell which weights sampled what. A hook's aborted samples begin
        anew, since only the hook knows what led to their tokens.

        Raises:
            PromptTooLong: it does not fit into the context; the lease yields nothing.
            HookError: the user's generate hook failed.
            EngineError: no engine answered as it should.
        """
        samples = await self._samples(
            lease.prompt,
            num_samples=self._config.samples_per_prompt,
            temperature=self._config.temperature,
            salt=f"epoch {lease.epoch}",
            rollout_prefix=f"{lease.prompt.uid}:{lease.ordinal}:{lease.attempt}",
            begun=lease.partial.samples if lease.partial else (),
        )
        return Group(
            prompt=lease.prompt, ordinal=lease.ordinal, epoch=lease.epoch, attempt=lease.attempt, samples=samples
        )

    async def sample(
        self, prompt: Prompt, *, num_samples: int, temperature: float, seed_salt: str = "eval"
    ) -> list[Sample]:
        """Samples outside training: for evaluation.

        Raises:
            PromptTooLong, HookError, EngineError: as `generate`.
        """
        return await self._samples(
            prompt,
            num_samples=num_samples,
            temperature=temperature,
            salt=seed_salt,
            rollout_prefix=f"{prompt.uid}:{seed_salt}",
        )

    async def _samples(
        self,
        prompt: Prompt,
        *,
        num_samples: int,
        temperature: float,
        salt: str,
        rollout_prefix: str,
        begun: Sequence[Sample] = (),
    ) -> list[Sample]:
        kept = {sample.index: sample for sample in begun if sample.status in FINISHED}
        aborted = [] if self._hook else [copy.deepcopy(sample) for sample in begun if sample.status is Status.ABORTED]
        new = [
            Sample(prompt_uid=prompt.uid, index=i, rollout_id=f"{rollout_prefix}:{i}", temperature=temperature)
            for i in sorted(set(range(num_samples)) - kept.keys() - {sample.index for sample in aborted})
        ]
        if self._hook is None:
            calls = [self._continue(sample, seed=self._seed_of(sample, salt=salt)) for sample in aborted]
            await _all(([self._one_turn(prompt, new, salt=salt)] if new else []) + calls)
        else:
            await _all([self._run_hook(self._hook, prompt, sample, salt=salt) for sample in new])
        return sorted([*kept.values(), *aborted, *new], key=lambda sample: sample.index)

    async def _one_turn(self, prompt: Prompt, samples: list[Sample], *, salt: str) -> None:
        tokens = self._tokenizer.encode_prompt(prompt)
        self._require_room(prompt, len(tokens))
        seeds = [seed for sample in samples if (seed := self._seed_of(sample, salt=salt)) is not None]
        completions = await self._client.generate(
            tokens,
            max_new_tokens=self._config.max_response_tokens,
            temperature=samples[0].temperature,
            num_samples=len(samples),
            seeds=seeds or None,
            stop_token_ids=self._tokenizer.eos_token_ids,
        )
        for sample, completion in zip(samples, completions, strict=True):
            sample.append(tokens)
            append(sample, completion)
            sample.response = self._tokenizer.decode(completion.tokens)

    async def _continue(self, sample: Sample, *, seed: int | None) -> None:
        """Sample the rest of an answer that was stopped."""
        if sample.num_response_tokens < self._config.max_response_tokens:
            await self._turns(seed).generate(sample)
        else:
            sample.status = Status.TRUNCATED
        sample.response = self._response(sample)

    async def _run_hook(self, hook: GenerateHook, prompt: Prompt, sample: Sample, *, salt: str) -> None:
        turns = self._turns(self._seed_of(sample, salt=salt))
        with boundary(HookError, f"rollout.generate = {self._config.generate!r}"):
            await hook(prompt, sample, turns)
        self._finish(sample)

    def _turns(self, seed: int | None) -> Turns:
        return Turns(
            client=self._client,
            tokenizer=self._tokenizer,
            max_response_tokens=self._config.max_response_tokens,
            seed=seed,
        )

    def _seed_of(self, sample: Sample, *, salt: str) -> int | None:
        if not self._deterministic:
            return None
        return sample_seed(self._seed, sample.prompt_uid, salt=salt, index=sample.index)

    def _response(self, sample: Sample) -> str:
        sampled = [token for token, mask in zip(sample.tokens, sample.loss_mask, strict=True) if mask]
        return self._tokenizer.decode(sampled)

    def _finish(self, sample: Sample) -> None:
        if not len(sample.tokens) == len(sample.loss_mask) == len(sample.rollout_logprobs):
            raise HookError(
                f"rollout.generate = {self._config.generate!r} left {len(sample.tokens)} tokens, "
                f"{len(sample.loss_mask)} loss_mask and {len(sample.rollout_logprobs)} rollout_logprobs: grow them "
                "with sample.append only, or with client.generate"
            )
        if sample.num_response_tokens == 0:
            raise HookError(
                f"rollout.generate = {self._config.generate!r} sampled nothing: await client.generate(sample) at least "
                "once, or drop the prompt with buffer.filter"
            )
        if not sample.response:
            sample.response = self._response(sample)

    def _require_room(self, prompt: Prompt, num_prompt_tokens: int) -> None:
        limit = self._config.max_response_tokens
        if num_prompt_tokens + limit > self._tokenizer.max_length:
            raise PromptTooLong(
                f"prompt {prompt.uid} has {num_prompt_tokens} tokens; with rollout.max_response_tokens = {limit} that "
                f"is more than the model's context of {self._tokenizer.max_length}. Shorten the prompt, or lower "
                "rollout.max_response_tokens"
            )


async def _all(calls: Sequence[Coroutine[None, None, None]]) -> None:
    """Await calls side by side; the first failure cancels the others and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for call in calls:
                tasks.create_task(call)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def append(sample: Sample, completion: Completion) -> None:
    """Add a completion to `sample`, one span a weight version, and take over its status."""
    for span in completion.version_spans:
        part = slice(span.start, span.end)
        sample.append(completion.tokens[part], logprobs=completion.logprobs[part], version=span.version)
    sample.status = STATUS[completion.finish_reason]


def sample_seed(run_seed: int, prompt_uid: str, *, salt: str, index: int) -> int:
    """31 bits that depend on nothing but these four values, on every machine and in every Python process."""
    digest = hashlib.blake2b(f"{run_seed}\0{prompt_uid}\0{salt}\0{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
