"""Leases that end: who says nothing for so long is taken for dead, and what it had is given to others."""

from __future__ import annotations

import asyncio
import logging

from buffer.intake import Attempt
from buffer.local import LocalBuffer
from slime.errors import StorageError
from slime.types import Lease

logger = logging.getLogger(__name__)


class LeaseTimer:
    """Expires leases of a buffer `lease_s` after they were granted or renewed last.

    One timer of the event loop, for the next deadline alone. The deadlines are in order, because every lease gets the
    same time: a renewed one goes to the end. One that was handed in meanwhile is passed over when its turn comes.
    """

    def __init__(self, buffer: LocalBuffer, *, lease_s: float) -> None:
        self._buffer = buffer
        self._lease_s = lease_s
        self._loop = asyncio.get_running_loop()
        self._deadlines: dict[int, tuple[Attempt, float]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def grant(self, lease: Lease) -> None:
        """Begin the time of a lease, or begin it anew."""
        self._deadlines.pop(lease.ordinal, None)
        self._deadlines[lease.ordinal] = (lease, self._loop.time() + self._lease_s)
        self._arm()

    def renew(self, attempt: Attempt) -> bool:
        """Begin the time of a lease anew; False when it is over."""
        lease = self._buffer.leased(attempt)
        if lease is not None:
            self.grant(lease)
        return lease is not None

    def close(self) -> None:
        """Expire nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._timer is None and self._deadlines:
            _, deadline = next(iter(self._deadlines.values()))
            self._timer = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._deadlines and next(iter(self._deadlines.values()))[1] <= now:
            lease, _ = self._deadlines.pop(next(iter(self._deadlines)))
            known = self._buffer.leased(lease)
            if known is not None:
                self._expire_one(known)
        self._arm()

    def _expire_one(self, lease: Lease) -> None:
        try:
            self._buffer.expire(lease)
        except StorageError as error:  # the disk may have room again by its next turn
            logger.warning("lease %d cannot be given back: %s", lease.ordinal, error)
            self.grant(lease)
