"""Groups that are dropped: how many for which reason, and when there are so many in a row that a run should end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from slime.errors import DataError


class Drops:
    """The drops of a run, those of filters, failures and unusable prompts alike.

    Args:
        before: by reason, of the run so far.
        max_in_a_row: what `check` refuses.
    """

    def __init__(self, before: Mapping[str, int], *, max_in_a_row: int) -> None:
        self.by_reason = Counter(before)
        self._max_in_a_row = max_in_a_row
        self._in_a_row: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        """A group was dropped."""
        self.by_reason[reason] += 1
        self._in_a_row[reason] += 1

    def end_row(self) -> None:
        """A group was kept."""
        self._in_a_row.clear()

    def check(self) -> None:
        """See that groups are still kept now and then.

        Raises:
            DataError: too many in a row were dropped.
        """
        if self._in_a_row.total() < self._max_in_a_row:
            return
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self._in_a_row.most_common(3))
        raise DataError(
            f"the last {self._in_a_row.total()} groups were all dropped: {reasons}. "
            "Loosen buffer.filter, or give prompts that the model sometimes gets right."
        )
