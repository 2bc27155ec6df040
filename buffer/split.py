"""Which prompts are trained and which are held out for evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from buffer.dataset import prompt_uid, read_prompts
from slime.config import DataConfig
from slime.errors import DataError
from slime.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The prompts of a run. No question of `eval` is asked in `train`, whatever its label there."""

    train: tuple[Prompt, ...]
    """In file order."""
    eval: tuple[Prompt, ...]
    """In order of uid, so that its first n are the same n when the file's rows are added to or reordered."""
    num_duplicates: int
    """Rows left out of either because an earlier row poses the same problem."""
    num_leaked: int
    """Training rows left out because `eval` asks the same."""


def is_held_out(uid: str, *, share: float) -> bool:
    """Whether a problem belongs to the held-out `share`. A function of its content alone: no row added, removed or
    moved elsewhere in the file changes it."""
    return int(uid, 16) < share * 2**64


def load_split(data: DataConfig) -> Split:
    """Read the prompt files of a run and keep apart what is trained and what is evaluated.

    Raises:
        DataError: a file is wrong, or one side is left without prompts.
    """
    train_file = read_prompts(data.train, require_label=data.require_label)
    if data.eval is None:
        num_duplicates = train_file.num_duplicates
        eval_prompts = [prompt for prompt in train_file.prompts if is_held_out(prompt.uid, share=data.held_out)]
    else:
        eval_file = read_prompts(data.eval, require_label=data.require_label)
        num_duplicates = train_file.num_duplicates + eval_file.num_duplicates
        eval_prompts = list(eval_file.prompts)
    eval_uids = {prompt.uid for prompt in eval_prompts} if data.eval is None else set()
    candidates = [prompt for prompt in train_file.prompts if prompt.uid not in eval_uids]
    train = _without(candidates, questions=eval_prompts)
    split = Split(
        train=tuple(train),
        eval=tuple(sorted(eval_prompts, key=lambda prompt: prompt.uid)),
        num_duplicates=num_duplicates,
        num_leaked=len(candidates) - len(train),
    )
    _check(split, data)
    return split


def _without(prompts: Iterable[Prompt], *, questions: Iterable[Prompt]) -> list[Prompt]:
    asked = {_question(prompt) for prompt in questions}
    return [prompt for prompt in prompts if _question(prompt) not in asked]


def _question(prompt: Prompt) -> str:
    return prompt_uid(messages=prompt.messages, text=prompt.text)


def _check(split: Split, data: DataConfig) -> None:
    if not split.train:
        raise DataError(
            f"{data.train}: got no prompt to train on: every one is held out or is also in the evaluation set. "
            "Add prompts, or lower data.held_out."
        )
    if data.eval is None and data.held_out > 0 and not split.eval:
        raise DataError(
            f"{data.train}: held out 0 of {len(split.train)} prompts, with data.held_out = {data.held_out}. "
            "Raise data.held_out, or give an evaluation file of its own as data.eval."
        )
    if split.num_duplicates or split.num_leaked:
        logger.warning(
            "left out %d duplicate rows and %d training rows that the evaluation set asks too",
            split.num_duplicates,
            split.num_leaked,
        )
