"""What a run shows of itself: metrics, samples, evaluations, and the user's on_step hook."""

from __future__ import annotations

from collections.abc import Sequence

from buffer.difficulty import Difficulty
from buffer.samples import write_samples
from rewards.pool import RewardPool
from rollout.rollout import Rollout
from slime.config import RunConfig
from slime.errors import HookError, StorageError, boundary
from slime.evaluation import Evaluator
from slime.metrics import MetricsLog, evaluated_steps
from slime.preflight import Checked
from slime.survivorship import Survivorship
from slime.types import Group, Metrics, Prompt, Sample, Score
from slime.view import Example, RunView


class Reporting:
    """Hooks of the loop that look and change nothing."""

    def __init__(
        self,
        config: RunConfig,
        checked: Checked,
        *,
        rollout: Rollout,
        pool: RewardPool,
        survivorship: Survivorship,
        difficulty: Difficulty,
        log: MetricsLog,
        view: RunView,
    ) -> None:
        self._config = config
        self._survivorship = survivorship
        self._difficulty = difficulty
        self._on_step = checked.on_step
        self._pool = pool
        self._log = log
        self._view = view
        self._prompts = checked.split.eval[: config.eval.num_prompts]
        self._evaluator = Evaluator(
            rollout,
            pool.grade,
            self._prompts,
            samples_per_prompt=config.eval.samples_per_prompt,
            temperature=config.eval.temperature,
            pass_reward=config.eval.pass_reward,
            concurrency=config.rollout.prompts_per_step * 2,
        )
        self._evaluated = evaluated_steps(config.run_dir)

    async def evaluate(self, step: int) -> None:
        """Evaluate the weights after `step`: before the first step, every so many, and after the last."""
        due = step % self._config.eval.every == 0 or step == self._config.num_steps
        if not (due and self._prompts) or step in self._evaluated:
            return
        metrics, groups = await self._evaluator()
        self._evaluated.add(step)
        self._log.write(step, metrics)
        self._view.evaluated(step, metrics, example=_example(self._prompts[0], groups[0]))

    def step(self, step: int, groups: Sequence[Group], metrics: Metrics) -> None:
        """Write the samples, the metrics and the pass statistics of a step, and warn of what they show."""
        write_samples(self._config.run_dir, groups, step=step)
        survived, warnings = self._survivorship.step(step)
        metrics = metrics | self._pool.metrics() | survived
        self._log.write(step, metrics)
        self._view.step(step, metrics)
        for warning in warnings:
            self._view.warn(warning)
        self._absorb()
        if self._on_step:
            with boundary(HookError, f"hooks.on_step {self._config.hooks.on_step}"):
                self._on_step(step, metrics)

    def _absorb(self) -> None:
        try:
            self._difficulty.absorb(self._config.run_dir)
        except StorageError as error:  # another run may hold the file; the next step catches up
            self._view.warn(f"the pass statistics of this step are not written yet: {error}")


def _example(prompt: Prompt, samples: Sequence[Sample]) -> Example | None:
    scored = [sample for sample in samples if isinstance(sample.verdict, Score)]
    if not scored:
        return None
    question = str(prompt.messages[-1]["content"]) if prompt.messages else prompt.text
    return Example(prompt=question, response=scored[0].response, reward=scored[0].reward)
