"""`slime train`, killed at a place in its ledger: ``python -m tests.integration.crashing WHERE before|after COMMAND``.

WHERE is the number of a transaction, or ``commit`` for the first commit of a step. All but the subclass that sends the
SIGKILL is the real thing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import slime.run
from slime.cli import main
from tests.crash_points import CrashingLedger

WHERE, WHEN = sys.argv[1:3]


class Ledger(CrashingLedger):
    crash_at = -1 if WHERE == "commit" else int(WHERE)
    crash_before = WHEN == "before"

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[None]:
        here = durable and WHERE == "commit"
        with super()._transaction(durable=durable):
            yield
            if here and self.crash_before:
                os.kill(os.getpid(), signal.SIGKILL)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    slime.run.Ledger = Ledger  # type: ignore[misc]
    sys.argv = ["slime", *sys.argv[3:]]
    main()
