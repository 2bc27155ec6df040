"""Which prompts are trained and which are held out for evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from buffer.prompts.index import PromptIndex, open_index
from buffer.prompts.scan import UInt64
from buffer.prompts.sources import IndexedPrompts
from slime.config import DataConfig
from slime.errors import DataError
from slime.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The prompts of a run. No question of the evaluation set is asked in `train`, whatever its label there."""

    train: tuple[IndexedPrompts, ...]
    """By source, as ``data.train`` lists them."""
    eval: tuple[Prompt, ...]
    """The first by the hash of their question: the same ones when rows are added to the file or moved in it."""
    num_duplicates: int
    """Rows left out because an earlier row of their file poses the same problem."""
    num_leaked: int
    """Training rows left out because ``data.eval`` asks the same."""


def load_split(data: DataConfig, *, num_eval: int | None = None) -> Split:
    """Index the prompt files of a run and keep apart what is trained and what is evaluated.

    Held out are the questions whose hash is below ``held_out * 2**64``. That is a function of the question alone: no
    row added, removed or moved elsewhere changes it, and rows of one question, in whatever source, stand on one side.

    Args:
        num_eval: at most so many prompts are read for evaluation.

    Raises:
        DataError: a file is wrong, or one side is left without prompts.
    """
    indices = [open_index(source.path, require_label=data.require_label) for source in data.train]
    apart = open_index(data.eval, require_label=data.require_label) if data.eval else None
    starts = [0 if apart else _num_held_out(index, share=data.held_out) for index in indices]
    leaked = [_asked_by(apart, index) if apart else None for index in indices]
    held_out = [IndexedPrompts(index, stop=start) for index, start in zip(indices, starts, strict=True)]
    split = Split(
        train=tuple(
            IndexedPrompts(index, start=start, without=without, in_file_order=not data.shuffle, tags=source.tags)
            for source, index, start, without in zip(data.train, indices, starts, leaked, strict=True)
        ),
        eval=_first([IndexedPrompts(apart)] if apart else held_out, num=num_eval),
        num_duplicates=sum(index.num_duplicates for index in (*indices, *([apart] if apart else []))),
        num_leaked=sum(len(places) for places in leaked if places is not None),
    )
    _check(split, data, num_held_out=sum(starts))
    return split


def _num_held_out(index: PromptIndex, *, share: float) -> int:
    return int(np.searchsorted(index.questions, np.uint64(int(share * 2**64))))


def _asked_by(evaluation: PromptIndex, index: PromptIndex) -> UInt64:
    """[num_leaked], ascending: places in `index` of the questions that the evaluation set asks."""
    asked = np.unique(evaluation.questions)
    first, end = (np.searchsorted(index.questions, asked, side=side) for side in ("left", "right"))
    found = end > first
    places = [np.arange(*bounds, dtype=np.uint64) for bounds in zip(first[found], end[found], strict=True)]
    return np.concatenate([np.empty(0, dtype=np.uint64), *places])


def _first(sources: Sequence[IndexedPrompts], *, num: int | None) -> tuple[Prompt, ...]:
    """The first prompts of several sources together, by question and uid; those they share once."""
    found: dict[tuple[int, int], tuple[IndexedPrompts, int]] = {}
    for source in sources:
        for position in range(len(source))[:num]:
            found.setdefault(source.identity(position), (source, position))
    return tuple(source[position] for _, (source, position) in sorted(found.items(), key=lambda item: item[0])[:num])


def _check(split: Split, data: DataConfig, *, num_held_out: int) -> None:
    for source, prompts in zip(data.train, split.train, strict=True):
        if not prompts:
            raise DataError(
                f"{source.path}: got no prompt to train on: every one is held out or is also in the evaluation set. "
                "Add prompts, or lower data.held_out."
            )
    if data.eval is None and data.held_out > 0 and not num_held_out:
        raise DataError(
            f"{', '.join(str(source.path) for source in data.train)}: held out 0 of {sum(map(len, split.train))} "
            f"prompts, with data.held_out = {data.held_out}. "
            "Raise data.held_out, or give an evaluation file of its own as data.eval."
        )
    if split.num_duplicates or split.num_leaked:
        logger.warning(
            "left out %d duplicate rows and %d training rows that the evaluation set asks too",
            split.num_duplicates,
            split.num_leaked,
        )
