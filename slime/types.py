"""What flows through a run: Prompt → Group of Samples → TrainBatch.

No torch here: these values cross process boundaries and are read by code that must start at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Message = Mapping[str, Any]
"""One chat message: ``{"role": ..., "content": ...}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem to solve. `uid` is the hash of its content, so the same problem has the same uid in every run.

    Either `messages` (rendered with the model's chat template) or `text` (tokenised as it stands) is set.
    """

    uid: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    label: Any = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Status(StrEnum):
    """How a sample's generation ended."""

    COMPLETED = "completed"
    """The policy ended its answer."""
    TRUNCATED = "truncated"
    """The token limit ended it."""
    ABORTED = "aborted"
    """It was stopped from outside and may be continued from its partial tokens."""
    FAILED = "failed"
    """It could not be generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A verdict with a value: what the sample is worth, and the named parts that make it up (logged apart)."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abstain:
    """A verdict without a value: the reward could have judged and chose not to."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """No verdict: the reward could not judge. Never turned into a number."""

    kind: str
    """One word: ``timeout``, ``raised``, ``bad_value``, ``worker_died``, ``not_generated``, or a user's own."""
    detail: str
    retryable: bool = False


Verdict = Score | Abstain | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens ``[start, end)`` of a sample were produced by weights `version`, as the engine itself reported."""

    start: int
    end: int
    version: int


@dataclass(slots=True, kw_only=True)
class Sample:
    """One rollout: everything its gradient needs.

    `tokens`, `loss_mask` and `rollout_logprobs` have one entry a token and are only ever grown together by `append`.
    """

    prompt_uid: str
    index: int
    """Position in its group."""
    rollout_id: str
    """Segments of one rollout share it; the loss counts rollouts."""
    tokens: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    """1 where the policy sampled this token, 0 where it was given."""
    rollout_logprobs: list[float] = field(default_factory=list)
    """Natural log-probability the engine reported for each sampled token; 0.0 where `loss_mask` is 0."""
    version_spans: list[VersionSpan] = field(default_factory=list)
    temperature: float = 1.0
    """The behaviour distribution is softmax(logits / temperature); the trainer divides by the same."""
    status: Status = Status.COMPLETED
    response: str = ""
    """The sampled tokens as text, without special tokens."""
    verdict: Verdict | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def append(
        self, tokens: Sequence[int], *, logprobs: Sequence[float] | None = None, version: int | None = None
    ) -> None:
        """Add tokens at the end: given ones without `logprobs`, sampled ones with `logprobs` and `version`.

        Raises:
            ValueError: `logprobs` has another length than `tokens`, or sampled tokens carry no version.
        """
        if logprobs is None:
            self.loss_mask.extend([0] * len(tokens))
            self.rollout_logprobs.extend([0.0] * len(tokens))
        else:
            if len(logprobs) != len(tokens):
                raise ValueError(f"{len(tokens)} tokens came with {len(logprobs)} logprobs")
            if version is None:
                raise ValueError("sampled tokens need the weight version that produced them")
            start = len(self.tokens)
            self.version_spans.append(VersionSpan(start=start, end=start + len(tokens), version=version))
            self.loss_mask.extend([1] * len(tokens))
            self.rollout_logprobs.extend(logprobs)
        self.tokens.extend(tokens)

    @property
    def num_response_tokens(self) -> int:
        """Tokens the policy sampled."""
        return sum(self.loss_mask)

    @property
    def oldest_version(self) -> int:
        """Oldest weights any token came from; staleness is the trainer's version minus this."""
        return min(span.version for span in self.version_spans)

    @property
    def reward(self) -> float:
        """The value of the verdict.

        Raises:
            ValueError: the sample has no Score; callers drop such samples first.
        """
        if not isinstance(self.verdict, Score):
            raise ValueError(f"sample {self.rollout_id} has no score but {self.verdict!r}")
        return self.verdict.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to roll out one prompt instance: what `Buffer.admit` hands to a rollout worker."""

    ordinal: int
    """Number of this instance in the run, counting from 0 in the order of issue."""
    epoch: int
    attempt: int
    prompt: Prompt
    partial: Group | None = None
    """Samples of an earlier attempt to begin with: finished ones to keep, aborted ones to continue."""


@dataclass(slots=True, kw_only=True)
class Group:
    """All samples of one prompt instance at one attempt."""

    prompt: Prompt
    ordinal: int
    epoch: int
    attempt: int
    samples: list[Sample]

    @property
    def id(self) -> str:
        """Unique in a run; group statistics are computed by it."""
        return f"{self.prompt.uid}:{self.ordinal}"


Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Whole sequences packed into one row. Every array but `cu_seqlens` has shape [T].

    Entries are aligned with the position that *predicts*: position t predicts ``targets[t]``, and ``weights``,
    ``advantages`` and the log-probs at t belong to that target.
    """

    tokens: Int64
    targets: Int64
    """The next token inside the same sequence; 0 at a sequence's last position."""
    positions: Int64
    """Position inside its own sequence."""
    cu_seqlens: Int64
    """[num_sequences + 1]: sequence i is ``[cu_seqlens[i], cu_seqlens[i + 1])``."""
    weights: Float32
    """Weight of this prediction in the step's loss, ``sum(weights * per_token_loss)``; 0 where nothing is trained.

    The aggregation (by sequence, token, prompt or a constant) and its denominator are fixed over the whole batch before
    it is split, so that no split changes the gradient."""
    advantages: Float32
    rollout_logprobs: Float32
    """NaN for tokens of unknown probability: their samples were rolled out elsewhere and came without."""
    old_logprobs: Float32 | None
    """Trainer's log-probs before the step's first update; None means the current ones, detached (ratio 1)."""
    temperatures: Float32

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """One training step: for each optimizer update, for each data-parallel rank, its micro-batches (equally many)."""

    updates: list[list[list[MicroBatch]]]
    """``updates[update][rank][i]``"""
    metrics: dict[str, float]
    """What building it measured: rewards, lengths, staleness."""

    @property
    def num_tokens(self) -> int:
        return sum(mb.num_tokens for ranks in self.updates for mbs in ranks for mb in mbs)


Metrics = dict[str, float]
