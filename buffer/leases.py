"""The leases of a buffer: made from instances, out with their holders, and ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from buffer.intake import Attempt
from buffer.ledger import Ledger
from buffer.payload import decode, versions_of
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from buffer.records import Instance
from buffer.schema import State
from slime.errors import LedgerError
from slime.types import Group, Lease

MAX_SHOWN = 8
"""Instances that `describe` lists."""


@dataclass(slots=True, kw_only=True)
class _Out:
    lease: Lease
    since: float
    doing: str = "generating"


class Leases:
    """What is out, by ordinal.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, ledger: Ledger, prompts: PromptOrder, policy: Policy, *, clock: Callable[[], float]) -> None:
        self._ledger = ledger
        self._prompts = prompts
        self._policy = policy
        self._clock = clock
        self._out: dict[int, _Out] = {}

    def __len__(self) -> int:
        return len(self._out)

    def __iter__(self) -> Iterator[Lease]:
        """In order of issue."""
        return (self._out[ordinal].lease for ordinal in sorted(self._out))

    def make_next(self) -> Lease:
        """A lease of the first waiting instance, or of a fresh prompt, inside the caller's transaction."""
        waiting = self._policy.next_waiting()
        if waiting:
            return self.make(self._ledger.instance(waiting.ordinal))
        position = self._ledger.next_position
        epoch, prompt = self._prompts.prompt_at(position)
        ordinal = self._ledger.issue(prompt.uid, epoch=epoch, position=position)
        return Lease(ordinal=ordinal, epoch=epoch, attempt=0, prompt=prompt)

    def make(self, instance: Instance) -> Lease:
        """A lease of an instance, with the samples of an earlier attempt that may still be trained."""
        assert instance.position is not None
        _, prompt = self._prompts.prompt_at(instance.position)
        ordinal, epoch, attempt = instance.ordinal, instance.epoch, instance.attempt
        payload = self._ledger.payload(ordinal)
        partial = self.fit_part(decode(payload, ordinal=ordinal, epoch=epoch, attempt=attempt)) if payload else None
        return Lease(ordinal=ordinal, epoch=epoch, attempt=attempt, prompt=prompt, partial=partial)

    def check_prompt(self, instance: Instance) -> None:
        """See that an instance is of the prompt it was issued as.

        Raises:
            LedgerError: it would be of another one now.
        """
        assert instance.position is not None
        _, prompt = self._prompts.prompt_at(instance.position)
        if prompt.uid != instance.prompt_uid:
            raise LedgerError(
                f"instance {instance.ordinal} was prompt {instance.prompt_uid} and would now be {prompt.uid}. "
                "Restore the prompts and the seed the run began with, or start anew in another run_dir."
            )

    def fit_part(self, group: Group) -> Group | None:
        """The samples of a group that may still be trained; None when there are none."""
        group.samples = [sample for sample in group.samples if not self._policy.why_unfit(versions_of([sample]))]
        return group if group.samples else None

    def add(self, lease: Lease) -> None:
        """It is out now."""
        self._out[lease.ordinal] = _Out(lease=lease, since=self._clock())

    def end(self, ordinal: int) -> None:
        """It is over, if it was out."""
        self._out.pop(ordinal, None)

    def is_graded_next(self, ordinal: int) -> None:
        """Its samples are there; for `describe`."""
        self._out[ordinal].doing = "grading"

    def of(self, attempt: Attempt) -> Lease | None:
        """The lease of this attempt while it is out."""
        known = self._out.get(attempt.ordinal)
        return known.lease if known and known.lease.attempt == attempt.attempt else None

    def of_request(self, request: str) -> Lease | None:
        """The lease that a request of this name was answered with.

        Raises:
            LedgerError: what it was answered with is over.
        """
        known = self._ledger.of_request(request)
        if known is None or known.state == State.ISSUED:  # given back since: a lease of it would be another one
            return None
        if known.ordinal not in self._out:
            raise LedgerError(
                f"request {request!r} was answered with instance {known.ordinal}, which is {known.state} now. Give "
                "every request a name of its own, and repeat the name only to repeat the request."
            )
        return self._out[known.ordinal].lease

    def describe(self) -> str:
        """Who is out for how long, longest first."""
        now = self._clock()
        longest = sorted(self._out.values(), key=lambda entry: entry.since)
        shown = [
            f"{entry.lease.ordinal} ({entry.doing}, attempt {entry.lease.attempt}, {now - entry.since:.0f} s)"
            for entry in longest[:MAX_SHOWN]
        ]
        if len(longest) > MAX_SHOWN:
            shown.append(f"and {len(longest) - MAX_SHOWN} more")
        return ", ".join(shown) or "none"
