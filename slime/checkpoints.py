"""Commit a step: the trainer's state on disk first, then one ledger transaction that makes it the current one.

The transaction is the commit point. Killed before it, the run continues from the commit before and the new directory is
an orphan, removed at the next start; killed after it, everything up to the step is done.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

from buffer.ledger import Ledger
from slime.protocols import Buffer, Trainer
from trainer.checkpoint_dir import list_checkpoints, new_checkpoint, prune_checkpoints, verify_checkpoint

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run directory.

    Args:
        root: where they lie, one directory a step.
        keep: how many; older ones are removed.
    """

    def __init__(self, root: Path, *, trainer: Trainer, keep: int) -> None:
        self._root = root
        self._trainer = trainer
        self._keep = keep
        self._committed = 0

    async def restore(self, ledger: Ledger) -> int:
        """Load the last commit into the trainer. Returns its step, 0 for a run that has none.

        Raises:
            CheckpointError: the committed checkpoint is torn; the message says what to do.
        """
        commit = ledger.last_commit()
        current = self._root / commit.checkpoint if commit else None
        for orphan in list_checkpoints(self._root):
            if current is None or orphan.name > current.name:
                shutil.rmtree(orphan)
        if commit is None or current is None:
            return 0
        await asyncio.to_thread(verify_checkpoint, current)
        await self._trainer.load(str(current), version=commit.step)
        self._committed = commit.step
        return commit.step

    async def commit(self, step: int, *, buffer: Buffer) -> None:
        """Make everything up to `step` durable; does nothing when that is done.

        Raises:
            CheckpointError: it could not be written (a full disk); the one before it stays current.
        """
        if step <= self._committed:
            return
        final = self._root / f"step_{step:06d}"
        with new_checkpoint(final) as directory:
            await self._trainer.save(str(directory))
        buffer.commit(step, checkpoint=final.name, state={})
        self._committed = step
        prune_checkpoints(self._root, keep=self._keep)
