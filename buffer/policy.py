"""Which prompt instance goes where next: the one place that admits, selects, evicts and bounds.

             ┌────────── requeue, release of old ones ◀──────────────┐
             ▼                                                       │
    partial, waiting, fresh ─ admit ─▶ running ─ put ─▶ ready ─ select ─▶ packed ─ commit ─▶ committed
                                          └─ drop ─▶ (its place is free again)

Pure bookkeeping: no clock, no I/O, nothing that waits. `buffer.local` records each move in the ledger before it is
made here.

Staleness is kept by pacing, at both ends. With P groups a step, version v published and a bound s, at most
``(v + s + 1) * P`` groups are admitted that are not dropped: as many as the steps consume that may still train tokens
of version v. And a step takes the groups with the oldest tokens first, and is not formed before enough of the old ones
are ready: for every d, at most ``d * P`` groups begun by version ``v - s + d`` may be left for the d steps after it.
So no group becomes too old, however slow it is: what waits is the step. Where steps must not wait
(``wait_for_stragglers = False``), where a run continues, and among groups that are continued from older tokens,
`unfit` finds what became too old; it is never selected.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from slime.errors import LedgerError


class Versions(NamedTuple):
    """The weight versions that sampled a group's tokens."""

    oldest: int
    newest: int


class Running(NamedTuple):
    """An instance that is being rolled out."""

    attempt: int
    version: int
    """No token of it is older: published when it was admitted, or that of the tokens it is continued from."""


