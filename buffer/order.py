"""The order in which prompts are visited: a function of the seed and the prompts alone.

Any ordinal can be asked for at any time, so the position in the data is one number: the next ordinal to issue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from slime.errors import DataError
from slime.types import Prompt

UInt64 = npt.NDArray[np.uint64]


class PromptOrder:
    """Prompts by ordinal, epoch after epoch.

    Shuffled, the order of an epoch sorts the uids by a hash of (seed, epoch, uid): the rows' order in the file does not
    matter. Hashed here rather than drawn from a library's generator, whose stream may change with its version.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise DataError("got no prompts to order. Add rows to data.train, or loosen the filter that removed all.")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._uids: UInt64 = np.array([int(prompt.uid, 16) for prompt in prompts], dtype=np.uint64)
        self._orders: dict[int, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def prompt_at(self, ordinal: int) -> tuple[int, Prompt]:
        """The epoch and the prompt of the run's `ordinal`-th instance, from 0."""
        epoch, position = divmod(ordinal, len(self._prompts))
        if not self._shuffle:
            return epoch, self._prompts[position]
        return epoch, self._prompts[int(self._order(epoch)[position])]

    @property
    def fingerprint(self) -> str:
        """Changes when any ordinal's prompt may change: a run is not continued over other prompts or another seed."""
        uids = np.sort(self._uids) if self._shuffle else self._uids
        salt = f"{self._shuffle}:{self._seed if self._shuffle else 0}:".encode()
        digest = hashlib.blake2b(salt + uids.astype("<u8").tobytes(), digest_size=8).hexdigest()
        return f"{len(self._prompts)} prompts, {digest}"

    def _order(self, epoch: int) -> npt.NDArray[Any]:
        if epoch not in self._orders:
            if len(self._orders) > 1:  # two, because instances of two epochs are out at once at the seam
                del self._orders[min(self._orders)]
            salt = _mix(_mix(np.array([self._seed % 2**64], dtype=np.uint64)) + np.uint64(epoch))
            self._orders[epoch] = np.argsort(_mix(self._uids ^ salt))
        return self._orders[epoch]


def _mix(values: UInt64) -> UInt64:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): a bijection, so distinct uids never tie."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
