"""Every failure slime reports, as one tree.

    SlimeError
    ├── ConfigError       the run file, a profile or the command line is wrong; nothing has started
    ├── DataError         a prompt file is wrong: file, line and column are named
    ├── PromptError       one prompt cannot be rolled out; it is dropped on record and the run goes on
    ├── ModelError        a model directory is missing, incomplete or of an unknown family
    ├── HookError         a user's function cannot be found or has the wrong signature
    ├── RewardError       a user's reward function failed while it ran
    ├── EngineError       an inference engine did not start, answered wrongly or died
    ├── TrainerError      a training process failed
    ├── CheckpointError   a checkpoint could not be written or read
    ├── LedgerError       the ledger refuses a transition, or the run directory is in use
    │   ├── BufferFull    no room for more at this weight version; it is given back when steps are trained
    │   ├── Fenced        another consumer has taken over since; what this one still says is not recorded
    │   ├── NoAnswer      the buffer's service did not answer: whether the request took effect is not known
    │   └── StorageError  the ledger's file cannot be read or written: a full disk, a lock, damage
    └── StopRun           the run was asked to stop (a signal); not a failure

A message says what was got, where, and two ways out. All are picklable, because they cross process boundaries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class SlimeError(Exception):
    """Root of the tree: catch it to tell slime's own reports from bugs."""


class ConfigError(SlimeError):
    """The run file, a profile or the command line is wrong; raised before anything heavy starts."""


class DataError(SlimeError):
    """A prompt file is wrong; the message names file, line and column."""


class PromptError(SlimeError):
    """One prompt cannot be rolled out. It is dropped on record, and the run goes on."""

    reason = "unusable"
    """What the ledger records, in one word."""


class ModelError(SlimeError):
    """A model directory is missing, incomplete or of a family slime does not know."""


class HookError(SlimeError):
    """A user's function cannot be found, imported or called with the arguments its hook gives."""


class RewardError(SlimeError):
    """A reward function failed while it ran."""


class EngineError(SlimeError):
    """An inference engine did not start, answered wrongly or died."""


class TrainerError(SlimeError):
    """A training process failed."""


class CheckpointError(SlimeError):
    """A checkpoint could not be written, or the one on disk is torn."""


class LedgerError(SlimeError):
    """The ledger refuses a transition, or another run holds the run directory."""


class BufferFull(LedgerError):  # noqa: N818  an answer, not an error
    """The staleness bound admits no more at this weight version. Come again after the next step."""


class Fenced(LedgerError):  # noqa: N818  an answer, not an error
    """Another consumer has taken over since this one last spoke. What was packed for it goes to the other."""


class NoAnswer(LedgerError):  # noqa: N818  what is not known is no error
    """The buffer's service did not answer in time. The request may have taken effect; sent again, it does so once."""


class StorageError(LedgerError):
    """The ledger's file cannot be read or written. What was recorded before stands."""


class StopRun(SlimeError):  # noqa: N818  an outcome, not an error
    """The run was asked to stop. Not a failure: what was trained is committed on the way out."""


@contextlib.contextmanager
def boundary(error: type[SlimeError], what: str) -> Iterator[None]:
    """Turn whatever a user's code raises into `error`, saying where it happened.

    Args:
        error: the class to raise.
        what: the place in the user's words, e.g. ``"reward ./reward.py:score"``.

    Raises:
        SlimeError: `error`, chained to the original; a SlimeError passes through unchanged.
    """
    try:
        yield
    except SlimeError:
        raise
    except Exception as cause:
        raise error(f"{what} raised {type(cause).__name__}: {cause}") from cause
