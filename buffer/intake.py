"""What is handed in: held against the policy and the ledger before any of it is recorded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from buffer.ledger import Ledger
from buffer.payload import Summary
from buffer.policy import Policy, Versions
from buffer.records import Outcome, Pushed
from slime.errors import BufferFull, DataError, LedgerError


class Attempt(Protocol):
    """Names a leased instance: a `Lease`, or what a client sends of one."""

    @property
    def ordinal(self) -> int: ...

    @property
    def attempt(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A graded group that is handed in, as bytes."""

    ordinal: int
    attempt: int
    payload: bytes
    drop: str = ""
    """Why it is not to be trained; "" to train it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the model that is trained can take; any group, by default."""

    vocab_size: int = 2**31
    """It has no token from here on."""
    context_tokens: int = 2**31
    """Its longest sequence."""


ANY_MODEL = ModelLimits()


class Intake:
    """Checks and records groups; the policy learns of them from the caller.

    Args:
        pass_reward: a sample passes when its reward reaches this; for the statistics of difficulty.
    """

    def __init__(self, ledger: Ledger, policy: Policy, *, pass_reward: float, limits: ModelLimits) -> None:
        self._ledger = ledger
        self._policy = policy
        self._pass_reward = pass_reward
        self._limits = limits

    def record(self, result: Result, summary: Summary) -> bool:
        """Record a result, inside the caller's transaction. Returns False for an attempt that is over.

        Raises:
            DataError: the model has no such tokens, or no such long sequences; nothing is written then.
            LedgerError: samples of another prompt, without tokens, or of weights that were not published yet; likewise.
        """
        self._check_prompt_uid(result.ordinal, summary)
        outcome = self._outcome(summary)
        if result.drop:
            return self._ledger.drop(result.ordinal, attempt=result.attempt, reason=result.drop, outcome=outcome)
        return self._ledger.graded(
            result.ordinal,
            attempt=result.attempt,
            payload=result.payload,
            versions=self._versions(summary),
            outcome=outcome,
        )

    def pushed(self, request: str, payload: bytes, summary: Summary, *, coming: Counter[int]) -> Pushed:
        """A group that nobody was leased, as the ledger records it.

        Args:
            coming: the oldest versions of groups that come in before it.

        Raises:
            DataError: as `record`.
            LedgerError: as `record`, or its tokens are too old already.
            BufferFull: the staleness bound admits no more at this version.
        """
        versions = self._versions(summary)
        if self._policy.staleness(versions) > self._policy.max_staleness:
            raise LedgerError(
                f"got tokens of version {versions.oldest} at version {self._policy.version}, with max_staleness = "
                f"{self._policy.max_staleness}. Roll out with newer weights, or allow more staleness."
            )
        if not self._policy.room(versions.oldest, coming=coming):
            raise BufferFull(
                f"{self._policy.num_admitted + coming.total()} groups are admitted, and version {self._policy.version} "
                f"allows {self._policy.limit}, fewer of old tokens. Push again after the next training step, or allow "
                "more staleness."
            )
        return Pushed(
            prompt_uid=summary.prompt_uid,
            request=request,
            payload=payload,
            versions=versions,
            outcome=self._outcome(summary),
        )

    def check_partial(self, ordinal: int, summary: Summary) -> None:
        """Refuse samples that the next attempt at an instance cannot begin with.

        Raises:
            DataError, LedgerError: as `record`.
        """
        self._check_prompt_uid(ordinal, summary)
        self._versions(summary)

    def _check_prompt_uid(self, ordinal: int, summary: Summary) -> None:
        uid = self._ledger.instance(ordinal).prompt_uid
        if summary.prompt_uid != uid:
            raise LedgerError(
                f"got samples of prompt {summary.prompt_uid} for instance {ordinal}, which is prompt {uid}. Return the "
                "group built for this lease, or drop the lease."
            )

    def _versions(self, summary: Summary) -> Versions:
        """Which weights sampled a group that the model can train."""
        self._check_size(summary)
        if summary.versions is None:
            raise LedgerError(
                f"a group of prompt {summary.prompt_uid} has no sampled tokens. Drop its lease with a reason instead."
            )
        published = self._policy.version
        if published is None or summary.versions.newest > published:
            raise LedgerError(
                f"a group of prompt {summary.prompt_uid} has tokens of version {summary.versions.newest}, and version "
                f"{published} is the last that was published. Report the version that the engine itself answered "
                "with, or publish first."
            )
        return summary.versions

    def _check_size(self, summary: Summary) -> None:
        """Once taken in, it would end the training process, and again after every start."""
        vocab_size, context = self._limits.vocab_size, self._limits.context_tokens
        if summary.largest_token >= vocab_size or summary.num_tokens_max > context:
            raise DataError(
                f"a group of prompt {summary.prompt_uid} has token ids up to {summary.largest_token} and samples of up "
                f"to {summary.num_tokens_max} tokens; this run's model has ids below {vocab_size} and a context of "
                f"{context} tokens. Roll out with its own tokenizer, and drop what is too long."
            )

    def _outcome(self, summary: Summary) -> Outcome | None:
        rewards = summary.rewards
        if not rewards:
            return None
        return Outcome(
            num_samples=len(rewards),
            num_passed=sum(reward >= self._pass_reward for reward in rewards),
            reward_mean=sum(rewards) / len(rewards),
            response_tokens_mean=summary.response_tokens_mean,
        )
