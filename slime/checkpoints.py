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
from buffer.records import Commit
from slime.errors import CheckpointError
from slime.protocols import Buffer, Trainer
from trainer.checkpoint_dir import new_checkpoint, prune_checkpoints, verify_checkpoint

logger = logging.getLogger(__name__)


async def export_model(trainer: Trainer, path: Path) -> None:
    """Write the trained weights as a Hugging Face directory, in place of what an earlier end of the run wrote."""
    shutil.rmtree(path, ignore_errors=True)
    await trainer.export(str(path))


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
        """Load the newest commit whose checkpoint is whole into the trainer. Returns its step, 0 for a run without one.

        A torn checkpoint costs the steps since the one before: the ledger reverts to that.

        Raises:
            CheckpointError: there are commits and none has a whole checkpoint, or checkpoints of another ledger.
        """
        commit = await self._newest_whole(ledger)
        step = commit.step if commit else 0
        written = list(self._root.glob("step_*"))
        if written and not ledger.next_ordinal:
            raise CheckpointError(
                f"{self._root}: got checkpoints, and a ledger in which nothing was ever issued: ledger.sqlite was lost "
                "or replaced. Restore it from a copy, or begin anew in another run_dir."
            )
        for path in written:
            if commit is None or path.name > commit.checkpoint:
                shutil.rmtree(path)
        if commit:
            await self._trainer.load(str(self._root / commit.checkpoint), version=step)
        self._committed = step
        return step

    async def _newest_whole(self, ledger: Ledger) -> Commit | None:
        torn: list[str] = []
        for commit in ledger.commits():
            try:
                await asyncio.to_thread(verify_checkpoint, self._root / commit.checkpoint)
            except CheckpointError as error:
                torn.append(str(error))
                continue
            if torn:
                logger.warning("%s\ncontinuing from step %d", "\n".join(torn), commit.step)
                ledger.revert(commit.step, reason="torn checkpoint")
            return commit
        if torn:
            raise CheckpointError(
                "\n".join(torn)
                + f"\nNo checkpoint in {self._root} is whole. Restore one from a copy, or start anew in "
                "another run_dir."
            )
        return None

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
        await buffer.commit(step, checkpoint=final.name, state={})
        self._committed = step
        prune_checkpoints(self._root, keep=self._keep)