class Priority(IntEnum):
    """Who is admitted first; a fresh prompt comes after all of these."""

    PARTIAL = 0
    """Has samples already that only need to be continued or joined by others."""
    WAITING = 1
    """Given back, and begins anew."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Waiting:
    """An instance to be issued again."""

    priority: Priority
    ordinal: int
    attempt: int


@dataclass(slots=True, kw_only=True)
class Policy:
    """Admission, selection, eviction and capacity of one run.

    Args:
        groups_per_step: groups trained in one step.
        num_steps: steps of the whole run.
        max_staleness: highest age, in weight versions, of any trained token.
        oversample: groups that are running or ready at a time, as a multiple of `groups_per_step`; at most, and by
            default, ``max_staleness + 1``.
        wait_for_stragglers: whether a step waits for a group that would be too old for every later one.
    """

    groups_per_step: int
    num_steps: int
    max_staleness: int = 0
    oversample: float | None = None
    wait_for_stragglers: bool = True
    version: int | None = None
    """What the engines answer as; None before the first publish, when nothing is admitted."""
    num_committed: int = 0
    waiting: list[Waiting] = field(default_factory=list)
    """A heap."""
    running: dict[int, Running] = field(default_factory=dict)
    """By ordinal."""
    ready: dict[int, Versions] = field(default_factory=dict)
    """Groups to be trained, by ordinal."""
    packed: dict[int, int] = field(default_factory=dict)
    """Ordinal → step."""
    _out: Counter[int] = field(default_factory=Counter)
    """Oldest version → how many running and ready groups have it: `room` is asked for with every group."""

    @property
    def num_admitted(self) -> int:
        """All that count against the limit."""
        return len(self.running) + len(self.ready) + len(self.packed) + self.num_committed

    @property
    def limit(self) -> int:
        """How many may be admitted at the published version."""
        if self.version is None:
            return 0
        return min(self.version + self.max_staleness + 1, self.num_steps) * self.groups_per_step

    @property
    def capacity(self) -> int:
        """How many more may be admitted now."""
        return self.room(self.version or 0)

    def room(self, oldest: int, *, coming: Counter[int] | None = None) -> int:
        """How many more groups may come in whose oldest tokens are of this version, and still all be trained in time.

        Args:
            coming: how many groups come in before them, by the oldest version of each.
        """
        out = self._out + coming if coming else self._out
        rooms = [self.limit - self.num_admitted - (coming.total() if coming else 0)]
        if self.oversample is not None:
            rooms.append(math.ceil(self.oversample * self.groups_per_step) - out.total())
        horizon = self._horizon
        for steps_left in range(self.max_staleness + 2):
            newest = horizon + steps_left - 1
            if newest >= oldest:
                late = sum(count for version, count in out.items() if version <= newest)
                rooms.append(steps_left * self.groups_per_step - late)
        return max(0, min(rooms))

    @property
    def _horizon(self) -> int:
        """The oldest version that the next step may still train. What is packed already is behind it."""
        return max(self.version or 0, *self.packed.values(), 0) - self.max_staleness

    def next_waiting(self) -> Waiting | None:
        """What is admitted before any fresh prompt."""
        return self.waiting[0] if self.waiting else None

    def admit(self, ordinal: int, attempt: int, *, oldest: int | None = None) -> None:
        """Give a place to the next waiting instance, or to a fresh one when none waits.

        Args:
            oldest: version of the oldest token it is continued from.
        """
        if not self.capacity:
            raise LedgerError(
                f"instance {ordinal} is one too many: {self.num_admitted} of {self.limit} places are taken"
            )
        if self.waiting:
            first = heapq.heappop(self.waiting)
            assert (first.ordinal, first.attempt) == (ordinal, attempt)
        version = self.version or 0
        self.run(ordinal, Running(attempt=attempt, version=version if oldest is None else min(oldest, version)))

    def run(self, ordinal: int, running: Running) -> None:
        """An instance is being rolled out."""
        self.running[ordinal] = running
        self._out[running.version] += 1

    def put(self, ordinal: int, *, versions: Versions) -> None:
        """A running instance's samples are ready to be trained."""
        self.drop(ordinal)
        self.push(ordinal, versions=versions)

    def push(self, ordinal: int, *, versions: Versions) -> None:
        """A group that nobody was leased is ready to be trained."""
        self.ready[ordinal] = versions
        self._out[versions.oldest] += 1

    def drop(self, ordinal: int) -> None:
        """A running instance yields nothing; its place is free."""
        self._left(self.running.pop(ordinal).version)

    def give_up(self, ordinal: int) -> None:
        """A running or ready instance will not be issued again; its place is free."""
        if ordinal in self.running:
            self.drop(ordinal)
        elif ordinal in self.ready:
            self._left(self.ready.pop(ordinal).oldest)

    def _left(self, version: int) -> None:
        self._out[version] -= 1
        if not self._out[version]:
            del self._out[version]

    def requeue(self, ordinal: int, *, attempt: int, partial: bool) -> None:
        """A running or ready instance waits to be issued again, under `attempt`."""
        self.give_up(ordinal)
        priority = Priority.PARTIAL if partial else Priority.WAITING
        heapq.heappush(self.waiting, Waiting(priority=priority, ordinal=ordinal, attempt=attempt))

    def staleness(self, versions: Versions) -> int:
        """Age of the oldest of these tokens, in weight versions."""
        return (self.version or 0) - versions.oldest

    def why_unfit(self, versions: Versions | None) -> str:
        """Why tokens of these versions may not be trained now; "" when they may."""
        if versions is None:
            return "nothing_sampled"
        if self.version is not None and versions.newest > self.version:
            return "weights_lost"  # of a version that a continued run has not reached again
        return "too_old" if self.staleness(versions) > self.max_staleness else ""

    def unfit(self) -> dict[int, str]:
        """Ready instances that may not be trained, with the reason."""
        if self.version is None:
            return {}
        reasons = {ordinal: self.why_unfit(versions) for ordinal, versions in self.ready.items()}
        return {ordinal: reason for ordinal, reason in reasons.items() if reason}

    def select(self, num_groups: int) -> list[int]:
        """The groups of a step, in order of issue; [] while too few are ready, or an old one is still running.

        In order of issue, because a step is then the same whatever order its groups finished in. Call `unfit` before,
        and requeue what it names.

        Raises:
            LedgerError: so many groups are never out at a time.
        """
        most = (self.max_staleness + 1) * self.groups_per_step
        if num_groups > most:
            raise LedgerError(f"{num_groups} groups are asked for, but at most {most} are out at a time")
        if len(self.ready) < num_groups:
            return []
        by_age = sorted(self.ready, key=lambda ordinal: (self.ready[ordinal].oldest, ordinal))
        if self.wait_for_stragglers and self._must_wait(
            [self.ready[ordinal].oldest for ordinal in by_age[num_groups:]]
        ):
            return []
        return sorted(by_age[:num_groups])

    def _must_wait(self, left: list[int]) -> bool:
        """Whether a running group would be too old for every later step.

        Args:
            left: the oldest tokens of the ready groups that the step would leave to later ones.
        """
        running = [entry.version for entry in self.running.values()]
        for num_steps in range(self.max_staleness + 1):
            newest = self._horizon + num_steps
            late = sum(version <= newest for version in running)
            if late and late + sum(version <= newest for version in left) > num_steps * self.groups_per_step:
                return True
        return False

    def pack(self, ordinals: Iterable[int], *, step: int) -> None:
        """Ready instances become the batch of a step."""
        for ordinal in ordinals:
            self.give_up(ordinal)
            self.packed[ordinal] = step

    def release(self, ordinal: int, *, versions: Versions) -> None:
        """A packed instance's step will not happen: it is ready again."""
        del self.packed[ordinal]
        self.push(ordinal, versions=versions)

    def publish(self, version: int) -> None:
        """Engines answer as `version` from now on.

        Raises:
            LedgerError: as `check_publish`.
        """
        self.check_publish(version)
        self.version = version

    def check_publish(self, version: int) -> None:
        """Refuse what `publish` does.

        Raises:
            LedgerError: engines answered as a newer version before.
        """
        if self.version is not None and version < self.version:
            raise LedgerError(f"version {version} was published after version {self.version}")

    def commit(self, step: int) -> list[int]:
        """Everything packed up to `step` is trained. Returns it."""
        done = [ordinal for ordinal, packed_step in self.packed.items() if packed_step <= step]
        for ordinal in done:
            del self.packed[ordinal]
        self.num_committed += len(done)
        return done
