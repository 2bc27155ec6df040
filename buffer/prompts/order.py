"""The order in which prompts are visited: a function of the seed and the prompts alone.

Any position can be asked for at any time, at the same cost whatever the number of prompts, so the place of a run in its
data is one number: the next position to issue.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from buffer.prompts.sources import IndexedPrompts
from slime.config import MIXTURE_SLOTS
from slime.errors import DataError
from slime.types import Prompt

_MASK = 2**64 - 1
_NUM_ROUNDS = 8


class PromptOrder:
    """Prompts of one or several sources by position, epoch after epoch.

    Sources take turns in a fixed cycle of positions, in which each has its share of the weights, evenly spread. Each
    has epochs of its own: all its prompts once, shuffled in an order of that epoch or as they come.

    Args:
        sources: sequences of prompts. Shuffled, `buffer.prompts.sources` gives them in an order that does not depend
            on the order of rows in the file.
        weights: how often each source has its turn, whatever its size; equally often by default.

    Raises:
        DataError: a source has no prompts.
    """

    def __init__(
        self, *sources: Sequence[Prompt], seed: int, shuffle: bool = True, weights: Sequence[float] = ()
    ) -> None:
        if not sources or not all(sources):
            raise DataError("got no prompts to order. Add rows to data.train, or loosen the filter that removed all.")
        self._sources = sources
        self._seed = seed
        self._shuffle = shuffle
        self._cycle = _cycle(weights or [1.0] * len(sources))
        self._turns = [self._cycle.count(source) for source in range(len(sources))]
        self._earlier = [self._cycle[:slot].count(source) for slot, source in enumerate(self._cycle)]

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def prompt_at(self, position: int) -> tuple[int, Prompt]:
        """The epoch of its source, and the prompt, at the run's `position`, from 0.

        Raises:
            DataError: its row is gone.
        """
        cycle, slot = divmod(position, len(self._cycle))
        number = self._cycle[slot]
        prompts = self._sources[number]
        epoch, place = divmod(cycle * self._turns[number] + self._earlier[slot], len(prompts))
        if self._shuffle:
            place = permuted(place, size=len(prompts), key=_mix(_mix(_mix(self._seed) + number) + epoch))
        return epoch, prompts[place]

    @property
    def fingerprint(self) -> str:
        """Changes when any position's prompt may change: a run is not continued over other prompts or another seed."""
        digest = blake2b(f"{self._shuffle}:{self._seed if self._shuffle else 0}:".encode(), digest_size=8)
        digest.update(f"{self._cycle}:{[_fingerprint(prompts) for prompts in self._sources]}".encode())
        return f"{len(self)} prompts, {digest.hexdigest()}"


def permuted(place: int, *, size: int, key: int) -> int:
    """The image of `place` under a permutation of ``range(size)`` that `key` chooses.

    An unbalanced Feistel network over the smallest power of two that holds `size`, applied until the image is in range
    (cycle walking; Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): less than twice on average. Written
    here rather than drawn from a library's generator, whose stream may change with its version.
    """
    num_bits = (size - 1).bit_length()
    num_low = num_bits // 2
    low_mask, high_mask = 2**num_low - 1, 2 ** (num_bits - num_low) - 1
    keys = [_mix(key + number) for number in range(_NUM_ROUNDS)]
    while True:
        low, high = place & low_mask, place >> num_low
        for number in range(0, _NUM_ROUNDS, 2):
            high ^= _mix(low ^ keys[number]) & high_mask
            low ^= _mix(high ^ keys[number + 1]) & low_mask
        place = high << num_low | low
        if place < size:
            return place


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014), a bijection of 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _cycle(weights: Sequence[float]) -> list[int]:
    """Whose turn it is at each position of the cycle: each source as often as its weight says, to less than one turn.

    Turns that the shares leave over go to the largest remainders. The k-th of n turns of a source stands at
    ``(k + 1/2) / n`` of the cycle.
    """
    if len(weights) == 1:
        return [0]
    shares = [weight / sum(weights) * MIXTURE_SLOTS for weight in weights]
    turns = [int(share) for share in shares]
    remainders = sorted(range(len(shares)), key=lambda source: turns[source] - shares[source])
    for source in remainders[: MIXTURE_SLOTS - sum(turns)]:
        turns[source] += 1
    return [source for _, source in sorted(((k + 0.5) / n, source) for source, n in enumerate(turns) for k in range(n))]


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    if isinstance(prompts, IndexedPrompts):
        return prompts.fingerprint
    return blake2b("".join(prompt.uid for prompt in prompts).encode(), digest_size=8).hexdigest()
