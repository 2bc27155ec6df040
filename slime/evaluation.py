"""Held-out evaluation: pass@1 and pass@k of the engines' current weights."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from slime.errors import PromptError
from slime.types import Failed, Metrics, Prompt, Sample, Score, Verdict

SET = "held_out"


class SamplePrompt(Protocol):
    """Draws samples of a prompt outside the training stream."""

    async def sample(self, prompt: Prompt, *, num_samples: int, temperature: float, seed_salt: str) -> list[Sample]: ...


class Evaluator:
    """Samples every held-out prompt and grades the samples as training does.

    Args:
        rollout: draws the samples.
        grade: the verdicts of a prompt's samples.
        prompts: the held-out set.
        pass_reward: a sample passes when its reward reaches this.
        concurrency: prompts in flight at a time.
    """

    def __init__(
        self,
        rollout: SamplePrompt,
        grade: Callable[[Sequence[Sample], Prompt], Awaitable[list[Verdict]]],
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        temperature: float,
        pass_reward: float,
        concurrency: int,
    ) -> None:
        self._rollout = rollout
        self._grade = grade
        self._prompts = prompts
        self._samples_per_prompt = samples_per_prompt
        self._temperature = temperature
        self._pass_reward = pass_reward
        self._slots = asyncio.Semaphore(concurrency)

    async def __call__(self) -> tuple[Metrics, list[list[Sample]]]:
        """Metrics ``eval/held_out/*`` and the judged samples of every prompt.

        pass@1 is the mean over all samples with a verdict; pass@k the share of prompts one of whose k samples passed.
        A failed verdict counts in ``failures``, never as a failed sample; a prompt that cannot be rolled out in
        ``skipped_prompts``.
        """
        async with asyncio.TaskGroup() as tasks:
            drawn = [tasks.create_task(self._one(prompt)) for prompt in self._prompts]
        groups = [task.result() for task in drawn]
        return self._metrics(groups), groups

    async def _one(self, prompt: Prompt) -> list[Sample]:
        async with self._slots:
            try:
                samples = await self._rollout.sample(
                    prompt, num_samples=self._samples_per_prompt, temperature=self._temperature, seed_salt=SET
                )
            except PromptError:
                return []
            for sample, verdict in zip(samples, await self._grade(samples, prompt), strict=True):
                sample.verdict = verdict
            return samples

    def _metrics(self, groups: Sequence[Sequence[Sample]]) -> Metrics:
        judged = [[s for s in group if isinstance(s.verdict, Score)] for group in groups]
        samples = [sample for group in judged for sample in group]
        passed = [[sample.reward >= self._pass_reward for sample in group] for group in judged if group]
        parts: dict[str, list[float]] = {}
        for sample in samples:
            assert isinstance(sample.verdict, Score)
            for name, value in sample.verdict.parts.items():
                parts.setdefault(name, []).append(value)
        values = {
            "pass@1": _mean([float(p) for group in passed for p in group]),
            f"pass@{self._samples_per_prompt}": _mean([float(any(group)) for group in passed]),
            "reward_mean": _mean([sample.reward for sample in samples]),
            "response_tokens_mean": _mean([float(sample.num_response_tokens) for sample in samples]),
            "skipped_prompts": float(sum(not group for group in groups)),
            "failures": float(sum(isinstance(s.verdict, Failed) for group in groups for s in group)),
        }
        values |= {name: _mean(numbers) for name, numbers in parts.items()}
        return {f"eval/{SET}/{name}": value for name, value in values.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
