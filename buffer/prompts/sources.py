"""Prompts in an index, as sequences: all of a file, those that are held out, those that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import overload

import numpy as np

from buffer.prompts.index import PromptIndex
from buffer.prompts.scan import IN_FILE_ORDER, QUESTION, UID, UInt64
from slime.types import Prompt


class IndexedPrompts(Sequence[Prompt]):
    """Prompts of one index, read from the file one by one as they are asked for.

    Args:
        start: how many prompts at the beginning of the canonical order are left out.
        stop: where the prompts end in the canonical order; at its end by default.
        without: ascending places in the canonical order, from `start` on, that are left out too.
        in_file_order: rather than in canonical order, which does not depend on the order of rows. Takes time in
            proportion to the rows if any are left out, and memory.
        tags: added to those of each prompt.
    """

    def __init__(
        self,
        index: PromptIndex,
        *,
        start: int = 0,
        stop: int | None = None,
        without: UInt64 | None = None,
        in_file_order: bool = False,
        tags: Sequence[str] = (),
    ) -> None:
        self._index = index
        self._start = start
        self._stop = len(index) if stop is None else stop
        self._without = np.empty(0, dtype=np.uint64) if without is None else without
        self._tags = tuple(tags)
        self._places = self._in_file_order() if in_file_order else None
        self._before = self._without - np.arange(len(self._without), dtype=np.uint64)
        """For each one left out, how many are before it that are not."""

    def __len__(self) -> int:
        return self._stop - self._start - len(self._without)

    @overload
    def __getitem__(self, position: int) -> Prompt: ...
    @overload
    def __getitem__(self, position: slice) -> list[Prompt]: ...
    def __getitem__(self, position: int | slice) -> Prompt | list[Prompt]:
        if isinstance(position, slice):
            return [self[i] for i in range(len(self))[position]]
        prompt = self._index.prompt(self._place(position))
        added = tuple(tag for tag in self._tags if tag not in prompt.tags)
        return replace(prompt, tags=prompt.tags + added) if added else prompt

    def identity(self, position: int) -> tuple[int, int]:
        """The hash of the question, and the uid: what the canonical order sorts by."""
        place = self._place(position)
        return int(self._index.columns[QUESTION, place]), int(self._index.columns[UID, place])

    @property
    def fingerprint(self) -> str:
        """Changes when the prompt at any position may change."""
        whole = self._index.fingerprint(in_file_order=self._places is not None)
        digest = blake2b(f"{whole}:{self._start}:{self._stop}:".encode(), digest_size=8)
        digest.update(self._without.astype("<u8").tobytes())
        return digest.hexdigest()

    def _place(self, position: int) -> int:
        position = range(len(self))[position]
        if self._places is not None:
            return int(self._places[position])
        place = self._start + position
        return place + int(np.searchsorted(self._before, np.uint64(place), side="right"))

    def _in_file_order(self) -> UInt64:
        order: UInt64 = self._index.columns[IN_FILE_ORDER]
        if len(self) == len(order):
            return order
        is_left_out = np.ones(len(order), dtype=bool)
        is_left_out[self._start : self._stop] = False
        is_left_out[self._without] = True
        kept: UInt64 = order[~is_left_out[order]]
        return kept
